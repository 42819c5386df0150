"""Checks of the options that layers share; each error names the option."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from vidl.kernels.arguments import check_count, check_flag, check_tensors, finite
from vidl.kernels.groups import Groups
from vidl.kernels.library import check_backend


def check_layer(
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    qkv_bias: bool,
    act_layer: Callable[[], nn.Module],
    norm_layer: Callable[..., nn.Module],
    backend: str,
    *,
    width: str = "dim",
) -> None:
    """The options of a transformer block; `width` is the name of `dim`."""
    check_heads(width, dim, num_heads)
    if not finite("mlp_ratio", mlp_ratio) > 0:
        raise ValueError(f"need mlp_ratio > 0, got {mlp_ratio}")
    check_flag("qkv_bias", qkv_bias)
    for name, layer in (("act_layer", act_layer), ("norm_layer", norm_layer)):
        if not callable(layer):
            raise TypeError(f"need {name} that makes a module, got {layer!r}")
    check_backend(backend)


def check_heads(width: str, dim: int, num_heads: int) -> None:
    """The width of a layer is a multiple of its number of heads."""
    check_count(width, dim, 1)
    check_count("num_heads", num_heads, 1)
    if dim % num_heads:
        raise ValueError(f"need {width} as a multiple of num_heads={num_heads}, got {dim}")


def check_groups(name: str, groups: Groups, x: Tensor) -> None:
    """The groups of self-attention of the rows of x, [total, C]."""
    if not isinstance(groups, Groups):
        raise TypeError(f"need {name} made by vidl.ops.Groups, got {type(groups).__name__}")
    check_tensors((), **{"x": x, name: groups.query_offsets})
    if x.ndim != 2 or not x.shape[0] == groups.num_queries == groups.num_keys:
        raise ValueError(
            f"need x [total, C] with {name} of its rows, got {tuple(x.shape)} with {name} of "
            f"{groups.num_queries} queries and {groups.num_keys} keys"
        )


def check_state(state_dict: Mapping[str, Tensor]) -> None:
    """Weights by their names."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"need state_dict of tensors by name, got {type(state_dict).__name__}")
    for name, weight in state_dict.items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise TypeError(
                f"need state_dict of tensors by name, got {type(weight).__name__} for {name!r}"
            )


def check_dropout(dropout: float) -> None:
    if not 0 <= finite("dropout", dropout) <= 1:
        raise ValueError(f"need dropout in [0, 1], got {dropout}")
