import hashlib
import json
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from detox_ray.config import DataConfig
from detox_ray.data.prompts import load_prompts, start_ids
from detox_ray.errors import ConfigError, DataError

pytestmark = pytest.mark.unit


def word_tokenizer(bos="<s>", eos="</s>", adds_bos=False):
    """Ids 0, 1, 2 are <unk>, <s>, </s>; every letter is a token of its own, and so is every white space."""
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?'"
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token=bos, eos_token=eos)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(bos=None)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def texts(prompts):
    return sorted(p.text for p in prompts)


def everything(split):
    return split.train + split.heldout


def config(source, **changes):
    return DataConfig(**{"source": str(source), "heldout_prompts": 1, **changes})


def rtp(text, toxicity, challenging=False):
    return {
        "filename": "f.txt",
        "challenging": challenging,
        "prompt": {"text": text, "toxicity": toxicity, "threat": 0.1},
        "continuation": {"text": " and so on", "toxicity": 0.9},
    }


class TestSources:
    EXPECTED = ("one thing", "another thing, said he", "a third 'thing'")

    @pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "txt"])
    def test_every_file_format_gives_the_same_prompts(self, kind, tmp_path, tokenizer):
        import pandas as pd

        path = tmp_path / f"prompts.{kind}"
        frame = pd.DataFrame({"prompt": self.EXPECTED, "rank": [1, 2, 3]})
        match kind:
            case "jsonl":
                frame.to_json(path, orient="records", lines=True)
            case "json":
                frame.to_json(path, orient="records")
            case "csv" | "tsv":
                frame.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
            case "parquet":
                frame.to_parquet(path)
            case "txt":
                path.write_text("\n".join(self.EXPECTED) + "\n", encoding="utf-8")
        split = load_prompts(config(path), tokenizer, seed=0)
        assert texts(everything(split)) == sorted(self.EXPECTED)
        assert len(split.heldout) == 1
        if kind != "txt":
            assert sorted(int(p.meta["rank"]) for p in everything(split)) == [1, 2, 3]

    def test_another_column_and_a_quoted_line_break_in_csv(self, tmp_path, tokenizer):
        path = tmp_path / "p.csv"
        path.write_text('id,question\n1,"two\nlines"\n2,one\n', encoding="utf-8-sig")
        split = load_prompts(config(path, text_column="question"), tokenizer, seed=0)
        assert texts(everything(split)) == ["one", "two\nlines"]

    def test_a_hub_dataset_is_loaded_with_its_split(self, monkeypatch, tokenizer):
        import datasets

        asked = []

        def load_dataset(name, split):
            asked.append((name, split))
            return datasets.Dataset.from_list([rtp("one", 0.2), rtp("two", 0.3)])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        split = load_prompts(config("someone/prompts", split="validation"), tokenizer, seed=0)
        assert asked == [("someone/prompts", "validation")]
        assert texts(everything(split)) == ["one", "two"]

    def test_home_is_expanded(self, tmp_path, tokenizer, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "p.txt").write_text("one\ntwo\n", encoding="utf-8")
        assert len(everything(load_prompts(config("~/p.txt"), tokenizer, seed=0))) == 2


class TestFilters:
    def test_score_window_on_the_nested_attribute_with_null_scores_counted(self, tmp_path, tokenizer):
        records = [rtp("low", 0.1), rtp("mid", 0.5), rtp("edge", 0.7), rtp("high", 0.9), rtp("none", None)]
        source = write_jsonl(tmp_path / "r.jsonl", records)
        split = load_prompts(config(source, min_score=0.5, max_score=0.7), tokenizer, seed=0)
        assert texts(everything(split)) == ["edge", "mid"]
        assert split.skipped == {"outside score window": 2, "null score": 1}

    def test_without_a_window_null_scores_stay(self, tmp_path, tokenizer):
        source = write_jsonl(tmp_path / "r.jsonl", [rtp("low", 0.1), rtp("none", None)])
        assert texts(everything(load_prompts(config(source), tokenizer, seed=0))) == ["low", "none"]

    def test_the_window_reads_the_named_attribute_or_a_plain_column(self, tmp_path, tokenizer):
        source = write_jsonl(tmp_path / "r.jsonl", [rtp("one", 0.9), rtp("two", 0.9)])
        assert len(everything(load_prompts(config(source, attribute="threat", max_score=0.2), tokenizer, seed=0))) == 2
        path = tmp_path / "p.csv"
        path.write_text("prompt,rudeness\none,0.2\ntwo,0.4\nthree,\nfour,nan\nfive,0.9\n", encoding="utf-8")
        split = load_prompts(config(path, attribute="rudeness", max_score=0.5), tokenizer, seed=0)
        assert texts(everything(split)) == ["one", "two"]
        assert split.skipped == {"null score": 2, "outside score window": 1}

    def test_scores_travel_in_meta(self, tmp_path, tokenizer):
        source = write_jsonl(tmp_path / "r.jsonl", [rtp("one", 0.9, True), rtp("two", 0.2)])
        meta = {p.text: p.meta for p in everything(load_prompts(config(source), tokenizer, seed=0))}
        assert meta["one"] == {"filename": "f.txt", "challenging": True, "toxicity": 0.9, "threat": 0.1}
        assert meta["two"]["challenging"] is False

    def test_length_bounds_drop_and_trim(self, tmp_path, tokenizer):
        path = tmp_path / "p.txt"
        path.write_text("a\nabcd\nabcdefgh\n\n  \nxy z\n", encoding="utf-8")
        bounds = {"min_tokens": 2, "max_tokens": 4}
        dropped = load_prompts(config(path, too_long="drop", **bounds), tokenizer, seed=0)
        assert texts(everything(dropped)) == ["abcd", "xy z"]
        assert dropped.skipped == {"empty text": 2, "too short": 1, "too long": 1}
        path.write_text("a\nqrstuvw\n\nxy z\n", encoding="utf-8")
        trimmed = {
            p.text.replace(" ", ""): p for p in everything(load_prompts(config(path, **bounds), tokenizer, seed=0))
        }
        assert set(trimmed) == {"qrst", "xyz"}
        assert trimmed["qrst"].token_ids == tuple(tokenizer("qrst")["input_ids"])

    def test_duplicates_by_case_and_spacing_are_one_also_after_trimming(self, tmp_path, tokenizer):
        path = tmp_path / "p.txt"
        path.write_text("Hello  there\nhello there\nHELLO THERE\nabc\nother\n", encoding="utf-8")
        split = load_prompts(config(path), tokenizer, seed=0)
        assert split.skipped == {"duplicate": 2}
        assert len(everything(split)) == 3
        path.write_text("abcdx\nabcdy\nother\n", encoding="utf-8")
        assert load_prompts(config(path, max_tokens=4), tokenizer, seed=0).skipped == {"duplicate": 1}


class TestSplit:
    @pytest.fixture
    def many(self):
        return [f"prompt number {i} of them" for i in range(300)]

    def test_is_disjoint_sized_and_the_same_for_any_order_of_the_file(self, many, tmp_path, tokenizer):
        path = tmp_path / "p.txt"
        path.write_text("\n".join(many), encoding="utf-8")
        first = load_prompts(config(path, heldout_prompts=50), tokenizer, seed=3)
        assert len(first.heldout) == 50
        assert len(first.train) == 250
        assert not set(texts(first.heldout)) & set(texts(first.train))
        shuffled = random.Random(0).sample(many, len(many))
        path.write_text("\n".join(shuffled), encoding="utf-8")
        assert load_prompts(config(path, heldout_prompts=50), tokenizer, seed=3) == first

    def test_order_does_not_matter_among_spellings_of_one_prompt(self, tmp_path, tokenizer):
        path = tmp_path / "p.txt"
        path.write_text("Some Text\nsome text\nother\n", encoding="utf-8")
        first = load_prompts(config(path), tokenizer, seed=0)
        path.write_text("some text\nother\nSome Text\n", encoding="utf-8")
        assert load_prompts(config(path), tokenizer, seed=0) == first

    def test_goes_by_text_and_seed(self, many, tmp_path, tokenizer):
        path = tmp_path / "p.txt"
        path.write_text("\n".join(many), encoding="utf-8")
        heldout = set(texts(load_prompts(config(path, heldout_prompts=50), tokenizer, seed=3).heldout))
        others = set(texts(load_prompts(config(path, heldout_prompts=50), tokenizer, seed=4).heldout))
        assert len(heldout & others) < 25
        # A prompt that was held out stays so when training prompts are taken away.
        kept = [t for i, t in enumerate(many) if t in heldout or i % 2]
        path.write_text("\n".join(kept), encoding="utf-8")
        assert set(texts(load_prompts(config(path, heldout_prompts=50), tokenizer, seed=3).heldout)) == heldout

    def test_limit_is_a_seeded_choice_that_keeps_the_held_out_prompts(self, many, tmp_path, tokenizer):
        path = tmp_path / "p.txt"
        path.write_text("\n".join(many), encoding="utf-8")
        full = load_prompts(config(path, heldout_prompts=50), tokenizer, seed=3)
        limited = load_prompts(config(path, heldout_prompts=50, limit=80), tokenizer, seed=3)
        assert limited.heldout == full.heldout
        assert limited.train == full.train[:30]
        assert texts(limited.train) != sorted(many)[:30]

    def test_id_is_a_digest_of_the_text(self, many, tmp_path, tokenizer):
        path = tmp_path / "p.txt"
        path.write_text("\n".join(many), encoding="utf-8")
        for prompt in everything(load_prompts(config(path), tokenizer, seed=0)):
            assert prompt.id == hashlib.sha256(prompt.text.encode()).hexdigest()[:16]


class TestStartToken:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"bos": None}, ()),
            ({"bos": "<s>"}, ()),
            ({"bos": "<s>", "adds_bos": True}, (1,)),
            ({"bos": "</s>", "eos": "</s>"}, (2,)),
        ],
    )
    def test_is_there_when_the_model_expects_one_and_only_once(self, settings, expected, tmp_path):
        tokenizer = word_tokenizer(**settings)
        assert start_ids(tokenizer) == expected
        path = tmp_path / "p.txt"
        path.write_text("abc\nabd\n", encoding="utf-8")
        plain = tuple(word_tokenizer(bos=None)("abc")["input_ids"])
        prompts = {p.text: p for p in everything(load_prompts(config(path, max_tokens=3), tokenizer, seed=0))}
        assert prompts["abc"].token_ids == expected + plain


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "content", "changes", "message"),
        [
            ("missing.jsonl", None, {}, r"missing.jsonl' does not exist; give a"),
            ("p.jsonl", b"", {}, "is empty; give"),
            ("p.csv", b"prompt\n", {}, "is empty; give"),
            ("p.txt", b"", {}, "is empty; give"),
            ("p.jsonl", b'{"text": "a", "n": 1}\n', {}, r"data.text_column = 'prompt'.*columns are text, n: name"),
            ("p.csv", b"text,label\na,b\n", {}, r"data.text_column = 'prompt'.*columns are text, label: name"),
            ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', {}, r"p.jsonl line 2 is not JSON"),
            ("p.jsonl", b"[1, 2]\n", {}, "line 1 is not a JSON object"),
            ("p.json", b'{"prompt": "a"}', {}, "not a JSON array"),
            ("p.json", b"[\n{]", {}, "line 2 is not JSON"),
            ("p.jsonl", b'{"prompt": 5}\n', {}, "'5' in .* is int, not text"),
            ("p.txt", b"caf\xe9\n", {}, "is not UTF-8 .*save it as UTF-8"),
            ("p.jsonl", b'{"prompt": "caf\xe9"}\n', {}, "is not UTF-8"),
            ("p.csv", b"prompt\ncaf\xe9\n", {}, "is not UTF-8"),
            ("p.parquet", b"no parquet", {}, "cannot be read as .parquet"),
            ("p.xlsx", b"x", {}, "unknown kind of file; give one of .jsonl"),
            ("p.jsonl", b'{"prompt": "a", "n": 1}\n', {"min_score": 0.5}, r"'toxicity' is not in .*; it has n: name"),
            ("p.csv", b"prompt,toxicity\na,high\n", {"min_score": 0.5}, "'high' in .* is not a number"),
            ("p.csv", b"prompt,toxicity\na,0.1\nb,\n", {"min_score": 0.5}, r"none of 2 records is left \(1 outside"),
            (
                "p.txt",
                b"one\ntwo\ntwo\n",
                {"heldout_prompts": 2},
                r"heldout_prompts = 2 .*: 2 prompts of 3 .*1 duplicate",
            ),
            ("p.txt", b"one\ntwo\nsix\n", {"heldout_prompts": 2, "limit": 2}, "limit = 2"),
        ],
    )
    def test_say_in_one_line_what_is_wrong(self, name, content, changes, message, tmp_path, tokenizer):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            load_prompts(config(path, **changes), tokenizer, seed=0)
        assert "\n" not in str(error.value)

    def test_a_folder_is_not_a_source(self, tmp_path, tokenizer):
        with pytest.raises(DataError, match="is a folder; give a"):
            load_prompts(config(tmp_path), tokenizer, seed=0)

    def test_a_dataset_that_cannot_be_loaded(self, tokenizer, monkeypatch):
        import datasets

        def load_dataset(name, split):
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub\ndetails")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(
            DataError, match=r"'someone/nothing' is no file here, and split 'train' .*Couldn't reach"
        ) as error:
            load_prompts(config("someone/nothing"), tokenizer, seed=0)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("source", ["lab:policy", "lab:nonsense"])
    def test_another_part_of_the_lab(self, source, tokenizer):
        with pytest.raises(ConfigError, match=rf"'{source}' is no set of prompts; give lab:prompts"):
            load_prompts(config(source), tokenizer, seed=0)


@pytest.fixture(scope="module")
def webtext(shared):
    return AutoTokenizer.from_pretrained(shared / "models" / "webtext-6m")


@pytest.fixture
def random_5k(shared):
    return shared / "data" / "realtoxicityprompts" / "random_5k.jsonl"


class TestRealToxicityPrompts:
    def test_the_published_form_is_read_whole(self, webtext, random_5k):
        records = [json.loads(line) for line in random_5k.open(encoding="utf-8")]
        distinct = {" ".join(r["prompt"]["text"].casefold().split()) for r in records}
        split = load_prompts(DataConfig(source=str(random_5k), max_tokens=256), webtext, seed=0)
        assert len(split.heldout) == 200
        assert len(everything(split)) == len(distinct)
        assert split.skipped == {"duplicate": len(records) - len(distinct)}
        by_text = {p.text: p for p in everything(split)}
        for record in records[:200]:
            prompt = by_text[record["prompt"]["text"]]
            assert prompt.meta["toxicity"] == record["prompt"]["toxicity"]
            assert prompt.meta["challenging"] == record["challenging"]
            assert prompt.token_ids[0] == 0
            assert webtext.decode(prompt.token_ids[1:]) == prompt.text

    def test_the_score_window_and_the_longest_prompt(self, webtext, random_5k):
        records = [json.loads(line) for line in random_5k.open(encoding="utf-8")]
        scores = [r["prompt"]["toxicity"] for r in records]
        split = load_prompts(DataConfig(source=str(random_5k), min_score=0.5, max_tokens=12), webtext, seed=0)
        assert split.skipped["null score"] == sum(s is None for s in scores)
        assert split.skipped["outside score window"] == sum(s is not None and s < 0.5 for s in scores)
        assert all(p.meta["toxicity"] >= 0.5 for p in everything(split))
        assert max(len(p.token_ids) for p in everything(split)) == 13


def test_sources_are_mixed_in_their_proportions(tmp_path, tiny_t5):
    dialogues = [
        {"dialogue": f"#Person1#: Hello {i}.\n#Person2#: Hi.", "summary1": f"They greet {i}.", "summary2": "Greetings."}
        for i in range(90)
    ]
    (tmp_path / "dialogues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    texts = [{"prompt": {"text": f"you fool {i}", "toxicity": i / 100}} for i in range(100)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    data = DataConfig.model_validate(
        {
            "source": str(tmp_path / "dialogues.jsonl"),
            "format": "dialogsum",
            "template": "Summarize: {prompt}",
            "mixed_in": [{"source": str(tmp_path / "texts.jsonl"), "min_score": 0.5, "limit": 30}],
            "heldout_prompts": 40,
        }
    )
    split = load_prompts(data, AutoTokenizer.from_pretrained(tiny_t5), seed=0)
    for prompts, dialogues_in, toxic_in in ((split.heldout, 30, 10), (split.heldout[:8], 6, 2), (split.train, 60, 20)):
        assert sum("references" in prompt.meta for prompt in prompts) == dialogues_in
        assert sum(prompt.meta.get("toxicity", 0) >= 0.5 for prompt in prompts) == toxic_in
    assert all(prompt.text.startswith("Summarize: ") and prompt.token_ids[-1] == 0 for prompt in everything(split))
    dialogue = next(prompt for prompt in split.train if "references" in prompt.meta)
    assert dialogue.meta["lead"] == dialogue.text.removeprefix("Summarize: ").partition("\n")[0]
    assert len(dialogue.meta["references"]) == 2
    assert load_prompts(data, AutoTokenizer.from_pretrained(tiny_t5), seed=0) == split
