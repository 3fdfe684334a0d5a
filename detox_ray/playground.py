"""`detox-ray playground RUN`: the systems of a run side by side in a page, in the foreground."""

import math
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from detox_ray.classifier_config import ClassifierConfig
from detox_ray.config import Config, RewardConfig
from detox_ray.config_file import parse_section
from detox_ray.data.learned import learned_by
from detox_ray.data.prompts import load_all_prompts, load_prompts
from detox_ray.errors import ConfigError, DetoxError
from detox_ray.evaluation.run_files import published_name
from detox_ray.policy.load import load_model_config, load_tokenizer
from detox_ray.policy.policy import check_adapter
from detox_ray.records import Prompt
from detox_ray.rewards.classifiers import check_classifier
from detox_ray.run_adapters import named_adapters
from detox_ray.run_folder import RunFolder
from detox_ray.serving.api_config import HttpConfig
from detox_ray.serving.foreground import (
    check_replaces_nothing,
    deleted_at_the_end,
    serve_session,
    wait_until_stopped,
)
from detox_ray.serving.playground.cards import Scorer, SystemLabel
from detox_ray.serving.playground.engine import EngineSetup
from detox_ray.serving.playground.prompts import OfferedPrompt
from detox_ray.serving.playground.request import LONGEST_ANSWER_TOKENS
from detox_ray.serving.playground.setup import Missing, PageSetup
from detox_ray.sft_config import parse_run_config
from detox_ray.terminal import Terminal, with_lab

APP_NAME = "playground"
ROUTE = "/"
OFFERED_PROMPTS = 500
PAGE_TIMEOUT_S = 180.0
QUANTIZATION = {"none": "not quantised", "int8": "int8", "nf4": "NF4"}


def playground(
    folder: str | Path,
    prompts: str | Path | None = None,
    text_column: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    stop: threading.Event | None = None,
    quiet: bool = False,
) -> None:
    """Serve the page until SIGINT or SIGTERM (or until `stop` is set); it is up before the models are loaded.

    Args:
        folder: of a run, also of one that has no adapter yet.
        prompts: a file whose prompts are offered instead of the run's held-out ones; `text_column` holds the text.

    Raises:
        ConfigError, DataError, ModelError: something does not fit, the run is a fine-tuning, gradio is missing or the
            port is taken; nothing has started yet.
        RewardError: engine or classifiers do not start.
    """
    if find_spec("gradio") is None:
        raise ConfigError("the playground needs gradio: pip install 'detox_ray[playground]'")
    http = parse_section(HttpConfig, {"host": host, "port": port})
    terminal = Terminal(quiet)
    run = RunFolder.existing(folder)
    given = parse_run_config(run.read_config_tree())
    if not isinstance(given, Config):
        raise ConfigError(
            f"{run.path} holds a fine-tuning, which has no reward to show; talk to it with detox-ray chat {folder}, or "
            "open the page of a detox-ray train run that started from its adapter"
        )
    config = with_lab(given, terminal)
    scorers = [*config.reward.classifiers, config.evaluation.judge]
    for scorer in scorers:
        check_classifier(scorer)
    adapters = named_adapters(run, config)
    for path in adapters.values():
        check_adapter(config.policy.model_copy(update={"adapter": str(path)}))
    setup = page_setup(run, given, list(adapters), offered_prompts(run, config, prompts, text_column))

    from detox_ray.serving.deploy import deploy_in_background, wait_until_running
    from detox_ray.serving.playground.app import build_playground

    with serve_session(config.ray, http.host, http.port, request_timeout_s=None) as address:
        check_replaces_nothing(APP_NAME, ROUTE)
        engine = engine_setup(config, tuple(adapters.values()))
        reward = RewardConfig(classifiers=[for_one_reader(scorer) for scorer in scorers])
        app = build_playground(setup, engine, reward)
        with deleted_at_the_end(APP_NAME):
            deploy_in_background(app, APP_NAME, ROUTE)
            wait_for_page(address)
            terminal.stage(f"{address} (the models are still loading)")
            wait_until_running(APP_NAME)
            terminal.stage("ready; Ctrl-C stops it")
            wait_until_stopped(stop)


def wait_for_page(address: str) -> None:
    """Until the page is there.

    Raises:
        DetoxError: it does not come; the log of its replica says why.
    """
    deadline = time.monotonic() + PAGE_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(address, timeout=PAGE_TIMEOUT_S, trust_env=False).status_code == httpx.codes.OK:
                return
        time.sleep(0.1)
    raise DetoxError(f"the page at {address} did not come within {PAGE_TIMEOUT_S:g} s; see the logs of Ray Serve")


def engine_setup(config: Config, adapters: tuple[Path, ...]) -> EngineSetup:
    """What the engine loads; on a GPU where the run was trained on one and Ray has one."""
    import ray

    return EngineSetup(
        policy=config.policy,
        adapters=adapters,
        positions=getattr(load_model_config(config.policy), "max_position_embeddings", 2048),
        threads=config.train.threads,
        gpu=config.train.num_gpus > 0 and ray.cluster_resources().get("GPU", 0) >= 1,
    )


def for_one_reader(scorer: ClassifierConfig) -> ClassifierConfig:
    """The classifier as the page needs it: its plain probabilities, and no more of the machine than it takes.

    It reads a few texts at a time, so it waits for no CPU or GPU of its own, which may not be here.
    """
    none = {"num_cpus": 0.0, "num_gpus": 0.0, "resources": {}}
    return scorer.model_copy(update={"calibration": "none", "replicas": 1, **none})


def page_setup(run: RunFolder, config: Config, adapters: list[str], prompts: list[OfferedPrompt]) -> PageSetup:
    """The run as the page shows it; `config` as it was given, so that the lab's parts keep their names."""
    policy, train = config.policy, config.train
    last = adapters[-1] if adapters else "base"
    labels = [SystemLabel("Base", published_name(policy.model), f"{last} / base")]
    steps = run.trained_steps() if "RLAF" in adapters else 0
    details = {"Fine-tuned": published_name(policy.adapter), "RLAF": f"after {steps} steps of PPO"}
    labels += [SystemLabel(name, details[name], f"{name} / base") for name in adapters]
    missing = None
    if "RLAF" not in adapters:
        missing = Missing(
            "This run has no adapter yet, so there is no RLAF answer", f"detox-ray train {run.config_file}"
        )
    elif steps < train.total_steps:
        missing = Missing(
            f"This run is not finished: {steps} of {train.total_steps} steps", f"detox-ray train {run.config_file}"
        )
    return PageSetup(
        title=f"Playground: {run.path.name}",
        facts=f"{published_name(policy.model)}, {QUANTIZATION[policy.quantization]}",
        missing=missing,
        systems=tuple(labels),
        scorers=(
            Scorer(config.evaluation.judge.name, in_reward=False),
            *(Scorer(classifier.name, in_reward=True) for classifier in config.reward.classifiers),
        ),
        prompts=tuple(prompts),
        temperature=min(config.rollout.temperature, 2.0),
        top_p=config.rollout.top_p,
        max_new_tokens=min(config.rollout.max_new_tokens, LONGEST_ANSWER_TOKENS),
    )


def offered_prompts(
    run: RunFolder, config: Config, file: str | Path | None, text_column: str | None
) -> list[OfferedPrompt]:
    """The run's held-out prompts, or some of those in a file, with the toxicity that their file gives them.

    Raises:
        DataError: the file is missing, malformed or empty, or has no such column.
    """
    tokenizer = load_tokenizer(config.policy)
    if file is None:
        learned = learned_by(config.policy.adapter, str(run.adapter))
        found = load_prompts(config.data, tokenizer, config.seed, learned).heldout[:OFFERED_PROMPTS]
    else:
        update: dict[str, Any] = {
            "source": str(file),
            "mixed_in": [],
            "min_score": None,
            "max_score": None,
            "limit": OFFERED_PROMPTS,
        }
        if text_column is not None:
            update["text_column"] = text_column
        found = load_all_prompts(config.data.model_copy(update=update), tokenizer, config.seed).heldout
    return [OfferedPrompt(prompt.text, _toxicity(prompt, config.data.attribute)) for prompt in found]


def _toxicity(prompt: Prompt, attribute: str) -> float | None:
    """What the prompt's file says of it; None when that is nothing in [0, 1]."""
    try:
        toxicity = float(prompt.meta.get(attribute, math.nan))
    except (TypeError, ValueError):
        return None
    return toxicity if 0 <= toxicity <= 1 else None
