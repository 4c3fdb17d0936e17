"""``adaswitch train`` whose engines follow a script, and ``make submit`` of it.

python -m tests.support.scripted_run train CONFIG [--resume] [--set KEY=VALUE]...
python -m tests.support.scripted_run submit CONFIG --address URL [--resume] [--stop-with-me] [--set KEY=VALUE]...
"""

from pathlib import Path
from typing import Annotated

import typer

from common.config.source import read_config
from common.logs import set_up_logging
from deploy.cli import Commands
from deploy.cluster import submit as product

app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
Overrides = Annotated[list[str] | None, typer.Option("--set")]


@app.command()
def train(file: Path, overrides: Overrides = None, resume: bool = False) -> None:
    set_up_logging()
    from deploy.run.launch import train
    from tests.support.faulty_runs import PLAYED

    train(read_config(file, overrides or []), resume=resume, actor_classes=PLAYED)


@app.command()
def submit(
    file: Path, address: str = "", overrides: Overrides = None, resume: bool = False, stop_with_me: bool = False
) -> None:
    code = product.submit(
        file,
        address=address,
        overrides=overrides or [],
        resume=resume,
        stop_with_me=stop_with_me,
        program=("python", "-m", "tests.support.scripted_run", "train"),
    )
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
