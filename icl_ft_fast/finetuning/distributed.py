"""One training run in many processes started by torchrun: DDP, or FSDP2 (fully_shard).

Every process reads all examples and takes its own part of each step: gloo between CPUs, NCCL between GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from icl_ft_fast.finetuning.settings import FinetuneError
from icl_ft_fast.runtime.executors import launched


def device() -> str:
    """The device of this process under torchrun: a GPU of its own if there is one."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() and launched() else "cpu"


def num_launched() -> int:
    """Processes that torchrun started, 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Within the block torchrun's processes form one run; without torchrun this process is the run."""
    if not launched():
        yield
        return
    dist.init_process_group("nccl" if device() != "cpu" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def totals(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over the processes."""
    if place()[1] == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def wait() -> None:
    """A barrier of all processes."""
    if dist.is_initialized():
        dist.barrier()


def wrap(objective: torch.nn.Module, network: Any, *, fsdp: bool) -> torch.nn.Module:
    """The objective with gradients averaged over the processes; weights are copied (DDP) or sharded (FSDP2)."""
    if place()[1] == 1:
        if fsdp:
            raise FinetuneError("fsdp: requires several processes: start the command with torchrun")
        return objective
    if not fsdp:
        return torch.nn.parallel.DistributedDataParallel(objective)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    mesh = init_device_mesh("cpu" if device() == "cpu" else "cuda", (place()[1],))
    for module in network.modules():
        if isinstance(module, GradientCheckpointingLayer):  # what transformers derives every decoder layer from
            fully_shard(module, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def _is_shard(tensor: torch.Tensor) -> bool:
    if place()[1] == 1:
        return False
    from torch.distributed.tensor import DTensor  # half a second, which commands of one process do without

    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or the one that this process has a shard of; a collective call."""
    full: torch.Tensor = tensor.full_tensor() if _is_shard(tensor) else tensor  # type: ignore[attr-defined]
    return full.detach()


def whole_weights(network: Any, part: str = "") -> dict[str, torch.Tensor]:
    """The weights whose names contain `part`, unsharded, tied ones as one tensor; a collective call."""
    state = {name: tensor for name, tensor in network.state_dict(keep_vars=True).items() if part in name}
    gathered = {i: whole(tensor) for i, tensor in {id(tensor): tensor for tensor in state.values()}.items()}
    return {name: gathered[id(tensor)] for name, tensor in state.items()}


def shard_like(full: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`full`, or the shard of it that belongs beside `tensor`."""
    if not _is_shard(tensor):
        return full.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(tensor.device), tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
