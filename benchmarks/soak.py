"""Kill and stop the processes of real runs at random moments, and check that nothing was lost.

    .venv/bin/python benchmarks/soak.py OUTPUT --faults 100 [--roles ROLE ...] [--nodes 2] [--set KEY=VALUE ...]

Lab runs follow each other until the faults are used up; a run whose driver or only node was killed is started again
with the same command, and must not end before its end otherwise. After each run: every step once in metrics.jsonl, the
adapter's step count never went back, evaluation and report are there, nothing of the run is alive, and the adapter is,
bit for bit, that of an undisturbed run, which is trained first (not with rollout.max_staleness > 0, where it depends on
timing which adapter samples a batch). With `--nodes`, runs are on a cluster of so many nodes and a head, which loses
nodes and is given new ones. Each fault is a line of OUTPUT/faults.jsonl.
"""

import argparse
import collections
import json
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from local_cluster import LocalCluster
from machine import describe, machine

from detox_ray.policy.adapter import load_adapter

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 30  # a stopped process counts as dead after this
CPUS = 4  # of a cluster's node: more than a run needs, as what it lost may still hold some
START_TIMEOUT_S = 120  # and this where it was only starting
# What a process is called, by what it is to the run.
ROLES = {
    "rollout worker": "RolloutWorker",
    "classifier": "ServeReplica:",
    "serve controller": "ServeController",
    "learner": "RayTrainWorker",
    "train controller": "TrainController",
    "node": "raylet/raylet",
    "driver": "bin/detox-ray",
}
COSTLY = ("node", "driver")  # with a start from nothing, so they are hit less often than the others
STOPPABLE = ("rollout worker", "classifier", "serve controller", "learner", "train controller")
CLEAN_TIMEOUT_S = 60
IDLE = ("ray::IDLE", "ray::_AutoscalingCoordinatorActor")  # of a cluster; the second is Ray Train's, one for all jobs
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # outlive a killed driver by a minute or two


@dataclass
class Soak:
    """A row of runs and the faults that befall them."""

    output: Path
    steps: int
    faults: int
    pause_s: float
    roles: list[str]
    settings: list[str]
    random: random.Random
    cluster: LocalCluster | None = None
    done: int = 0
    hit: list[str] = field(default_factory=list)  # the roles hit since the command was started

    def command(self, name: str) -> list[str]:
        settings = {
            "name": name,
            "output_dir": self.output,
            "train.total_steps": self.steps,
            "train.checkpoint_every": 2,
            "train.max_failures": 1000,
            "train.timeout_s": TIMEOUT_S,
            "rollout.timeout_s": TIMEOUT_S,
            "rollout.start_timeout_s": START_TIMEOUT_S,
            "reward.timeout_s": 2 * TIMEOUT_S,  # half of it for Serve's controller
            "reward.start_timeout_s": START_TIMEOUT_S,
            "reward.retries": 10,
            "reward.calibration_prompts": 32,
            "ppo.batch_size": 128,  # two chunks of each worker's responses
            "evaluation.prompts": 16,
            "evaluation.samples_per_prompt": 2,
        }
        if self.cluster:
            settings["ray.address"] = self.cluster.address
        config = str(ROOT / "configs" / "laptop.yaml")
        return [
            str(Path(sys.executable).with_name("detox-ray")),
            "train",
            config,
            *(f"{key}={value}" for key, value in settings.items()),
            *self.settings,
        ]

    def run(self, name: str) -> str:
        """One run to its end, disturbed while faults are left; the digest of its adapter."""
        folder, most_steps, attempts = self.output / name, 0, 0
        while True:
            attempts += 1
            check(attempts <= 3 * self.faults + 3, f"{name} does not come to an end")
            with (self.output / f"{name}.log").open("a", encoding="utf-8") as log:
                driver = psutil.Popen(self.command(name), stdout=log, stderr=log, cwd=ROOT)
            family: dict[int, psutil.Process] = {}
            self.hit = []
            next_fault, role = self.draw()
            while driver.poll() is None:
                family |= {p.pid: p for p in self.family(driver)}
                most_steps = self.check_progress(folder, most_steps)
                if self.done < self.faults and time.monotonic() > next_fault and self.strike(driver, name, role):
                    next_fault, role = self.draw()
                if self.cluster:
                    self.cluster.replace_lost()
                time.sleep(0.2)
            self.check_nothing_left(list(family.values()))
            if driver.returncode == 0:
                break
            check(self.may_end(), f"{name} ended with {driver.returncode} after {self.hit or 'no fault'}; see its log")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        check(
            [line["step"] for line in lines] == list(range(self.steps)), f"{name}: steps {[x['step'] for x in lines]}"
        )
        for file in ("evaluation.json", "report.html", "generations.parquet"):
            check((folder / file).is_file(), f"{name}: no {file}")
        digest = load_adapter(folder / "adapter").digest
        print(f"{name}: {self.steps} steps in {attempts} commands, adapter {digest[:12]}", flush=True)
        return digest

    def family(self, driver: psutil.Process) -> list[psutil.Process]:
        """The driver and every process of Ray's that works for runs."""
        nodes = self.cluster.processes if self.cluster else []
        return [driver, *(child for parent in (driver, *nodes) for child in descendants(parent))]

    def may_end(self) -> bool:
        """Whether what was hit ends a command: its driver, or the node that it is on."""
        return "driver" in self.hit or ("node" in self.hit and not self.cluster)

    def draw(self) -> tuple[float, str]:
        """When the next fault is due, on the monotonic clock, and whom it befalls."""
        weights = [0.4 if role in COSTLY else 1.0 for role in self.roles]
        role = self.random.choices(self.roles, weights)[0]
        return time.monotonic() + self.random.uniform(0, 2 * self.pause_s), role

    def strike(self, driver: psutil.Process, name: str, role: str) -> bool:
        """Kill or stop one process of the role; False if there is none yet."""
        kept = descendants(self.cluster.processes[0]) if self.cluster and role == "node" else []
        found = [p for p in self.family(driver) if ROLES[role] in title(p) and p not in kept]
        if not found:
            return False
        hit = self.random.choice(found)
        how = signal.SIGSTOP if role in STOPPABLE and self.random.random() < 0.25 else signal.SIGKILL
        metrics = self.output / name / "metrics.jsonl"
        steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        try:
            hit.send_signal(how)
        except psutil.NoSuchProcess:
            return False
        self.done += 1
        self.hit.append(role)
        fault = {"fault": self.done, "time": time.time(), "run": name, "role": role, "signal": how.name, "steps": steps}
        with (self.output / "faults.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(fault) + "\n")
        print(f"{self.done}/{self.faults} {name}, {steps} steps: {how.name} to the {role}", flush=True)
        return True

    def check_progress(self, folder: Path, most_steps: int) -> int:
        """The steps behind the adapter in the folder, which must not be fewer than they were."""
        try:
            steps = int((folder / "adapter" / "steps.txt").read_text())
        except (FileNotFoundError, ValueError):
            return most_steps  # it is being replaced
        check(steps >= most_steps, f"{folder.name}: the adapter went back from {most_steps} to {steps} steps")
        return steps

    def check_nothing_left(self, family: list[psutil.Process]) -> None:
        """Nothing of what a driver started may live on; of a cluster, no worker of a run."""
        deadline = time.monotonic() + CLEAN_TIMEOUT_S
        while alive := [t for p in family if p.is_running() and (t := title(p)) and not self.may_live(t)]:
            check(time.monotonic() < deadline, f"left behind: {alive}")
            time.sleep(1)

    def may_live(self, process: str) -> bool:
        if process.startswith(AGENTS) or "agent.py" in process:
            return True
        return self.cluster is not None and (not process.startswith("ray::") or process.startswith(IDLE))


def descendants(driver: psutil.Process) -> list[psutil.Process]:
    try:
        return driver.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    """Its command line; nothing for one that has ended."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def check(is_right: bool, problem: str) -> None:
    if not is_right:
        sys.exit(f"FAILED: {problem}")


def soak_all(soak: Soak, faults: int) -> int:
    """An undisturbed run, then runs until the faults are used up; how many."""
    expected = soak.run("undisturbed")
    soak.faults, runs = faults, 0
    is_exact = not any(s.startswith("rollout.max_staleness=") and s[-1] != "0" for s in soak.settings)
    while soak.done < soak.faults:
        runs += 1
        digest = soak.run(f"run-{runs}")
        check(digest == expected or not is_exact, f"run-{runs}: another adapter than the undisturbed run's")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--pause-s", type=float, default=20.0, help="mean time between faults")
    parser.add_argument(
        "--roles", nargs="+", choices=ROLES, default=list(ROLES), metavar="ROLE", help="whom they befall"
    )
    parser.add_argument("--nodes", type=int, default=0, help="of a cluster; 0: every command starts a Ray of its own")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the runs' configuration")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)  # it may hold the undisturbed run already
    print(describe(machine([])), flush=True)
    soak = Soak(
        options.output, options.steps, 0, options.pause_s, options.roles, options.set, random.Random(options.seed)
    )
    try:
        if options.nodes:
            soak.cluster = LocalCluster(options.nodes, CPUS, options.output / "cluster.log")
            soak.cluster.start()
        runs = soak_all(soak, options.faults)
    finally:
        if soak.cluster:
            soak.cluster.stop()
    faults = [json.loads(line) for line in (options.output / "faults.jsonl").read_text().splitlines()]
    counts = collections.Counter((fault["role"], fault["signal"]) for fault in faults)
    for (role, how), count in sorted(counts.items()):
        print(f"{count:4} x {how} to the {role}")
    print(f"passed: {soak.done} faults in {runs} runs of {soak.steps} steps, nothing lost, nothing left behind")


if __name__ == "__main__":
    main()
