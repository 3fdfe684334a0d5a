"""Which Ray a command uses, and what is said of one that cannot be used."""

import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray._private.utils import check_version_info

from detox_ray.cluster import _refusal, check_nodes_see, ray_session, starts_own_ray
from detox_ray.config import RayConfig
from detox_ray.errors import ConfigError


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


@pytest.mark.e2e
@pytest.mark.usefixtures("local_ray")
def test_the_callers_own_ray_outlives_a_session(tmp_path: Path) -> None:
    with ray_session(RayConfig(), lambda capacity: None, tmp_path / "logs") as outlives:
        assert outlives
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
