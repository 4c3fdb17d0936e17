"""Which cluster a run joins, and what it says where there is none."""

import socket

import pytest

from common.errors import UserError
from deploy.cluster.reservation import connect


def test_an_address_where_nobody_listens_is_named_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(
            UserError, match=rf"^placement.address: can't connect to a Ray cluster at '{address}': .*refused"
        ):
            connect(address)


def test_what_is_no_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"^placement.address: can't connect to a Ray cluster at 'nonsense': Invalid address"
    ):
        connect("nonsense")
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(
        UserError, match=r"^RAY_ADDRESS: can't connect .* expected a running head's host:port, or auto$"
    ):
        connect(None)
