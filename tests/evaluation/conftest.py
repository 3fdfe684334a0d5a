import numpy as np
import pytest
import torch
from report_folder import write_folder
from transformers import LlamaConfig, LlamaForCausalLM

from detox_ray.records import Rollout

END_ID = 1
PAD_ID = 0
VOCABULARY = 64


@pytest.fixture(scope="session")
def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def make_rollouts():
    """(texts [P][S], version) -> rollouts; a token a word, an end token after each response, prompts p0, p1, ..."""

    def make(texts: list[list[str]], version: int = 0) -> list[Rollout]:
        rollouts = []
        for prompt, samples in enumerate(texts):
            for text in samples:
                ids = np.array([2 + sum(word.encode()) % (VOCABULARY - 2) for word in text.split()] + [END_ID])
                rollouts.append(
                    Rollout(
                        prompt_id=f"p{prompt}",
                        prompt_text=f"prompt number {prompt}",
                        prompt_ids=np.array([5, 6, 7 + prompt % 50]),
                        response_ids=ids,
                        logprobs=np.zeros(len(ids), dtype=np.float32),
                        text=text,
                        finish_reason="stop",
                        adapter_version=version,
                    )
                )
        return rollouts

    return make


@pytest.fixture
def pair(tmp_path):
    """A folder with the evaluation of two systems."""
    return write_folder(tmp_path, ("base", "tuned"))
