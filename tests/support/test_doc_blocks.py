"""A page that says what is not so is found out."""

from pathlib import Path

import pytest

from tests.support.doc_blocks import BlockError, Reader, blocks_of


@pytest.fixture
def try_page(tmp_path: Path):
    def try_it(text: str) -> None:
        page = tmp_path / "page.md"
        page.write_text(text)
        reader = Reader(tmp_path, {"PATH": "/usr/bin:/bin"})
        try:
            for block in blocks_of(page):
                reader.try_block(block)
        finally:
            reader.close()

    return try_it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n```sh\nfalse | true\n```\n", "page.md:2: ended with 1"),
        ("```yaml\npolicy: {windw: 3}\n```\n", "did you mean policy.window"),
        ("```sh\nmake sandwich\n```\n", "make has no target sandwich"),
        ("<!-- not-run: no reason is good enough -->\n```sh\nmake sandwich\n```\n", "make has no target sandwich"),
        ("<!-- not-run: long -->\n```sh\nadaswitch train x.yaml --set policy.windw=3\n```\n", "policy.windw is not"),
        ("<!-- not-run: long -->\n```sh\nadaswitch train x.yaml --fast\n```\n", "--fast"),
        ("<!-- not-run: long -->\n```sh\nA=1 adaswitch fly\n```\n", "no command 'fly'"),
        ("<!-- not-run -->\n```sh\nfalse\n```\n", "says no reason"),
        ("<!-- not-run: long -->\n\ntext\n\n```sh\ntrue\n```\n", "no block follows"),
        ("<!-- service: http://127.0.0.1:1/ -->\n```sh\nfalse\n```\n", "ended with 1 instead of serving"),
        ("```fortran\n```\n", "'fortran' is no language"),
    ],
)
def test_a_block_that_does_not_work_is_named(try_page, text: str, message: str) -> None:
    with pytest.raises(BlockError, match=message):
        try_page(text)


@pytest.mark.parametrize(
    "text",
    [
        "```sh\ntrue\n```\n",
        "```yaml\npolicy: {type: skd, top_k: 3}\ntrainer: {num_steps: 5}\n```\n",
        "<!-- not-run: takes hours -->\n```sh\nmake demo ARGS='--set trainer.num_steps=5'\nfalse\n```\n",
        "```text\nfalse\n```\n\n```{toctree}\na\n```\n",
    ],
)
def test_a_block_that_works_passes(try_page, text: str) -> None:
    try_page(text)


def test_a_note_that_is_shown_is_none(try_page) -> None:
    try_page("```text\n<!-- not-run: shown -->\n```\n\n```sh\ntrue\n```\n")
