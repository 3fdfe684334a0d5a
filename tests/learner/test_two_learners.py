"""Two learners on halves of a batch are one on the whole; a base spread over them, half on each, is a whole one."""

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from families import FAMILIES, save_family
from torch import Tensor
from torch.distributed.tensor import DTensor
from two_learners import choose_port, join_learners, tune, update

from detox_ray.config import LoraConfig, PolicyConfig
from detox_ray.learner.distributed import on_first_learner
from detox_ray.learner_config import TrainConfig
from detox_ray.policy.footprint import load_skeleton, sharded_weight_bytes, weight_bytes
from detox_ray.policy.policy import Policy
from detox_ray.policy.sequences import collate
from detox_ray.policy.sharding import transformer_blocks
from detox_ray.sft_config import SFTConfig, TuningConfig

pytestmark = pytest.mark.unit
Format = Literal["none", "nf4"]
CPU = torch.device("cpu")
COMPARED = ("kl", "entropy", "logprob_gap_max", "explained_variance", "response_length", "policy_loss", "value_loss")


def look(policy: Policy) -> dict[str, Tensor]:
    """What a policy with an adapter that does something answers, and its gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    tokens = torch.arange(2, 34).view(4, 8).numpy()
    sequences = collate(list(tokens[:, :5]), list(tokens[:, 5:]), 1)
    with torch.no_grad():
        found = {"reference": policy(sequences, reference=True).logprobs}
    found["policy"] = policy(sequences).logprobs
    found["policy"].sum().backward()
    gradients = {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}
    return {name: tensor.detach() for name, tensor in (found | gradients).items()}


def held_bytes(policy: Policy) -> tuple[int, int]:
    """Of the blocks' frozen weights: what this learner holds, and what there are."""
    blocks = transformer_blocks(policy.model.get_base_model())
    weights = [p for block in blocks for p in block.parameters() if not p.requires_grad]
    own = [w.to_local() if isinstance(w, DTensor) else w for w in weights]
    return sum(w.nbytes for w in own), sum(w.numel() * w.element_size() for w in weights)


def class_of_an_engine() -> type[Exception]:
    """A class that is made on the way, as Ray's are, and can be found under no name."""
    return type("RayTaskError(ValueError)", (ValueError,), {})


def raised_on_first_learner(kind: type[Exception]) -> tuple[str, str]:
    """Type and message of what a learner gets to see of such an error."""

    def fail() -> None:
        raise kind("Traceback\n  somewhere\nthe engine is lost")

    try:
        on_first_learner(fail)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def learner(rank: int, models: dict[str, str], tiny_model: str, folder: str) -> None:
    join_learners(rank, folder)
    rows = slice(rank * 4, rank * 4 + 4)
    found: dict[str, Any] = {
        "PPO": [update(tiny_model, rows, shard_base) for shard_base in (False, True)],
        "fine-tuning": [tune(tiny_model, shard_base) for shard_base in (False, True)],
        "policies": {},
    }
    for family, model in models.items():
        for quantization in get_args(Format):
            config = PolicyConfig(
                model=model,
                quantization=quantization,
                lora=LoraConfig(rank=4),
                gradient_checkpointing=family == "Llama",
            )
            whole, sharded = look(Policy(config, CPU)), Policy(config, CPU, shard_base=True)
            found["policies"][f"{family} {quantization}"] = (whole, look(sharded), held_bytes(sharded))
    found["raised"] = [raised_on_first_learner(make) for make in (ZeroDivisionError, class_of_an_engine())]
    torch.save(found, Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def learners(tiny_model: str, tiny_t5: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two learners found."""
    folder = tmp_path_factory.mktemp("learners")
    models = {family: save_family(family, folder / family) for family in FAMILIES} | {"T5": tiny_t5}
    choose_port(folder)
    mp.spawn(learner, args=(models, tiny_model, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_learners_are_one(tiny_model: str, learners: list[dict[str, Any]]) -> None:
    expected_metrics, expected_tensors = update(tiny_model, slice(0, 8))
    expected_tuned_metrics, expected_tuned_tensors = tune(tiny_model)
    for found in learners:
        (metrics, tensors), (tuned_metrics, tuned_tensors) = found["PPO"][0], found["fine-tuning"][0]
        for name in COMPARED:
            assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-3, abs=1e-6), name
        for name, tensor in expected_tensors.items():
            assert np.abs(tensors[name] - tensor).max() < 1e-5, name
        assert tuned_metrics == pytest.approx(expected_tuned_metrics, rel=1e-4)
        for name, tensor in expected_tuned_tensors.items():
            assert np.abs(tuned_tensors[name] - tensor).max() < 1e-5, name


def test_an_error_on_the_first_learner_is_raised_on_all(learners: list[dict[str, Any]]) -> None:
    for found in learners:
        assert found["raised"] == [
            ("ZeroDivisionError", "Traceback\n  somewhere\nthe engine is lost"),
            ("RuntimeError", "RayTaskError(ValueError): the engine is lost"),
        ]


def test_a_sharded_base_is_the_whole_one(learners: list[dict[str, Any]]) -> None:
    for found in learners:
        for step in ("PPO", "fine-tuning"):
            (whole, whole_adapter), (sharded, sharded_adapter) = found[step]
            assert sharded == whole, step
            assert all((sharded_adapter[name] == tensor).all() for name, tensor in whole_adapter.items()), step
        for case, (whole, sharded, (held, there_are)) in found["policies"].items():
            assert whole.keys() == sharded.keys(), case
            assert len(whole) > 4, case
            for name, tensor in whole.items():
                # What T5's decoder blocks say of the encoder's states is added up in another order.
                bound = 1e-5 * float(tensor.abs().max()) if "T5" in case else 0.0
                assert float((sharded[name] - tensor).abs().max()) <= bound, f"{case}: {name}"
            assert held == pytest.approx(there_are / 2, rel=0.02), case


def test_the_plan_says_what_a_learner_holds(tiny_model: str) -> None:
    config = PolicyConfig(model=tiny_model, quantization="none", lora=LoraConfig(rank=4))
    shape = load_skeleton(config, torch.float32)
    blocks = transformer_blocks(shape.base)
    of_a_block = sum(4 * p.numel() for p in blocks[0].parameters() if not p.requires_grad)
    expected = weight_bytes(shape, "none") - len(blocks) * of_a_block / 2 + of_a_block
    assert sharded_weight_bytes(shape, "none", True, learners=2) == expected


def test_int8_is_not_sharded() -> None:
    with pytest.raises(ValueError, match="not int8"):
        SFTConfig(policy=PolicyConfig(quantization="int8"), train=TuningConfig(workers=2, shard_base=True))


def test_a_single_learner_has_nobody_to_share_with() -> None:
    with pytest.raises(ValueError, match=r"set train\.workers=2 or more"):
        TrainConfig(shard_base=True)
