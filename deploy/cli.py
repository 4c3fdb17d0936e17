"""The command ``adaswitch``. Each command imports what it needs when it runs, so that ``--help`` is fast and reading a
trace needs neither torch nor Ray.

Exit codes: 0 success, 2 invalid input (one line on stderr), 130 interrupted, 1 a run that can't continue (one line on
stderr) or a bug of ours (with its traceback).
"""

from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from common.errors import RunEnds, UserError

if TYPE_CHECKING:
    from rollout_server.traces.records import SkippedSegment

_TRACE_TIMEOUT_S = 3600.0  # to read all segments, and for each question

ConfigFile = Annotated[Path, typer.Argument(metavar="FILE", help="YAML file with the run's settings.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, for example policy.window=5. May be repeated."),
]


class Commands(TyperGroup):
    """Turns errors that a user can act on into one line and an exit code, for every command."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except RunEnds as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=Commands,
    help="Train a small language model on sequences that it generates together with a large one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the ``adaswitch`` script."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adaswitch {version('adaswitch')}")
        raise typer.Exit()


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def config(
    file: ConfigFile,
    overrides: Overrides = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print how the run would be placed on GPUs instead, and the memory it needs.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="With --plan: GPUs per machine. Default: those of this machine.")
    ] = None,
    gpu_gib: Annotated[float | None, typer.Option(min=1.0, help="With --gpus: memory per GPU in GiB.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="With --gpus: number of such machines.")] = 1,
) -> None:
    """Print every setting of a run and its source: default, file or --set."""
    from common.config.source import dump_config, read_config

    if (gpus is None) != (gpu_gib is None):
        raise UserError("--gpus and --gpu-gib must be given together, for example --gpus 2 --gpu-gib 24")
    if gpus is not None and not plan:
        raise UserError("--gpus requires --plan")
    resolved = read_config(file, overrides or [])
    if not plan:
        typer.echo(dump_config(resolved), nl=False)
        return
    from deploy.reporting.plan_table import print_plan

    print_plan(resolved.config, file, num_nodes=nodes, gpus=gpus, gpu_gib=gpu_gib)


@app.command()
def doctor(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="YAML file with a run's settings, to be checked as well.")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings and the facts as JSON.")] = False,
) -> None:
    """Check whether this machine can run adaswitch: versions, GPUs, driver, memory, disk, hub, Ray. Starts no run.

    Each line is ok, a warning or a failure and says what to do. The exit code is 1 if there is a failure.
    """
    from deploy.doctor.examine import examine
    from deploy.doctor.report import as_json as to_json
    from deploy.doctor.report import print_findings

    facts, findings = examine(file, overrides or [])
    if as_json:
        typer.echo(to_json(facts, findings))
    else:
        print_findings(findings)
    if any(finding.level == "failure" for finding in findings):
        raise typer.Exit(1)


@app.command()
def train(
    file: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the newest run of this run_dir from its last good checkpoint.")
    ] = False,
) -> None:
    """Distill the teacher into the student and print a summary."""
    from common.config.source import read_config
    from common.logs import set_up_logging
    from deploy.cluster.loopback import keep_ray_on_loopback

    resolved = read_config(file, overrides or [])  # before the following imports, which take seconds
    set_up_logging()
    keep_ray_on_loopback(resolved.config.placement)

    from deploy.run.launch import train

    train(resolved, resume=resume)


@app.command("eval")
def evaluate(file: ConfigFile, overrides: Overrides = None) -> None:
    """Evaluate models.student on the held-out prompts: accuracy, and divergence from the teacher.

    To evaluate a trained student: --set models.student=RUN/student
    """
    from common.config.source import read_config
    from common.logs import set_up_logging
    from deploy.cluster.loopback import keep_ray_on_loopback

    resolved = read_config(file, overrides or [])
    set_up_logging()
    keep_ray_on_loopback(resolved.config.placement)

    from deploy.run.launch import evaluate_student

    evaluate_student(resolved)


@app.command()
def traces(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    sequence: Annotated[str | None, typer.Argument(metavar="SEQUENCE", help="Show this one, token by token.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Only this step.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many sequences.")] = 20,
    switched: Annotated[
        bool | None, typer.Option("--switched/--not-switched", help="Only sequences with a switch, or without one.")
    ] = None,
) -> None:
    """List the sequences of a run, or show one: the source of each token, and why."""
    from deploy.reporting.terminal import print_sequence, print_sequences
    from rollout_server.traces import queries
    from rollout_server.traces.index import TraceIndex
    from rollout_server.traces.records import SequenceFilter, SequenceTrace

    folder = run / "traces"
    if not folder.is_dir():
        raise UserError(f"no trace to read: {folder} is not a folder")
    with closing(TraceIndex(folder, only_step=step, with_tokens=False)) as index:
        index.refresh(_TRACE_TIMEOUT_S)
        _warn_of_skipped(index.skipped)
        if sequence is None:
            shown, _, num_matching = queries.page(
                index,
                SequenceFilter(switched=switched),
                order="step",
                descending=False,
                limit=limit,
                after=None,
                timeout_s=_TRACE_TIMEOUT_S,
            )
            print_sequences(shown)
            # On stderr, so that a pipe only gets the rows.
            typer.echo(f"{len(shown)} of {num_matching} sequences", err=True)
        elif record := queries.sequence(index, sequence, _TRACE_TIMEOUT_S):
            tokens = queries.tokens(index, record.step, sequence)
            print_sequence(SequenceTrace(sequence=record, tokens=tokens))
        else:
            place = f"{run} in step {step}" if step is not None else run
            raise UserError(f"no sequence {sequence!r} in {place}")


@app.command()
def serve(
    runs: Annotated[
        str, typer.Argument(metavar="RUNS_DIR", help="The folder with the runs' folders, or their storage.url.")
    ],
    host: Annotated[str, typer.Option(help="Address to bind. Other than loopback needs --token-env.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8642,
    token_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable with the required bearer token.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A host name of this machine. May be repeated.")
    ] = None,
    attach: Annotated[
        bool, typer.Option("--attach", help="Connect to the Ray cluster of live runs, to send prompts to them.")
    ] = False,
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="With --attach: the cluster's address, such as 10.0.0.1:6379.")
    ] = "auto",
) -> None:
    """Serve the runs' traces over REST and as a web page: the inspector."""
    from contextlib import nullcontext

    from rollout_server.inspector.mirror import mirrored
    from rollout_server.inspector.server import serve as serve_runs

    join = None
    if attach:
        from deploy.cluster.attach import attach as join_cluster

        join = partial(join_cluster, address)
    with mirrored(runs) if "://" in runs else nullcontext(Path(runs)) as folder:
        serve_runs(folder, host=host, port=port, token_env=token_env, names=name or [], attach=join)


def _warn_of_skipped(skipped: "list[SkippedSegment]") -> None:
    if skipped:
        names = "; ".join(f"{segment.name} ({segment.reason})" for segment in skipped)
        typer.echo(f"warning: skipped {len(skipped)} unreadable segment(s): {names}", err=True)


if __name__ == "__main__":
    main()
