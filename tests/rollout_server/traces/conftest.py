"""A writer on a fresh folder, and sequences drawn by hypothesis."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from common.sequence import MixedSequence
from rollout_server.traces.writer import TraceWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "traces"


@pytest.fixture
def writer(folder: Path, decode, token_texts) -> TraceWriter:
    return TraceWriter(folder, decode=decode, token_texts=token_texts, top_alternatives=3)


@pytest.fixture(scope="session")
def sequence_lists(make_sequence) -> Callable[[], st.SearchStrategy[list[MixedSequence]]]:
    @st.composite
    def sequences(draw: st.DrawFn, index: int) -> MixedSequence:
        num_tokens = draw(st.integers(1, 30))
        positions = st.integers(0, num_tokens - 1)
        guidance_tokens = draw(st.none() | st.just(1))
        num_switches = 1 if guidance_tokens is None else 5
        return make_sequence(
            prompt_id=f"p{index}",
            epoch=draw(st.integers(0, 3)),
            sample_index=draw(st.integers(0, 3)),
            answer=draw(st.none() | st.text(st.characters(exclude_categories=["Cs"]))),
            policy=draw(st.sampled_from(["adaswitch", "skd", "on_policy"])),
            num_tokens=num_tokens,
            switches=sorted(draw(st.sets(positions, max_size=num_switches))),
            guidance_tokens=guidance_tokens,
            k=5,
            weight_version=draw(st.integers(0, 1000)),
            finish_reason=draw(st.sampled_from(["stop", "length"])),
            num_wasted_tokens=draw(st.integers(0, 100)),
            seed=draw(st.integers(0, 2**63 - 1)),
        )

    def of_several() -> st.SearchStrategy[list[MixedSequence]]:
        return st.integers(1, 6).flatmap(lambda n: st.tuples(*map(sequences, range(n))).map(list))

    return of_several
