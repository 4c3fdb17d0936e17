"""What a run does when a worker dies, hangs or fails."""
