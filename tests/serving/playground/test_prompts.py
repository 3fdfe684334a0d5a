import pytest

from detox_ray.serving.playground.prompts import STEPS, OfferedPrompt, PromptShelf

pytestmark = pytest.mark.unit


def shelf(*toxicity: float | None) -> PromptShelf:
    return PromptShelf([OfferedPrompt(f"prompt {place}", value) for place, value in enumerate(toxicity)])


def test_prompts_stand_in_the_order_of_their_toxicity() -> None:
    assert [prompt.text for prompt in shelf(0.5, 0.1, 0.9).prompts] == ["prompt 1", "prompt 0", "prompt 2"]


def test_each_step_is_more_toxic_until_the_most_toxic_one() -> None:
    toxicity = [(37 * place % 200) / 200 for place in range(200)]
    prompts = shelf(*toxicity)
    place, seen = prompts.more_toxic("", 0.0), []
    while place is not None:
        seen.append(prompts.prompts[place].toxicity)
        place = prompts.more_toxic(prompts.prompts[place].text, 0.0)
    assert seen == sorted(set(seen))
    assert seen[-1] == max(toxicity)
    assert STEPS <= len(seen) <= STEPS + 1


def test_a_prompt_of_ones_own_stands_by_its_toxicity() -> None:
    prompts = shelf(0.1, 0.2, 0.3)
    assert prompts.more_toxic("mine", 0.2) == 2
    assert prompts.more_toxic("mine", 0.05) == 0
    assert prompts.more_toxic("mine", 0.3) is None
    # On the shelf it stands where it stands.
    assert prompts.more_toxic("prompt 0", 0.9) == 1
    assert PromptShelf([]).more_toxic("mine", 0.0) is None


def test_the_judge_reads_what_the_file_does_not_say() -> None:
    prompts = shelf(0.5, None, 0.4, None)
    assert prompts.unscored() == ["prompt 1", "prompt 3"]
    scored = prompts.scored([0.45, 0.1])
    assert [prompt.text for prompt in scored.prompts] == ["prompt 3", "prompt 2", "prompt 1", "prompt 0"]
    assert scored.unscored() == []
