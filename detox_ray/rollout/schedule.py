"""Which prompts each step answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from detox_ray.records import Prompt


@dataclass(frozen=True)
class PromptSchedule:
    """Passes over the prompts, each in a seeded order of its own; a pure function of the step, so it needs no state."""

    prompts: Sequence[Prompt]
    per_step: int
    seed: int

    def __call__(self, step: int) -> list[Prompt]:
        """The `per_step` prompts of a step; a step may begin in one pass and end in the next."""
        first = step * self.per_step
        return [self.prompts[self._order(i)] for i in range(first, first + self.per_step)]

    def _order(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.prompts))
        return int(_permutation(len(self.prompts), self.seed, epoch)[offset])


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)
