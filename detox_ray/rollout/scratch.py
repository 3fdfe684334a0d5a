"""Where an engine keeps what is for itself alone; engines are killed, so each removes what those before it left."""

import os
import shutil
import tempfile
from pathlib import Path

import psutil
import ray


def scratch_folder() -> Path:
    """An empty folder; inside Ray it is in the session's, where those of dead processes of this node are removed.

    Outside of Ray, where nobody kills an engine, it is one of the system's temporary folders.
    """
    if not ray.is_initialized():
        return Path(tempfile.mkdtemp(prefix="detox_ray-engine-"))
    here = ray.get_runtime_context()
    of_node = Path(here.get_temp_dir()) / here.get_session_name() / f"detox_ray-engines-{here.get_node_id()}"
    of_node.mkdir(exist_ok=True)
    for folder in of_node.iterdir():
        if not psutil.pid_exists(int(folder.name.partition("-")[0])):
            shutil.rmtree(folder, ignore_errors=True)  # another engine may be at it too
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=of_node))
