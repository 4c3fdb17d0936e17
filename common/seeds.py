"""Seeds that depend on what is drawn, never on when it is drawn."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in 0..2^63-1 from the parts in order. Different parts give different seeds, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
