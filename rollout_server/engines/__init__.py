"""Implementations of the Engine protocol: ``vllm`` (real), ``scripted`` (no model), ``remote`` (behind a Ray actor)."""
