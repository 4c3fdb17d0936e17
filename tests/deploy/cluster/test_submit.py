"""Jobs on a real Ray cluster of one node, started for these tests and asking for a token, as users submit them.

What does not look at engines runs jobs whose engines follow a script, which are there in less time.
"""

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from deploy.cluster.submit import entrypoint
from tests.support.ray_heads import DEMO, SHORT, Head, free_ports, started_head, wait_for

RUN_TIMEOUT_S, STOP_TIMEOUT_S = 400.0, 20.0
ENDLESS = [*SHORT[1:], "trainer.num_steps=1000"]
PRODUCT = ["deploy.cluster.submit"]
SCRIPTED = ["tests.support.scripted_run", "submit"]

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head() as head:
        yield head


def submit(
    head: Head, *settings: str, program: list[str] = PRODUCT, resume: bool = False, stop_with_me: bool = False
) -> subprocess.Popen[str]:
    """``make submit``, or the same of a run on scripted engines."""
    command = [sys.executable, "-m", *program, DEMO, "--address", head.address]
    command += ["--resume"] if resume else []
    command += ["--stop-with-me"] if stop_with_me else []
    for setting in settings:
        command += ["--set", setting]
    return head.run(command)


def read_until(job: subprocess.Popen[str], wanted: str) -> str:
    """The job's output up to the line that holds ``wanted``. The test's own time-out ends a job that hangs."""
    assert job.stdout is not None
    seen = ""
    for line in job.stdout:
        seen += line
        if wanted in line:
            return seen
    raise AssertionError(f"the job ended without {wanted!r}:\n{seen}")


def assert_nothing_is_left(head: Head) -> None:
    """Ray's lists follow what happened by a moment, its own supervisor of the job included."""
    wait_for(lambda: not head.processes(), "the run's processes to end", STOP_TIMEOUT_S)
    wait_for(lambda: not head.listed("actors", "ALIVE"), "the actors to end", STOP_TIMEOUT_S)
    wait_for(lambda: not head.listed("placement_groups", "CREATED"), "the placement group to go", STOP_TIMEOUT_S)


@pytest.mark.slow
def test_a_submitted_run_shows_its_progress_leaves_its_folder_here_and_can_be_resumed(
    head: Head, tmp_path: Path
) -> None:
    settings = [*SHORT, f"run_dir={tmp_path / 'run'}", "checkpoints.every_steps=1"]
    job = submit(head, *settings)
    log, _ = job.communicate(timeout=RUN_TIMEOUT_S)
    assert job.returncode == 0, log
    places = [log.index(text) for text in ("starting the engines", "step 1/2  loss", "step 2/2  loss", "run folder  ")]
    assert places == sorted(places)
    assert "\x1b" not in log, "no terminal: no colours, no cursor movements"
    assert (tmp_path / "run" / "summary.json").exists()
    assert_nothing_is_left(head)

    job = submit(head, *settings, resume=True)
    log, _ = job.communicate(timeout=RUN_TIMEOUT_S)
    assert job.returncode == 0, log
    assert f"{tmp_path / 'run'} is finished, after step 2" in log


@pytest.mark.slow
def test_a_stopped_run_ends_in_order_within_20_s_and_leaves_nothing(head: Head, tmp_path: Path) -> None:
    job = submit(head, *ENDLESS, f"run_dir={tmp_path / 'run'}", program=SCRIPTED)
    log = read_until(job, "step 1/1000")
    told = re.search(r"to stop it: (.+)$", log, re.MULTILINE)
    assert told is not None
    head.run(["env", "-u", "RAY_AUTH_MODE", "bash", "-c", f"{told[1]} --no-wait"]).wait(timeout=60)
    stopped_at_s = time.monotonic()  # starting the command itself takes seconds
    rest, _ = job.communicate(timeout=60)
    wait_for(lambda: not head.processes(), "the run's processes to end", STOP_TIMEOUT_S)
    assert time.monotonic() - stopped_at_s < STOP_TIMEOUT_S + 10
    assert "interrupted" in rest
    assert job.returncode == 130
    assert_nothing_is_left(head)


@pytest.mark.slow
def test_a_run_can_be_made_to_stop_with_who_submitted_it(head: Head, tmp_path: Path) -> None:
    job = submit(head, *ENDLESS, f"run_dir={tmp_path / 'run'}", program=SCRIPTED, stop_with_me=True)
    log = read_until(job, "step 1/1000")
    assert "requires no token" not in log
    job.send_signal(signal.SIGTERM)
    rest, _ = job.communicate(timeout=30)  # what a container gets
    assert re.search(r"^job raysubmit_\w+: stopped$", rest, re.MULTILINE), rest
    assert job.returncode == 130
    assert_nothing_is_left(head)


@pytest.mark.slow
def test_a_run_that_waits_says_what_is_missing_and_gives_up_in_time(head: Head, tmp_path: Path) -> None:
    job = submit(
        head, f"run_dir={tmp_path / 'run'}", "placement.strategy=STRICT_SPREAD", "placement.timeout_s=12", *SHORT
    )
    log, _ = job.communicate(timeout=RUN_TIMEOUT_S)
    assert re.search(r"waiting for resources, \d+ of 12 s: STRICT_SPREAD needs a node for each of 4 bundles", log)
    assert "error: placement: waited 12 s for the cluster's resources: STRICT_SPREAD needs a node for each" in log
    assert job.returncode == 2  # the run's, not Ray's 1
    assert_nothing_is_left(head)


def test_a_bad_setting_is_refused_before_anything_is_uploaded(head: Head) -> None:
    job = submit(head, "trainer.num_steps=none")
    log, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert log.startswith("error: ")
    assert "raysubmit" not in log


@pytest.mark.parametrize("token", [None, "wrong"])
def test_without_the_cluster_s_token_one_line_says_so(head: Head, tmp_path: Path, token: str | None) -> None:
    environment = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH")}
    environment |= {"HOME": str(tmp_path)} | ({"RAY_AUTH_TOKEN": uuid4().hex} if token else {})
    job = submit(replace(head, environment=environment))
    log, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert len(log.splitlines()) == 1, log
    assert "error: --address" in log
    assert "uthentication" in log


def test_a_cluster_that_is_not_there_is_named(head: Head) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    job = submit(replace(head, address=nowhere))
    log, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert log.startswith(f"error: --address {nowhere}: ")
    assert len(log.splitlines()) == 1, log


def test_the_entrypoint_keeps_words_with_blanks_and_quotes_together() -> None:
    command = entrypoint(Path("a b.yaml"), ["policy={type: fixed, position: 3}"], run_dir=Path("/runs/it's"))
    words = shlex.split(command.partition("exec ")[2])
    assert words[-6:] == [
        "train",
        "a b.yaml",
        "--set",
        "policy={type: fixed, position: 3}",
        "--set",
        "run_dir=/runs/it's",
    ]
    assert entrypoint(Path("a.yaml"), [], run_dir=Path("r"), resume=True).split()[-4:] == [
        "a.yaml",
        "--resume",
        "--set",
        "run_dir=r",
    ]


def test_the_doctor_finds_the_cluster(head: Head) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "doctor"],
        env=head.environment | {"RAY_ADDRESS": head.gcs_address, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (line,) = [line for line in done.stdout.splitlines() if " Ray " in line]
    assert line.startswith("ok"), done.stdout
    assert line.endswith(f"1 node with 0 GPUs at {head.gcs_address}, with a token")
