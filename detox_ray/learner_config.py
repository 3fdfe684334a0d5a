"""What the learners of a run are, and for how long they train."""

from pydantic import Field, model_validator

from detox_ray.config_section import CustomResources, Gpus, Section


class LearnerConfig(Section):
    """What the learner runs on."""

    workers: int = Field(1, ge=1, description="learner processes (data parallel)")
    num_cpus: float = Field(1.0, ge=0, description="Ray CPUs of one learner")
    num_gpus: Gpus = Field(0.0, description="Ray GPUs of one learner")
    resources: CustomResources = Field({}, description="custom Ray resources of one learner: the nodes it may be on")
    threads: int = Field(1, ge=1, description="CPU threads of one learner's tensor operations")
    max_failures: int = Field(
        3, ge=0, description="crashes survived: of learners, and of Ray Train's controller, which counts theirs anew"
    )
    shard_base: bool = Field(
        False, description="each learner keeps its part of the frozen base (FSDP): for one that does not fit a device"
    )
    compile: bool = Field(
        False, description="torch.compile: faster steps after minutes at the start; on CPU it gains most with bfloat16"
    )
    timeout_s: float = Field(
        600.0, gt=0, description="a learner that does not answer for this long, or Ray Train's controller, is replaced"
    )

    @model_validator(mode="after")
    def _takes_something(self) -> "LearnerConfig":
        if not (self.num_cpus or self.num_gpus or any(self.resources.values())):
            raise ValueError("train.num_cpus=0: Ray Train places no learner that takes nothing; set 0.1 or more")
        return self

    @model_validator(mode="after")
    def _has_others_to_share_with(self) -> "LearnerConfig":
        if self.shard_base and self.workers == 1:
            raise ValueError("train.shard_base=true spreads the base over learners; set train.workers=2 or more")
        return self


class TrainConfig(LearnerConfig):
    """How long the learner runs, on what, and how often it saves."""

    total_steps: int = Field(40, ge=1, description="PPO steps, each on one batch of responses")
    checkpoint_every: int = Field(10, ge=1, description="steps between checkpoints; the last step always has one")


def refuse_sharded_int8(quantization: str, train: LearnerConfig) -> None:
    """Raises:
    ValueError: int8 weights, which bitsandbytes lays out in its own way, are to be spread over learners.
    """
    if train.shard_base and quantization == "int8":
        raise ValueError("train.shard_base=true needs policy.quantization=nf4 or none, not int8")
