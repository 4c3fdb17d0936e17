"""What tests of several parts share: fixtures of the session, and how two processes divide the tests."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pytest
from hypothesis import settings
from xdist.scheduler import LoadGroupScheduling

from common.sequence import FinishReason, MixedSequence, Prompt, TokenSource, TopLogprobs
from tests.support.demo_run import DemoRun, run_demo

VOCABULARY_SIZE = 40

# A thread for each of two test processes on two cores. Before anything imports torch; `run_environment` takes it back.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example took says nothing on a shared machine. `thorough` is what `make test-all` runs.
settings.register_profile("quick", deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=100)
settings.load_profile("quick")

# What is started once a session, and so for tests of one process only. The longest group comes first.
GROUP_OF_FIXTURE = {"engines": "engines", "ray_address": "engines", "demo_run": "demo_run"}
GROUPS = list(dict.fromkeys(GROUP_OF_FIXTURE.values()))
GROUP_TIMEOUT_S = 300.0  # the start of what a group shares included


class ByGroupOrModule(LoadGroupScheduling):  # type: ignore[misc]
    """Gives a process whole groups, and of tests without a group whole modules, whose fixtures are then made once."""

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return scope.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroupOrModule:
    return ByGroupOrModule(config, log)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests by the shared fixtures that they ask for; begin with what takes longest: groups and slow tests."""
    places: dict[pytest.Item, int] = {}
    for item in items:
        wanted = {GROUP_OF_FIXTURE[name] for name in item.fixturenames if name in GROUP_OF_FIXTURE}
        groups = [group for group in GROUPS if group in wanted]
        assert len(groups) <= 1, f"{item.nodeid} needs what {' and '.join(groups)} share; let them be one group"
        is_slow = item.get_closest_marker("slow") is not None
        if groups:
            item.add_marker(pytest.mark.xdist_group(groups[0]))
        if (groups or is_slow) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(GROUP_TIMEOUT_S))
        places[item] = GROUPS.index(groups[0]) if groups else len(GROUPS) + (not is_slow)
    items.sort(key=places.__getitem__)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """The demo's command with real engines, cut short, once."""
    return run_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray for drivers in this process."""
    from tests.support.ray_heads import started_ray  # Ray takes its time to import

    with started_ray() as address:
        yield address


class MakeSequence(Protocol):
    def __call__(
        self,
        *,
        prompt_id: str = ...,
        epoch: int = ...,
        sample_index: int = ...,
        answer: str | None = ...,
        policy: str = ...,
        num_tokens: int = ...,
        switches: Sequence[int] = ...,
        guidance_tokens: int | None = ...,
        k: int = ...,
        weight_version: int = ...,
        finish_reason: FinishReason = ...,
        num_wasted_tokens: int = ...,
        seed: int = ...,
    ) -> MixedSequence: ...


@pytest.fixture(scope="session")
def make_sequence() -> MakeSequence:
    """Builds a valid MixedSequence as the controller would, from random distributions over 40 tokens.

    The student proposes up to and at each switch; from there the teacher writes ``guidance_tokens`` (None: all the
    rest). ``switches=[0]`` with None is off-policy: the student never proposes. Same arguments, same sequence.
    """
    return _make_sequence


@pytest.fixture(scope="session")
def make_mixed_sequence() -> MakeSequence:
    """The same, under a name that the learner's tests do not give to another builder."""
    return _make_sequence


def _make_sequence(
    *,
    prompt_id: str = "p0",
    epoch: int = 0,
    sample_index: int = 0,
    answer: str | None = None,
    policy: str = "adaswitch",
    num_tokens: int = 12,
    switches: Sequence[int] = (5,),
    guidance_tokens: int | None = None,
    k: int = 8,
    weight_version: int = 0,
    finish_reason: FinishReason = "stop",
    num_wasted_tokens: int = 0,
    seed: int = 0,
) -> MixedSequence:
    assert all(switch < num_tokens for switch in switches), f"switches {switches} past {num_tokens} tokens"
    rng = np.random.default_rng(seed)
    sources = np.full(num_tokens, TokenSource.STUDENT, np.uint8)
    for switch in switches:
        end = num_tokens if guidance_tokens is None else switch + guidance_tokens
        sources[switch:end] = TokenSource.TEACHER
    is_student = sources == TokenSource.STUDENT
    proposed = is_student.copy()
    proposed[[switch for switch in switches if switch > 0 or guidance_tokens is not None]] = True

    student_top, teacher_top = _random_top(rng, num_tokens, k), _random_top(rng, num_tokens, k)
    proposals = student_top.token_ids[:, 0]
    token_ids = np.where(is_student, proposals, teacher_top.token_ids[:, 0]).astype(np.int32)
    unknown = TopLogprobs.unknown(num_tokens, k)
    student_top = TopLogprobs(
        np.where(proposed[:, None], student_top.token_ids, unknown.token_ids),
        np.where(proposed[:, None], student_top.logprobs, unknown.logprobs),
    )
    nan = np.float32(np.nan)
    return MixedSequence(
        prompt=Prompt(
            prompt_id=prompt_id,
            token_ids=rng.integers(0, VOCABULARY_SIZE, 4).astype(np.int32),
            seed=seed,
            epoch=epoch,
            sample_index=sample_index,
            answer=answer,
        ),
        policy=policy,
        token_ids=token_ids,
        sources=sources,
        divergences=np.where(proposed, rng.exponential(1.0, num_tokens).astype(np.float32), nan),
        thresholds=np.where(proposed & (np.arange(num_tokens) >= 3), np.float32(0.75), nan),
        student_ranks=np.where(proposed, teacher_top.rank_of(proposals), -1).astype(np.int32),
        student_logprobs=np.where(is_student, student_top.logprobs[:, 0], nan),
        teacher_logprobs=teacher_top.logprob_of(token_ids),
        student_top=student_top,
        teacher_top=teacher_top,
        weight_versions=np.where(proposed, weight_version, -1).astype(np.int32),
        switches=np.array(switches, np.int32),
        finish_reason=finish_reason,
        num_wasted_tokens=num_wasted_tokens,
    )


def _random_top(rng: np.random.Generator, num_rows: int, k: int) -> TopLogprobs:
    logits = rng.normal(0.0, 2.0, (num_rows, VOCABULARY_SIZE))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    token_ids = np.argsort(-logprobs, axis=1)[:, :k]
    return TopLogprobs(token_ids.astype(np.int32), np.take_along_axis(logprobs, token_ids, axis=1).astype(np.float32))


@pytest.fixture(scope="session")
def decode() -> Callable[[list[int]], str]:
    """Text of the tokens of ``make_sequence``: token 3 is ``t3 ``."""
    return lambda token_ids: "".join(_token_text(token_id) for token_id in token_ids)


@pytest.fixture(scope="session")
def token_texts() -> Callable[[list[int]], list[str]]:
    return lambda token_ids: [_token_text(token_id) for token_id in token_ids]


def _token_text(token_id: int) -> str:
    return f"t{token_id} "
