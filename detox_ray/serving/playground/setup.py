"""What the page says before any model is loaded; light to import and to send to a replica."""

from dataclasses import dataclass

from detox_ray.serving.playground.cards import Scorer, SystemLabel
from detox_ray.serving.playground.prompts import OfferedPrompt


@dataclass(frozen=True)
class Missing:
    """What the run does not have yet, and the command that makes it."""

    what: str
    command: str


@dataclass(frozen=True)
class PageSetup:
    """A run as the page shows it."""

    title: str
    facts: str
    missing: Missing | None
    systems: tuple[SystemLabel, ...]
    scorers: tuple[Scorer, ...]
    prompts: tuple[OfferedPrompt, ...]
    temperature: float
    top_p: float
    max_new_tokens: int

    @property
    def judge(self) -> str:
        """The classifier that was not in the reward."""
        return next(scorer.name for scorer in self.scorers if not scorer.in_reward)
