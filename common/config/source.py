"""A YAML file and ``--set`` arguments -> RunConfig, with the origin of every value; and back to YAML.

Owns how settings are written down. What they mean is ``common/config/``, how a refusal reads
``common/config/errors.py``.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import ValidationError

from common.config import Part, RunConfig
from common.config.errors import one_line_each
from common.config.schema import choose_part, is_choice, type_name
from common.config.yaml_text import dump_scalar, load_argument, load_yaml
from common.errors import UserError

Origin = Literal["default", "file", "--set"]
_WIDEST_ALIGNED_LINE = 72


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """A whole configuration, and for each leaf's dotted key where its value came from."""

    config: RunConfig
    origins: Mapping[str, Origin]


Tree = dict[str, object]


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Read a YAML file, apply the overrides (``a.b=value``, as given to ``--set``), check the whole.

    Values must have the type they need: ``"5"`` and ``true`` are not whole numbers. A part with a choice of types that
    names none is of its default's type.

    Overrides of outer keys are applied before those of inner ones and a ``type`` before its neighbours, whatever the
    order of the arguments; of two for the same key the last wins. Changing the ``type`` of a part replaces the part:
    what the file says about the old type is dropped, for it means nothing for the new one. Naming the type the part
    already has keeps the rest. A mapping as a value (``policy={type: skd}``) replaces the part too.

    Raises UserError with one line per problem, the most telling first.
    """
    file = _read_file(Path(path))
    given = _completed(file, RunConfig)
    set_keys = []
    for keys, value in sorted(map(_parse_override, overrides), key=_outer_first_then_type):
        given = _with_value(given, keys, value)
        set_keys.append(".".join(keys))
    values = _completed(given, RunConfig)

    def origin_of(key: str) -> Origin:
        """Where a key, or anything it holds, came from: what was not given is a default."""
        key = key.partition("[")[0]
        if not _holds(given, key):
            return "default"
        if any(f"{key}.".startswith(f"{set_key}.") or set_key.startswith(f"{key}.") for set_key in set_keys):
            return "--set"
        return "file" if _holds(file, key) else "default"

    try:
        # By way of JSON, whose strict mode takes lists for tuples and nothing else for anything else.
        config = RunConfig.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(one_line_each(error, values, origin_of)) from error
    return ResolvedConfig(
        config=config, origins=MappingProxyType({key: origin_of(key) for key, _ in config_leaves(config)})
    )


def dump_config(resolved: ResolvedConfig) -> str:
    """The whole tree as YAML that ``read_config`` reads back equal, with each leaf's origin in a comment beside it."""
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
            raise UserError(f"{path}: {key} must be nested in a file: {inner} goes into {outer}")
    return content


def _parse_override(argument: str) -> tuple[list[str], object]:
    """(["a", "b"], value) of ``a.b=value``."""
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


def _with_value(tree: Tree, keys: list[str], value: object) -> Tree:
    """A copy of the tree with one value changed. Another type empties the part it belongs to."""
    name, *rest = keys
    if rest:
        child = tree.get(name)
        if not isinstance(child, dict) or (rest == ["type"] and child.get("type") != value):
            child = {}
        value = _with_value(child, rest, value)
    return {**tree, name: value}


def _completed(tree: Tree, part: type[Part]) -> Tree:
    """A copy in which a part that names no type has its default's, and a required part that is missing is empty.

    The first makes ``--set policy.window=5`` work alone; the second makes pydantic name the keys that are missing.
    """
    completed = dict(tree)
    for name, field in part.model_fields.items():
        child = tree.get(name, {} if field.is_required() else None)
        if isinstance(child, dict) and (chosen := choose_part(field, child.get("type"))):
            named = {"type": type_name(chosen), **child} if is_choice(field) else child
            completed[name] = _completed(named, chosen)
    return completed


def _holds(tree: object, key: str) -> bool:
    name, _, rest = key.partition(".")
    return isinstance(tree, dict) and (key in tree or (name in tree and _holds(tree[name], rest)))


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
