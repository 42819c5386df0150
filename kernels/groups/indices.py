"""The rows of a table of relative positions for all pairs of queries and keys of some groups.

Only the backend "torch" needs them. They depend on the codes and on the groups, which are made once
for a mask: layers and heads share one tensor, which is kept as long as the codes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

# Kept for the codes of one mask: windows and shifted windows, of local and of global tokens.
MOST = 4


class _Kept(NamedTuple):
    made_of: list[Any]
    versions: list[int]
    rows: Tensor


_kept = WeakTensorKeyDictionary()  # from the codes of the queries to a list of _Kept


def kept_index(codes: Tensor, made_of: list[Any], make: Callable[[], Tensor]) -> Tensor:
    """What `make` returns, or returned for the same arguments before.

    Args:
        codes: of the queries: the index is kept as long as they are.
        made_of: the other tensors and numbers that the index depends on.
    """
    # A tensor that a graph or a mode made must not outlive it.
    capturing = codes.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or capturing:
        return make()
    versions = [x._version for x in (codes, *made_of) if _counts_changes(x)]
    of_codes = _kept.setdefault(codes, [])
    for kept in of_codes:
        if kept.versions == versions and all(map(_same, kept.made_of, made_of)):
            return kept.rows
    with torch.inference_mode(False):  # training cannot use tensors of inference mode
        index = make()
    # Reading a number would make the host wait for another device.
    if index.shape[0] > 1 and index.device.type == "cpu" and bool((index == index[:1]).all()):
        index = index[:1].clone()  # all groups have the same positions
    refs = [TensorWeakRef(x) if isinstance(x, Tensor) else x for x in made_of]
    _kept[codes] = [_Kept(refs, versions, index), *of_codes[: MOST - 1]]
    return index


def _counts_changes(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_inference()


def _same(kept: Any, x: Any) -> bool:
    if isinstance(kept, TensorWeakRef):
        return kept() is x
    return not isinstance(x, Tensor) and bool(kept == x)
