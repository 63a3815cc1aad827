"""Defaults that the ops, the layers and the configuration share; imports nothing."""

GRADED_ROWS = 8  # of max_graded_rows, in the schema of the op `linear` too
