"""Record ``demo_run`` anew: a short run of the real demo, on real engines, for tests that only look at a trace.

    python -m tests.data.record_demo

Kept in the repository, since a browser's tests need numbers that stay: which token, which switch, moved where. The walk
(``tests/deploy/test_walk.py``) makes a run anew each time, and shows that today's code still writes what is read here.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DEMO_RUN = Path(__file__).parent / "demo_run"
SETTINGS = [
    "run_dir=runs/demo",
    "trainer.num_steps=6",
    "trainer.prompts_per_step=24",
    "trainer.warmup_steps=0",
    "evaluation.every_steps=3",
    "evaluation.data.max_prompts=64",
]


def main() -> None:
    """Run the demo in a folder of its own and keep what tests read."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("deploy", "common", "rollout_server", "trainer"):
            (Path(folder) / name).symlink_to(REPOSITORY / name)
        command = [sys.executable, "-m", "deploy.cli", "train", "deploy/configs/demo.yaml"]
        subprocess.run([*command, *(part for s in SETTINGS for part in ("--set", s))], cwd=folder, check=True)
        run = Path(folder) / "runs" / "demo"
        shutil.rmtree(DEMO_RUN, ignore_errors=True)
        shutil.copytree(run / "traces", DEMO_RUN / "traces")
        for name in ("config.yaml", "metrics.jsonl"):
            shutil.copy(run / name, DEMO_RUN / name)
        summary = json.loads((run / "summary.json").read_text()) | {"run_dir": "runs/demo"}
        (DEMO_RUN / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
