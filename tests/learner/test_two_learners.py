"""Two learners on halves of a batch are one learner on the whole: PPO with whitening and metrics, and fine-tuning."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from two_learners import choose_port, join_learners, tune, update

from detox_ray.learner.distributed import on_first_learner

pytestmark = pytest.mark.unit
COMPARED = ("kl", "entropy", "logprob_gap_max", "explained_variance", "response_length", "policy_loss", "value_loss")


def learner(rank: int, model: str, folder: str) -> None:
    join_learners(rank, folder)
    metrics, tensors = update(model, slice(rank * 4, rank * 4 + 4))
    tuned_metrics, tuned_tensors = tune(model)
    try:
        on_first_learner(lambda: 1 / 0)
        raised = False
    except ZeroDivisionError:
        raised = True
    found = {"metrics": metrics, "tensors": tensors, "raised": raised}
    torch.save(found | {"tuned_metrics": tuned_metrics, "tuned_tensors": tuned_tensors}, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_learners_are_one(tiny_model: str, tmp_path: Path) -> None:
    choose_port(tmp_path)
    mp.spawn(learner, args=(tiny_model, str(tmp_path)), nprocs=2)
    expected_metrics, expected_tensors = update(tiny_model, slice(0, 8))
    expected_tuned_metrics, expected_tuned_tensors = tune(tiny_model)
    for rank in range(2):
        result: dict[str, Any] = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert result["raised"]
        for name in COMPARED:
            assert result["metrics"][name] == pytest.approx(expected_metrics[name], rel=1e-3, abs=1e-6), name
        for name, tensor in expected_tensors.items():
            assert np.abs(result["tensors"][name] - tensor).max() < 1e-5, name
        assert result["tuned_metrics"] == pytest.approx(expected_tuned_metrics, rel=1e-4)
        for name, tensor in expected_tuned_tensors.items():
            assert np.abs(result["tuned_tensors"][name] - tensor).max() < 1e-5, name
