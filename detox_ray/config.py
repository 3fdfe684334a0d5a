"""The one typed configuration tree of a run."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from detox_ray.classifier_config import ClassifierConfig, classifier_identity, make_classifier_absolute
from detox_ray.config_section import FOLDER_NAME, CustomResources, Gpus, Section, absolute_path
from detox_ray.learner_config import TrainConfig, refuse_sharded_int8
from detox_ray.ppo_config import PPOConfig
from detox_ray.tracking_config import TrackingConfig

# Published files of dialogues and pairs, and any other file with a column of prompts and one of responses.
DialogueFormat = Literal["dialoconan", "multitarget_conan", "dialogsum", "paradetox", "pairs"]
PLACE_OF_PROMPT = "{prompt}"


def _check_template(value: str) -> str:
    if value not in {"auto", "chat", "none"} and PLACE_OF_PROMPT not in value:
        raise ValueError(
            f"template {value!r} has no {PLACE_OF_PROMPT}: say where the prompt goes, as in "
            f'"Human: {PLACE_OF_PROMPT}\\nAssistant: ", or use auto, chat or none'
        )
    if "\\n" in value:
        raise ValueError(f"template {value!r} has a backslash and an n: YAML reads a line break in double quotes only")
    return value


Template = Annotated[str, AfterValidator(_check_template)]


class PromptSource(Section):
    """Where prompts come from and which of them are used."""

    source: str = Field(
        "lab:prompts", description="JSONL, CSV, Parquet or text file, a `datasets` hub id, or lab:prompts"
    )
    split: str = Field("train", description="split, when the source is a hub id")
    revision: str | None = Field(None, description="commit or tag, when the source is a hub id")
    text_column: str = Field(
        "prompt", description="column with the text; RealToxicityPrompts' nested form is understood"
    )
    format: Literal["text", "dialoconan", "multitarget_conan", "dialogsum", "paradetox"] = Field(
        "text", description="text: a prompt a record; others: published dialogues and pairs, without the last answer"
    )
    attribute: str = Field(
        "toxicity", description="score the window below looks at (RealToxicityPrompts attribute or column)"
    )
    min_score: float | None = Field(None, ge=0, le=1, description="keep prompts with attribute >= this")
    max_score: float | None = Field(None, ge=0, le=1, description="keep prompts with attribute <= this")
    limit: int | None = Field(
        None, ge=1, description="use at most this many prompts (after the filters, seeded choice)"
    )

    @model_validator(mode="after")
    def _window_is_not_empty(self) -> "PromptSource":
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise ValueError(f"data.min_score={self.min_score} is above data.max_score={self.max_score}")
        return self


class DataConfig(PromptSource):
    """Which prompts a run is trained and judged on, how they are written, and which of them are held out."""

    mixed_in: list[PromptSource] = Field(
        [], description="further sources, written by the same template; each has its own format, filters and limit"
    )
    template: Template = Field(
        "none",
        description="what is written around prompts: none; chat: the tokenizer's chat template; auto: that, or a plain "
        "one where there is none; or a text with {prompt}",
    )
    turn_separator: str = Field("\n", description="between an answer and the next turn, unless the template is chat")
    min_tokens: int = Field(1, ge=1, description="prompts shorter than this many tokens are dropped")
    max_tokens: int = Field(64, ge=1, description="longest prompt, in tokens, start token not counted")
    too_long: Literal["trim", "drop"] = Field(
        "trim",
        description="cut longer prompts to their first max_tokens (of a dialogue leave out the earliest turns, but cut "
        "nothing that a template is written around), or drop them",
    )
    heldout_prompts: int = Field(
        200, ge=1, description="prompts kept out of training for the evaluation, chosen by text; each source's share"
    )

    @model_validator(mode="after")
    def _prompts_can_be_written(self) -> "DataConfig":
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"data.min_tokens={self.min_tokens} is above data.max_tokens={self.max_tokens}")
        if self.template == "none" and "dialoconan" in {source.format for source in [self, *self.mixed_in]}:
            raise ValueError("data.template=none cannot tell the turns of a dialogue apart: use auto, chat or a text")
        return self

    @property
    def sources(self) -> list["DataConfig"]:
        """One configuration a source, alike in everything that they share."""
        return [self, *(self.model_copy(update={**dict(source), "mixed_in": []}) for source in self.mixed_in)]


def make_sources_absolute(data: dict[str, Any]) -> None:
    """Make the files of a `data` section, as a tree, absolute in place."""
    for source in (data, *data["mixed_in"]):
        source["source"] = absolute_path(source["source"])


class LoraConfig(Section):
    """The trained adapter (Hu et al. 2021)."""

    rank: int = Field(16, ge=1, le=512, description="rank r of the update")
    alpha: float = Field(32.0, gt=0, description="scale: the update is multiplied by alpha / rank")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter input; 0 keeps PPO ratios exact, and RL needs no other"
    )
    targets: Literal["all-linear"] | list[str] = Field("all-linear", description="module names, or all-linear")


class PolicyConfig(Section):
    """The language model that is trained."""

    model: str = Field("lab:policy", description="folder or hub id of a causal language model or (m)T5, or lab:policy")
    revision: str | None = Field(None, description="commit or tag, when the model is a hub id")
    adapter: str | None = Field(
        None, description="folder of a PEFT LoRA adapter to start from; its shape must match lora"
    )
    reference: Literal["base", "adapter"] = Field(
        "base", description="what PPO's KL is taken to: the model without an adapter, or with the one it starts from"
    )
    pad_token: str | None = Field(None, description="token to pad with, for a tokenizer that has none")
    quantization: Literal["none", "int8", "nf4"] = Field("nf4", description="format of the frozen base in the learner")
    double_quantization: bool = Field(True, description="quantise the NF4 scales as well (Dettmers et al. 2023)")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: float32 on CPU (with AVX512-BF16, bfloat16 is faster there), bfloat16 on GPU"
    )
    lora: LoraConfig = LoraConfig()
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")

    @property
    def base_identity(self) -> str:
        """Equal for policies that are the same base, whatever is trained on it."""
        return self.model_dump_json(exclude={"adapter", "reference", "lora", "gradient_checkpointing"})

    @model_validator(mode="after")
    def _reference_is_there(self) -> "PolicyConfig":
        if self.reference == "adapter" and self.adapter is None:
            raise ValueError("policy.reference=adapter needs policy.adapter: name the adapter's folder, or use base")
        return self


class RolloutConfig(Section):
    """Who samples responses, how, and how new adapters reach them."""

    engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="auto: vllm where it serves the architecture"
    )
    sync: Literal["auto", "adapter", "merged"] = Field(
        "auto",
        description="vLLM: the adapter in a LoRA slot, or merged into the pristine base, which is faster and what auto "
        "takes; the transformers engine keeps it apart",
    )
    base: Literal["dequantized", "original"] = Field(
        "dequantized",
        description="weights of the engine's base; dequantized computes what a quantised learner computes (an int8 "
        "learner on a GPU also rounds activations, which no engine does)",
    )
    workers: int = Field(1, ge=1, description="rollout actors")
    num_cpus: float = Field(1.0, ge=0, description="Ray CPUs of one worker")
    num_gpus: Gpus = Field(0.0, description="Ray GPUs of one worker")
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="devices of a node that hold a worker's model together (vLLM): for one that fits no device",
    )
    resources: CustomResources = Field({}, description="custom Ray resources of one worker: the nodes it may be on")
    in_turns: bool = Field(
        False, description="share one GPU with the learner in turns: engines give its memory back while it learns"
    )
    samples_per_prompt: int = Field(1, ge=1, description="responses to each prompt of a batch")
    max_new_tokens: int = Field(20, ge=1, description="longest response, in tokens")
    temperature: float = Field(
        1.0, gt=0, le=10, description="sampling temperature; the learner's log-probs use the same"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="nucleus; below 1 the ratio of behaviour and learner is approximate"
    )
    top_k: int = Field(0, ge=0, description="0: off; above 0 the ratio of behaviour and learner is approximate")
    fixed_length: bool = Field(False, description="mask the end token, every response has max_new_tokens tokens")
    max_staleness: int = Field(
        0,
        ge=0,
        le=8,
        description="0: on-policy; n: batches may be n adapters old; 1 suffices when all batches take equally long",
    )
    max_logprob_gap: float = Field(
        0.05, gt=0, description="stop when engine and learner differ by more than this, mean |log p|, in nats per token"
    )
    canary_tolerance: float | None = Field(
        None,
        gt=0,
        description="largest |log p| difference after a push; default 1e-3 (float32), 0.5 (bfloat16), 1 (other base)",
    )
    max_num_seqs: int = Field(64, ge=1, description="sequences an engine advances together")
    kv_cache_mib: int = Field(256, ge=16, description="memory of the vLLM engine's key-value cache, MiB")
    timeout_s: float = Field(600.0, gt=0, description="a worker that does not answer for this long is replaced")
    start_timeout_s: float = Field(1800.0, gt=0, description="longest an engine may take to start")

    @model_validator(mode="after")
    def _every_part_has_a_device(self) -> "RolloutConfig":
        if self.tensor_parallel > 1 and self.num_gpus not in (0, self.tensor_parallel):
            raise ValueError(
                f"rollout.tensor_parallel={self.tensor_parallel} needs rollout.num_gpus={self.tensor_parallel} "
                f"(or 0, on CPUs), not {self.num_gpus:g}"
            )
        return self


class ExtraTerm(Section):
    """A shaping term of your own."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$", description="under which it is logged")
    function: str = Field(
        description="`package.module:function`: (response token ids, N arrays; finish reasons, N) -> N numbers"
    )
    weight: float = Field(1.0, description="what the numbers are multiplied by")


class ShapingConfig(Section):
    """Terms added to the ensemble's reward; each is logged apart. They close the cheap ways to be harmless."""

    min_tokens: int = Field(
        0, ge=0, description="responses below this length are penalised in proportion to what is missing"
    )
    short_penalty: float = Field(0.0, ge=0, description="penalty of an empty response when min_tokens > 0")
    repetition_penalty: float = Field(
        0.0, ge=0, description="penalty times the share of repeated bigrams in a response"
    )
    unfinished_penalty: float = Field(0.0, ge=0, description="penalty of a response cut off at max_new_tokens")
    extra: list[ExtraTerm] = Field([], description="terms of your own")


class RewardConfig(Section):
    """The ensemble of classifiers that is the reward."""

    classifiers: list[ClassifierConfig] = Field(min_length=1, description="the members, each with a name of its own")
    aggregation: Literal["mean", "min", "weighted", "mean_minus_std"] = Field(
        "mean", description="what the members' calibrated scores become; min: that of the strictest member"
    )
    std_coefficient: float = Field(0.5, ge=0, description="lambda of mean - lambda * std (mean_minus_std)")
    text: Literal["response", "prompt_and_response"] = Field("response", description="what the classifiers read")
    shaping: ShapingConfig = ShapingConfig()
    calibration_prompts: int = Field(
        256, ge=2, description="training prompts answered to fit `calibration: fit` members"
    )
    retries: int = Field(2, ge=0, description="attempts after a failed call; then the run stops")
    timeout_s: float = Field(120.0, gt=0, description="longest a scoring call may take")
    start_timeout_s: float = Field(
        900.0,
        gt=0,
        description="longest the classifiers may take to start; then they are started anew, `retries` times",
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> "RewardConfig":
        names = [c.name for c in self.classifiers]
        terms = ["short", "repetition", "unfinished", *(extra.name for extra in self.shaping.extra)]
        if repeated := {n for n in terms if terms.count(n) > 1}:
            raise ValueError(f"reward.shaping.extra: name {min(repeated)!r} is taken; give the term another")
        if repeated := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"reward.classifiers: name {min(repeated)!r} is used twice; give each classifier its own")
        return self


class EvaluationConfig(Section):
    """How the run is judged, before and after."""

    judge: ClassifierConfig = ClassifierConfig(
        name="alt-profanity-check",
        kind="linear",
        model="profanity_check:predict_prob",
        output="probability",
        calibration="none",
    )
    prompts: int = Field(200, ge=1, description="held-out prompts answered (at most data.heldout_prompts)")
    samples_per_prompt: int = Field(4, ge=1, description="responses to each of these prompts")
    bootstrap_resamples: int = Field(2000, ge=100, description="resamples of the prompts for the 95% intervals")
    every: int = Field(0, ge=0, description="steps between evaluations during training; 0: none")
    every_prompts: int = Field(64, ge=1, description="held-out prompts answered, once each, every so many steps")


class ResponseColumns(Section):
    """Which columns of a file of responses hold what; a field of a nested object is `object.field`."""

    prompt: str = Field("prompt", min_length=1, description="column with the prompt")
    response: str = Field("response", min_length=1, description="column with the response")
    prompt_score: str | None = Field(None, description="column with the prompt's published toxicity")
    scores: dict[str, str] = Field({}, description="name of a scorer -> column with its P(toxic) of the response")
    score_scale: float = Field(1.0, gt=0, description="the scores are divided by it: 100 where the file has percent")
    system: str | None = Field(None, description="column naming the system, where the file holds several")
    samples: Literal["all_equal", "fewest"] = Field(
        "all_equal",
        description="prompts with different numbers of responses: refuse them, or cut each to the fewest, counted",
    )


class RayConfig(Section):
    """Which Ray."""

    address: str | None = Field(None, description="of a running cluster; none: a local Ray for this run alone")
    num_cpus: int | None = Field(None, ge=1, description="CPUs of the local Ray; none: those of the machine")
    autoscaling: bool = Field(
        False, description="the cluster starts nodes when they are asked for: what it has not got is waited for"
    )


class RunSettings(Section):
    """What a run of any kind has."""

    name: str = Field("run", pattern=FOLDER_NAME, description="name of the run and of its folder")
    output_dir: str = Field("runs", description="folder of run folders")
    storage: str | None = Field(
        None,
        description="where a copy of the run folder is kept, such as s3://bucket/runs (any file system of pyarrow or "
        "fsspec); a run that is not in output_dir goes on from there",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of every random choice")
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def run_dir(self) -> Path:
        """`output_dir/name`, absolute."""
        return (Path(self.output_dir) / self.name).resolve()


class Config(RunSettings):
    """A detoxification run."""

    data: DataConfig = DataConfig()
    policy: PolicyConfig = PolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig
    ppo: PPOConfig = PPOConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def with_absolute_paths(self) -> "Config":
        """The same with every model, adapter and prompt path that exists here made absolute, for other processes."""
        tree = self.model_dump()
        make_sources_absolute(tree["data"])
        for key in ("model", "adapter"):
            tree["policy"][key] = absolute_path(tree["policy"][key])
        for classifier in [*tree["reward"]["classifiers"], tree["evaluation"]["judge"]]:
            make_classifier_absolute(classifier)
        return Config.model_validate(tree)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        refuse_sharded_int8(self.policy.quantization, self.train)
        judge = self.evaluation.judge
        for classifier in self.reward.classifiers:
            if classifier_identity(classifier) == classifier_identity(judge):
                raise ValueError(
                    f"evaluation.judge: {judge.model!r} is also in the reward (classifier {classifier.name!r}); "
                    "a judge that was trained against says nothing: name another judge"
                )
        if self.evaluation.prompts > self.data.heldout_prompts:
            raise ValueError(
                f"evaluation.prompts={self.evaluation.prompts} is above "
                f"data.heldout_prompts={self.data.heldout_prompts}"
            )
        if self.ppo.batch_size % self.rollout.samples_per_prompt:
            raise ValueError(
                f"ppo.batch_size={self.ppo.batch_size} is not a multiple of "
                f"rollout.samples_per_prompt={self.rollout.samples_per_prompt}"
            )
        share = self.train.workers * self.ppo.minibatches * self.ppo.gradient_accumulation
        if self.ppo.batch_size % share:
            raise ValueError(
                f"ppo.batch_size={self.ppo.batch_size} is not a multiple of train.workers * ppo.minibatches * "
                f"ppo.gradient_accumulation = {share}"
            )
        if self.ppo.estimator != "gae" and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"ppo.estimator={self.ppo.estimator} compares responses to one prompt: set rollout.samples_per_prompt=2"
            )
        if self.ppo.estimator != "gae" and self.train.workers > 1:
            group = self.ppo.batch_size // self.rollout.samples_per_prompt
            if group % self.train.workers:
                raise ValueError(
                    f"{group} prompts per step do not divide among train.workers={self.train.workers}, and "
                    f"ppo.estimator={self.ppo.estimator} needs a prompt's responses on one learner"
                )
        sharers = [self.rollout.workers * self.rollout.num_gpus, self.train.workers * self.train.num_gpus]
        if self.rollout.in_turns and (self.rollout.max_staleness or 0 in sharers or sum(sharers) > 1):
            raise ValueError(
                "rollout.in_turns=true shares one GPU: it needs rollout.max_staleness=0, and the num_gpus of rollout "
                f"workers and learners above 0 and together at most 1, not {sharers[0]:g} and {sharers[1]:g}"
            )
        return self
