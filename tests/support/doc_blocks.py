"""The code blocks of the documentation's pages, and how each kind is tried.

    sh      run by bash, in a folder that looks like a checkout after a short demo run
    python  run, in the same folder
    yaml    read as the settings of a run, or as a part of them
    others  output and drawings: not run

A comment right above a block says what else is meant:

    <!-- not-run: WHY -->   not run here; the flags, settings and make targets that it names are checked all the same
    <!-- service: URL -->   started, and kept until the page ends; the next block waits for the address to answer
"""

import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import typer
import yaml
from sybil.document import Document
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, FencedCodeBlockLexer

from common.config.source import read_config
from common.errors import UserError
from deploy.cli import app

ROOT = Path(__file__).parents[2]
SHOWN_ONLY = {"", "text", "json", "http"}  # and MyST directives, in braces
RUN_TIMEOUT_S = 120.0
START_TIMEOUT_S = 60.0

_FENCES = FencedCodeBlockLexer(language=r"[^\s`]*", mapping={"language": "language", "source": "source"})
_NOTES = DirectiveInHTMLCommentLexer(directive="not-run|service")
_LEAST: dict[str, Any] = {
    "run_dir": "runs/x",
    "models": {"student": "s", "teacher": "t"},
    "data": {"path": "p.jsonl", "answer_field": "answer"},
}


class BlockError(AssertionError):
    """A block that does not do what its page says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block and the note above it."""

    place: str
    """README.md:17"""
    language: str
    source: str
    note: str | None
    argument: str


def blocks_of(page: Path) -> list[Block]:
    """A page's blocks in order. Raises BlockError for a note that says nothing, or that no block follows."""
    document = Document.parse(str(page))
    fences = sorted(_FENCES(document), key=lambda fence: fence.start)
    notes = {
        document.text.index("-->", note.end) + len("-->"): note
        for note in _NOTES(document)
        if not any(fence.start < note.start < fence.end for fence in fences)  # shown, and not meant
    }
    blocks = []
    for region in fences:
        place = f"{page.name}:{document.text.count(chr(10), 0, region.start) + 1}"
        before = document.text[: region.start].rstrip()
        note = notes.pop(len(before), None)
        name, argument = (note.lexemes["directive"], (note.lexemes["arguments"] or "").strip()) if note else (None, "")
        if note and not argument:
            raise BlockError(f"{place}: {name} says no reason or address")
        language, source = region.lexemes["language"], str(region.lexemes["source"])
        blocks.append(Block(place=place, language=language, source=source, note=name, argument=argument))
    if notes:
        lines = [document.text.count("\n", 0, note.start) + 1 for note in notes.values()]
        raise BlockError(f"{page.name}: no block follows the notes in lines {lines}")
    return blocks


class Reader:
    """Does what a page says, block by block, in one folder. Its ``close`` ends the services."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._environment = environment
        self._services: list[subprocess.Popen[bytes]] = []

    def try_block(self, block: Block) -> None:
        """Raises BlockError naming the block's place."""
        try:
            match block.language:
                case "yaml" if block.note is None:
                    check_settings(block.source, self._folder)
                case "sh" if block.note == "service":
                    self._start(block)
                case "sh":
                    check_commands(block.source, self._folder)
                    if block.note is None:
                        self._run(["bash", "-euo", "pipefail", "-c", block.source])
                case "python" if block.note is None:
                    self._run(["python", "-c", block.source])
                case "yaml" | "python":
                    pass
                case language if language in SHOWN_ONLY or language.startswith("{"):
                    pass
                case language:
                    raise BlockError(f"{language!r} is no language of the pages: sh, python, yaml or text")
        except BlockError as error:
            raise BlockError(f"{block.place}: {error}") from error

    def close(self) -> None:
        for service in self._services:
            service.terminate()
        for service in self._services:
            service.wait(timeout=20)

    def _run(self, command: list[str]) -> None:
        try:
            done = subprocess.run(
                command,
                cwd=self._folder,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=RUN_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BlockError(f"did not end within {RUN_TIMEOUT_S:g} s") from error
        if done.returncode:
            raise BlockError(f"ended with {done.returncode}\n{done.stdout}\n{done.stderr}")

    def _start(self, block: Block) -> None:
        check_commands(block.source, self._folder)
        command = ["bash", "-euc", f"exec {block.source}"]
        service = subprocess.Popen(command, cwd=self._folder, env=self._environment)
        self._services.append(service)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if service.poll() is not None:
                raise BlockError(f"ended with {service.returncode} instead of serving")
            try:
                httpx.get(block.argument, timeout=5.0)
                return
            except httpx.TransportError:
                time.sleep(0.2)
        raise BlockError(f"{block.argument} did not answer within {START_TIMEOUT_S:g} s")


def check_settings(text: str, folder: Path) -> None:
    """Raises BlockError unless the settings, with the few that every run must have beside them, are those of a run."""
    given = yaml.safe_load(text)
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(_merged(_LEAST, given)))
    try:
        read_config(file)
    except UserError as error:
        raise BlockError(str(error)) from error


def check_commands(source: str, folder: Path) -> None:
    """Raises BlockError for a make target, a command, a flag or a setting that does not exist."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in _commands(source):
        program, arguments = Path(words[0]).name, words[1:]
        if program == "make":
            unknown = {word for word in arguments if not word.startswith("-") and "=" not in word} - targets
            if unknown:
                raise BlockError(f"make has no target {', '.join(sorted(unknown))}")
        elif program == "adaswitch":
            _check_adaswitch(arguments, folder)


def _check_adaswitch(arguments: list[str], folder: Path) -> None:
    root = typer.main.get_command(app)
    name = next(iter(arguments), "")
    command = root.commands.get(name)  # type: ignore[attr-defined]
    if command is None:
        if name.startswith("-"):
            return
        raise BlockError(f"adaswitch has no command {name!r}")
    try:
        context = command.make_context(name, list(arguments[1:]))
    except typer.Exit:  # --help
        return
    except Exception as error:  # typer's own errors, of a module it does not show
        raise BlockError(f"adaswitch {shlex.join(arguments)}: {getattr(error, 'message', error)}") from error
    if "overrides" in context.params:
        file = Path(context.params["file"])
        if not (ROOT / file).is_file():
            assert folder != ROOT, "pages are tried in a folder of their own"
            file = folder / "least.yaml"
            file.write_text(yaml.safe_dump(_LEAST))
        try:
            read_config(file if file.is_absolute() else ROOT / file, context.params["overrides"] or [])
        except UserError as error:
            raise BlockError(str(error)) from error


def _commands(source: str) -> Iterator[list[str]]:
    """The simple commands of a script, without the variables that are set before them."""
    for line in source.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||[;|]", line) if "'" not in line and '"' not in line else [line]:
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # part of a text over several lines
                continue
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def _merged(outer: dict[str, Any], inner: dict[str, Any]) -> dict[str, Any]:
    merged = dict(outer)
    for name, value in inner.items():
        old = outer.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
