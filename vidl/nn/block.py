"""A transformer block, which can drop the tokens to which its CLS token attends least."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vidl.kernels.groups import Groups
from vidl.kernels.select_tokens import kept_count, select_tokens
from vidl.kernels.select_tokens.op import Fuse, Order, Rounding
from vidl.kernels.space_time_attention import space_time_attention

When = Literal["before_mlp", "after_mlp"]
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # as timm's ViT has it


class Block(nn.Module):
    """Pre-norm transformer block, which can prune its tokens; samples have CLS first if it does.

    A token's score is the attention that CLS pays to it, averaged over heads; it comes from the
    launch that computes the attention, and no N x N tensor is made. With `keep_rate` the best
    ceil(keep_rate (N - 1)) tokens stay, and CLS; where these are all, nothing changes and nothing
    is fused, except that a packed sample beside others that are pruned gets zeros as its fused
    token. A fused token is a token like others for later blocks. Parameters are named as those of
    timm's `vision_transformer.Block`, so its state_dict loads. Sources: EViT, arXiv 2202.07800, 3.2
    (`when="before_mlp", fuse="sum"`); SViTT, arXiv 2304.08809, 3.3 (`when="after_mlp"`).

    Args:
        dim: width of the tokens, C.
        num_heads: H.
        mlp_ratio: width of the MLP's hidden layer, in `dim`.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        init_values: of LayerScale; None: there is none.
        act_layer, norm_layer: as timm has them.
        keep_rate: in (0, 1]; None keeps all. It may be set anew at any time, as EViT's schedule
            does.
        when: tokens are dropped between attention and MLP, or after the MLP.
        order: of the kept tokens, "score" or "index"; default: "score" before the MLP (EViT),
            "index" after it (SViTT).
        fuse: as in `vidl.ops.select_tokens`; "sum" is EViT's fused token.
        rounding: as in `vidl.ops.kept_count`.
        backend: of both ops.
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
        keep_rate: float | None = None,
        when: When = "before_mlp",
        order: Order | None = None,
        fuse: Fuse | None = None,
        rounding: Rounding = "ceil",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **options)
        self.attn: nn.Module = Attention(dim, num_heads, qkv_bias, **options)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **options)
        self.drop_path1: nn.Module = nn.Identity()
        self.norm2 = norm_layer(dim, **options)
        self.mlp: nn.Module = Mlp(dim, int(dim * mlp_ratio), act_layer, **options)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **options)
        self.drop_path2: nn.Module = nn.Identity()
        self._choose(keep_rate, when, order, fuse, rounding, backend)

    @classmethod
    def from_block(
        cls,
        block: nn.Module,
        *,
        keep_rate: float | None = None,
        when: When = "before_mlp",
        order: Order | None = None,
        fuse: Fuse | None = None,
        rounding: Rounding = "ceil",
        backend: str = "auto",
    ) -> "Block":
        """Take over the modules of timm's `vision_transformer.Block`; nothing is copied.

        Raises:
            TypeError: it is no such block.
            ValueError: it has what this block cannot do: attention dropout or a gate.
        """
        attention: Any = getattr(block, "attn", None)
        if type(block).__name__ != "Block" or type(attention).__name__ != "Attention":
            raise TypeError(
                "need timm's vision_transformer.Block with its Attention, got "
                f"{type(block).__name__} with {type(attention).__name__}"
            )
        known = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
        children = {name for name, _ in attention.named_children()}
        own = [name for name, _ in attention.named_parameters(recurse=False)]
        if own or children - known:
            raise ValueError(f"cannot compute attention with {sorted(children - known) + own}")
        if attention.attn_drop.p > 0:
            raise ValueError(f"cannot drop out attention, got attn_drop={attention.attn_drop.p}")
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        for name, child in block.named_children():
            setattr(made, name, child)
        made._choose(keep_rate, when, order, fuse, rounding, backend)
        return made.train(block.training)

    def _choose(
        self,
        keep_rate: float | None,
        when: When,
        order: Order | None,
        fuse: Fuse | None,
        rounding: Rounding,
        backend: str,
    ) -> None:
        if when not in ("before_mlp", "after_mlp"):
            raise ValueError(f"need when 'before_mlp' or 'after_mlp', got {when!r}")
        if order not in (None, "index", "score"):
            raise ValueError(f"need order None, 'index' or 'score', got {order!r}")
        if fuse not in (None, "sum", "mean"):
            raise ValueError(f"need fuse None, 'sum' or 'mean', got {fuse!r}")
        kept_count(0, 1.0 if keep_rate is None else keep_rate, rounding)  # checks both
        self.keep_rate, self.when, self.fuse = keep_rate, when, fuse
        self.order: Order = order or ("score" if when == "before_mlp" else "index")
        self.rounding, self.backend = rounding, backend

    def forward(
        self,
        x: Tensor,
        groups: Groups | None = None,
        *,
        num_kept: int | None = None,
        return_ids: bool = False,
    ) -> Tensor | tuple[Any, ...]:
        """Attend, prune and transform.

        Args:
            x: [B, N, C]; or packed, [total, C], with `groups`.
            groups: which rows of a packed x attend to one another; to prune, groups of whole
                samples, as `Groups.joint` and `Groups.equal` make them.
            num_kept: how many tokens of a packed x stay, of all samples without CLS, if it is
                known; else, where samples differ in length, pruning reads it from the device, and
                `torch.compile(fullgraph=True)` refuses that.
            return_ids: also return which tokens stayed.

        Returns:
            [B, M, C]: M = N, or after pruning 1 + K, or 2 + K with a fused token, which is the
            last. Packed: the pair of [total', C] and its groups, those for the next block. With
            `return_ids` also the positions of the kept tokens among those of a sample after CLS, in
            their order, [B, K] int64 or packed [num_kept], or None if nothing was pruned.

        Raises:
            ValueError: x is not [B, N, C] with at least CLS, nor [total, C] with groups of these
                rows; or it is to be pruned in groups that are not whole samples.
        """
        self._check(x, groups)
        packed = groups is not None
        if groups is None:
            groups = Groups.equal(x.shape[0], x.shape[1], device=x.device)
        n = max(groups.max_queries - 1, 0)
        prune = self.keep_rate is not None and kept_count(n, self.keep_rate, self.rounding) < n
        if prune and not _of_samples(groups):
            raise ValueError("need groups of whole samples to prune, as Groups.joint makes them")
        ids = None
        attended, scores = attend(self.attn, self.norm1(x), groups, prune, self.backend)
        x = x + self.drop_path1(self.ls1(attended))
        if scores is not None and self.when == "before_mlp":
            x, groups, ids = self._prune(x, scores, groups, num_kept)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if scores is not None and self.when == "after_mlp":
            x, groups, ids = self._prune(x, scores, groups, num_kept)
        found = (x, *([groups] if packed else []), *([ids] if return_ids else []))
        return found if len(found) > 1 else x

    def _check(self, x: Tensor, groups: Groups | None) -> None:
        if groups is None:
            if x.ndim != 3 or x.shape[1] < 1:
                raise ValueError(f"need x [B, N, C] with CLS first, got {tuple(x.shape)}")
        elif x.ndim != 2 or not x.shape[0] == groups.num_queries == groups.num_keys:
            raise ValueError(
                f"need x [total, C] with groups of its rows, got {tuple(x.shape)} with groups of "
                f"{groups.num_queries} queries and {groups.num_keys} keys"
            )

    def _prune(
        self, x: Tensor, scores: Tensor, groups: Groups, num_kept: int | None
    ) -> tuple[Tensor, Groups, Tensor]:
        assert self.keep_rate is not None
        packed = x.ndim == 2
        most = kept_count(groups.max_queries - 1, self.keep_rate, self.rounding)
        if packed and groups.uniform:
            num_kept = groups.num_groups * most
        found = select_tokens(
            x,
            scores if packed else scores.view(x.shape[:2])[:, 1:],
            float(self.keep_rate),
            rounding=self.rounding,
            order=self.order,
            fuse=self.fuse,
            cu_seqlens=groups.row_offsets if packed else None,
            num_kept=num_kept,
            prefix=1,
            backend=self.backend,
        )
        longest = 1 + most + bool(self.fuse)
        if groups.uniform:
            groups = Groups.equal(groups.num_groups, longest, device=x.device)
        else:
            groups = Groups.joint(found.cu_seqlens, found.tokens.shape[0], longest)
        return found.tokens, groups, found.ids_keep

    def extra_repr(self) -> str:
        names = ("keep_rate", "when", "order", "fuse", "rounding", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def attend(
    attn: nn.Module, x: Tensor, groups: Groups, score: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    """What timm's `Attention` computes, in groups: x [..., C] -> [..., C].

    Args:
        attn: has qkv, num_heads, proj, and perhaps q_norm, k_norm, norm and proj_drop.
        x: the rows of `groups`, in any shape.
        score: also return the attention of the first query of each group, averaged over heads.

    Returns:
        The output, and the scores of the groups' keys, [E] float32, or None.
    """
    parts: Any = attn
    q, k, v = parts.qkv(x).reshape(groups.num_queries, 3, parts.num_heads, -1).unbind(1)
    q, k = (getattr(parts, name, nn.Identity())(y) for name, y in (("q_norm", q), ("k_norm", k)))
    found = space_time_attention(
        q, k, v, groups, return_scores="cls" if score else None, backend=backend
    )
    out, importance = found if isinstance(found, tuple) else (found, None)
    out = out.reshape(*x.shape[:-1], -1)
    for name in ("norm", "proj", "proj_drop"):
        out = getattr(parts, name, nn.Identity())(out)
    return out, importance


def _of_samples(groups: Groups) -> bool:
    """Whether each group is a sample: all of its rows, in their order."""
    offsets = groups.row_offsets
    ordered = groups.query_rows is None and groups.key_rows is None
    return ordered and offsets is not None and offsets.shape[0] == groups.num_groups + 1


class Attention(nn.Module):
    """The parameters of attention, named as timm's; `attend` computes it."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, **options: Any) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"need dim as a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **options)
        self.proj = nn.Linear(dim, dim, **options)


class Mlp(nn.Module):
    """Two layers and what is between, named as timm's."""

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
    """LayerScale: one factor a channel. Source: arXiv 2103.17239."""

    def __init__(self, dim: int, init_values: float, **options: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values, **options))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
