"""An evaluation, told in the order it happens: systems answer, scorers judge, the report says what changed."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from detox_ray.cluster import announce_shortage, local_capacity, ray_session, starts_own_ray
from detox_ray.config import PolicyConfig, RolloutConfig
from detox_ray.data.learned import learned_by
from detox_ray.data.prompts import load_all_prompts, load_prompts
from detox_ray.errors import ConfigError
from detox_ray.evaluation.comparison import EvaluationProtocol, compare, write_evaluation
from detox_ray.evaluation.meter import PerplexityModel, score_responses
from detox_ray.evaluation.perplexity import load_reference_model
from detox_ray.evaluation.relevance import SentenceEncoder
from detox_ray.evaluation.report import write_report
from detox_ray.evaluation.response_systems import PublishedSystem, read_systems
from detox_ray.evaluation.responses import WORDS, SystemResponses, align, group_rollouts, rows_like
from detox_ray.evaluation.sampled_file import FOLDER as SAMPLED_FOLDER
from detox_ray.evaluation.sampled_file import SampledFile
from detox_ray.evaluation.summary import evaluation_table
from detox_ray.meter_config import MeterConfig, SystemConfig, meter_config
from detox_ray.placement import check_placements, rollout_placement
from detox_ray.plan import canary_tolerance, plan_engine, with_dequantized_base
from detox_ray.policy.adapter import load_adapter
from detox_ray.policy.load import load_tokenizer
from detox_ray.policy.policy import CANARY_LENGTH, canary_of
from detox_ray.records import Prompt
from detox_ray.reservation import Reservation, reserve
from detox_ray.rewards.classifiers import check_classifier, load_classifier
from detox_ray.rollout.engine import EngineSpec
from detox_ray.rollout.pool import WorkerPool
from detox_ray.rollout.stream import sampling_of
from detox_ray.rollout.worker import start_workers, stop_workers
from detox_ray.run_folder import RunFolder
from detox_ray.terminal import Terminal, with_lab

CHUNK_RESPONSES = 256  # sampled between two moves of the progress bar, and lost at most by a kill


@dataclass(frozen=True)
class Base:
    """One base model and the systems that answer on it, those without an adapter first: a push cannot be taken back."""

    systems: list[SystemConfig]
    engine: EngineSpec
    prompts: list[Prompt]


def evaluate(target: str | Path | MeterConfig, overrides: Sequence[str] = (), quiet: bool = False) -> dict[str, Any]:
    """Measure how toxic and how fluent systems are, side by side on the same prompts; a killed evaluation continues.

    Args:
        target: the YAML file of an evaluation, a run folder (its base and its adapter on its held-out prompts), a
            file of responses, a model folder or hub id, or the configuration itself.
        overrides: dotted, such as `prompts=500`; not for a configuration itself.
        quiet: print nothing.

    Returns:
        The content of `evaluation.json`, which stands in the folder beside `generations.parquet` and `report.html`.

    Raises:
        ConfigError, DataError, ModelError: something does not fit; nothing expensive has started.
        RewardError: a scorer failed.
    """
    terminal = Terminal(quiet)
    given = target if isinstance(target, MeterConfig) else meter_config(target, tuple(overrides))
    config = with_lab(given.with_absolute_paths(), terminal)
    for scorer in config.scorers:
        check_classifier(scorer)
    _encoder(config)  # one that does not load says so before anything is sampled
    needed = [rollout_placement(config.rollout)]
    if starts_own_ray(config.ray):
        check_placements(needed, local_capacity(config.ray))
    files = _read_files(config, terminal)
    _refuse_two_scorers_of_one_name(config, files)
    with RunFolder.claim(config.folder) as folder:
        terminal.stage(f"evaluation folder {folder.path}")
        bases = [_plan_base(systems, config, terminal) for systems in _by_base(config.systems)]
        answers = {name: [file.responses for file in of_system] for name, of_system in files.items()}
        if bases:
            with ray_session(config.ray, partial(check_placements, needed), folder.ray_logs):
                announce_shortage(needed, terminal)
                for base in bases:
                    answers |= {r.name: [r] for r in _answers_on(base, config, folder, terminal)}
        systems = [responses for system in config.systems for responses in answers[system.name]]
        known = {file.responses.name: file.scores for of_system in files.values() for file in of_system}
        steps = {"steps": folder.trained_steps()} if folder.adapter.exists() else {}
        return judge_and_report(config, folder, systems, terminal, known, **steps)


@contextmanager
def rollout_workers(engine: EngineSpec, rollout: RolloutConfig, reservation: Reservation) -> Iterator[list[Any]]:
    """The rollout actors, whose engines go on starting while other things start."""
    workers = start_workers(engine, rollout, reservation.strategies(rollout_placement(rollout)))
    try:
        yield workers
    finally:
        stop_workers(workers)


def answer(
    pool: WorkerPool,
    engine: EngineSpec,
    system: SystemConfig,
    prompts: Sequence[Prompt],
    config: MeterConfig,
    folder: RunFolder,
    terminal: Terminal,
) -> SystemResponses:
    """What the workers answer to the prompts as this system; what is on disk already is not sampled again.

    A system without an adapter must come before any with one: a push cannot be taken back. Errors as `push_adapter`.
    """
    assert system.policy is not None
    if system.policy.adapter is not None:
        push_adapter(pool, engine, system.policy.adapter)
    file = _sampled_file(system, prompts, config, folder)
    samples = config.rollout.samples_per_prompt
    found = file.read()
    terminal.stage(f"{system.name}: {samples} responses to each of {len(prompts)} prompts")
    size = max(1, CHUNK_RESPONSES // samples)
    with terminal.bar(f"{system.name} responses", len(prompts)) as progress:
        for start in range(0, len(prompts), size):
            chunk = [prompt for prompt in prompts[start : start + size] if prompt.id not in found]
            if chunk:
                file.append(pool.sample(chunk, samples, sampling_of(config.rollout, seed=config.seed + 1 + start)))
            progress(min(start + size, len(prompts)))
    rollouts = [rollout for of_prompt in file.read().values() for rollout in of_prompt]
    return group_rollouts(system.name, rollouts, prompts, engine.end_ids)


def push_adapter(pool: WorkerPool, engine: EngineSpec, folder: str | Path) -> None:
    """Serve the adapter in a folder, verified against plain `peft` on the engine's base.

    That is done on the CPU: the driver may have no GPU, or share it with an engine.

    Raises:
        ModelError: it cannot be read, or belongs to another base.
        SyncError: a worker does not serve what `peft` computes.
    """
    saved = load_adapter(folder)
    model = load_reference_model(engine.model, engine.revision, "cpu", getattr(torch, engine.dtype))
    tuned = PeftModel.from_pretrained(model, str(folder))
    canary = canary_of(tuned, min(CANARY_LENGTH, engine.max_length - 1))
    pool.publish(lambda version: replace(saved, version=version), canary)


def judge_and_report(
    config: MeterConfig,
    folder: RunFolder,
    systems: Sequence[SystemResponses],
    terminal: Terminal,
    known: Mapping[str, Mapping[str, np.ndarray]] = MappingProxyType({}),
    **more: Any,
) -> dict[str, Any]:
    """Score the systems' responses, compare them, write the folder's files, print the table.

    `known`: system -> scorer -> [P, S], scores that are there already; `more` is added to evaluation.json, whose
    content is returned.

    Raises:
        ConfigError: nobody scores.
        DataError: the systems answered different prompts.
        RewardError: a scorer failed.
    """
    given = {system.name: system.prompts for system in systems}
    systems = align(systems)
    rows = {system.name: rows_like(given[system.name], system.prompts) for system in systems}
    known = {name: {by: scores[rows[name]] for by, scores in of_system.items()} for name, of_system in known.items()}
    names = [scorer.name for scorer in config.scorers]
    names += sorted(set.intersection(*(set(known.get(system.name, ())) for system in systems)) - {*names})
    if not names:
        raise ConfigError("scorers is empty, and no score is known of every system: name a scorer")
    terminal.stage(f"judging with {', '.join(names)}")
    scorers = [load_classifier(scorer) for scorer in config.scorers]
    perplexity_model, encoder = _perplexity_model(config), _encoder(config)
    scored = []
    with terminal.bar("scoring", len(systems)) as progress:
        for number, system in enumerate(systems, 1):
            own = {name: scores for name, scores in known.get(system.name, {}).items() if name in names}
            model = perplexity_model
            if model is not None and _is_perplexity_model(system.name, config):
                model = replace(model, tokenizer=None)
            scored.append(score_responses(system, scorers, model, encoder, own))
            progress(number)
    read_by = config.perplexity_model, config.relevance_model
    protocol = EvaluationProtocol(names, config.seed, config.bootstrap_resamples, *read_by, _counted_in(config))
    evaluation = compare(scored, protocol) | _sampling(config) | more
    write_evaluation(folder.path, evaluation, scored)
    report = write_report(folder.path)
    shutil.rmtree(folder.path / SAMPLED_FOLDER, ignore_errors=True)
    terminal.console.print(evaluation_table(evaluation))
    terminal.stage(f"report: {report}")
    return evaluation


def _counted_in(config: MeterConfig) -> str:
    """The model whose tokens all systems have; else words."""
    of_files = config.perplexity_model or WORDS
    models = {system.policy.model if system.policy else of_files for system in config.systems}
    return models.pop() if len(models) == 1 else WORDS


def _sampling(config: MeterConfig) -> dict[str, Any]:
    """How the models among the systems were sampled; nothing where all of them are files."""
    if not any(system.policy for system in config.systems):
        return {}
    return {"sampling": config.rollout.model_dump(include={"max_new_tokens", "temperature", "top_p", "top_k"})}


def _read_files(config: MeterConfig, terminal: Terminal) -> dict[str, list[PublishedSystem]]:
    """System -> what its file holds, for the systems that are files; says what was left out."""
    tokenizer = load_tokenizer(_reader(config)) if config.perplexity_model else None
    files = {}
    for system in config.systems:
        if system.responses is not None:
            files[system.name], counts = read_systems(system, tokenizer)
            for reason, count in counts.items():
                terminal.stage(f"{system.name}: {count} x {reason}")
    return files


def _refuse_two_scorers_of_one_name(config: MeterConfig, files: Mapping[str, list[PublishedSystem]]) -> None:
    """Raises:
    ConfigError: a file came with scores under the name of a scorer that is to score now.
    """
    names = {scorer.name for scorer in config.scorers}
    for of_system in files.values():
        for file in of_system:
            if both := names & file.scores.keys():
                raise ConfigError(
                    f"{min(both)!r} is a scorer and a column of scores of {file.responses.name!r}; rename it in "
                    "columns.scores, or leave the scorer out"
                )


def _by_base(systems: Sequence[SystemConfig]) -> list[list[SystemConfig]]:
    """The systems that are models, gathered by base, those without an adapter first."""
    groups: dict[str, list[SystemConfig]] = {}
    for system in systems:
        if system.policy is not None:
            groups.setdefault(system.policy.base_identity, []).append(system)
    return [sorted(g, key=lambda s: s.policy is not None and s.policy.adapter is not None) for g in groups.values()]


def _plan_base(systems: list[SystemConfig], config: MeterConfig, terminal: Terminal) -> Base:
    """What the systems of one base start from, with the prompts in its tokens; errors as `plan_engine`."""
    policy = systems[0].policy
    assert policy is not None
    engine, reason = plan_engine(policy, config.rollout, config.data.max_tokens, _device(config.rollout))
    ranks = [load_adapter(s.policy.adapter).peft_config["r"] for s in systems if s.policy and s.policy.adapter]
    if config.heldout_of_run:
        learned = learned_by(*(s.policy.adapter for s in config.systems if s.policy))
        split = load_prompts(config.data, load_tokenizer(policy), config.seed, learned)
    else:
        split = load_all_prompts(config.data, load_tokenizer(policy), config.seed)
    if config.heldout_of_run and config.prompts is not None and config.prompts > len(split.heldout):
        raise ConfigError(f"prompts={config.prompts}: the run holds out {len(split.heldout)} prompts; lower it")
    terminal.stage(f"{', '.join(system.name for system in systems)}: {reason}")
    engine = replace(engine, lora_rank=max(ranks, default=engine.lora_rank))
    return Base(systems, engine, split.heldout[: config.prompts])


def _answers_on(base: Base, config: MeterConfig, folder: RunFolder, terminal: Terminal) -> list[SystemResponses]:
    """The responses of every system of one base, in turn on the same workers."""
    policy = base.systems[0].policy
    assert policy is not None
    engine = with_dequantized_base(base.engine, policy, config.rollout, folder, _device(config.rollout))
    with (
        reserve([rollout_placement(config.rollout)], terminal.stage) as reservation,
        rollout_workers(engine, config.rollout, reservation) as workers,
    ):
        pool = WorkerPool(workers, config.rollout, canary_tolerance(policy, config.rollout, engine))
        pool.connect()
        return [answer(pool, engine, s, base.prompts, config, folder, terminal) for s in base.systems]


def _device(rollout: RolloutConfig) -> torch.device:
    """Where a quantised base is dequantised."""
    return torch.device("cuda" if rollout.num_gpus > 0 else "cpu")


def _sampled_file(
    system: SystemConfig, prompts: Sequence[Prompt], config: MeterConfig, folder: RunFolder
) -> SampledFile:
    policy = system.policy
    assert policy is not None
    adapter = "" if policy.adapter is None else load_adapter(policy.adapter).digest
    model = policy.base_identity + adapter
    sampling = sampling_of(config.rollout, config.seed)
    return SampledFile(folder.path, system.name, model, prompts, config.rollout.samples_per_prompt, sampling)


def _perplexity_model(config: MeterConfig) -> PerplexityModel | None:
    """The configured perplexity model, which reads its own tokens."""
    if config.perplexity_model is None:
        return None
    tokenizer = load_tokenizer(_reader(config))
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = load_reference_model(config.perplexity_model, config.perplexity_revision, device, dtype)
    return PerplexityModel(model, int(tokenizer.pad_token_id), tokenizer)


def _is_perplexity_model(system_name: str, config: MeterConfig) -> bool:
    """Whether the system is a policy on the perplexity model, which reads the very tokens that such a one wrote."""
    models = [s.policy.model for s in config.systems if s.name == system_name and s.policy is not None]
    return models == [config.perplexity_model]


def _encoder(config: MeterConfig) -> SentenceEncoder | None:
    """The configured relevance model."""
    return SentenceEncoder(config.relevance_model, config.relevance_revision) if config.relevance_model else None


def _reader(config: MeterConfig) -> PolicyConfig:
    """The perplexity model as what `load_tokenizer` reads."""
    assert config.perplexity_model is not None
    return PolicyConfig(model=config.perplexity_model, revision=config.perplexity_revision, quantization="none")
