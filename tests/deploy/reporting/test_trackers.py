"""Trackers: fed in order, closed with the run's outcome, and never the end of a run."""

import json
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.config import Data, Logging, MLflow, Models, RunConfig, Wandb
from common.errors import UserError
from deploy.reporting.tracker import Metrics, Outcome
from deploy.reporting.trackers import TensorBoardTracker, Trackers, refuse_missing_packages

RECORDS: list[dict[str, float | int]] = [
    {"step": 0, "evaluation/accuracy": 0.25},
    {"step": 1, "train/loss_nats": 0.5, "train/grad_norm": 2.0},
    {"step": 2, "train/loss_nats": 0.25, "train/grad_norm": 1.0},
]


class Recorder:
    """Keeps what it is given; fails from a given call on, or waits until it may go on."""

    def __init__(self, *, num_good: int = 99, gate: threading.Event | None = None) -> None:
        self.logged: list[tuple[int, dict[str, float | int]]] = []
        self.outcome: Outcome | None = None
        self._num_good = num_good
        self._gate = gate

    def log(self, step: int, metrics: Metrics) -> None:
        if self._gate is not None:
            self._gate.wait(30)
        if len(self.logged) >= self._num_good:
            raise ConnectionError("no route to the server")
        self.logged.append((step, dict(metrics)))

    def close(self, outcome: Outcome) -> None:
        self.outcome = outcome


def run_config(**logging: object) -> RunConfig:
    return RunConfig(
        run_dir="r",
        models=Models(student="s", teacher="t"),
        data=Data(path="p"),
        logging=Logging.model_validate(logging),
    )


def test_every_tracker_gets_every_record_in_order_and_the_outcome() -> None:
    first, second = Recorder(), Recorder()
    with Trackers({"first": first, "second": second}) as trackers:
        for record in RECORDS:
            trackers.log(record)
    for recorder in (first, second):
        assert [step for step, _ in recorder.logged] == [0, 1, 2]
        assert recorder.logged[0][1] == {"evaluation/accuracy": 0.25}
        assert recorder.outcome == "finished"


def test_a_failing_tracker_is_told_once_counted_and_leaves_the_others_alone(caplog) -> None:
    broken, whole = Recorder(num_good=1), Recorder()
    with Trackers({"broken": broken, "whole": whole}) as trackers:
        for record in RECORDS:
            trackers.log(record)
    assert trackers.num_lost == {"broken": 2, "whole": 0}
    assert len(whole.logged) == 3
    told = [message for message in caplog.messages if "no route to the server" in message]
    assert len(told) == 1
    assert "broken missed 2 records; metrics.jsonl has them" in caplog.messages
    assert broken.outcome == "finished"


def test_a_slow_tracker_holds_up_no_step() -> None:
    gate = threading.Event()
    slow = Recorder(gate=gate)
    with Trackers({"slow": slow}) as trackers:
        for step in range(1200):
            trackers.log({"step": step, "train/loss_nats": 1.0})
        assert trackers.num_lost["slow"] >= 199  # the queue is bounded
        gate.set()
    assert len(slow.logged) + trackers.num_lost["slow"] == 1200


def test_a_run_that_fails_is_marked_so() -> None:
    recorder = Recorder()
    with pytest.raises(KeyError), Trackers({"one": recorder}):
        raise KeyError("lost")
    assert recorder.outcome == "failed"


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_is_always_there(tmp_path: Path) -> None:
    with Trackers.open(run_config(), tmp_path) as trackers:
        for record in RECORDS:
            trackers.log(record)
    assert scalars(tmp_path / "tensorboard", "train/loss_nats") == [(1, 0.5), (2, 0.25)]
    assert scalars(tmp_path / "tensorboard", "evaluation/accuracy") == [(0, 0.25)]
    assert not (tmp_path / "trackers.json").exists()


def test_a_run_taken_up_again_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    for values in ({1: 1.0, 2: 2.0, 3: 3.0}, {2: 20.0, 3: 30.0}):
        tracker = TensorBoardTracker(tmp_path)
        for step, value in values.items():
            tracker.log(step, {"train/loss_nats": value})
        tracker.close("finished")
    assert scalars(tmp_path, "train/loss_nats") == [(1, 1.0), (2, 20.0), (3, 30.0)]


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_key_and_extra(package: str) -> None:
    settings = Logging.model_validate({package: {}})
    refuse_missing_packages(Logging())
    if find_spec(package) is not None:
        refuse_missing_packages(settings)
        return
    with pytest.raises(UserError, match=rf"^logging.{package}: the package {package} .*'adaswitch\[{package}\]'"):
        refuse_missing_packages(settings)


def test_a_password_is_no_setting() -> None:
    with pytest.raises(ValueError, match="tracking_uri must not contain a user or a password"):
        MLflow(tracking_uri="https://me:secret@tracking.example.org")
    assert MLflow(tracking_uri="sqlite:///runs/mlflow.db").tracking_uri == "sqlite:///runs/mlflow.db"


def test_a_password_in_mlflow_s_environment_variable_is_refused_and_not_shown(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:not-to-be-seen@tracking.example.org")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI must not contain a user or a password") as refused:
        Trackers.open(run_config(mlflow={}), tmp_path)
    assert "not-to-be-seen" not in str(refused.value)


def test_wandb_keeps_an_offline_run_in_the_run_folder(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config = run_config(wandb=Wandb(mode="offline"))
    with Trackers.open(config, tmp_path) as trackers:
        for record in RECORDS:
            trackers.log(record)
    assert trackers.num_lost == {"tensorboard": 0, "wandb": 0}
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert stored.stat().st_size > 0
    assert json.loads((tmp_path / "trackers.json").read_text())["wandb"] in stored.name


def test_mlflow_goes_on_under_the_same_run(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = run_config(mlflow=MLflow(tracking_uri=uri, experiment="chains"))
    for records in (RECORDS[:2], RECORDS[2:]):
        with Trackers.open(config, tmp_path) as trackers:
            for record in records:
                trackers.log(record)
        assert trackers.num_lost == {"tensorboard": 0, "mlflow": 0}
    client = tracking.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("chains").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["trainer.loss.type"] == "forward_kl"
    history = client.get_metric_history(run.info.run_id, "train/loss_nats")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.25)]
