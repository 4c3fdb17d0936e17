"""What is done to a run, and when: drawn from one seed. Knows no process and no file."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Act = Literal["kill", "stop", "slow", "damage", "fill"]
ENGINE_PROCESSES = tuple(f"{role} {part}" for role in ("student", "teacher") for part in ("actor", "core"))
SUPERVISED = (*ENGINE_PROCESSES, "controller", "learner")
"""Processes that the driver watches and replaces while the run goes on."""
DRIVER, DISK, SLOW = "driver", "trace disk", "teacher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing done to one part of a run.

    ``kill`` and ``stop`` are SIGKILL and SIGSTOP; ``slow`` is SIGSTOP and SIGCONT in turns, which must count as no
    fault of the run; ``damage`` is a killed driver whose newest checkpoint is altered before the run is resumed;
    ``fill`` leaves no room on the disk of the traces.
    """

    act: Act
    target: str

    def __str__(self) -> str:
        return f"{self.act}:{self.target}"

    @property
    def ends_the_run(self) -> bool:
        """Whether somebody has to resume it."""
        return self.target in (DRIVER, DISK)

    @property
    def is_kill(self) -> bool:
        """Whether a process gets SIGKILL at a random moment."""
        return self.act in ("kill", "damage")

    @property
    def counts(self) -> bool:
        """Whether it is a fault at all."""
        return self.act != "slow"


EVERY_FAULT = (
    *(Fault(act=act, target=target) for target in SUPERVISED for act in ("kill", "stop")),
    Fault(act="kill", target=DRIVER),
    Fault(act="damage", target=DRIVER),
    Fault(act="fill", target=DISK),
    Fault(act="slow", target=SLOW),
)


def parse_fault(text: str) -> Fault:
    """``stop:teacher core``. Raises ValueError naming what there is."""
    for fault in EVERY_FAULT:
        if str(fault) == text:
            return fault
    raise ValueError(f"no fault {text!r}; there are: {', '.join(map(str, EVERY_FAULT))}")


def plan(num_kills: int, rng: random.Random) -> list[Fault]:
    """Every fault once, and kills again until there are ``num_kills``: each as often as any other, give or take one.
    In a random order.
    """
    kills = [fault for fault in EVERY_FAULT if fault.is_kill]
    drawn = list(EVERY_FAULT)
    while (num_more := num_kills - sum(fault.is_kill for fault in drawn)) > 0:
        drawn += rng.sample(kills, min(num_more, len(kills)))
    rng.shuffle(drawn)
    return drawn


def share_out(faults: Sequence[Fault], num_runs: int) -> list[list[Fault]]:
    """Each run's faults; the first runs have one more where they can't all have as many."""
    return [list(faults[number::num_runs]) for number in range(num_runs)]
