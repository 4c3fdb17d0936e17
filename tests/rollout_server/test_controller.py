"""The controller over scripted engines: what it writes, and that no timing changes it."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from common.config import (
    JSD,
    SKD,
    AdaSwitch,
    Decay,
    Fixed,
    Mixture,
    OffPolicy,
    OnPolicy,
    Policy,
    Relay,
    ReverseKL,
    Sampling,
)
from common.seeds import derive_seed
from common.sequence import MixedSequence, Prompt, TokenSource, TopLogprobs
from common.weights import WeightUpdate
from rollout_server.controller import SwitchingController
from rollout_server.engines.protocol import GoOn, ScoreRequest, WriteRequest, Written
from rollout_server.engines.scripted import Fault, HashedScript, Script, ScriptedEngine
from rollout_server.policies import ScoredPositions, make_policy
from rollout_server.pool import RolloutError, generate_all
from tests.support.streams import sequences_of

VOCABULARY_SIZE, K = 24, 8
TEACHER = HashedScript(vocabulary_size=VOCABULARY_SIZE, seed=1, eos_probability=0.02)
STUDENT = TEACHER.student(seed=2)
ADASWITCH = AdaSwitch(window=4)
RELAY = Relay(top_k=3, guidance_tokens=3, max_switches=2)
DECAY = Decay(initial_threshold=0.2, rate=0.05)
POLICIES: list[Policy] = [
    ADASWITCH,
    SKD(top_k=3),
    DECAY,
    RELAY,
    OnPolicy(),
    OffPolicy(),
    Mixture(student_share=0.5),
    Fixed(position=7),
]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.type)
greedy_and_sampled = pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
PROMPTS = [
    Prompt(prompt_id=f"p{number}", token_ids=np.arange(1 + number, 4 + 2 * number, dtype=np.int32), seed=number)
    for number in range(8)
]


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """As in a rollout actor. With more, and other work on the machine, tiny sums wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_controller(
    policy: Policy,
    student: ScriptedEngine | None = None,
    teacher: ScriptedEngine | None = None,
    *,
    k: int = K,
    stop_token_ids: tuple[int, ...] = (TEACHER.eos_token_id,),
    **sampling: Any,
) -> SwitchingController:
    return SwitchingController(
        student=student or ScriptedEngine(STUDENT, top_logprobs=k),
        teacher=teacher or ScriptedEngine(TEACHER, top_logprobs=k),
        policy=policy,
        sampling=Sampling(**{"max_new_tokens": 40, "chunk_tokens": 8, "top_p": 0.95, **sampling}),
        top_logprobs=k,
        stop_token_ids=stop_token_ids,
    )


async def collect(
    controller: SwitchingController, prompts: Sequence[Prompt] = PROMPTS, *, max_in_flight: int = 256
) -> list[MixedSequence]:
    """The prompts' sequences, by prompt."""
    sequences = await sequences_of(controller, prompts, max_in_flight=max_in_flight)
    return sorted(sequences, key=lambda sequence: sequence.sequence_id)


def assert_equal(left: MixedSequence, right: MixedSequence) -> None:
    """In everything but how many tokens were wasted, which is a matter of timing."""
    for name in {column.name for column in fields(MixedSequence)} - {"prompt", "num_wasted_tokens"}:
        mine, theirs = getattr(left, name), getattr(right, name)
        if isinstance(mine, TopLogprobs):
            np.testing.assert_array_equal(mine.token_ids, theirs.token_ids, err_msg=name)
            mine, theirs = mine.logprobs, theirs.logprobs
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def alone_request(prompt: Prompt, role: str, temperature: float) -> WriteRequest:
    """What a model without a partner would be asked to write."""
    return WriteRequest(
        prefix=prompt.token_ids,
        max_tokens=40,
        temperature=temperature,
        top_p=0.95,
        seed=derive_seed(prompt.seed, role, 0),
        chunk_tokens=40,
    )


# -------------------------------------------------------------------------------------------------------- equivalences


@greedy_and_sampled
@pytest.mark.parametrize("policy", [OnPolicy(), AdaSwitch(window=4, floor=1e6)], ids=["on_policy", "floor"])
async def test_a_policy_that_never_switches_leaves_the_student_alone(policy: Policy, temperature: float) -> None:
    student, teacher = (ScriptedEngine(script, top_logprobs=K) for script in (STUDENT, TEACHER))
    for sequence in await collect(make_controller(policy, temperature=temperature)):
        prompt = sequence.prompt
        alone = await student.generate(alone_request(prompt, "student", temperature))
        np.testing.assert_array_equal(sequence.token_ids, alone.token_ids)
        np.testing.assert_array_equal(sequence.student_logprobs, alone.logprobs)
        np.testing.assert_array_equal(sequence.student_top.logprobs, alone.top.logprobs)
        assert sequence.finish_reason == alone.finish_reason
        text = np.concatenate([prompt.token_ids, alone.token_ids[:-1]])
        scores = await teacher.score(ScoreRequest(token_ids=text, start=prompt.token_ids.size))
        np.testing.assert_array_equal(sequence.teacher_top.token_ids, scores.token_ids)
        np.testing.assert_array_equal(sequence.teacher_top.logprobs, scores.logprobs)
        assert (sequence.sources == TokenSource.STUDENT).all()
        assert sequence.num_wasted_tokens == sequence.switches.size == 0


@greedy_and_sampled
async def test_off_policy_leaves_the_teacher_alone(temperature: float) -> None:
    student, teacher = (ScriptedEngine(script, top_logprobs=K) for script in (STUDENT, TEACHER))
    for sequence in await collect(make_controller(OffPolicy(), student, teacher, temperature=temperature)):
        alone = await teacher.generate(alone_request(sequence.prompt, "teacher", temperature))
        np.testing.assert_array_equal(sequence.token_ids, alone.token_ids)
        np.testing.assert_array_equal(sequence.teacher_logprobs, alone.logprobs)
        np.testing.assert_array_equal(sequence.teacher_top.logprobs, alone.top.logprobs)
        assert sequence.finish_reason == alone.finish_reason
        assert sequence.switches.tolist() == [0]
        assert np.isnan(sequence.divergences).all()
    assert student.num_calls == {"write": 0, "score": 0}
    assert teacher.num_calls["score"] == 0


@pytest.mark.parametrize(
    ("policy", "temperature"),
    [
        (ADASWITCH, 0.0),
        (ADASWITCH, 1.0),
        (AdaSwitch(window=1, multiplier=0.5, divergence=ReverseKL()), 1.0),
        (AdaSwitch(window=1, multiplier=0.5, divergence=JSD(beta=0.3)), 1.0),
        (SKD(top_k=1), 0.0),
    ],
)
async def test_a_teacher_equal_to_the_student_never_takes_over(policy: Policy, temperature: float) -> None:
    teacher = ScriptedEngine(STUDENT, top_logprobs=K)
    for sequence in await collect(make_controller(policy, teacher=teacher, temperature=temperature)):
        assert sequence.first_switch is None
        np.testing.assert_array_equal(sequence.divergences, 0.0)
        np.testing.assert_array_equal(sequence.student_ranks < 1, sequence.student_ranks == 0)


# -------------------------------------------------------------------------------------------------------- the record


@greedy_and_sampled
async def test_the_switch_position_belongs_to_the_teacher_and_shows_what_caused_it(temperature: float) -> None:
    sequences = await collect(make_controller(ADASWITCH, temperature=temperature))
    switched = [sequence for sequence in sequences if sequence.first_switch is not None]
    assert len(switched) >= 4
    for sequence in switched:
        switch = sequence.first_switch
        assert switch is not None
        assert switch >= ADASWITCH.window
        assert (sequence.sources[:switch] == TokenSource.STUDENT).all()
        assert (sequence.sources[switch:] == TokenSource.TEACHER).all()
        with np.errstate(invalid="ignore"):
            above = sequence.divergences > sequence.thresholds
        assert np.flatnonzero(above).tolist() == [switch]
        mean = sequence.divergences[switch - 4 : switch].astype(np.float64).mean()
        assert sequence.thresholds[switch] == np.float32(3.0 * mean)
        assert np.isnan(sequence.divergences[switch + 1 :]).all()
        assert sequence.weight_versions[switch] == 0
        assert sequence.num_wasted_tokens >= 1  # the refused proposal at least


@greedy_and_sampled
async def test_skd_takes_one_token_wherever_the_students_is_not_among_the_teachers_best(temperature: float) -> None:
    sequences = await collect(make_controller(SKD(top_k=3), temperature=temperature))
    assert sum(sequence.switches.size for sequence in sequences) >= 8
    for sequence in sequences:
        assert np.flatnonzero(sequence.sources == TokenSource.TEACHER).tolist() == sequence.switches.tolist()
        np.testing.assert_array_equal(sequence.student_ranks >= 3, sequence.sources == TokenSource.TEACHER)
        assert not np.isnan(sequence.divergences).any()
        assert np.isnan(sequence.thresholds).all()


@greedy_and_sampled
@every_policy
async def test_that_others_wait_for_the_student_changes_only_what_is_wasted(policy: Policy, temperature: float) -> None:
    """More sequences than may be in flight: then the student waits for verdicts."""
    students = [ScriptedEngine(STUDENT, top_logprobs=K) for _ in range(2)]
    alone, crowded = [
        await collect(make_controller(policy, student, temperature=temperature), max_in_flight=max_in_flight)
        for student, max_in_flight in zip(students, (len(PROMPTS), 2), strict=True)
    ]
    for sequence, expected in zip(crowded, alone, strict=True):
        assert_equal(sequence, expected)
        assert sequence.num_wasted_tokens <= 8 * sequence.switches.size
    assert students[1].num_written_tokens <= students[0].num_written_tokens


@greedy_and_sampled
async def test_what_goes_in_step_is_written_once_and_read_once(temperature: float) -> None:
    """A policy that refuses all the time: after its first two switches no token is in vain."""
    student, teacher = ScriptedEngine(STUDENT, top_logprobs=K), AskedEngine(TEACHER, top_logprobs=K)
    policy = Decay(initial_threshold=0.0, rate=0.0)
    sequences = await collect(make_controller(policy, student, teacher, temperature=temperature, top_p=1.0))
    for sequence in sequences:
        assert sequence.num_wasted_tokens <= sequence.switches.size + 2 * 8
    num_kept = sum(sequence.num_student_tokens for sequence in sequences)
    assert student.num_written_tokens == num_kept + sum(sequence.num_wasted_tokens for sequence in sequences)
    # Each sequence's first two proposals were read whole.
    assert teacher.num_scored_rows <= 2 * 9 * len(sequences)
    # And its first two tokens asked for at most: what it draws as it reads along is the token of a later switch.
    assert teacher.num_asked <= 2 * len(sequences)


@dataclass(frozen=True, slots=True)
class ConstantScript:
    """The same distribution after every text."""

    probabilities: tuple[float, ...]
    eos_token_id: None = None

    def next_logprobs(self, text: np.ndarray) -> np.ndarray:
        return np.log(np.array(self.probabilities, np.float32))


class StudentWithPauses(ScriptedEngine):
    """Remembers how far each of its texts was to run at first."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.pauses: list[int | None] = []

    def stream(self, request: WriteRequest) -> AsyncGenerator[Written, GoOn | None]:
        self.pauses.append(request.pause_after)
        return super().stream(request)


async def test_a_relays_student_is_judged_the_sooner_the_more_was_refused_and_not_after_the_last_switch() -> None:
    """What the teacher wrote in between does not count."""
    refused, wanted = ConstantScript((0.7, 0.2, 0.1)), ConstantScript((0.1, 0.2, 0.7))
    student, teacher = StudentWithPauses(refused, top_logprobs=3), ScriptedEngine(wanted, top_logprobs=3)
    policy = Relay(top_k=1, guidance_tokens=7, max_switches=3)
    controller = make_controller(policy, student, teacher, k=3, stop_token_ids=(), temperature=0.0)
    (sequence,) = await collect(controller, PROMPTS[:1])
    assert sequence.switches.tolist() == [0, 7, 14]
    assert student.pauses == [6, 4, 3, None]
    assert sequence.num_wasted_tokens == 6 + 4 + 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7)])
async def test_guidance_of_one_token_is_drawn_as_the_teacher_would_draw_it(temperature: float, top_p: float) -> None:
    """In step or not, on its list of 2 or not."""
    p = np.array([0.35, 0.3, 0.15, 0.1, 0.06, 0.04])
    student, teacher = (ScriptedEngine(ConstantScript(tuple(row)), top_logprobs=2) for row in (np.roll(p, 3), p))
    controller = make_controller(
        SKD(top_k=1), student, teacher, k=2, stop_token_ids=(), temperature=temperature, top_p=top_p
    )
    prompts = [replace(PROMPTS[0], prompt_id=f"p{seed}", seed=seed) for seed in range(64)]
    drawn = np.concatenate([sequence.token_ids[sequence.switches] for sequence in await collect(controller, prompts)])
    expected = p ** (1 / temperature)
    expected[(expected.cumsum() - expected) / expected.sum() >= top_p] = 0.0
    counts, expected = np.bincount(drawn, minlength=p.size), drawn.size * expected / expected.sum()
    assert (counts[expected == 0.0] == 0).all()
    deviations = (counts - expected)[expected > 0.0] ** 2 / expected[expected > 0.0]
    assert deviations.sum() < 20.5, (counts, expected)  # chi-square with 5 degrees of freedom: 1 in 1000 lies above


class ExcludingTeacher(ScriptedEngine):
    """Remembers how many tokens each request excludes."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.num_excluded: list[int] = []

    def stream(self, request: WriteRequest) -> AsyncGenerator[Written, GoOn | None]:
        self.num_excluded.append(len(request.excluded_token_ids))
        return super().stream(request)


async def test_a_list_longer_than_a_request_can_exclude_is_drawn_from_as_the_teacher_would() -> None:
    """Among the 1,024 best, the others on the list of 1,500, and those outside it."""
    sizes, masses = np.array([1024, 476, 500]), np.array([0.5, 0.3, 0.2])
    wanted = ConstantScript(tuple(np.repeat(masses / sizes, sizes)))
    refused = ConstantScript((1e-9,) * 1999 + (1.0,))
    student, teacher = ScriptedEngine(refused, top_logprobs=1500), ExcludingTeacher(wanted, top_logprobs=1500)
    controller = make_controller(
        Decay(initial_threshold=0.1), student, teacher, k=1500, stop_token_ids=(), top_p=1.0, max_new_tokens=1
    )
    prompts = [replace(PROMPTS[0], prompt_id=f"p{seed}", seed=seed) for seed in range(400)]
    drawn = np.concatenate([sequence.token_ids[sequence.switches] for sequence in await collect(controller, prompts)])
    assert drawn.size == len(prompts)
    assert set(teacher.num_excluded) == {1024}
    counts = np.bincount(np.searchsorted(sizes.cumsum(), drawn, side="right"), minlength=3)
    expected = drawn.size * masses
    assert ((counts - expected) ** 2 / expected).sum() < 13.8, counts  # 2 degrees of freedom: 1 in 1000 lies above


class AskedEngine(ScriptedEngine):
    """Counts the requests to write, apart from those that only read along."""

    num_asked = 0

    def stream(self, request: WriteRequest) -> AsyncGenerator[Written, GoOn | None]:
        self.num_asked += not request.ignore_eos
        return super().stream(request)


@greedy_and_sampled
@pytest.mark.parametrize("policy", [SKD(top_k=3), DECAY], ids=lambda policy: policy.type)
async def test_one_token_guidance_asks_the_teacher_only_for_tokens_outside_its_list_and_out_of_step(
    policy: Policy, temperature: float
) -> None:
    """And gives the same whatever the chunks are."""
    results = []
    for chunk_tokens in (1, 8, 40):
        teacher = AskedEngine(TEACHER, top_logprobs=K)
        controller = make_controller(
            policy, teacher=teacher, temperature=temperature, top_p=1.0, chunk_tokens=chunk_tokens
        )
        results.append(await collect(controller))
        taken_outside = sum(
            int(np.isnan(sequence.teacher_top.logprob_of(sequence.token_ids))[sequence.switches].sum())
            for sequence in results[-1]
        )
        assert teacher.num_asked <= taken_outside
        assert temperature > 0.0 or taken_outside == 0
    for sequences in results[1:]:
        for sequence, expected in zip(sequences, results[0], strict=True):
            assert_equal(sequence, expected)


@greedy_and_sampled
async def test_decay_takes_one_token_wherever_the_divergence_exceeds_the_falling_threshold(temperature: float) -> None:
    sequences = await collect(make_controller(DECAY, temperature=temperature))
    assert sum(sequence.switches.size for sequence in sequences) >= 8
    for sequence in sequences:
        expected = np.float32(0.2 * np.exp(-0.05 * np.arange(len(sequence))))
        np.testing.assert_array_equal(sequence.thresholds, expected)
        np.testing.assert_array_equal(
            sequence.divergences > sequence.thresholds, sequence.sources == TokenSource.TEACHER
        )


@greedy_and_sampled
async def test_relay_takes_a_few_tokens_a_few_times(temperature: float) -> None:
    sequences = await collect(make_controller(RELAY, temperature=temperature))
    assert max(sequence.switches.size for sequence in sequences) == RELAY.max_switches
    for sequence in sequences:
        guided = {position + offset for position in sequence.switches.tolist() for offset in range(3)}
        taken = np.flatnonzero(sequence.sources == TokenSource.TEACHER).tolist()
        assert taken == sorted(position for position in guided if position < len(sequence))
        outside = np.flatnonzero((sequence.student_ranks >= 3) & (sequence.sources == TokenSource.STUDENT))
        assert sequence.switches.size == RELAY.max_switches or not outside.size


@greedy_and_sampled
async def test_a_mixture_is_the_students_or_the_teachers_by_the_sequences_seed(temperature: float) -> None:
    sequences = await collect(make_controller(Mixture(student_share=0.5), temperature=temperature))
    teachers = [sequence for sequence in sequences if sequence.num_teacher_tokens]
    assert 0 < len(teachers) < len(sequences)
    students_alone = await collect(make_controller(OnPolicy(), temperature=temperature))
    teachers_alone = await collect(make_controller(OffPolicy(), temperature=temperature))
    for mixed, student_alone, teacher_alone in zip(sequences, students_alone, teachers_alone, strict=True):
        alone = teacher_alone if mixed.num_teacher_tokens else student_alone
        np.testing.assert_array_equal(mixed.token_ids, alone.token_ids)


@greedy_and_sampled
async def test_a_fixed_switch_is_where_it_was_set_and_costs_no_student_token(temperature: float) -> None:
    for sequence in await collect(make_controller(Fixed(position=7), temperature=temperature)):
        if len(sequence) > 7:
            assert sequence.switches.tolist() == [7]
            assert (sequence.sources[7:] == TokenSource.TEACHER).all()
        assert sequence.num_wasted_tokens == 0


@every_policy
async def test_the_teachers_rows_are_those_of_the_text_as_it_became(policy: Policy) -> None:
    """Each row of a mixed sequence is the teacher's distribution after the kept tokens, however it was come by."""
    teacher = ScriptedEngine(TEACHER, top_logprobs=K)
    for sequence in await collect(make_controller(policy, chunk_tokens=3)):
        text = np.concatenate([sequence.prompt.token_ids, sequence.token_ids[:-1]])
        rows = await teacher.score(ScoreRequest(token_ids=text, start=sequence.prompt.token_ids.size))
        np.testing.assert_array_equal(sequence.teacher_top.logprobs, rows.logprobs)
        listed = rows.logprob_of(sequence.token_ids)
        known = (sequence.sources == TokenSource.STUDENT) | ~np.isnan(listed)  # its own tokens' it always knows
        np.testing.assert_array_equal(sequence.teacher_logprobs[known], listed[known])


@every_policy
async def test_sequences_end_at_the_limit_or_with_a_stop_token(policy: Policy) -> None:
    sequences = await collect(make_controller(policy, stop_token_ids=(TEACHER.eos_token_id, 5), max_new_tokens=10))
    assert {sequence.finish_reason for sequence in sequences} == {"stop", "length"}
    for sequence in sequences:
        stops = np.isin(sequence.token_ids, (TEACHER.eos_token_id, 5))
        assert not stops[:-1].any()
        assert stops[-1] == (sequence.finish_reason == "stop")
        assert stops[-1] or len(sequence) == 10


async def test_tokens_carry_the_weight_version_of_the_student_that_proposed() -> None:
    student = ScriptedEngine(STUDENT, top_logprobs=K)
    await student.load_weights(WeightUpdate(version=3))
    for sequence in await collect(make_controller(ADASWITCH, student)):
        np.testing.assert_array_equal(sequence.weight_versions, np.where(np.isnan(sequence.divergences), -1, 3))


async def test_a_kept_position_costs_the_teacher_one_row() -> None:
    teacher = ScriptedEngine(TEACHER, top_logprobs=K)
    sequences = await collect(make_controller(OnPolicy(), teacher=teacher, chunk_tokens=3))
    assert teacher.num_scored_rows == sum(map(len, sequences))


# -------------------------------------------------------------------------------------------------------- timing


@cache
def undisturbed(policy: Policy, temperature: float) -> list[MixedSequence]:
    """One sequence after the other, each proposal a whole sequence."""
    controller = make_controller(policy, temperature=temperature, chunk_tokens=40)
    return asyncio.run(collect(controller, max_in_flight=1))


def random_delay(seed: int) -> Callable[[], float]:
    """s. Often none, so that chunks merge as well as wait."""
    rng = random.Random(seed)
    return lambda: rng.choice([0.0, 0.0, 0.0005, 0.002])


@every_policy
@greedy_and_sampled
@settings(max_examples=4, phases=[Phase.generate])  # to shrink a failure would take minutes
@given(
    chunk_tokens=st.sampled_from([1, 3, 8, 40]),
    delay_seeds=st.tuples(st.integers(0, 999), st.integers(0, 999)),
    max_in_flight=st.sampled_from([1, 3, 8]),
    prompts=st.permutations(PROMPTS),
)
def test_neither_timing_nor_chunks_nor_order_change_the_result(
    policy: Policy,
    temperature: float,
    chunk_tokens: int,
    delay_seeds: tuple[int, int],
    max_in_flight: int,
    prompts: list[Prompt],
) -> None:
    student, teacher = (
        ScriptedEngine(script, top_logprobs=K, delay=random_delay(seed))
        for script, seed in zip((STUDENT, TEACHER), delay_seeds, strict=True)
    )
    controller = make_controller(policy, student, teacher, temperature=temperature, chunk_tokens=chunk_tokens)
    for sequence, expected in zip(
        asyncio.run(collect(controller, prompts, max_in_flight=max_in_flight)),
        undisturbed(policy, temperature),
        strict=True,
    ):
        assert_equal(sequence, expected)
    assert student.num_running == teacher.num_running == 0


@greedy_and_sampled
@pytest.mark.parametrize(
    "policy", [ADASWITCH, AdaSwitch(window=2, multiplier=2.0, floor=0.1), AdaSwitch(window=4, warmup=9)]
)
async def test_online_equals_post_hoc(policy: AdaSwitch, temperature: float) -> None:
    """The policy, applied to what the student wrote on its own, switches where the controller did."""
    on_policy = await collect(make_controller(OnPolicy(), temperature=temperature))
    online = await collect(make_controller(policy, temperature=temperature))
    switches = []
    for finished, mixed in zip(on_policy, online, strict=True):
        decision = make_policy(policy).decide(
            ScoredPositions(first=0, divergences=finished.divergences, student_ranks=finished.student_ranks)
        )
        switches.append(decision.switch)
        assert mixed.first_switch == decision.switch
        np.testing.assert_array_equal(mixed.token_ids[: decision.switch], finished.token_ids[: decision.switch])
        if decision.switch is not None:
            seen = slice(None, decision.switch + 1)
            np.testing.assert_array_equal(mixed.divergences[seen], finished.divergences[seen])
            np.testing.assert_array_equal(mixed.thresholds[seen], decision.thresholds[seen])
    assert len(set(switches)) > 1


# -------------------------------------------------------------------------------------------------------- lockstep


@dataclass(slots=True)
class Stepped:
    """A sequence as the lockstep loop writes it."""

    token_ids: list[int] = field(default_factory=list)
    sources: list[TokenSource] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    switches: list[int] = field(default_factory=list)


def lockstep(prompt: Prompt, policy: AdaSwitch | SKD, student: Script, teacher: Script) -> Stepped:
    """Both models, token by token, whole vocabulary, greedy: the method as its paper states it."""
    stepped, guided = Stepped(), False
    while len(stepped.token_ids) < 40 and 0 not in stepped.token_ids:
        text = np.array([*prompt.token_ids, *stepped.token_ids], np.int32)
        position = len(stepped.token_ids)
        p, q = (script.next_logprobs(text).astype(np.float64) for script in (teacher, student))
        nats = float(np.sum(np.exp(p) * (p - q)))
        switches = False
        if isinstance(policy, SKD):
            switches = int((p > p[q.argmax()]).sum()) >= policy.top_k
        elif not guided and position >= policy.window:
            switches = nats > policy.multiplier * np.mean(stepped.divergences[-policy.window :])
        teacher_writes = switches or guided
        if switches:
            stepped.switches.append(position)
        stepped.token_ids.append(int((p if teacher_writes else q).argmax()))
        stepped.sources.append(TokenSource.TEACHER if teacher_writes else TokenSource.STUDENT)
        stepped.divergences.append(float("nan") if guided else nats)
        guided = guided or (switches and isinstance(policy, AdaSwitch))
    return stepped


@pytest.mark.parametrize("policy", [ADASWITCH, AdaSwitch(window=2, multiplier=1.5), SKD(top_k=3), SKD(top_k=1)])
async def test_online_equals_lockstep(policy: AdaSwitch | SKD) -> None:
    controller = make_controller(policy, k=VOCABULARY_SIZE, temperature=0.0, chunk_tokens=5)
    num_switches = 0
    for sequence in await collect(controller):
        expected = lockstep(sequence.prompt, policy, STUDENT, TEACHER)
        assert sequence.token_ids.tolist() == expected.token_ids
        assert sequence.sources.tolist() == expected.sources
        assert sequence.switches.tolist() == expected.switches
        np.testing.assert_allclose(sequence.divergences, expected.divergences, rtol=1e-5, atol=1e-6)
        num_switches += len(expected.switches)
    assert num_switches >= 4


# ---------------------------------------------------------------------------------------------- limits, ends, failures


@every_policy
@pytest.mark.parametrize("chunk_tokens", [1, 3, 40])
async def test_a_text_that_fills_the_context_asks_for_no_row_beyond_it(policy: Policy, chunk_tokens: int) -> None:
    endless = replace(TEACHER, eos_probability=1e-9)
    student, teacher = (
        ScriptedEngine(script, top_logprobs=K, max_model_len=PROMPTS[2].token_ids.size + 40)
        for script in (endless.student(seed=2), endless)
    )
    (sequence,) = await collect(make_controller(policy, student, teacher, chunk_tokens=chunk_tokens), PROMPTS[2:3])
    assert (len(sequence), sequence.finish_reason) == (40, "length")


async def test_no_more_sequences_than_allowed_are_in_flight() -> None:
    num_running = []

    def count() -> float:
        num_running.append(student.num_running)
        return 0.0

    student = ScriptedEngine(STUDENT, top_logprobs=K, delay=count)
    await collect(make_controller(OnPolicy(), student), max_in_flight=3)
    assert max(num_running) == 3


@every_policy
async def test_closing_a_collection_leaves_nothing_running(policy: Policy) -> None:
    student, teacher = (ScriptedEngine(script, top_logprobs=K, delay=random_delay(0)) for script in (STUDENT, TEACHER))
    async with aclosing(
        generate_all(make_controller(policy, student, teacher, chunk_tokens=1), PROMPTS, max_in_flight=256)
    ) as batches:
        await anext(batches)
        assert student.num_running + teacher.num_running > 0
    assert student.num_running == teacher.num_running == 0


async def test_a_slow_reader_gets_all_that_has_finished_meanwhile() -> None:
    async with aclosing(generate_all(make_controller(ADASWITCH), PROMPTS, max_in_flight=256)) as batches:
        first = await anext(batches)
        await asyncio.sleep(0.5)
        second = await anext(batches)
        assert len(first) + len(second) == len(PROMPTS)
        assert [rest async for rest in batches] == []


async def test_what_has_finished_before_a_failure_is_handed_over_first() -> None:
    """Also when the reader comes after the failure."""
    student = ScriptedEngine(STUDENT, top_logprobs=K, fault=Fault(call="write", number=len(PROMPTS)))
    async with aclosing(generate_all(make_controller(OnPolicy(), student), PROMPTS, max_in_flight=1)) as batches:
        come = await anext(batches)
        await asyncio.sleep(0.5)
        come.extend(await anext(batches))
        with pytest.raises(RolloutError, match=rf"^prompt {PROMPTS[-1].prompt_id}\.0\.0: "):
            await anext(batches)
    assert [sequence.prompt.prompt_id for sequence in come] == [prompt.prompt_id for prompt in PROMPTS[:-1]]


@pytest.mark.parametrize(("role", "call"), [("student", "write"), ("teacher", "score"), ("teacher", "write")])
async def test_cancelling_a_collection_leaves_nothing_running(role: str, call: str) -> None:
    """Even when an engine hangs."""
    faults = {role: Fault(call=call, number=1, hangs=True)}  # type: ignore[arg-type]
    student = ScriptedEngine(STUDENT, top_logprobs=K, fault=faults.get("student"))
    teacher = ScriptedEngine(TEACHER, top_logprobs=K, fault=faults.get("teacher"))
    collecting = asyncio.create_task(collect(make_controller(ADASWITCH, student, teacher)))
    await asyncio.sleep(0.05)
    collecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await collecting
    assert student.num_running == teacher.num_running == 0


@pytest.mark.parametrize(
    ("role", "call", "policy"),
    [("student", "write", ADASWITCH), ("teacher", "score", ADASWITCH), ("teacher", "write", OffPolicy())],
)
async def test_a_failure_names_the_prompt_and_ends_the_others(role: str, call: str, policy: Policy) -> None:
    faults = {role: Fault(call=call, number=3)}  # type: ignore[arg-type]
    student = ScriptedEngine(STUDENT, top_logprobs=K, fault=faults.get("student"), delay=lambda: 0.001)
    teacher = ScriptedEngine(TEACHER, top_logprobs=K, fault=faults.get("teacher"), delay=lambda: 0.001)
    with pytest.raises(RolloutError, match=rf"^prompt p2\.0\.0: ScriptedError: {call} 3 fails as scripted$"):
        await collect(make_controller(policy, student, teacher))
    assert student.num_running == teacher.num_running == 0
