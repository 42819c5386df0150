"""Long groups go to the attention of PyTorch or of an installed package, where that is fastest.

Groups of about 700 keys and more fill the tiles of flash attention. Shorter groups are limited by
memory traffic and belong to our kernels. `find` decides.
"""

import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.kernels.groups import Groups

Attention = Callable[[Tensor, Tensor, Tensor, Groups, float], Tensor]

# The fewest keys of a group for which another implementation replaces our kernels. On the CPU none
# is faster at any length (bench/results/amd-epyc-2-cores). For CUDA the number is computed, not
# measured: from there on flash attention wastes little of its 128 x 128 tiles, and is limited by
# arithmetic instead of memory.
LONG = {"cuda": 700}


def find(q: Tensor, groups: Groups, backend: str) -> Attention | None:
    """The attention that is faster than `backend`, the choice of "auto"; None if there is none.

    The definition in plain PyTorch pads every group and materializes the attention weights: every
    other implementation is faster, at any length. None of them returns scores, or sums the
    gradients of a key in several groups in a fixed order.
    """
    long = groups.max_keys >= LONG.get(q.device.type, groups.max_keys + 1)
    if groups.entries is not None or groups.max_keys == 0 or not (long or backend == "reference"):
        return None
    if groups.uniform and groups.query_rows is None and groups.key_rows is None:
        return sdpa
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return flash_attn if _installed("flash_attn") else varlen_attn
    return None


def sdpa(q: Tensor, k: Tensor, v: Tensor, groups: Groups, scale: float) -> Tensor:
    """PyTorch's choice of cuDNN, flash or memory-efficient attention; for equal groups only."""
    G = groups.num_groups
    q = q.unflatten(0, (G, groups.max_queries)).transpose(1, 2)
    k, v = (x.unflatten(0, (G, groups.max_keys)).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)


def varlen_attn(q: Tensor, k: Tensor, v: Tensor, groups: Groups, scale: float) -> Tensor:
    """PyTorch's flash attention for packed sequences, on CUDA."""
    from torch.nn.attention.varlen import varlen_attn as call

    return _packed(functools.partial(call, scale=scale), q, k, v, groups)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, groups: Groups, scale: float) -> Tensor:
    """Flash attention of the package flash-attn, on CUDA."""
    call = functools.partial(
        importlib.import_module("flash_attn").flash_attn_varlen_func,
        softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _packed(call, q, k, v, groups)


def _packed(call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
    """Gather the rows of each group, attend, and put the results back in their rows."""
    if groups.query_rows is not None:
        q = q.index_select(0, groups.query_rows)
    if groups.key_rows is not None:
        k, v = (x.index_select(0, groups.key_rows) for x in (k, v))
    sizes = (groups.query_offsets, groups.key_offsets, groups.max_queries, groups.max_keys)
    out: Tensor = call(q, k, v, *sizes)
    if groups.query_rows is None:
        return out
    return out.index_select(0, torch.argsort(groups.query_rows))


@torch.compiler.assume_constant_result  # so that torch.compile need not trace it
@functools.cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None
