"""Which prompts or examples each step works on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Schedule(Generic[T]):
    """Passes over the items, each in a seeded order of its own; a pure function of the step, so it needs no state."""

    items: Sequence[T]
    per_step: int
    seed: int

    def __call__(self, step: int) -> list[T]:
        """The `per_step` items of a step; a step may begin in one pass and end in the next."""
        first = step * self.per_step
        return [self.items[self._order(i)] for i in range(first, first + self.per_step)]

    def _order(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.items))
        return int(_permutation(len(self.items), self.seed, epoch)[offset])


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)
