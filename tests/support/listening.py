"""Which addresses processes listen at, from /proc, where everybody can see it without a tool."""

import ipaddress
import os
import re
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"


def outward_listeners(mark: str) -> set[str]:
    """Sockets beyond loopback of all processes with ``mark`` in their environment, as ``address:port program``."""
    sockets = dict(_listening())
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() not in (process / "environ").read_bytes():
                continue
            program = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            for descriptor in (process / "fd").iterdir():
                inode = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor))
                address, port = sockets.get(inode[1], (None, 0)) if inode else (None, 0)
                if address is not None and not address.is_loopback:
                    found.add(f"{address}:{port} {program}")
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it ended meanwhile, or is not ours
            continue
    return found


def _listening() -> Iterator[tuple[str, tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]]:
    """(inode, (address, port)) of every listening TCP socket."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == _LISTEN:
                address, port = columns[1].split(":")
                yield columns[9], (_address(address), int(port, 16))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The kernel writes addresses as words in the machine's own order."""
    words = [bytes.fromhex(text[first : first + 8])[::-1] for first in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address
