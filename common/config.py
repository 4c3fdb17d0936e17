"""RunConfig: every knob of a run, its default and its owner. Knows no one.

Each part is passed on its own to the code that owns it; nothing reads the whole tree but ``deploy/``. Frozen, unknown
keys refused, choices as unions on ``type``, so that a setting which means nothing for the chosen type can't be written.
Reading YAML and ``--set`` is ``common/config_source.py``.
"""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Threshold = Annotated[float, Field(ge=0.0, le=1e6)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0.0)]


class Part(BaseModel):
    """A frozen piece of the tree."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


# ---------------------------------------------------------------------------------------------------- divergences


class ForwardKL(Part):
    """KL(teacher || student), nats."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKL(Part):
    """KL(student || teacher), nats.

    As a loss it is known to be unstable where the list covers little of the teacher: what the student puts outside the
    list is judged as one bucket. ``train/covered_mass`` tells how much the list covers.
    """

    type: Literal["reverse_kl"] = "reverse_kl"


class JSD(Part):
    """Generalised Jensen-Shannon divergence, nats (GKD, arXiv 2306.13649, eq. 2).

    As a loss it holds a reverse KL, and with it the same weakness where the list covers little.
    """

    type: Literal["jsd"] = "jsd"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Weight of the teacher in the mixture."""


class SkewedKL(Part):
    """KL(teacher || alpha teacher + (1 - alpha) student), nats (DistiLLM, arXiv 2402.03898).

    At most log(1 / alpha), whatever the student does: no single token can rule the gradient.
    """

    type: Literal["skewed_kl"] = "skewed_kl"
    alpha: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Weight of the teacher in the mixture."""


class TVD(Part):
    """Total variation distance, half the sum of |teacher - student| (f-distill, arXiv 2307.15190).

    Not nats but a probability, 0 to 1. Where it is chosen, thresholds and reported values are probabilities too.
    """

    type: Literal["tvd"] = "tvd"


class CrossEntropy(Part):
    """-log student(token), nats, on the sequence as it was written; the teacher's distribution is not looked at.

    A loss and no switch divergence. With the teacher writing everything it is sequence-level KD (arXiv 1606.07947).
    """

    type: Literal["cross_entropy"] = "cross_entropy"


Divergence = Annotated[ForwardKL | ReverseKL | JSD | SkewedKL | TVD, Field(discriminator="type")]
"""What may decide a switch."""

Loss = Annotated[ForwardKL | ReverseKL | JSD | SkewedKL | TVD | CrossEntropy, Field(discriminator="type")]
"""What may be trained on."""


# ------------------------------------------------------------------------------------------------- switch policies


class AdaSwitch(Part):
    """Take over, to the end, at the first divergence above a multiple of its moving average (arXiv 2510.07842)."""

    type: Literal["adaswitch"] = "adaswitch"
    multiplier: Annotated[float, Field(gt=0.0, le=1e6)] = 3.0
    """K: how many times the moving average a divergence must exceed."""
    window: Positive = 10
    """L: positions in the moving average. The paper's value is not public."""
    floor: Threshold = 0.0
    """Nats (for tvd a probability). The threshold is never lower, so that spikes which no longer matter stop causing
    switches."""
    warmup: Positive | None = None
    """First position that may switch. Default: window, the first one whose moving average is filled."""
    divergence: Divergence = ForwardKL()
    """What is compared with the threshold."""

    @model_validator(mode="after")
    def _warmup_fills_the_window(self) -> Self:
        if self.warmup is not None and self.warmup < self.window:
            raise ValueError(f"warmup must be >= window ({self.window}), got {self.warmup}")
        return self

    @property
    def first_position(self) -> int:
        """The first position that may switch."""
        return self.window if self.warmup is None else self.warmup


class SKD(Part):
    """Take one token where the student's is not in the teacher's top k (Speculative KD, arXiv 2410.11325)."""

    type: Literal["skd"] = "skd"
    top_k: Positive = 25
    """The student's token is kept when it is among this many of the teacher's best."""


class OnPolicy(Part):
    """The student writes everything (GKD with lambda = 1, arXiv 2306.13649)."""

    type: Literal["on_policy"] = "on_policy"


class OffPolicy(Part):
    """The teacher writes everything (sequence-level KD, arXiv 1606.07947)."""

    type: Literal["off_policy"] = "off_policy"


class Decay(Part):
    """Take one token where the Jensen-Shannon divergence exceeds a threshold that falls along the sequence, so that the
    teacher steps in more often the longer the text gets (SWITCH, arXiv 2410.19503).
    """

    type: Literal["decay"] = "decay"
    initial_threshold: Threshold = 0.3
    """tau_0, nats; a Jensen-Shannon divergence is at most log 2 = 0.69. Ours, not the paper's."""
    rate: Annotated[float, Field(ge=0.0, le=1e6)] = 0.01
    """lambda, per position: the threshold at position i is tau_0 exp(-lambda i). Ours, not the paper's."""


class Relay(Part):
    """As skd, but for a few tokens, and only a few times (Relay-OPD, arXiv 2607.26057)."""

    type: Literal["relay"] = "relay"
    top_k: Positive = 5
    """The student's token is kept when it is among this many of the teacher's best."""
    guidance_tokens: Positive = 16
    """Tokens the teacher writes before it hands back."""
    max_switches: Positive = 4
    """After this many the student is left alone."""


class Dataset(Part):
    """The given answers of ``data.answer_field`` are the sequences; the teacher only reads them.

    With trainer.loss cross_entropy it is supervised fine-tuning, with a divergence supervised KD (GKD with lambda = 0,
    arXiv 2306.13649).
    """

    type: Literal["dataset"] = "dataset"


class Mixture(Part):
    """Each sequence is either the student's or not (GKD, arXiv 2306.13649)."""

    type: Literal["mixture"] = "mixture"
    student_share: Fraction = 0.5
    """lambda: probability that the student writes a sequence, drawn from the sequence's own seed."""
    rest: Literal["teacher", "dataset"] = "teacher"
    """Whose the other sequences are: written by the teacher, or the given answers of data.answer_field."""


class Fixed(Part):
    """Take over, to the end, at one position: the control for adaswitch."""

    type: Literal["fixed"] = "fixed"
    position: Annotated[int, Field(ge=0)] = 16


Policy = Annotated[
    AdaSwitch | SKD | Decay | Relay | OnPolicy | OffPolicy | Dataset | Mixture | Fixed, Field(discriminator="type")
]


# ------------------------------------------------------------------------------------------------ models and engines


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
    """GPUs per engine."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on GPUs and on processors with AVX512-BF16, else float32."""
    max_model_len: Positive | None = None
    """Context, prompt and answer together. Default: what the model's own config says."""
    max_num_seqs: Positive = 64
    """Sequences one engine runs at once."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of a GPU's memory the engine may use. GPUs only."""
    kv_cache_gib: Annotated[float, Field(gt=0.0)] = 1.0
    """GiB for the key-value cache. Processors only; on GPUs gpu_memory_utilization decides."""
    num_threads: Positive = 1
    """OpenMP threads of one engine. Processors only."""
    enforce_eager: bool = False
    """Skip graph capture: starts sooner, decodes slower on GPUs."""


class Engines(Part):
    """The two roles' engines and what they return."""

    student: EngineSettings = EngineSettings()
    teacher: EngineSettings = EngineSettings()
    top_logprobs: Positive = 64
    """k: log-probs per position from both engines, for the divergence and for the loss. At most the vocabulary."""
    start_timeout_s: Seconds = 900.0
    """How long an engine may take to start and pass its self-test."""
    call_timeout_s: Seconds = 300.0
    """How long one call, or the next tokens of a stream, may take."""
    trust_remote_code: bool = False
    """Run code that ships inside a model's folder."""


class Sampling(Part):
    """How both models write."""

    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    """0 is greedy. 2 is vLLM's limit."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_new_tokens: Positive = 512
    """Student and teacher tokens together."""
    chunk_tokens: Positive = 32
    """Most student tokens that are judged together; policies that switch often judge sooner.
    Changes speed and waste, never the result. Best a multiple of vLLM's key-value block (16 on GPUs, 32 on processors):
    what is read up to a block's end is read once."""
    max_in_flight: Positive = 256
    """Sequences one rollout actor works on at once."""


# -------------------------------------------------------------------------------------------------------------- data


class Data(Part):
    """Prompts: a JSON, JSONL or Parquet file (or a glob of them), or a hub dataset's name.

    A row holds either plain text or chat messages; messages go through the tokenizer's chat template.
    """

    path: str
    """File, glob or hub name."""
    name: str | None = None
    """A hub dataset's configuration, as in ``load_dataset(path, name)``."""
    split: str = "train"
    prompt_field: str = "prompt"
    """Column with the text, or with a list of {role, content} messages."""
    as_chat: bool = False
    """Send plain text through the tokenizer's chat template too, as one user message."""
    answer_field: str | None = None
    """Column with the expected answer, for evaluation; what is trained on where the policy takes given answers."""
    id_field: str | None = None
    """Column with a unique id. Default: the row's number."""
    max_prompts: Positive | None = None
    """Use only the first n rows."""
    shuffle: bool = True
    """Visit the rows in an order drawn from the run's seed, anew each epoch."""


class Evaluation(Part):
    """Held-out accuracy and divergence, through the student engine, greedily."""

    data: Data
    every_steps: Positive = 20
    """Besides the first and the last weights, which are always evaluated."""
    answer_pattern: str = r"(.+)$"
    """Regular expression searched in the completion; its last match's last group is compared with the answer, or with
    what the same expression finds in the answer."""


# ----------------------------------------------------------------------------------------------------------- trainer


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
    loss: Loss = ForwardKL()
    """On the teacher's top k and one bucket for the rest; a weighted mean over all tokens of a step."""
    student_token_weight: Weight = 1.0
    """Weight of the tokens the student wrote in that mean. Only the ratio of the two weights matters."""
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

    @property
    def sequences_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt


class Sync(Part):
    """How new weights reach the student engines."""

    backend: Literal["auto", "host_memory", "nccl"] = "auto"
    """auto: nccl where the learner has a GPU of its own, else host_memory (shared memory of one machine)."""
    timeout_s: Seconds = 600.0
    probe_tolerance: Annotated[float, Field(gt=0.0)] | None = None
    """Nats. The run stops when trainer and engine differ by more on the probe prompts after a sync. Default: 1e-3 when
    both compute in float32, else 0.25."""
    num_probe_prompts: Positive = 4


class Trace(Part):
    """What is kept of every sequence."""

    enabled: bool = True
    top_alternatives: Annotated[int, Field(ge=0)] = 5
    """Alternatives of both models stored per token."""


class Wandb(Part):
    """A run of Weights & Biases. Its key is taken from WANDB_API_KEY or ``wandb login``, never from here."""

    project: str = "adaswitch"
    entity: str | None = None
    """User or team. Default: the one the key belongs to."""
    name: str | None = None
    """Default: the run folder's name."""
    mode: Literal["online", "offline"] = "online"
    """offline: kept in the run folder until ``wandb sync`` sends it."""


class MLflow(Part):
    """A run of an MLflow experiment. MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN let it in, never a setting."""

    tracking_uri: str | None = None
    """A server, or a file such as sqlite:///mlflow.db. Default: MLFLOW_TRACKING_URI, else MLflow's own."""
    experiment: str = "adaswitch"
    name: str | None = None
    """Default: the run folder's name."""

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        if self.tracking_uri is not None and "@" in urlsplit(self.tracking_uri).netloc:
            raise ValueError(
                "tracking_uri must not hold a user or a password, for it is stored with the run; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return self


class Logging(Part):
    """Where metrics go besides ``metrics.jsonl`` and the run folder's TensorBoard files, which are always written."""

    wandb: Wandb | None = None
    mlflow: MLflow | None = None


class Placement(Part):
    """Where Ray puts the actors: one bundle per engine, one per rank of the learner."""

    address: str | None = None
    """A running cluster. Default: the one RAY_ADDRESS names or a job runs in, else one is started on this machine."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    use_gpus: Literal["auto", True, False] = "auto"
    """auto: one GPU per tensor-parallel rank and one per rank of the learner where the cluster has any."""
    learner: Literal["own_gpu", "student_gpu"] = "own_gpu"
    """student_gpu: on the student engine's GPU, so that a run fits on two. Leave the learner its memory through
    engines.student.gpu_memory_utilization."""
    timeout_s: Seconds = 300.0
    """How long to wait for the resources."""


class RunConfig(Part):
    """A whole run."""

    run_dir: str
    """Folder for the trace, the weights and the summary. Must not hold another run."""
    seed: int = 0
    models: Models
    engines: Engines = Engines()
    policy: Policy = AdaSwitch()
    sampling: Sampling = Sampling()
    data: Data
    evaluation: Evaluation | None = None
    trainer: Trainer = Trainer()
    sync: Sync = Sync()
    trace: Trace = Trace()
    logging: Logging = Logging()
    placement: Placement = Placement()

    @model_validator(mode="after")
    def _a_shared_gpu_can_be_shared(self) -> Self:
        if self.placement.learner == "student_gpu":
            student = self.engines.student
            if student.tensor_parallel_size > 1 or student.num_replicas > 1:
                raise ValueError(
                    "placement.learner must be own_gpu where engines.student has several GPUs "
                    "(tensor_parallel_size, num_replicas), got student_gpu"
                )
            if self.sync.backend == "nccl":
                raise ValueError("sync.backend must not be nccl where placement.learner is student_gpu, got nccl")
            if self.trainer.num_ranks > 1:
                raise ValueError(
                    f"trainer.num_ranks must be 1 where placement.learner is student_gpu, got {self.trainer.num_ranks}"
                )
        return self

    @property
    def takes_given_answers(self) -> bool:
        """Whether answers of the data are trained on."""
        return isinstance(self.policy, Dataset) or (isinstance(self.policy, Mixture) and self.policy.rest == "dataset")

    @model_validator(mode="after")
    def _given_answers_are_given(self) -> Self:
        if self.takes_given_answers and self.data.answer_field is None:
            raise ValueError(
                f"data.answer_field must name the column with the answers that policy.type {self.policy.type} trains "
                "on, got null"
            )
        if isinstance(self.policy, Dataset) and self.trainer.dataset_token_weight == 0.0:
            raise ValueError("trainer.dataset_token_weight must be > 0 where policy.type is dataset, got 0")
        return self

    @model_validator(mode="after")
    def _lists_are_long_enough(self) -> Self:
        if isinstance(self.policy, SKD | Relay) and self.policy.top_k > self.engines.top_logprobs:
            raise ValueError(
                f"policy.top_k must be <= engines.top_logprobs ({self.engines.top_logprobs}), got {self.policy.top_k}"
            )
        return self
