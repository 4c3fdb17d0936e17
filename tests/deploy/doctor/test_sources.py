"""Where a configuration's models and data are."""

from pathlib import Path

import pytest

from common.config import RunConfig
from deploy.doctor.sources import sources_of


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    (tmp_path / "hub" / "datasets" / "openai___gsm8k").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("rows.jsonl", "nowhere"),
        ("/data/*.parquet", "nowhere"),
        ("a/b/c", "nowhere"),
        ("openai/gsm8k", "cache"),
        ("openai/other", "hub"),
    ],
)
def test_data_that_is_not_here(home: Path, path: str, place: str) -> None:
    assert [one.place for one in sources(str(home), path) if one.key == "data.path"] == [place]


def test_data_and_models_that_are_here(home: Path) -> None:
    (home / "rows.jsonl").touch()
    found = sources(str(home), str(home / "*.jsonl"))
    assert {one.key: one.place for one in found} == {
        "models.student": "machine",
        "models.teacher": "nowhere",
        "data.path": "machine",
        "evaluation.data.path": "machine",
    }


def sources(model: str, path: str):
    config = {
        "run_dir": "runs/x",
        "models": {"student": model, "teacher": "./not-there"},
        "data": {"path": path},
        "evaluation": {"data": {"path": path}},
    }
    return sources_of(RunConfig.model_validate(config))
