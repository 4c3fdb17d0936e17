"""Trains the student on mixed sequences. Start reading at ``loop.py``. Does not depend on the rollout server."""
