"""A run from its configuration to its summary. Wires preflight, cluster, loop, run folder and display together."""

import asyncio
import signal
import time
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from common.config_source import ResolvedConfig
from common.errors import UserError
from deploy.cluster import joined
from deploy.preflight import prepare
from deploy.provenance import hardware, write_versions
from deploy.run_folder import RunFolder, metrics_of, summarise_run
from deploy.terminal import ProgressDisplay, StepLine, print_summary
from deploy.trackers import Trackers
from rollout_server.engine import EngineFacts
from trainer.evaluate import EvaluationReport, evaluate
from trainer.loop import Evaluated, Trained, distill

T = TypeVar("T")


def train(resolved: ResolvedConfig) -> None:
    """Run the whole distillation and print its summary."""
    print_summary(_run(_train(resolved)))


def evaluate_student(resolved: ResolvedConfig) -> None:
    """Measure ``models.student`` on the held-out prompts and print accuracy and divergence."""
    report = _run(_evaluate(resolved))
    print_summary({"student": resolved.config.models.student, **asdict(report)})


async def _train(resolved: ResolvedConfig) -> dict[str, object]:
    config = resolved.config
    started_s = time.perf_counter()
    inputs = prepare(config)
    folder = RunFolder.create(config.run_dir, resolved)
    records: list[Trained | Evaluated] = []
    write_versions(folder.path)
    with Trackers.open(config, folder.path) as trackers, ProgressDisplay(config.trainer.num_steps) as display:
        display.note(f"run folder {folder.path}; {hardware()}")
        display.note("starting the engines and the learner")
        async with joined(config) as cluster:
            learner_actor = cluster.spawn_learner()
            pair = await cluster.start_pair(inputs, folder)
            learner = await cluster.connect_learner(learner_actor, pair)
            display.note(f"student {_describe(pair.student_facts)}; teacher {_describe(pair.teacher_facts)}")
            steps = distill(
                config.trainer,
                prompts=inputs.prompts,
                rollouts=pair.rollouts,
                learner=learner,
                held_out=inputs.held_out,
                num_probe_prompts=config.sync.num_probe_prompts,
            )
            async for record in steps:
                records.append(record)
                folder.append_metrics(metrics_of(record))
                trackers.log(metrics_of(record))
                _show(display, record)
            display.note("saving the student")
            await learner.save(folder.student)
    summary = summarise_run(records, run_dir=folder.path, seconds=time.perf_counter() - started_s)
    folder.write_summary(summary)
    return summary


async def _evaluate(resolved: ResolvedConfig) -> EvaluationReport:
    config = resolved.config
    inputs = prepare(config)
    if inputs.held_out is None:
        raise UserError("evaluation: missing, expected the held-out data to evaluate on")
    prompts = inputs.held_out.prompts
    with ProgressDisplay(0) as display:
        display.note("starting the engines")
        async with joined(config) as cluster:
            pair = await cluster.start_pair(inputs, RunFolder(Path(config.run_dir)))
            display.note(f"evaluating {config.models.student} on {len(prompts)} prompts")
            sequences = await pair.rollouts.evaluate(prompts)
    return evaluate(sequences, inputs.held_out.answer_pattern, inputs.held_out.decode)


def _describe(engine: EngineFacts) -> str:
    return f"in {engine.dtype}, {engine.max_model_len} tokens of context, top {engine.top_logprobs} log-probs"


def _show(display: ProgressDisplay, record: Trained | Evaluated) -> None:
    if isinstance(record, Evaluated):
        report = record.report
        accuracy = "" if report.accuracy is None else f"accuracy {report.accuracy:.3f}  "
        divergence = "" if report.mean_divergence is None else f"divergence {report.mean_divergence:.4f} nats"
        display.note(f"held out after {record.step} steps: {accuracy}{divergence}")
        return
    display.step(
        StepLine(
            step=record.step,
            loss=record.training.loss,
            switch_rate=record.rollout.switch_rate,
            teacher_share=record.rollout.teacher_token_share,
            tokens_per_s=record.rollout.num_tokens / record.rollout.seconds,
            rollout_s=record.rollout.seconds,
            train_s=record.training.seconds,
            sync_s=record.sync.seconds,
            probe=record.sync.probe.max_difference,
        )
    )


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end. SIGTERM, as a job's stop sends it, ends the run as Ctrl-C does: actors are ended first."""

    async def until_told_to_stop() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(until_told_to_stop())
    except asyncio.CancelledError as error:
        raise KeyboardInterrupt from error
