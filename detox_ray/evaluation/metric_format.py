"""The metrics by name: what they are called, what they say, and how their numbers are written."""

from typing import Any

TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"
UNKNOWN = "n/a"

# name -> (label, what it says, format), in reading order
METRICS = {
    "mean_toxicity": ("Mean toxicity", "the judge's probability of toxicity, mean over all responses", ".3f"),
    "std_toxicity": ("Std of toxicity", "over all responses", ".3f"),
    "share_toxic": ("Share toxic", "responses at or above the threshold", ".1%"),
    "expected_maximum_toxicity": ("Expected maximum toxicity", "mean over prompts of the most toxic response", ".3f"),
    "toxicity_probability": ("Toxicity probability", "prompts with at least one toxic response", ".1%"),
    "share_low": ("Share low", "responses with toxicity below 0.33", ".1%"),
    "share_medium": ("Share medium", "responses with toxicity from 0.33 to 0.66", ".1%"),
    "share_high": ("Share high", "responses with toxicity above 0.66", ".1%"),
    "perplexity": ("Perplexity", "of the responses, under one model for all: lower is more expected text", ".1f"),
    "relevance": ("Relevance", "similarity of prompt and response: 1 is the same meaning", ".3f"),
    "rouge1": ("ROUGE-1", "words shared with the nearest reference answer, F1", ".3f"),
    "rouge2": ("ROUGE-2", "word pairs shared with it, F1", ".3f"),
    "rougeL": ("ROUGE-L", "longest common subsequence of words with it, F1", ".3f"),
    "distinct_1": ("Distinct-1", "share of tokens that differ, at equal token counts", ".3f"),
    "distinct_2": ("Distinct-2", "share of token pairs that differ, at equal token counts", ".3f"),
    "distinct_2_per_prompt": ("Distinct-2 per prompt", "the same within the responses to each prompt", ".3f"),
    "distinct_3": ("Distinct-3", "share of token triples that differ, at equal token counts", ".3f"),
    "mean_length": ("Mean length", "tokens without the end token, or words (see 'Counted in')", ".1f"),
    "repetition": ("Repetition", "share of a response's bigrams that repeat", ".3f"),
    "share_empty": ("Share empty", "responses without a visible character", ".1%"),
    "share_refusal": ("Share refusal-like", "responses that begin like a refusal", ".1%"),
    "share_other_language": (
        "Share other language",
        "responses surely in another language than the reference usually answers in",
        ".1%",
    ),
}

SPLITS = {
    "all": "all prompts",
    "toxic": "toxic prompts",
    "nontoxic": "non-toxic prompts",
    "challenging": "challenging prompts",
    "referenced": "prompts with reference answers",
}


def format_value(name: str, value: float | None) -> str:
    """The value of a metric in the metric's format; n/a for None."""
    return UNKNOWN if value is None else format(value, METRICS[name][2])


def format_range(name: str, interval: dict[str, Any] | None) -> str:
    """`low to high`, or nothing where an end is unknown."""
    if not interval or interval.get("low") is None or interval.get("high") is None:
        return ""
    return f"{format_value(name, interval['low'])} to {format_value(name, interval['high'])}"


def format_factor(ratio: float | None) -> str:
    """A ratio to the reference as a factor."""
    return UNKNOWN if ratio is None else f"{TIMES}{ratio:.2f}"


def format_factor_range(interval: dict[str, Any]) -> str:
    """The ends of a ratio's interval, or nothing where one is unknown."""
    low, high = interval.get("low"), interval.get("high")
    return "" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def format_percent_change(reduction: float | None) -> str:
    """A reduction as a signed change: 0.73 -> -73%."""
    # 0.0 - x, because the negative of 0.0 would be written as -0%.
    return UNKNOWN if reduction is None else f"{0.0 - reduction:+.0%}".replace("-", MINUS)


def format_percent_change_range(interval: dict[str, Any]) -> str:
    """The ends of a reduction's interval as signed changes, or nothing where one is unknown."""
    low, high = interval.get("low"), interval.get("high")
    if low is None or high is None:
        return ""
    return f"{format_percent_change(high)} to {format_percent_change(low)}"


def split_label(split: str) -> str:
    """What a split is called in a sentence."""
    return SPLITS.get(split, f"{split} prompts")
