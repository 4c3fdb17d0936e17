"""The trace reference: every column of a segment, from the schema that its writer uses."""

from collections.abc import Iterator

from docs.generators.markdown import code, prose, table
from rollout_server.traces.schema import SEQUENCES, SEQUENCES_FILE, TOKENS, TOKENS_FILE


def column_names() -> list[str]:
    return list(dict.fromkeys([*SEQUENCES.names, *TOKENS.names]))


def column_reference() -> str:
    """Markdown: a section for each file of a segment."""
    files = {SEQUENCES_FILE: SEQUENCES, TOKENS_FILE: TOKENS}
    return "\n".join(
        f"## {code(name)}\n\n{table(('column', 'type', ''), _rows(schema))}" for name, schema in files.items()
    )


def _rows(schema: object) -> Iterator[tuple[str, str, str]]:
    for field in schema:  # type: ignore[attr-defined]
        kind = f"{field.type}{', or null' if field.nullable else ''}".replace("element: ", "")
        yield code(field.name), prose(kind), prose(field.metadata[b"description"].decode())
