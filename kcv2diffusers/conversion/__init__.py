"""The conversions in both directions, and what describes them: inspection, plans, the check of the maps."""
