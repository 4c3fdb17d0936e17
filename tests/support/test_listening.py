"""The search for listeners finds what there is to find."""

import os
import socket
import subprocess
import sys

import pytest

from tests.support.listening import outward_listeners

LISTEN = """
import socket, sys
listener = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
listener.bind((sys.argv[1], 0)); listener.listen()
print(listener.getsockname()[1], flush=True); sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("address", "is_outward"),
    [("0.0.0.0", True), ("::", True), ("127.0.0.1", False), ("::1", False), ("::ffff:127.0.0.1", False)],
)
def test_a_listener_is_found_unless_only_this_machine_can_reach_it(address: str, is_outward: bool) -> None:
    mark = f"LISTENING_TEST_{os.getpid()}_{address}"
    listener = subprocess.Popen(
        [sys.executable, "-c", LISTEN, address],
        env={**os.environ, "MARK": mark},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert listener.stdout is not None
    port = listener.stdout.readline().strip()
    if not port and ":" in address and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        found = outward_listeners(mark)
    finally:
        listener.communicate(timeout=20)
    assert bool(found) is is_outward
    assert all(f":{port} " in place for place in found)
