"""Trying a prompt: what is asked, refused and answered. The whole way over Ray: tests/deploy/cluster/test_attach.py."""

import json

import pytest

API = "/api/v1"


def test_without_a_cluster_it_says_how_to_attach_one(client) -> None:
    assert client.get(f"{API}/live").json() == {"attached": False, "runs": []}
    problem = client.post(f"{API}/generate", json={"prompt": "1+1="})
    assert (problem.status_code, problem.json()["type"]) == (409, "urn:adaswitch:problem:not-attached")
    assert "adaswitch serve RUNS_DIR --attach" in problem.json()["detail"]


def test_a_live_run_streams_its_decisions(make_client, live_rollouts) -> None:
    client = make_client(live=live_rollouts)
    assert client.get(f"{API}/live").json() == {"attached": True, "runs": ["demo"]}
    response = client.post(f"{API}/generate", json={"prompt": "1+2*3=", "seed": 1})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [dict(line.split(": ", 1) for line in e.splitlines()) for e in response.text.strip().split("\n\n")]
    names = [event["event"] for event in events]
    summary = json.loads(events[-1]["data"])
    assert names == ["start", *["token"] * summary["num_tokens"], "summary"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "one of prompt and prompt_token_ids must be given"),
        ({"prompt": "1", "prompt_token_ids": [3]}, "one of prompt and prompt_token_ids must be given"),
        ({"prompt": ""}, "body.prompt"),
        ({"prompt": "1", "temperature": 3}, "body.temperature"),
        ({"prompt": "1", "policy": {"type": "adaswitch", "window": 0}}, "body.policy"),
        ({"prompt": "1", "engines": 3}, "body.engines"),
    ],
)
def test_what_cannot_be_used_is_named(make_client, live_rollouts, body, message) -> None:
    problem = make_client(live=live_rollouts).post(f"{API}/generate", json=body)
    assert problem.status_code == 422
    assert message in "\n".join(problem.json()["errors"])


def test_it_is_behind_the_token(make_client, live_rollouts) -> None:
    client = make_client(token="a" * 16, live=live_rollouts)
    assert client.post(f"{API}/generate", json={"prompt": "1"}).status_code == 401
