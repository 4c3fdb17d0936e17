from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from common.errors import UserError
from rollout_server.inspector.guard import MAX_BODY_BYTES
from rollout_server.inspector.server import check_bind

TOKEN = "a-token-of-some-length"


def test_an_unknown_host_is_refused(client: TestClient) -> None:
    response = client.get("/api/v1/runs", headers={"Host": "evil.example"})
    assert (response.status_code, response.json()["type"]) == (400, "urn:adaswitch:problem:unknown-host")


@pytest.mark.parametrize("header", [None, "Bearer x", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xff"])
def test_without_the_token_nothing_is_told(make_client: Callable[..., TestClient], header: str | None) -> None:
    client = make_client(TOKEN)
    headers = {"Authorization": header.encode("latin-1")} if header else {}
    for path in ("/api/v1/runs", "/api/v1/openapi.json", "/metrics", "/api/v1/nothing"):
        assert client.get(path, headers=headers).status_code == 401
    assert client.get("/healthz").status_code == 200


def test_the_token_lets_in(make_client: Callable[..., TestClient]) -> None:
    response = make_client(TOKEN).get("/api/v1/runs", headers={"Authorization": f"Bearer {TOKEN}"})
    assert response.status_code == 200


def test_every_answer_forbids_foreign_content(client: TestClient) -> None:
    for path in ("/api/v1/runs", "/nothing", "/healthz"):
        headers = client.get(path, headers={"Origin": "https://evil.example"}).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_a_long_body_is_refused(client: TestClient) -> None:
    response = client.post("/api/v1/runs/demo/replay", content=b" " * (MAX_BODY_BYTES + 1))
    assert response.status_code == 413


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_bind_that_others_can_reach_needs_a_token(tmp_path: Path, host: str) -> None:
    with pytest.raises(UserError, match="--token-env"):
        check_bind(tmp_path, host, None, [])
    assert host in check_bind(tmp_path, host, TOKEN, [])
    assert check_bind(tmp_path, "127.0.0.1", None, [])
