"""What changed inside a tuned model: likelihood, entropy, attribution, relevance and words, written to analysis.json.

In the schema an interval is {"value", "low", "high"} (95% bootstrap over prompts, null where undefined), REFERENCE is
the pre-trained system, a SYSTEM any one, a TUNED any other than the reference; log-probabilities and entropies are in
nats. Every `changes` is TUNED minus REFERENCE, paired over prompts.

{"format": 1, "reference", "systems": [SYSTEM], "model", "judge": name or null, "prompts", "seed", "threshold",
 "skipped": {reason: prompts},
 "logprobs":    of the reference's responses, per token
                {"systems": {SYSTEM: {"all" | "toxic" | "civil": interval}}, "changes": {TUNED: {split: interval}},
                 "responses": {split: number}},
 "entropy":     of each system along its own responses, per token
                {"systems": {SYSTEM: interval}, "changes": {TUNED: interval},
                 "by_position": {SYSTEM: [interval + {"position" from 1, "responses"}]}},
 "attribution": of the log-probability of each system's own responses to the tokens read (attribution.py); at a prompt
                all responses are cut to the shortest, so that the prompt's share says nothing of length
                {"prompts", "steps", "relative_error": median of the integrals',
                 "systems": {SYSTEM: {"prompt_entropy" | "prompt_share", both in [0, 1]: interval}},
                 "changes": {TUNED: {the same}}},
 "relevance":   null, or cosine of prompt and response
                {"model", "systems": {SYSTEM: interval}, "changes": {TUNED: interval}},
 "words":       shift of the log-probability of words, in the responses of both
                {"min_count", "systems": {TUNED: {"less_likely" | "more_likely":
                                                  [{"word", "shift": mean, "count", "toxic": bool or null}]}}},
 "examples":    {TUNED: [{"chosen": "fell" | "rose" | "random", "system" that wrote it, "prompt", "response",
                          "toxicity", "shift": of the response, "tokens": [{"text", "shift"}]}]}}
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config import Config, EvaluationConfig, PolicyConfig
from detox_ray.evaluation import analysis_inputs as inputs
from detox_ray.evaluation import analysis_sections as sections
from detox_ray.evaluation.analysis_inputs import AnsweredPrompt, ComparedSystems
from detox_ray.evaluation.analysis_sections import Comparison, Json, TokenStatistics
from detox_ray.evaluation.attribution import Attribution, check_captum, integrated_gradients, mean_embedding
from detox_ray.evaluation.metrics import TOXIC_THRESHOLD
from detox_ray.evaluation.relevance import SentenceEncoder
from detox_ray.evaluation.run_files import ANALYSIS_FORMAT
from detox_ray.evaluation.words import token_pieces
from detox_ray.metrics_file import GENERATIONS_FILE, write_atomically
from detox_ray.policy.architecture import response_logits
from detox_ray.policy.sequences import collate
from detox_ray.rewards.classifiers import Classifier, load_classifier

ANALYSIS_FILE = "analysis.json"

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Limits:
    """How much is analysed: `prompts` drawn by `seed`, one response each; the rest are sizes and counts."""

    prompts: int = 200
    attribution_prompts: int = 64
    attribution_steps: int = 24
    examples: int = 12
    min_count: int = 5
    top_words: int = 20
    batch_size: int = 16
    resamples: int = 2000
    seed: int = 0


def analyze(
    folder: str | Path,
    *,
    policy: PolicyConfig | None = None,
    adapters: Mapping[str, Path] | None = None,
    judge: Classifier | None = None,
    relevance_model: str | None = None,
    relevance_revision: str | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Json:
    """Analyse the tuned systems of a folder with generations.parquet and write analysis.json into it.

    Args:
        folder: of a run, whose config.yaml names base and judge and whose `adapter/` is the system "tuned"; or of any
            evaluation, with `policy` and `adapters` given.
        policy: the base model, in place of the run's.
        adapters: folder of the adapter of each tuned system, by the name that its responses have.
        judge: says which words are toxic, in place of the run's; with `policy` and no judge, none are marked.
        relevance_model: sentence encoder, folder or hub id (at `relevance_revision`); none: relevance is not measured.
        limits: how much is analysed.
        progress: is told what is being done and the share done, in [0, 1].

    Returns:
        The content of analysis.json; its schema is at the head of this module.

    Raises:
        DataError: the generations, the configuration or an adapter are missing or do not fit.
        ConfigError, ModelError: the base, an adapter, the judge or the encoder cannot be loaded, or captum is missing.
        RewardError: the judge failed.
    """
    folder, limits = Path(folder), limits or Limits()
    adapters = inputs.default_adapters(folder) if adapters is None else dict(adapters)
    reference = inputs.reference_name(folder)
    table = inputs.generations_of([reference, *adapters], folder / GENERATIONS_FILE)
    inputs.check_adapter_folders(adapters)
    check_captum()
    encoder = None if relevance_model is None else SentenceEncoder(relevance_model, relevance_revision)
    if policy is None:
        policy, model_name, judge_of_run = _base_and_judge(folder)
        judge = judge or load_classifier(judge_of_run)
    else:
        model_name = policy.model
    inputs.check_decoder_only(policy)
    systems = inputs.load_systems(policy, reference, adapters)
    prompts, skipped = inputs.answered_prompts(table, systems, limits.prompts, limits.seed)
    content = {
        "format": ANALYSIS_FORMAT,
        "reference": reference,
        "systems": systems.names,
        "model": model_name,
        "judge": judge.name if judge else None,
        "prompts": len(prompts),
        "seed": limits.seed,
        "threshold": TOXIC_THRESHOLD,
        "skipped": skipped,
        **_measured(systems, prompts, judge, encoder, limits, progress),
    }
    write_atomically(folder / ANALYSIS_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


def _base_and_judge(folder: Path) -> tuple[PolicyConfig, str, ClassifierConfig]:
    """The base that answered in a run, the name of the model it was made of, and the run's judge."""
    config = inputs.read_run_config(folder)
    evaluation = config.evaluation if isinstance(config, Config) else EvaluationConfig()
    return inputs.served_base(folder, config), config.policy.model, evaluation.judge


@torch.no_grad()
def token_statistics(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], batch_size: int
) -> TokenStatistics:
    """Log-probability of every response token, and entropy of the distribution that it was drawn from.

    `prompts`, `responses`: N token sequences each, none empty; `model` is a transformers causal language model. At
    temperature 1, given the prompt and the response so far.
    """
    found: list[Any] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # No token sees the padding behind it, so any id will do.
        batch = collate([np.array(prompts[i]) for i in rows], [np.array(responses[i]) for i in rows], 0, model.device)
        mask = batch.response_mask()
        distribution = response_logits(model, batch)[mask].float().log_softmax(dim=-1)
        logprobs = distribution.gather(1, batch.response_ids()[mask][:, None])[:, 0].double().cpu().numpy()
        entropies = torch.special.entr(distribution.exp()).sum(dim=-1).double().cpu().numpy()
        ends = np.cumsum([len(responses[i]) for i in rows])[:-1]
        for row, pair in zip(rows, zip(np.split(logprobs, ends), np.split(entropies, ends), strict=True), strict=True):
            found[row] = pair
    return TokenStatistics([pair[0] for pair in found], [pair[1] for pair in found])


def _measured(
    systems: ComparedSystems,
    prompts: list[AnsweredPrompt],
    judge: Classifier | None,
    encoder: SentenceEncoder | None,
    limits: Limits,
    progress: Progress | None,
) -> Json:
    """The measured parts of analysis.json."""
    comparison = Comparison(systems.reference, list(systems.adapter_names), limits.resamples, limits.seed)
    attributed = prompts[: limits.attribution_prompts]
    advance = _advancing(progress, comparison, len(prompts), len(attributed) * limits.attribution_steps)
    # statistics[system][writer]: how the system sees the responses of the writer.
    statistics: dict[str, dict[str, TokenStatistics]] = {}
    attributions: dict[str, list[Attribution]] = {}
    for system in systems.names:
        with systems.answering_as(system) as model:
            # The reference is compared on everybody's responses, a tuned system on its own and the reference's.
            for writer in systems.names if system == systems.reference else (systems.reference, system):
                written = [prompt.responses[writer].token_ids for prompt in prompts]
                seen = token_statistics(model, [p.token_ids for p in prompts], written, limits.batch_size)
                statistics.setdefault(system, {})[writer] = seen
                advance("likelihood and entropy", len(prompts))
            baseline = mean_embedding(model)
            attributions[system] = []
            for prompt in attributed:
                attributions[system].append(_attribution(model, prompt, system, baseline, limits.attribution_steps))
                advance("attribution", limits.attribution_steps)
    relevance = None
    if encoder is not None:
        similarities = _similarities(systems, prompts, encoder, limits)
        relevance = sections.relevance_section(comparison, encoder.model, similarities)
    pieces = {
        writer: [token_pieces(systems.tokenizer, prompt.responses[writer].token_ids) for prompt in prompts]
        for writer in systems.names
    }
    shifted = sections.shifted_responses(comparison, prompts, statistics, pieces)
    return {
        "logprobs": sections.logprob_section(comparison, prompts, statistics),
        "entropy": sections.entropy_section(comparison, statistics),
        "attribution": {"steps": limits.attribution_steps}
        | sections.attribution_section(comparison, attributed, attributions),
        "relevance": relevance,
        "words": sections.word_section(shifted, limits.min_count, limits.top_words, judge),
        "examples": {
            tuned: sections.choose_examples(rows, systems.reference, limits.examples) for tuned, rows in shifted.items()
        },
    }


def _attribution(model: Any, prompt: AnsweredPrompt, system: str, baseline: torch.Tensor, steps: int) -> Attribution:
    shortest = min(len(response.token_ids) for response in prompt.responses.values())
    response_ids = prompt.responses[system].token_ids[:shortest]
    return integrated_gradients(model, prompt.token_ids, response_ids, baseline, steps, prompt.start_length)


def _similarities(
    systems: ComparedSystems, prompts: list[AnsweredPrompt], encoder: SentenceEncoder, limits: Limits
) -> dict[str, np.ndarray]:
    """Cosine of prompt and response, [P] for each system."""
    texts = [prompt.text for _ in systems.names for prompt in prompts]
    responses = [prompt.responses[system].text for system in systems.names for prompt in prompts]
    similarity = encoder.similarity(texts, responses, limits.batch_size)
    return dict(zip(systems.names, np.split(similarity, len(systems.names)), strict=True))


def _advancing(
    progress: Progress | None, comparison: Comparison, prompts: int, attribution_passes: int
) -> Callable[[str, int], None]:
    """A function that adds units of work; a unit is a sequence through a model."""
    total = prompts * (3 * len(comparison.tuned) + 1) + len(comparison.systems) * attribution_passes
    done = 0

    def advance(stage: str, units: int) -> None:
        nonlocal done
        done += units
        if progress is not None:
            progress(stage, done / total)

    return advance
