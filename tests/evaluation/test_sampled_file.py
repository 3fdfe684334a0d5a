import numpy as np
import pytest

from detox_ray.evaluation.sampled_file import SampledFile
from detox_ray.records import Prompt, Sampling

pytestmark = pytest.mark.unit

PROMPTS = [Prompt(f"p{i}", f"prompt number {i}", (5, 6, 7 + i)) for i in range(3)]


def _file(folder, **changes):
    settings = {"system": "base", "model": "m", "prompts": PROMPTS, "samples": 2, "sampling": Sampling(20)} | changes
    return SampledFile(folder, **settings)


def test_what_was_appended_is_read_back(tmp_path, make_rollouts):
    rollouts = make_rollouts([["one two", "three"], ["", "four"]])
    _file(tmp_path).append(rollouts)
    found = _file(tmp_path).read()
    assert list(found) == ["p0", "p1"]
    for ours, theirs in zip(rollouts, [r for samples in found.values() for r in samples], strict=True):
        assert (ours.text, ours.finish_reason, ours.prompt_text) == (
            theirs.text,
            theirs.finish_reason,
            theirs.prompt_text,
        )
        assert np.array_equal(ours.response_ids, theirs.response_ids)
        assert np.array_equal(ours.prompt_ids, theirs.prompt_ids)


def test_a_line_that_a_kill_cut_short_is_sampled_again(tmp_path, make_rollouts):
    rollouts = make_rollouts([["one two", "three"], ["five", "four"]])
    file = _file(tmp_path)
    file.append(rollouts)
    path = next((tmp_path / "sampled").iterdir())
    path.write_text(path.read_text()[:-20])
    assert list(file.read()) == ["p0"]
    file.append(rollouts[2:])
    assert list(file.read()) == ["p0", "p1"]


@pytest.mark.parametrize(
    "changes", [{"model": "other"}, {"samples": 3}, {"sampling": Sampling(20, seed=1)}, {"prompts": PROMPTS[:2]}]
)
def test_other_settings_find_nothing(tmp_path, make_rollouts, changes):
    _file(tmp_path).append(make_rollouts([["one", "two"]]))
    assert _file(tmp_path, **changes).read() == {}
