"""pydantic's validation errors, one line each: the key, the value, what is expected, and where the value came from."""

import difflib
from collections.abc import Callable, Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from common.config import RunConfig
from common.config.schema import dotted_key, is_choice, parts_of, type_name, valid_keys
from common.config.yaml_text import dump_scalar

_EXPECTED = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "model_type": "must be a mapping of settings",
    "dict_type": "must be a mapping of settings",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be >= {ge:g}",
    "greater_than": "must be > {gt:g}",
    "less_than_equal": "must be <= {le:g}",
    "less_than": "must be < {lt:g}",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
}
OriginOf = Callable[[str], str]
_LONGEST_SHOWN = 80
_REPLACED = {"placement.learner": "placement.layout (spread for own_gpu, shared_student for student_gpu)"}
"""Keys of earlier versions, and the setting that replaces each."""


def one_line_each(error: ValidationError, values: Mapping[str, object], origin_of: OriginOf) -> str:
    """One line per problem. Unknown keys come first: a misspelled key is often the reason that another one is missing.

    ``values`` is the refused tree. ``origin_of`` gives the origin of one of its keys.
    """
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    return "\n".join(_line(problem, values, origin_of) for problem in problems)


def _line(problem: ErrorDetails, values: Mapping[str, object], origin_of: OriginOf) -> str:
    kind, location, context = problem["type"], problem["loc"], problem.get("ctx", {})
    key, _ = dotted_key(RunConfig, location)
    match kind:
        case "extra_forbidden":
            return _unknown_key(location, values, origin_of)
        case "union_tag_invalid" | "union_tag_not_found":
            return _unknown_type(location, problem["input"], origin_of)
        case "value_error":
            # A part's validator names keys relative to the part; RunConfig's validators name them in full.
            message = f"{key}.{context['error']}" if key else str(context["error"])
            return f"{message} ({origin_of(message.split()[0])})"
        case "missing" if not key.endswith("]"):
            return f"{key} is required, got nothing"
        case "missing":
            key, expected = key[: key.rindex("[")], "must have more entries"
        case _:
            expected = _EXPECTED.get(kind, "is invalid: {problem}").format(problem=problem["msg"], **context)
    got = _shown(problem["input"])
    return f"{key} {expected}, got {got} ({origin_of(key)}){_hint(kind, location, problem['input'])}".lstrip()


def _unknown_key(location: tuple[int | str, ...], values: Mapping[str, object], origin_of: OriginOf) -> str:
    key, _ = dotted_key(RunConfig, location)
    parent, part = dotted_key(RunConfig, location[:-1])
    assert part is not None, f"only a part refuses unknown keys, got {key}"
    name, prefix = str(location[-1]), f"{parent}." if parent else ""
    refusal = f"{key} is not a setting ({origin_of(key)})"
    if replacement := _REPLACED.get(key):
        return f"{refusal}; use {replacement} instead"
    if similar := difflib.get_close_matches(name, part.model_fields, n=1):
        return f"{refusal}; did you mean {prefix}{similar[0]}?"
    if others := _types_that_have(name, location):
        return f"{refusal}; it belongs to {parent}.type {' or '.join(others)}, not to {type_name(part)}"
    if elsewhere := [valid for valid in valid_keys(RunConfig, values) if valid.split(".")[-1] == name]:
        return f"{refusal}; did you mean {elsewhere[0]}?"
    return f"{refusal}; {parent or 'a run'} has {', '.join(part.model_fields)}"


def _types_that_have(name: str, location: tuple[int | str, ...]) -> list[str]:
    """The other types of the same choice that have this key. Such a location ends in (choice, chosen type, key)."""
    _, outer = dotted_key(RunConfig, location[:-3])
    field = outer.model_fields.get(str(location[-3])) if outer is not None and len(location) >= 3 else None
    if field is None or not is_choice(field):
        return []
    return [type_name(part) for part in parts_of(field) if name in part.model_fields]


def _unknown_type(location: tuple[int | str, ...], given: object, origin_of: OriginOf) -> str:
    key = f"{dotted_key(RunConfig, location)[0]}.type"
    types = _types_at(location)
    assert isinstance(given, Mapping), given
    if "type" not in given:
        return f"{key} is required: one of {', '.join(types)}"
    similar = difflib.get_close_matches(str(given["type"]), types, n=1)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    return f"{key} must be one of {', '.join(types)}, got {_shown(given['type'])} ({origin_of(key)}){hint}"


def _types_at(location: tuple[int | str, ...]) -> list[str]:
    """The types of the choice at this location; empty if it is not a choice."""
    if not location:
        return []
    _, outer = dotted_key(RunConfig, location[:-1])
    field = outer.model_fields.get(str(location[-1])) if outer is not None else None
    return [type_name(part) for part in parts_of(field)] if field is not None and is_choice(field) else []


def _hint(kind: str, location: tuple[int | str, ...], given: object) -> str:
    if kind == "string_type" and isinstance(given, (bool, int, float)):
        return "; write it in quotes"
    if isinstance(given, str) and given in _types_at(location):
        return f"; did you mean {dotted_key(RunConfig, location)[0]}.type?"
    return ""


def _shown(value: object) -> str:
    """The value as YAML, except that text is always quoted."""
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, str) else dump_scalar(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
