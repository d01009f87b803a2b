"""Scores over many trials: a manifest, a folder that survives being killed, statistics, the loop that fills it."""
