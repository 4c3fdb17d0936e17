import subprocess
import sys
from pathlib import Path

from fastapi.testclient import TestClient

PATH = "/api/v1/runs/demo/replay"


def replay(client: TestClient, policy: dict, **rest: object) -> dict:
    response = client.post(PATH, json={"policy": policy, **rest})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_policy_that_never_switches_knows_only_the_students_own_sequences(client: TestClient) -> None:
    report = replay(client, {"type": "on_policy"})
    assert (report["num_sequences"], report["num_no_switch"], report["num_unknown"]) == (12, 6, 6)
    assert report["reasons"] == {"teacher_had_taken_over": 6, "length_limit": 3, "student_finished": 3}
    assert (report["switch_rate"], report["switch_rate_min"], report["switch_rate_max"]) == (0.0, 0.0, 0.5)
    assert report["num_same"] == 6


def test_a_fixed_switch_can_be_judged_up_to_the_recorded_one(client: TestClient) -> None:
    report = replay(client, {"type": "fixed", "position": 6})
    # Recorded first switches are 5 and 7 in each step; two sequences in each have none.
    assert (report["num_switch"], report["num_unknown"]) == (9, 3)
    assert report["mean_first_switch"] == 6.0
    assert {d["outcome"] for d in report["differences"]} == {"switch", "unknown"}


def test_off_policy_switches_at_once(client: TestClient) -> None:
    report = replay(client, {"type": "off_policy"}, first_step=2, last_step=2)
    assert (report["num_sequences"], report["switch_rate"], report["num_earlier"]) == (4, 1.0, 4)


def test_a_policy_with_another_divergence_is_refused(client: TestClient) -> None:
    for policy in ({"type": "decay"}, {"type": "adaswitch", "divergence": {"type": "reverse_kl"}}):
        response = client.post(PATH, json={"policy": policy})
        assert (response.status_code, response.json()["type"]) == (409, "urn:adaswitch:problem:divergence-mismatch")


def test_ranks_beyond_the_recorded_list_are_refused(client: TestClient) -> None:
    response = client.post(PATH, json={"policy": {"type": "skd", "top_k": 9}})
    assert (response.status_code, response.json()["type"]) == (409, "urn:adaswitch:problem:list-too-short")
    assert replay(client, {"type": "skd", "top_k": 8})["num_sequences"] == 12


def test_an_adaswitch_policy_with_a_threshold_nothing_exceeds_never_switches(client: TestClient) -> None:
    report = replay(client, {"type": "adaswitch", "multiplier": 1e6, "window": 1, "floor": 1e6})
    assert report["num_switch"] == 0


def test_the_service_loads_no_engine() -> None:
    code = (
        "import sys, rollout_server.inspector.server\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers') if name in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
