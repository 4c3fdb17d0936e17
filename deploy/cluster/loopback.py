"""Ray of one machine on loopback. Must be asked before Ray is imported, and so imports nothing of it."""

import os

from common.config import Placement


def keep_ray_on_loopback(placement: Placement) -> None:
    """Let the Ray that a run starts for itself listen on 127.0.0.1 alone; a cluster that is named is left as it is.

    By itself Ray takes the machine's outward address and listens on all interfaces on Linux, and replaces a loopback
    address that it is given by that one. Told that no other machine will join, it takes loopback, as it always does on
    macOS and Windows, after which this variable is named. It is read once, when Ray is imported.
    """
    if placement.address is None and "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
