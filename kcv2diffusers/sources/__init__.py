"""Readers, one for each container, and what a checkpoint holds."""
