"""The configuration reference: every key of RunConfig with type, default, range and text, whatever types are chosen."""

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from common.config import Part, RunConfig
from common.config.schema import is_choice, parts_of, type_name
from common.config.yaml_text import dump_scalar
from docs.generators.markdown import anchored, code, paragraphs, prose, table

_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "nothing",
    "object": "mapping",
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def config_keys() -> list[str]:
    """Dotted keys of all leaves under all types, ``type`` itself included."""
    return list(dict.fromkeys(_keys(RunConfig, "")))


def config_reference() -> str:
    """Markdown: a section for each part, and one for each type where there is a choice."""
    return "\n".join(_sections(RunConfig, "", _default_text(RunConfig)))


def _keys(part: type[Part], prefix: str) -> Iterator[str]:
    for name, field in part.model_fields.items():
        inner = parts_of(field)
        for member in inner:
            yield from _keys(member, f"{prefix}{name}.")
        if not inner:
            yield prefix + name


def _sections(part: type[Part], prefix: str, note: str) -> Iterator[str]:
    """A part's own leaves, then its parts, each under its dotted key."""
    level = "##" if prefix.count(".") <= 1 else "###"
    yield f"{level} {code(prefix[:-1]) if prefix else 'The run'}\n"
    yield paragraphs(part.__doc__ or "") + "\n"
    if note:
        yield note + "\n"
    yield from _leaves(part, prefix)
    for name, field in part.model_fields.items():
        if is_choice(field):
            yield from _choice(field, f"{prefix}{name}.", level if not prefix else "###")
        elif inner := parts_of(field):
            yield from _sections(inner[0], f"{prefix}{name}.", _optional(field))


def _choice(field: FieldInfo, prefix: str, level: str) -> Iterator[str]:
    key, members = prefix[:-1], parts_of(field)
    yield f"({_anchor(key)})=\n{level} {code(key)}\n"
    if field.description:
        yield prose(field.description) + "\n"
    yield f"{anchored(f'{key}.type', _anchor(f'{key}.type'))} is {_types(field)}.\n"
    for member in members:
        yield f"{level}# {code(key)}: {code(type_name(member))}\n"
        yield paragraphs(member.__doc__ or "") + "\n"
        yield from _leaves(member, prefix, apart_from="type", anchor=False)
        for name, inner in member.model_fields.items():
            if is_choice(inner):
                yield from _inner_choice(inner, f"{prefix}{name}")


def _inner_choice(field: FieldInfo, key: str) -> Iterator[str]:
    """A choice inside a type, in one paragraph: its types are described where they stand alone."""
    settings = [f"{key}.{name}" for member in parts_of(field) for name in member.model_fields if name != "type"]
    yield (
        f"{prose(field.description or '')} {code(f'{key}.type')} is {_types(field)}, with the settings "
        f"{', '.join(map(code, settings))} of the same types of [`trainer.loss`](#{_anchor('trainer.loss')}).\n"
    )


def _types(field: FieldInfo) -> str:
    default = f" (default {code(type_name(type(field.default)))})" if isinstance(field.default, Part) else ""
    return " or ".join(code(type_name(member)) for member in parts_of(field)) + default


def _leaves(part: type[Part], prefix: str, apart_from: str = "", *, anchor: bool = True) -> Iterator[str]:
    schema = part.model_json_schema()
    rows = [
        (
            anchored(prefix + name, _anchor(prefix + name)) if anchor else code(prefix + name),
            _type(schema["properties"][name], schema.get("$defs", {})),
            "required" if field.is_required() else code(_default(field.default)),
            prose(field.description or ""),
        )
        for name, field in part.model_fields.items()
        if not parts_of(field) and name != apart_from
    ]
    if rows:
        yield table(("key", "type", "default", ""), rows)


def _type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_type(member, definitions) for member in schema["anyOf"])
    if "const" in schema:
        return code(_default(schema["const"]))
    if "enum" in schema:
        return " or ".join(code(_default(value)) for value in schema["enum"])
    if schema["type"] == "array":
        items = schema.get("prefixItems")
        inner = _type(items[0] if items else schema["items"], definitions)
        return f"list of {len(items)}: {inner}" if items else f"list of: {inner}"
    bounds = [f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema]
    return prose(" ".join([_TYPES[schema["type"]], ", ".join(bounds)]))


def _anchor(key: str) -> str:
    return "config-" + key.replace(".", "-")


def _default(value: object) -> str:
    return "null" if value is None else dump_scalar(list(value) if isinstance(value, tuple) else value)


def _optional(field: FieldInfo) -> str:
    return "Left out by default: `null`." if not field.is_required() and field.default is None else ""


def _default_text(part: type[Part]) -> str:
    required = [name for name, field in part.model_fields.items() if field.is_required()]
    return f"Required: {', '.join(code(name) for name in required)}. Everything else has a default."
