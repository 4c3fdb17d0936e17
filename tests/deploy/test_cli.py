import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

from common.errors import RunEnds
from deploy.cli import Commands, app
from rollout_server.traces.writer import TraceWriter

CONFIG = "run_dir: runs/one\nmodels: {student: s, teacher: t}\ndata: {path: prompts.jsonl}\n"


def adaswitch(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run(tmp_path: Path, decode, token_texts, make_sequence) -> Path:
    writer = TraceWriter(tmp_path / "traces", decode=decode, token_texts=token_texts)
    for step in (1, 2):
        writer.write_segment(
            step, [make_sequence(prompt_id="yes", epoch=step), make_sequence(prompt_id="no", epoch=step, switches=[])]
        )
    return tmp_path


def test_config_prints_every_setting_with_its_origin(config_file):
    result = adaswitch("config", config_file, "--set", "policy.top_k=3", "--set", "policy.type=skd")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["top_k:", "3", "#", "--set"] in rows
    assert ["student:", "s", "#", "file"] in rows
    assert ["seed:", "0", "#", "default"] in rows


def test_a_misspelt_key_is_one_line_on_stderr_and_exit_code_2(config_file):
    result = adaswitch("config", config_file, "--set", "policy.windw=3")
    assert result.exit_code == 2
    assert result.stderr == "error: policy.windw is not a setting (--set); did you mean policy.window?\n"
    assert result.stdout == ""


def test_the_installed_command_shows_no_traceback_for_a_misspelt_key(config_file):
    command = [sys.executable, "-m", "deploy.cli", "config", str(config_file), "--set", "policy.windw=3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["error: policy.windw is not a setting (--set); did you mean policy.window?"]


def test_a_run_that_can_t_go_on_is_one_line_on_stderr_and_exit_code_1():
    ending = typer.Typer(cls=Commands)
    ending.callback()(lambda: None)

    @ending.command()
    def train() -> None:
        raise RunEnds("learner: died: its process has ended")

    result = CliRunner().invoke(ending, ["train"])
    assert (result.exit_code, result.stderr) == (1, "error: learner: died: its process has ended\n")


def test_our_own_errors_keep_their_traceback():
    broken = typer.Typer(cls=Commands)
    broken.callback()(lambda: None)

    @broken.command()
    def fail() -> None:
        raise AssertionError("ours")

    assert isinstance(CliRunner().invoke(broken, ["fail"]).exception, AssertionError)


@pytest.mark.parametrize("arguments", [("fly",), ("config",), ("traces", ".", "--limit", "many"), ("config", "a", "b")])
def test_a_wrong_call_is_exit_code_2(arguments):
    assert adaswitch(*arguments).exit_code == 2


def test_version_is_the_installed_one():
    result = adaswitch("--version")
    assert (result.exit_code, result.stdout) == (0, f"adaswitch {version('adaswitch')}\n")


def test_traces_lists_the_sequences_of_a_run(run):
    result = adaswitch("traces", run)
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "sequence",
        "no.1.0",
        "yes.1.0",
        "no.2.0",
        "yes.2.0",
    ]
    assert result.stderr == "4 of 4 sequences\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--step", "2"), ["no.2.0", "yes.2.0"]),
        (("--switched",), ["yes.1.0", "yes.2.0"]),
        (("--not-switched", "--limit", "1"), ["no.1.0"]),
    ],
)
def test_traces_lists_what_is_asked_for(run, options, expected):
    assert [line.split()[0] for line in adaswitch("traces", run, *options).stdout.splitlines()[1:]] == expected


def test_traces_shows_one_sequence_token_by_token(run):
    result = adaswitch("traces", run, "yes.2.0")
    assert result.exit_code == 0
    assert result.stdout.startswith("yes.2.0  step 2  adaswitch")
    assert "position  text" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("absent.0.0",), "no sequence 'absent.0.0' in "), (("yes.1.0", "--step", "2"), "in step 2")],
)
def test_a_sequence_that_is_not_there_is_said_so(run, arguments, message):
    result = adaswitch("traces", run, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_without_a_trace_is_said_so(tmp_path):
    result = adaswitch("traces", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no trace to read: ")


def test_unreadable_segments_are_counted_and_named(run):
    (run / "traces" / "step-000001" / "tokens.parquet").write_bytes(b"")
    result = adaswitch("traces", run)
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: skipped 1 unreadable segment(s): step-000001 (tokens.parquet: ")
    assert len(result.stdout.splitlines()) == 3


def test_an_interrupt_is_one_line_and_exit_code_130(tmp_path):
    fifo = tmp_path / "run.yaml"
    os.mkfifo(fifo)
    command = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "config", str(fifo)],
        stderr=subprocess.PIPE,
        text=True,
        # As in a terminal. Under a shell's `&` interrupts are ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with fifo.open("w"):  # opens once the command reads, and keeps it waiting
        command.send_signal(signal.SIGINT)
        _, stderr = command.communicate(timeout=60)
    assert (command.returncode, stderr) == (130, "interrupted\n")


def test_the_inspector_never_prints_its_token_nor_a_wrong_one(tmp_path):
    token, wrong = "inspector-token-not-to-be-seen", "wrong-token-not-to-be-seen"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "serve", str(tmp_path), "--port", str(port), "--token-env", "TOKEN"],
        env={**os.environ, "TOKEN": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}")
        for _ in range(600):
            try:
                client.get("/healthz")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        statuses = [
            client.get("/api/v1/runs", headers={"Authorization": f"Bearer {given}"}).status_code
            for given in (token, wrong)
        ]
        answer = client.get(f"/api/v1/runs?token={wrong}").text
    finally:
        service.terminate()
        printed, _ = service.communicate(timeout=30)
    assert statuses == [200, 401]
    assert "Uvicorn running" in printed
    assert "not-to-be-seen" not in printed + answer


QWEN = Path(__file__).parents[2] / "deploy" / "configs" / "qwen2.5-gsm8k.yaml"


@pytest.mark.parametrize(
    ("gpus", "gib", "placement"),
    [
        (
            1,
            80,
            "one_gpu (1 GPU of 80.0 GiB; spread needs 3 GPUs; shared_student needs 2 GPUs), weights by host_memory",
        ),
        (2, 24, "shared_student (2 GPUs of 24.0 GiB; spread needs 3 GPUs), weights by host_memory"),
        (8, 80, "spread (8 GPUs of 80.0 GiB), weights by nccl"),
    ],
)
def test_a_plan_needs_neither_gpu_nor_hub(gpus, gib, placement):
    result = adaswitch("config", QWEN, "--plan", "--gpus", str(gpus), "--gpu-gib", str(gib))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"placement: {placement}"
    assert "teacher engine   weights                     " in result.stdout
    assert f"it fits: {min(gpus, 3)} of {gpus} GPUs" in result.stdout


def test_a_plan_that_does_not_fit_is_shown_and_ends_with_one_line():
    result = adaswitch("config", QWEN, "--plan", "--gpus", "1", "--gpu-gib", "16")
    assert result.exit_code == 2
    assert "total" in result.stdout
    assert result.stderr.startswith("error: placement.layout: no layout fits 1 GPU of 16.0 GiB: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [["--plan", "--gpus", "1"], ["--plan", "--gpu-gib", "8"], ["--gpus", "1", "--gpu-gib", "8"]]
)
def test_a_plan_s_flags_belong_together(config_file, flags):
    result = adaswitch("config", config_file, *flags)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_a_key_of_an_earlier_version_names_the_new_one(config_file):
    result = adaswitch("config", config_file, "--set", "placement.learner=student_gpu")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: placement.learner is not a setting (--set); use placement.layout (spread for own_gpu, shared_student "
        "for student_gpu) instead\n"
    )


def test_the_plan_on_the_page_about_sizing_is_the_real_one():
    page = (QWEN.parents[2] / "docs" / "sizing.md").read_text()
    _, shown = page.split("--plan --gpus 2 --gpu-gib 24\n```\n\n```text\n")
    result = adaswitch("config", QWEN, "--plan", "--gpus", "2", "--gpu-gib", "24")
    printed = "\n".join(line.rstrip() for line in result.stdout.splitlines()).strip()
    assert shown.partition("\n```\n")[0] == re.sub(r"from \S*deploy/configs", "from deploy/configs", printed)
