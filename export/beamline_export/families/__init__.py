"""Checkpoint families: each module reads one kind of checkpoint into a TransformerSpec and named weights."""
