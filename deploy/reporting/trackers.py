"""Destinations for metrics besides ``metrics.jsonl``: TensorBoard and Ray always, W&B and MLflow if configured.

Opens, feeds and closes the trackers. If a tracker can't be opened, the run does not start. If one fails later, the run
continues: the failure is logged once, and the missed records are counted; ``metrics.jsonl`` has them all. The tracker's
own package reads its credentials from the environment; we never write them.
"""

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from common.config import Logging, MLflow, RunConfig, Wandb
from common.errors import UserError, one_line
from deploy.reporting.ray_metrics import RayTracker
from deploy.reporting.tracker import Metrics, Outcome, Tracker

logger = logging.getLogger(__name__)

T = TypeVar("T")

_QUEUED_RECORDS = 1000  # a tracker that is further behind loses records, so that it does not delay the run
_CLOSE_TIMEOUT_S = 60.0
_MLFLOW_BATCH = 100  # maximum number of parameters per call to the server


class Trackers:
    """All trackers of a run. Leaving the ``with`` block closes them, and waits at most a minute for each."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._feeds = [_Feed(name, tracker) for name, tracker in trackers.items()]

    @classmethod
    def open(cls, config: RunConfig, run_folder: Path) -> Self:
        """Raises UserError naming the key of a tracker that can't be opened.

        A resumed run uses its previous ids, which are stored in ``trackers.json``.
        """
        ids_file = run_folder / "trackers.json"
        ids: dict[str, str] = json.loads(ids_file.read_text()) if ids_file.exists() else {}
        trackers: dict[str, Tracker] = {
            "tensorboard": TensorBoardTracker(run_folder / "tensorboard"),
            "ray": RayTracker(run_folder.name),
        }
        if config.logging.wandb is not None:
            wandb = _opened("logging.wandb", WandbTracker, config.logging.wandb, config, run_folder, ids.get("wandb"))
            trackers["wandb"], ids["wandb"] = wandb, wandb.run_id
        if config.logging.mlflow is not None:
            _refuse_password_in_environment()
            mlflow = _opened(
                "logging.mlflow", MLflowTracker, config.logging.mlflow, config, run_folder, ids.get("mlflow")
            )
            trackers["mlflow"], ids["mlflow"] = mlflow, mlflow.run_id
        if ids:
            ids_file.write_text(json.dumps(ids, indent=2) + "\n")
        return cls(trackers)

    def log(self, metrics: Metrics) -> None:
        """Queue one record, including its ``step``. Returns at once."""
        for feed in self._feeds:
            feed.put(metrics)

    @property
    def num_lost(self) -> dict[str, int]:
        """Number of records that each tracker missed."""
        return {feed.name: feed.num_lost for feed in self._feeds}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for feed in self._feeds:
            feed.close("finished" if error is None else "failed")


class _Feed:
    """A tracker and the thread that calls it, so that a slow network never delays a step.

    Consumes the queued records in order; waits for the next record; stops at ``close``, after sending the rest.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name = name
        self.num_lost = 0
        self._tracker = tracker
        self._is_reported = False
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=_QUEUED_RECORDS)
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, metrics: Metrics) -> None:
        values = {name: value for name, value in metrics.items() if name != "step"}
        step = int(metrics["step"])
        try:
            self._calls.put_nowait(lambda: self._tracker.log(step, values))
        except queue.Full:
            self._lose(f"is {_QUEUED_RECORDS} records behind")

    def close(self, outcome: Outcome) -> None:
        try:
            self._calls.put(lambda: self._tracker.close(outcome), timeout=_CLOSE_TIMEOUT_S)
            self._calls.put(None, timeout=_CLOSE_TIMEOUT_S)
            self._thread.join(_CLOSE_TIMEOUT_S)
        except queue.Full:
            pass
        if self._thread.is_alive():
            logger.warning("%s did not close within %g s and is abandoned", self.name, _CLOSE_TIMEOUT_S)
        if self.num_lost:
            logger.warning("%s missed %d records; metrics.jsonl has them", self.name, self.num_lost)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # errors of a tracker's package or network must not stop the run
                self._lose(f"failed: {type(error).__name__}: {error}")

    def _lose(self, reason: str) -> None:
        self.num_lost += 1
        if not self._is_reported:
            self._is_reported = True
            logger.warning("%s %s; the run continues without it; further failures are not logged", self.name, reason)


class TensorBoardTracker:
    """Event files in the run's folder. Steps that a resumed run repeats replace the earlier ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def log(self, step: int, metrics: Metrics) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, outcome: Outcome) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbTracker:
    """A Weights & Biases run; in offline mode a folder to upload later with ``wandb sync``."""

    def __init__(self, settings: Wandb, config: RunConfig, run_folder: Path, run_id: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or run_folder.name,
            mode=settings.mode,
            id=run_id,
            resume="allow",
            dir=str(run_folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, disable_git=True, save_code=False, console="off"),
        )
        self.run_id = str(self._run.id)

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


class MLflowTracker:
    """A run in an MLflow experiment, on a server, in a database file or in a folder."""

    def __init__(self, settings: MLflow, config: RunConfig, run_folder: Path, run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=settings.tracking_uri)
        if run_id is None:
            experiment = self._client.get_experiment_by_name(settings.experiment)
            experiment_id = (
                self._client.create_experiment(settings.experiment) if experiment is None else experiment.experiment_id
            )
            run_id = self._client.create_run(experiment_id, run_name=settings.name or run_folder.name).info.run_id
            settings_of_run = [Param(*leaf) for leaf in _flat(config.model_dump(mode="json")).items()]
            for first in range(0, len(settings_of_run), _MLFLOW_BATCH):
                self._client.log_batch(run_id, params=settings_of_run[first : first + _MLFLOW_BATCH])
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = run_id

    def log(self, step: int, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        batch = [Metric(name, value, now_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=batch)

    def close(self, outcome: Outcome) -> None:
        self._client.set_terminated(self.run_id, status="FINISHED" if outcome == "finished" else "FAILED")


def refuse_missing_packages(config: Logging) -> None:
    """Raise UserError if a tracker is configured and its package is not installed."""
    wanted = {"wandb": config.wandb, "mlflow": config.mlflow}
    for package, settings in wanted.items():
        if settings is not None and find_spec(package) is None:
            raise UserError(
                f"logging.{package}: the package {package} is not installed; pip install 'adaswitch[{package}]', or "
                f"remove logging.{package}"
            )


def _refuse_password_in_environment() -> None:
    """MLflow's errors quote the address, and errors are logged."""
    if "@" in urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "")).netloc:
        raise UserError(
            "logging.mlflow: MLFLOW_TRACKING_URI must not contain a user or a password, because errors "
            "quote it; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


def _opened(key: str, make: Callable[..., T], *arguments: object) -> T:
    try:
        return make(*arguments)
    except Exception as error:  # errors of the packages and of the network
        reason = one_line(error)
        raise UserError(f"{key}: can't be opened: {type(error).__name__}: {reason}") from error


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves under their dotted keys."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return leaves
