"""What the trackers hold after a run that was killed and continued, read back with their own readers."""

import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from detox_ray.config import Config
from detox_ray.config_file import load_config
from detox_ray.metrics_file import METRICS_FILE, append_metrics, cut_metrics
from detox_ray.tracking.remote import MlflowSink, WandbSink
from detox_ray.tracking.tensorboard import FOLDER, TensorBoardSink
from detox_ray.tracking.tracker import JUDGE, Sink, Tracker
from detox_ray.tracking_config import MlflowConfig, WandbConfig

pytestmark = pytest.mark.unit
STEPS = {0: 0.0, 1: 1.0, 2: 20.0, 3: 30.0, 4: 40.0}


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(Path(__file__).parents[2] / "configs" / "laptop.yaml")


def killed_and_continued(run_dir: Path, open_sink: Callable[[int], Sink], remote: bool) -> None:
    """Steps 0 to 3 are logged, then 2 to 4 again, as after a kill whose last checkpoint was that of step 1."""
    for first, last, factor in ((0, 3, 1.0), (2, 4, 10.0)):
        sinks = {"sink": lambda first=first: open_sink(first)}
        tracker = Tracker(run_dir, {} if remote else sinks, sinks if remote else {})
        cut_metrics(run_dir / METRICS_FILE, first)
        for step in range(first, last + 1):
            line = {"step": step, "reward": factor * step, "reward/a": 0.5, "ended_at": 1e9 + step}
            append_metrics(run_dir / METRICS_FILE, line)
            tracker.log(line)
        tracker.log({"step": last, "mean_toxicity": 0.25}, JUDGE)
        tracker.close()
        time.sleep(1.1)  # TensorBoard's files are told apart by the second


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file: LevelDB's log format behind seven bytes, here within its first block."""
    data = path.read_bytes()
    assert len(data) < 2**15
    position = 7
    while position < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, position)
        assert kind == 1
        yield data[position + 7 : position + 7 + length]
        position += 7 + length


def test_tensorboard_has_each_step_once_with_what_it_came_to_in_the_end(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed_and_continued(tmp_path, lambda first: TensorBoardSink(tmp_path, first), remote=False)
    events = EventAccumulator(str(tmp_path / FOLDER)).Reload()
    assert {*events.Tags()["scalars"]} == {"reward", "reward/a", "judge/mean_toxicity"}
    assert {e.step: e.value for e in events.Scalars("reward")} == STEPS
    assert len(events.Scalars("reward")) == len(STEPS)


def test_mlflow_has_one_run_with_each_step_once(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = MlflowConfig(uri=str(tmp_path / "store"))
    killed_and_continued(tmp_path, lambda _: MlflowSink(mlflow, config, tmp_path), remote=True)
    client = MlflowClient(mlflow.uri)
    experiment = client.get_experiment_by_name("detox_ray")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["ppo.batch_size"] == str(config.ppo.batch_size)
    history = client.get_metric_history(run.info.run_id, "reward")
    # What it was told of steps 2 and 3 before the kill, it keeps.
    assert [(m.step, m.value) for m in history] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert client.get_metric_history(run.info.run_id, "reward.a")


def test_wandb_has_one_run_with_each_step_once(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    wandb = WandbConfig(mode="offline")
    killed_and_continued(tmp_path, lambda _: WandbSink(wandb, config, tmp_path), remote=True)
    logged, ids = [], set()
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in wandb_records(path):
            record = Record.FromString(data)
            ids |= {record.run.run_id} if record.HasField("run") else set()
            items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "reward" in items:
                logged.append((int(items["step"]), float(items["reward"])))
    assert logged == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert len(ids) == 1


def test_a_tracker_that_fails_costs_one_log_line(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    sinks = {"MLflow": lambda: MlflowSink(MlflowConfig(uri="http://127.0.0.1:1"), config, tmp_path)}
    started = time.monotonic()
    tracker = Tracker(tmp_path, {}, sinks)
    for step in range(3):
        tracker.log({"step": step, "reward": 1.0})
    assert time.monotonic() - started < 1.0
    tracker.close()
    [record] = [r for r in caplog.records if r.name.startswith("detox_ray")]
    assert record.getMessage().startswith("MLflow gets no more metrics (")
    assert "\n" not in record.getMessage()
