"""The learner, and how its weights reach the student engines."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.config.divergences import ForwardKL, Loss
from common.config.part import Fraction, Part, Positive, Seconds, Weight


class LoRA(Part):
    """Train low-rank additions to the student's linear layers instead of all its weights (arXiv 2106.09685).

    Engines and the saved student get the sum of both. Adapters bear, and need, about ten times the learning rate of
    full training. No dropout: the student must be trained as the engine samples from it.
    """

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """What is added is alpha / rank times B A."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of linear layers, such as [q_proj, v_proj]; the output layer can't be one. all-linear: all others."""


class Trainer(Part):
    """The learner: AdamW with linear warm-up, constant, then linear decay to 0."""

    num_steps: Positive = 100
    prompts_per_step: Positive = 64
    samples_per_prompt: Positive = 1
    max_staleness: Literal[0, 1] = 0
    """Weight versions by which the student that wrote a sequence may be older than the one trained on it. 0: strictly
    on-policy. 1: the next step's sequences are collected while this one trains; never more than one step ahead."""
    loss: Loss = ForwardKL()
    """On the teacher's top k and one bucket for the rest; a weighted mean over all tokens of a step."""
    student_token_weight: Weight = 1.0
    """Weight of the tokens the student wrote in that mean. Only the ratio of the weights matters."""
    teacher_token_weight: Weight = 1.0
    """Weight of the tokens the teacher wrote. A step that has only tokens of weight 0 has loss 0."""
    dataset_token_weight: Weight = 1.0
    """Weight of the tokens of given answers; they meet others under policy.type mixture with rest dataset."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-5
    """Peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_fraction: Fraction = 0.0
    """The last share of the steps over which the learning rate falls to 0."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    lora: LoRA | None = None
    """Default: all weights are trained."""
    num_ranks: Positive = 1
    """Processes over which model, optimizer and sequences are split (FSDP2), each on a GPU of its own where there are
    any. The gradient is the same for any number."""
    tokens_per_micro_batch: Positive = 16384
    """Tokens, prompts and padding included, that pass through the model at once on one rank."""
    packing: Literal["auto", True, False] = "auto"
    """Sequences one behind the other in one row, without padding, none seeing another. auto: where flash attention is
    installed and dtype is bfloat16; elsewhere the mask costs more than padding does."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and compute the layer once more for the gradient: less memory, more time."""
    positions_per_chunk: Positive = 1024
    """Positions whose vocabulary-wide logits exist at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the compute; master weights and optimizer state are float32."""
    num_threads: Positive = 2
    """Torch threads. Processors only."""
    step_timeout_s: Seconds = 1800.0

    @model_validator(mode="after")
    def _some_token_counts(self) -> Self:
        if self.student_token_weight == self.teacher_token_weight == 0.0:
            raise ValueError("teacher_token_weight must be > 0 where student_token_weight is 0, got 0")
        return self

    @model_validator(mode="after")
    def _an_adapter_is_whole(self) -> Self:
        if self.lora is not None and self.num_ranks > 1:
            raise ValueError(f"num_ranks must be 1 where lora is set, got {self.num_ranks}")
        return self


class Sync(Part):
    """How new weights reach the student engines."""

    backend: Literal["auto", "host_memory", "ipc", "nccl"] = "auto"
    """auto: nccl where learner and student engines have GPUs of their own, else host_memory (shared memory of one
    machine). ipc: from process to process on a GPU that both share."""
    timeout_s: Seconds = 600.0
    probe_tolerance: Annotated[float, Field(gt=0.0)] | None = None
    """Nats. The run stops when trainer and engine differ by more, in the root mean square over the probe's log-probs.
    Default: 1e-3 for each of them when the engine computes in float32, else four times what they differ by before the
    first step. Whatever it is, an engine that did not follow a step is refused."""
    num_probe_prompts: Positive = 4
