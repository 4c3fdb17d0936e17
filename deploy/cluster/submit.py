"""``make submit``: runs this checkout's code as a job on a running Ray cluster, and follows it to its end.

Differences from plain ``ray job submit``: the configuration is checked before the upload, a relative ``run_dir`` is on
this machine (Ray deletes a job's own folder), a stopped run gets time to shut down its actors, and the exit code is
the run's.

Exit codes: the run's own (see ``cli``), 130 for a run that was stopped or left running, 1 if the job or the connection
failed.
"""

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.config.source import read_config
from common.errors import UserError, one_line
from deploy.cluster.sigterm import cancel_on_sigterm

if TYPE_CHECKING:
    from deploy.cluster.job import JobClient

REPOSITORY = Path(__file__).parents[2]
DEFAULT_ADDRESS = "http://127.0.0.1:8265"

# Time between asking a job to stop and killing it. Ray's default of 3 s is too short for engines.
STOP_WAIT_S = 15
TRAIN = ("python", "-m", "deploy.cli", "train")
"""The command of the job."""
# A run needs none of these. Ray itself excludes what .gitignore lists, .git, .venv and __pycache__.
_EXCLUDED = ("/tests", "/docs", "/.ci", "/runs", "/build")


def main(
    file: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file with the run's settings, in this checkout.")
    ],
    address: Annotated[str, typer.Option(help="The cluster's dashboard.")] = DEFAULT_ADDRESS,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the newest run of this run_dir from its last good checkpoint.")
    ] = False,
    upload: Annotated[
        bool,
        typer.Option(
            help="Upload this checkout. Without it, the cluster must have the package and CONFIG under the same path."
        ),
    ] = True,
    stop_with_me: Annotated[
        bool,
        typer.Option("--stop-with-me", help="At Ctrl-C or SIGTERM stop the run too, instead of leaving it running."),
    ] = False,
) -> None:
    """Run a distillation as a job on a Ray cluster and follow its log; the exit code is the run's."""
    try:
        code = submit(
            file, address=address, overrides=overrides or [], resume=resume, upload=upload, stop_with_me=stop_with_me
        )
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        code = 2
    raise typer.Exit(code)


def submit(
    file: Path,
    *,
    address: str,
    overrides: Sequence[str],
    resume: bool = False,
    upload: bool = True,
    stop_with_me: bool = False,
    program: Sequence[str] = TRAIN,
) -> int:
    """Wait for the run and return its exit code. Raises UserError if the job can't be submitted."""
    config = read_config(file, list(overrides)).config
    command = entrypoint(
        _in_checkout(file) if upload else file.absolute(),
        overrides,
        run_dir=Path(config.run_dir).absolute(),
        resume=resume,
        program=program,
    )
    use_token_where_there_is_one()

    from ray.exceptions import AuthenticationError

    from deploy.cluster.job import FAILURES, JobClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # it logs every ignored file and every closed connection
    runtime_env: dict[str, object] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
    if upload:
        runtime_env |= {"working_dir": str(REPOSITORY), "excludes": list(_EXCLUDED)}
    job_id = f"raysubmit_{secrets.token_hex(8)}"  # chosen here, so that the job can be stopped before Ray has replied
    if stop_with_me:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        client = JobClient(address)
        if not client.asks_for_token():
            typer.echo(f"warning: {address} requires no token: everyone who can reach it can run code there", err=True)
        try:
            client.submit_job(entrypoint=command, runtime_env=runtime_env, submission_id=job_id)
        except KeyboardInterrupt:
            if not stop_with_me:
                raise
            _stop(client, job_id, address)
            return 130
    except (AuthenticationError, ValueError, *FAILURES) as error:
        raise UserError(f"--address {address}: can't submit a job ({one_line(error)})") from error
    typer.echo(f"job {job_id} on {address}; to stop it: {_ray_job(address)} stop {job_id}", err=True)
    return _follow(client, job_id, address, stop_with_me=stop_with_me)


def _follow(client: "JobClient", job_id: str, address: str, *, stop_with_me: bool) -> int:
    """Follow the job and return the exit code: of the job, 130 if interrupted, or 1 if the connection is lost."""
    from ray.exceptions import AuthenticationError

    from deploy.cluster.job import FAILURES, follow

    async def until_stopped() -> int:
        if stop_with_me:
            cancel_on_sigterm()
        return await follow(client, job_id)

    to_see_it = f"{_ray_job(address)} logs --follow {job_id}"
    try:
        return asyncio.run(until_stopped())
    except (KeyboardInterrupt, asyncio.CancelledError):
        if stop_with_me:
            _stop(client, job_id, address)
        else:
            typer.echo(f"\nthe job is still running; to follow it: {to_see_it}", err=True)
        return 130
    except (AuthenticationError, *FAILURES) as error:
        typer.echo(
            f"lost the connection to job {job_id}, which may still be running: {to_see_it} ({one_line(error)})",
            err=True,
        )
        return 1


def _stop(client: "JobClient", job_id: str, address: str) -> None:
    from ray.exceptions import AuthenticationError

    from deploy.cluster.job import FAILURES, stop

    typer.echo(f"\nstopping job {job_id}", err=True)
    try:
        typer.echo(f"job {job_id}: {stop(client, job_id).lower()}", err=True)
    except (AuthenticationError, *FAILURES) as error:
        typer.echo(
            f"the job may still be running ({one_line(error)}); to stop it: {_ray_job(address)} stop {job_id}", err=True
        )


def _ray_job(address: str) -> str:
    """A command for the user's shell: with the token, if there is one, and independent of the active environment."""
    token = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    ray = "ray" if shutil.which("ray") else shlex.quote(str(Path(sys.executable).with_name("ray")))
    return f"{token}RAY_API_SERVER_ADDRESS={address} {ray} job"


def entrypoint(
    file: Path, overrides: Sequence[str], *, run_dir: Path, resume: bool = False, program: Sequence[str] = TRAIN
) -> str:
    """The job's shell command. It puts this environment's programs first in PATH. On other machines that folder does
    not exist, so the cluster's programs are used.
    """
    settings = [*overrides, f"run_dir={run_dir}"]
    words = [*program, str(file), *(["--resume"] if resume else [])]
    for setting in settings:
        words += ["--set", setting]
    return f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"; exec {shlex.join(words)}'


def use_token_where_there_is_one() -> None:
    """Make Ray's job client send the token if there is one, as ``ray start`` does by default.

    Call it before Ray is imported, because Ray reads the setting once.
    """
    at_hand = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if at_hand or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _in_checkout(file: Path) -> Path:
    """The file's path relative to the uploaded folder."""
    try:
        return file.resolve().relative_to(REPOSITORY)
    except ValueError as error:
        raise UserError(f"{file}: must be in {REPOSITORY}, the folder that is uploaded to the job") from error


if __name__ == "__main__":
    typer.run(main)
