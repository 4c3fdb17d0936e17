"""Text of docstrings and tables as MyST Markdown."""

import re
from collections.abc import Iterable, Sequence

_CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_SPECIAL = re.compile(r"([\\*_<>{}\[\]|$#~])")


def prose(text: str) -> str:
    """One paragraph of a docstring as it reads: code in backticks stays code, nothing else is markup."""
    text = " ".join(text.split())
    pieces, end = [], 0
    for match in _CODE.finditer(text):
        pieces += [_SPECIAL.sub(r"\\\1", text[end : match.start()]), code(match[2])]
        end = match.end()
    return "".join([*pieces, _SPECIAL.sub(r"\\\1", text[end:])])


def paragraphs(docstring: str) -> str:
    return "\n\n".join(prose(paragraph) for paragraph in docstring.split("\n\n") if paragraph.strip())


def code(text: object) -> str:
    """Inline code. A table takes a bar for a border even there."""
    return f"`{text}`".replace("|", "\\|")


def anchored(text: str, name: str) -> str:
    """Inline code that can be linked to."""
    return f"[{code(text)}]{{#{name}}}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
