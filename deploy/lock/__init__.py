"""The pinned CPU stack, and the command that pins it anew."""
