"""From the command to the summary: starting, stepping, resuming and copying one run."""
