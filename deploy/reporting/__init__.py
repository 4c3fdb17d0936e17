"""Output of a run, during and after it: terminal and trackers."""
