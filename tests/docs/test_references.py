"""The documentation builds without a warning, offline, and holds everything a user can set, call and read."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from docs.generators.columns import column_names
from docs.generators.commands import command_flags
from docs.generators.rest import rest_paths
from docs.generators.settings import config_keys
from rollout_server.inspector.app import create_app

ROOT = Path(__file__).parents[2]
BUILD_TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` builds, by the same command, with no way out: any request would meet a closed port."""
    folder = tmp_path_factory.mktemp("docs")
    recipe = re.search(r"^docs:.*\n\t\$\(BIN\)/sphinx-build (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    arguments = recipe[1].replace("build/docs", str(folder)).split()
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments],
        cwd=ROOT,
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return folder


def codes(page: Path) -> set[str]:
    """Everything a page shows as code."""
    shown = re.findall(r"<code[^>]*>(.*?)</code>", page.read_text(), re.DOTALL)
    return {html.unescape(re.sub(r"<[^>]+>", "", text)) for text in shown}


def test_every_setting_is_there(built: Path) -> None:
    keys = config_keys()
    assert {"run_dir", "policy.type", "policy.divergence.alpha", "evaluation.data.path", "trainer.lora.rank"} <= {*keys}
    assert set(keys) - codes(built / "reference" / "configuration.html") == set()


def test_every_command_and_flag_is_there_and_can_be_linked_to(built: Path) -> None:
    flags = command_flags()
    assert {"--port", "--token-env"} <= {*flags["serve"]}
    page = built / "reference" / "commands.html"
    commands = {f"adaswitch {name}".strip() for name in flags}
    assert (commands | {flag for of_command in flags.values() for flag in of_command}) - codes(page) == set()
    ids = set(re.findall(r'id="([^"]+)"', page.read_text()))
    wanted = {"-".join(["adaswitch", *c.split(), flag.lstrip("-")]) for c, of in flags.items() for flag in of}
    assert wanted - ids == set()


def test_every_path_is_there(built: Path) -> None:
    paths = rest_paths()
    assert {"/api/v1/runs/{run}/replay", "/api/v1/openapi.json", "/healthz", "/metrics"} <= {*paths}
    shown = {code.rpartition(" ")[2] for code in codes(built / "reference" / "rest.html")}
    assert set(paths) - shown == set()


def test_every_trace_column_is_there(built: Path) -> None:
    assert set(column_names()) - codes(built / "traces.html") == set()


def test_every_metric_of_a_run_is_there(built: Path) -> None:
    """Their source page is held against the code by tests/deploy/run/test_run_folder.py."""
    source = (ROOT / "docs" / "metrics.md").read_text()
    names = set(re.findall(r"^\| `(\w+/\w+)`", source, re.MULTILINE))
    assert "train/loss_nats" in names
    assert names - codes(built / "metrics.html") == set()


def test_every_prometheus_metric_is_there(built: Path, tmp_path: Path) -> None:
    app = create_app(tmp_path, hosts=["testserver"])
    client = TestClient(app)
    client.get("/api/v1/runs")
    names = set(
        re.findall(r"^# TYPE (\w+) (?!gauge$).*|^# TYPE (\w+) gauge$", client.get("/metrics").text, re.MULTILINE)
    )
    app.state.store.close()
    families = {name for pair in names for name in pair if name and not name.endswith("_created")}
    assert "adaswitch_inspector_skipped_segments" in families
    assert families - {code for page in built.rglob("*.html") for code in codes(page)} == set()


def test_a_page_needs_nothing_from_elsewhere(built: Path) -> None:
    fetched = re.compile(
        r"""(?:<(?:script|img|iframe)[^>]+src=|<link[^>]+stylesheet[^>]+href=|@import |url\()["']?(?:https?:)?//"""
    )
    pages = [*built.rglob("*.html"), *built.rglob("*.css")]
    assert len(pages) > 20
    assert [page.name for page in pages if fetched.search(page.read_text())] == []
