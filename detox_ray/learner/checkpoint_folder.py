"""What a learner leaves in the run folder: checkpoints, whole or known not to be, and the adapter.

A checkpoint is a folder with `adapter/` in PEFT's format, `learner.pt` with everything else that training changes (of
PPO also the state to go back to), and `manifest.json` with the step and the SHA-256 of each file, written last.
"""

import hashlib
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from detox_ray.errors import ModelError, StorageError
from detox_ray.metrics_file import ADAPTER_FOLDER, MANIFEST_FILE, STEPS_FILE
from detox_ray.policy.adapter import DIGEST_FILE, Adapter, load_adapter, save_adapter

logger = logging.getLogger(__name__)

LEARNER_FILE = "learner.pt"
RAY_LIST_FILE = "checkpoint_manager_snapshot.json"


def write_checkpoint(folder: Path, step: int, adapter: Adapter, state: dict[str, Any]) -> None:
    """Fill an empty folder with the state after `step` (of tensors, numbers and containers of them)."""
    save_adapter(adapter, folder / ADAPTER_FOLDER)
    content = io.BytesIO()  # torch.save to a path turns the OSError of a full disk into a RuntimeError
    torch.save(state, content)
    (folder / LEARNER_FILE).write_bytes(content.getbuffer())
    manifest = {"step": step, "sha256": _digests(folder)}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def keep_adapter(adapter: Adapter, run_dir: Path, steps: int) -> None:
    """Make this the run's adapter, trained for `steps` steps."""
    save_adapter(adapter, run_dir / ADAPTER_FOLDER, {STEPS_FILE: str(steps), DIGEST_FILE: adapter.digest})


def is_kept(adapter: Adapter, run_dir: Path) -> bool:
    """Whether the run's adapter is this one."""
    try:
        return load_adapter(run_dir / ADAPTER_FOLDER).digest == adapter.digest
    except ModelError:
        return False


def read_checkpoint(folder: Path) -> tuple[Adapter, dict[str, Any]]:
    """What `write_checkpoint` was given, in host memory."""
    state = torch.load(folder / LEARNER_FILE, weights_only=True, map_location="cpu")
    return load_adapter(folder / ADAPTER_FOLDER), state


def last_whole_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint whose files are as they were written; None: there are none.

    Raises:
        StorageError: Ray's list has checkpoints, and all are damaged. One that a kill cut short is not on it yet.
    """
    found = sorted(folder.glob("checkpoint_*/"))
    whole = [(step, path) for path in found if (step := _step_if_whole(path)) is not None]
    if found and not whole and registered_checkpoints(folder) != []:
        raise StorageError(
            f"all {len(found)} checkpoints in {folder} are damaged or incomplete; restore one from a copy, or remove "
            "that folder to train from the start"
        )
    return max(whole, default=None)


def registered_checkpoints(folder: Path) -> list[Path] | None:
    """Those on the list that Ray Train keeps in `folder`; None: the list was cut short by a kill."""
    try:
        listed = json.loads((folder / RAY_LIST_FILE).read_text(encoding="utf-8"))["checkpoint_results"]
        return [folder / result["checkpoint_dir_name"] for result in listed]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        return None


def remove_wrong_list(folder: Path) -> None:
    """Delete Ray Train's checkpoint list if it is torn or names missing folders.

    Ray would not start with it, and `resume` does not need it.

    Raises:
        StorageError: as `last_whole_checkpoint`, which would not know without the list.
    """
    registered = registered_checkpoints(folder)
    if registered is None or not all(path.is_dir() for path in registered):
        last_whole_checkpoint(folder)
        logger.warning("Ray's list of the checkpoints in %s is torn or names some that are gone; removed", folder)
        (folder / RAY_LIST_FILE).unlink()


def remove_unlisted(folder: Path) -> None:
    """Delete checkpoints missing from Ray's list, which Ray never deletes itself.

    The newest intact one is kept; if no listed one is intact nothing is deleted, because the list may be what is wrong.
    """
    listed = registered_checkpoints(folder) or []
    unlisted = set(folder.glob("checkpoint_*/")) - set(listed)
    if not unlisted or not all(path.is_dir() for path in listed):
        return
    whole = [(step, path) for path in (*unlisted, *listed) if (step := _step_if_whole(path)) is not None]
    if any(path in listed for _, path in whole):
        newest = max(whole)[1]
        for path in unlisted - {newest}:
            logger.warning("checkpoint %s is not on Ray's list; removed, as the run goes on from %s", path, newest)
            shutil.rmtree(path)


def _step_if_whole(checkpoint: Path) -> int | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["sha256"] == _digests(checkpoint):
            return int(manifest["step"])
        problem = "its files are not those of its manifest"
    except FileNotFoundError:
        problem = "it is incomplete"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"its manifest cannot be read ({type(error).__name__})"
    logger.warning("checkpoint %s is left out: %s", checkpoint, problem)
    return None


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
