"""Several ranks against one: the same steps in real processes that hold a part of the model each."""

import asyncio
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import RayActorError
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from common.config import ReverseKL, Trainer
from common.sequence import MixedSequence, TopLogprobs
from common.waiting import WaitedTooLong
from tests.support.learner_rank import Case, Seen, run
from trainer.actors import LearnerRankDied, every_rank
from trainer.ranks import ALONE, join

REPOSITORY = Path(__file__).parents[2]
BUDGETS = {"1": 16384, "2": 100, "4": 54}  # tokens, by what one rank needs micro-batches for them


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def work(cases: dict[str, Case], folder: Path, *, num_ranks: int, device: str) -> list[dict[str, Seen]]:
    """What each rank saw of each case."""
    folder.mkdir()
    (folder / "cases.pkl").write_bytes(pickle.dumps(cases))
    address = free_address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.learner_rank", str(folder), str(rank), str(num_ranks), address],
            cwd=REPOSITORY,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(rank) if device == "cuda" else ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0 or any(case.dies for case in cases.values()), errors[-4000:]
    finally:
        for process in processes:
            process.kill()
    return [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("seen-*.pkl"))]


@pytest.fixture(scope="module")
def cases(
    make_model: Callable[..., Any],
    make_tokenizer: Callable[..., Any],
    written_by: Callable[..., list[MixedSequence]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("cases")
    for tied in (False, True):
        make_model(seed=2, tied=tied).save_pretrained(folder / f"tied={tied}")
        make_tokenizer().save_pretrained(folder / f"tied={tied}")
    sequences = written_by(make_model(seed=1), num=8, num_student_tokens=2)

    def case(*, tied: bool = False, num: int = 8, save_to: Path | None = None, **knobs: Any) -> Case:
        config = Trainer(
            **{"learning_rate": 1e-2, "max_grad_norm": 1e6, "num_threads": 1, "teacher_token_weight": 0.5, **knobs}
        )
        return Case(student=str(folder / f"tied={tied}"), config=config, sequences=sequences[:num], save_to=save_to)

    logprobs = sequences[3].teacher_top.logprobs.copy()
    logprobs[1, 0] = -np.inf
    broken = replace(sequences[3], teacher_top=TopLogprobs(sequences[3].teacher_top.token_ids, logprobs))
    cut = {
        f"{tied=} {packing=} {number}": case(tied=tied, packing=packing, tokens_per_micro_batch=budget)
        for tied in (False, True)
        for packing in (False, True)
        for number, budget in BUDGETS.items()
    }
    return cut | {
        "one sequence": case(num=1),
        "clipped": case(max_grad_norm=0.01),
        "recomputed": case(activation_checkpointing=True),
        "low": case(dtype="bfloat16"),
        "broken": replace(case(loss=ReverseKL()), sequences=[*sequences[:3], broken, *sequences[4:]]),
        "exported tied=False": case(save_to=folder / "saved tied=False"),
        "exported tied=True": case(tied=True, save_to=folder / "saved tied=True"),
    }


@pytest.fixture(scope="module")
def alone(cases: dict[str, Case]) -> dict[str, Seen]:
    """What one rank, which knows of no group, sees of each case."""
    return {name: run(case, ALONE) for name, case in cases.items()}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return str(request.param)


@pytest.fixture(scope="module")
def saved_by_two(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks save what they save."""
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def together(device: str, cases: dict[str, Case], saved_by_two: Path) -> list[dict[str, Seen]]:
    """What two ranks see of each case."""
    moved = {
        name: case if case.save_to is None else replace(case, save_to=saved_by_two / case.save_to.name)
        for name, case in cases.items()
    }
    return work(moved, saved_by_two / "work", num_ranks=2, device=device)


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, scale: float = 1.0) -> None:
    """To 1e-5 of each tensor's largest number."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name],
            value * scale,
            rtol=0,
            atol=1e-5 * float(value.abs().max()) * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("number", BUDGETS)
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_is_the_same_for_any_ranks_micro_batches_and_packing(
    alone: dict[str, Seen], together: list[dict[str, Seen]], tied: bool, packing: bool, number: str
) -> None:
    expected = alone[f"{tied=} packing=False 1"]
    name = f"{tied=} {packing=} {number}"
    for seen in (alone[name], together[0][name], together[1][name]):
        assert_alike(seen.gradients, expected.gradients)
        for report, reference in zip(seen.reports, expected.reports, strict=True):
            for field in ("loss", "loss_student_tokens", "loss_teacher_tokens", "covered_mass", "grad_norm"):
                assert getattr(report, field) == pytest.approx(getattr(reference, field), rel=2e-4)
            assert report.num_tokens == reference.num_tokens
    if not packing:
        assert alone[name].reports[0].num_micro_batches == int(number)


def test_each_rank_holds_a_part_of_everything_and_all_parts_are_the_whole(together: list[dict[str, Seen]]) -> None:
    of_ranks = [seen["tied=False packing=False 1"].parts for seen in together]
    assert of_ranks[0].keys() == of_ranks[1].keys()
    for name, (_, size) in of_ranks[0].items():
        held = [parts[name][0] for parts in of_ranks]
        assert sum(held) == size
        assert max(held) <= -(-size // 2), name


def test_both_ranks_report_the_same(together: list[dict[str, Seen]]) -> None:
    for name in together[0]:
        left, right = ([replace(report, seconds=0.0) for report in seen[name].reports] for seen in together)
        assert left == right


def test_a_rank_without_sequences_takes_part(alone: dict[str, Seen], together: list[dict[str, Seen]]) -> None:
    assert_alike(together[1]["one sequence"].gradients, alone["one sequence"].gradients)
    assert together[1]["one sequence"].reports[0].num_micro_batches == 1


def test_the_gradient_is_clipped_by_the_norm_over_all_ranks(
    alone: dict[str, Seen], together: list[dict[str, Seen]]
) -> None:
    free = alone["tied=False packing=False 1"]
    norm = free.reports[0].grad_norm
    assert together[0]["clipped"].reports[0].grad_norm == pytest.approx(norm, rel=1e-5)
    assert_alike(together[0]["clipped"].gradients, free.gradients, scale=0.01 / norm)


@pytest.mark.parametrize("name", ["recomputed", "low"])
def test_recomputed_activations_and_half_precision_are_those_of_one_rank(
    alone: dict[str, Seen], together: list[dict[str, Seen]], name: str
) -> None:
    exact = alone["tied=False packing=False 1"].gradients
    if name == "recomputed":
        assert_alike(together[0][name].gradients, exact)
    for key, gradient in alone[name].gradients.items():
        difference = float((together[0][name].gradients[key] - gradient).norm())
        assert difference <= 0.05 * float(gradient.norm())


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(together: list[dict[str, Seen]]) -> None:
    errors = {seen["broken"].error for seen in together}
    assert len(errors) == 1
    assert str(errors.pop()).startswith("FloatingPointError: the loss is not finite at 1 of ")


@pytest.mark.parametrize("tied", [False, True])
def test_a_sync_sends_whole_weights_once_from_rank_0(
    cases: dict[str, Case], together: list[dict[str, Seen]], tied: bool
) -> None:
    first, second = (seen[f"exported {tied=}"] for seen in together)
    assert second.sent == {}
    reference = AutoModelForCausalLM.from_pretrained(cases[f"exported {tied=}"].student).state_dict()
    assert first.sent.keys() == reference.keys()
    for name, tensor in first.sent.items():
        original = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        assert torch.equal(tensor, first.weights[original])
        assert not torch.equal(tensor, reference[name])


@pytest.mark.parametrize("tied", [False, True])
def test_a_probe_of_split_weights_passes_and_names_old_ones(together: list[dict[str, Seen]], tied: bool) -> None:
    first, second = (seen[f"exported {tied=}"].probes for seen in together)
    for difference, followed, followed_output_layer in (first[0].split(), second[0].split()):
        assert float(difference) < 1e-5
        assert (followed, followed_output_layer) == ("1.000", "1.000")
    assert "behaves as if every parameter had kept its old values" in first[1]
    assert "no parameter group can be named" in second[1]


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_save_one_student(saved_by_two: Path, together: list[dict[str, Seen]], tied: bool) -> None:
    seen = together[0][f"exported {tied=}"]
    model = LlamaForCausalLM.from_pretrained(saved_by_two / f"saved {tied=}")
    for name, weight in seen.weights.items():
        assert torch.equal(model.get_parameter(name).detach(), weight), name


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_go_on_from_the_checkpoint_of_two_bit_for_bit(
    saved_by_two: Path, together: list[dict[str, Seen]], tied: bool
) -> None:
    state = saved_by_two / f"saved {tied=} state"
    assert len(list(state.glob("__*_*.distcp"))) == 2  # each rank wrote its part
    assert [seen[f"exported {tied=}"].resumed_otherwise for seen in together] == [[], []]


# ------------------------------------------------------------------------------------------- ranks that do not answer


def test_a_rank_that_never_comes_is_waited_for_and_named() -> None:
    address = free_address()
    with pytest.raises(WaitedTooLong, match=rf"learner rank 0 waited 2 s for all 2 ranks to meet at {address}"):
        join(0, 2, address, torch.device("cpu"), timeout_s=2)


def test_a_rank_that_dies_before_a_step_leaves_the_others_an_error_and_no_hang(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    case = replace(cases["one sequence"], dies=True)
    started_s = time.monotonic()
    (survivor,) = work({"dies": case}, tmp_path / "work", num_ranks=2, device="cpu")
    assert survivor["dies"].error is not None
    assert survivor["dies"].reports == []
    assert time.monotonic() - started_s < 120


async def fails(error: Exception, after_s: float = 0.0) -> int:
    await asyncio.sleep(after_s)
    raise error


async def answers(value: int, after_s: float = 0.0) -> int:
    await asyncio.sleep(after_s)
    return value


async def test_the_answer_of_all_ranks_is_rank_0_s() -> None:
    assert await every_rank([answers(3, 0.05), answers(4)], "a step", timeout_s=5) == 3


async def test_a_dead_rank_is_named_even_where_another_noticed_first() -> None:
    calls = [fails(RuntimeError("connection closed by peer")), fails(RayActorError(), 0.2)]
    with pytest.raises(LearnerRankDied, match=r"^learner rank 1 of 2 died during a step"):
        await every_rank(calls, "a step", timeout_s=5)


async def test_one_ranks_error_does_not_wait_for_those_that_wait_for_it() -> None:
    started_s = time.monotonic()
    with pytest.raises(MemoryError, match="no room"):
        await every_rank([answers(0, 60), fails(MemoryError("no room"))], "a step", timeout_s=30)
    assert time.monotonic() - started_s < 10


async def test_a_silent_rank_is_named() -> None:
    with pytest.raises(WaitedTooLong, match=r"waited 0\.1 s for a step; of 2 learner ranks no answer from 1$"):
        await every_rank([answers(0), answers(0, 60)], "a step", timeout_s=0.1)
