"""Return to the last good adapter when a step must be rejected."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from detox_ray.errors import DivergenceError, StorageError
from detox_ray.learner.checkpoint_folder import keep_adapter
from detox_ray.learner.distributed import is_first_learner
from detox_ray.learner.ppo import PPO
from detox_ray.metrics_file import ADAPTER_FOLDER, REJECTED_FILE, append_metrics
from detox_ray.policy.adapter import Adapter
from detox_ray.policy.adapter_weights import adapter_of, tensors_of
from detox_ray.ppo_config import DivergenceConfig
from detox_ray.records import Canary, Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearnerState:
    """A copy of all that training changes, at the start of a step."""

    step: int
    adapter: Adapter
    state: dict[str, Any]


class Recovery:
    """A learner and the state it can go back to: once in a run, then with lower learning rates.

    The last good state is the one that sampled the last batch which was trained on without complaint. What sampled a
    bad batch, or was made of it, is given up.
    """

    def __init__(self, ppo: PPO, run_dir: Path) -> None:
        """`ppo` is still untrained."""
        self.policy = ppo.policy
        self._ppo = ppo
        self._run_dir = run_dir
        self._before_step = self._good = self._snapshot(0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the adapter: of the learner as it is, and of its last good state."""
        good = {"step": self._good.step, "adapter": tensors_of(self._good.adapter), "state": self._good.state}
        return {"now": self._ppo.state(), "good": good}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state`.

        Raises:
            StorageError: it is of an earlier version of the package.
        """
        if "good" not in state:
            raise StorageError(
                "the checkpoints of this run are of an earlier version, without the state to go back to; remove the "
                "folder checkpoints in it to train from the start"
            )
        self._ppo.load_state(state["now"])
        good = state["good"]
        adapter = adapter_of(self._good.adapter.peft_config, good["adapter"])
        self._good = LearnerState(good["step"], adapter, good["state"])

    def begin_step(self, step: int) -> None:
        """Remember the state at the start of a step."""
        self._before_step = self._snapshot(step)

    def step_is_good(self) -> None:
        """The step was trained on without complaint, so what it began with was good."""
        self._good = self._before_step

    def roll_back(self, step: int, problem: DivergenceError) -> None:
        """Restore the last good state and lower the learning rates; leaves a line in `rejected_steps.jsonl`.

        Raises:
            DivergenceError: the run was rolled back before; the last good adapter is what it leaves.
        """
        ppo, factor = self._ppo, self._ppo.config.divergence.rate_factor
        first = ppo.rate_scale == 1.0
        good = self._good
        self._before_step = good
        ppo.policy.load(good.adapter)
        ppo.load_state(_copied(good.state))
        ppo.rate_scale = factor
        logger.warning("step %d is rejected: %s", step, problem)
        if is_first_learner():
            line = {"step": step, "reason": str(problem), "rate_scale": ppo.rate_scale, "stopped": not first}
            append_metrics(self._run_dir / REJECTED_FILE, line)
            if not first:
                keep_adapter(good.adapter, self._run_dir, good.step)
        if not first:
            raise DivergenceError(
                f"step {step + 1}: {problem}, after a roll-back with learning rates x {factor:g}; lower "
                f"ppo.learning_rate or raise ppo.kl.coefficient and start a new run; {self._run_dir / ADAPTER_FOLDER} "
                f"holds the last good adapter, of {good.step} steps, and {REJECTED_FILE} the evidence"
            ) from None

    def _snapshot(self, step: int) -> LearnerState:
        return LearnerState(step, self._ppo.policy.adapter(), _copied(self._ppo.state()))


def _copied(state: Any) -> Any:
    """A copy of tensors, numbers and containers of them, in host memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    return state


def refuse_collapsed(rollouts: Sequence[Rollout], limits: DivergenceConfig) -> None:
    """Raises:
    DivergenceError: nearly all responses of a batch are one and the same text.
    """
    text, count = Counter(r.text.strip() for r in rollouts).most_common(1)[0]
    if count > 1 and count / len(rollouts) >= limits.max_identical:
        what = "empty" if not text else "one and the same text"
        raise DivergenceError(
            f"{count} of {len(rollouts)} responses are {what} (ppo.divergence.max_identical={limits.max_identical:g})"
        )


def refuse_not_finite(canary: Canary) -> None:
    """Raises:
    DivergenceError: a log-probability that the policy gives is not finite.
    """
    if not np.isfinite(canary.logprobs).all():
        raise DivergenceError("the adapter makes log-probabilities that are not finite")
