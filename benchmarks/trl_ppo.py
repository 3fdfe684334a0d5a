"""One run of TRL's PPOTrainer, for `ppo_vs_trl.py`; runs in TRL's own environment and reads its task from a JSON file.

Reads `{model, reward_model, prompts, pad_id, batch, epochs, minibatches, new_tokens, steps, learning_rate, lora_rank,
kl_coefficient, threads, bf16, compile, seed, output_dir, result}`, writes to `result`: `{step_s, adapter_tensors,
adapter_tensors_changed, threads, log, versions}`.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


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
    result = {
        "step_s": [b - a for a, b in zip(clock.moments, clock.moments[1:], strict=False)],
        "adapter_tensors": len(after),
        "adapter_tensors_changed": sum(not torch.equal(before[name], after[name]) for name in after),
        "threads": torch.get_num_threads(),
        "log": trainer.state.log_history,
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "peft", "accelerate")},
    }
    Path(task["result"]).write_text(json.dumps(result), encoding="utf-8")


def make_trainer(task: dict[str, Any], clock: StepClock) -> PPOTrainer:
    """PPOTrainer with LoRA on the policy, a value and a reward model of the policy's size, the end token off."""
    tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    tokenizer.pad_token_id = task["pad_id"]
    # A batch of 64 rows and no accumulation: every minibatch of 16 rows is one forward pass and one optimiser step.
    arguments = PPOConfig(
        output_dir=task["output_dir"],
        per_device_train_batch_size=task["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=task["minibatches"],
        num_ppo_epochs=task["epochs"],
        total_episodes=task["steps"] * task["batch"],
        local_rollout_forward_batch_size=task["batch"],
        response_length=task["new_tokens"],
        stop_token=None,
        temperature=1.0,
        learning_rate=task["learning_rate"],
        lr_scheduler_type="constant",
        kl_coef=task["kl_coefficient"],
        gradient_checkpointing=False,
        bf16=task["bf16"],
        torch_compile=task["compile"],
        use_cpu=True,
        dataloader_pin_memory=False,
        num_sample_generations=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=task["seed"],
    )
    prompts = Dataset.from_dict({"input_ids": task["prompts"]})
    return PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32),
        ref_model=None,
        reward_model=AutoModelForSequenceClassification.from_pretrained(task["reward_model"], dtype=torch.float32),
        value_model=AutoModelForSequenceClassification.from_pretrained(task["reward_model"], dtype=torch.float32),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(task["batch"])),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=task["lora_rank"],
            lora_alpha=2 * task["lora_rank"],
            lora_dropout=0.0,
            target_modules="all-linear",
        ),
        callbacks=[clock],
    )


def adapter_tensors(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """A copy of the policy's LoRA weights."""
    policy = trainer.accelerator.unwrap_model(trainer.model).policy
    return {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad and "lora_" in name}


if __name__ == "__main__":
    main()
