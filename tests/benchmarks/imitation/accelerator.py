"""A virtual accelerator: it takes the time of the work it is given. Knows what a request costs, not what it says.

It queues, batches, prefills in pieces and reuses cached prefixes in whole blocks as vLLM does. Its time is real and on
a clock of its own: if this process is late, the next steps are shorter, as an accelerator would have gone on meanwhile.
"""

import asyncio
import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import numpy.typing as npt

from common.sequence import Ids
from tests.benchmarks.imitation.speeds import AcceleratorSpeeds

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCounters:
    """What an imitated accelerator has done since its start."""

    num_generated_tokens: int = 0
    num_prefilled_tokens: int = 0
    num_cached_tokens: int = 0  # found in the cache instead
    busy_s: float = 0.0  # in steps; there is no step while nothing is queued

    def __sub__(self, earlier: "DeviceCounters") -> "DeviceCounters":
        return DeviceCounters(**{name: getattr(self, name) - getattr(earlier, name) for name in self.__slots__})


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """One request on the device."""

    text: Ids  # to be prefilled
    needs_row: int | None = None  # a read: the first row it needs, which the cache must not hold
    num_tokens: int = 1  # to be written
    piece_ends: deque[int] = field(default_factory=deque)  # counts of written tokens to report at, ascending
    pause_after: int | None = None  # the count at which to wait for the reader
    has_place: bool = False  # among those that the device runs, pauses included
    is_resumed: bool = False  # what it "prefills" next is the token that it goes on after
    hashes: Hashes | None = None  # of whole blocks, once looked up
    num_left: int = 0  # tokens still to prefill
    first_step: int = 0  # the step that wrote the first token since the start or the last pause
    num_before: int = 0  # tokens written before that step
    num_reported: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    is_dropped: bool = False


class PrefixCache:
    """Which whole blocks of which texts are held, by a hash of all tokens up to a block's end."""

    def __init__(self, *, block_tokens: int, max_tokens: int, max_text: int) -> None:
        self._block_tokens = block_tokens
        self._max_blocks = max_tokens // block_tokens
        self._held: OrderedDict[int, None] = OrderedDict()
        # A hash is a sum of position-dependent products, modulo 2^64.
        self._weights = np.random.default_rng(0).integers(0, 2**64, max_text, np.uint64) | np.uint64(1)

    def hashes(self, text: Ids) -> Hashes:
        """[whole blocks in the text]"""
        products = (text.astype(np.uint64) + np.uint64(1)) * self._weights[: text.size]
        ends: Hashes = products.cumsum(dtype=np.uint64)[self._block_tokens - 1 :: self._block_tokens]
        return ends

    def num_cached(self, hashes: Hashes) -> int:
        """Tokens of the longest prefix held."""
        for block in range(hashes.size - 1, -1, -1):
            if (key := int(hashes[block])) in self._held:
                self._held.move_to_end(key)
                return (block + 1) * self._block_tokens
        return 0

    def add(self, hashes: Hashes, first: int) -> None:
        """Hold the blocks from ``first`` on; the longest unused go."""
        self._held.update(dict.fromkeys(hashes[first:].tolist()))
        while len(self._held) > self._max_blocks:
            self._held.popitem(last=False)

    def clear(self) -> None:
        self._held.clear()


class Accelerator:
    """One virtual device. First come, first served, at most ``max_num_seqs`` at once."""

    def __init__(self, speeds: AcceleratorSpeeds, *, max_num_seqs: int, max_text: int) -> None:
        self._speeds = speeds
        self._max_num_seqs = max_num_seqs
        self.cache = PrefixCache(block_tokens=speeds.block_tokens, max_tokens=speeds.cache_tokens, max_text=max_text)
        self._queue: deque[Work] = deque()
        self._decoding: set[Work] = set()
        self._num_places_taken = 0
        self._events: list[tuple[int, int, Work]] = []  # (step, number, whose piece ends with it)
        self._event_numbers = count()
        self._step = 0
        self._num_generated = self._num_prefilled = self._num_cached = 0
        self._busy_s = 0.0
        self._running: asyncio.Task[None] | None = None

    @property
    def counters(self) -> DeviceCounters:
        return DeviceCounters(
            num_generated_tokens=self._num_generated,
            num_prefilled_tokens=self._num_prefilled,
            num_cached_tokens=self._num_cached,
            busy_s=self._busy_s,
        )

    def submit(self, work: Work) -> None:
        self._queue.append(work)
        self._run_on()

    def resume(self, work: Work, pause_after: int | None) -> None:
        """The reader wants more after a pause, in which vLLM keeps cache and place: it goes on before who waits."""
        work.pause_after = pause_after
        if pause_after is not None and pause_after < work.num_tokens:
            work.piece_ends.appendleft(pause_after)
        work.num_before, work.num_left, work.is_resumed = work.num_reported, 1, True
        self._queue.appendleft(work)
        self._run_on()

    def drop(self, work: Work) -> None:
        """Nobody waits for it any more; a step under way is not undone."""
        work.is_dropped = True
        self._leave(work)
        if self._queue:
            self._run_on()

    def _leave(self, work: Work) -> None:
        self._decoding.discard(work)
        self._num_places_taken -= work.has_place
        work.has_place = False

    def _run_on(self) -> None:
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        """Consumes the queue; produces the works' news; waits out each step; stops when there is nothing to do."""
        loop = asyncio.get_running_loop()
        clock_s = loop.time()
        while True:
            prefilled, num_prefilled = self._admit()
            if not self._decoding and not num_prefilled:
                return  # or all places are taken by works that wait for their readers
            # One token after a pause takes what any decoded token takes.
            num_decoding, num_resumed = len(self._decoding), sum(work.is_resumed for work in prefilled)
            num_prefilled -= num_resumed
            step_s = self._speeds.step_s(num_decoding + num_resumed, num_prefilled)
            clock_s += step_s
            await asyncio.sleep(max(0.0, clock_s - loop.time()))
            self._busy_s += step_s
            self._num_prefilled += num_prefilled
            self._num_generated += num_decoding + sum(work.needs_row is None for work in prefilled)
            self._step += 1
            self._end_step(prefilled)

    def _admit(self) -> tuple[list[Work], int]:
        """The works whose prefill ends with the next step, and all tokens prefilled in it."""
        prefilled: list[Work] = []
        num_free = self._speeds.step_tokens - len(self._decoding)
        num_taken = 0
        while self._queue and num_taken < num_free:
            work = self._queue[0]
            if work.is_dropped:
                self._queue.popleft()
                continue
            if not work.has_place:
                if self._num_places_taken >= self._max_num_seqs:
                    break
                work.has_place = True
                self._num_places_taken += 1
                self._look_up(work)
            num_now = min(work.num_left, num_free - num_taken)
            work.num_left -= num_now
            num_taken += num_now
            if work.num_left:
                break
            prefilled.append(self._queue.popleft())
        return prefilled, num_taken

    def _look_up(self, work: Work) -> None:
        """How much of the text has to be prefilled: at least its last token, and the rows that a read needs.

        As vLLM does: a read whose first row lies in cached blocks is done again without the cache.
        """
        work.hashes = self.cache.hashes(work.text)
        num_cached = self.cache.num_cached(work.hashes[: (work.text.size - 1) // self._speeds.block_tokens])
        if work.needs_row is not None and num_cached >= work.needs_row:
            num_cached = 0
        self._num_cached += num_cached
        work.num_left = work.text.size - num_cached
        self.cache.add(work.hashes, num_cached // self._speeds.block_tokens)

    def _end_step(self, prefilled: list[Work]) -> None:
        """The last prefilled token gives the first written one; others write one each a step."""
        for work in prefilled:
            if not work.is_dropped:
                work.first_step = self._step
                self._decoding.add(work)
                self._await_piece(work)
        while self._events and self._events[0][0] <= self._step:
            _, _, work = heapq.heappop(self._events)
            if work.is_dropped:
                continue
            work.num_reported = work.num_before + self._step - work.first_step + 1
            work.news.set()
            if work.num_reported == work.num_tokens:
                self._leave(work)
            elif work.num_reported == work.pause_after:
                self._decoding.discard(work)
            else:
                self._await_piece(work)

    def _await_piece(self, work: Work) -> None:
        step = work.first_step + work.piece_ends.popleft() - work.num_before - 1
        heapq.heappush(self._events, (step, next(self._event_numbers), work))
