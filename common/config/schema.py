"""Looks up keys in RunConfig's classes: which parts a field may hold, and which of them is chosen.

A *choice* is a field that may hold one of several parts, which differ in ``type``.
"""

from collections.abc import Iterator, Mapping
from typing import get_args

from pydantic.fields import FieldInfo

from common.config import Part


def parts_of(field: FieldInfo) -> list[type[Part]]:
    """The parts that a field may hold; empty for a leaf."""
    return list(_parts_in(field.annotation))


def is_choice(field: FieldInfo) -> bool:
    return len(parts_of(field)) > 1


def type_name(part: type[Part]) -> str:
    """The value of ``type`` for this member of a choice."""
    return str(part.model_fields["type"].default)


def choose_part(field: FieldInfo, given_type: object) -> type[Part] | None:
    """The part that is chosen: the only one, the one of the given type, or without a type the default's.

    None for a leaf, for an unknown type, and if there is no default.
    """
    parts = parts_of(field)
    if len(parts) <= 1:
        return parts[0] if parts else None
    if given_type is None:
        return type(field.default) if isinstance(field.default, Part) else None
    return next((part for part in parts if type_name(part) == given_type), None)


def dotted_key(root: type[Part], location: tuple[int | str, ...]) -> tuple[str, type[Part] | None]:
    """A pydantic location as a dotted key, and the part at that key, if there is one.

    pydantic puts the chosen ``type`` into the location, after the name of the choice; the key leaves it out. List
    indices are written as ``betas[1]``.
    """
    key = ""
    part: type[Part] | None = root
    choice: FieldInfo | None = None
    for step in location:
        if choice is not None:
            part, choice = choose_part(choice, step), None
        elif isinstance(step, int):
            key += f"[{step}]"
        else:
            key = f"{key}.{step}" if key else step
            field = part.model_fields.get(step) if part else None
            choice = field if field is not None and is_choice(field) else None
            part = choose_part(field, None) if field is not None and choice is None else None
    return key, part


def valid_keys(part: type[Part], values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all leaves that exist with the types chosen in ``values``."""
    for name, field in part.model_fields.items():
        given = values.get(name)
        inner = given if isinstance(given, Mapping) else {}
        chosen = choose_part(field, inner.get("type"))
        if chosen is not None:
            yield from valid_keys(chosen, inner, f"{prefix}{name}.")
        elif not parts_of(field):
            yield prefix + name


def _parts_in(annotation: object) -> Iterator[type[Part]]:
    if isinstance(annotation, type):
        if issubclass(annotation, Part):
            yield annotation
    else:
        for inner in get_args(annotation):
            yield from _parts_in(inner)
