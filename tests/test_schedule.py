import pytest

from detox_ray.records import Prompt
from detox_ray.schedule import Schedule

pytestmark = pytest.mark.unit


def test_the_schedule_passes_over_all_prompts_and_needs_no_state() -> None:
    prompts = [Prompt(str(i), str(i), (i,)) for i in range(10)]
    schedule = Schedule(prompts, per_step=4, seed=1)
    seen = [p.id for step in range(5) for p in schedule(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(p.id for p in prompts)
    assert seen[:10] != seen[10:]
    assert Schedule(prompts, 4, 1)(3) == schedule(3)
    assert Schedule(prompts, 4, 2)(0) != schedule(0)
