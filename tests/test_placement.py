"""What the roles of a run take from Ray, and the refusal of what would wait for ever."""

from typing import Any

import pytest

from detox_ray.config import Config
from detox_ray.config_file import parse_config
from detox_ray.errors import ConfigError
from detox_ray.placement import (
    Capacity,
    RoleResources,
    check_placements,
    placement_table,
    placements,
    shortage,
    total_needed,
)

pytestmark = pytest.mark.unit
WORDS = {"name": "words", "kind": "linear", "model": "x:y"}


def configured(classifier: dict[str, Any] | None = None, **sections: Any) -> Config:
    return parse_config({"reward": {"classifiers": [{**WORDS, **(classifier or {})}]}, **sections})


def test_more_workers_than_cpus_are_refused() -> None:
    needed = placements(configured(rollout={"workers": 4, "num_cpus": 1}))
    assert total_needed(needed) == {"CPU": pytest.approx(5.1)}
    with pytest.raises(ConfigError, match=r"needs 5\.1 CPUs \(4 x rollout worker with 1, .*Ray has 2; lower roll"):
        check_placements(needed, Capacity([{"CPU": 2.0}]))
    check_placements(needed, Capacity([{"CPU": 2.0}, {"CPU": 3.1}]))


def test_a_resource_that_no_node_has_names_the_role_that_wants_it() -> None:
    needed = placements(configured(rollout={"workers": 2, "resources": {"rollout_node": 0.5}}))
    with pytest.raises(ConfigError, match=r"needs 1 of 'rollout_node' \(2 x rollout worker with 0\.5\) and Ray has 0"):
        check_placements(needed, Capacity([{"CPU": 8.0}]))
    check_placements(needed, Capacity([{"CPU": 8.0, "rollout_node": 1.0}]))


def test_a_worker_must_fit_on_one_node() -> None:
    needed = placements(configured(train={"num_cpus": 4, "resources": {"learner_node": 1}}))
    apart = Capacity([{"CPU": 8.0}, {"CPU": 1.0, "learner_node": 1.0}])
    with pytest.raises(ConfigError, match=r"no node .* one learner needs together: 4 CPUs, 1 of 'learner_node'; lower"):
        check_placements(needed, apart)


def test_all_workers_must_fit_on_the_nodes_at_once() -> None:
    needed = placements(configured({"num_cpus": 0}, rollout={"workers": 2, "num_cpus": 3}, train={"num_cpus": 2}))
    check_placements(needed, Capacity([{"CPU": 3.0}, {"CPU": 5.0}]))
    check_placements(needed, Capacity([{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 2.0}]))
    with pytest.raises(
        ConfigError, match=r"no placement has room for 2 x rollout worker with 3 CPUs; 1 x learner with 2 CPUs; lower"
    ):
        check_placements(needed, Capacity([{"CPU": 4.0}, {"CPU": 4.0}]))


def test_a_fraction_of_a_gpu_is_of_one_gpu() -> None:
    def needed(workers: int, share: float) -> list[RoleResources]:
        rollout = {"workers": workers, "num_cpus": 0, "num_gpus": share}
        return placements(configured({"num_cpus": 0}, rollout=rollout, train={"num_cpus": 0, "num_gpus": 0.2}))

    check_placements(needed(2, 0.6), Capacity([{"GPU": 2.0}]))
    check_placements(needed(4, 0.4), Capacity([{"GPU": 2.0}]))
    check_placements(needed(9, 0.2), Capacity([{"GPU": 2.0}]))
    with pytest.raises(ConfigError, match=r"no placement has room for 3 x rollout worker with 0\.6 GPUs"):
        check_placements(needed(3, 0.6), Capacity([{"GPU": 2.0}]))


def test_what_takes_nothing_fits_everywhere() -> None:
    check_placements([RoleResources("rollout worker", "rollout", 9, {})], Capacity([{"CPU": 1.0}]))


def test_room_on_many_nodes_is_found_at_once() -> None:
    needed = placements(configured({"replicas": 100}, rollout={"workers": 256, "num_gpus": 1}))
    check_placements(needed, Capacity([{"CPU": 16.0, "GPU": 8.0}] * 40))


def test_what_an_autoscaler_may_still_start_is_not_refused() -> None:
    needed = placements(configured(rollout={"workers": 8, "num_gpus": 1}))
    check_placements(needed, Capacity([{"CPU": 64.0}], grows=True))
    with pytest.raises(ConfigError, match=r"needs 8 GPUs .*Ray has 4; lower rollout\.workers, rollout\.num_gpus"):
        check_placements(needed, Capacity([{"CPU": 64.0, "GPU": 4.0}]))


def test_what_others_hold_is_said() -> None:
    needed = placements(configured(train={"num_gpus": 2}))
    assert shortage(needed, {"CPU": 8.0, "GPU": 2.0}) is None
    assert "until this cluster has 2 GPU (0.5 free)" in str(shortage(needed, {"CPU": 8.0, "GPU": 0.5}))


def test_the_table_has_a_row_a_role_and_a_column_a_resource() -> None:
    config = configured(
        {"replicas": 3, "num_gpus": 0.25, "resources": {"reward_node": 1}},
        rollout={"workers": 2, "num_gpus": 1},
        train={"resources": {"learner_node": 1}},
    )
    table = {str(column.header): list(column.cells) for column in placement_table(placements(config)).columns}
    assert table == {
        "role": ["2 x rollout worker", "1 x learner", "3 x classifier words", "together"],
        "CPU": ["1", "1", "0.1", "3.3"],
        "GPU": ["1", "", "0.25", "2.75"],
        "learner_node": ["", "1", "", "1"],
        "reward_node": ["", "", "1", "3"],
    }


@pytest.mark.parametrize(
    ("resources", "message"),
    [({"CPU": 1}, "only resources of your own"), ({"a": 1.5}, "whole numbers"), ({"a": 0}, "greater than 0")],
)
def test_resources_that_ray_would_not_take(resources: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(rollout={"resources": resources})
