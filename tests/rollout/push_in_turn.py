"""Start vLLM engines one after the other in this process, and push an adapter to each.

python push_in_turn.py FILE: reads a pickled list of (engine specification, adapter, prefixes), and writes in its place
what the engines answer to the prefixes before and after the push.
"""

import gc
import pickle
import sys
from pathlib import Path

from detox_ray.policy.adapter import Adapter
from detox_ray.rollout.engine import EngineSpec
from detox_ray.rollout.vllm_engine import VllmEngine

Answers = list[dict[int, float]]


def main() -> None:
    """Do all that the file asks for."""
    file = Path(sys.argv[1])
    answers = []
    for asked in pickle.loads(file.read_bytes()):
        answers.append(push(*asked))
        gc.collect()  # an engine takes the process's groups with it, so it must be gone before the next one comes
    file.write_bytes(pickle.dumps(answers))


def push(spec: EngineSpec, adapter: Adapter, prefixes: list[list[int]]) -> tuple[Answers, Answers]:
    """What the engine answers before and after the push."""
    engine = VllmEngine(spec)
    before = engine.next_token_logprobs(prefixes)
    engine.apply(adapter)
    return before, engine.next_token_logprobs(prefixes)


if __name__ == "__main__":
    main()
