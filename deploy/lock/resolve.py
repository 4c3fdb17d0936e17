"""Resolve the extras ``cpu``, ``dev`` and ``bench``; write every package with its version, to be installed with
``--no-deps``.

Left out, and why:
torchvision, torchaudio, torchcodec: vLLM's metadata asks for them, text models do not need them, and the builds on the
    package index do not import beside a CPU build of torch.
triton: xgrammar's metadata asks for it; without a GPU it only makes vLLM look for kernels that are not there.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXTRAS = "cpu,dev,bench"
LEFT_OUT = {"adaswitch", "torchvision", "torchaudio", "torchcodec", "triton"}
# Build tools that the editable install uses; the resolver leaves out what only builds.
BUILD_TOOLS = {"setuptools"}

HEADER = """\
# Made by `make lock`; do not edit. Install with: pip install --no-deps -r deploy/lock/cpu.lock
# torch is the CPU build: where pip does not find it, pytorch.org names the index to add with --extra-index-url.
"""


def main(lock_file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report_file = Path(folder) / "report.json"
        subprocess.run(
            f"{sys.executable} -m pip install --quiet --dry-run --ignore-installed".split()
            + f"--report {report_file} .[{EXTRAS}]".split(),
            check=True,
        )
        report = json.loads(report_file.read_text())
    packages = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    missing = BUILD_TOOLS - packages.keys()
    assert not missing, f"the resolver no longer brings {missing}; add them to the extra dev"
    lines = [f"{name}=={version}" for name, version in sorted(packages.items()) if name not in LEFT_OUT]
    lock_file.write_text(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
