"""Classifiers that misbehave, each in its own way; imported by the replicas through PYTHONPATH."""

import time

import numpy as np

calls = 0
under_way = 0


def rude_words(texts):
    return np.array([0.9 if "idiot" in text else 0.2 for text in texts])


def fails_twice(texts):
    global calls
    calls += 1
    if calls <= 2:
        raise ConnectionError("the line is down")
    return rude_words(texts)


def always_fails(texts):
    raise ConnectionError("the line is down")


def quotes_the_text(texts):
    raise ValueError(f"cannot read {texts[0]!r}")


def not_finite(texts):
    return np.full(len(texts), np.nan)


def slow(texts):
    time.sleep(3)
    return rude_words(texts)


def slow_and_alone(texts):
    """Refuses to compute while another call does."""
    global under_way
    if under_way:
        raise RuntimeError("another call is under way")
    under_way += 1
    time.sleep(4 if texts == ["slow"] else 0)
    under_way -= 1
    return rude_words(texts)


def constant(texts):
    return np.full(len(texts), 0.5)


def length(texts):
    return np.array([min(len(text), 100) / 100 for text in texts])


def a_second(texts):
    time.sleep(1)
    return rude_words(texts)
