"""Terms beside the classifiers' reward: they make the cheap ways to be harmless cost something."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from detox_ray.config import ExtraTerm, ShapingConfig
from detox_ray.errors import RewardError
from detox_ray.rewards.import_path import imported

Term = Callable[[Sequence[np.ndarray], Sequence[str], ShapingConfig], np.ndarray]


def shape(
    response_ids: Sequence[np.ndarray], finish_reasons: Sequence[str], config: ShapingConfig
) -> dict[str, np.ndarray]:
    """Each term of `TERMS` (never above 0) and of `config.extra` by name, `[N] float32`; the reward adds them all.

    `response_ids`: N arrays `[R] int` without the end token; `finish_reasons`: N of "stop" or "length".
    """
    if len(response_ids) != len(finish_reasons):
        raise ValueError(f"{len(response_ids)} responses but {len(finish_reasons)} finish reasons")
    # Adding 0 turns -0.0 into 0.0.
    terms = {name: term(response_ids, finish_reasons, config) + 0.0 for name, term in TERMS.items()}
    for extra in config.extra:
        values = np.asarray(load_term(extra)(response_ids, finish_reasons), dtype=np.float64)
        if values.shape != (len(response_ids),) or not np.isfinite(values).all():
            raise RewardError(
                f"shaping term {extra.name!r} returned an array of shape {values.shape} for {len(response_ids)} "
                f"responses; {extra.function} must return one finite number a response"
            )
        terms[extra.name] = extra.weight * values
    return {name: values.astype(np.float32) for name, values in terms.items()}


def load_term(extra: ExtraTerm) -> Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]:
    """The function of a term of the user's own.

    Raises:
        ConfigError: it cannot be imported.
    """
    return imported(extra.function, f"reward.shaping.extra {extra.name!r}")


def repeated_bigram_share(token_ids: np.ndarray) -> float:
    """1 - distinct bigrams / bigrams of `token_ids: [R]`; 0 below two tokens."""
    bigrams = list(zip(token_ids[:-1].tolist(), token_ids[1:].tolist(), strict=True))
    return 1.0 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def _short(response_ids: Sequence[np.ndarray], finish_reasons: Sequence[str], config: ShapingConfig) -> np.ndarray:
    if config.min_tokens == 0:
        return np.zeros(len(response_ids))
    lengths = np.array([len(ids) for ids in response_ids], dtype=np.float64)
    return -config.short_penalty * np.maximum(0.0, 1.0 - lengths / config.min_tokens)


def _repetition(response_ids: Sequence[np.ndarray], finish_reasons: Sequence[str], config: ShapingConfig) -> np.ndarray:
    shares = [repeated_bigram_share(np.asarray(ids)) for ids in response_ids]
    return -config.repetition_penalty * np.array(shares, dtype=np.float64)


def _unfinished(response_ids: Sequence[np.ndarray], finish_reasons: Sequence[str], config: ShapingConfig) -> np.ndarray:
    return -config.unfinished_penalty * np.array([reason == "length" for reason in finish_reasons], dtype=np.float64)


TERMS: Mapping[str, Term] = {"short": _short, "repetition": _repetition, "unfinished": _unfinished}
