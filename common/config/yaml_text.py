"""Strict YAML with the scalars of YAML 1.2. Does not depend on the settings.

PyYAML reads YAML 1.1, where ``1e-3`` is text, ``no`` is false, ``010`` is 8 and ``1:30`` is 90, and it silently keeps
the last of two equal keys. Here ``1e-3`` is a number, ``no`` is text, ``010`` is 10, and a duplicate key is an error.
Dates, sets, binary and every other tag are left out on purpose: no setting has such a type.
"""

import re
from collections.abc import Iterator

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from common.errors import UserError, one_line

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_MERGE = re.compile(r"^<<$")
# Tried in this order for every plain scalar: a whole number also matches the pattern of a float.
_RESOLVERS = {None: [(_TAG + "null", _NULL), (_TAG + "bool", _BOOL), (_TAG + "int", _INT), (_TAG + "float", _FLOAT)]}
_KNOWN_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "str", "map", "seq")}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {**_RESOLVERS, "<": [(_TAG + "merge", _MERGE)]}  # noqa: RUF012 - PyYAML's own name


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _construct_int(loader: _Loader, node: ScalarNode) -> int:
    return int(node.value, 0) if node.value[:2] in ("0o", "0x") else int(node.value)


def _represent_text(dumper: _Dumper, text: str) -> ScalarNode:
    """Line breaks and invisible characters are escaped, so that a scalar always stays on one line."""
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_Loader.add_constructor(_TAG + "int", _construct_int)
_Dumper.add_representer(str, _represent_text)


def load_yaml(text: str) -> object:
    """The value of one YAML document, None for an empty one. Raises UserError (one line) for anything else."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if problem := next(_problems(root, "", ()), None):
            raise UserError(problem)
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"not YAML: {_where(error.problem_mark)}{problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"not YAML: {one_line(error)}") from error


def load_argument(text: str) -> object:
    """A value as typed after ``--set key=``: a YAML list, mapping or quoted text, else one plain scalar.

    So ``#### (.+)`` and ``a: b`` are text here. In a file they would be a comment and a mapping.
    """
    if text.startswith(("[", "{", '"', "'")):
        return load_yaml(text)
    loader = _Loader("")
    tag = loader.resolve(ScalarNode, text.strip(), (True, False))  # type: ignore[no-untyped-call]
    return loader.construct_document(ScalarNode(tag, text.strip()))


def dump_scalar(value: object) -> str:
    """A scalar, or a list of scalars, as one line of YAML that ``load_yaml`` reads back unchanged."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def _problems(node: Node, key: str, ancestors: tuple[Node, ...]) -> Iterator[str]:
    """Problems that PyYAML silently accepts: duplicate keys, non-text keys, unknown tags, a node that contains itself.

    Also turns keys into text, so that ``1: x`` is then refused as the unknown setting ``1``.
    """
    here = key or "the document"
    if node in ancestors:
        yield f"{_where(node.start_mark)}{here} contains itself"
        return
    if node.tag not in _KNOWN_TAGS:
        yield f"{_where(node.start_mark)}{here} has the tag {node.tag!r}, which settings don't use"
    if isinstance(node, ScalarNode) and any("\ud800" <= character <= "\udfff" for character in node.value):
        yield f"{_where(node.start_mark)}{here} contains half a character (a lone surrogate)"
    elif isinstance(node, SequenceNode):
        for child in node.value:
            yield from _problems(child, key, (*ancestors, node))
    elif isinstance(node, MappingNode):
        first_lines: dict[str, int] = {}
        for name, child in node.value:
            if not isinstance(name, ScalarNode):
                yield f"{_where(name.start_mark)}a key must be text, got a list or a mapping in {here}"
                continue
            child_key = f"{key}.{name.value}" if key else name.value
            line = name.start_mark.line + 1
            if name.value in first_lines:
                yield f"{child_key} is given twice, in line {first_lines[name.value]} and in line {line}"
            first_lines[name.value] = line
            if name.tag != _TAG + "merge":
                name.tag = _TAG + "str"
            yield from _problems(child, child_key, (*ancestors, node))


def _where(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
