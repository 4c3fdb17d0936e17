import csv
import io
import urllib.parse
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from rollout_server.traces.writer import TraceWriter
from tests.support.inspected import HOSTILE, decode, texts
from tests.support.trace_reader import TraceReader

API = "/api/v1/runs"
HOSTILE_RUN = urllib.parse.quote("[x] ' .. <b>", safe="")


def get(client: TestClient, path: str, **query: object) -> dict:
    response = client.get(path, params=query)
    assert response.status_code == 200, response.text
    return response.json()


def test_runs_are_folders_that_hold_one(client: TestClient) -> None:
    runs = get(client, API)["runs"]
    assert {run["name"] for run in runs} == {"demo", "[x] ' .. <b>"}
    demo = next(run for run in runs if run["name"] == "demo")
    assert (demo["policy"], demo["num_segments"], demo["last_step"], demo["finished"]) == ("adaswitch", 3, 3, False)


def test_runs_come_in_pages(client: TestClient) -> None:
    first = get(client, API, limit=1)
    second = get(client, API, limit=1, cursor=first["next_cursor"])
    assert len({first["runs"][0]["name"], second["runs"][0]["name"]}) == 2
    assert second["next_cursor"] is None


def test_a_run_counts_what_its_trace_holds(client: TestClient) -> None:
    run = get(client, f"{API}/demo")
    assert (run["num_sequences"], run["num_tokens"], run["num_switched"]) == (12, 3 * (12 + 13 + 14 + 15), 6)
    assert run["switch_rate"] == 0.5
    assert run["mean_first_switch"] == 6.0
    assert (run["divergence"], run["policy"]["window"]) == ("forward_kl", 3)
    assert (run["policies"], run["finish_reasons"]) == (["adaswitch"], ["length", "stop"])


def test_steps_join_metrics_and_trace(client: TestClient, runs_dir: Path) -> None:
    steps = get(client, f"{API}/demo/steps")["steps"]
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert (steps[0]["accuracy"], steps[0]["num_tokens"], steps[1]["loss"]) == (0.25, None, 0.5)
    with TraceReader(runs_dir / "demo" / "traces") as reader:
        expected = {summary.step: summary for summary in reader.steps()}
    for step in steps[1:]:
        for name in ("divergence_mean", "divergence_p50", "divergence_p99", "switch_rate", "teacher_share"):
            assert step[name] == pytest.approx(getattr(expected[step["step"]], name), rel=1e-5)


@pytest.mark.parametrize("order", ["step", "num_tokens", "first_switch", "mean_divergence"])
@pytest.mark.parametrize("descending", [False, True])
def test_pages_follow_each_other_without_gap_or_repetition(client: TestClient, order: str, descending: bool) -> None:
    whole = get(client, f"{API}/demo/sequences", order=order, descending=descending, limit=200)["sequences"]
    paged, cursor = [], None
    while True:
        query = {"cursor": cursor} if cursor else {}
        page = get(client, f"{API}/demo/sequences", order=order, descending=descending, limit=5, **query)
        assert page["num_matching"] == 12
        paged += page["sequences"]
        if (cursor := page["next_cursor"]) is None:
            break
    assert paged == whole
    values = [sequence[order] for sequence in whole if sequence[order] is not None]
    assert values == sorted(values, reverse=descending)


@pytest.mark.parametrize(
    ("query", "num_matching"),
    [
        ({"switched": True}, 6),
        ({"first_step": 2, "last_step": 2}, 4),
        ({"first_switch_min": 6}, 3),
        ({"first_switch_max": 6}, 3),
        ({"finish_reason": "length"}, 3),
        ({"policy": "skd"}, 0),
        ({"text": "' OR 1=1 --"}, 0),
        ({"text": "T1"}, 12),
    ],
)
def test_filters_select(client: TestClient, query: dict, num_matching: int) -> None:
    assert get(client, f"{API}/demo/sequences", **query)["num_matching"] == num_matching


def test_tokens_are_what_the_trace_holds(client: TestClient, runs_dir: Path) -> None:
    tokens = get(client, f"{API}/demo/sequences/p2-0.0.0/tokens")["tokens"]
    with TraceReader(runs_dir / "demo" / "traces") as reader:
        trace = reader.sequence("p2-0.0.0")
    assert trace is not None
    assert [token["token_id"] for token in tokens] == [token.token_id for token in trace.tokens]
    assert [token["divergence"] for token in tokens] == pytest.approx([token.divergence for token in trace.tokens])
    divergences = [token["divergence"] for token in tokens]
    assert tokens[4]["moving_average"] == pytest.approx(sum(divergences[1:4]) / 3)
    assert [token["moving_average"] for token in tokens[:3]] == [None] * 3
    assert len(tokens[0]["teacher_top"]) == 3


def test_hostile_names_and_texts_are_only_text(client: TestClient) -> None:
    page = get(client, f"{API}/{HOSTILE_RUN}/sequences")
    ids = {sequence["sequence_id"] for sequence in page["sequences"]}
    assert ids == {f"{HOSTILE}.0.0", "=1+1/tokens/x.0.0"}
    for sequence_id in ids:
        path = f"{API}/{HOSTILE_RUN}/sequences/{urllib.parse.quote(sequence_id, safe='')}"
        assert get(client, path)["completion_text"] == HOSTILE
        assert get(client, f"{path}/tokens")["sequence_id"] == sequence_id


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2fdemo", "demo%00", "%2Fetc", "notes", "demo%2ftraces"])
def test_a_name_is_never_a_path(client: TestClient, name: str) -> None:
    response = client.get(f"{API}/{name}/steps")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("cursor", ["x", "WzFd", "W10=", "bnVsbA==", "é"])
def test_a_cursor_that_is_not_ours_is_refused(client: TestClient, cursor: str) -> None:
    response = client.get(f"{API}/demo/sequences", params={"cursor": cursor})
    assert (response.status_code, response.json()["type"]) == (422, "urn:adaswitch:problem:bad-cursor")


def test_histograms_count_every_value_once(client: TestClient) -> None:
    lengths = get(client, f"{API}/demo/histograms/num_tokens", bins=3)
    assert (lengths["edges"], lengths["counts"]) == ([0.0, 5.0, 10.0, 15.0], [0, 0, 12])
    switches = get(client, f"{API}/demo/histograms/first_switch", bins=7)
    assert (switches["counts"], switches["num_missing"]) == ([0, 0, 0, 0, 0, 3, 3], 6)
    divergences = get(client, f"{API}/demo/histograms/divergence")
    assert divergences["num_values"] + divergences["num_missing"] == 162


def test_downloads_hold_the_trace(client: TestClient) -> None:
    rows = list(csv.DictReader(io.StringIO(client.get(f"{API}/demo/downloads/sequences").text)))
    assert len(rows) == 12
    response = client.get(f"{API}/demo/downloads/tokens", params={"step": 2, "format": "parquet"})
    assert pq.read_table(io.BytesIO(response.content)).num_rows == 54
    assert len(client.get(f"{API}/demo/downloads/tokens", params={"step": 2}).text.splitlines()) == 55


def test_a_corrupt_segment_is_served_without_and_named(client: TestClient, runs_dir: Path) -> None:
    tokens = runs_dir / "demo" / "traces" / "step-000002" / "tokens.parquet"
    content = bytearray(tokens.read_bytes())
    content[200:230] = bytes(30)
    tokens.write_bytes(content)
    (runs_dir / "demo" / "traces" / "step-000003" / "sequences.parquet").write_bytes(b"PAR1")
    (runs_dir / "demo" / "traces" / "step-000004").mkdir()
    run = get(client, f"{API}/demo")
    assert run["num_sequences"] == 4
    names = [segment["name"] for segment in run["skipped"]]
    assert names == ["step-000002", "step-000003", "step-000004"]
    ready = get(client, "/readyz")
    assert (ready["ready"], ready["num_skipped_segments"], ready["skipped"][0]["run"]) == (True, 3, "demo")
    assert "adaswitch_inspector_skipped_segments 3.0" in client.get("/metrics").text


def test_broken_files_of_a_run_are_named(client: TestClient, runs_dir: Path) -> None:
    (runs_dir / "demo" / "config.yaml").write_text("policy: [")
    (runs_dir / "demo" / "summary.json").write_text("[1")
    (runs_dir / "demo" / "metrics.jsonl").write_text('{"step": 1, "train/loss_nats": NaN}\nx\n{"st')
    run = get(client, f"{API}/demo")
    assert len(run["problems"]) == 3
    assert get(client, f"{API}/demo/steps")["steps"][0]["loss"] is None


def test_events_tell_of_the_steps(client: TestClient, runs_dir: Path, make_sequence) -> None:
    first = client.get(f"{API}/demo/events", params={"max_seconds": 0.1}).text
    assert '"steps":[1,2,3],"num_sequences":12' in first
    TraceWriter(runs_dir / "demo" / "traces", decode=decode, token_texts=texts).write_segment(4, [make_sequence()])
    later = client.get(f"{API}/demo/events", params={"max_seconds": 1.5}).text
    assert '"num_sequences":13' in later
