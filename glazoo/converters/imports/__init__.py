"""Importing checkpoints of other packages."""
