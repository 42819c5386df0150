"""Distributed training: ranks of torchrun, DDP and FSDP2, gradients of all ranks."""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from vidl.evaluation.encoding import of_all_ranks


@dataclass(frozen=True)
class Ranks:
    """This process and the world size."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank; over gloo, without GPU synchronisation."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags)
        return bool(flags)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def gathered(self, value: Any) -> list[Any]:
        """Small objects of all ranks, in the order of ranks."""
        return of_all_ranks(value)

    def wait(self) -> None:
        """Barrier of all ranks."""
        self.any(False)


class NoDevice(RuntimeError):
    """The device is not available on this machine."""


@contextlib.contextmanager
def ranks(device: str = "auto") -> Iterator[Ranks]:
    """Initialise torch.distributed if torchrun started several ranks, and clean up at the end.

    Args:
        device: "cpu", "cuda", or "auto": cuda if available.

    Raises:
        ValueError: unknown device.
        NoDevice: the device is not available.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise NoDevice("need a GPU for device cuda, torch sees none; choose device cpu or auto")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"need a device among auto, cpu, cuda, got {device!r}")
    where = torch.device(device)
    if device == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(where)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Ranks(0, 1, where)
        return
    # gloo beside nccl: collectives on CPU tensors do not synchronise with the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world_size, where)
    finally:
        gc.collect()  # free objects that refer to the process group first
        dist.destroy_process_group()


def wrap(model: nn.Module, kind: str, ranks: Ranks) -> nn.Module:
    """Wrap a model so that gradients are averaged over all ranks.

    Args:
        model: a model of `vidl.models` on its device; FSDP2 changes it in place.
        kind: "ddp" or "fsdp". FSDP2 shards each block and the rest as one unit; temperatures are
            not sharded, because losses use them outside of forward.
        ranks: with a single rank the model is returned as is.
    """
    if ranks.world_size == 1:
        return model
    if kind == "ddp":
        # All ranks compute the same buffers, such as a queue.
        return DistributedDataParallel(model, broadcast_buffers=False)
    for blocks in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block)
    fully_shard(model, ignored_params=set(whole(model).values()))
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model, so that a rank has a part of each weight only."""
    return isinstance(model, FSDPModule)


def whole(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that FSDP2 does not shard."""
    named = model.named_parameters()
    return {name: p for name, p in named if name.rpartition(".")[2] == "temperature"}


def freeze_unused(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Freeze parameters without a gradient, such as heads whose loss has weight 0.

    DDP would wait for their gradients, and the optimizer would have no state for them. Buffers,
    such as a queue, keep their values.

    Args:
        model: in training mode.
        inputs: arguments of its forward for any batch.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(**inputs)["loss"].backward()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad()


@contextlib.contextmanager
def synced(model: nn.Module, last: bool) -> Iterator[None]:
    """Synchronise gradients only in the last backward pass of a step."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield


def clip(model: nn.Module, ranks: Ranks, most: float) -> Tensor:
    """Clip gradients to a total norm of `most` unless it is 0; returns the norm before clipping.

    Also averages the gradients of the parameters that FSDP2 does not shard.
    """
    if is_sharded(model):
        for parameter in whole(model).values():
            if parameter.grad is not None:
                ranks.mean(parameter.grad)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    shards = [g for g in gradients if hasattr(g, "full_tensor")]
    norms = [torch.nn.utils.get_total_norm(g) for g in (shards, _without(gradients, shards)) if g]
    full = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
    norm = torch.linalg.vector_norm(torch.stack(full))
    if most:
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            local.mul_(scale)
    return norm


def _without(tensors: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    left_out = {id(other) for other in others}
    return [tensor for tensor in tensors if id(tensor) not in left_out]


def recompute(model: nn.Module) -> None:
    """Checkpoint the activations of transformer blocks; names in a state_dict do not change.

    The ops are deterministic, so a pruning block selects the same tokens when it is recomputed.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = {block for blocks in lists for block in blocks}
    apply_activation_checkpointing(model, check_fn=blocks.__contains__)
