"""How much of people's own answers a response says: ROUGE (Lin 2004), as the `evaluate` package computes it."""

from collections.abc import Sequence

import numpy as np

from detox_ray.records import LEAD, REFERENCES, Prompt

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """F1 of each response with the reference answer that it is nearest to, without stemming.

    `responses`: texts, [P][S]. Kind -> `[P, S]`, NaN for a prompt without references; empty where no prompt has any.
    """
    if not any(prompt.meta.get(REFERENCES) for prompt in prompts):
        return {}
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, use_stemmer=False)
    values = np.full((len(ROUGE), len(prompts), len(responses[0])), np.nan)
    for place, (prompt, texts) in enumerate(zip(prompts, responses, strict=True)):
        if references := prompt.meta.get(REFERENCES):
            for sample, text in enumerate(texts):
                found = scorer.score_multi(references, text)
                values[:, place, sample] = [found[kind].fmeasure for kind in ROUGE]
    return dict(zip(ROUGE, values, strict=True))


def baselines(prompts: Sequence[Prompt]) -> dict[str, dict[str, np.ndarray]]:
    """What takes no model: lead-1, the first utterance of a dialogue given as its summary. Name -> kind -> `[P, 1]`."""
    led = [prompt if LEAD in prompt.meta else Prompt(prompt.id, "", ()) for prompt in prompts]
    found = rouge(led, [[str(prompt.meta.get(LEAD, ""))] for prompt in led])
    return {"lead-1": found} if found else {}
