"""`attn_implementation="vidl"` of transformers: its attention function and its mask function.

Importing this file registers both, so that `from_pretrained(..., attn_implementation="vidl")` and
`model.set_attn_implementation("vidl")` work. `vidl.swap` sets it for the models in `KNOWN`, also in
configurations that those calls do not reach.
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

from vidl.kernels import choices, library
from vidl.kernels.groups import Groups
from vidl.kernels.space_time_attention import pytorch, space_time_attention
from vidl.kernels.space_time_attention.op import choose
from vidl.nn.captions import Captions
from vidl.swapping.attention import equal_groups, speed, tracing
from vidl.swapping.registry import Family, full_name, remember, state_of
from vidl.swapping.report import Change

NAME = "vidl"

# Attentions that use the interface and are tested with it, by the folder that defines them.
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
# Their attribute for the dropout rate of attention weights.
DROPOUT = ("dropout", "attention_dropout", "dropout_prob", "attn_drop")
# Arguments that some models pass to their attention and vidl does not support.
UNSUPPORTED = ("position_bias", "softcap", "s_aux", "cache", "block_table")


@dataclass(frozen=True, eq=False)
class Visible:
    """Takes the place of a mask if all queries of a sample see the same keys.

    A model may only pass it on. One that reads it as a tensor gets a ValueError with the remedy.

    Attributes:
        keys: [B, num_keys] bool, False where a key is padding; None: all keys are visible.
        groups: the same as groups, for the attention of all layers.
    """

    keys: Tensor | None
    groups: Groups

    def dense(self) -> Tensor | None:
        """As a mask of `scaled_dot_product_attention`, [B, 1, 1, num_keys]."""
        return None if self.keys is None else self.keys[:, None, None, :]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks up, as for a copy
            raise AttributeError(name)
        raise _no_tensor(f"mask.{name}")

    def __getitem__(self, index: Any) -> Any:
        raise _no_tensor("mask[...]")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise _no_tensor(f"{function.__name__} of the mask")


@dataclass(frozen=True, eq=False)
class Packed:
    """Takes the place of a mask for captions whose words are packed as one sample.

    Attributes:
        captions: pack and unpack the words.
        keys: [B, L] bool, False at padding.
        groups: of the packed words.
    """

    captions: Captions
    keys: Tensor
    groups: Groups

    def drop_out(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """PyTorch's attention of the padded captions, with dropout, as packed words.

        Args:
            query, key, value: packed words, [1, H, words, D].
        """
        H, D = query.shape[1], query.shape[3]
        words = torch.cat([x[0].transpose(0, 1).flatten(1) for x in (query, key, value)], 1)
        padded = self.captions.unpack(words).unflatten(2, (3, H, D))
        q, k, v = (x.transpose(1, 2) for x in padded.unbind(2))
        mask = self.keys[:, None, None, :]
        out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, is_causal=False, **options)
        return self.captions.pack(out)[None]


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

    Padding of keys becomes groups, without a host synchronisation: [B, num_keys] numbers once,
    where PyTorch's attention reads a mask [B, 1, num_queries, num_keys] in every layer. Causal and
    all other masks are those of "sdpa".

    Returns:
        `Visible` for a bidirectional mask, even without padding: it tells the attention, which
        might otherwise be causal, that it is bidirectional.
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
    attention_mask: Visible | Packed | Groups | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of `attn_implementation="vidl"`.

    It calls `space_time_attention` if all queries of a sample see the same keys. Causal attention,
    attention with dropout, attention with any other mask [B, 1, num_queries, num_keys] or [B, H,
    num_queries, num_keys], and head sizes without a kernel on this machine stay with PyTorch, as
    under "sdpa".

    Args:
        module: the attention module that calls it.
        query: [B, H, num_queries, D].
        key, value: [B, H, num_keys, D].
        attention_mask: the result of `visible`; or, for rows packed as one sample, their `Groups`,
            or `Packed`, which allows dropout.
        scaling, dropout, is_causal: as in transformers.

    Returns:
        [B, num_queries, H, D], and None for the attention weights, which are never computed.

    Raises:
        ValueError: the module uses an unsupported option, or the attention weights are requested.
        TypeError: the mask is of an unknown type.
    """
    refuse(module, options)
    if isinstance(attention_mask, Packed):
        if dropout > 0:
            more = {"dropout": dropout, "scaling": scaling}
            return attention_mask.drop_out(module, query, key, value, **more), None
        attention_mask = attention_mask.groups
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
    elif groups is None or not _faster(query, key, value, groups, module):
        mask = attention_mask.dense() if isinstance(attention_mask, Visible) else attention_mask
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = space_time_attention(q, k, v, groups, scale=scaling, backend=_backend(module))
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


def collected() -> Sequence[str]:
    """What transformers collects from the layers of the running forward: "attentions", ..."""
    active = output_capturing._active_collector
    # torch.compile cannot trace a context variable; transformers then uses a global one.
    names = active.global_var if torch.compiler.is_compiling() else active.get()
    return tuple(names or ())


def _groups(
    keys: Tensor | None, B: int, num_queries: int, num_keys: int, device: torch.device
) -> Groups:
    """Groups of the queries of each sample and its visible keys.

    A sample has two groups, so that shapes are static: all of its queries with the visible keys;
    and no query with the padded keys, which come after the visible ones.
    """
    if keys is None:
        return equal_groups(B, num_queries, num_keys, device)
    order = torch.argsort((~keys).byte(), dim=1, stable=True)
    step = torch.arange(B + 1, dtype=torch.int32, device=device)
    visible_end = step[:-1] * num_keys + keys.sum(1, dtype=torch.int32)
    key_offsets = torch.stack([step[:-1] * num_keys, visible_end], 1).flatten()
    query_offsets = torch.stack([step[:-1], step[1:]], 1).flatten() * num_queries
    return Groups(
        torch.cat([query_offsets, step[-1:] * num_queries]),
        torch.cat([key_offsets, step[-1:] * num_keys]),
        None,
        (order + step[:-1, None] * num_keys).flatten().int(),
        max_queries=num_queries,
        max_keys=num_keys,
        num_queries=B * num_queries,
        num_keys=B * num_keys,
        checked=True,
    )


def _causal(module: Any, is_causal: bool | None) -> bool:
    """Whether attention without a mask is causal, by the rule of transformers."""
    if is_causal is not None:
        return is_causal
    if type(module).__name__ == "BridgeTowerSelfAttention":
        # Its cross-modal layers claim to be causal and are called without a mask, but "eager",
        # which defines the model, computes bidirectional attention.
        return bool(module.config.is_decoder)
    return getattr(module, "is_causal", True)


def _groups_for(mask: Visible | Groups | Tensor | None, query: Tensor, key: Tensor) -> Groups:
    if isinstance(mask, Groups):
        return mask
    B, num_queries, num_keys, keys = query.shape[0], query.shape[2], key.shape[2], None
    if isinstance(mask, Visible):
        if mask.groups.num_queries == B * num_queries and mask.groups.num_keys == B * num_keys:
            return mask.groups
        keys = mask.keys  # BridgeTower asks for a mask of one query, however many there are
    return _groups(keys, B, num_queries, num_keys, query.device)


def _faster(query: Tensor, key: Tensor, value: Tensor, groups: Groups, module: nn.Module) -> bool:
    """False if PyTorch's attention would run on padded groups here as well."""
    if _backend(module) != "auto" or choices.recorder is not None:  # tuning measures the kernels
        return True
    dtype = library.autocast_dtype(query)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    chosen = choose("auto", q, k, v, groups)
    packed = not groups.uniform and pytorch.packed_attention(query) is not None
    return chosen not in library.PYTORCH or packed


def _backend(module: nn.Module) -> str:
    state = state_of(module)
    return "auto" if state is None else state.backend


def refuse(module: nn.Module, options: dict[str, Any]) -> None:
    """Raise if a call uses an unsupported argument or requests the attention weights."""
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise _cannot(module, name)
    requested = any("attentions" in name for name in collected())
    if options.get("output_attentions") or requested:
        raise _cannot(module, "the weights of output_attentions=True", remedy="eager")


def _no_tensor(use: str) -> Exception:
    return ValueError(
        f"attn_implementation='{NAME}' passes padding as groups, but this model reads its mask as "
        f"a tensor ({use}): call vidl.unswap(model), or model.set_attn_implementation('sdpa')"
    )


def _cannot(
    module: nn.Module, what: str, error: type[Exception] = ValueError, remedy: str = "sdpa"
) -> Exception:
    return error(
        f"attn_implementation='{NAME}' does not support {what} in {type(module).__name__}: call "
        f"vidl.unswap(model), or model.set_attn_implementation('{remedy}')"
    )


def _swap(model: nn.Module, backend: str) -> Sequence[Change]:
    """Set the implementation in every configuration that the known attentions read.

    This includes the configurations of their models, which choose the mask function.
    `set_attn_implementation` does not reach copies, such as the one of VideoMAE's decoder.
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
    """The folder of transformers.models that defines a class; "" if there is none."""
    prefix, name = "transformers.models.", kind.__module__
    return name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else ""


def _restore(module: nn.Module) -> None:
    state, config = state_of(module), module.config
    assert state is not None and isinstance(config, PreTrainedConfig)
    config._attn_implementation_internal = state.memory["attn_implementation"]


def _note(module: Any, backend: str) -> str:
    """The report's note on attention that vidl does not, or not always, compute."""
    weight = next(module.parameters())
    if hasattr(module, "attention_head_size"):
        head_size = module.attention_head_size
    else:
        head_size = module.head_dim
    config = module.config
    decoder = getattr(config, "is_decoder", False) and "Cross" not in type(module).__name__
    if decoder or config.model_type in CAUSAL:
        return "stays with PyTorch's attention, because it is causal"
    if note := speed(weight.device, weight.dtype, head_size, backend):
        return note
    rates = (getattr(module, name, None) for name in DROPOUT)
    drop = next(rate for rate in rates if rate is not None)
    drop = drop.p if isinstance(drop, nn.Dropout) else drop
    return f"PyTorch's attention in training, because it drops out weights ({drop})" if drop else ""


FAMILY = Family(whole=_swap)
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, visible)
