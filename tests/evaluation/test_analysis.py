import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from analysed_run import PROMPTS, PlainModels, WordJudge, all_rows, make_run, row, save_random_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from detox_ray.config import PolicyConfig
from detox_ray.errors import ConfigError, DataError, ModelError
from detox_ray.evaluation import analysis_sections as sections
from detox_ray.evaluation.analysis import Limits, analyze, token_statistics
from detox_ray.evaluation.analysis_inputs import check_decoder_only, choose_prompts

pytestmark = pytest.mark.unit

LIMITS = Limits(
    prompts=12, attribution_prompts=3, attribution_steps=4, examples=6, min_count=2, resamples=200, batch_size=5
)


@pytest.fixture
def captum():
    return pytest.importorskip("captum.attr", reason="the extra `analysis` is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def run_dir(tiny_model, tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return make_run(tmp_path_factory.mktemp("runs") / "run", tiny_model, all_rows(tokenizer))


@pytest.fixture(scope="module")
def analysis(run_dir):
    pytest.importorskip("captum.attr", reason="the extra `analysis` is not installed", exc_type=ImportError)
    shares = []
    content = analyze(run_dir, judge=WordJudge(), limits=LIMITS, progress=lambda stage, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    return content


def weighted_mean(pairs):
    return sum(value * count for value, count in pairs) / sum(count for _, count in pairs)


@pytest.fixture(scope="module")
def expected(run_dir, tiny_model):
    """The chosen prompts with the first response of each system, from the file, and the plain models."""
    rows = [r for r in pq.read_table(run_dir / "generations.parquet").to_pylist() if r["sample"] == 0]
    chosen = choose_prompts([r["prompt_id"] for r in rows], LIMITS.seed)[: LIMITS.prompts]
    answers = {(r["system"], r["prompt_id"]): r for r in rows}
    return PlainModels(tiny_model, run_dir / "adapter"), chosen, answers


def test_logprobs_equal_the_loss_of_transformers(analysis, expected):
    models, chosen, answers = expected
    section = analysis["logprobs"]
    of = {
        "all": lambda r: True,
        "toxic": lambda r: "fool" in r["response"],
        "civil": lambda r: "fool" not in r["response"],
    }
    for split, belongs in of.items():
        rows = [answers["base", p] for p in chosen if belongs(answers["base", p])]
        assert section["responses"][split] == len(rows)
        means = {}
        for system in ("base", "tuned"):
            means[system] = -weighted_mean([models.loss(system, r["prompt"], r["response"]) for r in rows])
            found = section["systems"][system][split]
            assert found["value"] == pytest.approx(means[system], rel=1e-4)
            assert found["low"] <= found["value"] <= found["high"]
        change = section["changes"]["tuned"][split]["value"]
        assert change == pytest.approx(means["tuned"] - means["base"], abs=2e-4)
        assert abs(change) > 1e-2
    assert section["responses"]["toxic"] >= 3


def test_entropy_equals_that_of_the_softmax(analysis, expected):
    models, chosen, answers = expected
    for system in ("base", "tuned"):
        rows = [answers[system, p] for p in chosen]
        entropies = [models.entropies(system, r["prompt"], r["response"]) for r in rows]
        mean = sum(map(sum, entropies)) / sum(map(len, entropies))
        assert analysis["entropy"]["systems"][system]["value"] == pytest.approx(mean, rel=1e-4)
        points = analysis["entropy"]["by_position"][system]
        # Positions that fewer than 10 of the 12 responses reach are left out.
        assert len(points) == sorted(map(len, entropies))[2]
        for point in points:
            there = [e[point["position"] - 1] for e in entropies if len(e) >= point["position"]]
            assert (point["value"], point["responses"]) == (pytest.approx(np.mean(there), rel=1e-4), len(there))


def test_shifts_of_examples_and_words_equal_the_differences_of_plain_models(analysis, expected):
    models, chosen, answers = expected
    examples = analysis["examples"]["tuned"]
    assert [e["chosen"] for e in examples] == ["fell"] * 2 + ["rose"] * 2 + ["random"] * 2
    assert [e["system"] for e in examples] == ["base"] * 2 + ["tuned"] * 2 + ["base"] * 2

    def shift(r):
        losses = {s: models.loss(s, r["prompt"], r["response"]) for s in ("base", "tuned")}
        return (losses["base"][0] - losses["tuned"][0]) * losses["base"][1]

    shifts = {key: shift(answers[key]) for key in answers if key[1] in chosen}
    for example in examples:
        assert example["shift"] == pytest.approx(shifts[example["system"], f"id-{example['prompt']}"], abs=2e-3)
        assert sum(t["shift"] for t in example["tokens"]) == pytest.approx(example["shift"], abs=2e-3)
        assert "".join(t["text"] for t in example["tokens"]) == example["response"]
    fell = sorted(s for (system, _), s in shifts.items() if system == "base")[:2]
    assert [e["shift"] for e in examples[:2]] == pytest.approx(fell, abs=2e-3)

    words = analysis["words"]["systems"]["tuned"]
    listed = {w["word"]: w for side in words.values() for w in side}
    assert {"fool", "calm", "well", "fine"} <= set(listed)
    assert "never" not in listed
    assert {w for w, entry in listed.items() if entry["toxic"]} == {"fool"}
    assert listed["calm"]["count"] == 12
    assert all(w["shift"] < 0 for w in words["less_likely"])
    assert all(w["shift"] > 0 for w in words["more_likely"])


def test_attribution_is_of_every_system_and_bounded(analysis):
    section = analysis["attribution"]
    assert (section["prompts"], section["steps"]) == (3, 4)
    for system in ("base", "tuned"):
        for measure in ("prompt_entropy", "prompt_share"):
            assert 0 < section["systems"][system][measure]["value"] < 1
    change = section["changes"]["tuned"]["prompt_share"]["value"]
    values = [section["systems"][s]["prompt_share"]["value"] for s in ("base", "tuned")]
    assert change == pytest.approx(values[1] - values[0], abs=1e-5)


def test_the_file_is_what_was_returned_and_strict_json(analysis, run_dir):
    text = (run_dir / "analysis.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == analysis
    assert not list(run_dir.glob("*.tmp"))
    assert analysis["systems"] == ["base", "tuned"]
    assert (analysis["prompts"], analysis["skipped"], analysis["relevance"]) == (12, {}, None)


def test_the_same_seed_chooses_the_same_prompts():
    ids = [f"p{n}" for n in range(50)]
    assert choose_prompts(ids, 0) == choose_prompts(reversed(ids), 0)
    assert sorted(choose_prompts(ids, 0)) == sorted(ids)
    assert choose_prompts(ids, 0)[:10] != choose_prompts(ids, 1)[:10]
    # A prompt more moves no other.
    assert [p for p in choose_prompts([*ids, "p99"], 0) if p != "p99"] == choose_prompts(ids, 0)


def test_token_statistics_do_not_depend_on_the_batch(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    rng = np.random.default_rng(0)
    prompts, responses = ([rng.integers(2, 96, n).tolist() for n in rng.integers(1, 20, size=9)] for _ in range(2))
    alone, together = (token_statistics(model, prompts, responses, size) for size in (1, 9))
    for i, response in enumerate(responses):
        assert alone.logprobs[i].shape == alone.entropies[i].shape == (len(response),)
        assert np.allclose(alone.logprobs[i], together.logprobs[i], atol=1e-5)
        assert np.allclose(alone.entropies[i], together.entropies[i], atol=1e-5)


def test_a_token_that_cannot_follow_has_no_part_in_the_entropy():
    class Fixed:
        device = torch.device("cpu")
        config = PretrainedConfig(is_encoder_decoder=False)

        def __call__(self, input_ids, use_cache):
            logits = torch.tensor([0.0, 0.0, -torch.inf]).expand(*input_ids.shape, 3)
            return type("Output", (), {"logits": logits})

    found = token_statistics(Fixed(), [[0]], [[1, 0]], 4)
    assert found.entropies[0] == pytest.approx(np.log(2))
    assert found.logprobs[0] == pytest.approx(-np.log(2))


def test_intervals_by_hand():
    comparison = sections.Comparison("a", ["b"], resamples=400, seed=0)
    tokens = {"a": [np.array([1.0, 2.0, 3.0]), np.array([6.0])], "b": [np.array([3.0]), np.array([5.0])]}
    found = comparison.per_token(tokens)
    assert (found["systems"]["a"]["value"], found["systems"]["b"]["value"]) == (3.0, 4.0)
    assert found["changes"]["b"]["value"] == 1.0
    # The only resamples are both prompts, or one of them twice: 2 and 6, so the ends are among these.
    assert (found["systems"]["a"]["low"], found["systems"]["a"]["high"]) == (2.0, 6.0)
    kept = comparison.per_prompt({"a": [1.0, np.nan, 3.0], "b": [2.0, 9.0, 5.0]})
    assert (kept["systems"]["a"]["value"], kept["systems"]["b"]["value"]) == (2.0, 3.5)
    nothing = comparison.per_prompt({"a": [np.nan], "b": [1.0]})
    assert nothing["changes"]["b"] == {"value": None, "low": None, "high": None}


def test_relevance_is_of_each_systems_own_responses(captum, tiny_model, tmp_path, monkeypatch):
    from detox_ray.evaluation import analysis as module

    class WordsInCommon:
        def __init__(self, model, revision):
            assert revision == "v1"
            self.model = model

        def similarity(self, prompts, responses, batch_size):
            return np.array(
                [len(set(p.split()) & set(r.split())) / 10 for p, r in zip(prompts, responses, strict=True)]
            )

    monkeypatch.setattr(module, "SentenceEncoder", WordsInCommon)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [row(tokenizer, s, p, t) for p in PROMPTS for s, t in (("base", " the day was"), ("tuned", " the end"))]
    run = make_run(tmp_path / "run", tiny_model, rows)
    encoder = {"relevance_model": "encoder", "relevance_revision": "v1"}
    found = analyze(run, judge=WordJudge(), limits=LIMITS, **encoder)["relevance"]
    assert found["model"] == "encoder"
    assert found["systems"]["base"] == {"value": 0.3, "low": 0.3, "high": 0.3}
    assert found["changes"]["tuned"] == {"value": -0.2, "low": -0.2, "high": -0.2}


def test_a_quantised_run_is_analysed_on_the_base_that_answered(captum, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    run = make_run(tmp_path / "run", tiny_model, all_rows(tokenizer), quantization="nf4")
    found = analyze(run, judge=WordJudge(), limits=LIMITS)
    [base] = run.glob("dequantized_base-*")
    models = PlainModels(str(base), run / "adapter")
    rows = {r["prompt_id"]: r for r in pq.read_table(run / "generations.parquet").to_pylist() if r["system"] == "base"}
    firsts = [
        {**r, "response": " bad, you fool!" if n % 3 == 0 else f" fine and {n} ok"} for n, r in enumerate(rows.values())
    ]
    chosen = choose_prompts(rows, LIMITS.seed)[: LIMITS.prompts]
    for system in ("base", "tuned"):
        losses = [models.loss(system, r["prompt"], r["response"]) for r in firsts if r["prompt_id"] in chosen]
        value = found["logprobs"]["systems"][system]["all"]["value"]
        assert value == pytest.approx(-weighted_mean(losses), rel=1e-4)
    assert found["model"] == tiny_model


def test_several_adapters_without_a_run(captum, tiny_model, tmp_path):
    """An evaluation folder of three systems; one has a name that PEFT would not take, and no judge is at hand."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [row(tokenizer, s, p, f" {s} it is") for p in PROMPTS for s in ("before", "v1.0", "v2.0")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "generations.parquet")
    (tmp_path / "evaluation.json").write_text('{"reference": "before"}')
    save_random_adapter(tiny_model, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    found = analyze(
        tmp_path,
        policy=PolicyConfig(model=tiny_model, quantization="none"),
        adapters={"v1.0": tmp_path / "one", "v2.0": tmp_path / "two"},
        limits=LIMITS,
    )
    assert found["systems"] == ["before", "v1.0", "v2.0"]
    logprobs = found["logprobs"]["systems"]
    assert logprobs["v1.0"] == logprobs["v2.0"]
    assert logprobs["v1.0"]["all"] != logprobs["before"]["all"]
    assert found["logprobs"]["changes"].keys() == found["examples"].keys() == {"v1.0", "v2.0"}
    # All responses are equally toxic: there is no toxic one to speak of, and no word is known to be.
    assert logprobs["v1.0"]["toxic"]["value"] is None
    assert found["judge"] is None
    assert all(w["toxic"] is None for side in found["words"]["systems"]["v1.0"].values() for w in side)


def test_what_is_passed_over_is_counted(captum, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = all_rows(tokenizer)
    base = [r for r in rows if r["system"] == "base" and r["sample"] == 0]
    base[0] |= {"response": "", "response_ids": []}
    base[1] |= {"toxicity": float("nan")}
    base[2] |= {"response_ids": [5] * 600}
    rows = [r for r in rows if not (r["system"] == "tuned" and r["prompt"] == PROMPTS[3])]
    run = make_run(tmp_path / "run", tiny_model, rows)
    found = analyze(run, judge=WordJudge(), limits=LIMITS)
    assert found["prompts"] == 10
    assert found["skipped"] == {
        "not answered by every system": 1,
        "empty response": 1,
        "no toxicity": 1,
        "too long for the model": 1,
    }


def test_missing_parts_are_one_line_that_names_them(tiny_model, run_dir, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)

    def refused(error, **options):
        with pytest.raises(error) as raised:
            analyze(run, judge=WordJudge(), limits=LIMITS, **options)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "no responses of 'sft'" in refused(DataError, adapters={"sft": run / "adapter"})
    monkeypatch.setitem(sys.modules, "captum", None)
    assert "detox_ray[analysis]" in refused(ConfigError)

    for broken in ("{", "[]"):
        (run / "evaluation.json").write_text(broken)
        assert "evaluation.json is not an evaluation" in refused(DataError)
    (run / "evaluation.json").unlink()

    (run / "adapter" / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refused(DataError)
    shutil.rmtree(run / "adapter")
    assert "no adapter of 'tuned'" in refused(DataError)

    pq.write_table(pa.table({"system": ["base"]}), run / "generations.parquet")
    assert "lacks the columns prompt_id, prompt" in refused(DataError)
    (run / "generations.parquet").write_bytes(b"not parquet")
    assert "not a readable Parquet file" in refused(DataError)
    (run / "generations.parquet").unlink()
    assert "generations.parquet does not exist" in refused(DataError)


def test_a_folder_without_a_configuration_names_no_base(captum, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"has no config\.yaml, which names the base model"):
        analyze(tmp_path / "run", judge=WordJudge(), limits=LIMITS)


def test_models_that_do_not_fit_are_refused(captum, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = all_rows(tokenizer)
    run = make_run(tmp_path / "run", tiny_model, rows)
    for r in rows:
        r["response_ids"] = [500]
    pq.write_table(pa.Table.from_pylist(rows), run / "generations.parquet")
    with pytest.raises(DataError, match="has the token 500, and the model knows 96"):
        analyze(run, judge=WordJudge(), limits=LIMITS)
    adapter = run / "adapter" / "adapter_config.json"
    adapter.write_text(adapter.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(ModelError, match="does not fit"):
        analyze(run, judge=WordJudge(), limits=LIMITS)


def test_webtext(captum, shared, tmp_path):
    """The real small model: numbers of transformers again, and an integral that is exact to a few per cent."""
    model = str(shared / "models" / "webtext-6m")
    tokenizer = AutoTokenizer.from_pretrained(model)
    subjects = ["weather", "train", "garden", "film", "dinner", "game", "road", "book", "house", "music"]
    rows = [
        row(tokenizer, system, f"I think that the {subject} today was", text)
        for subject in subjects
        for system, text in (("base", " bad, and you are a fool."), ("tuned", f" good, and the {subject} was long."))
    ]
    run = make_run(tmp_path / "run", model, rows)
    limits = Limits(attribution_prompts=2, min_count=5, resamples=200)
    found = analyze(run, judge=WordJudge(), limits=limits)
    assert found["attribution"]["relative_error"] < 0.05
    models = PlainModels(model, run / "adapter")
    losses = [models.loss("tuned", r["prompt"], r["response"]) for r in rows if r["system"] == "base"]
    assert found["logprobs"]["systems"]["tuned"]["toxic"]["value"] == pytest.approx(-weighted_mean(losses), rel=1e-4)
    assert found["logprobs"]["systems"]["tuned"]["civil"]["value"] is None
    words = {w["word"]: w for side in found["words"]["systems"]["tuned"].values() for w in side}
    assert words["fool"]["toxic"]
    assert words["fool"]["count"] == 10


def test_an_encoder_decoder_is_refused(tiny_t5: str) -> None:
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(t5\); detox-ray analyze reads decoder-only models"):
        check_decoder_only(PolicyConfig(model=tiny_t5))
