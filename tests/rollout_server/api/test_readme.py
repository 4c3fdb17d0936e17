"""The README's examples work as they are written."""

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[3]
README_PORT = 8642


def commands() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Inspector", 1)[1].split("\n## ", 1)[0]
    found: list[str] = re.findall(r"^curl .*$", section, re.MULTILINE)
    return [command for command in found if "/generate" not in command]


@pytest.fixture
def port(runs_dir: Path) -> Iterator[int]:
    """Of an inspector, free a moment ago: the README's may be in use here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deploy.cli", "serve", str(runs_dir), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            if process.poll() is not None:
                assert process.stdout is not None
                pytest.fail(process.stdout.read().decode())
            try:
                httpx.get(f"http://localhost:{port}/healthz")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_examples_run_as_written(tmp_path: Path, port: int) -> None:
    """But for the port, and for those that need a live run: tests/deploy/test_attach.py."""
    assert len(commands()) == 7
    for command in commands():
        assert f"localhost:{README_PORT}/" in command
        failing = command.replace("curl -s", "curl -s --fail-with-body --max-time 30", 1)
        failing = failing.replace(f"localhost:{README_PORT}/", f"localhost:{port}/")
        done = subprocess.run(failing, shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 0, (command, done.stdout)
        assert done.stdout or (tmp_path / "sequences.csv").stat().st_size > 0
