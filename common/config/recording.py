"""What is kept of a run, and where its metrics go."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from common.config.part import Part, Positive, Seconds


class Trace(Part):
    """What is kept of every sequence."""

    enabled: bool = True
    top_alternatives: Annotated[int, Field(ge=0)] = 5
    """Alternatives of both models stored per token."""


class Checkpoints(Part):
    """What a run can be taken up from again (``adaswitch train CONFIG --resume``), in ``RUN/checkpoints``."""

    every_steps: Positive | None = 50
    """Steps between checkpoints; one is always taken after the last step. null: none at all, and no way to resume."""
    keep_last: Positive = 2
    """Older ones are removed once a newer one is whole."""
    keep_best: bool = True
    """Also keep the one with the highest held-out accuracy. Only steps both evaluated and checkpointed count."""


class Storage(Part):
    """Where runs' folders are copied while they go on, to be read and resumed elsewhere."""

    url: str | None = None
    """A folder that fsspec can reach, such as s3://bucket/runs or gs://bucket/runs: the run's own is made in it, under
    its name. Keys come from the environment, never from here. Default: no copy."""
    timeout_s: Seconds = 600.0
    """How long one file may take, and how long a run that has ended waits for its copy to be whole."""

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        if self.url is not None and "@" in urlsplit(self.url).netloc:
            raise ValueError("url must not hold a user or a password, for it is stored with the run")
        return self


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
