"""How many engines one controller keeps busy: imitated accelerators, real controller, real Ray, real arrays.

    python -m tests.benchmarks.capacity --replicas 1 2 4 8

Writes the capacity rows of docs/benchmarks/rollouts.json (all figures: rollouts_details.json) and capacity.svg beside
them. The controller has core 0 for itself; engines, Ray and the driver share the others. What is measured and how:
docs/benchmarks/README.md.
"""

import argparse
import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import numpy as np
import psutil  # type: ignore[import-untyped]
import ray
from matplotlib import pyplot as plt
from ray.actor import ActorHandle

from common.config import AdaSwitch, EngineSettings, Sampling, Trace
from common.cores import move_to_cores
from common.sequence import Prompt
from rollout_server.actors import EngineAddress
from rollout_server.engines.protocol import EngineSpec
from rollout_server.rollouts import RolloutSpec
from tests.benchmarks import report
from tests.benchmarks.actors import Counted, CountingEngineActor, Finished, MeasuredRolloutActor, Messages
from tests.benchmarks.imitation.accelerator import DeviceCounters
from tests.benchmarks.imitation.engine import ImitatedEngine
from tests.benchmarks.imitation.speeds import AcceleratorSpeeds, ImitatedText
from tests.benchmarks.pairs import REPOSITORY
from tests.benchmarks.report import CapacityResult

logger = logging.getLogger("benchmark")

_BUSY = 0.90  # below this share, or this share of one replica's tokens per replica, the controller is the limit
_IN_FLIGHT = 2 * 256  # sequences for each pair of replicas: enough for a full batch in both
_PROMPT_TOKENS, _NEW_TOKENS, _TOP_LOGPROBS = 128, 256, 64
_BATCH = 256  # sequences that one engine decodes at its nominal speed
_VOCABULARY = 32_768
_TIMEOUT_S = 300.0
_END_RATE = 1 / 1024  # a text ends at any position with this chance
_SPIKE_RATE = 1 / 512  # the student goes astray at any position with this chance
_SPEEDS = {
    "student": AcceleratorSpeeds(
        decode_tokens_per_s=12_000.0,
        prefill_tokens_per_s=180_000.0,
        full_batch=_BATCH,
        step_floor_s=0.005,
        text=ImitatedText(vocabulary_size=_VOCABULARY, end_rate=_END_RATE, spike_rate=_SPIKE_RATE),
    ),
    "teacher": AcceleratorSpeeds(
        decode_tokens_per_s=4_000.0,
        prefill_tokens_per_s=60_000.0,
        full_batch=_BATCH,
        step_floor_s=0.012,
        text=ImitatedText(vocabulary_size=_VOCABULARY, end_rate=_END_RATE),
    ),
}
# A read takes a place for one step: with no more places than writing sequences, it would wait for one of them to end.
_MAX_NUM_SEQS = {"student": _BATCH, "teacher": 2 * _BATCH}
_POLICY = AdaSwitch(floor=0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Counted):
    """What an engine's device and process had done at one moment, since their start."""

    at_s: float  # on the machine's monotonic clock; a busy engine answers late, so each reading says when it was
    cpu_s: float
    device: DeviceCounters
    messages: Messages


class ImitatedEngineActor(CountingEngineActor):
    """The product's engine actor, with instruments and an engine that only takes the time of its role's accelerator."""

    def _start_engine(self, spec: EngineSpec) -> Any:
        return ImitatedEngine.start(spec, _SPEEDS[spec.name])

    async def read(self) -> Reading:
        return Reading(
            at_s=time.monotonic(),
            cpu_s=time.process_time(),
            device=self._engine.counters,
            messages=self._messages,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What was done between two moments."""

    finished: Finished
    machine_cpu_s: float
    students: list[Reading]
    teachers: list[Reading]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one run of the benchmark measures."""

    window_s: float
    chunk_tokens: int


async def measure(plan: Plan, num_replicas: int) -> CapacityResult:
    """One number of replicas of both roles, in the steady state."""
    async with _actors(plan, num_replicas) as (rollouts, engines):
        return _result(num_replicas, await _watch(plan, num_replicas, rollouts, engines))


async def _watch(plan: Plan, num_replicas: int, rollouts: ActorHandle, engines: dict[str, list[ActorHandle]]) -> Window:
    """Collect, and look at what is done in a window.

    Sequences come over Ray and are dropped unread: who reads them has a core of its own in a real run.
    """

    async def until(num_sequences: int) -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            while (num_finished := await rollouts.num_finished.remote()) < num_sequences:
                logger.info("%d replicas: %d of %d sequences", num_replicas, num_finished, num_sequences)
                await asyncio.sleep(1.0)

    async def look() -> tuple[float, float, dict[str, list[Reading]]]:
        machine, at_s = psutil.cpu_times(), time.monotonic()
        readings = {role: await asyncio.gather(*(each.read.remote() for each in engines[role])) for role in _SPEEDS}
        return at_s, machine.user + machine.system, readings

    async def drop(references: ray.ObjectRefGenerator) -> None:
        async for _ in references:
            pass

    prompts = _prompts(num_replicas, plan.window_s)
    references = rollouts.collect.options(num_returns="streaming").remote(prompts, 0)
    dropping = asyncio.create_task(drop(references))
    try:
        # All begin at once; when as many have finished as run at once, they are spread over their lengths. The window
        # is long enough for as many again: where the machine is full, they may still come in waves.
        await until(_IN_FLIGHT * num_replicas)
        opened_s, machine_before_s, before = await look()
        num_before = await rollouts.num_finished.remote()
        await asyncio.sleep(plan.window_s)
        await until(num_before + _IN_FLIGHT * num_replicas)
        closed_s, machine_after_s, after = await look()
        at_opening, at_closing = await rollouts.finished_at.remote([opened_s, closed_s])
    finally:
        dropping.cancel()
        ray.cancel(references, recursive=False)
    assert at_closing.num_sequences < len(prompts) - _IN_FLIGHT * num_replicas, "the window saw the end"
    students, teachers = ([now - then for now, then in zip(after[role], before[role], strict=True)] for role in _SPEEDS)
    return Window(
        finished=at_closing - at_opening,
        machine_cpu_s=machine_after_s - machine_before_s,
        students=students,
        teachers=teachers,
    )


def _result(num_replicas: int, window: Window) -> CapacityResult:
    finished, wall_s = window.finished, window.finished.at_s
    engines = (*window.students, *window.teachers)
    num_written = sum(reading.device.num_generated_tokens for reading in window.students)
    num_explored = finished.num_tokens - finished.num_teacher_tokens
    return CapacityResult(
        replicas=num_replicas,
        student_busy=mean(reading.device.busy_s / reading.at_s for reading in window.students),
        teacher_busy=mean(reading.device.busy_s / reading.at_s for reading in window.teachers),
        tokens_per_s=finished.num_tokens / wall_s,
        controller_us_per_token=finished.cpu_s / finished.num_tokens * 1e6,
        messages_per_token=sum(each.messages.number for each in engines) / finished.num_tokens,
        bytes_per_token=sum(each.messages.num_bytes for each in engines) / finished.num_tokens,
        student_at_nominal=mean(_nominal_s("student", reading.device) / reading.at_s for reading in window.students),
        teacher_at_nominal=mean(_nominal_s("teacher", reading.device) / reading.at_s for reading in window.teachers),
        unused_student_tokens=max(0.0, 1.0 - num_explored / num_written),
        wasted_student_tokens=finished.num_wasted_tokens / (finished.num_wasted_tokens + num_explored),
        teacher_share=finished.num_teacher_tokens / finished.num_tokens,
        switched=finished.num_switched / finished.num_sequences,
        sequences=finished.num_sequences,
        wall_s=wall_s,
        controller_cpu=finished.cpu_s / wall_s,
        engines_cpu=sum(reading.cpu_s / reading.at_s for reading in engines),
        machine_cpu=window.machine_cpu_s / wall_s,
    )


def _nominal_s(role: str, device: DeviceCounters) -> float:
    """Seconds the device's work takes at its nominal speeds."""
    speeds = _SPEEDS[role]
    return (
        device.num_generated_tokens / speeds.decode_tokens_per_s
        + device.num_prefilled_tokens / speeds.prefill_tokens_per_s
    )


def _prompts(num_replicas: int, window_s: float) -> list[Prompt]:
    """For the warm-up, for a window at twice the student's speed, and enough to be in flight at its end."""
    num_in_window = round(window_s * 2.0 * _SPEEDS["student"].decode_tokens_per_s / _NEW_TOKENS)
    num_prompts = num_replicas * (3 * _IN_FLIGHT + num_in_window)
    rng = np.random.default_rng(num_replicas)
    texts = rng.integers(1, _VOCABULARY, (num_prompts, _PROMPT_TOKENS), np.int32)
    return [Prompt(prompt_id=str(number), token_ids=text, seed=number) for number, text in enumerate(texts)]


def knee(results: Sequence[CapacityResult]) -> int:
    """The largest number of replicas up to which the controller keeps pace with the engines."""
    first = min(results, key=lambda result: result.replicas)
    kept = 0
    for result in sorted(results, key=lambda result: result.replicas):
        per_replica = result.tokens_per_s / result.replicas
        busy = max(result.student_busy, result.teacher_busy)
        if busy < _BUSY or per_replica < _BUSY * first.tokens_per_s / first.replicas:
            break
        kept = result.replicas
    return kept


# ---------------------------------------------------------------------------------------------------------- the actors


@asynccontextmanager
async def _actors(plan: Plan, num_replicas: int) -> AsyncIterator[tuple[ActorHandle, dict[str, list[ActorHandle]]]]:
    """One engine actor for each replica and one rollout actor; ended afterwards."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cores = sorted(os.sched_getaffinity(0))
    ray.init(
        address="local",
        num_cpus=2 * num_replicas + 2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _system_config={"worker_niceness": 0},
    )
    try:
        engine_actor = ray.remote(ImitatedEngineActor).options(num_cpus=0)
        engines = {role: [engine_actor.remote() for _ in range(num_replicas)] for role in _SPEEDS}
        prefix = _prompts(1, 0.0)[0].token_ids
        await asyncio.gather(*(
            handle.start.remote(_engine_spec(role), prefix) for role, handles in engines.items() for handle in handles
        ))  # fmt: skip
        rollouts = (
            ray.remote(MeasuredRolloutActor)
            .options(num_cpus=0)
            .remote(
                _rollout_spec(plan, num_replicas),
                *(_addresses(role, handles) for role, handles in engines.items()),
                str(REPOSITORY / "deploy" / "demo" / "models" / "student"),  # no text is decoded
            )
        )
        controller_pid = (await rollouts.health.remote()).pid
        for pid in _processes():
            move_to_cores(cores[:1] if pid == controller_pid else cores[1:] or cores, pid)
        yield rollouts, engines
    finally:
        ray.shutdown()
        move_to_cores(cores)


def _processes() -> list[int]:
    """This one, Ray's, and the actors."""
    driver = psutil.Process()
    return [process.pid for process in (driver, *driver.children(recursive=True))]


def _engine_spec(role: str) -> EngineSpec:
    return EngineSpec(
        name=role,
        model="imitated",
        settings=EngineSettings(max_num_seqs=_MAX_NUM_SEQS[role]),
        top_logprobs=_TOP_LOGPROBS,
    )


def _addresses(role: str, handles: Sequence[ActorHandle]) -> list[EngineAddress]:
    return [
        EngineAddress(handle=handle, name=f"{role} engine {number}", call_timeout_s=120.0)
        for number, handle in enumerate(handles)
    ]


def _rollout_spec(plan: Plan, num_replicas: int) -> RolloutSpec:
    return RolloutSpec(
        policy=_POLICY,
        sampling=Sampling(
            temperature=1.0,
            max_new_tokens=_NEW_TOKENS,
            chunk_tokens=plan.chunk_tokens,
            max_in_flight=_IN_FLIGHT * num_replicas,
        ),
        trace=Trace(enabled=False),
        trace_folder=REPOSITORY / "build" / "benchmarks" / "no-trace",
        top_logprobs=_TOP_LOGPROBS,
        stop_token_ids=(0,),
    )


# --------------------------------------------------------------------------------------------------------- the command


def plot(results: Sequence[CapacityResult], file: Path) -> None:
    """Busy shares, throughput and the controller's processor time over the number of replicas."""
    results = sorted(results, key=lambda result: result.replicas)
    replicas = [result.replicas for result in results]
    mpl.rcParams["svg.hashsalt"] = "capacity"  # the same figures, the same file
    figure, (busy, speed, cost) = plt.subplots(1, 3, figsize=(11.0, 3.2), layout="constrained")
    for role in _SPEEDS:
        busy.plot(replicas, [getattr(result, f"{role}_busy") for result in results], "o-", label=role)
    busy.axhline(_BUSY, color="grey", linestyle=":")
    busy.set(ylabel="busy share of the wall time", ylim=(0.0, 1.05))
    busy.legend()
    speed.plot(replicas, [result.tokens_per_s for result in results], "o-", label="measured")
    ideal = [results[0].tokens_per_s / replicas[0] * number for number in replicas]
    speed.plot(replicas, ideal, ":", color="grey", label="in proportion")
    speed.set(ylabel="tokens/s in mixed sequences", ylim=(0.0, None))
    speed.legend()
    cost.plot(replicas, [result.controller_us_per_token for result in results], "o-")
    cost.set(ylabel="controller, us/token", ylim=(0.0, None))
    for axes in (busy, speed, cost):
        axes.set_xlabel("replicas of each role")
        axes.set_xticks(replicas)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    arguments = _parse()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    plan = Plan(window_s=arguments.window_s, chunk_tokens=arguments.chunk_tokens)
    for number in arguments.replicas:
        result = asyncio.run(measure(plan, number))
        logger.info("%s", result)
        report.write_capacity(arguments.out, [result])
    results = report.read_capacity(arguments.out)
    plot(results, arguments.out / "capacity.svg")
    logger.info("one controller keeps pace up to %d replicas of each role", knee(results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2, 4, 8], help="of each role")
    parser.add_argument("--window-s", type=float, default=12.0, help="measured after the warm-up")
    parser.add_argument("--chunk-tokens", type=int, default=128, help="a quarter of the run to a switch")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "benchmarks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
