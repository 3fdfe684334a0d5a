"""The answers as HTML; every text in it is escaped, for a model can write markup."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from detox_ray.serving.playground.answers import Answer, Piece

# A token that became this many times as likely, or as unlikely, has a stronger colour.
FACTORS = (1.25, 2, 5, 20)

State = Literal["waiting", "answering", "scoring", "done"]

TEMPLATES = Environment(
    loader=PackageLoader("detox_ray", "serving/playground"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class SystemLabel:
    """What a system is called: "base", and what it is: "lab policy, NF4"."""

    name: str
    detail: str
    compared: str  # what the shift of its tokens says, such as "RLAF / base"


@dataclass(frozen=True)
class Scorer:
    """A classifier and whether it was part of the reward."""

    name: str
    in_reward: bool


def cards(
    systems: Sequence[SystemLabel],
    scorers: Sequence[Scorer],
    answers: Sequence[Answer],
    state: State,
    problem: str = "",
) -> str:
    """The cards of all systems side by side, and what the colours of their tokens mean.

    `problem` says why there are no scores, where there are none.
    """
    return TEMPLATES.get_template("cards.html.jinja").render(
        cards=[_card(*pair) for pair in zip(systems, answers, strict=True)],
        scorers=scorers,
        state=state,
        problem=problem,
        factors=FACTORS,
    )


def _card(system: SystemLabel, answer: Answer) -> dict[str, object]:
    return {
        "system": system,
        "tokens": [
            {"text": piece.text, "ends": piece.ends, "colour": _colour(piece.shift), "says": _says(system, piece)}
            for piece in answer.pieces
        ],
        "empty": not answer.text.strip(),
        "ended": bool(answer.pieces) and answer.pieces[-1].ends,
        "toxicity": {name: f"{value:.2f}" for name, value in answer.toxicity.items()},
    }


def _colour(shift: float | None) -> str:
    """The class of a token's colour; none where its shift is small."""
    if shift is None or abs(shift) < math.log(FACTORS[0]):
        return ""
    return f"{'more' if shift > 0 else 'less'}-{sum(abs(shift) >= math.log(factor) for factor in FACTORS)}"


def _says(system: SystemLabel, piece: Piece) -> str:
    """What is told of a token that is pointed at."""
    what = "end of the answer" if piece.ends else f"“{piece.text}”"
    said = f"{what}: log p {_signed(piece.logprob)}"
    if piece.shift is None:
        return said
    factor = f"\N{MULTIPLICATION SIGN}{math.exp(piece.shift):.2g}"
    return f"{said}, shift {_signed(piece.shift)} ({factor}, {system.compared})"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
