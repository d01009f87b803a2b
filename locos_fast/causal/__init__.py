"""Whether the heads that were found do the work: ablation and its controls."""
