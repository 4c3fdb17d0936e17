"""Turns a prompt into a mixed sequence. Start reading at ``controller.py``. Does not depend on the trainer."""
