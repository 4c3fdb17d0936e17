"""Logging of our own processes: one line an event, our modules at INFO, everybody else's at WARNING."""

import logging
import os
import sys

_OURS = ("common", "rollout_server", "trainer", "deploy")


def set_up_logging() -> None:
    """Once per process, before torch and the libraries around it are imported: they read their levels then.

    ADASWITCH_LOG_LEVEL changes ours; a level that is set for another library stays. Progress bars of downloads and data
    sets are shown in a terminal only.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for package in _OURS:
        logging.getLogger(package).setLevel(os.environ.get("ADASWITCH_LOG_LEVEL", "INFO"))
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
    if not sys.stderr.isatty():
        quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
