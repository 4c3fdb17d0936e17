"""A job followed through the failures of the way to it; ``test_submit`` follows jobs of a real cluster."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import aiohttp
import pytest
import ray
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.job_submission import JobStatus

from deploy.cluster.job import FAILURES, JobClient, follow

RUNNING, FAILED = JobStatus.RUNNING, JobStatus.FAILED


class Scripted:
    """Answers in turn, the last one for ever. An error among the answers is raised, "" is a log that stays quiet."""

    def __init__(self, states: list[JobStatus | Exception], logs: list[list[str | Exception]]) -> None:
        self._states = states
        self._logs = logs

    def get_job_info(self, job_id: str) -> JobDetails:
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        if isinstance(state, Exception):
            raise state
        return JobDetails(type=JobType.SUBMISSION, entrypoint="", status=state, driver_exit_code=3)

    async def tail_job_logs(self, job_id: str) -> AsyncGenerator[str, None]:
        for lines in self._logs.pop(0) if len(self._logs) > 1 else self._logs[0]:
            if isinstance(lines, Exception):
                raise lines
            if not lines:
                await asyncio.sleep(3600)
            yield lines


@pytest.mark.parametrize(
    "end",
    [
        [],
        [RuntimeError("WebSocket connection closed unexpectedly with close code 1006")],
        [aiohttp.ClientError("reset")],
        [ConnectionResetError()],
    ],
    ids=str,
)
async def test_a_log_that_ends_before_the_job_is_opened_again_and_shown_once(
    end: list[str | Exception], capsys
) -> None:
    logs = [["step 1\n", "ste", *end], ["step 1\nstep 2\n", "step 3\n"]]
    assert await follow(Scripted([RUNNING, RUNNING, FAILED], logs), "job") == 3
    assert capsys.readouterr().out == "step 1\nstep 2\nstep 3\n"


async def test_a_job_that_ends_behind_a_dead_log_is_seen_to_end_with_its_last_lines(capsys) -> None:
    jobs = Scripted([RUNNING, RUNNING, FAILED], [["step 1\n", ""], ["step 1\nthe end\n"]])
    assert await follow(jobs, "job", ask_every_s=0.1) == 3
    assert capsys.readouterr().out == "step 1\nthe end\n"


async def test_a_cluster_that_does_not_answer_for_a_while_is_asked_again(capsys) -> None:
    gone = ConnectionError("refused")
    assert await follow(Scripted([RUNNING, gone, gone, FAILED], [["step 1\n"]]), "job") == 3
    told = capsys.readouterr()
    assert told.out == "step 1\n"
    assert told.err.count("no answer from the cluster (refused)") == 1


async def test_a_cluster_that_does_not_answer_any_more_ends_the_following() -> None:
    with pytest.raises(ConnectionError, match="refused"):
        await follow(
            Scripted([RUNNING, ConnectionError("refused")], [["step 1\n", ""]]), "job", ask_every_s=0.1, patience_s=2
        )


def test_a_head_that_takes_connections_and_says_nothing_is_not_waited_for_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun_s = time.monotonic()
        with pytest.raises(FAILURES, match="timed out"):
            JobClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.5)
        assert time.monotonic() - begun_s < 5


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_cluster_that_asks_for_no_token_is_known(mode: str) -> None:
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            facts = {
                "/api/version": {"ray_version": ray.__version__},
                "/api/authentication_mode": {"authentication_mode": mode},
            }
            self.wfile.write(json.dumps(facts[self.path]).encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            client = JobClient(f"http://127.0.0.1:{server.server_port}")
            assert client.asks_for_token() == (mode == "token")
        finally:
            server.shutdown()
