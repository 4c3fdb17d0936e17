"""The README's examples work as they are written."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[3]
PORT = 8642


def commands() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Inspector", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^curl .*$", section, re.MULTILINE)


@pytest.fixture
def service(runs_dir: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "deploy.cli", "serve", str(runs_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            if process.poll() is not None:
                assert process.stdout is not None
                pytest.fail(process.stdout.read().decode())
            try:
                httpx.get(f"http://localhost:{PORT}/healthz")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.usefixtures("service")
def test_the_curl_examples_run_as_written(tmp_path: Path) -> None:
    assert len(commands()) == 7
    for command in commands():
        failing = command.replace("curl -s", "curl -s --fail-with-body --max-time 30", 1)
        done = subprocess.run(failing, shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 0, (command, done.stdout)
        assert done.stdout or (tmp_path / "sequences.csv").stat().st_size > 0
