"""What is said of a cluster that cannot be used."""

import pytest

from detox_ray.cluster import _refusal

# What Ray 2.60 says to a cluster of Ray 2.50.
MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.50.0
    Python: 3.11.7
This process on node 127.0.0.1 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""


@pytest.mark.unit
def test_a_cluster_of_another_version_is_named_with_both() -> None:
    line = _refusal("127.0.0.1:6379", MISMATCH)
    assert "runs Ray: 2.50.0, Python: 3.11.7, and this process has Ray: 2.60.0, Python: 3.11.7" in line
