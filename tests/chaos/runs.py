"""One run of the demo under faults: started, watched, disturbed, resumed, and seen to its end.

Knows the run by its folder and its processes alone, as somebody beside it would.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tests.chaos.account import Account, lines_of, take_account
from tests.chaos.disk import Disk, small_disk
from tests.chaos.faults import Fault
from tests.chaos.processes import Processes, send, slow_down

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[2]
CONFIG = "deploy/configs/demo.yaml"
NUM_STEPS, PROMPTS_PER_STEP, NUM_ROWS = 80, 64, 2048
SETTINGS = {
    "trainer.num_steps": NUM_STEPS,
    "trainer.prompts_per_step": PROMPTS_PER_STEP,
    "evaluation.every_steps": 40,
    "checkpoints.every_steps": 10,
    "supervision.health_every_s": 1,
    "supervision.health_timeout_s": 15,
    "supervision.hang_timeout_s": 20,
}
RUN_TIMEOUT_S = 1500.0
_POLL_S = 0.2
_READY_TIMEOUT_S = 240.0  # until a step ends with everybody there, after a start or a fault
_NOTICE_TIMEOUT_S = 240.0  # and mend: the line is written then
_GONE_TIMEOUT_S = 120.0  # Ray's own processes look for their parent every few seconds, several times
_PAUSE_S = (1.0, 10.0)  # from a step that ended to the next fault
_LAST_STEP_TO_DISTURB = NUM_STEPS - 4  # a later fault might come after the end
_DISK_MEBIBYTES = 64
_SLOW = {"seconds": 10.0, "stopped_s": 1.0, "running_s": 0.5}


class Broken(Exception):
    """The run did not do what it promises."""


class TooLate(Exception):
    """The run ended before the fault could do anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A fault and what became of it. Seconds count from the moment it was sent."""

    run: int
    fault: Fault
    at: float  # seconds since the epoch
    at_s: float  # since the run's start
    at_step: int
    next_step_s: float  # until a step had ended after it was noticed
    lines: tuple[dict[str, Any], ...] = ()  # of faults.jsonl
    detected_s: float | None = None  # until the run noticed, or ended because of it
    recovered_s: float | None = None  # from there until it could go on, as the run has it; for a driver next_step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run, as its folder has it."""

    run: int
    seed: int
    exit_codes: tuple[int, ...]  # of each process that was the driver
    wall_s: float
    accuracy: float | None
    steps: int | None
    resumed: int | None
    account: Account | None
    sent: tuple[Sent, ...] = ()
    not_sent: tuple[Fault, ...] = ()
    broken: tuple[str, ...] = ()


@dataclass(slots=True)
class Run:
    """A run under way."""

    number: int
    seed: int
    folder: Path  # run/ and log
    settings: dict[str, object]
    rng: random.Random
    say: Callable[[str], None]
    disk: Disk | None = None
    exit_codes: list[int] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)
    legs: list[Processes] = field(default_factory=list)  # of each driver
    driver: "subprocess.Popen[bytes]" = field(init=False)

    @property
    def path(self) -> Path:
        return self.folder / "run"

    @property
    def processes(self) -> Processes:
        """Of the driver that there is now."""
        return self.legs[-1]

    def start(self, *, resume: bool = False) -> None:
        command = [sys.executable, "-m", "deploy.cli", "train", CONFIG, *(["--resume"] if resume else [])]
        for name, value in {**self.settings, "run_dir": self.path, "seed": self.seed}.items():
            command += ["--set", f"{name}={value}"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment["HF_DATASETS_CACHE"] = str(self.folder.parent / "datasets")
        with (self.folder / "log").open("a") as log:
            self.driver = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        self.legs.append(Processes(self.driver.pid))

    def end(self) -> None:
        """Leave nothing behind."""
        for processes in self.legs:
            processes.end()

    # ------------------------------------------------------------------------------------------------- what it shows

    def finished_steps(self, since: float = 0.0) -> list[int]:
        """Steps whose end was written at or after ``since``, in seconds since the epoch."""
        lines = lines_of(self.path / "metrics.jsonl")
        return [line["step"] for line in lines if "train/loss_nats" in line and line["time"] >= since]

    def fault_lines(self, since: float) -> list[dict[str, Any]]:
        return [line for line in lines_of(self.path / "faults.jsonl") if line["time"] >= since]

    def checkpoints(self) -> list[Path]:
        """Whole ones, from old to new."""
        return sorted(self.path.glob("checkpoints/step-*/manifest.json"))

    def last_words(self) -> str:
        return " | ".join((self.folder / "log").read_text().splitlines()[-3:])

    def until(self, what: str, condition: Callable[[], T], timeout_s: float) -> T:
        """The first answer that is true. Raises Broken when time is up, TooLate when the run has ended well before, and
        Broken when it has ended otherwise.
        """
        begun_s = time.monotonic()
        while True:
            self.processes.look()
            ended = self.driver.poll()
            if answer := condition():
                return answer
            if ended is not None:
                if ended == 0:
                    raise TooLate(f"the run ended before {what}")
                raise Broken(f"the run ended with exit code {ended} before {what}: {self.last_words()}")
            if time.monotonic() - self.started_s > RUN_TIMEOUT_S:
                raise Broken(f"the run took more than {RUN_TIMEOUT_S:g} s; it was waited for {what}")
            if time.monotonic() - begun_s > timeout_s:
                raise Broken(f"waited {timeout_s:g} s for {what}")
            time.sleep(_POLL_S)

    # --------------------------------------------------------------------------------------------------- what is done

    def disturb(self, fault: Fault) -> None:
        """Send the fault at a random moment and wait until a step has ended after it."""
        self.until("a step", lambda: self.finished_steps(), _READY_TIMEOUT_S)
        if fault.ends_the_run:
            wanted = 2 if fault.act == "damage" else 1
            self.until(f"{wanted} checkpoints", lambda: len(self.checkpoints()) >= wanted, RUN_TIMEOUT_S)
        pause_ends = time.monotonic() + self.rng.uniform(*_PAUSE_S)
        self.until("the moment of the next fault", lambda: time.monotonic() >= pause_ends, RUN_TIMEOUT_S)
        at_step = max(self.finished_steps(), default=0)
        if at_step > _LAST_STEP_TO_DISTURB:
            raise TooLate(f"{fault} came after step {at_step}")
        at = time.time()
        sent = Sent(
            run=self.number,
            fault=fault,
            at=at,
            at_s=time.monotonic() - self.started_s,
            at_step=at_step,
            next_step_s=0.0,
        )
        self.say(f"{fault} after step {at_step}")
        match fault.act:
            case "kill" | "damage" if fault.ends_the_run:
                sent = self._kill_driver(sent)
            case "fill":
                sent = self._fill_disk(sent)
            case "slow":
                sent = self._slow_down(sent)
            case _:
                sent = self._replaced(sent)
        self.sent.append(sent)
        self.say(f"{fault}: {_words(sent)}")

    def _replaced(self, sent: Sent) -> Sent:
        """Hit a process that the driver watches; wait for its line in faults.jsonl and for a step after that."""
        number = signal.SIGKILL if sent.fault.act == "kill" else signal.SIGSTOP
        hit = self.until(f"a {sent.fault.target}", lambda: self.processes.of(sent.fault.target), _READY_TIMEOUT_S)
        at = time.time()
        send(number, hit)
        self.until(f"faults.jsonl to name {sent.fault}", lambda: self.fault_lines(at), _NOTICE_TIMEOUT_S)
        # Steps may end before the fault is noticed: whoever was hit was not needed just then.
        noticed = self.fault_lines(at)[0]["time"]
        next_step_s = self._next_step_s(at, since=noticed)
        lines = self.fault_lines(at)
        return replace(
            sent,
            at=at,
            next_step_s=next_step_s,
            detected_s=noticed - at,
            recovered_s=lines[-1]["recovered_s"],
        )

    def _slow_down(self, sent: Sent) -> Sent:
        hit = self.until("the teacher's processes", lambda: self.processes.of(sent.fault.target), _READY_TIMEOUT_S)
        slow_down(hit, **_SLOW)
        next_step_s = self._next_step_s(sent.at, since=time.time())
        return replace(sent, next_step_s=next_step_s)

    def _kill_driver(self, sent: Sent) -> Sent:
        """Resumed at once, as a service manager would, while what the driver left is still ending."""
        self.driver.send_signal(signal.SIGKILL)
        self.exit_codes.append(self.driver.wait(timeout=30))
        before = self.processes
        whole = [int(path.parent.name.removeprefix("step-")) for path in self.checkpoints()]
        if sent.fault.act == "damage":
            damaged = damage(self.checkpoints()[-1].parent, self.rng)
            self.say(f"damaged {damaged.relative_to(self.path)}")
            whole.pop()
        self.start(resume=True)
        next_step_s = self._next_step_s(sent.at, since=time.time())
        _see_gone(before)
        legs = json.loads((self.path / "versions.json").read_text())["legs"]
        if legs[-1]["after_step"] != whole[-1]:
            raise Broken(f"{sent.fault}: went on after step {legs[-1]['after_step']}, expected {whole[-1]}")
        return replace(sent, next_step_s=next_step_s, recovered_s=next_step_s)

    def _fill_disk(self, sent: Sent) -> Sent:
        """The run should end with one line of reason. Room is made, and it is resumed."""
        assert self.disk is not None
        self.disk.fill()
        try:
            self.exit_codes.append(self.driver.wait(timeout=_NOTICE_TIMEOUT_S))
        except subprocess.TimeoutExpired as error:
            raise Broken(f"{sent.fault}: the run had not ended after {_NOTICE_TIMEOUT_S:g} s") from error
        finally:
            self.disk.make_room()
        detected_s = time.time() - sent.at
        if self.exit_codes[-1] == 0 or "No space left" not in self.last_words():
            raise Broken(f"{sent.fault}: exit code {self.exit_codes[-1]}, last words: {self.last_words()}")
        _see_gone(self.processes)
        resumed_at = time.time()
        self.start(resume=True)
        self._next_step_s(sent.at, since=resumed_at)
        return replace(
            sent,
            detected_s=detected_s,
            recovered_s=time.time() - resumed_at,
            next_step_s=time.time() - sent.at,
        )

    def _next_step_s(self, at: float, *, since: float) -> float:
        self.until("a step after the fault", lambda: self.finished_steps(since), _READY_TIMEOUT_S)
        return time.time() - at

    def see_to_the_end(self) -> None:
        """Wait for the run's end, and for everything it started to be gone."""
        self.until("its end", lambda: self.driver.poll() is not None, RUN_TIMEOUT_S)
        self.exit_codes.append(self.driver.wait(timeout=30))
        if self.exit_codes[-1] != 0:
            raise Broken(f"the run ended with exit code {self.exit_codes[-1]}: {self.last_words()}")
        _see_gone(self.processes)


def run_demo(
    number: int, seed: int, faults: Sequence[Fault], folder: Path, rng: random.Random, say: Callable[[str], None]
) -> Outcome:
    """A whole run. What it breaks is in the outcome; nothing of it goes on when this returns."""
    folder.mkdir(parents=True)
    run = Run(number=number, seed=seed, folder=folder, settings=SETTINGS, rng=rng, say=say)
    open_faults, broken = list(faults), []
    account = None
    with ExitStack() as stack:
        run.start()
        stack.callback(run.end)
        try:
            if any(fault.act == "fill" for fault in faults):
                run.until("the run's folder", lambda: (run.path / "config.yaml").exists(), _READY_TIMEOUT_S)
                run.disk = stack.enter_context(small_disk(run.path / "traces", mebibytes=_DISK_MEBIBYTES))
                stack.callback(run.end)  # before the disk goes
            while open_faults:
                try:
                    run.disturb(open_faults[0])
                except TooLate as late:
                    say(str(late))
                    break
                open_faults.pop(0)
            run.see_to_the_end()
        except Broken as error:
            broken.append(str(error))
        wall_s = time.monotonic() - run.started_s
        summary = _summary(run.path)
        if not broken:
            account = take_account(run.path, num_steps=NUM_STEPS, prompts_per_step=PROMPTS_PER_STEP, num_rows=NUM_ROWS)
            broken += account.complaints
    sent, unexplained = matched(run.sent, run.fault_lines(0.0))
    broken += [] if broken else [*_wrong_summary(summary, sent), *unexplained]
    return Outcome(
        run=number,
        seed=seed,
        exit_codes=tuple(run.exit_codes),
        wall_s=wall_s,
        accuracy=summary.get("accuracy_after"),
        steps=summary.get("steps"),
        resumed=summary.get("resumed"),
        account=account,
        sent=tuple(sent),
        not_sent=tuple(open_faults),
        broken=tuple(broken),
    )


def matched(sent: Sequence[Sent], lines: Sequence[dict[str, Any]]) -> tuple[list[Sent], list[str]]:
    """Each fault with the lines from its sending to the next one's, and a complaint for each line before the first."""
    ends = [*(each.at for each in sent[1:]), math.inf][: len(sent)]
    owned = [
        replace(each, lines=tuple(line for line in lines if each.at <= line["time"] < end))
        for each, end in zip(sent, ends, strict=True)
    ]
    first = sent[0].at if sent else math.inf
    return owned, [f"a fault that nobody sent: {line}" for line in lines if line["time"] < first]


def _see_gone(processes: Processes) -> None:
    """What a driver leaves has to end by itself."""
    if left := processes.wait_until_gone(_GONE_TIMEOUT_S):
        names = ", ".join(process.name() for process in left)
        processes.end()
        raise Broken(f"{_GONE_TIMEOUT_S:g} s after the driver's end there were still {names}")


def damage(checkpoint: Path, rng: random.Random) -> Path:
    """Alter one byte of one of its files; which, is drawn. Returns the file."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json")
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 0xFF
    file.write_bytes(content)
    return file


def _summary(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _wrong_summary(summary: dict[str, Any], sent: Sequence[Sent]) -> list[str]:
    """Where the program's own account of the faults is not that of who sent them."""
    wrong = []
    if summary.get("prompts_set_aside"):
        wrong.append(f"prompts were set aside, and none was at fault: {summary['prompts_set_aside']}")
    wrong += [f"{each.fault} counted as a fault: {each.lines}" for each in sent if each.lines and not each.fault.counts]
    num_resumed = sum(each.fault.ends_the_run for each in sent)
    if summary.get("resumed") != num_resumed:
        wrong.append(f"summary.json says resumed {summary.get('resumed')}, expected {num_resumed}")
    return wrong


def _words(sent: Sent) -> str:
    detected = "" if sent.detected_s is None else f"noticed after {sent.detected_s:.1f} s, "
    recovered = "" if sent.recovered_s is None else f"recovered in {sent.recovered_s:.1f} s, "
    return f"{detected}{recovered}next step after {sent.next_step_s:.1f} s"
