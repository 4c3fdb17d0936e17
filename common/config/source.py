"""YAML file and ``--set`` arguments -> RunConfig, with the origin of every value; and back to YAML.

Owns the text format. ``common/config/`` defines the settings and ``common/config/errors.py`` the error messages. While
the tree is read, its leaves are ``Given``: a value and its origin.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

from pydantic import ValidationError

from common.config import Part, RunConfig
from common.config.errors import one_line_each
from common.config.schema import choose_part, is_choice, parts_of, type_name
from common.config.yaml_text import dump_scalar, load_argument, load_yaml
from common.errors import UserError

Origin = Literal["default", "file", "--set"]
_WIDEST_ALIGNED_LINE = 72


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """A complete configuration, and the origin of each leaf's value by dotted key."""

    config: RunConfig
    origins: Mapping[str, Origin]


class Given(NamedTuple):
    """A leaf of the tree as the user wrote it, and its origin."""

    value: object
    origin: Origin


Tree = dict[str, "Given | Tree"]


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Read a YAML file, apply the overrides (``a.b=value``, as given to ``--set``), and check the result.

    Values must have the right type: ``"5"`` and ``true`` are not whole numbers. If a part with a choice of types does
    not name one, it has the default's type.

    Overrides of outer keys are applied before those of inner ones, and a ``type`` before the other keys of its part,
    whatever the order of the arguments. If a key is given twice, the last value wins. Changing the ``type`` of a part
    replaces the part: the file's settings for the old type are dropped, because they have no meaning for the new one.
    Setting the type that the part already has keeps the other settings. A mapping as a value (``policy={type: skd}``)
    replaces the part too.

    Raises UserError with one line per problem, the most informative first.
    """
    tree = _completed(_read_file(Path(path)), RunConfig)
    for keys, value in sorted(map(_parse_override, overrides), key=_outer_first_then_type):
        tree = _with_value(tree, keys, _given(value, "--set"))
    tree = _completed(tree, RunConfig)
    values = _values(tree)
    origins = {key: given.origin for key, given in _leaves(tree)}
    try:
        # As JSON: its strict mode accepts lists for tuples and converts nothing else.
        config = RunConfig.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(one_line_each(error, values, origins)) from error
    return ResolvedConfig(
        config=config,
        origins=MappingProxyType({key: _origin_of(key, origins) for key, _ in config_leaves(config)}),
    )


def dump_config(resolved: ResolvedConfig) -> str:
    """The whole tree as YAML that ``read_config`` reads back unchanged, with each leaf's origin in a comment."""
    lines = list(_dump_lines(resolved.config, ""))
    width = min(max(len(line) for line, key in lines if key), _WIDEST_ALIGNED_LINE)
    return "".join(f"{line:<{width}}  # {resolved.origins[key]}\n" if key else f"{line}\n" for line, key in lines)


def _read_file(path: Path) -> Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"can't read the configuration {path}: not UTF-8 text") from error
    try:
        content = load_yaml(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of settings, got a {type(content).__name__}")
    for key in content:
        if "." in key:
            outer, _, inner = key.partition(".")
            raise UserError(f"{path}: {key} must be nested in a file: put {inner} under {outer}")
    return _given_mapping(content, "file")


def _parse_override(argument: str) -> tuple[list[str], object]:
    """``a.b=value`` as (["a", "b"], value)."""
    key, equals, text = argument.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(name.isidentifier() for name in keys):
        raise UserError(f"--set must be KEY=VALUE, such as trainer.num_steps=5, got {argument!r}")
    try:
        return keys, load_argument(text)
    except UserError as error:
        raise UserError(f"--set {argument}: {error}") from error


def _outer_first_then_type(override: tuple[list[str], object]) -> tuple[int, bool]:
    keys, _ = override
    return len(keys), keys[-1] != "type"


def _given(value: object, origin: Origin) -> "Given | Tree":
    """A value from the user as a tree. An empty mapping stays a leaf, because some leaves are mappings."""
    return _given_mapping(value, origin) if isinstance(value, dict) and value else Given(value, origin)


def _given_mapping(mapping: dict[str, object], origin: Origin) -> Tree:
    return {name: _given(value, origin) for name, value in mapping.items()}


def _with_value(tree: Tree, keys: list[str], value: "Given | Tree") -> Tree:
    """A copy of the tree with one value changed. If a ``type`` changes, the other keys of its part are dropped."""
    name, *rest = keys
    if not rest:
        return {**tree, name: value}
    child = tree.get(name)
    part = child if isinstance(child, dict) else {}
    if rest == ["type"] and _value(part.get("type")) != _value(value):
        part = {}
    return {**tree, name: _with_value(part, rest, value)}


def _completed(tree: Tree, part: type[Part]) -> Tree:
    """A copy in which a part without ``type`` has its default's type, and a missing required part is an empty mapping.

    The first makes ``--set policy.window=5`` work alone; the second makes pydantic name the missing keys.
    """
    completed = dict(tree)
    for name, field in part.model_fields.items():
        missing_part = field.is_required() and bool(parts_of(field))
        child = tree.get(name, {} if missing_part else None)
        if _value(child) == {} and parts_of(field):
            child = {}
        if not isinstance(child, dict):
            continue
        chosen = choose_part(field, _value(child.get("type")))
        if chosen is not None:
            named = {"type": Given(type_name(chosen), "default"), **child} if is_choice(field) else child
            completed[name] = _completed(named, chosen)
    return completed


def _value(entry: "Given | Tree | None") -> object:
    return entry.value if isinstance(entry, Given) else entry


def _values(tree: Tree) -> dict[str, object]:
    return {name: _values(entry) if isinstance(entry, dict) else entry.value for name, entry in tree.items()}


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Given]]:
    for name, entry in tree.items():
        if isinstance(entry, dict):
            yield from _leaves(entry, f"{prefix}{name}.")
        else:
            yield prefix + name, entry


def _origin_of(key: str, origins: Mapping[str, Origin]) -> Origin:
    """The origin of a leaf. If the leaf is a mapping with several origins, ``--set`` comes before ``file``."""
    given = {origin for name, origin in origins.items() if name == key or name.startswith(f"{key}.")}
    return "--set" if "--set" in given else "file" if "file" in given else "default"


def config_leaves(part: Part, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every setting, in the order of the tree."""
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, Part):
            yield from config_leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _dump_lines(part: Part, prefix: str) -> Iterator[tuple[str, str | None]]:
    """(line, the leaf's dotted key or None) for each line of YAML."""
    indent = "  " * prefix.count(".")
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, Part):
            yield f"{indent}{name}:", None
            yield from _dump_lines(value, f"{prefix}{name}.")
        else:
            yield f"{indent}{name}: {dump_scalar(list(value) if isinstance(value, tuple) else value)}", prefix + name
