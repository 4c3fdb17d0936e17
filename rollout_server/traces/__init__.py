"""The decisions on all tokens, stored as Parquet segments: written by ``writer.py``, read by ``index.py``.

A trace is a folder with one segment per training step. A segment is a folder that holds ``sequences.parquet`` (one row
per mixed sequence) and ``tokens.parquet`` (one row per token). ``schema.py`` describes every column.
"""
