"""A prompt's way through the real Ray actors: two engines, one rollout actor, the demo pair."""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import ray
from ray.actor import ActorHandle

from common.config import AdaSwitch, Sampling, Trace
from common.sequence import MixedSequence, Prompt
from rollout_server.actors import EngineActor, EngineAddress, RemoteRollouts, RolloutActor
from rollout_server.controller import SwitchingController
from rollout_server.pool import RolloutError
from rollout_server.rollouts import LiveContext, RolloutSpec
from rollout_server.traces.records import SequenceFilter
from tests.support.ray_heads import joined
from tests.support.streams import sequences_of
from tests.support.trace_reader import TraceReader

EOS_ID = 2
VOCABULARY_SIZE = 32
DEADLINE_S = 15.0
POLICY = AdaSwitch(floor=1e-3)
SAMPLING = Sampling(temperature=1.0, max_new_tokens=64, chunk_tokens=4)

pytestmark = pytest.mark.asyncio(loop_scope="session")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Server:
    """The actors of one run, as a driver holds them."""

    rollouts: RemoteRollouts
    student: ActorHandle
    teacher: ActorHandle
    trace_folder: Path

    async def num_running(self) -> tuple[int, int]:
        """Requests not finished in the student's and in the teacher's engine."""
        student, teacher = await asyncio.gather(self.student.num_running.remote(), self.teacher.num_running.remote())
        return student, teacher

    async def falls_silent(self) -> bool:
        """Whether both engines come to rest within the deadline, and stay so for a second."""
        deadline_s = time.monotonic() + DEADLINE_S
        num_silent = 0
        while num_silent < 20 and time.monotonic() < deadline_s:
            num_silent = num_silent + 1 if await self.num_running() == (0, 0) else 0
            await asyncio.sleep(0.05)
        return num_silent == 20


@pytest.fixture(scope="module")
def cluster(ray_address: str) -> Iterator[None]:
    with joined(ray_address):
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(cluster, make_spec, demo_folder, held_out_prompts, tmp_path_factory) -> AsyncIterator[Server]:
    trace_folder = tmp_path_factory.mktemp("run") / "traces"
    student, teacher = (ray.remote(EngineActor).options(num_cpus=1).remote() for _ in range(2))
    try:
        await asyncio.gather(
            student.start.remote(make_spec("student"), held_out_prompts[0].token_ids),
            teacher.start.remote(make_spec("teacher"), held_out_prompts[0].token_ids),
        )
        rollouts = (
            ray.remote(RolloutActor)
            .options(num_cpus=1)
            .remote(
                RolloutSpec(
                    policy=POLICY,
                    sampling=SAMPLING,
                    trace=Trace(),
                    trace_folder=trace_folder,
                    top_logprobs=VOCABULARY_SIZE,
                    stop_token_ids=(EOS_ID,),
                    live=LiveContext(max_model_len=128, prompts_as_chat=False),
                ),
                [EngineAddress(handle=student, name="student engine", call_timeout_s=60.0)],
                [EngineAddress(handle=teacher, name="teacher engine", call_timeout_s=60.0)],
                str(demo_folder / "models" / "student"),
            )
        )
        yield Server(
            rollouts=RemoteRollouts(rollouts, timeout_s=60.0),
            student=student,
            teacher=teacher,
            trace_folder=trace_folder,
        )
    finally:
        await asyncio.gather(student.shutdown.remote(), teacher.shutdown.remote(), return_exceptions=True)


async def collect(server: Server, prompts: list[Prompt], *, step: int) -> dict[str, MixedSequence]:
    async with aclosing(server.rollouts.collect(prompts, step)) as collected:
        return {item.sequence.sequence_id: item.sequence async for item in collected}


async def test_the_way_through_the_actors_gives_what_the_controller_gives_without_them(
    server, engines, held_out_prompts
) -> None:
    prompts = held_out_prompts[:48]
    remote = await collect(server, prompts, step=1)
    controller = SwitchingController(
        student=engines.student,
        teacher=engines.teacher,
        policy=POLICY,
        sampling=SAMPLING,
        top_logprobs=VOCABULARY_SIZE,
        stop_token_ids=(EOS_ID,),
    )
    local = await sequences_of(controller, prompts)
    assert remote.keys() == {sequence.sequence_id for sequence in local}
    for sequence in local:
        other = remote[sequence.sequence_id]
        assert np.array_equal(other.token_ids, sequence.token_ids)
        assert np.array_equal(other.sources, sequence.sources)
        assert np.array_equal(other.switches, sequence.switches)
        assert np.allclose(other.divergences, sequence.divergences, atol=1e-4, equal_nan=True)
        assert np.allclose(other.teacher_top.logprobs, sequence.teacher_top.logprobs, atol=1e-4)
    assert sum(bool(sequence.switches.size) for sequence in local) > 24, "the comparison must be of switched sequences"


async def test_the_step_s_trace_is_on_disk_when_the_last_sequence_was_taken(server, held_out_prompts) -> None:
    sequences = await collect(server, held_out_prompts[:8], step=2)
    with TraceReader(server.trace_folder) as reader:
        records = reader.sequences(SequenceFilter(first_step=2, last_step=2))
    assert {record.sequence_id for record in records} == sequences.keys()
    for record in records:
        assert record.num_tokens == len(sequences[record.sequence_id])
        assert record.switches == sequences[record.sequence_id].switches.tolist()


async def test_sequences_that_were_kept_are_in_the_trace_of_the_step_they_are_kept_for(
    server, held_out_prompts
) -> None:
    kept, others = held_out_prompts[:3], held_out_prompts[3:8]
    sequences = list((await collect(server, kept, step=6)).values())
    async with aclosing(server.rollouts.collect(others, 6, sequences)) as collected:
        names = {item.sequence.sequence_id async for item in collected}
    assert names == {prompt.sequence_id for prompt in others}
    with TraceReader(server.trace_folder) as reader:
        records = reader.sequences(SequenceFilter(first_step=6, last_step=6))
    assert {record.sequence_id for record in records} == {prompt.sequence_id for prompt in held_out_prompts[:8]}


async def test_the_evaluation_is_the_student_alone_and_greedy(server, engines, held_out_prompts) -> None:
    sequences = await server.rollouts.evaluate(held_out_prompts[:8])
    assert [len(sequence.switches) for sequence in sequences] == [0] * 8
    for sequence in sequences:
        assert np.array_equal(sequence.token_ids, sequence.student_top.token_ids[:, 0])


async def test_the_probe_reads_the_student_s_rows(
    server, models, held_out_prompts, true_rows, largest_difference
) -> None:
    texts = [prompt.token_ids for prompt in held_out_prompts[:4]]
    for text, rows in zip(texts, (await server.rollouts.probe(texts))[0], strict=True):
        assert largest_difference(rows, true_rows(models.student, text)) < 1e-4


def far_too_many(prompts: list[Prompt]) -> list[Prompt]:
    """More than can be written within the deadline, by far: engines that rest have been told to."""
    return [replace(prompt, sample_index=sample_index) for sample_index in range(20) for prompt in prompts]


async def test_a_closed_collect_leaves_nothing_running(server, held_out_prompts) -> None:
    async with aclosing(server.rollouts.collect(far_too_many(held_out_prompts), 3)) as collected:
        await anext(collected)
    assert await server.falls_silent(), await server.num_running()


async def test_a_cancelled_collect_leaves_nothing_running(server, held_out_prompts) -> None:
    task = asyncio.create_task(collect(server, far_too_many(held_out_prompts), step=4))
    while sum(await server.num_running()) < 20:
        assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await server.falls_silent(), await server.num_running()


async def test_a_collect_that_was_given_up_leaves_no_trace_and_the_next_one_works(server, held_out_prompts) -> None:
    sequences = await collect(server, held_out_prompts[:8], step=5)
    assert len(sequences) == 8
    with TraceReader(server.trace_folder) as reader:
        assert {step.step for step in reader.steps()} == {1, 2, 5, 6}


async def test_a_prompt_that_fails_is_named_and_ends_the_others(server, held_out_prompts) -> None:
    too_long = Prompt(prompt_id="endless", token_ids=np.full(200, 4, np.int32), seed=0)
    with pytest.raises(RolloutError, match=r"prompt endless\.0\.0: .*maximum context length is 128"):
        await collect(server, [*held_out_prompts[:40], too_long], step=7)
    assert await server.falls_silent(), await server.num_running()


@pytest.mark.parametrize("trusted", [False, True])
async def test_a_tokenizer_with_code_of_its_own_is_loaded_where_that_is_trusted(
    server, demo_folder, held_out_prompts, tmp_path, trusted: bool
) -> None:
    model = tmp_path / "student"
    shutil.copytree(demo_folder / "models" / "student", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    spec = RolloutSpec(
        policy=POLICY,
        sampling=SAMPLING,
        trace=Trace(),
        trace_folder=tmp_path / "traces",
        top_logprobs=VOCABULARY_SIZE,
        stop_token_ids=(EOS_ID,),
        trust_remote_code=trusted,
    )
    addresses = [
        [EngineAddress(handle=each, name="engine", call_timeout_s=60.0)] for each in (server.student, server.teacher)
    ]
    own_folder = {"env_vars": {"HF_MODULES_CACHE": str(tmp_path / "modules")}}
    rollouts = ray.remote(RolloutActor).options(num_cpus=0, runtime_env=own_folder).remote(spec, *addresses, str(model))
    if trusted:
        assert len(await rollouts.evaluate.remote(held_out_prompts[:1])) == 1
        assert (tmp_path / "modules").exists(), "the model's code was not needed"
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            await rollouts.evaluate.remote(held_out_prompts[:1])


async def test_a_controller_that_is_connected_again_works_on_and_one_without_engines_says_so(
    server, held_out_prompts
) -> None:
    handle = server.rollouts._handle
    assert (await handle.health.remote()).is_ready
    addresses = [
        [EngineAddress(handle=engine, name=name, call_timeout_s=60.0)]
        for engine, name in ((server.student, "student engine"), (server.teacher, "teacher engine"))
    ]
    await handle.connect.remote(*addresses)
    assert len(await collect(server, held_out_prompts[:4], step=8)) == 4
    await handle.connect.remote([], [])
    assert not (await handle.health.remote()).is_ready
