"""The downstream tasks, registered by entry points like anybody's."""
