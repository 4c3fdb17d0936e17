"""One run from the command to the summary: start, steps, resume and copies."""
