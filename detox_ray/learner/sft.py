"""One step of supervised fine-tuning: the adapter learns to give the examples' responses. Pure of Ray and of files."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detox_ray.errors import DetoxError, StorageError
from detox_ray.learner.distributed import max_over_learners, seed_step, sum_gradients, sum_over_learners, world
from detox_ray.learner.optimizer import make_optimizer, schedule_factor
from detox_ray.policy.adapter import Adapter
from detox_ray.policy.adapter_weights import adapter_of, tensors_of
from detox_ray.policy.policy import Policy
from detox_ray.policy.sequences import collate
from detox_ray.ppo_config import OptimizerConfig
from detox_ray.records import TokenizedExample

WINDOW = 8  # batches that are sorted by length together


@dataclass
class DevLoss:
    """The dev losses so far, in nats per response token; `best` came after `best_steps` steps of training."""

    first: float
    last: float
    best: float
    best_steps: int = 0
    looks_since_best: int = 0

    def take(self, loss: float, steps: int) -> bool:
        """Take in the loss after so many steps; whether it is lower than all before."""
        self.last = loss
        self.looks_since_best += 1
        if loss < self.best:
            self.best, self.best_steps, self.looks_since_best = loss, steps, 0
        return self.looks_since_best == 0


class SFT:
    """The learner: policy, optimiser, the record of dev losses and the adapter of the lowest."""

    dev_loss: DevLoss
    best: Adapter

    def __init__(
        self,
        policy: Policy,
        config: OptimizerConfig,
        microbatch_tokens: int,
        pad_id: int,
        total_steps: int,
        seed: int,
    ) -> None:
        self.policy = policy
        self.config = config
        self.optimizer = make_optimizer([{"params": policy.adapter_parameters(), "lr": config.learning_rate}], config)
        self._microbatch_tokens = microbatch_tokens
        self._pad_id = pad_id
        self._total_steps = total_steps
        self._seed = seed
        self._device = policy.value_head.weight.device

    def update(self, examples: Sequence[TokenizedExample], step: int) -> dict[str, float]:
        """One optimiser step on this learner's share of a batch.

        The loss is the mean over the response tokens of all learners' shares, not a mean of their means.

        Args:
            examples: at least one.
            step: decides learning rate and dropout, so that a resumed run repeats what it would have done.

        Returns:
            loss (nats per response token), grad_norm, learning_rate, and over all learners response_tokens and tokens.

        Raises:
            DetoxError: the gradient is not finite; the weights are as they were.
        """
        seed_step(self._seed, step)
        rate = self.config.learning_rate * schedule_factor(self.config, step, self._total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.policy.set_dropout(True)
        parameters = self.policy.adapter_parameters()
        response_tokens, tokens = sum_over_learners(
            sum(len(e.response_ids) for e in examples), sum(len(e) for e in examples)
        )
        self.optimizer.zero_grad()
        total = 0.0
        for loss in self._losses(examples):
            (loss / response_tokens.to(loss)).backward()
            total += float(loss.detach())
        sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if not torch.isfinite(norm):
            raise DetoxError(f"the gradient is {float(norm)} at step {step}; lower train.learning_rate")
        self.optimizer.step()
        return {
            "loss": float(sum_over_learners(total)[0] / response_tokens),
            "grad_norm": float(norm),
            "learning_rate": rate,
            "response_tokens": int(response_tokens),
            "tokens": int(tokens),
        }

    def evaluate(self, dev: Sequence[TokenizedExample], steps: int) -> None:
        """Record the loss on this learner's share of the dev examples after `steps` steps; keep the best adapter."""
        loss = self.loss(dev)
        if steps == 0:
            self.dev_loss = DevLoss(loss, loss, loss)
        if steps == 0 or self.dev_loss.take(loss, steps):
            self.best = self.policy.adapter()

    @torch.no_grad()
    def loss(self, examples: Sequence[TokenizedExample]) -> float:
        """Nats per response token, over all learners' shares, without dropout."""
        self.policy.set_dropout(False)
        total = sum(float(loss) for loss in self._losses(examples))
        summed, tokens = sum_over_learners(total, sum(len(e.response_ids) for e in examples))
        return float(summed / tokens)

    def _losses(self, examples: Sequence[TokenizedExample]) -> Iterator[Tensor]:
        """[] of every microbatch of the examples; equally many on all learners, which a sharded base needs."""
        microbatches = list(microbatches_by_length(examples, self._microbatch_tokens))
        most = int(max_over_learners(torch.tensor(len(microbatches), device=self._device)))
        yield from map(self._negative_logprob, microbatches)
        idle = TokenizedExample(np.array([self._pad_id]), np.array([self._pad_id]))
        for _ in range(len(microbatches), most):
            yield 0.0 * self._negative_logprob([idle])

    def _negative_logprob(self, examples: Sequence[TokenizedExample]) -> Tensor:
        """[] the sum over the response tokens; each example is alone in its row, so none sees another."""
        prompts, responses = [e.prompt_ids for e in examples], [e.response_ids for e in examples]
        return -self.policy(collate(prompts, responses, self._pad_id, self._device)).logprobs.sum()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the adapter."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "dev_loss": asdict(self.dev_loss),
            "best": tensors_of(self.best),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state`; raises StorageError where it is of an earlier version."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.dev_loss = DevLoss(**state["dev_loss"])
        if "best" not in state:
            raise StorageError(
                "the checkpoints of this run are of an earlier version, without the best adapter; remove the folder "
                "checkpoints in it to train from the start"
            )
        self.best = adapter_of(self.policy.adapter().peft_config, state["best"])


@dataclass(frozen=True)
class BucketedBatches:
    """The batch of each step, of examples of similar length: a pure function of the step, so it needs no state.

    A pass takes every example once, in batches of `batch_size` or nearly so. It goes through them in a seeded order,
    `WINDOW` batches at a time; within a window they are sorted by length, and the batches come in a seeded order.
    """

    examples: Sequence[TokenizedExample]
    batch_size: int
    seed: int

    def __call__(self, step: int) -> list[TokenizedExample]:
        """The examples of a step."""
        number, position = divmod(step, steps_per_epoch(len(self.examples), self.batch_size))
        shuffled = np.random.default_rng((self.seed, number)).permutation(len(self.examples))
        edges = np.linspace(0, len(shuffled), steps_per_epoch(len(shuffled), self.batch_size) + 1).astype(int)
        window, place = divmod(position, WINDOW)
        edges = edges[window * WINDOW : (window + 1) * WINDOW + 1]
        drawn = sorted((self.examples[i] for i in shuffled[edges[0] : edges[-1]]), key=len)
        place = int(np.random.default_rng((self.seed, number, window)).permutation(len(edges) - 1)[place])
        first, end = edges[place : place + 2] - edges[0]
        return drawn[first:end]


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """How many batches hold every example once."""
    return math.ceil(examples / batch_size)


def microbatches_by_length(examples: Sequence[TokenizedExample], max_tokens: int) -> Iterator[list[TokenizedExample]]:
    """The examples in microbatches of similar length, so that little of a microbatch is padding.

    A microbatch has at most `max_tokens` tokens with its padding, or a single example.
    """
    microbatch: list[TokenizedExample] = []
    for example in sorted(examples, key=len):
        if microbatch and (len(microbatch) + 1) * len(example) > max_tokens:
            yield microbatch
            microbatch = []
        microbatch.append(example)
    if microbatch:
        yield microbatch


def share_of(examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """This learner's part of a batch: every n-th by length, so that the learners' parts take about equally long."""
    rank, learners = world()
    return sorted(examples, key=len)[rank::learners]
