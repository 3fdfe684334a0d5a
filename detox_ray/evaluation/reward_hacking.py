"""The gap between reward and judge over a training: a reward that rises while the judge sees no gain is being gamed."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

# Fewer evaluations have no last third to fit a line to.
MIN_EVALUATIONS = 6
# A change over the last third counts from this share of the range of the whole training; steady progress makes 1/3.
MIN_CHANGE = 0.1


@dataclass(frozen=True)
class RewardJudgeGap:
    """Progress of the reward and of the judge since the first evaluation, both as a share of their largest change.

    `steps`, `reward`, `judge`, `gap`: one entry an evaluation; the judge's progress is the fall of mean toxicity, `gap`
    is `reward - judge`. `widens`: None where there are too few evaluations to say.
    """

    steps: list[int]
    reward: list[float]
    judge: list[float]
    gap: list[float]
    widens: bool | None

    @property
    def warning(self) -> str:
        """What to beware of, in one sentence; nothing while the gap does not widen."""
        if not self.widens:
            return ""
        since = self.steps[-_last_third(len(self.steps))]
        return (
            f"Reward and judge part ways: since step {since} the reward has gone on rising while the judge's toxicity "
            "has stopped falling or rises. The policy may be gaming the reward; an earlier checkpoint may be better."
        )


def reward_judge_gap(evaluations: list[dict[str, Any]]) -> RewardJudgeGap | None:
    """The gap over the evaluations during a training, the lines of evaluations.jsonl by step.

    It widens when, in lines fitted by least squares to the last third of the evaluations, the reward rises by at least
    `MIN_CHANGE` of its range over the training and mean toxicity does not fall by as much of its own. Lines without a
    finite step, reward and mean_toxicity do not count; None when fewer than two do.
    """
    keys = ("step", "reward", "mean_toxicity")
    rows = [[line.get(key) for key in keys] for line in evaluations]
    kept = [row for row in rows if all(isinstance(x, int | float) and math.isfinite(x) for x in row)]
    if len(kept) < 2:
        return None
    steps, reward, toxicity = np.array(kept, dtype=np.float64).T
    progress, judged = _progress(reward), _progress(-toxicity)
    return RewardJudgeGap(
        steps=[int(step) for step in steps],
        reward=progress.tolist(),
        judge=judged.tolist(),
        gap=(progress - judged).tolist(),
        widens=None
        if len(kept) < MIN_EVALUATIONS
        else _late_rise(steps, reward) >= MIN_CHANGE > _late_rise(steps, -toxicity),
    )


def _progress(values: np.ndarray) -> np.ndarray:
    change = values - values[0]
    largest = np.abs(change).max()
    return change / largest if largest > 0 else change


def _late_rise(steps: np.ndarray, values: np.ndarray) -> float:
    """Fitted change over the last third, as a share of the range of all values; 0 for a constant."""
    spread = np.ptp(values)
    if spread == 0:
        return 0.0
    late = slice(-_last_third(len(values)), None)
    slope = np.polynomial.Polynomial.fit(steps[late], values[late], deg=1).convert().coef
    return float(slope[1] * np.ptp(steps[late]) / spread) if len(slope) > 1 else 0.0


def _last_third(evaluations: int) -> int:
    return max(3, math.ceil(evaluations / 3))
