"""Weights that an engine in half precision rounds: what it can't see of a step, it is not blamed for."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.probe_reading import rounded_to


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def test_weights_are_rounded_inside_and_the_same_to_the_last_bit_afterwards() -> None:
    model = small_model()
    exact = {name: value.clone() for name, value in model.state_dict().items()}
    with rounded_to(model, torch.bfloat16):
        inside = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.equal(inside[name], exact[name].bfloat16().float()) for name in exact)
    assert any(not torch.equal(inside[name], exact[name]) for name in exact)
    assert all(torch.equal(value, exact[name]) for name, value in model.state_dict().items())


def test_a_step_below_the_grid_changes_nothing_that_an_engine_sees() -> None:
    model = small_model().bfloat16().float()
    with torch.no_grad():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-4)
        with rounded_to(model, torch.bfloat16):
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
