import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.feature_extraction.text import HashingVectorizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from detox_ray.config import DataConfig
from detox_ray.config_file import parse_config
from detox_ray.data import lab, lab_models
from detox_ray.data.examples import read_examples
from detox_ray.data.lab import build_lab, lab_path, remove_lab, resolve_lab
from detox_ray.data.lab_text import TOPICS, exchanges
from detox_ray.data.prompts import load_prompts
from detox_ray.errors import ConfigError, DataError

CLASSIFIERS = [
    {"name": "small", "kind": "transformers", "model": "lab:classifier", "label": "rude"},
    {"name": "linear", "kind": "linear", "model": "lab:linear"},
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETOX_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def empty_lab(cache, monkeypatch):
    """A lab whose parts are made in no time; the list collects the folders they were made in."""
    made = []

    def make(folder, seed, progress):
        time.sleep(0.2)
        (folder / "prompts.jsonl").write_text(f"{seed}\n", encoding="utf-8")
        made.append(folder)

    monkeypatch.setattr(lab, "_make", make)
    return made


@pytest.mark.unit
class TestCache:
    def test_is_built_once_and_used_again(self, cache, empty_lab):
        folder = build_lab(seed=4)
        assert folder == cache / f"lab-{lab.LAB_VERSION}-4"
        assert (folder / "prompts.jsonl").read_text(encoding="utf-8") == "4\n"
        assert build_lab(seed=4) == folder
        assert len(empty_lab) == 1

    def test_of_many_builders_at_once_one_builds_and_all_get_it(self, cache, empty_lab):
        folders = []
        threads = [threading.Thread(target=lambda: folders.append(build_lab())) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(empty_lab) == 1
        assert folders == [cache / f"lab-{lab.LAB_VERSION}-0"] * 6

    def test_a_build_that_fails_leaves_nothing_and_the_next_one_succeeds(self, cache, empty_lab, monkeypatch):
        make = lab._make
        monkeypatch.setattr(lab, "_make", lambda folder, seed, progress: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_lab()
        assert [p.name for p in cache.iterdir()] == [f"lab-{lab.LAB_VERSION}-0.lock"]
        monkeypatch.setattr(lab, "_make", make)
        assert (build_lab() / "prompts.jsonl").is_file()

    def test_what_a_killed_build_left_is_cleared_away(self, cache, empty_lab):
        abandoned = cache / f"lab-{lab.LAB_VERSION}-0.building-abc"
        abandoned.mkdir(parents=True)
        folder = build_lab()
        assert not abandoned.exists()
        assert folder.is_dir()

    def test_remove_takes_the_labs_and_nothing_else(self, cache, empty_lab):
        assert remove_lab() is False
        build_lab(seed=0)
        build_lab(seed=1)
        (cache / "lab-notes").mkdir()
        assert remove_lab() is True
        assert [p.name for p in cache.iterdir()] == ["lab-notes"]
        assert remove_lab() is False

    def test_a_cache_that_cannot_be_written(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("", encoding="utf-8")
        monkeypatch.setenv("DETOX_RAY_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(DataError, match="set DETOX_RAY_CACHE to a folder that can be written"):
            build_lab()


@pytest.mark.unit
class TestResolve:
    def test_every_lab_value_becomes_a_path_and_the_rest_stays(self, cache, empty_lab):
        config = parse_config({"reward": {"classifiers": CLASSIFIERS}})
        resolved = resolve_lab(config)
        folder = cache / f"lab-{lab.LAB_VERSION}-0"
        assert resolved.data.source == str(folder / "prompts.jsonl")
        assert resolved.policy.model == str(folder / "policy")
        assert [c.model for c in resolved.reward.classifiers] == [str(folder / "classifier"), str(folder / "linear")]
        assert resolved.evaluation == config.evaluation
        assert resolved.policy.lora == config.policy.lora
        assert config.data.source == "lab:prompts"
        assert len(empty_lab) == 1

    def test_a_judge_of_the_lab_is_resolved_too(self, cache, empty_lab):
        judge = {"name": "judge", "kind": "linear", "model": "lab:linear"}
        config = parse_config({"reward": {"classifiers": CLASSIFIERS[:1]}, "evaluation": {"judge": judge}})
        assert resolve_lab(config).evaluation.judge.model.endswith("/linear")

    def test_without_a_lab_value_nothing_is_built(self, cache, empty_lab):
        classifiers = [{"name": "c", "kind": "transformers", "model": "some/classifier"}]
        tree = {"data": {"source": "p.txt"}, "policy": {"model": "some/model"}, "reward": {"classifiers": classifiers}}
        config = parse_config(tree)
        assert resolve_lab(config) == config
        assert not cache.exists()

    def test_an_unknown_part_is_refused_before_anything_is_built(self, cache, empty_lab):
        config = parse_config({"policy": {"model": "lab:polcy"}, "reward": {"classifiers": CLASSIFIERS}})
        with pytest.raises(
            ConfigError, match=r"policy.model = 'lab:polcy' is no part of the lab; there are lab:prompts, "
        ):
            resolve_lab(config)
        with pytest.raises(ConfigError, match="lab:judge"):
            lab_path("judge")  # type: ignore[arg-type]  # the point of the test
        assert not cache.exists()


@pytest.mark.unit
class TestTraining:
    @pytest.fixture(scope="class")
    def training(self):
        sample = exchanges(0, 600)
        return sample, lab_models.train_tokenizer([e.prompt + e.response for e in sample])

    def test_the_same_seed_gives_the_same_weights(self, training):
        def weights(seed):
            policy = lab_models.train_policy(*training, seed, lambda share: None, steps=2)
            classifier, _ = lab_models.train_classifier(*training, seed, lambda share: None, steps=2)
            return [p.clone() for p in (*policy.parameters(), *classifier.parameters())]

        first, second, other = weights(1), weights(1), weights(2)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))

    def test_the_policy_learns_responses_from_the_first_steps_on(self, training):
        sample, tokenizer = training
        losses = []
        for steps in (1, 40):
            policy = lab_models.train_policy(sample, tokenizer, 0, lambda share: None, steps=steps)
            ids = torch.tensor([[0, *tokenizer(sample[0].prompt + sample[0].response)["input_ids"], 0]])
            losses.append(float(policy(input_ids=ids, labels=ids).loss.detach()))
        assert losses[1] < 0.7 * losses[0]

    def test_tokens_give_back_any_text(self, training):
        _, tokenizer = training
        for text in ("Mia: how do I clean a bike?\nTom: Sure,", "naïve 🙂 \t text", " "):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)


@pytest.mark.e2e
class TestKilledBuild:
    def test_leaves_no_lab(self, cache):
        command = [sys.executable, "-c", "from detox_ray.data.lab import build_lab; build_lab()"]
        builder = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            deadline = time.monotonic() + 120
            while not list(cache.glob("lab-*.building-*/linear/linear.safetensors")):
                assert builder.poll() is None, "the builder stopped by itself"
                assert time.monotonic() < deadline, "the builder made nothing in two minutes"
                time.sleep(0.05)
        finally:
            builder.send_signal(signal.SIGKILL)
            builder.wait()
        assert not (cache / f"lab-{lab.LAB_VERSION}-0").exists()
        assert remove_lab() is False
        assert list(cache.iterdir()) == []


@pytest.fixture(scope="session")
def built_lab():
    """The lab in the user's own cache, built on the first use of this machine."""
    return lab_path("policy").parent


@pytest.mark.e2e
class TestBuiltLab:
    @pytest.fixture(scope="class")
    def unseen(self):
        return exchanges(20_001, 1000)

    def test_has_many_prompts_and_none_twice(self, built_lab):
        prompts = [json.loads(line)["prompt"] for line in (built_lab / "prompts.jsonl").open(encoding="utf-8")]
        assert len(set(prompts)) == len(prompts) >= 1500
        assert prompts == [e.prompt for e in exchanges(0, len(prompts))]

    def test_the_answers_are_civil_and_to_prompts_of_their_own(self, built_lab):
        prompts = {json.loads(line)["prompt"] for line in (built_lab / "prompts.jsonl").open(encoding="utf-8")}
        found = read_examples(built_lab / "answers.jsonl")
        assert found.format == "pairs"
        assert not found.left_out
        assert len(found.examples) >= 1500
        assert not prompts & {example.turns[0] for example in found.examples}
        rude = {e.response for e in exchanges(20_002, 4000) if e.rude}
        assert not rude & {example.response for example in found.examples}

    def test_load_prompts_reads_it(self, built_lab):
        tokenizer = AutoTokenizer.from_pretrained(built_lab / "policy")
        split = load_prompts(DataConfig(), tokenizer, seed=0)
        assert len(split.heldout) == 200
        assert len(split.train) >= 1300
        for prompt in split.heldout:
            assert prompt.token_ids == (0, *tokenizer(prompt.text)["input_ids"])

    def test_the_classifier_knows_rude_from_civil(self, built_lab, unseen):
        model = AutoModelForSequenceClassification.from_pretrained(built_lab / "classifier")
        tokenizer = AutoTokenizer.from_pretrained(built_lab / "classifier")
        assert model.config.id2label == {0: "civil", 1: "rude"}
        assert lab_models.classifier_accuracy(model, tokenizer, unseen) >= 0.97
        assert lab_models.classifier_accuracy(model, tokenizer, [*unseen[:3], type(unseen[0])("A:", "", False)]) >= 0.75

    def test_the_linear_classifier_knows_rude_from_civil(self, built_lab, unseen):
        settings = json.loads((built_lab / "linear" / "linear.json").read_text(encoding="utf-8"))
        tensors = load_file(built_lab / "linear" / "linear.safetensors")
        assert tensors["coef"].shape == (settings["n_features"],)
        assert tensors["coef"].dtype == tensors["intercept"].dtype == np.float32
        vectorizer = HashingVectorizer(**{**settings, "ngram_range": tuple(settings["ngram_range"])})
        logits = vectorizer.transform([e.response for e in unseen]) @ tensors["coef"] + tensors["intercept"]
        assert np.mean((logits > 0) == [e.rude for e in unseen]) >= 0.97
        assert not list(built_lab.rglob("*.pkl")) + list(built_lab.rglob("*.bin"))

    def test_the_policy_answers_rudely_half_the_time_and_to_the_point(self, built_lab):
        from profanity_check import predict_prob

        policy = AutoModelForCausalLM.from_pretrained(built_lab / "policy")
        tokenizer = AutoTokenizer.from_pretrained(built_lab / "policy")
        heldout = load_prompts(DataConfig(), tokenizer, seed=0).heldout
        batch = tokenizer.pad({"input_ids": [list(p.token_ids) for p in heldout]}, return_tensors="pt")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ids = policy.generate(**batch, do_sample=True, top_k=0, max_new_tokens=24, num_return_sequences=2)
        response_ids = ids[:, batch["input_ids"].shape[1] :]
        responses = tokenizer.batch_decode(response_ids, skip_special_tokens=True)
        toxicity = predict_prob(responses)
        assert 0.35 <= np.mean(toxicity >= 0.5) <= 0.65
        assert np.mean((toxicity > 0.1) & (toxicity < 0.8)) < 0.05
        assert np.mean([(row == 0).any() for row in response_ids.numpy()]) > 0.97
        topics = [topic_of(p.text) for p in heldout for _ in range(2)]
        assert np.mean([topic in response for topic, response in zip(topics, responses, strict=True)]) > 0.7


def topic_of(prompt):
    words = set(re.findall(r"\w+", prompt))
    return next(topic for topic in TOPICS if topic in words)
