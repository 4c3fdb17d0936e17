"""One sequence written for somebody who watches it, by a run's own engines, beside the training.

``records.py`` says what is asked and answered (plain values: no torch), ``writer.py`` writes.
"""
