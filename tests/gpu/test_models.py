import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.sequence import TokenSource
from tests.gpu.machine import peak_tflops
from tests.gpu.models import TINY, random_model, random_sequences


def test_the_formula_counts_the_floating_point_operations_that_torch_counts() -> None:
    """Forward is a third of a step. torch counts attention to later tokens too, which nobody computes."""
    model = random_model(TINY, torch.device("cpu"), seed=0)
    model.set_attn_implementation("eager")
    length = 48
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(length)[None])
    to_later_tokens = 2 * TINY.layers * TINY.hidden * length * (length - 1)
    ours = TINY.step_flops([length], num_new_tokens=length) / 3 + to_later_tokens
    assert counter.get_total_flops() == pytest.approx(ours, rel=2e-3)  # the rest is rotary embeddings' angles


def test_sequences_hold_as_many_tokens_of_each_source_as_were_asked_for() -> None:
    sequences = random_sequences([(3, 10), (4, 7), (1, 5)], 400, k=8, num_student=[10, 3, 0])
    assert [sequence.num_student_tokens for sequence in sequences] == [10, 3, 0]
    assert [sequence.first_switch for sequence in sequences] == [None, 3, 0]
    assert sequences[1].sources.tolist() == [TokenSource.STUDENT] * 3 + [TokenSource.TEACHER] * 4
    for sequence in sequences:
        assert all(np.unique(ids).size == 8 for ids in sequence.teacher_top.token_ids)
        assert sequence.teacher_top.covered_mass() == pytest.approx(0.9, abs=1e-5)


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_a_card_s_peak_is_its_own_or_unknown(card: str, peak: float | None) -> None:
    assert peak_tflops(card) == peak
