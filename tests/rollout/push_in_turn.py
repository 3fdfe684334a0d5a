"""Start vLLM engines one after the other in this process, and push an adapter to each.

python push_in_turn.py FILE: reads a pickled list of (engine specification, adapter, prefixes), and writes in its place
what the engines answer to the prefixes before and after the push.
"""

import gc
import pickle
import sys
from pathlib import Path

from transformers import AutoConfig
from vllm import ModelRegistry

from detox_ray.policy.adapter import Adapter
from detox_ray.rollout.engine import EngineSpec
from detox_ray.rollout.vllm_engine import VllmEngine

Answers = list[dict[int, float]]


def main() -> None:
    """Do all that the file asks for."""
    file = Path(sys.argv[1])
    answers = []
    gc.freeze()  # vLLM collects garbage eight times an engine; what has been imported is none
    for asked in pickle.loads(file.read_bytes()):
        answers.append(push(*asked))
        gc.collect()  # an engine takes the process's groups with it, so it must be gone before the next one comes
    file.write_bytes(pickle.dumps(answers))


def push(spec: EngineSpec, adapter: Adapter, prefixes: list[list[int]]) -> tuple[Answers, Answers]:
    """What the engine answers before and after the push."""
    # vLLM starts a process for each class it has not seen on this machine, unless it is given the class itself.
    (architecture,) = AutoConfig.from_pretrained(spec.model).architectures
    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
    engine = VllmEngine(spec)
    before = engine.next_token_logprobs(prefixes)
    engine.apply(adapter)
    return before, engine.next_token_logprobs(prefixes)


if __name__ == "__main__":
    main()
