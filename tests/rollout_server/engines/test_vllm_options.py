"""Which of vLLM's arguments a configuration may set: held against vLLM's own."""

import re
from dataclasses import fields

import pytest
from pydantic import JsonValue
from vllm.config import CompilationConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from common.config.vllm_options import _REASONS, _SETTINGS
from common.errors import UserError
from rollout_server.engines.vllm_options import checked_options

KEY = "engines.teacher.vllm"


def test_every_argument_that_is_ours_is_one_of_vllms() -> None:
    assert {*_SETTINGS, *_REASONS} <= {field.name for field in fields(AsyncEngineArgs)}


def test_values_arrive_as_vllm_takes_them() -> None:
    options: dict[str, JsonValue] = {
        "seed": 3,
        "block_size": 32,
        "cpu_offload_gb": 2,
        "cpu_offload_params": ["layers.0"],
        "async_scheduling": False,
        "hf_overrides": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "compilation_config": {"mode": 0},
        "lora_dtype": "auto",  # torch's dtype is among its types
    }
    checked = checked_options(options, key=KEY)
    assert isinstance(checked["compilation_config"], CompilationConfig)
    assert checked["cpu_offload_params"] == {"layers.0"}
    assert {name: checked[name] for name in checked if name not in ("compilation_config", "cpu_offload_params")} == {
        name: options[name] for name in options if name not in ("compilation_config", "cpu_offload_params")
    }
    assert AsyncEngineArgs(model="m", **checked).seed == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_sise": 32}, "block_sise is not an argument of vLLM's engine; did you mean block_size?"),
        ({"zzz": 1}, "zzz is not an argument of vLLM's engine"),
        ({"block_size": "32"}, "block_size must be a whole number or null, got '32'"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"async_scheduling": "no"}, "async_scheduling must be true or false or null, got 'no'"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy must be one of fcfs, priority, got 'lifo'"),
        ({"cpu_offload_gb": [1]}, "cpu_offload_gb must be a number, got [1]"),
        (
            {"compilation_config": {"mod": 0}},
            "compilation_config.mod: vLLM reports: Unexpected keyword argument, got 0",
        ),
        ({"compilation_config": 3}, "compilation_config must be a mapping of its settings, got 3"),
    ],
)
def test_what_vllm_would_refuse_is_refused_in_one_line(options: dict[str, JsonValue], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(f'{KEY}.{message}')}$"):
        checked_options(options, key=KEY)


def test_what_vllm_keeps_to_itself_is_no_argument() -> None:
    with pytest.raises(UserError, match=r"_api_process_count is not an argument of vLLM's engine"):
        checked_options({"_api_process_count": 1}, key=KEY)
