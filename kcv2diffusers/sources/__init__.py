"""Readers, one for each container format, and the identification of the parts in a checkpoint."""
