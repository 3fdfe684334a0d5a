"""`detox-ray plan`: the memory every role of a run needs on its device, from arithmetic, before anything is loaded."""

from dataclasses import dataclass, replace

import torch
from rich import box
from rich.table import Table
from transformers import AutoModelForSequenceClassification

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.cluster import local_memory, starts_own_ray
from detox_ray.config import Config, PolicyConfig, RayConfig
from detox_ray.errors import ConfigError
from detox_ray.learner_config import LearnerConfig
from detox_ray.policy.footprint import (
    Skeleton,
    activation_bytes,
    cache_bytes_per_token,
    dequantization_bytes,
    load_skeleton,
    logits_bytes,
    sharded_weight_bytes,
    weight_bytes,
)
from detox_ray.policy.load import compute_dtype
from detox_ray.ppo_config import OptimizerConfig
from detox_ray.rewards.model_config import load_model_config as load_classifier_config
from detox_ray.rollout.engine import choose_engine

GIB = 2**30
# Bytes a trained number has beside itself: its gradient, and the two moments of the optimiser.
GRADIENT_BYTES = 4
MOMENT_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
# What a learner copies to main memory of a trained number and its moments: the state before a step and the last good
# one; while a checkpoint is written, the last good one and the two in the file.
COPIES = 3
# Interpreter and libraries of a process in main memory (measured on CPUs), and a CUDA context with the allocator's
# slack on a GPU (assumed).
PROCESS_BYTES = {"learner": 0.7 * GIB, "vllm": 0.75 * GIB, "transformers": 0.6 * GIB, "classifier": 0.4 * GIB}
CUDA_BYTES = 1.0 * GIB
# Ray's own processes and the driver (measured).
RAY_BYTES = 2.1 * GIB
# What a role that shares a GPU in turns keeps there while the other has its turn.
KEPT_BETWEEN_TURNS = {"learner": ("weights", "trained", "process"), "rollout worker": ("process",)}
# Less than this is not worth a change of settings.
SMALLEST_SAVING = 0.05 * GIB
COLUMNS = ("weights", "trained", "batch", "cache", "process")
TITLE = "GiB of one process (trained: adapter, gradient, moments, copies; batch: what a pass keeps; main: main memory)"


@dataclass(frozen=True)
class Role:
    """A kind of process: how many, GPUs of each, and bytes by purpose on its device.

    `host`: main memory of one that is on a GPU.
    """

    name: str
    count: int
    gpus: float
    bytes: dict[str, float]
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of one on its device."""
        return sum(self.bytes.values())

    @property
    def main_memory(self) -> float:
        """Bytes of one in main memory."""
        return self.host if self.gpus > 0 else self.total


@dataclass(frozen=True)
class MemoryPlan:
    """The roles of a run, what would make the learner smaller, with the bytes saved, and whether learner and rollout
    workers share a GPU in turns.
    """

    roles: list[Role]
    remedies: dict[str, float]
    note: str
    in_turns: bool = False

    @property
    def main_memory(self) -> float:
        """Bytes of main memory over all processes, as if they were on one machine."""
        return RAY_BYTES + sum(role.count * role.main_memory for role in self.roles)

    def gpu_need(self, role: Role) -> tuple[float, float]:
        """(bytes a role needs on one GPU, the share of the GPU that is there for them)."""
        if not (self.in_turns and role.name in KEPT_BETWEEN_TURNS):
            return role.total, min(role.gpus, 1.0)
        (other,) = (r for r in self.roles if r.name in KEPT_BETWEEN_TURNS and r is not role)
        kept = other.count * sum(other.bytes[purpose] for purpose in KEPT_BETWEEN_TURNS[other.name])
        return role.count * role.total + kept, role.count * role.gpus + other.count * other.gpus


def plan_memory(config: Config) -> MemoryPlan:
    """What the run needs; every model must be a folder or a hub id.

    Raises:
        ConfigError: the rollout engine does not serve the model as configured.
        ModelError: a model's configuration cannot be read.
    """
    device = torch.device("cuda" if config.train.num_gpus > 0 else "cpu")
    shape = load_skeleton(config.policy, compute_dtype(config.policy, device))
    batch = _activations(config, shape, config.policy.gradient_checkpointing)
    roles = [learner_role(config.policy, config.train, config.ppo, shape, batch), _rollout_worker(config, shape)]
    roles += [_classifier(classifier) for classifier in config.reward.classifiers]
    if config.evaluation.every > 0:
        judge = config.evaluation.judge.model_copy(update={"num_gpus": 0.0, "replicas": 1})
        roles.append(replace(_classifier(judge), name=f"judge {judge.name}"))
    note = f"{shape.base_parameters():,} parameters, {shape.adapter_parameters():,} trained; {_held(config, shape)}"
    plan = MemoryPlan(roles, _remedies(config, shape, batch), note, config.rollout.in_turns)
    if plan.in_turns:
        learning, sampling = (plan.gpu_need(role)[0] / GIB for role in roles[:2])
        note += f"; on the GPU they share in turns {sampling:.1f} GiB while sampling, {learning:.1f} while learning"
    return replace(plan, note=note)


def check_memory(plan: MemoryPlan, gpu_bytes: float | None, main_bytes: float | None) -> None:
    """Refuse a run that cannot fit; a device whose size is not known is not checked.

    Raises:
        ConfigError: a role needs more than its share of a GPU, or all of them together more main memory than there is.
    """
    for role in plan.roles:
        needed, share = plan.gpu_need(role)
        if gpu_bytes is not None and role.gpus > 0 and needed > share * gpu_bytes:
            raise ConfigError(
                f"{role.name} needs {needed / GIB:.1f} GiB of a GPU and has {share * gpu_bytes / GIB:.1f}"
                f"{_advice(plan) if role.name == 'learner' else _more_gpu(plan, role)}"
            )
    if main_bytes is not None and plan.main_memory > main_bytes:
        remedy = "; take a smaller model" if plan.roles[0].gpus > 0 else _advice(plan)
        raise ConfigError(
            f"the processes need {plan.main_memory / GIB:.1f} GiB of main memory together and there are "
            f"{main_bytes / GIB:.1f}{remedy}, or fewer workers"
        )


def available_memory(
    plan: MemoryPlan, ray: RayConfig, gpu_memory_gib: float | None
) -> tuple[float | None, float | None]:
    """(bytes of one GPU, bytes of main memory) to check a run against; None where that is another machine's."""
    if gpu_memory_gib is not None:
        gpu: float | None = gpu_memory_gib * GIB
    else:
        gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    needs_gpu = any(role.gpus > 0 for role in plan.roles)
    elsewhere = not starts_own_ray(ray) or (needs_gpu and not torch.cuda.is_available())
    return gpu, None if elsewhere else float(local_memory()[1])


def memory_table(plan: MemoryPlan) -> Table:
    """The plan as a table, GiB of one process of each role."""
    table = Table(title=TITLE, caption=plan.note, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("role")
    for column in ("device", *COLUMNS, "total", "main"):
        table.add_column(column, justify="right", no_wrap=True)
    for role in plan.roles:
        device = "CPU" if role.gpus == 0 else f"{role.gpus:g} GPU"
        cells = [f"{role.bytes[c] / GIB:.2f}" if role.bytes.get(c) else "" for c in COLUMNS]
        both = (f"{amount / GIB:.2f}" for amount in (role.total, role.main_memory))
        table.add_row(f"{role.count} x {role.name}", device, *cells, *both)
    table.add_row("together, with Ray", *[""] * (len(COLUMNS) + 2), f"{plan.main_memory / GIB:.2f}")
    return table


def learner_role(
    policy: PolicyConfig, learner: LearnerConfig, optimizer: OptimizerConfig, shape: Skeleton, batch: float
) -> Role:
    """The learners; `batch` is what one pass keeps, in bytes."""
    trained = shape.adapter_parameters()
    process, host = _process("learner", learner.num_gpus)
    moments = MOMENT_BYTES[optimizer.optimizer]
    copies = COPIES * trained * (4.0 + moments)
    if learner.shard_base:
        weights = sharded_weight_bytes(shape, policy.quantization, policy.double_quantization, learner.workers)
    else:
        weights = weight_bytes(shape, policy.quantization, policy.double_quantization)
    purposes = {
        "weights": weights + (dequantization_bytes(shape) if policy.quantization == "nf4" else 0),
        "trained": trained * (4 + GRADIENT_BYTES + moments) + (0.0 if learner.num_gpus > 0 else copies),
        "batch": batch,
        "process": process,
    }
    return Role("learner", learner.workers, learner.num_gpus, purposes, host + copies)


def _process(kind: str, gpus: float) -> tuple[float, float]:
    """(bytes on its device, bytes of main memory beside them) of a process that does nothing yet."""
    return (CUDA_BYTES, PROCESS_BYTES[kind]) if gpus > 0 else (PROCESS_BYTES[kind], 0.0)


def _activations(config: Config, shape: Skeleton, checkpointing: bool, accumulation: int | None = None) -> float:
    ppo = config.ppo
    parts = config.train.workers * ppo.minibatches * (accumulation or ppo.gradient_accumulation)
    sequences = max(1, ppo.batch_size // parts)
    prompt, response = config.data.max_tokens + 1, config.rollout.max_new_tokens
    logits = logits_bytes(shape, sequences * response)
    return activation_bytes(shape, sequences, prompt, response, checkpointing) + logits


def _rollout_worker(config: Config, shape: Skeleton) -> Role:
    rollout, parts = config.rollout, config.rollout.tensor_parallel
    engine, sync, _ = choose_engine(rollout, type(shape.base).__name__)
    weights, trained = weight_bytes(shape, "none"), shape.adapter_parameters() * shape.dtype.itemsize
    # A push starts from pristine weights, which the process of every part has whole, in main memory.
    pristine = weights * parts if sync == "merged" else 0.0
    process, host = _process(engine, rollout.num_gpus)
    processes = 1 if parts == 1 else parts + 1  # the actor's own beside those of the parts
    purposes: dict[str, float] = {"cache": rollout.kv_cache_mib * 2**20}
    if engine == "transformers":
        # `generate` keeps the float32 scores of every step until the last.
        scores = 4.0 * rollout.max_num_seqs * rollout.max_new_tokens * shape.base.config.vocab_size
        purposes = {"cache": rollout.max_num_seqs * _longest(config) * cache_bytes_per_token(shape), "batch": scores}
    if rollout.num_gpus > 0:
        # Of one GPU: each has its part of the weights, and a cache of its own.
        purposes |= {"weights": weights / parts, "trained": trained / parts, "process": process}
        asleep = weights + trained if rollout.in_turns else 0.0
        host = host * processes + pristine + asleep
    else:
        purposes |= {"weights": weights + pristine, "trained": trained, "process": process * processes}
        purposes["cache"] *= parts
    return Role("rollout worker", rollout.workers, rollout.num_gpus, purposes, host)


def _held(config: Config, shape: Skeleton) -> str:
    """How many sequences a rollout worker advances together, and whether its cache, if it has one, holds them."""
    rollout, longest = config.rollout, _longest(config)
    if choose_engine(rollout, type(shape.base).__name__)[0] == "transformers":
        return f"a rollout worker advances {rollout.max_num_seqs} sequences of {longest} tokens (rollout.max_num_seqs)"
    held = rollout.kv_cache_mib * 2**20 / (cache_bytes_per_token(shape) * longest)
    return (
        f"a rollout worker's KV cache holds {held:,.0f} sequences of {longest} tokens "
        f"(rollout.max_num_seqs={rollout.max_num_seqs})"
    )


def _longest(config: Config) -> int:
    """Tokens of the longest sequence."""
    return config.data.max_tokens + 1 + config.rollout.max_new_tokens


def _classifier(classifier: ClassifierConfig) -> Role:
    process, host = _process("classifier", classifier.num_gpus)
    purposes = {"process": process}
    if classifier.kind in ("transformers", "evaluate"):
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(load_classifier_config(classifier))
        config = model.config
        widest = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        purposes["weights"] = 4.0 * sum(p.numel() for p in model.parameters())
        purposes["batch"] = 4.0 * classifier.batch_size * classifier.max_length * (widest + 4 * config.hidden_size)
    return Role(f"classifier {classifier.name}", classifier.replicas, classifier.num_gpus, purposes, host)


def _remedies(config: Config, shape: Skeleton, now: float) -> dict[str, float]:
    """Settings that would make a learner smaller -> bytes they would save of the `now` that its batch takes."""
    policy, ppo = config.policy, config.ppo
    found = weight_remedies(policy, config.train, shape)
    if not policy.gradient_checkpointing:
        found["policy.gradient_checkpointing=true"] = now - _activations(config, shape, True)
    doubled = 2 * ppo.gradient_accumulation
    if ppo.batch_size % (config.train.workers * ppo.minibatches * doubled) == 0:
        saved = now - _activations(config, shape, policy.gradient_checkpointing, doubled)
        found[f"ppo.gradient_accumulation={doubled}"] = saved
    return worthwhile(found)


def weight_remedies(policy: PolicyConfig, learner: LearnerConfig, shape: Skeleton) -> dict[str, float]:
    """What NF4 would save, and spreading the base over the learners, where that is not done already."""
    found = {}
    whole = weight_bytes(shape, policy.quantization, policy.double_quantization)
    if policy.quantization != "nf4":
        found["policy.quantization=nf4"] = whole - weight_bytes(shape, "nf4") - dequantization_bytes(shape)
    if policy.quantization != "int8" and learner.workers > 1 and not learner.shard_base:
        sharded = sharded_weight_bytes(shape, policy.quantization, policy.double_quantization, learner.workers)
        found["train.shard_base=true"] = whole - sharded
    return found


def worthwhile(remedies: dict[str, float]) -> dict[str, float]:
    """Those that save enough to be worth a change of settings."""
    return {setting: saved for setting, saved in remedies.items() if saved > SMALLEST_SAVING}


def _more_gpu(plan: MemoryPlan, role: Role) -> str:
    could_share = role.name == "rollout worker" and not plan.in_turns
    turns = ", share one with the learner in turns (rollout.in_turns=true)" if could_share else ""
    return f"; give it more of a GPU (num_gpus){turns}, or a larger one"


def _advice(plan: MemoryPlan) -> str:
    ranked = sorted(plan.remedies.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{setting} (saves {saved / GIB:.1f} GiB)" for setting, saved in ranked)
    return f": set {listed}" if listed else ": take a smaller model"
