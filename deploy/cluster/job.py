"""Client side of a job on a running Ray cluster: log, status and stop.

Every wait here has a time-out, except the wait for a running job: a head node that loses power neither answers nor
closes connections.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol, cast

import aiohttp
import typer
from ray.job_submission import JobDetails, JobSubmissionClient
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_exponential

from common.errors import one_line

FAILURES = (OSError, RuntimeError, aiohttp.ClientError)
"""Errors that Ray's client raises without a usable reply. Errors of ``requests`` are OSErrors."""

_CONNECT_S = 10.0
_REOPEN_AFTER_S = 1.0
_LONGEST_PAUSE_S = 15.0
_QUIET_S = 300.0  # a log without output for this time is reopened, because its connection may be dead
_LAST_LINES_S = 20.0
_STOP_POLL_S = 0.5


class Jobs(Protocol):
    """The methods of Ray's client that are used."""

    def get_job_info(self, job_id: str) -> JobDetails: ...

    def tail_job_logs(self, job_id: str) -> AsyncGenerator[str, None]: ...


class JobClient(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client with a time-out, which Ray's own lacks. A time-out is one of ``FAILURES``."""

    def __init__(self, address: str, *, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        super().__init__(address)

    def asks_for_token(self) -> bool:
        """Whether the cluster requires a token. Otherwise everyone who can reach it can run code there."""
        answer = self._do_request("GET", "/api/authentication_mode")
        return not answer.ok or answer.json()["authentication_mode"] != "disabled"

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=(_CONNECT_S, self._timeout_s), **options)


async def follow(jobs: Jobs, job_id: str, *, ask_every_s: float = 60.0, patience_s: float = 300.0) -> int:
    """Copy the job's log to stdout until the job has ended, however long that takes. Returns the run's exit code.

    The status is polled every ``ask_every_s`` and when the log closes, because Ray also closes the log of running
    jobs. Raises one of ``FAILURES`` if the cluster has not answered for ``patience_s``.
    """
    log = _Log(jobs, job_id)
    copying: asyncio.Task[None] | None = None
    try:
        while not (job := await _details(jobs, job_id, patience_s)).status.is_terminal():
            if copying is None or copying.done():
                copying = asyncio.create_task(log.copy(_QUIET_S))
            await asyncio.wait({copying}, timeout=ask_every_s)
            if copying.done():
                await asyncio.sleep(_REOPEN_AFTER_S)  # the log may end a moment before the job
    finally:
        if copying is not None:
            copying.cancel()
            await asyncio.wait({copying})
    await log.copy(_LAST_LINES_S)
    typer.echo(f"job {job_id}: {job.status.lower()}", err=True)
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return 130
    if job.driver_exit_code is None:  # the driver never ran
        typer.echo(job.message, err=True)
    return job.driver_exit_code or 1


def stop(jobs: JobClient, job_id: str, *, within_s: float = 25.0) -> str:
    """Stop the job, wait for its end and return its status. Raises one of ``FAILURES`` if it does not end in time."""
    deadline_s = time.monotonic() + within_s
    jobs.stop_job(job_id)
    while not (status := jobs.get_job_info(job_id).status).is_terminal():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the job did not end within {within_s:g} s")
        time.sleep(_STOP_POLL_S)
    return str(status)


async def _details(jobs: Jobs, job_id: str, patience_s: float) -> JobDetails:
    """The job's status. Retries on failure. The first failure is printed, the last one is raised."""

    def report(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            assert state.outcome is not None
            typer.echo(f"no answer from the cluster ({one_line(state.outcome.exception())}); trying again", err=True)

    retrying = AsyncRetrying(
        retry=retry_if_exception_type(FAILURES),
        wait=wait_exponential(max=_LONGEST_PAUSE_S),
        stop=stop_after_delay(patience_s),
        before_sleep=report,
        reraise=True,
    )
    return cast(JobDetails, await retrying(asyncio.to_thread, jobs.get_job_info, job_id))


class _Log:
    """Copies a job's log to stdout. Each character is printed once, although a reopened log starts at its beginning."""

    def __init__(self, jobs: Jobs, job_id: str) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self._num_shown = 0  # characters printed so far
        self._is_reported = False

    async def copy(self, quiet_s: float) -> None:
        """Print new output until the log closes, fails, or is silent for ``quiet_s``. Reports the first failure."""
        num_seen = 0
        try:
            async with aclosing(self._jobs.tail_job_logs(self._job_id)) as log:
                while True:
                    async with asyncio.timeout(quiet_s):
                        lines = await anext(log)
                    num_seen += len(lines)
                    if num_seen > self._num_shown:
                        print(lines[-(num_seen - self._num_shown) :], end="", flush=True)
                        self._num_shown = num_seen
        except (StopAsyncIteration, TimeoutError):
            return
        except FAILURES as error:
            if not self._is_reported:
                typer.echo(f"the job's log was interrupted ({one_line(error)}); opening it again", err=True)
            self._is_reported = True
