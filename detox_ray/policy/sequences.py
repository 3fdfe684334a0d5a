"""Prompts and responses of unequal length as one padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """A batch of prompt + response, padded on the right.

    `input_ids: [B, T] int64`, `prompt_lengths: [B] int64` (>= 1), `response_lengths: [B] int64`. Right padding needs no
    attention mask in a causal model: no token ever sees one after it.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor

    def response_mask(self) -> Tensor:
        """[B, R] bool, R the longest response: which entries are tokens and which are padding."""
        longest = int(self.response_lengths.max())
        return torch.arange(longest, device=self.input_ids.device)[None, :] < self.response_lengths[:, None]

    def predictor_positions(self) -> Tensor:
        """[B, R] int64: the position in the sequence whose hidden state predicts each response token."""
        longest = int(self.response_lengths.max())
        offsets = torch.arange(longest, device=self.input_ids.device)[None, :]
        return (self.prompt_lengths[:, None] - 1 + offsets).clamp(max=self.input_ids.shape[1] - 1)

    def response_ids(self) -> Tensor:
        """[B, R] int64: the response tokens; undefined where `response_mask` is false."""
        following = (self.predictor_positions() + 1).clamp(max=self.input_ids.shape[1] - 1)
        return self.input_ids.gather(1, following)

    def prompts(self) -> tuple[Tensor, Tensor]:
        """What an encoder reads, P the longest prompt: the prompts alone [B, P] int64, and 1 where there is a token."""
        ids = self.input_ids[:, : int(self.prompt_lengths.max())]
        is_prompt = torch.arange(ids.shape[1], device=ids.device)[None, :] < self.prompt_lengths[:, None]
        return ids, is_prompt.long()

    def decoder_ids(self, start_id: int) -> Tensor:
        """[B, R] int64: what a decoder reads to predict each response token: its start token and those before."""
        return torch.nn.functional.pad(self.response_ids()[:, :-1], (1, 0), value=start_id)

    def rows(self, index: Tensor) -> "Sequences":
        """The rows in `index` [b] int64, cut to their own longest sequence."""
        prompt_lengths, response_lengths = self.prompt_lengths[index], self.response_lengths[index]
        longest = int((prompt_lengths + response_lengths).max())
        return Sequences(self.input_ids[index, :longest], prompt_lengths, response_lengths)


def collate(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], pad_id: int, device: torch.device | None = None
) -> Sequences:
    """Pad `prompts` [P_i] and `responses` [R_i] (int64) to one batch."""
    lengths = [(len(p), len(r)) for p, r in zip(prompts, responses, strict=True)]
    ids = np.full((len(lengths), max(p + r for p, r in lengths)), pad_id, dtype=np.int64)
    for row, (prompt, response) in zip(ids, zip(prompts, responses, strict=True), strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(response)] = response
    columns = torch.tensor(lengths, device=device)
    return Sequences(torch.from_numpy(ids).to(device), columns[:, 0], columns[:, 1])
