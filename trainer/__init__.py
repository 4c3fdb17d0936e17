"""Mixed sequences to new weights. Start at ``loop.py``. Knows nothing of the rollout server."""
