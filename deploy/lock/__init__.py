"""The pinned dependencies, and the command that updates the pins."""
