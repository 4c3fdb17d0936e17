"""Live generation the whole way over real Ray: HTTP, the attached cluster, a named rollout actor, scripted engines."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
import uvicorn

from common.config import AdaSwitch, Sampling, Trace
from common.sequence import Prompt
from deploy.cluster.attach import NAMESPACE, AttachedRollouts, live_name
from rollout_server.actors import EngineAddress, RolloutActor
from rollout_server.engines.remote.messages import ClientMessage, ServerMessage
from rollout_server.engines.remote.server import StreamMultiplexer
from rollout_server.engines.scripted import HashedScript, ScriptedEngine
from rollout_server.inspector.app import create_app
from rollout_server.inspector.live_records import LiveRequest
from rollout_server.rollouts import LiveContext, RolloutSpec
from tests.support.ray_heads import joined
from tests.support.trace_reader import TraceReader

STUDENT_MODEL = Path(__file__).parents[3] / "deploy" / "demo" / "models" / "student"
TEACHER = HashedScript(vocabulary_size=32, seed=1, eos_token_id=2, eos_probability=0.02)
ENDLESS = replace(TEACHER, eos_probability=1e-9)
K, DEADLINE_S = 8, 20.0
ENDLESS_RUN = {"run": "endless"}
PROMPT = {"prompt": "1+2*3=", "policy": {"type": "adaswitch", "window": 4, "floor": 0.1}}


def make_engine_class() -> type:
    """Its functions would travel to the workers by name, and there tests are not importable; this one by value."""

    class ScriptedEngineActor:
        """What a rollout actor calls of an EngineActor, over a scripted engine."""

        def __init__(self, script: Any, delay_s: float) -> None:
            self._engine = ScriptedEngine(script, top_logprobs=K, max_model_len=4096, delay=lambda: delay_s)
            self._streams = StreamMultiplexer(self._engine)

        async def exchange(self, client_id: str, message: ClientMessage, wait_s: float) -> ServerMessage:
            return await self._streams.exchange(client_id, message, wait_s)

        async def counters(self) -> tuple[int, int]:
            return self._engine.num_running, self._engine.num_written_tokens

    return ScriptedEngineActor


class LiveRun:
    """A run as a training leaves it on the cluster: two engines, and a rollout actor with a name."""

    def __init__(self, name: str, folder: Path, script: HashedScript, delay_s: float) -> None:
        engine = ray.remote(num_cpus=0, max_concurrency=1000)(make_engine_class())
        self.trace_folder = folder / "traces"
        self.engines = [engine.remote(script.student(seed=2), delay_s), engine.remote(script, delay_s)]
        spec = RolloutSpec(
            policy=AdaSwitch(window=4, floor=0.1),
            sampling=Sampling(max_new_tokens=64, chunk_tokens=16),
            trace=Trace(),
            trace_folder=self.trace_folder,
            top_logprobs=K,
            stop_token_ids=(2,),
            live=LiveContext(max_model_len=4096, prompts_as_chat=False),
        )
        addresses = [EngineAddress(handle=handle, name="engine", call_timeout_s=30.0) for handle in self.engines]
        self.rollouts = (
            ray.remote(RolloutActor)
            .options(num_cpus=0, name=live_name(name), namespace=NAMESPACE)
            .remote(spec, addresses[:1], addresses[1:], str(STUDENT_MODEL))
        )

    def num_running(self) -> int:
        return sum(running for running, _ in ray.get([engine.counters.remote() for engine in self.engines]))

    def num_written(self) -> int:
        return sum(written for _, written in ray.get([engine.counters.remote() for engine in self.engines]))

    def end(self) -> None:
        for actor in (self.rollouts, *self.engines):
            ray.kill(actor)


@pytest.fixture(scope="module", autouse=True)
def _cluster(ray_address: str) -> Iterator[None]:
    with joined(ray_address):
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    run = LiveRun("demo", tmp_path_factory.mktemp("demo"), TEACHER, delay_s=0.0)
    yield run
    run.end()


@pytest.fixture(scope="module")
def endless(demo: LiveRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    """Whose sequences take long. Beside the other, so that requests must name it."""
    run = LiveRun("endless", tmp_path_factory.mktemp("endless"), ENDLESS, delay_s=0.1)
    yield run
    run.end()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Over a real socket: whether a client has gone shows nowhere else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(tmp_path_factory.mktemp("runs"), hosts=["127.0.0.1"], live_rollouts=AttachedRollouts())
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=60.0) as client:
        yield client
    server.should_exit = True
    thread.join(timeout=20)


def events_of(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    """(event, data) as they come."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def generate(client: httpx.Client, **wanted: Any) -> list[tuple[str, Any]]:
    with client.stream("POST", "/generate", json={**PROMPT, **wanted}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(events_of(response))


def test_a_prompt_s_decisions_are_streamed_and_summed_up(client, demo) -> None:
    names, data = zip(*generate(client, seed=3), strict=True)
    tokens, summary = data[1:-1], data[-1]
    assert names == ("start", *["token"] * len(tokens), "summary")
    assert data[0]["prompt_text"].endswith("1+2*3=")
    assert [token["position"] for token in tokens] == list(range(summary["num_tokens"]))
    assert "".join(token["text"] for token in tokens) == summary["completion_text"]
    assert [token["position"] for token in tokens if token["is_switch"]] == summary["switches"]
    assert sum(token["source"] == "teacher" for token in tokens) == summary["num_teacher_tokens"]
    assert summary["switches"], "the script's spikes must make it switch"
    for at, token in enumerate(tokens[: summary["switches"][0] + 1]):
        assert token["divergence"] >= 0
        assert all(alternative["text"] for alternative in token["student_top"] + token["teacher_top"])
        if at >= 4:
            mean = np.mean([t["divergence"] for t in tokens[at - 4 : at]])
            assert token["moving_average"] == pytest.approx(mean, rel=1e-5)
            assert token["threshold"] == pytest.approx(max(3 * mean, 0.1), rel=1e-5)


def test_the_training_neither_waits_for_it_nor_counts_it(client, endless) -> None:
    with client.stream("POST", "/generate", json={**PROMPT, **ENDLESS_RUN, "max_new_tokens": 2000}) as response:
        events = events_of(response)  # kept: the response is closed with its last reader
        next(events)
        prompts = [Prompt(prompt_id=f"p{n}", token_ids=np.arange(3, 9, dtype=np.int32), seed=n) for n in range(4)]
        references = endless.rollouts.collect.options(num_returns="streaming").remote(prompts, 1)
        collected = [sequence for reference in references for sequence in ray.get(reference)]
        assert endless.num_running() > 0, "the watched sequence still goes on"
    assert len(collected) == 4
    with TraceReader(endless.trace_folder) as reader:
        assert {record.prompt_id for record in reader.sequences()} == {"p0", "p1", "p2", "p3"}


def test_a_watcher_who_leaves_takes_nothing_of_the_training_along(client, endless) -> None:
    """The exchange with the engine was begun for the watched sequence, and serves the training as well."""
    with client.stream("POST", "/generate", json={**PROMPT, **ENDLESS_RUN, "max_new_tokens": 2000}) as response:
        events = events_of(response)
        next(events)
        prompts = [Prompt(prompt_id=f"p{n}", token_ids=np.arange(3, 9, dtype=np.int32), seed=n) for n in range(32)]
        references = endless.rollouts.collect.options(num_returns="streaming").remote(prompts, 2)
        while endless.num_running() < 20:
            time.sleep(0.01)
    sequences = [sequence for reference in references for sequence in ray.get(reference)]
    assert {sequence.prompt.prompt_id for sequence in sequences} == {prompt.prompt_id for prompt in prompts}


def test_when_the_client_goes_away_the_engines_stop(client, endless) -> None:
    written_before = endless.num_written()
    with client.stream(
        "POST", "/generate", json={**PROMPT, **ENDLESS_RUN, "policy": {"type": "on_policy"}, "max_new_tokens": 4000}
    ) as response:
        events = events_of(response)
        for _ in range(12):
            next(events)
        assert endless.num_running() > 0
    deadline_s = time.monotonic() + DEADLINE_S
    while endless.num_running() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert endless.num_running() == 0
    written = endless.num_written()
    time.sleep(0.3)
    assert endless.num_written() == written
    assert written - written_before < 3000


def test_one_of_several_runs_must_be_named(client, endless) -> None:
    assert client.get("/live").json() == {"attached": True, "runs": ["demo", "endless"]}
    problem = client.post("/generate", json=PROMPT)
    assert (problem.status_code, problem.json()["type"]) == (409, "urn:adaswitch:problem:several-runs")
    assert problem.json()["errors"] == ["demo", "endless"]
    assert generate(client, run="demo")[-1][0] == "summary"
    problem = client.post("/generate", json={**PROMPT, "run": "third"})
    assert (problem.status_code, problem.json()["errors"]) == (404, ["demo", "endless"])


def test_what_the_run_refuses_is_a_problem_document(client, demo) -> None:
    problem = client.post("/generate", json={**PROMPT, "run": "demo", "max_new_tokens": 5000})
    assert problem.status_code == 422
    assert "max_new_tokens must be <= " in problem.json()["detail"]
    assert problem.headers["content-type"] == "application/problem+json"


def test_a_run_that_ends_meanwhile_ends_the_stream_with_a_problem(client, endless) -> None:
    with client.stream("POST", "/generate", json={**PROMPT, **ENDLESS_RUN, "max_new_tokens": 4000}) as response:
        events = events_of(response)
        next(events)
        ray.kill(endless.rollouts)
        *_, (name, data) = events
    assert name == "problem"
    assert (data["status"], data["type"]) == (502, "urn:adaswitch:problem:live-failure")


async def test_a_run_that_has_ended_is_not_live(endless: LiveRun) -> None:
    live = AttachedRollouts()
    deadline_s = time.monotonic() + DEADLINE_S  # its actor was killed by the test before
    while "endless" in await live.runs() and time.monotonic() < deadline_s:
        await asyncio.sleep(0.1)
    assert await live.runs() == ["demo"]
    with pytest.raises(Exception, match="demo"):
        await anext(live.generate("endless", LiveRequest(prompt="x")))
