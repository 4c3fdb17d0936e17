"""Keeps a local Ray on loopback. Must be called before Ray is imported, so this module does not import Ray."""

import os

from common.config import Placement


def keep_ray_on_loopback(placement: Placement) -> None:
    """Make the Ray that a run starts for itself listen only on 127.0.0.1. An existing cluster is not affected.

    By default on Linux, Ray uses the machine's external address, listens on all interfaces, and replaces a given
    loopback address. If told that no other machine will join, it uses loopback, as it always does on macOS and Windows;
    the variable is named after them. Ray reads it once, when it is imported.
    """
    if placement.address is None and "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
