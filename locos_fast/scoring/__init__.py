"""From a forward pass to the scores of all heads: recording, directions, logit units, segments, diagnosis."""
