"""What the workers of each role take from Ray's nodes, and whether there is that much."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.table import Table
from scipy.optimize import Bounds, LinearConstraint, milp

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config import Config, RolloutConfig
from detox_ray.errors import ConfigError
from detox_ray.learner_config import LearnerConfig

Resources = dict[str, float]
ROUNDING = 1e-6
PACKING_TIME_S = 2.0
PROVED_IMPOSSIBLE = 2  # a status of scipy's milp


@dataclass(frozen=True)
class RoleResources:
    """What the workers of one role take: `each` is what one of them takes on its node, by Ray resource."""

    role: str
    section: str  # of the configuration, where these numbers stand
    count: int
    each: Resources


@dataclass(frozen=True)
class Capacity:
    """What each of Ray's nodes has; `grows`: others are started when they are asked for, and nobody knows which."""

    nodes: list[Resources]
    grows: bool = False

    def total(self, resource: str) -> float:
        """Of all nodes together."""
        return sum(node.get(resource, 0) for node in self.nodes)


def placements(config: Config) -> list[RoleResources]:
    """The roles of a training run."""
    return [
        rollout_placement(config.rollout),
        learner_placement(config.train),
        *(classifier_placement(classifier, i) for i, classifier in enumerate(config.reward.classifiers)),
    ]


def rollout_placement(rollout: RolloutConfig) -> RoleResources:
    """The rollout workers, which a run and an evaluation have."""
    return RoleResources("rollout worker", "rollout", rollout.workers, _each(rollout))


def learner_placement(train: LearnerConfig) -> RoleResources:
    """The learners, which a run and a fine-tuning have."""
    return RoleResources("learner", "train", train.workers, _each(train))


def classifier_placement(classifier: ClassifierConfig, index: int) -> RoleResources:
    """The replicas of the reward's classifier at this index."""
    section = f"reward.classifiers.{index}"
    return RoleResources(f"classifier {classifier.name}", section, classifier.replicas, _each(classifier))


def check_placements(needed: Sequence[RoleResources], capacity: Capacity) -> None:
    """Refuse what would wait for ever.

    Raises:
        ConfigError: all roles together need more of a resource than there is, no node has what one worker needs, or
            the nodes have no room for all workers at once.
    """
    if capacity.grows:
        return
    for resource, amount in total_needed(needed).items():
        if amount > capacity.total(resource) + ROUNDING:
            takers = [p for p in needed if resource in p.each]
            listed = ", ".join(f"{p.count} x {p.role} with {p.each[resource]:g}" for p in takers)
            raise ConfigError(
                f"this needs {_amount(resource, amount)} ({listed}) and Ray has {capacity.total(resource):g}; "
                f"lower {_settings(takers, resource)}{_or_start(resource)}"
            )
    for placement in needed:
        if not any(_has(node, placement.each) for node in capacity.nodes):
            raise ConfigError(
                f"no node of the cluster has what one {placement.role} needs together: {_amounts(placement.each)}; "
                f"lower its numbers in {placement.section}, or start such a node"
            )
    if not have_room_together(needed, capacity.nodes):
        workers = "; ".join(f"{p.count} x {p.role} with {_amounts(p.each)}" for p in needed if p.each)
        raise ConfigError(
            "the nodes of the cluster have enough in all, but not in one piece for every worker: no placement has room "
            f"for {workers}; lower some of these numbers, or start another node"
        )


def have_room_together(needed: Sequence[RoleResources], nodes: Sequence[Resources]) -> bool:
    """Whether each worker can be given a node so that no node is full; yes, where that is not found out in time.

    An integer program over how many workers of role p node n takes. A role's fractions of GPUs are of one GPU each; of
    several roles together they count as if they could be split.
    """
    resources = list(total_needed(needed))
    if not resources:
        return True
    counts = [placement.count for placement in needed]
    need = np.array([[placement.each.get(resource, 0) for placement in needed] for resource in resources])  # [r, p]
    room = np.array([[node.get(resource, 0) for node in nodes] for resource in resources])  # [r, n]
    found = milp(
        np.zeros(len(needed) * len(nodes)),
        integrality=np.ones(len(needed) * len(nodes)),
        bounds=Bounds(0, [_on_gpus(placement.each, node) for placement in needed for node in nodes]),
        constraints=[
            LinearConstraint(np.kron(np.eye(len(needed)), np.ones(len(nodes))), counts, counts),
            LinearConstraint(np.kron(need, np.eye(len(nodes))), ub=room.ravel() + ROUNDING),
        ],
        options={"time_limit": PACKING_TIME_S},
    )
    return found.status != PROVED_IMPOSSIBLE


def shortage(needed: Sequence[RoleResources], free: Resources) -> str | None:
    """What is not free of what is needed, in words; None: nothing."""
    missing = [
        f"{amount:g} {resource} ({max(0.0, free.get(resource, 0)):g} free)"
        for resource, amount in total_needed(needed).items()
        if amount > free.get(resource, 0) + ROUNDING
    ]
    return f"waiting until this cluster has {', '.join(missing)}" if missing else None


def waiting_line(roles: Sequence[RoleResources]) -> str:
    """What to say while no nodes have room for all workers of these roles."""
    listed = " and ".join(f"{p.count} x {p.role} with {_amounts(p.each)}" for p in roles if p.each)
    sections = " and ".join(p.section for p in roles if p.each)
    return (
        f"the run waits for room: no nodes have it now for {listed}; end what holds it, add a node, or start again "
        f"with lower numbers in {sections}"
    )


def total_needed(needed: Iterable[RoleResources]) -> Resources:
    """Of all workers of all roles, by resource."""
    total: Resources = {}
    for placement in needed:
        for resource, amount in placement.each.items():
            total[resource] = total.get(resource, 0) + placement.count * amount
    return total


def placement_table(needed: Sequence[RoleResources]) -> Table:
    """What Ray is asked for: a row a role, a column a resource."""
    total = total_needed(needed)
    table = Table(title="Ray resources of one worker", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("role")
    for resource in total:
        table.add_column(resource, justify="right", no_wrap=True)
    for placement in needed:
        amounts = [f"{placement.each[r]:g}" if r in placement.each else "" for r in total]
        table.add_row(f"{placement.count} x {placement.role}", *amounts)
    table.add_row("together", *(f"{amount:g}" for amount in total.values()))
    return table


def _each(config: RolloutConfig | LearnerConfig | ClassifierConfig) -> Resources:
    asked = {"CPU": config.num_cpus, "GPU": config.num_gpus, **config.resources}
    return {resource: amount for resource, amount in asked.items() if amount > 0}


def _on_gpus(each: Resources, node: Resources) -> float:
    """How many such workers the node's GPUs take."""
    share = each.get("GPU", 0)
    return node.get("GPU", 0) * math.floor(1 / share + ROUNDING) if 0 < share < 1 else np.inf


def _has(node: Resources, each: Resources) -> bool:
    return all(amount <= node.get(resource, 0) + ROUNDING for resource, amount in each.items())


def _amounts(each: Resources) -> str:
    return ", ".join(_amount(resource, amount) for resource, amount in each.items())


def _amount(resource: str, amount: float) -> str:
    return f"{amount:g} {resource}s" if resource in ("CPU", "GPU") else f"{amount:g} of {resource!r}"


def _settings(takers: Sequence[RoleResources], resource: str) -> str:
    counts = [f"{p.section}.{'replicas' if 'classifiers' in p.section else 'workers'}" for p in takers if p.count > 1]
    key = {"CPU": "num_cpus", "GPU": "num_gpus"}.get(resource, f"resources.{resource}")
    return ", ".join([*counts, *(f"{p.section}.{key}" for p in takers)])


def _or_start(resource: str) -> str:
    if resource in ("CPU", "GPU"):
        return ""
    return f", or start nodes with `ray start --resources='{{\"{resource}\": ...}}'`"
