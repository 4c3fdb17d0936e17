"""The models, the engines that run them, and how they write."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from common.config.part import Part, Positive, Seconds
from common.config.vllm_options import refusal, students_refusal

Gib = Annotated[float, Field(gt=0.0)]

OWN_GPU_SHARE = 0.9
"""What an engine uses of a GPU that it shares with no other actor."""


class Models(Part):
    """Which models. Each is a folder in Hugging Face format or a hub name."""

    student: str
    """The model that is trained."""
    teacher: str
    """The model that watches and takes over. Its tokenizer must agree with the student's."""


class EngineSettings(Part):
    """One role's vLLM engines. Anything not named here is vLLM's default."""

    num_replicas: Positive = 1
    """How many engines serve this role."""
    tensor_parallel_size: Positive = 1
    """GPUs per engine, over which each layer is split."""
    pipeline_parallel_size: Positive = 1
    """Groups of such GPUs per engine, over which the layers are divided."""
    enable_expert_parallel: bool = False
    """Give each GPU whole experts of a mixture-of-experts model instead of a slice of every expert."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on GPUs and on processors with AVX512-BF16; on GPUs without it float16, or float32 for models that
    overflow in that; else float32."""
    quantization: str | None = None
    """How the weights are quantized, in vLLM's terms (fp8, awq, gptq, ...). Default: what the model's config says. The
    student's can't be."""
    kv_cache_dtype: str = "auto"
    """What the key-value cache is stored in, in vLLM's terms (fp8, ...). auto: the engine's dtype."""
    max_model_len: Positive | None = None
    """Context, prompt and answer together. Default: what the model's own config says."""
    max_num_seqs: Positive = 64
    """Sequences one engine runs at once."""
    max_num_batched_tokens: Positive | None = None
    """Tokens one engine step computes at most. More scores faster and takes more memory. Default: on GPUs 8192, from 70
    GiB on 16384, less where scoring would take more than a tenth of the engine's memory; on processors the context,
    8192 at least."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of each GPU's memory that the engine may use, for scoring too. GPUs only. Default: 0.9 of a GPU of its own;
    on a shared one what the memory plan gives it."""
    gpu_memory_gib: Gib | None = None
    """The same in GiB; it comes before the share. GPUs only."""
    kv_cache_gib: Gib | None = None
    """GiB for the key-value cache of one GPU. Default: on processors 1, on GPUs what weights and activations leave of
    the engine's memory."""
    attention_backend: str | None = None
    """vLLM's name of the attention kernels (FLASH_ATTN, FLASHINFER, TRITON_ATTN, ...). Default: vLLM's choice."""
    num_threads: Positive = 1
    """OpenMP threads of one engine. Processors only."""
    cpu_cores: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Cores that vLLM's own processes keep to, so that the roles don't compute on the same ones. Default: any. The
    process that feeds them, with vLLM's front end, may run elsewhere, as it does beside a GPU.
    """
    enforce_eager: bool = False
    """Skip graph capture: starts sooner, decodes slower on GPUs."""
    vllm: dict[str, JsonValue] = Field(default={})
    """Any other argument of vLLM's engine, by its name there. Checked against vLLM's own names at the start."""

    @model_validator(mode="after")
    def _vllm_has_no_argument_that_is_ours(self) -> Self:
        if (reason := refusal(self.vllm)) is not None:
            raise ValueError(reason)
        return self

    @property
    def num_gpus(self) -> int:
        """GPUs of one engine, which is as many processes of vLLM's. All of them are on one machine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class Engines(Part):
    """The two roles' engines and what they return."""

    student: EngineSettings = EngineSettings()
    teacher: EngineSettings = EngineSettings()
    top_logprobs: Positive = 64
    """k: log-probs per position from both engines, for the divergence and for the loss. At most the vocabulary."""
    start_timeout_s: Seconds = 900.0
    """How long an engine may take to start and pass its self-test."""
    call_timeout_s: Seconds = 300.0
    """How long an engine may leave all its calls without news. One that waits for others to end may wait longer, up to
    trainer.step_timeout_s for a step's next sequence."""
    trust_remote_code: bool = False
    """Run code that ships inside a model's folder."""

    @model_validator(mode="after")
    def _the_student_is_not_quantized(self) -> Self:
        """It gets the weights in training, each step. What it writes and what is trained would be two models."""
        if self.student.quantization is not None:
            raise ValueError(
                "student.quantization must be null: its weights are those in training, as they are; quantize the "
                f"teacher, got {self.student.quantization}"
            )
        if (reason := students_refusal(self.student.vllm)) is not None:
            raise ValueError(f"student.{reason}")
        return self


class Sampling(Part):
    """How both models write."""

    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    """0 is greedy. 2 is vLLM's limit."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_new_tokens: Positive = 512
    """Student and teacher tokens together."""
    chunk_tokens: Positive = 32
    """Most student tokens that are judged together; policies that switch often judge sooner.
    Changes speed and waste, never the result. Best a multiple of vLLM's key-value block, 16 tokens: what is read up
    to a block's end is read once. About a quarter of the usual run to a switch wastes little."""
    max_in_flight: Positive = 256
    """Sequences one rollout actor works on at once."""
