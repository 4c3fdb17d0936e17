"""The learner, and the weight sync to the student engines."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.config.divergences import ForwardKL, Loss
from common.config.part import Fraction, Part, Positive, Seconds, Weight


class LoRA(Part):
    """Train low-rank adapters on the student's linear layers instead of all its weights (arXiv 2106.09685).

    Engines and the saved student get the merged weights. Adapters need about ten times the learning rate of full
    training. There is no dropout, because the student that is trained must be the one that the engine samples from.
    """

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """The adapter adds alpha / rank times B A to a weight."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of linear layers, such as [q_proj, v_proj]. all-linear: every linear layer except the output layer, which
    can't have an adapter."""


class Trainer(Part):
    """The learner: AdamW with linear warm-up, constant, then linear decay to 0."""

    num_steps: Positive = 100
    prompts_per_step: Positive = 64
    samples_per_prompt: Positive = 1
    max_staleness: Literal[0, 1] = 0
    """Maximum number of weight versions by which the student that generated a sequence may be older than the student
    that is trained on it. 0: strictly on-policy. 1: the next step's sequences are collected while this one trains,
    never more than one step ahead."""
    loss: Loss = ForwardKL()
    """Computed on the teacher's top k and one bucket for the rest; a weighted mean over all tokens of a step."""
    student_token_weight: Weight = 1.0
    """Weight of the student's tokens in that mean. Only the ratio of the weights matters."""
    teacher_token_weight: Weight = 1.0
    """Weight of the teacher's tokens. If all tokens of a step have weight 0, its loss is 0."""
    dataset_token_weight: Weight = 1.0
    """Weight of dataset answers' tokens. Other tokens occur beside them only with policy.type mixture, rest dataset."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-5
    """Peak learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_fraction: Fraction = 0.0
    """Fraction of the steps, at the end, over which the learning rate falls to 0."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    lora: LoRA | None = None
    """Default: all weights are trained, without adapters."""
    num_ranks: Positive = 1
    """Number of processes over which model, optimizer and sequences are split (FSDP2), each on a GPU of its own if
    there are GPUs. The gradient is the same for any number."""
    tokens_per_micro_batch: Positive = 16384
    """Maximum number of tokens, prompts and padding included, in one forward pass on one rank."""
    packing: Literal["auto", True, False] = "auto"
    """Concatenate sequences in one row, without padding and without attention between them. auto: if flash attention is
    installed and dtype is bfloat16; otherwise the attention mask costs more than padding."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the layer again in the backward pass: less memory, more time."""
    positions_per_chunk: Positive = 1024
    """Number of positions whose full-vocabulary logits are in memory at the same time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation. Master weights and optimizer state are float32."""
    num_threads: Positive = 2
    """Number of torch threads. CPUs only."""
    step_timeout_s: Seconds = 1800.0

    @model_validator(mode="after")
    def _some_token_has_weight(self) -> Self:
        if self.student_token_weight == self.teacher_token_weight == 0.0:
            raise ValueError("teacher_token_weight must be > 0 if student_token_weight is 0, got 0")
        return self

    @model_validator(mode="after")
    def _an_adapter_is_on_one_rank(self) -> Self:
        if self.lora is not None and self.num_ranks > 1:
            raise ValueError(f"num_ranks must be 1 if lora is set, got {self.num_ranks}")
        return self


class Sync(Part):
    """How the student engines get new weights."""

    backend: Literal["auto", "host_memory", "ipc", "nccl"] = "auto"
    """auto: nccl if learner and student engines have GPUs of their own, else host_memory (shared memory of one
    machine). ipc: CUDA IPC between two processes that share a GPU."""
    timeout_s: Seconds = 600.0
    probe_tolerance: Annotated[float, Field(gt=0.0)] | None = None
    """Nats. The run stops if learner and engine differ by more than this, as the root mean square over the probe's
    log-probs. Default: if the engine computes in float32, 1e-3 for each log-prob, else four times the difference before
    the first step. For any value, the run also stops if an engine did not take the weights of a step."""
    num_probe_prompts: Positive = 4
