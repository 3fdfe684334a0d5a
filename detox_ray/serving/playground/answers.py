"""The answers of all systems to one request, as far as they have come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Piece:
    """What a token adds to the text of an answer, and how likely it was, in nats.

    `shift` is how much likelier it is with an adapter than without (see `policy.systems.SystemToken`).
    """

    text: str
    logprob: float
    shift: float | None
    ends: bool = False


@dataclass(frozen=True)
class Answer:
    """One system's answer; `toxicity` by classifier once it is scored."""

    pieces: tuple[Piece, ...] = ()
    toxicity: Mapping[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """As the reward's classifiers read it."""
        return "".join(piece.text for piece in self.pieces)


def extended(answers: Sequence[Answer], step: Sequence[Piece | None]) -> list[Answer]:
    """The answers with their next pieces; None adds nothing."""
    return [
        answer if piece is None else replace(answer, pieces=(*answer.pieces, piece))
        for answer, piece in zip(answers, step, strict=True)
    ]


def scored(answers: Sequence[Answer], toxicity: Mapping[str, Sequence[float]]) -> list[Answer]:
    """The answers with what each classifier says of the `texts_to_score`, in their order."""
    columns = [dict(zip(toxicity, values, strict=True)) for values in zip(*toxicity.values(), strict=True)]
    found = iter(columns)
    return [replace(answer, toxicity=next(found)) if answer.text.strip() else answer for answer in answers]


def texts_to_score(answers: Sequence[Answer]) -> list[str]:
    """The texts of the answers in which there is anything to read."""
    return [answer.text for answer in answers if answer.text.strip()]
