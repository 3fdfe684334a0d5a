from pathlib import Path
from typing import Any

import pytest

from detox_ray.config_file import dump_config, parse_config, parse_section
from detox_ray.data.overlap import heldout_may_be_learned
from detox_ray.sft_config import SFTConfig

pytestmark = pytest.mark.unit
CLASSIFIER = {"name": "words", "kind": "linear", "model": "some.module:function"}


@pytest.mark.parametrize(
    ("tuning", "reason"),
    [
        ({"dev_examples": 200}, None),
        ({"dev_examples": 199}, "its data.dev_examples=199 is below data.heldout_prompts=200"),
        ({"dev_examples": 200, "dev_source": "dev.jsonl"}, "its dev examples came from another file"),
        ({"dev_examples": 10, "source": "other.jsonl"}, None),
    ],
)
def test_a_fine_tuning_that_may_have_learned_the_held_out_prompts(
    tmp_path: Path, tuning: dict[str, Any], reason: str | None
) -> None:
    (tmp_path / "config.yaml").write_text(
        dump_config(parse_section(SFTConfig, {"data": {"source": "texts.jsonl"} | tuning}))
    )
    run = {
        "data": {"source": "texts.jsonl", "heldout_prompts": 200},
        "policy": {"adapter": str(tmp_path / "adapter")},
        "reward": {"classifiers": [CLASSIFIER]},
    }
    found = heldout_may_be_learned(parse_config(run))
    assert found is None if reason is None else reason in (found or "")
    other_seed = heldout_may_be_learned(parse_config(run | {"seed": 1}))
    assert (other_seed is None) == (tuning.get("source") == "other.jsonl")
    assert heldout_may_be_learned(parse_config(run | {"policy": {}})) is None
