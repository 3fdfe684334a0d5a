import pickle

import pytest

from detox_ray.serving.result_cache import ResultCache

pytestmark = pytest.mark.unit


def test_the_text_used_longest_ago_is_forgotten() -> None:
    cache: ResultCache[int] = ResultCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)


def test_size_zero_keeps_nothing() -> None:
    cache: ResultCache[int] = ResultCache(0)
    cache.put("a", 1)
    assert cache.get("a") is None


def test_no_text_is_in_memory() -> None:
    cache: ResultCache[int] = ResultCache(2)
    cache.put("xyzzyplugh", 1)
    assert b"xyzzyplugh" not in pickle.dumps(cache)
