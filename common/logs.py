"""Logging of our own processes: one line per event, our modules at INFO, all others at WARNING."""

import logging
import os
import sys

_OURS = ("common", "rollout_server", "trainer", "deploy")


def set_up_logging() -> None:
    """Call this once per process, before importing torch and related libraries, which read their log levels on import.

    ADASWITCH_LOG_LEVEL changes our level. A level that is already set for another library stays. Progress bars of
    downloads and datasets are shown only in a terminal.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for package in _OURS:
        logging.getLogger(package).setLevel(os.environ.get("ADASWITCH_LOG_LEVEL", "INFO"))
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
    if not sys.stderr.isatty():
        quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
