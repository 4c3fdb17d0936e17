"""Access control: who may send requests, and how large they may be. Independent of their content.

One ASGI layer around the app checks the Host header (against DNS rebinding), the bearer token and the body size, and
sets the headers that keep a browser from running or framing foreign content. There is no CORS.
"""

import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.inspector.problems import problem

MAX_BODY_BYTES = 64 * 1024
_GUARDED = ("/api", "/metrics")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """``hosts``: host names of this service. ``token``: None accepts every client."""

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], token: str | None) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if str(scope["path"]).startswith(_GUARDED):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            body = await _read_body(receive)
            if body is not None:
                await self._app(scope, _replay_body(body, receive), send_guarded)
                return
            refusal = problem(413, f"the body must have at most {MAX_BODY_BYTES} bytes", kind="too-large")
        await refusal(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if _host_name(headers.get("host", "")) not in self._hosts:
            return problem(400, "the Host header is not a name of this service", kind="unknown-host")
        if self._token is None or not str(scope["path"]).startswith(_GUARDED):
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() == "bearer" and hmac.compare_digest(given, self._token.encode()):
            return None
        return problem(401, "a bearer token is required", kind="no-token", headers={"WWW-Authenticate": "Bearer"})


def _host_name(header: str) -> str | None:
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


async def _read_body(receive: Receive) -> bytes | None:
    """The complete body, or None if it is too long."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _replay_body(body: bytes, receive: Receive) -> Receive:
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
