"""The prompts on offer, from the mildest to the most toxic."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

# From the mildest prompt to the most toxic one in this many steps.
STEPS = 20


@dataclass(frozen=True)
class OfferedPrompt:
    """A prompt and how toxic it is, in [0, 1]: by its file, or else by the judge; None until the judge has read it."""

    text: str
    toxicity: float | None


class PromptShelf:
    """Prompts in the order of their toxicity."""

    def __init__(self, prompts: Sequence[OfferedPrompt]) -> None:
        """Those without a toxicity come first, as they are."""
        self.prompts = sorted(prompts, key=lambda prompt: -1.0 if prompt.toxicity is None else prompt.toxicity)
        self._places = {prompt.text: place for place, prompt in enumerate(self.prompts)}

    def place(self, text: str) -> int | None:
        """Where a prompt stands, counted from 0; None when it is not on the shelf."""
        return self._places.get(text)

    def more_toxic(self, text: str, toxicity: float) -> int | None:
        """The place of the prompt a step above `text`, which is `toxicity` toxic; None when none is more toxic.

        Prompts on the shelf stand where they stand, whatever their toxicity is said to be.
        """
        step = max(1, len(self.prompts) // STEPS)
        here = self.place(text)
        if here is None:
            above = bisect_right([prompt.toxicity or 0.0 for prompt in self.prompts], toxicity)
            here = above - 1
        following = min(here + step, len(self.prompts) - 1)
        return following if following > here else None

    def scored(self, toxicity: Sequence[float]) -> "PromptShelf":
        """The same prompts with the toxicity of those that had none, in the order of `unscored`."""
        found = iter(toxicity)
        return PromptShelf(
            [OfferedPrompt(p.text, next(found) if p.toxicity is None else p.toxicity) for p in self.prompts]
        )

    def unscored(self) -> list[str]:
        """Texts of the prompts without a toxicity."""
        return [prompt.text for prompt in self.prompts if prompt.toxicity is None]
