"""TRL in an environment of its own, made from a lock when it is missing, and runs in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 3600


def trl_python(name: str, console: Console) -> Path:
    """Python of the environment `.venv-NAME` with what `requirements/NAME.txt` locks, made if it is older than that.

    torch is installed by itself: from what pip is configured with, and only if that fails from `TORCH_INDEX`.
    """
    environment, lock = ROOT / f".venv-{name.replace('_', '-')}", ROOT / "requirements" / f"{name}.txt"
    python, stamp = environment / "bin" / "python", environment / "installed"
    if stamp.exists() and stamp.stat().st_mtime >= lock.stat().st_mtime:
        return python
    console.print(f"installing TRL into {environment.name}; this takes a minute")
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    torch = next(line for line in lock.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    if subprocess.run([*pip, "install", torch], capture_output=True).returncode != 0:
        index = os.environ.get("TORCH_INDEX")
        if not index:
            raise SystemExit(f"pip finds no {torch}; set TORCH_INDEX to an index that has it, or use `make bench`")
        subprocess.run([*pip, "install", "--index-url", index, torch], check=True)
    subprocess.run([*pip, "install", "--no-deps", "-r", str(lock)], check=True, stderr=subprocess.DEVNULL)
    stamp.touch()
    return python


def call(command: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run a command with its output in a file; show the end of it if the command fails."""
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment, cwd=ROOT, timeout=TIMEOUT_S
        ).returncode
    if code != 0:
        raise SystemExit("\n".join([*log.read_text(encoding="utf-8").splitlines()[-30:], f"exit code {code}"]))
