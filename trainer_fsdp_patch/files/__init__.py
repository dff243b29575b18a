"""Adapter files and checkpoints on disk, of any origin; no model is needed."""
