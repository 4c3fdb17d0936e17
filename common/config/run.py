"""The whole configuration, and the placement of a run's actors."""

from typing import Literal, Self

from pydantic import model_validator

from common.config.data import Data, Evaluation
from common.config.engines import Engines, EngineSettings, Models, Sampling
from common.config.part import Part, Seconds
from common.config.policies import SKD, AdaSwitch, Dataset, Mixture, Policy, Relay
from common.config.recording import Checkpoints, Logging, Storage, Trace
from common.config.supervision import Supervision
from common.config.training import Sync, Trainer

Layout = Literal["one_gpu", "shared_student", "spread"]
"""How a run's actors are placed on GPUs."""
LAYOUTS: tuple[Layout, ...] = ("spread", "shared_student", "one_gpu")
"""All layouts, the one with the most GPUs first."""


class Placement(Part):
    """Where Ray places the actors, and which of them share a GPU."""

    address: str | None = None
    """A running cluster. Default: the cluster of RAY_ADDRESS or of the current job, else a new one on this machine."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    use_gpus: Literal["auto", True, False] = "auto"
    """auto: use GPUs if the cluster has any and the installed torch and vLLM are CUDA builds."""
    layout: Literal["auto", "one_gpu", "shared_student", "spread"] = "auto"
    """one_gpu: teacher, student and learner share one GPU. shared_student: student and learner share one GPU, each
    teacher engine has its own. spread: each engine and each rank of the learner has its own. auto: the first of spread,
    shared_student and one_gpu for which the cluster has enough GPUs with enough memory; the log names it."""
    timeout_s: Seconds = 300.0
    """How long to wait for the resources, also for replacements when a node is lost."""


class RunConfig(Part):
    """The configuration of a run."""

    run_dir: str
    """Folder for the trace, the weights, the checkpoints and the summary. -2, -3, ... is appended if it holds a run."""
    seed: int = 0
    models: Models
    engines: Engines = Engines()
    policy: Policy = AdaSwitch()
    sampling: Sampling = Sampling()
    data: Data
    evaluation: Evaluation | None = None
    trainer: Trainer = Trainer()
    sync: Sync = Sync()
    checkpoints: Checkpoints = Checkpoints()
    supervision: Supervision = Supervision()
    trace: Trace = Trace()
    storage: Storage = Storage()
    logging: Logging = Logging()
    placement: Placement = Placement()

    @model_validator(mode="after")
    def _the_layout_is_possible(self) -> Self:
        if self.placement.layout != "auto" and (conflict := self.layout_conflict(self.placement.layout)) is not None:
            raise ValueError(conflict)
        return self

    def layout_conflict(self, layout: Layout) -> str | None:
        """The error for the first setting that is incompatible with this layout; None if there is none."""
        if layout == "spread":
            shared = "sync.backend must not be ipc if placement.layout is spread, which shares no GPU, got ipc"
            return shared if self.sync.backend == "ipc" else None
        alone = {"trainer.num_ranks": self.trainer.num_ranks}
        for role in ("student", "teacher") if layout == "one_gpu" else ("student",):
            settings: EngineSettings = getattr(self.engines, role)
            for name in ("num_replicas", "tensor_parallel_size", "pipeline_parallel_size"):
                alone[f"engines.{role}.{name}"] = getattr(settings, name)
        for key, number in alone.items():
            if number > 1:
                return f"{key} must be 1 if placement.layout is {layout}, got {number}"
        if self.sync.backend == "nccl":
            return f"sync.backend must not be nccl if placement.layout is {layout}, which shares a GPU, got nccl"
        return None

    @model_validator(mode="after")
    def _ipc_stays_on_one_gpu(self) -> Self:
        student = self.engines.student
        num_gpus = student.num_replicas * student.tensor_parallel_size * student.pipeline_parallel_size
        if self.sync.backend == "ipc" and (num_gpus > 1 or self.trainer.num_ranks > 1):
            raise ValueError(
                "sync.backend must not be ipc unless one student engine and one rank of the learner share one GPU, "
                f"got {num_gpus} GPUs of engines.student and trainer.num_ranks {self.trainer.num_ranks}"
            )
        return self

    @property
    def takes_given_answers(self) -> bool:
        """Whether dataset answers are trained on."""
        return isinstance(self.policy, Dataset) or (isinstance(self.policy, Mixture) and self.policy.rest == "dataset")

    @model_validator(mode="after")
    def _dataset_answers_have_a_column(self) -> Self:
        if self.takes_given_answers and not self.data.has_answers:
            raise ValueError(
                f"data.answer_field must name the column with the answers that policy.type {self.policy.type} trains "
                "on, got null"
            )
        if isinstance(self.policy, Dataset) and self.trainer.dataset_token_weight == 0.0:
            raise ValueError("trainer.dataset_token_weight must be > 0 if policy.type is dataset, got 0")
        return self

    @model_validator(mode="after")
    def _lists_are_long_enough(self) -> Self:
        if isinstance(self.policy, SKD | Relay) and self.policy.top_k > self.engines.top_logprobs:
            raise ValueError(
                f"policy.top_k must be <= engines.top_logprobs ({self.engines.top_logprobs}), got {self.policy.top_k}"
            )
        return self
