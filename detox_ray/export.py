"""`detox-ray export`: a trained policy as a folder that plain `transformers` and `peft` load, with a model card."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from peft import PeftModel
from transformers import GenerationConfig

from detox_ray.config import PolicyConfig
from detox_ray.data.lab import resolve_lab
from detox_ray.errors import ConfigError, ModelError, one_line
from detox_ray.evaluation.run_files import published_name
from detox_ray.policy.adapter import CONFIG_FILE, TENSOR_FILE, load_adapter
from detox_ray.policy.architecture import language_model_class
from detox_ray.policy.load import compute_dtype, load_model_config, load_tokenizer, write_dequantized_base
from detox_ray.run_folder import RunFolder
from detox_ray.sft_config import parse_run_config

Form = Literal["merged", "adapter"]
Base = Literal["trained", "original"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

USE = {
    "merged": 'model = {loader}.from_pretrained("{name}")',
    "adapter": 'model = PeftModel.from_pretrained({loader}.from_pretrained("{base}"{pinned}), "{name}")',
}
NOT_EVALUATED = "## Toxicity\n\nNot evaluated: nothing is known of how toxic this model is.\n"


def export(
    run_dir: str | Path,
    output: Path,
    form: Form = "merged",
    base: Base = "trained",
    dtype: Dtype = "auto",
    repository: str | None = None,
) -> Path:
    """Write the policy of a run: model or adapter in safetensors, tokenizer, generation settings, model card.

    Args:
        run_dir: folder of a run with an adapter.
        output: folder to write; it must not hold anything.
        form: merged: one model of full precision; adapter: the LoRA adapter, for the model it was trained on.
        base: what a merged model is made of. trained: the weights the learner computed with (of a quantised base, that
            base dequantised), so that the model is the one that was measured; original: the weights as published.
        dtype: of a merged model; auto: the precision the published weights have.
        repository: "owner/name" that the model card names, where it will be uploaded; none: the run's name.

    Returns:
        `output`.

    Raises:
        ConfigError: the run has no adapter yet, or `output` holds files.
        ModelError: base or adapter cannot be loaded, or is damaged.
    """
    run = RunFolder.existing(run_dir)
    if not (run.adapter / TENSOR_FILE).is_file():
        raise ConfigError(f"{run_dir} has no adapter yet: let the run come to a checkpoint first")
    load_adapter(run.adapter)
    if output.is_file():
        raise ConfigError(f"{output} is a file; name a folder with --output")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; name another folder with --output, or remove it")
    config = parse_run_config(run.read_config_tree())
    named = config.policy
    policy = resolve_lab(named)
    tokenizer = load_tokenizer(policy)
    output.mkdir(parents=True, exist_ok=True)
    if form == "adapter":
        shutil.copy(run.adapter / TENSOR_FILE, output / TENSOR_FILE)
        adapter_config = json.loads((run.adapter / CONFIG_FILE).read_text(encoding="utf-8"))
        adapter_config["base_model_name_or_path"] = published_name(named.model)  # no path of this machine
        (output / CONFIG_FILE).write_text(json.dumps(adapter_config, indent=2), encoding="utf-8")
    else:
        model = merged_model(run, policy, config.train.num_gpus > 0, base, dtype)
        model.generation_config = _generation_config(policy)
        model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    card = _card(run, repository or run.path.name, named, form, base, load_model_config(policy))
    (output / "README.md").write_text(card, encoding="utf-8")
    return output


def push_to_hub(folder: Path, repository: str, public: bool) -> str:
    """Upload an exported folder to `repository` ("owner/name"), which is made, private unless told otherwise.

    The token is the hub's usual one: HF_TOKEN, or that of `hf auth login`. Returns the address.

    Raises:
        ConfigError: there is no token, it may not write there, or the hub cannot be reached.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    except (HTTPError, HFValidationError, OSError) as error:
        reason = one_line(error)
        raise ConfigError(
            f"--push-to-hub {repository}: {reason}; set HF_TOKEN to a token that may write there (the export is in "
            f"{folder})"
        ) from None
    return str(address)


def merged_model(run: RunFolder, policy: PolicyConfig, on_gpu: bool, base: Base, dtype: Dtype) -> Any:
    """The base with the run's adapter merged in, on the CPU; merged in float32, then rounded once to `dtype`.

    `on_gpu`: the learner computed on one.

    Raises:
        ModelError: base or adapter cannot be loaded, or they do not belong together.
    """
    source, revision = policy.model, policy.revision
    if base == "trained" and policy.quantization != "none":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = compute_dtype(policy, torch.device("cuda" if on_gpu else "cpu"))
        folder = run.dequantized_base(policy, str(precision).removeprefix("torch."))
        source = str(write_dequantized_base(policy, folder, device, precision))
        revision = None
    model_config = load_model_config(policy)
    model = language_model_class(model_config).from_pretrained(
        source, revision=revision, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    try:
        merged: Any = PeftModel.from_pretrained(model, str(run.adapter)).merge_and_unload()
    except (ValueError, RuntimeError) as error:
        reason = one_line(error)
        raise ModelError(f"{run.adapter} does not fit {policy.model}: {reason}") from None
    published = model_config.dtype or torch.float32
    return merged.to(published if dtype == "auto" else getattr(torch, dtype))


def _generation_config(policy: PolicyConfig) -> GenerationConfig:
    """That of the published model; where it has none, the one its configuration implies."""
    try:
        return GenerationConfig.from_pretrained(policy.model, revision=policy.revision or "main")
    except OSError:
        return GenerationConfig.from_model_config(load_model_config(policy))


def _card(run: RunFolder, name: str, policy: PolicyConfig, form: Form, base: Base, model_config: Any) -> str:
    """README.md of the export: what hubs read, how to load it, and the run's own model card."""
    evidence = run.path / "model_card.md"
    base_name = published_name(policy.model)
    header = {
        "base_model": base_name,
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text2text-generation" if model_config.is_encoder_decoder else "text-generation",
        "tags": ["detoxification", "detox_ray"],
    }
    weights = "the base dequantised" if base == "trained" and policy.quantization != "none" else "the base as published"
    made = f"The adapter merged into {weights}." if form == "merged" else f"A LoRA adapter of {base_name}."
    pinned = "" if policy.revision is None else f', revision="{policy.revision}"'
    loader = language_model_class(model_config).__name__
    use = USE[form].format(name=name, base=base_name, pinned=pinned, loader=loader)
    section = evidence.read_text(encoding="utf-8") if evidence.exists() else NOT_EVALUATED
    return f"---\n{yaml.safe_dump(header)}---\n\n# {name}\n\n{made}\n\n```python\n{use}\n```\n\n{section}"
