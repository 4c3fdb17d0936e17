"""Prompt to mixed sequence. Start at ``controller.py``. Knows nothing of the trainer."""
