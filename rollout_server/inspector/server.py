"""The address that the inspector binds: loopback by default, others only with a token."""

import ipaddress
import os
from collections.abc import Callable
from pathlib import Path

import uvicorn

from common.errors import UserError
from rollout_server.inspector.app import create_app
from rollout_server.inspector.live import LiveRollouts

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_MIN_TOKEN_LENGTH = 16


def serve(
    runs_dir: Path,
    *,
    host: str,
    port: int,
    token_env: str | None,
    names: list[str],
    attach: Callable[[], LiveRollouts] | None = None,
) -> None:
    """Serve the runs in a folder until interrupted. Raises UserError for an unsafe address.

    ``attach`` connects to the cluster of the live runs; it is called after all other checks.
    """
    token = read_token(token_env)
    hosts = check_bind(runs_dir, host, token, names)
    app = create_app(runs_dir, hosts=hosts, token=token, live_rollouts=attach() if attach else None)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="info",
        access_log=False,
        server_header=False,
        limit_concurrency=256,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )


def read_token(variable: str | None) -> str | None:
    """The token in an environment variable, or None if no variable is given."""
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if len(token) < _MIN_TOKEN_LENGTH:
        raise UserError(f"${variable} must hold a token of at least {_MIN_TOKEN_LENGTH} characters, got {len(token)}")
    return token


def check_bind(runs_dir: Path, host: str, token: str | None, names: list[str]) -> list[str]:
    """The host names of this service. Raises UserError if the folder does not exist or a token is needed."""
    if not runs_dir.is_dir():
        raise UserError(f"no runs to serve: {runs_dir} is not a folder")
    if is_loopback(host):
        return [*_LOOPBACK_NAMES, host, *names]
    if token is None:
        raise UserError(f"--host {host} can be reached from other machines: set --token-env to a variable with a token")
    return [*_LOOPBACK_NAMES, host, *names]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
