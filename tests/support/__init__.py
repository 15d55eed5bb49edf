"""What the tests share: processes, checkpoints, a Hub, small models."""
