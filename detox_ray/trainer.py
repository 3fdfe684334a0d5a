"""Learners under Ray Train: placed, restarted after a crash, continued from the run folder's checkpoints."""

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.execution.callback import ControllerCallback, RayTrainCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.worker_group import DefaultPlacementGroupHandle, WorkerGroup
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.placement_group import PlacementGroup

from detox_ray.errors import DetoxError, last_line
from detox_ray.hung_actor import kill_when_hung
from detox_ray.learner.checkpoint_folder import remove_unlisted, remove_wrong_list
from detox_ray.learner_config import LearnerConfig
from detox_ray.placement import learner_placement
from detox_ray.reservation import Reservation, has_room
from detox_ray.run_folder import RunFolder

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How long Ray Train's controller may be busy starting the learners.
WORKER_GROUP_START_S = 60.0
# How long learners wait for the first one, which may be waiting for a rollout worker to start anew; that one of them is
# gone or hangs is for Ray Train's health check to see.
COLLECTIVE_S = 24 * 3600
# GOMP_SPINCOUNT: waiting threads spin for a moment, then sleep. A two-thread step takes four times as long where they
# sleep at once, and ten times as long where they spin on beside any busy process. The rest: the allocator keeps large
# freed tensors instead of giving them back to the system and taking page faults to get them again.
LEARNER_ENVIRONMENT = {
    "GOMP_SPINCOUNT": "1000",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def run_learners(
    loop: Callable[[T], None], task: T, config: LearnerConfig, run: RunFolder, reservation: Reservation
) -> None:
    """Run `loop(task)` on every learner until it returns; learners are the first role in the `reservation`.

    Raises:
        DetoxError: of the learner's own kind, where it met one that a new attempt would meet again; or learner or
            controller were lost more often than `train.max_failures`.
    """
    os.environ[WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] = str(config.timeout_s)  # read when the learners start
    work = cloudpickle.dumps(partial(loop, task))
    remove_unlisted(run.checkpoints)  # only here: a controller that is lost may leave learners that still write
    for _ in range(config.max_failures + 1):
        remove_wrong_list(run.checkpoints)
        trainer = _trainer(work, config, run, reservation)
        try:
            trainer.fit()
        except RayActorError as error:
            logger.warning("Ray Train's controller is lost (%s); starting another", type(error).__name__)
        except TrainingFailedError as error:
            logger.error("the learner failed", exc_info=error)
            run.raise_failure()
            raise _own_failure(error) or _gave_up("the learner", config, run, last_line(error)) from error
        else:
            run.raise_failure()
            return
    raise _gave_up("Ray Train's controller", config, run, "its process died")


class _Reserved(DefaultPlacementGroupHandle):
    """A placement group that outlives the learners in it."""

    def shutdown(self) -> None:
        """Leave it to who reserved it."""


class _InReservation(ControllerCallback):
    """Has the controller start the learners in the first bundles of the run's own placement group.

    Ray Train would make a group for them at every start, and wait for room while the run holds that of its rollout
    workers: for ever, if another run holds the one and waits for the other.
    """

    def __init__(self, group: PlacementGroup) -> None:
        self._group = group

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """In the controller's process, before it starts any learner."""
        WorkerGroup._create_placement_group = lambda *_: _Reserved(self._group)  # type: ignore[method-assign]  # no setting


class _Trainer(TorchTrainer):
    """Ray's, with a controller that is killed when it does not answer, and without two actors and a signal handler.

    The cleaner of placement groups is detached and asks whichever cluster was last started on its machine: with several
    of them it may remove the groups of a live run, or outlive its own; the only group here is removed by the run. The
    manager of data sets has nothing to do, as learners are sent none. The handler of SIGINT would stay when training is
    over, and do nothing there; without it KeyboardInterrupt is raised.
    """

    def __init__(self, *arguments: Any, group: PlacementGroup, timeout_s: float, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._group = group
        self._timeout_s = timeout_s
        self._ended = threading.Event()
        self._controller: Any = None

    def fit(self) -> Any:
        """Train once, to the end; `RayActorError` where the controller died or was killed.

        In the main thread the controller is watched, and killed in any case, and its learners with it: a process that
        owned Ray's objects may wait for ever in Ray's own exit handlers, when its raylet, which would end it, is gone.
        """
        try:
            return super().fit()
        finally:
            self._ended.set()
            if self._controller is not None:
                ray.kill(self._controller)

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        without = (PlacementGroupCleanerCallback, DatasetsCallback)
        kept = [callback for callback in super()._create_default_callbacks() if not isinstance(callback, without)]
        return [*kept, _InReservation(self._group)]

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller
        watched = (controller, "Ray Train's controller", self._timeout_s, self._ended)
        # It is deaf while it waits for a node in place of one that was lost, however long that takes.
        waits = {"may_wait": lambda: not has_room(self._group)}
        threading.Thread(target=kill_when_hung, args=watched, kwargs=waits, daemon=True).start()


def _trainer(work: bytes, config: LearnerConfig, run: RunFolder, reservation: Reservation) -> _Trainer:
    assert reservation.group is not None
    assert reservation.roles[0] == learner_placement(config)  # see `_InReservation`
    return _Trainer(
        _run_packed,
        group=reservation.group,
        train_loop_config={"work": work},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.num_gpus > 0,
            resources_per_worker={"CPU": config.num_cpus, "GPU": config.num_gpus, **config.resources},
        ),
        torch_config=TorchConfig(timeout_s=COLLECTIVE_S),
        run_config=RunConfig(
            name=run.checkpoints.name,
            storage_path=str(run.path),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": LEARNER_ENVIRONMENT | {"OMP_NUM_THREADS": str(config.threads)}},
        ),
        timeout_s=config.timeout_s + WORKER_GROUP_START_S,
    )


def _own_failure(error: TrainingFailedError) -> DetoxError | None:
    """An error of ours that a learner ended with and could not leave in the run folder."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    return next((failure for failure in failures if isinstance(failure, DetoxError)), None)


def _gave_up(who: str, config: LearnerConfig, run: RunFolder, reason: str) -> DetoxError:
    return DetoxError(
        f"{who} crashed more than train.max_failures={config.max_failures} times ({reason}); see "
        f"{run.path / 'run.log'}, then start the same command again to continue"
    )


def _run_packed(settings: dict[str, bytes]) -> None:
    """Unpack the work on the learner: Ray's controller, through which it comes, need not import what learners do."""
    cloudpickle.loads(settings["work"])()
