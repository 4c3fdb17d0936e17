"""Where a configuration's models and data sets are: on this machine, in the hub's cache, or only at the hub."""

import glob
import os
from pathlib import Path

from common.config import RunConfig
from deploy.doctor.facts import Place, Source


def sources_of(config: RunConfig) -> tuple[Source, ...]:
    """Everything that a run loads by name."""
    models = {"models.student": config.models.student, "models.teacher": config.models.teacher}
    data = {"data.path": config.data.path}
    if config.evaluation is not None:
        data["evaluation.data.path"] = config.evaluation.data.path
    return (
        *(Source(key=key, name=name, place=_model_place(name)) for key, name in models.items()),
        *(Source(key=key, name=name, place=_data_place(name)) for key, name in data.items()),
    )


def hub_home() -> Path:
    """The folder of the hub's cache, token and data sets."""
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def _model_place(name: str) -> Place:
    if Path(name).expanduser().is_dir():
        return "machine"
    if _looks_local(name):
        return "nowhere"
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return "hub"
    return "cache" if isinstance(try_to_load_from_cache(name, "config.json"), str) else "hub"


def _data_place(name: str) -> Place:
    expanded = os.path.expanduser(name)
    if os.path.exists(expanded) or glob.glob(expanded, recursive=True):
        return "machine"
    if _looks_local(name) or Path(name).suffix in {".json", ".jsonl", ".parquet"} or set(name) & set("*?["):
        return "nowhere"
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or hub_home() / "datasets").expanduser()
    cached = {_letters(folder.name) for folder in cache.iterdir()} if cache.is_dir() else set()
    return "cache" if _letters(name) in cached else "hub"


def _looks_local(name: str) -> bool:
    """Whether it can't be a hub name, which is NAME or ORGANIZATION/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _letters(name: str) -> str:
    """Letters and digits, to compare a hub name with its cache folder, Org___data_set."""
    return "".join(filter(str.isalnum, name)).lower()
