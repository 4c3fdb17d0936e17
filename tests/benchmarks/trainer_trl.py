"""Steps of TRL's DistillationTrainer, in a process of its own: TRL and the product share no thread pool and no cache.

    python -m tests.benchmarks.trainer_trl plan.json figures.json

Started by ``trainer_step``, which writes the plan and reads the figures. TRL generates with transformers, reads the
teacher in the training step and compares full distributions; the settings below make that step as fast as it gets here
(no gradient checkpointing, one micro-batch, float32 where bfloat16 is emulated).
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from tests.benchmarks.trainer_step import StepPlan


class _StepEnds(TrainerCallback):  # type: ignore[misc]
    """When each step was over."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times_s.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times_s.append(time.perf_counter())


def run(plan: StepPlan, scratch: Path) -> dict[str, Any]:
    """Seconds of every step, warm-up included, and the first loss."""
    torch.set_num_threads(plan.num_threads)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for model in (plan.student, plan.teacher)
    )
    ends = _StepEnds()
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=_config(plan, scratch),
        train_dataset=load_dataset("json", data_files=plan.prompts, split="train"),
        processing_class=_tokenizer_without_end(plan.student),
        callbacks=[ends],
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "step_seconds": [later - earlier for earlier, later in zip(ends.times_s, ends.times_s[1:], strict=False)],
        "mean_new_tokens": logs[-1]["completions/mean_length"],
        "first_loss_nats": logs[0]["loss"],
    }


def _config(plan: StepPlan, scratch: Path) -> DistillationConfig:
    return DistillationConfig(
        output_dir=str(scratch),
        beta=0.0,  # forward KL
        temperature=1.0,
        max_completion_length=plan.max_new_tokens,
        per_device_train_batch_size=plan.sequences_per_step,
        max_steps=plan.num_steps,
        shuffle_dataset=False,
        optim="adamw_torch",
        learning_rate=plan.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=plan.max_grad_norm,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _tokenizer_without_end(student: str) -> PreTrainedTokenizerBase:
    """TRL wants an end and a padding token. Theirs is an id past the vocabulary, which no model can write."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    return tokenizer


def main() -> None:
    plan_file, figures_file = map(Path, sys.argv[1:])
    plan = StepPlan(**json.loads(plan_file.read_text()))
    figures = run(plan, figures_file.parent / "trl")
    figures_file.write_text(json.dumps({**figures, "plan": asdict(plan)}))


if __name__ == "__main__":
    main()
