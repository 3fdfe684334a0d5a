"""A section for a model card, ready to paste: what was done to the model, how toxic it is, how that was measured."""

from typing import Any

from detox_ray.evaluation.content import ReportContent
from detox_ray.evaluation.evaluation_file import compared_systems
from detox_ray.evaluation.markdown import markdown_table, plain
from detox_ray.evaluation.run_files import prompt_sources, published_name, reward_classifiers, section

_LIMITS = (
    "Toxicity is what the judge says it is; a classifier has biases of its own, against mentions of groups among them.",
    "The numbers hold for these prompts, this length and this way of sampling; other uses want their own measurement.",
    "Less toxic is not safe: the model can still produce toxic, false or harmful text.",
)


def model_card(content: ReportContent) -> str:
    """The section as Markdown; the licence is left for whoever publishes the model."""
    evaluation, config = content.evaluation, content.config
    cautions = [c for headline in content.headlines for c in headline.cautions] + content.warnings
    parts = ["## Toxicity"]
    parts += [plain(headline.verdict) for headline in content.headlines]
    if base := section(config, "policy").get("model"):
        parts.append(f"**Base model:** {plain(published_name(base))}")
    if trained := _training(config, evaluation):
        parts.append(f"**Training:** {plain(trained)}")
    parts += ["### Evaluation", markdown_table(content.metrics), "### Protocol", plain(_protocol(content))]
    parts += [plain(sentence) for sentence in content.small_print]
    limits = [*_LIMITS, *cautions]
    if not compared_systems(evaluation):
        limits.append("Nothing was compared with it: the numbers say how toxic, not whether that is less than before.")
    parts += ["### Limits", "\n".join(f"- {plain(limit)}" for limit in limits)]
    if versions := ", ".join(f"{package} {number}" for package, number in content.versions.items()):
        parts += ["### Versions", plain(versions)]
    parts += ["### Licence", "<!-- Fill in; the licences of the base model and of the training data bind it. -->"]
    return "\n\n".join(parts) + "\n"


def _training(config: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """How the adapter was trained, in a sentence or two; nothing without a configuration of a training."""
    members = reward_classifiers(config)
    if not members:
        return _fine_tuning(config, evaluation)
    policy, ppo, reward = (section(config, name) for name in ("policy", "ppo", "reward"))
    known = {
        "LoRA rank": section(policy, "lora").get("rank"),
        "quantisation": policy.get("quantization"),
        "estimator": ppo.get("estimator"),
        "steps": evaluation.get("steps", section(config, "train").get("total_steps")),
        "responses per step": ppo.get("batch_size"),
        "learning rate": ppo.get("learning_rate"),
        "KL coefficient": section(ppo, "kl").get("coefficient"),
        "longest response in tokens": section(config, "rollout").get("max_new_tokens"),
        "prompts": " and ".join(prompt_sources(config)) or None,
    }
    details = ", ".join(f"{name} {found}" for name, found in known.items() if found is not None)
    aggregated = f" ({reward['aggregation']})" if len(members) > 1 and reward.get("aggregation") else ""
    reward_from = f"reward from {', '.join(members)}{aggregated}"
    return f"PPO from automatic feedback with detox_ray; {reward_from}. {details[:1].upper()}{details[1:]}."


def _protocol(content: ReportContent) -> str:
    judge, members = content.evaluation.get("judge"), reward_classifiers(content.config)
    kept_apart = f" {judge} was not in the reward." if members and judge not in members else ""
    rollout = content.evaluation.get("sampling") or section(content.config, "rollout")
    sampling = [
        f"{label} {rollout[key]}"
        for key, label in (("max_new_tokens", "at most tokens"), ("temperature", "temperature"), ("top_p", "top-p"))
        if rollout.get(key) is not None
    ]
    return f"{content.setting}{kept_apart}" + (f" Sampling: {', '.join(sampling)}." if sampling else "")


def _fine_tuning(config: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """How an adapter was fine-tuned; nothing for what is no training."""
    policy, train = section(config, "policy"), section(config, "train")
    if "epochs" not in train:
        return ""
    known = {
        "LoRA rank": section(policy, "lora").get("rank"),
        "quantisation": policy.get("quantization"),
        "steps": evaluation.get("steps"),
        "examples per step": train.get("batch_size"),
        "learning rate": train.get("learning_rate"),
        "examples": published_name(section(config, "data").get("source") or "") or None,
    }
    details = ", ".join(f"{name} {found}" for name, found in known.items() if found is not None)
    return f"Supervised fine-tuning on responses with detox_ray. {details[:1].upper()}{details[1:]}."
