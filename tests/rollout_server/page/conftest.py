"""The page in a real browser, over traces that the system's own writer wrote."""

import json
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
from playwright.sync_api import Browser, Page, sync_playwright

from rollout_server.traces.writer import TraceWriter

ROOT = Path(__file__).parents[3]
HOSTILE = '<script>window.hacked = 1</script><img src=x onerror="window.hacked=1">'
CONFIG = """policy: {type: adaswitch, multiplier: 3.0, window: 3, floor: 0.0, divergence: {type: forward_kl}}
engines: {top_logprobs: 8}
"""
# No look-ups of the browser's own; the processes are the tests' own, so there is no sandbox to keep.
FLAGS = [
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def texts(ids: list[int]) -> list[str]:
    return [f"t{i} " for i in ids]


@pytest.fixture
def runs_dir(tmp_path: Path, make_sequence) -> Path:
    runs = tmp_path / "runs"
    for name, decode in (("demo", lambda ids: "".join(texts(ids))), ("hostile", lambda _: HOSTILE)):
        pieces = texts if name == "demo" else lambda ids: [HOSTILE for _ in ids]
        writer = TraceWriter(runs / name / "traces", decode=decode, token_texts=pieces, top_alternatives=3)
        (runs / name / "config.yaml").write_text(CONFIG)
        with (runs / name / "metrics.jsonl").open("w") as file:
            for step in (1, 2):
                file.write(json.dumps({"time": 1.0, "step": step, "train/loss_nats": 0.5 / step}) + "\n")
        for step in (1, 2):
            sequences = [
                make_sequence(
                    prompt_id=f"p{step}-{i}", num_tokens=40, switches=(30,) if i < 4 else (), seed=step * 100 + i
                )
                for i in range(20)
            ]
            writer.write_segment(step, sequences)
    return runs


@pytest.fixture
def address(runs_dir: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deploy.cli", "serve", str(runs_dir), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        for _ in range(300):
            assert process.poll() is None, "the inspector ended before it listened"
            try:
                httpx.get(f"http://127.0.0.1:{port}/healthz")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium of the system where there is one, else Playwright's own (``playwright install chromium``)."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("needs a browser: make browser")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A page whose every complaint fails the test."""
    context = browser.new_context(base_url=address, viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(15_000)
    complaints: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request", lambda asked: complaints.append(asked.url) if not re.match(re.escape(address), asked.url) else None
    )
    yield page
    context.close()
    assert complaints == []
