"""Sums, maxima and broadcasts over learners; with a single learner (no process group) everything is the identity."""

import pickle
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detox_ray.errors import last_line

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of learners)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first_learner() -> bool:
    """Whether this learner is the one that writes files and talks to the stream."""
    return world()[0] == 0


def learner_count() -> int:
    """1 without a process group."""
    return world()[1]


def seed_step(seed: int, step: int) -> None:
    """Seed torch for a step: differently on each learner, and the same when the step is run again."""
    torch.manual_seed(seed * 1_000_003 + step * 1_009 + world()[0])


def sum_over_learners(*values: Tensor | float) -> list[Tensor]:
    """Each scalar summed over the learners, float64."""
    tensor = torch.stack([torch.as_tensor(v).detach().double().cpu() for v in values])
    if learner_count() > 1:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
    return list(tensor.cpu())


def max_over_learners(value: Tensor) -> Tensor:
    """The largest of a scalar over the learners."""
    if learner_count() > 1:
        value = value.detach().clone()
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its sum over the learners: adapter and value head only, so one small message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if learner_count() == 1:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def on_first_learner(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and give its result to every learner.

    An error of it is raised on all of them, as a RuntimeError with its last line if it cannot be pickled.
    """
    rank, size = world()
    if size == 1:
        return make()
    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = _picklable(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _picklable(error: Exception) -> Exception:
    """The error, or a RuntimeError caused by it: the class that Ray makes of an engine's exception cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        sent = RuntimeError(f"{type(error).__name__}: {last_line(error)}")
        sent.__cause__ = error
        return sent
    return error
