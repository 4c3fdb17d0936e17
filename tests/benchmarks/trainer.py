"""The trainer's figures: the loss against a plain one, a whole step against TRL's, a weight sync against a copy.

    python -m tests.benchmarks.trainer
    python -m tests.benchmarks.trainer --only sync

Writes docs/benchmarks/trainer.json and the table in README.md beside it, and prints that table. Every ratio is between
figures of one run on one machine. What is measured and how: docs/benchmarks/README.md.
"""

import argparse
import logging
from pathlib import Path

from tests.benchmarks import trainer_loss, trainer_report, trainer_step, trainer_sync
from tests.benchmarks.pairs import REPOSITORY

PARTS = ("loss", "sync", "step")


def main() -> None:
    arguments = _parse()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("benchmark").setLevel(logging.INFO)
    measure = {
        "loss": lambda: trainer_loss.measure_figures(repetitions=arguments.loss_repetitions),
        "sync": lambda: trainer_sync.measure(num_syncs=arguments.syncs),
        "step": lambda: trainer_step.measure(num_measured_steps=arguments.steps),
    }
    for part in arguments.only:
        trainer_report.write(arguments.out, measure[part]())  # kept, should a later part fail
    print(trainer_report.table(arguments.out))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=3, help="steps of each side that count, after a warm-up")
    parser.add_argument("--syncs", type=int, default=5, help="syncs of each model that count, after a first one")
    parser.add_argument("--loss-repetitions", type=int, default=1, help="processes per variant of the loss")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "benchmarks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
