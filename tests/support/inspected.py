"""A folder of runs as the system writes it, and a live run over scripted engines, for the inspector to serve."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from transformers import AutoTokenizer

from common.config import AdaSwitch, Sampling, Trace
from rollout_server.engines.scripted import HashedScript, ScriptedEngine
from rollout_server.inspector.live import RunNotLive
from rollout_server.inspector.live_records import LivePiece, LiveRequest
from rollout_server.live_writer import LiveWriter
from rollout_server.rollouts import LiveContext, RolloutSpec
from rollout_server.traces.writer import TraceWriter
from tests.support.sequences import make_sequence

STUDENT_MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "models" / "student"
CONFIG = """policy:
  type: adaswitch  # file
  multiplier: 3.0
  window: 3
  floor: 0.0
  divergence: {type: forward_kl}
engines: {top_logprobs: 8}
"""
HOSTILE = '<script>alert("1")</script>\'; DROP TABLE sequences; -- ../..'


def decode(ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in ids)


def texts(ids: list[int]) -> list[str]:
    return [f"t{i}" for i in ids]


def write_runs(runs: Path) -> None:
    """``demo``, of three steps; one with a hostile name and hostile texts; a folder that is no run."""
    demo = runs / "demo"
    writer = TraceWriter(demo / "traces", decode=decode, token_texts=texts, top_alternatives=3)
    (demo / "config.yaml").write_text(CONFIG)
    with (demo / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"time": 1.0, "step": 0, "evaluation/accuracy": 0.25}) + "\n")
        for step in (1, 2, 3):
            line = {"time": 1.0, "step": step, "train/loss_nats": 0.5 / step, "sync/weight_version": step}
            file.write(json.dumps(line) + "\n")
    for step in (1, 2, 3):
        writer.write_segment(
            step,
            [
                make_sequence(
                    prompt_id=f"p{step}-{i}",
                    num_tokens=12 + i,
                    switches=(5 + i,) if i % 2 == 0 else (),
                    seed=10 * step + i,
                    finish_reason="stop" if i != 1 else "length",
                )
                for i in range(4)
            ],
        )
    hostile = TraceWriter(runs / "[x] ' .. <b>" / "traces", decode=lambda _: HOSTILE, token_texts=texts)
    hostile.write_segment(0, [make_sequence(prompt_id=HOSTILE), make_sequence(prompt_id="=1+1/tokens/x")])
    (runs / "notes").mkdir()


class LiveHere:
    """One live run in this process, over scripted engines."""

    def __init__(self, writer: LiveWriter) -> None:
        self._writer = writer

    async def runs(self) -> list[str]:
        return ["demo"]

    async def generate(self, run: str | None, request: LiveRequest) -> AsyncGenerator[LivePiece, None]:
        if run not in (None, "demo"):
            raise RunNotLive(["demo"])
        async with aclosing(self._writer.write(request)) as pieces:
            async for piece in pieces:
                yield piece


def start_live_run(folder: Path) -> LiveHere:
    """``folder``: where nothing is written."""
    teacher = HashedScript(vocabulary_size=32, seed=1, eos_token_id=2)
    spec = RolloutSpec(
        policy=AdaSwitch(window=4, floor=0.1),
        sampling=Sampling(max_new_tokens=24, chunk_tokens=8),
        trace=Trace(),
        trace_folder=folder / "no-trace",
        top_logprobs=8,
        stop_token_ids=(2,),
    )
    student, teacher_engine = (ScriptedEngine(s, top_logprobs=8) for s in (teacher.student(seed=2), teacher))
    tokenizer = AutoTokenizer.from_pretrained(STUDENT_MODEL)
    context = LiveContext(max_model_len=128, prompts_as_chat=False)
    return LiveHere(LiveWriter(spec, context, student=student, teacher=teacher_engine, tokenizer=tokenizer))
