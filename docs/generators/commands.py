"""The command-line reference: every command, argument and flag, as typer knows them."""

from collections.abc import Iterator

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from deploy.cli import app
from docs.generators.markdown import anchored, code, paragraphs, prose, table

Command = TyperCommand | TyperGroup


def command_flags() -> dict[str, list[str]]:
    """Each command's flags under its name; ``adaswitch`` alone has the empty name."""
    return {name: [flag for option in _options(command) for flag in _flags(option)] for name, command in _commands()}


def command_reference() -> str:
    """Markdown: a section for each command."""
    return "\n".join(line for name, command in _commands() for line in _section(name, command))


def _commands() -> Iterator[tuple[str, Command]]:
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    yield "", root
    yield from _under(root, "")


def _under(group: TyperGroup, prefix: str) -> Iterator[tuple[str, Command]]:
    for name, command in group.commands.items():
        assert isinstance(command, Command)
        yield f"{prefix}{name}", command
        if isinstance(command, TyperGroup):
            yield from _under(command, f"{prefix}{name} ")


def _section(name: str, command: Command) -> Iterator[str]:
    full_name = f"adaswitch {name}".strip()
    arguments = [parameter for parameter in command.params if isinstance(parameter, TyperArgument)]
    words = [str(argument.metavar or argument.name) for argument in arguments]
    usage = [word if argument.required else f"[{word}]" for word, argument in zip(words, arguments, strict=True)]
    rows = [(code(word), "", prose(argument.help or "")) for word, argument in zip(words, arguments, strict=True)]
    for option in _options(command):
        flags = ", ".join(anchored(flag, _anchor(name, flag)) for flag in _flags(option))
        rows.append((f"{flags} {_value(option)}".strip(), _default(option), prose(option.help or "")))
    yield f"## {code(full_name)}\n"
    yield paragraphs(command.help or "") + "\n"
    yield "```text\n" + " ".join([full_name, "[OPTIONS]", *usage, *(["COMMAND"] if not name else [])]) + "\n```\n"
    if rows:
        yield table(("argument or option", "default", ""), rows)


def _options(command: Command) -> list[TyperOption]:
    return [parameter for parameter in command.params if isinstance(parameter, TyperOption)]


def _flags(option: TyperOption) -> list[str]:
    return [*option.opts, *option.secondary_opts]


def _anchor(command: str, flag: str) -> str:
    return "-".join(["adaswitch", *command.split(), flag.lstrip("-")])


def _value(option: TyperOption) -> str:
    return "" if option.is_flag else code(option.metavar or str(option.name).upper())


def _default(option: TyperOption) -> str:
    return "" if option.default in (None, False) or callable(option.default) else code(option.default)
