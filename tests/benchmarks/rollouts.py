"""How near rollouts come to the speed of their two engines, for every policy.

    python -m tests.benchmarks.rollouts --quick

Writes docs/benchmarks/rollouts.json, rollouts_details.json and the table in README.md beside them. Engines, controller
and transport are the product's, in Ray actors as in a run. Each engine has a core of its own; the rest shares the
student's. All ratios are between figures of one run on one machine. What is measured and how is written in that page.
"""

import argparse
import asyncio
import json
import logging
import os
import statistics
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import ray
from ray.actor import ActorHandle

from common.config import AdaSwitch, Dataset, EngineSettings, OnPolicy, Policy, Sampling, Trace
from common.cores import move_to_cores
from common.sequence import MixedSequence, Prompt
from rollout_server.actors import EngineAddress, RemoteRollouts
from rollout_server.engines.protocol import EngineSpec
from rollout_server.rollouts import RolloutSpec
from tests.benchmarks import report
from tests.benchmarks.actors import CPUSeconds, EngineCounters, MeasuredEngineActor, MeasuredRolloutActor, Messages
from tests.benchmarks.lockstep import lockstep_seconds_per_token
from tests.benchmarks.pairs import REPOSITORY, PairOfModels, demo_pair, synthetic_pair
from tests.benchmarks.report import PolicyResult
from tests.benchmarks.work import OfflineTimes, most_tokens_to_compute, num_tokens_teacher_must_read, offline_batches

logger = logging.getLogger("benchmark")

_ROLES = ("student", "teacher")
_LOCKSTEP_STEPS = 24
_TIMEOUT_S = 1800.0


@contextmanager
def on_cores(cores: Iterable[int]) -> Iterator[None]:
    """This process and what it starts keep to these cores within the block."""
    before = os.sched_getaffinity(0)
    move_to_cores(cores)
    try:
        yield
    finally:
        move_to_cores(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one run of the benchmark measures."""

    pair: PairOfModels
    policies: list[Policy]
    in_flight: int
    num_sequences: int
    repetitions: int
    offline_repetitions: int  # how many of them are followed by their work offline
    chunk_tokens: int
    dtype: Literal["auto", "float32", "bfloat16"]
    cores: tuple[tuple[int, ...], tuple[int, ...]]  # of the student engine and the teacher engine; none for any

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            temperature=1.0,
            max_new_tokens=self.pair.max_new_tokens,
            chunk_tokens=self.chunk_tokens,
            max_in_flight=self.in_flight,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Repetition:
    """One collect."""

    sequences: list[MixedSequence]
    wall_s: float
    counters: tuple[EngineCounters, EngineCounters]  # student, teacher
    messages: tuple[Messages, Messages]
    cpu: tuple[CPUSeconds, CPUSeconds]
    controller_cpu_s: float

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sequences))


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Both engines, started."""

    student: ActorHandle
    teacher: ActorHandle

    async def each(self, method: str) -> list[Any]:
        return [await getattr(engine, method).remote() for engine in (self.student, self.teacher)]


class Progress:
    """Lines with the time passed and an estimate of the time to come."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps, self._num_done = num_steps, 0
        self._started_s = time.perf_counter()

    def step(self, what: str) -> None:
        """One step is done."""
        self._num_done += 1
        passed_s = time.perf_counter() - self._started_s
        left_s = passed_s / self._num_done * (self._num_steps - self._num_done)
        logger.info("[%d/%d, %.0f s, %.0f s to go] %s", self._num_done, self._num_steps, passed_s, left_s, what)


async def measure(plan: Plan) -> list[PolicyResult]:
    """All policies of a plan on one pair of engines."""
    prompts = plan.pair.prompts(plan.num_sequences)
    progress = Progress(len(plan.policies) * (plan.repetitions + 2))
    repetitions_of: dict[str, list[Repetition]] = {}
    offline_of: dict[str, list[OfflineTimes]] = {}
    async with _engines(plan) as engines:
        for policy in plan.policies:
            async with _rollouts(plan, policy, engines) as rollouts:
                # Warm-up: one batch in flight is enough to have every code path and the allocator warm.
                await _collect(rollouts, prompts[: plan.in_flight])
                progress.step(f"{policy.type}: warm")
                repetitions, offline = [], []
                for number in range(plan.repetitions):
                    repetitions.append(await _repeat(engines, rollouts, prompts))
                    if number < plan.offline_repetitions:
                        offline.append(await _time_offline(engines, repetitions[-1], plan.sampling))
                    progress.step(f"{policy.type}: {_describe(repetitions[-1], offline[-1])}")
                repetitions_of[policy.type], offline_of[policy.type] = repetitions, offline
    results = []
    for policy in plan.policies:
        seconds_per_token = await asyncio.to_thread(
            lockstep_seconds_per_token, plan.pair, policy, prompts[: plan.in_flight], _LOCKSTEP_STEPS
        )
        progress.step(f"{policy.type}: lockstep {1 / seconds_per_token:.0f} tok/s")
        results.append(_result(plan, policy, repetitions_of[policy.type], offline_of[policy.type], seconds_per_token))
    return results


async def _repeat(engines: Engines, rollouts: ActorHandle, prompts: Sequence[Prompt]) -> Repetition:
    await engines.each("reset")
    cpu_before, controller_before_s = await engines.each("cpu_seconds"), await rollouts.cpu_seconds.remote()
    messages_before = await engines.each("messages")
    started_s = time.perf_counter()
    sequences = await _collect(rollouts, prompts)
    wall_s = time.perf_counter() - started_s
    controller_cpu_s = await rollouts.cpu_seconds.remote() - controller_before_s
    cpu = [after - before for after, before in zip(await engines.each("cpu_seconds"), cpu_before, strict=True)]
    counters = await engines.each("counters")
    messages = [after - before for after, before in zip(await engines.each("messages"), messages_before, strict=True)]
    return Repetition(
        sequences=sequences,
        wall_s=wall_s,
        counters=(counters[0], counters[1]),
        messages=(messages[0], messages[1]),
        cpu=(cpu[0], cpu[1]),
        controller_cpu_s=controller_cpu_s,
    )


async def _collect(rollouts: ActorHandle, prompts: Sequence[Prompt]) -> list[MixedSequence]:
    remote = RemoteRollouts(rollouts, timeout_s=_TIMEOUT_S)
    async with aclosing(remote.collect(list(prompts), step=0)) as collected:
        return [item.sequence async for item in collected]


async def _time_offline(engines: Engines, repetition: Repetition, sampling: Sampling) -> OfflineTimes:
    """Each batch alone on the machine. Prefixes are cached between the teacher's batches as they are in a rollout."""
    batches = offline_batches(repetition.sequences, sampling)
    await engines.each("reset")
    student_s = await engines.student.write_batch.remote(batches.student_writes)
    plain_read_s = await engines.teacher.read_batch.remote(batches.teacher_plain_reads)
    await engines.each("reset")
    prompt_s = await engines.teacher.read_batch.remote(batches.teacher_prompts)
    read_s = await engines.teacher.read_batch.remote(batches.teacher_reads)
    write_s = await engines.teacher.write_batch.remote(batches.teacher_writes)
    num_computed = (await engines.teacher.counters.remote()).num_prefilled_tokens
    if num_computed > (bound := most_tokens_to_compute(batches, sampling.chunk_tokens)):
        logger.warning(
            "offline the teacher computed %d tokens, expected at most %d: its cache is too small", num_computed, bound
        )
    at_once = max(1, round(repetition.counters[1].mean_decode_batch))
    spread_write_s = await engines.teacher.write_batch.remote(batches.teacher_writes, at_once)
    return OfflineTimes(
        student_s=student_s,
        teacher_prompt_s=prompt_s,
        teacher_read_s=read_s,
        teacher_plain_read_s=plain_read_s,
        teacher_write_s=write_s,
        teacher_spread_write_s=spread_write_s,
    )


def _result(
    plan: Plan,
    policy: Policy,
    repetitions: Sequence[Repetition],
    offline_times: Sequence[OfflineTimes],
    lockstep_s_per_token: float,
) -> PolicyResult:
    """Medians over the repetitions."""
    median = statistics.median
    switches = [s.first_switch for s in repetitions[0].sequences if s.first_switch is not None]
    offline = OfflineTimes(
        **{field.name: median(getattr(times, field.name) for times in offline_times) for field in fields(OfflineTimes)}
    )
    wall_s = median(r.wall_s for r in repetitions)
    if offline.split_parallel_s > 1.1 * wall_s:  # smaller batches read a little faster
        logger.warning("%s: slower offline than online: the machine was not quiet, measure again", policy.type)
    return PolicyResult(
        pair=plan.pair.name,
        policy=policy.type,
        settings=policy.model_dump(mode="json", exclude={"type"}),
        in_flight=plan.in_flight,
        sequences=plan.num_sequences,
        max_new_tokens=plan.pair.max_new_tokens,
        chunk_tokens=plan.chunk_tokens,
        tokens=round(median(r.num_tokens for r in repetitions)),
        teacher_share=median(_teacher_share(r) for r in repetitions),
        first_switch_deciles=statistics.quantiles(switches, n=10) if len(switches) > 1 else [],
        switched=len(switches) / plan.num_sequences,
        wall_s=wall_s,
        walls_s=[r.wall_s for r in repetitions],
        offline=offline,
        efficiency_serial=offline.serial_s / wall_s,
        efficiency_parallel=offline.parallel_s / wall_s,
        split_efficiency_serial=offline.split_serial_s / wall_s,
        split_efficiency_parallel=offline.split_parallel_s / wall_s,
        lockstep_s_per_token=lockstep_s_per_token,
        wasted_student_tokens=median(_wasted_share(r) for r in repetitions),
        recomputed_teacher_tokens=median(_recomputed_share(r) for r in repetitions),
        controller_us_per_token=median(r.controller_cpu_s / r.num_tokens * 1e6 for r in repetitions),
        messages_per_token=median(sum(m.number for m in r.messages) / r.num_tokens for r in repetitions),
        bytes_per_token=median(sum(m.num_bytes for m in r.messages) / r.num_tokens for r in repetitions),
        cpu_shares={
            f"{role} {part.replace('_', ' ')}": median(getattr(r.cpu[index], part) / r.wall_s for r in repetitions)
            for index, role in enumerate(_ROLES)
            for part in ("model", "scheduler", "front_end")
        }
        | {"controller": median(r.controller_cpu_s / r.wall_s for r in repetitions)},
        teacher_requests=round(median(r.counters[1].num_requests for r in repetitions)),
        teacher_decode_batch=median(r.counters[1].mean_decode_batch for r in repetitions),
    )


def _teacher_share(repetition: Repetition) -> float:
    return sum(sequence.num_teacher_tokens for sequence in repetition.sequences) / repetition.num_tokens


def _wasted_share(repetition: Repetition) -> float:
    """Of all tokens that the student engine itself counted, the share that is in no sequence."""
    num_kept = sum(len(sequence) - sequence.num_teacher_tokens for sequence in repetition.sequences)
    num_written = repetition.counters[0].num_generated_tokens
    return (num_written - num_kept) / num_written if num_written else 0.0


def _recomputed_share(repetition: Repetition) -> float:
    """Tokens that the teacher engine prefilled by its own count, beyond those it had to, over those it had to."""
    return repetition.counters[1].num_prefilled_tokens / _num_must_read(repetition) - 1.0


def _num_must_read(repetition: Repetition) -> int:
    return sum(map(num_tokens_teacher_must_read, repetition.sequences))


def _describe(repetition: Repetition, offline: OfflineTimes) -> str:
    in_seconds = ", ".join(f"{field.name[:-2]} {getattr(offline, field.name):.1f}" for field in fields(offline))
    return (
        f"{repetition.wall_s:.1f} s, {repetition.num_tokens / repetition.wall_s:.0f} tok/s, "
        f"serial {offline.serial_s / repetition.wall_s:.2f}, parallel {offline.parallel_s / repetition.wall_s:.2f}, "
        f"with split reads {offline.split_serial_s / repetition.wall_s:.2f}, "
        f"{offline.split_parallel_s / repetition.wall_s:.2f} "
        f"(offline, s: {in_seconds}), "
        f"decoding at a time: student {repetition.counters[0].mean_decode_batch:.0f}, "
        f"teacher {repetition.counters[1].mean_decode_batch:.0f}, "
        f"wasted {_wasted_share(repetition):.3f}, recomputed {_recomputed_share(repetition):.3f}, "
        f"controller {repetition.controller_cpu_s / repetition.num_tokens * 1e6:.0f} us/token"
    )


# ---------------------------------------------------------------------------------------------------------- the actors


@asynccontextmanager
async def _engines(plan: Plan) -> AsyncIterator[Engines]:
    """Both engines, each on its own core; ended afterwards.

    Everything else of the run, vLLM's front ends, controller, Ray and this process, shares the student's core: an
    engine on a GPU would not share it with them either, and two cores leave no third place.
    """
    with on_cores(plan.cores[0] or os.sched_getaffinity(0)):
        async with _started(plan) as engines:
            yield engines


@asynccontextmanager
async def _started(plan: Plan) -> AsyncIterator[Engines]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        # Ray's actors otherwise give way to every other process of the machine, the lockstep reference included.
        _system_config={"worker_niceness": 0},
    )
    handles = [ray.remote(MeasuredEngineActor).options(num_cpus=0.25).remote() for _ in _ROLES]
    try:
        prefix = plan.pair.prompts(1)[0].token_ids
        starts = [
            handle.start.remote(_engine_spec(plan, role, cores), prefix)
            for handle, cores, role in zip(handles, plan.cores, _ROLES, strict=True)
        ]
        for start, role in zip(starts, _ROLES, strict=True):
            logger.info("%s engine: %s", role, await start)
        yield Engines(student=handles[0], teacher=handles[1])
    finally:
        for handle in handles:
            await handle.shutdown.remote()
            ray.kill(handle)
        ray.shutdown()


def _engine_spec(plan: Plan, role: str, cores: tuple[int, ...]) -> EngineSpec:
    return EngineSpec(
        name=role,
        model=str(getattr(plan.pair, role)),
        settings=EngineSettings(
            dtype=plan.dtype,
            enforce_eager=True,
            kv_cache_gib=_cache_gib(plan, role),
            max_num_seqs=plan.in_flight,
            cpu_cores=cores,
        ),
        top_logprobs=plan.pair.top_logprobs,
    )


def _cache_gib(plan: Plan, role: str) -> float:
    """Room for all texts at once, in float32: an offline batch is to find what the one before it has read."""
    model = json.loads((getattr(plan.pair, role) / "config.json").read_text())
    head_size = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    bytes_per_token = 2 * 4 * model["num_hidden_layers"] * model["num_key_value_heads"] * head_size
    num_prompt_tokens = max(prompt.token_ids.size for prompt in plan.pair.prompts(plan.num_sequences))
    tokens_per_text = num_prompt_tokens + plan.pair.max_new_tokens + plan.chunk_tokens  # in whole blocks
    return max(0.25, 1.1 * plan.num_sequences * tokens_per_text * bytes_per_token / 2**30)


@asynccontextmanager
async def _rollouts(plan: Plan, policy: Policy, engines: Engines) -> AsyncIterator[ActorHandle]:
    """A rollout actor of its own for each policy. Without a trace: writing one is measured with the trace."""
    spec = RolloutSpec(
        policy=policy,
        sampling=plan.sampling,
        trace=Trace(enabled=False),
        trace_folder=REPOSITORY / "build" / "benchmarks" / "no-trace",
        top_logprobs=plan.pair.top_logprobs,
        stop_token_ids=plan.pair.stop_token_ids,
    )
    replicas = [
        [EngineAddress(handle=getattr(engines, role), name=f"{role} engine", call_timeout_s=300.0)] for role in _ROLES
    ]
    actor = ray.remote(MeasuredRolloutActor).options(num_cpus=0.25)
    handle = actor.remote(spec, *replicas, str(plan.pair.student))
    try:
        yield handle
    finally:
        ray.kill(handle)


# --------------------------------------------------------------------------------------------------------- the command


def _policies(pair: PairOfModels, names: Sequence[str] | None) -> list[Policy]:
    """Every policy there is, adaswitch under the pair's rule and the others as they come; or those named.

    Not dataset: its sequences are not written, and the pairs' prompts have no answers.
    """
    kinds = [kind for kind in get_args(get_args(Policy)[0]) if kind is not Dataset]
    known: dict[str, type] = {kind.model_fields["type"].default: kind for kind in kinds}
    if names is not None and (unknown := set(names) - known.keys()):
        raise SystemExit(f"--policies: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    # What the others are held against comes first.
    order = sorted(known, key=lambda name: (known[name] is not OnPolicy, name))
    chosen = [name for name in order if names is None or name in names]
    return [pair.adaswitch if known[name] is AdaSwitch else known[name]() for name in chosen]


def main() -> None:
    arguments = _parse()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    plans = [_plan(arguments, **changes) for changes in (_FULL if arguments.full else ({},))]
    for number, plan in enumerate(plans, 1):
        logger.info(
            "%d of %d: %s, %d in flight, %d new tokens, %s",
            *(number, len(plans), plan.pair.name, plan.in_flight, plan.pair.max_new_tokens),
            ", ".join(policy.type for policy in plan.policies),
        )
        results = asyncio.run(measure(plan))
        report.write(arguments.out, results)
        print(report.table(results), flush=True)


_QUICK = {"max_new_tokens": 96, "policies": ["adaswitch", "on_policy", "skd"], "offline_repetitions": 1}
_PAIR_OF_POLICIES = ["adaswitch", "on_policy"]
_FULL: tuple[dict[str, Any], ...] = (
    {**_QUICK, "policies": None},
    {**_QUICK, "policies": _PAIR_OF_POLICIES, "in_flight": 16},
    {**_QUICK, "policies": _PAIR_OF_POLICIES, "in_flight": 256, "repetitions": 1},
    {**_QUICK, "policies": _PAIR_OF_POLICIES, "max_new_tokens": 256, "repetitions": 1},
    {**_QUICK, "pair": "demo"},
)
"""Every policy; then what batch, length and pair make of the main one."""


def _plan(arguments: argparse.Namespace, **changes: Any) -> Plan:
    given = argparse.Namespace(**{**vars(arguments), **changes})
    pair = demo_pair() if given.pair == "demo" else synthetic_pair(given.max_new_tokens)
    return Plan(
        pair=pair,
        policies=_policies(pair, given.policies),
        in_flight=given.in_flight,
        num_sequences=given.sequences or 4 * given.in_flight,
        repetitions=given.repetitions,
        offline_repetitions=given.offline_repetitions or given.repetitions,
        chunk_tokens=given.chunk_tokens,
        dtype=given.dtype,
        cores=((), ()) if (os.cpu_count() or 1) < 2 else ((0,), (1,)),
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the three policies with figures to reach, 96 new tokens")
    parser.add_argument("--full", action="store_true", help="all that the page shows; takes more than an hour")
    parser.add_argument("--pair", choices=("synthetic", "demo"), default="synthetic")
    parser.add_argument("--policies", nargs="+", help="default: all")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--sequences", type=int, help="default: four times as many as in flight")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--chunk-tokens", type=int, default=16)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--offline-repetitions", type=int, help="followed by their work offline; default: all")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "benchmarks")
    arguments = parser.parse_args()
    if arguments.quick:
        named = arguments.policies
        vars(arguments).update(_QUICK)
        arguments.policies = named or arguments.policies
    return arguments


if __name__ == "__main__":
    main()
