"""`detox-ray chat RUN`: the base and what was made of it answer side by side in the terminal."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from detox_ray.config import Config, RolloutConfig
from detox_ray.data.templates import DialogueTemplate
from detox_ray.errors import ConfigError
from detox_ray.policy.load import end_token_ids, load_model_config, load_tokenizer
from detox_ray.policy.policy import check_adapter
from detox_ray.policy.systems import Systems
from detox_ray.run_adapters import named_adapters
from detox_ray.run_folder import RunFolder
from detox_ray.sft_config import SFTConfig, parse_run_config
from detox_ray.terminal import Terminal, with_lab

REDRAWS_PER_S = 8
TUNED_ROLLOUT = RolloutConfig(max_new_tokens=128)  # a fine-tuning's configuration says nothing of sampling


@dataclass
class Speaker:
    """A system, and what was said to it and by it; a dialogue goes on only where prompts are written as one."""

    name: str
    turns: list[str] = field(default_factory=list)


class Chat:
    """The systems of a run, each with a dialogue of its own."""

    def __init__(self, run: RunFolder, config: Config | SFTConfig) -> None:
        """Load the base once, with every adapter on it.

        Raises:
            ModelError, ConfigError: a model cannot be loaded, or the template does not fit the tokenizer.
        """
        policy, data = config.policy, config.data
        adapters = named_adapters(run, config)
        for path in adapters.values():
            check_adapter(policy.model_copy(update={"adapter": str(path)}))
        self.speakers = [Speaker(name) for name in ("Base", *adapters)]
        self._tokenizer = load_tokenizer(policy)
        self._template = DialogueTemplate(self._tokenizer, data.template, data.turn_separator)
        self._is_dialogue = data.format not in {"text", None} or data.template != "none"
        self._end_ids = end_token_ids(policy, self._tokenizer)
        self._positions = getattr(load_model_config(policy), "max_position_embeddings", 2048)
        self._rollout = config.rollout if isinstance(config, Config) else TUNED_ROLLOUT
        device = torch.device("cuda" if config.train.num_gpus > 0 and torch.cuda.is_available() else "cpu")
        self._systems = Systems(policy, list(adapters.values()), device)

    def say(self, text: str, seed: int) -> Iterator[list[str]]:
        """The answers so far of all systems to `text`, one after the other, again and again while they grow.

        Raises:
            ConfigError: the text is longer than the model can read with its answer.
        """
        answers = ["" for _ in self.speakers]
        for place, speaker in enumerate(self.speakers):
            turns = [*speaker.turns, text] if self._is_dialogue else [text]
            longest = self._positions - self._rollout.max_new_tokens
            prompt = self._template.fitting_prompt(turns, longest, trim=True)
            if prompt is None:
                raise ConfigError(f"the text has more than {longest} tokens; shorten it")
            ids: list[int] = []
            rollout = self._rollout
            for step in self._systems.answer(
                prompt.token_ids, self._end_ids, rollout.max_new_tokens, rollout.temperature, rollout.top_p, seed
            ):
                if (token := step[place]) is None:
                    break
                ids.append(token.token_id)
                answers[place] = str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
                yield list(answers)
            speaker.turns = [*turns, answers[place]]


def chat(folder: str | Path, seed: int = 0) -> None:
    """Read lines from standard input until it ends, and answer each of them.

    Raises:
        ConfigError, ModelError: the folder is no run, or its models cannot be loaded.
    """
    terminal = Terminal()
    run = RunFolder.existing(folder)
    config = with_lab(parse_run_config(run.read_config_tree()), terminal)
    terminal.stage("loading the model")
    chat = Chat(run, config)
    if len(chat.speakers) == 1:
        command = "train" if isinstance(config, Config) else "sft"
        terminal.stage(f"this run has no adapter yet, so the base answers alone: detox-ray {command} {run.config_file}")
    terminal.stage("answers may be offensive; an empty line or Ctrl-D ends it")
    console = terminal.console
    while (text := _line(console)) is not None:
        with Live(console=console, refresh_per_second=REDRAWS_PER_S) as live:
            try:
                for answers in chat.say(text, seed):
                    live.update(_side_by_side(chat.speakers, answers))
            except ConfigError as error:
                live.update(escape(str(error)))
        seed += 1


def _line(console: Console) -> str | None:
    """What was typed; None when that is nothing."""
    try:
        return console.input("[bold]> [/bold]").strip() or None
    except EOFError:
        return None


def _side_by_side(speakers: list[Speaker], answers: list[str]) -> Table:
    table = Table(expand=True)
    for speaker in speakers:
        table.add_column(speaker.name, ratio=1, overflow="fold")
    table.add_row(*map(escape, answers))
    return table
