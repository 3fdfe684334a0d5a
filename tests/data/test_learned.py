"""What an adapter was trained on is never held out by a run that starts from it, however the two choose their texts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from detox_ray.config import DataConfig, PolicyConfig
from detox_ray.data.example_split import load_examples
from detox_ray.data.learned import learned_by, learned_digest, write_learned
from detox_ray.data.prompts import load_prompts, normalized
from detox_ray.errors import DataError
from detox_ray.policy.adapter import save_adapter
from detox_ray.policy.policy import Policy
from detox_ray.sft_config import ExampleConfig

pytestmark = pytest.mark.unit
END_IDS = (1,)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompts of 2 to 41 words, each with a response and a score."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"{i} " + "day " * (1 + i % 40), "response": "the end", "toxicity": (i % 10) / 10}
        for i in range(400)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("data", "seed"),
    [({}, 0), ({}, 1), ({"min_score": 0.5}, 0), ({"max_tokens": 12}, 0), ({"max_tokens": 24, "too_long": "drop"}, 0)],
)
def test_no_held_out_prompt_was_learned(
    pairs: str, tiny_model: str, tmp_path: Path, data: dict[str, object], seed: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tuning = load_examples(ExampleConfig(source=pairs, dev_examples=200, max_tokens=256), tokenizer, END_IDS, 0)
    write_learned(tmp_path, tuning.learned, ())
    learned = learned_by(str(tmp_path / "adapter"))
    assert learned == {learned_digest(group) for group in tuning.learned}

    config = DataConfig(source=pairs, text_column="prompt", attribute="toxicity", heldout_prompts=20, **data)
    split = load_prompts(config, tokenizer, seed, learned)
    assert len(split.heldout) == 20
    whole = {tuple(text.split()[:1]): text for text in map(normalized, prompts_of(pairs))}
    assert not {whole[tuple(p.text.split()[:1])] for p in split.heldout} & tuning.learned
    assert {p.text for p in split.heldout} & {p.text for p in split.train} == set()


def test_a_continued_run_knows_what_was_learned_before_it_and_holds_out_the_same_again(
    pairs: str, tiny_model: str, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = DataConfig(source=pairs, text_column="prompt", heldout_prompts=30)
    first = load_prompts(config, tokenizer, 0)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    write_learned(tmp_path / "first", first.learned, ())
    adapter = str(tmp_path / "first" / "adapter")
    second = load_prompts(config, tokenizer, 1, learned_by(adapter))
    assert {p.text for p in second.heldout} == {p.text for p in first.heldout}
    write_learned(tmp_path / "second", second.learned, learned_by(adapter))
    both = learned_by(None, adapter, str(tmp_path / "second" / "adapter"))
    assert load_prompts(config, tokenizer, 1, both).heldout == second.heldout
    with pytest.raises(DataError, match=r"370 of 400 prompts are .* policy\.adapter was trained on, 30 are new"):
        load_prompts(config.model_copy(update={"heldout_prompts": 31}), tokenizer, 1, both)


def test_a_fine_tuning_that_goes_on_looks_at_examples_that_are_new(pairs: str, tiny_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = ExampleConfig(source=pairs, dev_examples=50)
    first = load_examples(config, tokenizer, END_IDS, 0)
    second = load_examples(config, tokenizer, END_IDS, 1, frozenset(map(learned_digest, first.learned)))
    assert {e.prompt_ids.tobytes() for e in second.dev} == {e.prompt_ids.tobytes() for e in first.dev}


def test_a_prompt_that_several_texts_begin_with_was_learned_if_one_of_them_was(tiny_model: str, tmp_path: Path) -> None:
    texts = [f"a long day {i} and what came of it{end}" for i in range(20) for end in ("", " in the end")]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = DataConfig(source=str(tmp_path / "texts.txt"), max_tokens=20, heldout_prompts=5)
    both = [learned_digest(texts[i]) for i in (0, 3)]
    split = load_prompts(config, tokenizer, 0, frozenset(both))
    assert len(split.train) + len(split.heldout) == 20
    assert not {texts[0][:20], texts[3][:20]} & {prompt.text for prompt in split.heldout}
    assert split.learned >= {texts[0], texts[1], texts[2], texts[3]}
    everything = {learned_digest(text) for text in texts[10:]}
    last = load_prompts(config, tokenizer, 0, everything).heldout
    assert {prompt.text for prompt in last} == {text[:20] for text in texts[:10]}


def test_the_limit_counts(pairs: str, tiny_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = ExampleConfig(source=pairs, dev_examples=50, limit=30)
    assert len(load_examples(config, tokenizer, END_IDS, 0).learned) == 30


def test_runs_hand_it_on_and_keep_what_they_held_out(
    pairs: str, tiny_model: str, tmp_path: Path, refused_line: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands stop where Ray would start."""
    policy = Policy(PolicyConfig(model=tiny_model, quantization="none"), torch.device("cpu"))
    capsys.readouterr()
    prompts = list(map(normalized, prompts_of(pairs)))
    for name in ("begun", "run", "tuning"):
        (tmp_path / name).mkdir()
    save_adapter(policy.adapter(), tmp_path / "begun" / "adapter")
    write_learned(tmp_path / "begun", prompts[:380], ())
    given = (tmp_path / "begun" / "learned_prompts.txt").read_text()
    common = [
        *(f"output_dir={tmp_path}", f"policy.model={tiny_model}", "policy.quantization=none", "seed=1"),
        *(f"policy.adapter={tmp_path / 'begun' / 'adapter'}", f"data.source={pairs}", "ray.address=127.0.0.1:1"),
    ]
    train = ["train", str(ROOT / "configs" / "laptop.yaml"), "name=run", *common, "data.text_column=prompt"]
    train += ["data.heldout_prompts=20", "evaluation.prompts=10", "rollout.engine=transformers"]
    assert "does not answer" in refused_line(*train)
    # All but the 20 that are new are trained on, now or before.
    assert (tmp_path / "run" / "learned_prompts.txt").read_text() == given
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "begun" / "learned_prompts.txt").unlink()
    assert "does not answer" in refused_line(*train)
    assert (tmp_path / "run" / "learned_prompts.txt").read_text() == given

    write_learned(tmp_path / "begun", prompts[:380], ())
    sft = [
        "sft",
        str(ROOT / "configs" / "sft-lab.yaml"),
        "name=tuning",
        *common,
        "data.dev_examples=20",
        "data.max_tokens=256",
    ]
    assert "does not answer" in refused_line(*sft)
    assert (tmp_path / "tuning" / "learned_prompts.txt").read_text() == given
    questions = {json.loads(line)["prompt"] for line in (tmp_path / "tuning" / "dev_prompts.jsonl").open()}
    assert len(questions) == 20


def test_nothing_is_known_of_an_adapter_outside_a_run(tmp_path: Path) -> None:
    assert learned_by(None, str(tmp_path / "adapter")) == frozenset()


def prompts_of(path: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in Path(path).read_text().splitlines()]
