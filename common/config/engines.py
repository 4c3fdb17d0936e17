"""The models, the engines that run them, and their sampling settings."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from common.config.part import Part, Positive, Seconds
from common.config.vllm_options import refusal, students_refusal

Gib = Annotated[float, Field(gt=0.0)]

OWN_GPU_SHARE = 0.9
"""Fraction of a GPU's memory that an engine uses if it shares the GPU with no other actor."""


class Models(Part):
    """The two models. Each is a folder in Hugging Face format or a hub name."""

    student: str
    """The model that is trained."""
    teacher: str
    """The model that scores the student's tokens and takes over. Its tokenizer must match the student's."""


class EngineSettings(Part):
    """The vLLM engines of one role. Arguments without a setting here keep vLLM's default."""

    num_replicas: Positive = 1
    """Number of engines of this role."""
    tensor_parallel_size: Positive = 1
    """Number of GPUs per engine over which each layer is split."""
    pipeline_parallel_size: Positive = 1
    """Number of pipeline stages per engine, over which the layers are divided; each has tensor_parallel_size GPUs."""
    enable_expert_parallel: bool = False
    """Give each GPU whole experts of a mixture-of-experts model instead of a slice of every expert."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on GPUs that support it and on CPUs with AVX512-BF16. Other GPUs use float16, or float32 for
    models that overflow in float16. Other CPUs use float32."""
    quantization: str | None = None
    """vLLM's name of the weight quantization (fp8, awq, gptq, ...). Default: as in the model's config. Not available
    for the student."""
    kv_cache_dtype: str = "auto"
    """vLLM's name of the KV cache's data type (fp8, ...). auto: the engine's dtype."""
    max_model_len: Positive | None = None
    """Maximum length of prompt and answer together. Default: as in the model's config."""
    max_num_seqs: Positive = 64
    """Maximum number of sequences that one engine processes at once."""
    max_num_batched_tokens: Positive | None = None
    """Maximum number of tokens per engine step. A higher value scores faster and uses more memory. Default on GPUs:
    8192, or 16384 with at least 70 GiB, less if scoring would use more than a tenth of the engine's memory. Default on
    CPUs: the maximum length of a sequence, at least 8192."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Fraction of each GPU's memory that the engine may use, including for scoring. GPUs only. Default: 0.9 if the GPU
    is not shared, else the value from the memory plan."""
    gpu_memory_gib: Gib | None = None
    """The same limit in GiB. It takes precedence over gpu_memory_utilization. GPUs only."""
    kv_cache_gib: Gib | None = None
    """GiB for the KV cache on one GPU. Default: 1 on CPUs; on GPUs, the part of the engine's memory that weights and
    activations don't use."""
    attention_backend: str | None = None
    """vLLM's name of the attention backend (FLASH_ATTN, FLASHINFER, TRITON_ATTN, ...). Default: vLLM's choice."""
    num_threads: Positive = 1
    """OpenMP threads per engine. CPUs only."""
    cpu_cores: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """CPU cores on which vLLM's worker processes run, so that the roles don't compute on the same cores. Default: any
    core. The process with vLLM's front end, which feeds the workers, may run on other cores, as it does with a GPU."""
    enforce_eager: bool = False
    """Skip CUDA graph capture. Starts sooner and decodes slower on GPUs."""
    vllm: dict[str, JsonValue] = Field(default={})
    """Any other argument of vLLM's engine, by its name in vLLM. The names are checked when the run starts."""

    @model_validator(mode="after")
    def _vllm_arguments_are_allowed(self) -> Self:
        if (reason := refusal(self.vllm)) is not None:
            raise ValueError(reason)
        return self

    @property
    def num_gpus(self) -> int:
        """GPUs of one engine, all on one machine. vLLM runs one worker process per GPU."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class Engines(Part):
    """The engines of both roles and the settings that they share."""

    student: EngineSettings = EngineSettings()
    teacher: EngineSettings = EngineSettings()
    top_logprobs: Positive = 64
    """k: number of log-probs per position that both engines return, for the divergence and for the loss. At most the
    vocabulary size."""
    start_timeout_s: Seconds = 900.0
    """Maximum time for an engine to start and pass its self-test."""
    call_timeout_s: Seconds = 300.0
    """Maximum time without any news from an engine that has calls. A call that waits for others to end may wait longer,
    up to trainer.step_timeout_s for a step's next sequence."""
    trust_remote_code: bool = False
    """Allow code from a model's folder to run."""

    @model_validator(mode="after")
    def _the_student_is_not_quantized(self) -> Self:
        """The student engine receives the trained weights at each step. If it quantized them, it would sample from a
        different model than the one that is trained.
        """
        if self.student.quantization is not None:
            raise ValueError(
                "student.quantization must be null: the student engine must use the trained weights unchanged; "
                f"quantize the teacher, got {self.student.quantization}"
            )
        if (reason := students_refusal(self.student.vllm)) is not None:
            raise ValueError(f"student.{reason}")
        return self


class Sampling(Part):
    """Sampling settings of both models."""

    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    """0 is greedy decoding. vLLM allows at most 2."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_new_tokens: Positive = 512
    """Maximum number of new tokens per sequence, student and teacher tokens together."""
    chunk_tokens: Positive = 32
    """Maximum number of student tokens that are scored together. Policies that switch often score sooner. Affects speed
    and the number of wasted tokens, never the result. A multiple of vLLM's KV cache block size (16 tokens) is best,
    because only full blocks are cached and not computed again. About a quarter of the usual distance to a switch wastes
    few tokens."""
    max_in_flight: Positive = 256
    """Maximum number of sequences that one rollout actor works on at once."""
