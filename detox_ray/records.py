"""What flows between the rooms: frozen records, NumPy arrays in transit."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

# What `Prompt.meta` calls the answers that people gave, and the first utterance of a dialogue to be summarised.
REFERENCES, LEAD = "references", "lead"


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    `id` is a content digest of the text, so the same text has the same id in every run; `token_ids` is the exact
    token sequence the policy continues: at most `data.max_tokens` of the text, with the tokens that start and end it.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizedExample:
    """A prompt and the response to learn, with its end token: `prompt_ids: [P] int64`, `response_ids: [R] int64`."""

    prompt_ids: np.ndarray
    response_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Rollout:
    """One sampled response and the log-probabilities it was sampled with.

    `prompt_ids: [P] int64`, `response_ids: [R] int64` (with the end token, if sampled), `logprobs: [R] float32`
    in nats under the adapter `adapter_version`; `text` is the decoded response without special tokens;
    `finish_reason` is "stop" (end token) or "length".
    """

    prompt_id: str
    prompt_text: str
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    logprobs: np.ndarray
    text: str
    finish_reason: str
    adapter_version: int


@dataclass(frozen=True)
class Canary:
    """Fixed prefixes and the policy's next-token log-probabilities for them: [K, V] float32."""

    prefixes: list[list[int]]
    logprobs: np.ndarray


@dataclass(frozen=True)
class Score:
    """What the reward ensemble says of one response; higher is less toxic.

    `reward` is the aggregate of the calibrated members, `per_classifier` holds each member's calibrated score and
    `disagreement` is their standard deviation (0 for a single member).
    """

    reward: float
    per_classifier: dict[str, float]
    disagreement: float


@dataclass(frozen=True)
class Batch:
    """Scored rollouts of one step, the samples of a prompt next to each other.

    `rewards: [B] float32`; `staleness` in adapter versions; `metrics` holds what the scorer says of the batch, the
    seconds the learner waited (`time_acknowledge_s`, `time_rollout_s` and `time_reward_s`, one after the other) and
    `worker_restarts`.
    """

    rollouts: list[Rollout]
    rewards: np.ndarray
    staleness: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    `temperature > 0`; `top_p` in (0, 1]; `top_k` 0 means off; with `fixed_length` the end token is masked, so that
    every response has exactly `max_new_tokens` tokens.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    fixed_length: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Readings:
    """All that one classifier says of N texts, from one forward pass; long texts were read in windows.

    Of several windows of a text the most toxic one counts: the lowest score, the highest probabilities.
    """

    score: np.ndarray  # [N] float32, uncalibrated, less toxic is higher
    toxicity: np.ndarray  # [N] float32 in [0, 1]
    labels: dict[str, np.ndarray]  # [N] float32 in [0, 1] by label; empty for a classifier that has no named labels
    windows: np.ndarray  # [N] int64, at least 1
    release: str = ""  # of the service that the classifier was deployed with
