"""The whole tree, and where Ray puts what it describes."""

from typing import Literal, Self

from pydantic import model_validator

from common.config.data import Data, Evaluation
from common.config.engines import Engines, Models, Sampling
from common.config.part import Part, Seconds
from common.config.policies import SKD, AdaSwitch, Dataset, Mixture, Policy, Relay
from common.config.recording import Checkpoints, Logging, Storage, Trace
from common.config.supervision import Supervision
from common.config.training import Sync, Trainer


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
    """How long to wait for the resources; also for others in place of a lost node's."""


class RunConfig(Part):
    """A whole run."""

    run_dir: str
    """Folder for the trace, the weights, the checkpoints and the summary. Where it holds a run already, -2, -3, ... is
    added."""
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

    @model_validator(mode="after")
    def _ipc_stays_on_one_gpu(self) -> Self:
        student = self.engines.student
        num_gpus = student.num_replicas * student.tensor_parallel_size * student.pipeline_parallel_size
        if self.sync.backend == "ipc" and (num_gpus > 1 or self.trainer.num_ranks > 1):
            raise ValueError(
                "sync.backend must not be ipc unless one student engine on one GPU and one rank of the learner share "
                f"that GPU, got {num_gpus} GPUs of engines.student and trainer.num_ranks {self.trainer.num_ranks}"
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
