"""The REST reference: every path of the inspector, from its OpenAPI document and its routes."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.generators.markdown import code, paragraphs, prose, table
from rollout_server.inspector.app import create_app


def rest_paths() -> list[str]:
    """Every path the service answers, those outside its OpenAPI document included; the page's files are not paths."""
    _, routes = _service()
    return routes


def rest_reference() -> str:
    """Markdown: a section for each path, then the fields of everything that is sent or answered."""
    document, routes = _service()
    undocumented = [path for path in routes if path not in document["paths"]]
    lines = ["## Paths\n"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            lines += _operation(method.upper(), path, operation)
    lines.append("## For whoever runs it\n")
    lines += [f"- {code('GET ' + path)}" for path in undocumented]
    lines.append("\n## Fields\n")
    for name, schema in document["components"]["schemas"].items():
        lines += _schema(name, schema)
    return "\n".join(lines)


def _service() -> tuple[dict[str, Any], list[str]]:
    """(OpenAPI document, paths of all routes) of a service over no runs."""
    with tempfile.TemporaryDirectory() as folder:
        app = create_app(Path(folder), hosts=["localhost"])
        document, paths = app.openapi(), [_plain(getattr(route, "path", "")) for route in app.routes]
        app.state.store.close()
    return document, list(dict.fromkeys([*document["paths"], *(path for path in paths if path)]))


def _plain(path: str) -> str:
    """``{name:path}``, a route's way to let a name hold slashes, as clients write it."""
    return path.replace(":path}", "}")


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### {code(f'{method} {path}')}\n"
    yield paragraphs(operation.get("description") or operation["summary"]) + "\n"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body:
        yield f"Body: {_type(body)}.\n"
    rows = [
        (code(parameter["name"]), parameter["in"], _type(parameter["schema"]), prose(_text(parameter)))
        for parameter in operation.get("parameters", [])
    ]
    if rows:
        yield table(("parameter", "in", "type", ""), rows)
    answers = [
        f"{status} {' or '.join(_type(content.get('schema', {})) or code(kind) for kind, content in kinds.items())}"
        for status, answer in operation["responses"].items()
        if (kinds := answer.get("content", {}))
    ]
    yield f"Answers: {'; '.join(answers)}.\n"


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"({_label(name)})=\n### {code(name)}\n"
    yield paragraphs(schema.get("description", "")) + "\n"
    required = schema.get("required", [])
    rows = [
        (code(field), _type(inner) + ("" if field in required else ", optional"), prose(inner.get("description", "")))
        for field, inner in schema.get("properties", {}).items()
    ]
    if rows:
        yield table(("field", "type", ""), rows)


def _label(schema_name: str) -> str:
    return f"rest-{schema_name.lower()}"


def _text(parameter: dict[str, Any]) -> str:
    default = parameter["schema"].get("default")
    text = str(parameter.get("description", ""))
    return text if default is None else f"{text} Default: {default}.".strip()


def _type(schema: dict[str, Any]) -> str:
    """A schema in words, other schemas as links."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{code(name)}](#{_label(name)})"
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_type(alternative) for alternative in alternatives)
    if "const" in schema:
        return code(schema["const"])
    if "enum" in schema:
        return " or ".join(code(value) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if schema.get("type") == "object" and isinstance(inner := schema.get("additionalProperties"), dict):
        return f"object of {_type(inner)}"
    return " ".join(filter(None, [str(schema.get("type", "")), f"({schema['format']})" if "format" in schema else ""]))
