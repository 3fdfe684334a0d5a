"""Which Ray a command uses, and what is said of one that cannot be used."""

import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray._private.utils import check_version_info

from detox_ray.cluster import _refusal, check_nodes_see, local_capacity, local_memory, ray_session, starts_own_ray
from detox_ray.config import RayConfig
from detox_ray.errors import ConfigError
from detox_ray.placement import Capacity


@pytest.mark.unit
def test_a_cluster_of_another_version_is_named_with_both() -> None:
    with pytest.raises(RuntimeError) as said_by_ray:
        check_version_info({"ray_version": "2.50.0", "python_version": "3.10.7"}, "node 127.0.0.1")
    line = _refusal("127.0.0.1:6379", str(said_by_ray.value))
    ours = f"Ray: {ray.__version__}, Python: {platform.python_version()}"
    assert line == (
        f"ray.address=127.0.0.1:6379 runs Ray: 2.50.0, Python: 3.10.7, and this process has {ours}; use the cluster's"
    )


@pytest.mark.unit
def test_a_ray_of_its_own_is_the_last_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for connected in (False, True):
        monkeypatch.setattr(ray, "is_initialized", lambda connected=connected: connected)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        assert starts_own_ray(RayConfig()) is not connected
        assert not starts_own_ray(RayConfig(address="127.0.0.1:1"))
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        assert not starts_own_ray(RayConfig())


@pytest.mark.unit
def test_a_local_ray_has_what_its_container_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_MULTIPROCESSING_CPU_COUNT", raising=False)
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: 1.5)
    monkeypatch.setattr("multiprocessing.cpu_count", lambda: 64)
    monkeypatch.setattr("psutil.cpu_count", lambda: 64)
    assert local_capacity(RayConfig()).total("CPU") == 1
    assert local_capacity(RayConfig(num_cpus=7)).total("CPU") == 7
    monkeypatch.setattr("ray._private.utils.get_system_memory", lambda: 8 * 10**9)
    monkeypatch.setattr("ray._common.utils.get_system_memory", lambda: 8 * 10**9)
    monkeypatch.setattr("ray._private.utils.get_cgroup_mem_stats", lambda: (7 * 10**9, 8 * 10**9))
    assert local_memory() == (8 * 10**9, 10**9)


@pytest.mark.e2e
@pytest.mark.usefixtures("local_ray")
def test_the_callers_own_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the caller has started ends with the caller; what the caller is only connected to may be a cluster."""

    def refuse(capacity: Capacity) -> None:
        raise ConfigError(f"there are {capacity.total('CPU'):g} CPUs")

    for connected, hint in ((False, r"\Z"), (True, r"; .*ray\.autoscaling=true")):
        monkeypatch.setattr("ray._private.worker._global_node.is_head", lambda connected=connected: not connected)
        with ray_session(RayConfig(), lambda capacity: None, tmp_path / "logs") as outlives:
            assert outlives is connected
        with (
            pytest.raises(ConfigError, match="^there are 2 CPUs" + hint),
            ray_session(RayConfig(), refuse, tmp_path / "logs"),
        ):
            pass
    assert ray.is_initialized()


@pytest.mark.e2e
@pytest.mark.usefixtures("local_ray")
def test_every_node_must_see_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another_node = SimpleNamespace(get_node_id=lambda: "not the one that is asked")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: another_node)
    check_nodes_see(tmp_path)
    monkeypatch.chdir(tmp_path)
    one_of_its_own = Path("/proc/self/cwd")  # of each process another, and writable
    for folder in (one_of_its_own, one_of_its_own / "here"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=r"^output_dir: node .* of the cluster cannot write to /proc/self/cwd"):
            check_nodes_see(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]
