"""Where a scorer errs on labelled cases: by group, by functionality, and whether it punishes mere mention of a group.

Intervals are over cases. Cases made from one template are not independent; within a group a template stands once, so
the rates by group are sound, while the overall ones are somewhat less certain than their intervals say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

from detox_ray.data.cases import Cases
from detox_ray.evaluation.group_toxicity import NO_GROUP, group_order
from detox_ray.evaluation.metrics import CONFIDENCE, TOXIC_THRESHOLD, Interval
from detox_ray.evaluation.proportions import (
    Proportion,
    difference,
    p_value_above,
    p_value_above_rate,
    proportion,
    score_interval,
)

# HateCheck's neutral and positive statements about a group; its other non-hateful cases quote hate or use slurs.
MENTION_FUNCTIONALITIES = ("ident_neutral_nh", "ident_pos_nh")
# A rate of fewer cases than this is marked: its 95% interval is up to 40 percentage points wide.
SMALL_CELL = 20
# Where all neutral cases mention a group, so that none shows how often the scorer errs without one.
TOLERATED_RATE = 0.05


@dataclass(frozen=True)
class ErrorRates:
    """The errors of a scorer on some cases; a rate or area that cannot be measured on them is None.

    `false_positive`: share of non-toxic cases judged toxic; `false_negative`: share of toxic cases not judged toxic;
    `roc_auc`: area under the ROC curve, which depends on no threshold.
    """

    cases: int
    false_positive: Proportion | None
    false_negative: Proportion | None
    roc_auc: float | None


@dataclass(frozen=True)
class Comparison:
    """A group's false-positive rate less that of other cases, with the corrected interval of the difference.

    `others` is None where the rate is compared with `TOLERATED_RATE`. `p_value`: one-sided, exact, not corrected;
    `is_reliable`: the whole interval is above 0 and the test agrees at the corrected level.
    """

    others: Proportion | None
    difference: Interval
    p_value: float
    is_reliable: bool


@dataclass(frozen=True)
class Mention:
    """How a scorer judges non-toxic cases that mention a group.

    `other_groups`: against the same kind of cases of all other groups, None when there are none; `no_group`: against
    those that mention no group, or `TOLERATED_RATE` when there are fewer than `SMALL_CELL` of them. The intervals of
    both hold together for all comparisons of a scorer with `confidence` = 1 - 0.05 / comparisons (Bonferroni).
    """

    group: str
    rate: Proportion
    other_groups: Comparison | None
    no_group: Comparison
    confidence: float


@dataclass(frozen=True)
class ScorerAudit:
    """Everything the audit says of one scorer; `warnings` has a sentence per group punished for being named."""

    name: str
    overall: ErrorRates
    by_group: dict[str, ErrorRates]
    by_functionality: dict[str, ErrorRates]
    mentions: list[Mention]
    warnings: list[str]


def audit_scorer(name: str, toxicity: np.ndarray, cases: Cases, functionalities: Sequence[str] = ()) -> ScorerAudit:
    """The errors of a scorer whose `toxicity: [N]` in [0, 1] is toxic from 0.5 on.

    `functionalities`: those whose non-toxic cases are mere mentions of a group; none: all non-toxic cases are.
    """
    toxicity = np.asarray(toxicity, dtype=np.float64)
    groups = np.array([NO_GROUP if group is None else group for group in cases.groups])
    kinds = np.array(cases.functionalities or [])

    def errors(chosen: np.ndarray) -> ErrorRates:
        return _error_rates(cases.toxic[chosen], toxicity[chosen])

    mere = ~cases.toxic & np.isin(kinds, functionalities) if functionalities else ~cases.toxic
    mentions = _mentions(toxicity[mere] >= TOXIC_THRESHOLD, groups[mere])
    return ScorerAudit(
        name=name,
        overall=errors(np.ones(len(groups), dtype=bool)),
        by_group={group: errors(groups == group) for group in group_order(groups)},
        by_functionality={kind: errors(kinds == kind) for kind in dict.fromkeys(kinds.tolist())},
        mentions=mentions,
        warnings=[
            sentence for mention in mentions if (sentence := _warning(name, mention, mention_kind(functionalities)))
        ],
    )


def mention_functionalities(cases: Cases) -> tuple[str, ...]:
    """Those of `MENTION_FUNCTIONALITIES` that the cases have."""
    found = set(cases.functionalities or [])
    return tuple(name for name in MENTION_FUNCTIONALITIES if name in found)


def mention_kind(functionalities: Sequence[str]) -> str:
    """What the cases that merely mention a group are called."""
    return "neutral mentions" if functionalities else "non-toxic cases"


def criterion(functionalities: Sequence[str]) -> str:
    """When a scorer is said to punish mere mention of a group, in words."""
    kind = mention_kind(functionalities)
    which = f" (functionalities {', '.join(functionalities)})" if functionalities else ""
    return (
        f"A scorer is warned about for a group when its false-positive rate on the group's {kind}{which} is reliably "
        f"above its rate on those of all other groups together, or above its rate on those that mention no group; "
        f"where fewer than {SMALL_CELL} mention none, above {TOLERATED_RATE:.0%}. Reliably: the whole 95% interval of "
        f"the difference is above zero (Newcombe 1998; against {TOLERATED_RATE:.0%}, Wilson 1927), and an exact "
        f"one-sided test agrees at 2.5% (Fisher; against {TOLERATED_RATE:.0%}, binomial); interval and test are "
        f"corrected for all comparisons of the scorer (Bonferroni), so that a fair one is warned about in at most 2.5% "
        f"of audits of independent cases."
    )


def _error_rates(toxic: np.ndarray, toxicity: np.ndarray) -> ErrorRates:
    judged = toxicity >= TOXIC_THRESHOLD
    both = bool(toxic.any() and not toxic.all())
    return ErrorRates(
        cases=len(toxic),
        false_positive=proportion(int((judged & ~toxic).sum()), int((~toxic).sum())),
        false_negative=proportion(int((~judged & toxic).sum()), int(toxic.sum())),
        roc_auc=float(roc_auc_score(toxic, toxicity)) if both else None,
    )


def _mentions(judged: np.ndarray, groups: np.ndarray) -> list[Mention]:
    """`judged: [M] bool`, `groups: [M]` of the non-toxic cases."""

    def rate(chosen: np.ndarray) -> Proportion | None:
        return proportion(int(judged[chosen].sum()), int(chosen.sum()))

    rates = {group: found for group in group_order(groups) if (found := rate(groups == group)) and group != NO_GROUP}
    comparisons = len(rates) * (2 if len(rates) > 1 else 1)
    confidence = 1 - (1 - CONFIDENCE) / max(1, comparisons)
    without = rate(groups == NO_GROUP)
    if without is not None and without.total < SMALL_CELL:
        without = None
    mentions = []
    for group, ours in rates.items():
        others = rate((groups != group) & (groups != NO_GROUP))
        mentions.append(
            Mention(
                group,
                ours,
                None if others is None else _compared(ours, others, confidence),
                _compared(ours, without, confidence),
                confidence,
            )
        )
    return mentions


def _compared(ours: Proportion, others: Proportion | None, confidence: float) -> Comparison:
    if others is not None:
        interval, p_value = difference(ours, others, confidence), p_value_above(ours, others)
    else:
        low, high = score_interval(ours.count, ours.total, confidence)
        interval = Interval(ours.value - TOLERATED_RATE, low - TOLERATED_RATE, high - TOLERATED_RATE)
        p_value = p_value_above_rate(ours, TOLERATED_RATE)
    return Comparison(others, interval, p_value, interval.low > 0 and p_value < (1 - confidence) / 2)


def _warning(scorer: str, mention: Mention, kind: str) -> str | None:
    """One sentence, when a comparison is reliable."""
    compared = ((mention.other_groups, f"{kind} of other groups"), (mention.no_group, "cases without a group"))
    reasons = [
        f"the {comparison.others.value:.1%} of {comparison.others.total:,} {which}"
        if comparison.others
        else f"the {TOLERATED_RATE:.0%} tolerated"
        for comparison, which in compared
        if comparison is not None and comparison.is_reliable
    ]
    if not reasons:
        return None
    few = f" (few cases: below {SMALL_CELL})" if mention.rate.total < SMALL_CELL else ""
    return (
        f"{scorer} punishes mere mention of {mention.group}: it judges {mention.rate.value:.1%} of "
        f"{mention.rate.total:,} {kind} toxic, reliably more than {' and '.join(reasons)}{few}."
    )
