"""What is said of a cluster that cannot be used."""

import platform

import pytest
import ray
from ray._private.utils import check_version_info

from detox_ray.cluster import _refusal


@pytest.mark.unit
def test_a_cluster_of_another_version_is_named_with_both() -> None:
    with pytest.raises(RuntimeError) as said_by_ray:
        check_version_info({"ray_version": "2.50.0", "python_version": "3.10.7"}, "node 127.0.0.1")
    line = _refusal("127.0.0.1:6379", str(said_by_ray.value))
    ours = f"Ray: {ray.__version__}, Python: {platform.python_version()}"
    assert line == (
        f"ray.address=127.0.0.1:6379 runs Ray: 2.50.0, Python: 3.10.7, and this process has {ours}; use the cluster's"
    )
