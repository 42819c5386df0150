"""A transformer block that can prune its tokens."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_count,
    check_flag,
    check_floating,
    check_tensors,
    finite,
)
from vidl.kernels.groups import Groups
from vidl.kernels.library import check_backend
from vidl.kernels.select_tokens.op import Selected
from vidl.nn.arguments import check_groups, check_layer
from vidl.nn.pruning import Pruning, Scores, check_pruning, run_layer, scored_attention

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # as in timm's ViT


class Block(nn.Module):
    """Pre-norm transformer block that can prune its tokens; to prune, samples begin with CLS.

    With `pruning`, CLS and the ceil(keep_rate (N - 1)) tokens with the highest scores stay. If
    these are all tokens, nothing changes and nothing is fused; but a packed sample next to samples
    that are pruned gets zeros as its fused token. Later blocks treat a fused token like any other.
    With scores "cls" or "mean", the attention kernel also returns the scores, and no N x N tensor
    is made. Parameters are named as in timm's `vision_transformer.Block`, so its state_dict loads.

    Args:
        dim: channels of a token, C.
        num_heads: number of heads, H.
        mlp_ratio: width of the MLP's hidden layer, relative to `dim`.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        init_values: initial value of LayerScale; None: no LayerScale.
        act_layer, norm_layer: as in timm.
        pruning: how to prune; None: all tokens stay. The attribute `pruning` may be replaced at any
            time, as EViT's schedule does.
        backend: of all ops.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        init_values: float | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        *,
        pruning: Pruning | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_layer(dim, num_heads, mlp_ratio, qkv_bias, act_layer, norm_layer, backend)
        check_pruning(pruning)
        if init_values is not None:
            finite("init_values", init_values)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **options)
        self.attn: nn.Module = Attention(dim, num_heads, qkv_bias, **options)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **options)
        self.drop_path1: nn.Module = nn.Identity()
        self.norm2 = norm_layer(dim, **options)
        self.mlp: nn.Module = Mlp(dim, int(dim * mlp_ratio), act_layer, **options)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **options)
        self.drop_path2: nn.Module = nn.Identity()
        self.dim, self.pruning, self.backend = dim, pruning, backend

    @classmethod
    def from_block(
        cls, block: nn.Module, *, pruning: Pruning | None = None, backend: str = "auto"
    ) -> "Block":
        """Take over the modules of timm's `vision_transformer.Block`; nothing is copied.

        Raises:
            TypeError: `block` is another kind of module.
            ValueError: `block` uses an option that vidl does not support: attention dropout or a
                gate.
        """
        attention: Any = getattr(block, "attn", None)
        if type(block).__name__ != "Block" or type(attention).__name__ != "Attention":
            raise TypeError(
                "need block as timm's vision_transformer.Block with its Attention, got "
                f"{type(block).__name__} with {type(attention).__name__}"
            )
        known = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
        children = {name for name, _ in attention.named_children()}
        own = [name for name, _ in attention.named_parameters(recurse=False)]
        if own or children - known:
            raise ValueError(f"cannot compute attention with {sorted(children - known) + own}")
        if attention.attn_drop.p > 0:
            raise ValueError(f"cannot drop out attention, got attn_drop={attention.attn_drop.p}")
        check_backend(backend)
        check_pruning(pruning)
        converted = cls.__new__(cls)
        nn.Module.__init__(converted)
        for name, child in block.named_children():
            setattr(converted, name, child)
        converted.dim = attention.qkv.in_features
        converted.pruning, converted.backend = pruning, backend
        return converted.train(block.training)

    def forward(
        self,
        x: Tensor,
        groups: Groups | None = None,
        *,
        num_kept: int | None = None,
        return_ids: bool = False,
    ) -> Tensor | tuple[Any, ...]:
        """Attention, MLP and pruning.

        Args:
            x: [B, N, C]; or packed, [total, C], with `groups`.
            groups: which rows of a packed x attend to one another; to prune, groups of whole
                samples, from `Groups.joint` or `Groups.equal`.
            num_kept: the number of tokens of a packed x that stay, over all samples and without
                CLS, if known. Otherwise, if samples differ in length, pruning reads it from the
                device, and `torch.compile(fullgraph=True)` refuses that.
            return_ids: also return which tokens stay.

        Returns:
            [B, M, C], where M = N, or after pruning 1 + K, or 2 + K with a fused token, which comes
            last. Packed: a pair of [total', C] and its groups, for the next block. With
            `return_ids` also the positions of the kept tokens among the tokens of their sample
            after CLS, in the order of the tokens, [B, K] int64 or packed [num_kept]; None if
            nothing was pruned.

        Raises:
            ValueError: x is neither [B, N, C] with at least CLS, nor [total, C] with groups of
                these rows; or x should be pruned, but the groups are not whole samples.
        """
        self._check(x, groups)
        check_flag("return_ids", return_ids)
        if num_kept is not None:
            check_count("num_kept", num_kept)
        packed = groups is not None
        if groups is None:
            groups = Groups.equal(x.shape[0], x.shape[1], device=x.device)
        pruning = self.pruning
        if pruning is not None and not pruning.drops(max(groups.max_queries - 1, 0)):
            pruning = None
        options: dict[str, Any] = {"backend": self.backend}
        if pruning is not None and not _of_samples(groups):
            raise ValueError(
                "need groups of whole samples without query_limits to prune, as Groups.joint makes "
                "them"
            )
        if pruning is not None and packed:
            if groups.uniform:
                num_kept = groups.num_groups * pruning.kept(groups.max_queries - 1)
            options |= {"cu_seqlens": groups.row_offsets, "num_kept": num_kept}
        attention = partial(self._attention, groups)
        x, selected = run_layer(x, attention, self._mlp, pruning, **options)
        if pruning is not None and selected is not None:
            groups = _groups_after(groups, pruning, selected)
        ids = None if selected is None else selected.ids_keep
        results = (x, *([groups] if packed else []), *([ids] if return_ids else []))
        return results if len(results) > 1 else x

    def _attention(
        self, groups: Groups, x: Tensor, scores: Scores | None
    ) -> tuple[Tensor, Tensor | None]:
        out, importance = attend(self.attn, self.norm1(x), groups, scores, self.backend)
        return x + self.drop_path1(self.ls1(out)), importance

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _check(self, x: Tensor, groups: Groups | None) -> None:
        projection: Any = self.attn.qkv
        check_tensors(x=x, model=projection.weight)
        check_floating(x=x)
        if groups is not None:
            check_groups("groups", groups, x)
        elif x.ndim != 3 or x.shape[1] < 1:
            raise ValueError(f"need x [B, N, C] with CLS first, or groups, got {tuple(x.shape)}")
        if x.shape[-1] != self.dim:
            raise ValueError(f"need x of {self.dim} channels, got {tuple(x.shape)}")

    def set_keep_rate(self, keep_rate: float) -> None:
        """Set the keep rate of a block that prunes.

        A method, because a module that wraps the block passes on calls, but keeps attributes.

        Raises:
            ValueError: keep_rate is not in (0, 1], or the block does not prune.
        """
        if self.pruning is None:
            raise ValueError("need a block with pruning to set its keep rate")
        self.pruning = replace(self.pruning, keep_rate=keep_rate)

    def extra_repr(self) -> str:
        return f"pruning={self.pruning}, backend={self.backend!r}"


def attend(
    attn: nn.Module, x: Tensor, groups: Groups, scores: Scores | None, backend: str
) -> tuple[Tensor, Tensor | None]:
    """What timm's `Attention` computes, within groups: x [..., C] -> [..., C].

    Args:
        attn: has qkv, num_heads and proj; may have q_norm, k_norm, norm and proj_drop.
        x: the rows of `groups`, in any shape.
        scores: importance of the tokens, as in `Pruning`; None: not computed.

    Returns:
        The output, and the scores of the groups' keys, [E] float32, or None.
    """
    parts: Any = attn
    q, k, v = parts.qkv(x).reshape(groups.num_queries, 3, parts.num_heads, -1).unbind(1)
    q, k = (getattr(parts, name, nn.Identity())(y) for name, y in (("q_norm", q), ("k_norm", k)))
    out, importance = scored_attention(q, k, v, groups, scores, backend=backend)
    out = out.reshape(*x.shape[:-1], -1)
    for name in ("norm", "proj", "proj_drop"):
        out = getattr(parts, name, nn.Identity())(out)
    return out, importance


def _groups_after(groups: Groups, pruning: Pruning, selected: Selected) -> Groups:
    """The groups of whole samples that a block has pruned."""
    longest = 1 + pruning.kept(groups.max_queries - 1) + (1 if pruning.fuse else 0)
    if groups.uniform:
        return Groups.equal(groups.num_groups, longest, device=selected.tokens.device)
    return Groups.joint(selected.cu_seqlens, selected.tokens.shape[0], longest)


def _of_samples(groups: Groups) -> bool:
    """Whether each group is a whole sample: all of its rows, in order, seen by all queries."""
    offsets = groups.row_offsets
    ordered = groups.query_rows is None and groups.key_rows is None and groups.query_limits is None
    return ordered and offsets is not None and offsets.shape[0] == groups.num_groups + 1


class Attention(nn.Module):
    """Parameters of attention, named as in timm; `attend` computes it."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, **options: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **options)
        self.proj = nn.Linear(dim, dim, **options)


class Mlp(nn.Module):
    """Linear, activation, Linear; named as in timm."""

    def __init__(
        self, dim: int, hidden: int, act_layer: Callable[[], nn.Module], **options: Any
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **options)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """LayerScale: a learned factor per channel. Source: arXiv 2103.17239."""

    def __init__(self, dim: int, init_values: float, **options: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values, **options))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, residual branches are left out at random.

    What stays is divided by 1 - rate. Random numbers are drawn as by timm's `DropPath`. Source:
    Deep Networks with Stochastic Depth, arXiv 1603.09382, 3.

    Args:
        rate: the share of branches that are left out, in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= finite("drop_path", rate) < 1:
            raise ValueError(f"need drop_path in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor, together: int = 1) -> Tensor:
        """Leave out the branch of rows of x, [rows, ...].

        Args:
            together: so many consecutive rows, those of a clip, are left out together.
        """
        if self.rate == 0 or not self.training:
            return x
        kept = x.new_empty(x.shape[0] // together, *(1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate).repeat_interleave(together, 0)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
