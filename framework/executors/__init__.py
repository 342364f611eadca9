"""The group `executor`: where the engine of a generation works."""
