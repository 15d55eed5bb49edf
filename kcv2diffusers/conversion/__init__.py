"""Conversions in both directions, inspection of checkpoints, dry-run plans, check of the weight maps."""
