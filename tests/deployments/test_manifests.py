"""What an operator deploys fits Ray's, Kubernetes' and our own schemas, and the run it is meant for."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from detox_ray import load_config
from detox_ray.placement import Capacity, check_placements, placements
from detox_ray.serving.api_config import load_api_config

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deployments" / "kuberay"
MANIFESTS = [
    (f"{path.stem}-{number}", document)
    for path in sorted(KUBERAY.glob("*.yaml"))
    for number, document in enumerate(yaml.safe_load_all(path.read_text(encoding="utf-8")))
]
RAY_OBJECTS = [pytest.param(tree, id=name) for name, tree in MANIFESTS if tree["apiVersion"] == "ray.io/v1"]


def manifest(kind: str) -> dict[str, Any]:
    [found] = [tree for _, tree in MANIFESTS if tree["kind"] == kind]
    return found


def launched() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def strict(schema: Any) -> Any:
    """The same schema, in which an object has no fields but those that are named."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return closed


@pytest.mark.unit
def test_the_launchers_file_fits_rays_schema() -> None:
    ray = importlib.util.find_spec("ray")  # found, not imported
    assert ray is not None
    assert ray.origin is not None
    schema = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(launched(), schema)


@pytest.mark.e2e
def test_the_launcher_accepts_its_file_with_the_providers_defaults() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(launched())
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


@pytest.mark.unit
def test_the_clusters_run_fits_the_launchers_nodes() -> None:
    types = launched()["available_node_types"].values()
    nodes = [kind["resources"] for kind in types for _ in range(kind.get("max_workers", 1))]
    check_placements(placements(load_config(ROOT / "configs" / "cluster.yaml")), Capacity(nodes))


@pytest.mark.e2e
def test_the_clusters_run_fits_what_ray_reads_from_the_groups_of_pods() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec

    groups = manifest("RayCluster")["spec"]["workerGroupSpecs"]
    nodes = [
        _get_ray_resources_from_group_spec(group, is_head=False)
        for group in groups
        for _ in range(group["maxReplicas"])
    ]
    assert {"rollout_node", "learner_node"} <= {resource for node in nodes for resource in node}
    check_placements(placements(load_config(ROOT / "configs" / "cluster.yaml")), Capacity(nodes))


@pytest.mark.e2e
def test_the_services_application_is_one_that_serve_and_we_accept() -> None:
    from ray.serve.schema import ServeDeploySchema

    deployed = ServeDeploySchema.model_validate(yaml.safe_load(manifest("RayService")["spec"]["serveConfigV2"]))
    module = importlib.import_module(deployed.applications[0].import_path.partition(":")[0])
    assert callable(module.app)
    config = load_api_config(deployed.applications[0].args["config"])
    assert config.keys.environment == "DETOX_RAY_API_KEYS"
    cluster = manifest("RayService")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        assert config.keys.environment in {variable["name"] for variable in container["env"]}
    # A file there would be another version, for a while, than the application that is built from it.
    assert "configMap" not in json.dumps(cluster)


@pytest.mark.unit
def test_every_node_runs_the_same_ray() -> None:
    locked = (ROOT / "requirements" / "gpu.txt").read_text(encoding="utf-8").splitlines()
    [version] = [line.removeprefix("ray==") for line in locked if line.startswith("ray==")]
    assert f"FROM rayproject/ray:{version}-py311-gpu" in (ROOT / "deployments" / "Dockerfile").read_text()
    assert manifest("RayCluster")["spec"]["rayVersion"] == version
    assert manifest("RayService")["spec"]["rayClusterConfig"]["rayVersion"] == version


@pytest.mark.unit
@pytest.mark.parametrize("tree", RAY_OBJECTS)
def test_the_manifests_fit_kuberays_schemas(tree: dict[str, Any]) -> None:
    """`KUBERAY_CRDS`: the folder helm-chart/kuberay-operator/crds of KubeRay's repository."""
    if "KUBERAY_CRDS" not in os.environ:
        pytest.skip("KUBERAY_CRDS does not name the folder with KubeRay's schemas")
    kind = f"{tree['kind'].lower()}s"
    definition = yaml.load(
        (Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{kind}.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader
    )
    [schema] = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
    metadata = {"metadata": {"type": "object"}}  # Kubernetes' own, which the schema leaves open
    closed = strict(schema)
    closed["properties"] |= metadata
    jsonschema.Draft202012Validator(closed).validate(tree)
