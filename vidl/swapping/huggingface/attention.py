"""`attn_implementation="vidl"` of transformers: its attention function, and its masks.

Importing this file registers both under the one name, so that `from_pretrained(...,
attn_implementation="vidl")` and `model.set_attn_implementation("vidl")` work; `vidl.swap` does it
for the families in `KNOWN`, and reaches configurations that those calls do not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from vidl.kernels import library
from vidl.kernels.groups import Groups
from vidl.kernels.space_time_attention import handover, space_time_attention
from vidl.swapping.attention import equal_groups, speed
from vidl.swapping.kept_groups import tracing
from vidl.swapping.registry import Family, full_name, remember, state_of
from vidl.swapping.report import Change

NAME = "vidl"

# The attentions that call the interface and are tested with it, by the file that defines them.
KNOWN = {
    "bert": ("BertSelfAttention", "BertCrossAttention"),
    "bridgetower": ("BridgeTowerSelfAttention", "BridgeTowerCrossAttention"),
    "clip": ("CLIPAttention",),
    "siglip": ("SiglipAttention",),
    "videomae": ("VideoMAESelfAttention",),
    "vit": ("ViTAttention",),
    "vivit": ("VivitAttention",),
    "x_clip": ("XCLIPAttention", "XCLIPCrossAttention"),
}
CAUSAL = ("clip_text_model", "xclip_text_model")
# How these call the share of attention weights that they drop out.
DROPOUT = ("dropout", "attention_dropout", "dropout_prob", "attn_drop")
# What some models hand to their attention, and no kernel of ours computes.
UNSUPPORTED = ("position_bias", "softcap", "s_aux", "cache", "block_table")


@dataclass(frozen=True, eq=False)
class Visible:
    """What takes the place of a mask: the keys that every query of a sample sees.

    Attributes:
        keys: [B, K] bool, False where a key is padding; None: every key is seen.
        groups: the same for the attention of all layers.
    """

    keys: Tensor | None
    groups: Groups

    def dense(self) -> Tensor | None:
        """As a mask of `scaled_dot_product_attention`, [B, 1, 1, K]."""
        return None if self.keys is None else self.keys[:, None, None, :]


def visible(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Visible | Tensor | None:
    """The mask function of `attn_implementation="vidl"`.

    Padding of keys becomes groups, without a host synchronisation: [B, K] numbers once, where
    PyTorch's attention reads a mask [B, 1, Q, K] in every layer. Causal and all other masks are
    those of "sdpa".

    Returns:
        `Visible` for a bidirectional mask, even one that hides nothing: an attention without a mask
        may be causal, and so knows that it is not.
    """
    if mask_function is not bidirectional_mask_function:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            **options,
        )
    keys = attention_mask
    device = options["device"] if keys is None else keys.device
    if keys is not None:
        missing = kv_offset + kv_length - keys.shape[1]  # of a cache that is longer than the mask
        keys = torch.nn.functional.pad(keys, (0, max(missing, 0)))
        keys = keys[:, kv_offset : kv_offset + kv_length]
        if device.type == "cpu" and not tracing() and keys.all():
            keys = None
    return Visible(keys, _groups(keys, batch_size, q_length, kv_length, device))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Groups | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of `attn_implementation="vidl"`.

    `space_time_attention` where every query of a sample sees the same keys. Attention that is
    causal, that drops weights out in training, or has any other mask [B, 1, Q, K] or [B, H, Q, K],
    goes to PyTorch's, as "sdpa" has it: groups gain nothing there. So do heads for which this
    machine has no kernel.

    Args:
        module: that calls it.
        query: [B, H, S, D].
        key, value: [B, H, K, D].
        attention_mask: what `visible` made; or, for rows packed as one sample, their `Groups`.
        scaling, dropout, is_causal: as transformers has them.

    Returns:
        [B, S, H, D], and None for the weights, which are never made.

    Raises:
        ValueError: the module asks for what cannot be computed, or for the weights.
        TypeError: the mask is of an unknown kind.
    """
    refuse(module, options)
    if not isinstance(attention_mask, Visible | Groups | Tensor | None):
        raise _cannot(module, f"a mask of type {type(attention_mask).__name__}", TypeError)
    causal = attention_mask is None and query.shape[2] > 1 and _causal(module, is_causal)
    dense = isinstance(attention_mask, Tensor) or causal or dropout > 0
    groups = None
    if not dense and query.shape[1::2] == key.shape[1::2] and key.shape == value.shape:
        groups = _groups_for(attention_mask, query, key)
    if isinstance(attention_mask, Groups):
        if groups is None:
            raise _cannot(module, "dropout of weights, or fewer heads of keys, for packed rows")
    elif groups is None or not _faster(query, groups, module):
        mask = attention_mask.dense() if isinstance(attention_mask, Visible) else attention_mask
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = space_time_attention(q, k, v, groups, scale=scaling, backend=_backend(module))
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


def collected() -> Sequence[str]:
    """What a caller wants of the layers below besides their result: "attentions", ..."""
    active = output_capturing._active_collector
    # torch.compile cannot trace a context variable; transformers then has a global one.
    found = active.global_var if torch.compiler.is_compiling() else active.get()
    return tuple(found or ())


def _groups(keys: Tensor | None, B: int, S: int, K: int, device: torch.device) -> Groups:
    """Groups of S queries a sample and its visible keys.

    A sample has two groups, of static shape: all its queries with the keys that they see; and no
    query with the others, which are in that order behind them.
    """
    if keys is None:
        return equal_groups(B, S, K, device)
    order = torch.argsort((~keys).byte(), dim=1, stable=True)
    step = torch.arange(B + 1, dtype=torch.int32, device=device)
    seen = step[:-1] * K + keys.sum(1, dtype=torch.int32)
    key_offsets = torch.stack([step[:-1] * K, seen], 1).flatten()
    query_offsets = torch.stack([step[:-1], step[1:]], 1).flatten() * S
    return Groups(
        torch.cat([query_offsets, step[-1:] * S]),
        torch.cat([key_offsets, step[-1:] * K]),
        None,
        (order + step[:-1, None] * K).flatten().int(),
        max_queries=S,
        max_keys=K,
        num_queries=B * S,
        num_keys=B * K,
    )


def _causal(module: Any, is_causal: bool | None) -> bool:
    """Whether an attention that has no mask is causal, as transformers decides it."""
    if is_causal is not None:
        return is_causal
    if type(module).__name__ == "BridgeTowerSelfAttention":
        # Its cross-modal layers say that they are causal, and are called without a mask. But as the
        # model is defined, by "eager", they attend both ways.
        return bool(module.config.is_decoder)
    return getattr(module, "is_causal", True)


def _groups_for(mask: Visible | Groups | Tensor | None, query: Tensor, key: Tensor) -> Groups:
    if isinstance(mask, Groups):
        return mask
    B, S, K, keys = query.shape[0], query.shape[2], key.shape[2], None
    if isinstance(mask, Visible):
        if mask.groups.num_queries == B * S and mask.groups.num_keys == B * K:
            return mask.groups
        keys = mask.keys  # BridgeTower announces one query a sample, whatever comes
    return _groups(keys, B, S, K, query.device)


def _faster(query: Tensor, groups: Groups, module: nn.Module) -> bool:
    """Not if only the definition in plain PyTorch is left, which pads and stores the weights."""
    facts: dict[str, Any] = {"device": query.device.type, "head_size": query.shape[3]}
    dtype = library.autocast_dtype(query)
    chosen = library.choose("auto", "space_time_attention", dtype=dtype, **facts)
    named = _backend(module) != "auto"
    return named or chosen != "reference" or handover.find(query, groups, chosen) is not None


def _backend(module: nn.Module) -> str:
    state = state_of(module)
    return "auto" if state is None else state.backend


def refuse(module: nn.Module, options: dict[str, Any]) -> None:
    """Raise if a module asks for what cannot be computed, or for the weights of attention."""
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise _cannot(module, name)
    wanted = [name for name in collected() if "attentions" in name]
    if options.get("output_attentions") or wanted:
        raise _cannot(module, "the weights that output_attentions=True asks for", remedy="eager")


def _cannot(
    module: nn.Module, what: str, error: type[Exception] = ValueError, remedy: str = "sdpa"
) -> Exception:
    return error(
        f"attn_implementation='{NAME}' cannot give {type(module).__name__} {what}: call "
        f"vidl.unswap(model), or model.set_attn_implementation('{remedy}')"
    )


# ---- vidl.swap ----------------------------------------------------------------------------------


def _swap(model: nn.Module, backend: str) -> Sequence[Change]:
    """Choose the implementation in every configuration that the known attentions read.

    Their models' configurations, too, which decide on the masks. Not by `set_attn_implementation`:
    it does not reach copies, as that of VideoMAE's decoder.
    """
    done: set[int] = set()
    changes = []
    for name, module in model.named_modules():
        state = state_of(module)
        kind = type(module) if state is None else state.original
        file = defining_file(kind)
        config = getattr(module, "config", None)
        if file not in KNOWN or not isinstance(config, PreTrainedConfig):
            continue
        if id(config) not in done:
            done.add(id(config))
            memory = remember(module, backend, undo=_restore).memory
            memory["attn_implementation"] = config._attn_implementation_internal
            config._attn_implementation_internal = NAME
        if kind.__name__ in KNOWN[file]:
            remember(module, backend)
            became = f"{full_name(kind)} by attn_implementation={NAME!r}"
            changes.append(Change(name, full_name(kind), became, _note(module, backend)))
    return changes


def defining_file(kind: type) -> str:
    """The folder of transformers' models that defines a class; "" if none does."""
    prefix, name = "transformers.models.", kind.__module__
    return name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else ""


def _restore(module: nn.Module) -> None:
    state, config = state_of(module), module.config
    assert state is not None and isinstance(config, PreTrainedConfig)
    config._attn_implementation_internal = state.memory["attn_implementation"]


def _note(module: Any, backend: str) -> str:
    """What the report says of an attention that is not, or not always, computed by our kernels."""
    weight = next(module.parameters())
    if hasattr(module, "attention_head_size"):
        head_size = module.attention_head_size
    else:
        head_size = module.head_dim
    config = module.config
    decoder = getattr(config, "is_decoder", False) and "Cross" not in type(module).__name__
    if decoder or config.model_type in CAUSAL:
        return "PyTorch's own attention, as it is causal"
    if note := speed(weight.device, weight.dtype, head_size, backend):
        return note
    found = (getattr(module, name, None) for name in DROPOUT)
    drop = next(value for value in found if value is not None)
    drop = drop.p if isinstance(drop, nn.Dropout) else drop
    return f"PyTorch's own attention in training, as it drops out weights ({drop})" if drop else ""


FAMILY = Family(whole=_swap)
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, visible)
