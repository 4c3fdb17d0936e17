"""What half precision does to a real model's states, and the checks that must tell it from a fault."""

import pytest
import torch
from transformers import PreTrainedModel

from common.errors import UserError
from tests.support.smollm2 import smollm2_pair
from trainer.pretrained import load_pretrained, refuse_changed_logits, refuse_leaking_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the first time makes the models, too


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """All 30 layers: rounding grows with depth."""
    return load_pretrained(str(smollm2_pair().teacher)).eval()


def test_its_rows_may_be_packed_in_half_precision(model: PreTrainedModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        refuse_leaking_rows(model)


def test_a_neighbor_that_is_seen_is_told_from_rounding(model: PreTrainedModel) -> None:
    def without_position_ids(_: object, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return args, {**kwargs, "position_ids": None}

    hook = model.base_model.register_forward_pre_hook(without_position_ids, with_kwargs=True)
    with (
        pytest.raises(UserError, match="lets packed sequences attend to each other"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        refuse_leaking_rows(model)
    hook.remove()


def test_its_logits_are_its_output_layer_s(model: PreTrainedModel) -> None:
    refuse_changed_logits(model)
