"""How fast the inspector answers on a large trace while a writer goes on: eight clients on loopback.

Writes docs/benchmarks/inspector.json. Run on a quiet machine: python -m tests.benchmarks.inspector
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from common.sequence import MixedSequence, Prompt, TokenSource, TopLogprobs
from rollout_server.traces.writer import TraceWriter

NUM_STEPS = 200
SEQUENCES_PER_STEP = 50
TOKENS_PER_SEQUENCE = 100
NUM_CLIENTS = 8
K = 5
RUN = "/api/v1/runs/large"
PATHS = {
    "runs": "/api/v1/runs",
    "run": RUN,
    "steps": f"{RUN}/steps",
    "sequences, first page": f"{RUN}/sequences",
    "sequences, filtered and sorted": f"{RUN}/sequences?switched=true&order=mean_divergence&descending=true",
    "sequences, text": f"{RUN}/sequences?text=w17%20w3",
    "sequence": f"{RUN}/sequences/p100-7.0.0",
    "tokens": f"{RUN}/sequences/p100-7.0.0/tokens",
    "histogram first_switch": f"{RUN}/histograms/first_switch",
    "histogram divergence": f"{RUN}/histograms/divergence",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/inspector.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        writer = _write_run(runs / "large")
        with _served(runs) as (address, process):
            first_s = _first_answer(address)
            seconds, num_failed = _measure(address, writer, arguments.seconds)
            peak_mib = _peak_mib(process.pid)
            replay_s = _replay(address)
    report = _report(seconds, num_failed, first_s, replay_s, peak_mib)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    _print(report)


def _write_run(path: Path) -> TraceWriter:
    path.mkdir()
    (path / "config.yaml").write_text("policy: {type: adaswitch, multiplier: 3.0, window: 10, floor: 0.1}\n")
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(NUM_STEPS):
            file.write(json.dumps({"step": step, "time": 0.0, "train/loss_nats": 1.0}) + "\n")
    writer = TraceWriter(
        path / "traces",
        decode=lambda ids: " ".join(f"w{i}" for i in ids),
        token_texts=lambda ids: [f" w{i}" for i in ids],
        top_alternatives=K,
    )
    for step in range(NUM_STEPS):
        writer.write_segment(step, _sequences(step))
    return writer


def _sequences(step: int) -> list[MixedSequence]:
    rng = np.random.default_rng(step)
    return [_sequence(step, place, rng) for place in range(SEQUENCES_PER_STEP)]


def _sequence(step: int, place: int, rng: np.random.Generator) -> MixedSequence:
    length = TOKENS_PER_SEQUENCE
    switch = int(rng.integers(10, 2 * length))  # in half of the sequences past the end: none
    is_teacher = np.arange(length) >= switch
    proposed = np.arange(length) <= switch
    logprobs = np.log(rng.dirichlet(np.ones(K + 1), length)[:, :K]).astype(np.float32)
    top = TopLogprobs(rng.integers(0, 50_000, (length, K)).astype(np.int32), logprobs)
    divergences = rng.exponential(0.2, length).astype(np.float32)
    divergences[~proposed] = np.nan
    return MixedSequence(
        prompt=Prompt(prompt_id=f"p{step}-{place}", token_ids=np.arange(20, dtype=np.int32), seed=place),
        policy="adaswitch",
        token_ids=rng.integers(0, 5000, length).astype(np.int32),
        sources=np.where(is_teacher, TokenSource.TEACHER, TokenSource.STUDENT).astype(np.uint8),
        divergences=divergences,
        thresholds=np.where(proposed, 0.6, np.nan).astype(np.float32),
        student_ranks=np.where(proposed, 0, -1).astype(np.int32),
        student_logprobs=np.where(is_teacher, np.nan, -0.5).astype(np.float32),
        teacher_logprobs=np.full(length, -0.5, np.float32),
        student_top=top,
        teacher_top=top,
        weight_versions=np.where(proposed, step, -1).astype(np.int32),
        switches=np.array([switch] if switch < length else [], np.int32),
        finish_reason="stop",
        num_wasted_tokens=0,
    )


@contextmanager
def _served(runs: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deploy.cli", "serve", str(runs), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait(timeout=20)


def _first_answer(address: str) -> tuple[float, float]:
    """Seconds until the service answers at all, and until it has read the whole trace."""
    start = time.monotonic()
    while time.monotonic() - start < 60:
        try:
            httpx.get(f"{address}/healthz")
            break
        except httpx.ConnectError:
            time.sleep(0.02)
    up = time.monotonic()
    while httpx.get(address + RUN, timeout=60).status_code != 200:
        assert time.monotonic() - up < 120, "the trace was not read within 120 s"
    return up - start, time.monotonic() - up


def _measure(address: str, writer: TraceWriter, seconds: float) -> tuple[dict[str, list[float]], int]:
    measured: dict[str, list[float]] = {name: [] for name in PATHS}
    failed: list[str] = []
    end = time.monotonic() + seconds

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with httpx.Client(base_url=address, timeout=30) as client:
            while time.monotonic() < end:
                name = list(PATHS)[rng.integers(len(PATHS))]
                start = time.monotonic()
                if client.get(PATHS[name]).status_code != 200:
                    failed.append(name)
                measured[name].append(time.monotonic() - start)

    clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    step = NUM_STEPS
    while time.monotonic() < end:
        writer.write_segment(step, _sequences(step))
        step += 1
        time.sleep(2.0)
    for client in clients:
        client.join()
    return measured, len(failed)


def _replay(address: str) -> float:
    start = time.monotonic()
    body = {"policy": {"type": "adaswitch", "multiplier": 2, "window": 20}}
    response = httpx.post(f"{address}{RUN}/replay", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return time.monotonic() - start


def _peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _report(
    seconds: dict[str, list[float]], num_failed: int, first_s: tuple[float, float], replay_s: float, peak_mib: float
) -> dict[str, object]:
    return {
        "tokens": NUM_STEPS * SEQUENCES_PER_STEP * TOKENS_PER_SEQUENCE,
        "sequences": NUM_STEPS * SEQUENCES_PER_STEP,
        "clients": NUM_CLIENTS,
        "processor_cores": os.cpu_count(),
        "start_s": round(first_s[0], 2),
        "first_reading_s": round(first_s[1], 2),
        "replay_of_all_s": round(replay_s, 2),
        "peak_memory_mib": round(peak_mib),
        "failed_requests": num_failed,
        "requests": {
            name: {
                "num": len(values),
                "median_ms": round(1000 * float(np.median(values)), 1),
                "p99_ms": round(1000 * float(np.quantile(values, 0.99)), 1),
            }
            for name, values in seconds.items()
            if values
        },
    }


def _print(report: dict[str, object]) -> None:
    table = Table("request", "number", "median ms", "p99 ms")
    requests: dict[str, dict[str, float]] = report["requests"]  # type: ignore[assignment]
    for name, row in requests.items():
        table.add_row(name, str(row["num"]), str(row["median_ms"]), str(row["p99_ms"]))
    console = Console()
    console.print(table)
    console.print({name: value for name, value in report.items() if name != "requests"})


if __name__ == "__main__":
    main()
