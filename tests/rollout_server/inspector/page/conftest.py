"""The page in a real browser, over traces that the system's own writer wrote."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from rollout_server.inspector.app import create_app
from rollout_server.traces.writer import TraceWriter
from tests.data.record_demo import DEMO_RUN
from tests.support.browser import find_browser

# A busy machine takes seconds to compile the charting library.
expect.set_options(timeout=60_000)

ROOT = Path(__file__).parents[4]
TOKEN = "open-sesame-open-sesame"
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


@pytest.fixture
def runs_dir(tmp_path: Path, make_sequence) -> Path:
    """``demo``, recorded from a real run on real engines; ``hostile``, made, with markup for every text."""
    runs = tmp_path / "runs"
    shutil.copytree(DEMO_RUN, runs / "demo")
    writer = TraceWriter(
        runs / "hostile" / "traces",
        decode=lambda _: HOSTILE,
        token_texts=lambda ids: [HOSTILE for _ in ids],
        top_alternatives=3,
    )
    (runs / "hostile" / "config.yaml").write_text(CONFIG)
    (runs / "hostile" / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss_nats": 0.5}) + "\n")
    writer.write_segment(1, [make_sequence(prompt_id=f"p{i}", num_tokens=40, switches=(30,), seed=i) for i in range(3)])
    return runs


@pytest.fixture
def port() -> int:
    """Free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def served(runs_dir: Path, port: int, *options: str, environment: dict[str, str] | None = None) -> Iterator[str]:
    """The address of an inspector as a user starts it."""
    command = [sys.executable, "-m", "deploy.cli", "serve", str(runs_dir), "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(environment or {})})
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


@pytest.fixture
def address(runs_dir: Path, port: int) -> Iterator[str]:
    with served(runs_dir, port) as address:
        yield address


@pytest.fixture
def guarded_address(runs_dir: Path, port: int) -> Iterator[str]:
    with served(runs_dir, port, "--token-env", "INSPECTOR_TOKEN", environment={"INSPECTOR_TOKEN": TOKEN}) as address:
        yield address


@pytest.fixture
def attached_address(runs_dir: Path, port: int, live_rollouts) -> Iterator[str]:
    """Of one that tries prompts on ``demo``, over scripted engines."""
    app = create_app(runs_dir, hosts=["127.0.0.1"], live_rollouts=live_rollouts)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = find_browser(playwright)
        if path is None:
            pytest.skip("needs a browser: make browser")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages whose every complaint fails the test, but for those that are ``expected``.

    To be asked for after the service, for it must end before it.
    """
    complaints: list[str] = []
    contexts = []

    def open_at(address: str, *, expected: str = "$^") -> Page:
        context = browser.new_context(base_url=address, viewport={"width": 1280, "height": 900}, color_scheme="light")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)

        def complain(text: str) -> None:
            if not re.search(expected, text):
                complaints.append(text)

        page.on("console", lambda message: complain(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complain(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(address) else complain(asked.url))
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def page(address: str, open_page: Callable[..., Page]) -> Page:
    return open_page(address)
