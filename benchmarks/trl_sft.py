"""One run of TRL's SFTTrainer, for `sft_vs_trl.py`; runs in TRL's own environment and reads its task from a JSON file.

Reads `{model, examples, pad_id, batch, steps, learning_rate, lora_rank, threads, seed, options, output_dir, result}`,
where `examples` are lists of token ids and labels; writes to `result`: `{step_s, tokens, loss, adapter_tensors,
adapter_tensors_changed, threads, versions}`.
"""

import json
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class StepClock(TrainerCallback):
    """The moments at which steps end: two of them are one whole step apart."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start of the first step."""
        self.moments.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End of a step."""
        self.moments.append(time.perf_counter())


def main() -> None:
    """Train for the steps of the task and write how long each took."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(task["threads"])
    clock = StepClock()
    trainer = make_trainer(task, clock)
    before = adapter_tensors(trainer)
    trainer.train()
    after = adapter_tensors(trainer)
    log = [line for line in trainer.state.log_history if "num_tokens" in line and "loss" in line]
    seen = [0, *(int(line["num_tokens"]) for line in log)]
    result = {
        "step_s": [b - a for a, b in pairwise(clock.moments)],
        "tokens": [b - a for a, b in pairwise(seen)],
        "loss": [line["loss"] for line in log],
        "adapter_tensors": len(after),
        "adapter_tensors_changed": sum(not torch.equal(before[name], after[name]) for name in after),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "peft", "accelerate")},
    }
    Path(task["result"]).write_text(json.dumps(result), encoding="utf-8")


def make_trainer(task: dict[str, Any], clock: StepClock) -> SFTTrainer:
    """SFTTrainer with LoRA on examples whose tokens and labels are given."""
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    tokenizer.pad_token_id = task["pad_id"]
    arguments = SFTConfig(
        output_dir=task["output_dir"],
        max_steps=task["steps"],
        learning_rate=task["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=task["seed"],
        **task["options"],
    )
    return SFTTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32),
        train_dataset=Dataset.from_list(task["examples"]),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=task["lora_rank"],
            lora_alpha=2 * task["lora_rank"],
            lora_dropout=0.0,
            target_modules="all-linear",
        ),
        callbacks=[clock],
    )


def adapter_tensors(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    """A copy of the LoRA weights."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


if __name__ == "__main__":
    main()
