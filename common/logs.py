"""Logging of our own processes: one line an event, our modules at INFO, everybody else's at WARNING."""

import logging
import os

_OURS = ("common", "rollout_server", "trainer", "deploy")


def set_up_logging() -> None:
    """Once per process. ADASWITCH_LOG_LEVEL changes our level; VLLM_LOGGING_LEVEL, if not set, becomes WARNING."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for package in _OURS:
        logging.getLogger(package).setLevel(os.environ.get("ADASWITCH_LOG_LEVEL", "INFO"))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
