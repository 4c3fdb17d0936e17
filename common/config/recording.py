"""What a run stores, and where its metrics are sent."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from common.config.part import Part, Positive, Seconds


class Trace(Part):
    """What is stored for every sequence."""

    enabled: bool = True
    top_alternatives: Annotated[int, Field(ge=0)] = 5
    """Number of alternative tokens of both models stored per token."""


class Checkpoints(Part):
    """Checkpoints in ``RUN/checkpoints``, from which a run can be resumed (``adaswitch train CONFIG --resume``)."""

    every_steps: Positive | None = 50
    """Number of steps between checkpoints; one is always written after the last step. null: no checkpoints, so the run
    can't be resumed."""
    keep_last: Positive = 2
    """Number of checkpoints to keep. Older ones are removed once a newer one is complete."""
    keep_best: bool = True
    """Also keep the checkpoint with the highest held-out accuracy, of the steps that are evaluated and checkpointed."""


class Storage(Part):
    """Where run folders are copied during the run, so that they can be read and resumed elsewhere."""

    url: str | None = None
    """A folder that fsspec can reach, such as s3://bucket/runs or gs://bucket/runs. The run's own folder is made in it,
    under the same name. Credentials come from the environment, never from this setting. Default: no copy."""
    timeout_s: Seconds = 600.0
    """Maximum time for one file, and for the copy to be completed after the run has ended."""

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        if self.url is not None and "@" in urlsplit(self.url).netloc:
            raise ValueError("url must not contain a user or a password, because it is stored with the run")
        return self


class Wandb(Part):
    """A run of Weights & Biases. Its key comes from WANDB_API_KEY or ``wandb login``, never from a setting."""

    project: str = "adaswitch"
    entity: str | None = None
    """User or team. Default: the one that the key belongs to."""
    name: str | None = None
    """Name of the run. Default: the run folder's name."""
    mode: Literal["online", "offline"] = "online"
    """offline: keep the data in the run folder until ``wandb sync`` sends it."""


class MLflow(Part):
    """A run of an MLflow experiment. Its credentials are MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN, never a
    setting.
    """

    tracking_uri: str | None = None
    """A server, or a file such as sqlite:///mlflow.db. Default: MLFLOW_TRACKING_URI, else MLflow's default."""
    experiment: str = "adaswitch"
    name: str | None = None
    """Name of the run. Default: the run folder's name."""

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        if self.tracking_uri is not None and "@" in urlsplit(self.tracking_uri).netloc:
            raise ValueError(
                "tracking_uri must not contain a user or a password, because it is stored with the run; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return self


class Logging(Part):
    """Where metrics are sent besides ``metrics.jsonl`` and TensorBoard files, which the run folder always has."""

    wandb: Wandb | None = None
    mlflow: MLflow | None = None
