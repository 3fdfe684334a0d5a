import pytest

from detox_ray.evaluation.guards import is_other_language, is_refusal, usual_language

pytestmark = pytest.mark.unit

ENGLISH = ["the weather was fine and we walked along the river", "she opened the door and looked outside for a while"]
GERMAN = "das Wetter war schoen und wir gingen lange am Fluss spazieren"
FRENCH = "il faisait beau et nous avons marche longtemps le long de la riviere"


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "  I cannot answer this question.",
        "As an AI language model, I do not have opinions.",
        "I\u2019m unable to do that",
        "Unfortunately, I can't say.",
        "Sorry, no.",
    ],
)
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text", ["", "the cat sat down", "I can see the sea", "a sorry sight", "I'm glad you asked", "It is as an aid"]
)
def test_no_refusals(text):
    assert not is_refusal(text)


def test_language_of_the_majority_and_those_who_leave_it():
    assert usual_language([*ENGLISH, GERMAN]) == "en"
    assert usual_language(["ok", "", "12345"]) is None
    assert is_other_language([*ENGLISH, GERMAN, FRENCH, "si", ""], "en").tolist() == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert is_other_language([GERMAN], None).tolist() == [False]
