"""The toxicity meter: responses of any systems -> what scorers and models say of each of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from detox_ray.data.templates import start_ids, stop_ids
from detox_ray.errors import RewardError
from detox_ray.evaluation.perplexity import response_nll
from detox_ray.evaluation.relevance import SentenceEncoder
from detox_ray.evaluation.responses import ScoredResponses, SystemResponses
from detox_ray.rewards.classifiers import Classifier

BATCH_SIZE = 32


@dataclass(frozen=True)
class PerplexityModel:
    """The transformers language model under which responses are given a perplexity.

    With a `tokenizer` texts are tokenised anew, as for a model that did not write them; without one the responses'
    own token ids are taken.
    """

    model: Any
    pad_id: int
    tokenizer: PreTrainedTokenizerBase | None = None

    def nll(self, responses: SystemResponses) -> tuple[np.ndarray, np.ndarray]:
        """Nats and number of tokens of each response given its prompt, `[P, S]` each."""
        flat = responses.flat
        if self.tokenizer is None:
            prompts = [r.prompt_ids.tolist() for r in flat]
            texts = [r.response_ids.tolist() for r in flat]
        else:
            start, stop = start_ids(self.tokenizer), stop_ids(self.tokenizer)
            prompts = [[*start, *ids, *stop] for ids in self._encode([r.prompt_text for r in flat])]
            texts = self._encode([r.text for r in flat])
        prompts, texts = self._cut(prompts, texts)
        nll, tokens = response_nll(self.model, prompts, texts, BATCH_SIZE, self.pad_id)
        shape = (len(responses.prompts), responses.samples_per_prompt)
        return nll.reshape(shape), tokens.reshape(shape)

    def _cut(self, prompts: list[list[int]], texts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """What the model has positions for: if need be half of them for the prompt's end, the rest for the response."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is None:
            return prompts, texts
        kept = [p if len(p) + len(t) <= most else p[-(most // 2) :] for p, t in zip(prompts, texts, strict=True)]
        return kept, [t[: most - len(p)] for p, t in zip(kept, texts, strict=True)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        assert self.tokenizer is not None
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def score_responses(
    responses: SystemResponses,
    scorers: Sequence[Classifier],
    perplexity_model: PerplexityModel | None,
    encoder: SentenceEncoder | None = None,
    known: dict[str, np.ndarray] | None = None,
) -> ScoredResponses:
    """Every scorer's toxicity and the model's likelihood of every response.

    The first scorer is the judge; `encoder` is for the similarity to the prompt; `known` scores `[P, S]`, such as those
    a file came with, stand after the scorers.

    Raises:
        RewardError: a scorer returned something that is not a probability for each text.
        DataError: a prompt without tokens.
    """
    shape = (len(responses.prompts), responses.samples_per_prompt)
    texts = [rollout.text for rollout in responses.flat]
    toxicity = {scorer.name: checked_toxicity(scorer, texts).reshape(shape) for scorer in scorers}
    nll, tokens = perplexity_model.nll(responses) if perplexity_model else (None, None)
    relevance = None
    if encoder is not None:
        prompts = [rollout.prompt_text for rollout in responses.flat]
        relevance = encoder.similarity(prompts, texts, BATCH_SIZE).reshape(shape)
    return ScoredResponses(responses, toxicity | (known or {}), nll, tokens, relevance)


def checked_toxicity(scorer: Classifier, texts: Sequence[str]) -> np.ndarray:
    """What a scorer says of N texts, `[N] float64`; every different text is asked for once.

    A text without a visible character says nothing toxic: it is 0 by every scorer, and asked of none (some refuse it).

    Raises:
        RewardError: it is not one probability per text.
    """
    different = [text for text in dict.fromkeys(texts) if text.strip()]
    # Some refuse an empty list, too.
    scores = np.asarray(scorer.toxicity(different) if different else [], dtype=np.float64)
    if scores.shape != (len(different),):
        raise RewardError(
            f"scorer {scorer.name!r} returned an array of shape {scores.shape} for {len(different)} texts: "
            "expected one score per text"
        )
    wrong = ~((scores >= 0) & (scores <= 1))
    if wrong.any():
        raise RewardError(
            f"scorer {scorer.name!r} returned {scores[wrong][0]} for {int(wrong.sum())} of {len(different)} texts: "
            "expected a probability of toxicity in [0, 1]"
        )
    by_text = dict(zip(different, scores, strict=True))
    return np.array([by_text.get(text, 0.0) for text in texts])
