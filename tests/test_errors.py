"""What is told of an error of somebody else's."""

import pytest

from detox_ray.errors import first_line, last_line, one_line
from detox_ray.serving.replica_errors import described

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("message", "first", "last"),
    [
        ("", "", ""),
        ("one line.", "one line", "one line"),
        ("\n  the call;\r\n  a trace\n\n  the cause. \n", "the call", "the cause"),
        ("1.5 of a.b", "1.5 of a.b", "1.5 of a.b"),
    ],
)
def test_the_lines_that_stand_inside_ours(message: str, first: str, last: str) -> None:
    error = ValueError(message)
    assert (first_line(error), last_line(error)) == (first, last)
    assert one_line(error) == " ".join(message.split())
    assert described(error) == (f"ValueError: {first}" if first else "ValueError")


def test_a_long_message_is_cut() -> None:
    assert one_line("a\n b c", limit=4) == "a b "
