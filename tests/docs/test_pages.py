"""What the pages tell a reader to type works, page by page, in the order in which it stands there."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.demo_run import DemoRun
from tests.support.doc_blocks import ROOT, Reader, blocks_of

# Decisions and benchmarks tell of their day.
PAGES = sorted(
    [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", ROOT / "deploy" / "demo" / "README.md"]
    + [page for page in (ROOT / "docs").rglob("*.md") if page.parent.name not in ("decisions", "benchmarks")]
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As in a shell in which the environment was activated."""
    home = tmp_path_factory.mktemp("home")
    (home / ".curlrc").write_text("fail-with-body\nmax-time = 30\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_", "MLFLOW_"))}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CURL_HOME": str(home),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "INSPECTOR_TOKEN": "token-of-the-pages-tests",
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, demo_run: DemoRun) -> Path:
    """What a reader has after a demo run, cut short: the checkout and ``runs/demo``."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("deploy", "docs", "common", "README.md", "Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    shutil.copytree(demo_run.folder, folder / "runs" / "demo")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_s_blocks_work(page: Path, checkout: Path, environment: dict[str, str]) -> None:
    reader = Reader(checkout, environment)
    try:
        for block in blocks_of(page):
            reader.try_block(block)
    finally:
        reader.close()
