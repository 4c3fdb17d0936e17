"""Checks ``engines.*.vllm`` against vLLM's own arguments: do they exist, and is the type right?

``common/config/vllm_options.py`` defines which of them a configuration may set. This module imports vLLM, which takes
seconds, so import it only if there are such arguments.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import JsonValue, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from vllm.engine.arg_utils import AsyncEngineArgs

from common.errors import UserError

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
    set: "a list",
    NoneType: "null",
}


def checked_options(options: Mapping[str, JsonValue], *, key: str) -> dict[str, Any]:
    """The arguments with the values that vLLM expects: sets for lists, configuration objects for mappings.

    ``key`` is their path in our configuration. Raises UserError for the first invalid one.
    """
    types = {field.name: field.type for field in fields(AsyncEngineArgs) if not field.name.startswith("_")}
    return {name: _checked(value, types, f"{key}.{name}") for name, value in options.items()}


def _checked(value: JsonValue, types: Mapping[str, Any], key: str) -> Any:
    name = key.rpartition(".")[2]
    if name not in types:
        similar = difflib.get_close_matches(name, types, n=1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise UserError(f"{key} is not an argument of vLLM's engine{hint}")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(types[name])
    except PydanticSchemaGenerationError:  # for example a torch type: not checked
        return value
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise UserError(_refusal(error, types[name], value, key)) from error


def _refusal(error: ValidationError, expected: Any, value: JsonValue, key: str) -> str:
    problem = error.errors(include_url=False)[0]
    # For a mapping that becomes a vLLM configuration, the failing key inside it is more useful than the whole.
    inner = [str(step) for step in problem["loc"] if str(step) in _keys_of(value)]
    if inner:
        return f"{'.'.join([key, *inner])}: vLLM reports: {problem['msg']}, got {problem['input']!r}"
    return f"{key} must be {_words(expected)}, got {value!r}"


def _keys_of(value: JsonValue) -> set[str]:
    if not isinstance(value, dict):
        return set()
    return set(value).union(*map(_keys_of, value.values()))


def _words(expected: Any) -> str:
    """A type in the words of the configuration's user."""
    if get_origin(expected) is Literal:
        return f"one of {', '.join(map(str, get_args(expected)))}"
    origin = get_origin(expected) or expected
    if origin in _WORDS:
        return _WORDS[origin]
    inner = [_words(each) for each in get_args(expected)]
    return " or ".join(dict.fromkeys(inner)) if inner else "a mapping of its settings"
