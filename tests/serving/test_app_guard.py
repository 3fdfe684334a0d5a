"""The guard that deletes a dead job's app."""

import pytest
from ray.serve.exceptions import RayServeException

from detox_ray.serving import app_guard
from detox_ray.serving.app_guard import AppGuard

pytestmark = pytest.mark.unit


def test_it_tries_again_until_ray_and_serve_have_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = AppGuard.__new__(AppGuard)
    guard._app_name, guard._job_id = "rewards", "01"
    jobs = iter([OSError("no answer"), {"01", "02"}, {"02"}, {"02"}, {"02"}])
    deletions = iter([TimeoutError("no answer"), None, RayServeException("Serve is gone")])
    deleted: list[str] = []

    def alive() -> set[str]:
        answer = next(jobs)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def delete(name: str) -> None:
        if (error := next(deletions)) is not None:
            raise error
        deleted.append(name)

    monkeypatch.setattr(app_guard, "_jobs_alive", alive)
    monkeypatch.setattr(app_guard.serve, "delete", delete)
    monkeypatch.setattr(app_guard, "stop_idle_serve", lambda: None)
    assert [guard._is_done() for _ in range(5)] == [False, False, False, True, True]
    assert deleted == ["rewards"]
