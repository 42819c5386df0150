"""Token pruning: which tokens a layer drops, and where in the layer it drops them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vidl.kernels.arguments import check_count, check_tensors, finite
from vidl.kernels.groups import Groups
from vidl.kernels.select_tokens import kept_count, select_tokens
from vidl.kernels.select_tokens.op import Fuse, Order, Rounding, Selected
from vidl.kernels.space_time_attention import space_time_attention
from vidl.kernels.token_scores import key_similarity_scores, value_weighted_scores

Scores = Literal["cls", "mean", "value", "similarity"]
When = Literal["before_mlp", "after_mlp"]


@dataclass(frozen=True)
class Pruning:
    """How a layer prunes its tokens: the tokens with the highest scores stay.

    Prefix tokens (class, register and distillation tokens) always stay. If the rate keeps all
    tokens of a sample, nothing changes and nothing is fused.

    Attributes:
        keep_rate: share of the layer's tokens that stay, in (0, 1].
        scores: importance of a token. "cls": attention from the class token, averaged over heads
            (EViT). "mean": attention from all tokens, averaged over heads. "value": "cls" times the
            norm of the token's value, normalised without the class token (ATS).
            "similarity": minus the greatest cosine similarity of its key to the key of a token at
            an odd position, for tokens at even positions (ToMe); tokens at odd positions rank
            first.
        when: prune between attention and MLP ("before_mlp"), or after the MLP ("after_mlp").
        order: of the kept tokens, "score" or "index"; default: "score" before the MLP (EViT),
            "index" after it (SViTT).
        fuse: as in `vidl.ops.select_tokens`; "sum" is EViT's fused token. Not with "similarity",
            whose scores are no weights.
        rounding: as in `vidl.ops.kept_count`.

    Raises:
        ValueError: an option is unknown, or keep_rate is not in (0, 1].

    Sources: EViT, arXiv 2202.07800, 3.2 (`when="before_mlp", fuse="sum"`); SViTT, arXiv 2304.08809,
    3.3 (`when="after_mlp"`); ATS, arXiv 2111.15667, 3.1; ToMe, arXiv 2210.09461, 3.
    """

    keep_rate: float
    scores: Scores = "cls"
    when: When = "before_mlp"
    order: Order | None = None
    fuse: Fuse | None = None
    rounding: Rounding = "ceil"

    def __post_init__(self) -> None:
        for option, known in (
            ("scores", get_args(Scores)),
            ("when", get_args(When)),
            ("order", (None, *get_args(Order))),
            ("fuse", (None, *get_args(Fuse))),
        ):
            value = getattr(self, option)
            if value not in known:
                names = ", ".join(map(repr, known))
                raise ValueError(f"need {option} among {names}, got {value!r}")
        if self.scores == "similarity" and self.fuse is not None:
            raise ValueError(
                "scores='similarity' cannot weight a fused token: need fuse=None, got "
                f"{self.fuse!r}"
            )
        if not 0 < finite("keep_rate", self.keep_rate) <= 1:
            raise ValueError(f"need keep_rate in (0, 1], got {self.keep_rate}")
        self.kept(0)  # checks rounding

    def kept(self, n: int) -> int:
        """The number of tokens that stay, of n without the prefix."""
        return kept_count(n, self.keep_rate, self.rounding)

    def drops(self, n: int) -> bool:
        """Whether any of n tokens is dropped."""
        return self.kept(n) < n

    def select(self, x: Tensor, scores: Tensor, prefix: int = 1, **options: Any) -> Selected:
        """Keep the tokens with the highest scores.

        Args:
            x: [B, prefix + n, C], or packed [total, C] with `cu_seqlens` among the options.
            scores: [B, prefix + n], or packed [total]; those of the prefix are ignored.
            prefix: tokens at the front of each sample that always stay.
            options: `cu_seqlens`, `num_kept` and `backend` of `vidl.ops.select_tokens`.
        """
        check_tensors(x=x, scores=scores)
        rows = x.shape[:2] if x.ndim == 3 else x.shape[:1]
        if x.ndim not in (2, 3) or scores.numel() != math.prod(rows):
            raise ValueError(
                "need x [B, N, C] or packed [total, C], and a score of each row in scores, got "
                f"{tuple(x.shape)} and {tuple(scores.shape)}"
            )
        check_count("prefix", prefix)
        return select_tokens(
            x,
            scores if x.ndim == 2 else scores.view(rows)[:, prefix:],
            float(self.keep_rate),
            rounding=self.rounding,
            order=self.order or ("score" if self.when == "before_mlp" else "index"),
            fuse=self.fuse,
            prefix=prefix,
            **options,
        )


def check_pruning(pruning: Pruning | None) -> None:
    if pruning is not None and not isinstance(pruning, Pruning):
        raise TypeError(f"need pruning=Pruning(keep_rate, ...), got {pruning!r}")


def check_prune_layers(
    layers: Sequence[int], depth: int, pruning: Pruning | None
) -> tuple[int, ...]:
    """The layers that prune, each once and in order.

    Raises:
        TypeError, ValueError: they are no ints, or beyond the depth, or come without `pruning`.
    """
    check_pruning(pruning)
    if not isinstance(layers, (tuple, list)):
        raise TypeError(f"need prune_layers as a list of ints, got {layers!r}")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"need prune_layers as a list of ints, got {layers!r}")
    if wrong := sorted(layer for layer in layers if not 0 <= layer < depth):
        raise ValueError(f"need prune_layers in [0, {depth}), the depth, got {wrong}")
    if layers and pruning is None:
        raise ValueError("need pruning=Pruning(keep_rate, ...) with prune_layers, got None")
    return tuple(sorted(set(layers)))


def run_layer(
    x: Tensor,
    attention: Callable[[Tensor, Scores | None], tuple[Tensor, Tensor | None]],
    mlp: Callable[[Tensor], Tensor],
    pruning: Pruning | None,
    **options: Any,
) -> tuple[Tensor, Selected | None]:
    """Run a transformer layer that prunes its tokens before or after its MLP.

    Args:
        x: tokens, [B, N, C] or packed [total, C].
        attention: the attention part with its residual, given x and `Pruning.scores` or None; also
            returns the scores of the tokens.
        mlp: the MLP part with its residual.
        pruning: how to prune; None: all tokens stay.
        options: of `Pruning.select`.

    Returns:
        The tokens after the layer, and what `select_tokens` returned, or None without pruning.
    """
    x, scores = attention(x, None if pruning is None else pruning.scores)
    if pruning is None:
        return mlp(x), None
    assert scores is not None
    if pruning.when == "before_mlp":
        selected = pruning.select(x, scores, **options)
        return mlp(selected.tokens), selected
    selected = pruning.select(mlp(x), scores, **options)
    return selected.tokens, selected


def scored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Groups,
    scores: Scores | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention, and the importance of each key if `scores` asks for it.

    Args:
        q: [queries, H, D].
        k, v: [keys, H, D].
        groups: which queries attend to which keys; for `scores`, whole samples.
        scores: as in `Pruning`; None: the output only.
        options: of `vidl.ops.space_time_attention`.

    Returns:
        The output, [queries, H, D], and the scores, [keys] float32, or None.
    """
    if scores in ("cls", "mean"):
        out, importance = space_time_attention(q, k, v, groups, return_scores=scores, **options)
        return out, importance
    out = space_time_attention(q, k, v, groups, **options)
    if scores is None:
        return out, None
    if scores == "similarity":
        return out, key_similarity_scores(k, groups, backend=options.get("backend", "auto"))
    # ATS leaves the class token out: with a value of zero it has no share of the scores.
    is_first = torch.zeros(k.shape[0] + 1, dtype=torch.bool, device=k.device)
    is_first = is_first.index_fill(0, groups.key_offsets[:-1].long(), True)[:-1]
    v = v.masked_fill(is_first[:, None, None], 0)
    return out, value_weighted_scores(q, k, v, groups, **options)
