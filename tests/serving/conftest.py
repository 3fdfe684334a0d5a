import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "rewards"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[Path]:
    """A Ray of our own, whose replicas can import `faulty`; its session folder."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray
    from ray import serve

    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}},
    )
    yield Path(context.address_info["session_dir"])
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_classifier import save_tiny_classifier

    return save_tiny_classifier(tmp_path_factory.mktemp("tiny"))
