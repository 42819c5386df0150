"""The baseline of whole training steps: the models of `vidl.models` in plain PyTorch.

Same modules, parameters and results as in vidl, but none of its ops. All patches are embedded, then
the visible ones are gathered. Attention is `scaled_dot_product_attention`: a batch of frames or
positions where these have equal sizes, a boolean mask where they do not. Pruning multiplies the
query of CLS with the keys, then uses `topk`, a gather and a weighted sum. Captions are padded and
masked. Targets of masked patches are gathered as bytes, then normalised. Each part is written in
the variant that was fastest in `bench/results/` on the CPU, and none synchronises with the host.
"""

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.bench.ops.select_tokens import index_select
from vidl.nn import Bert, Block, FrameSelector, MaskedPatchEmbed, Pruning, SelectedFrames
from vidl.nn.bert import BertAttention
from vidl.nn.divided import DividedBlock, SpaceTimeTransformer
from vidl.nn.vit import frames_of
from vidl.objectives import MaskedPatchLoss


def baseline_of(model: nn.Module) -> nn.Module:
    """A copy of a model without vidl's ops, which shares its parameters and buffers.

    The copy raises ValueError in its forward where a module has options that are not written here.
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    shared |= {id(b): b for b in model.buffers()}
    baseline = copy.deepcopy(model, shared)
    for module in baseline.modules():
        module.__class__ = SWAPS.get(type(module), type(module))
    return baseline


def heads(x: Tensor, count: int) -> Tensor:
    """Split [..., N, C] into heads, [..., H, N, D]; a view."""
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q, k and v [..., H, N, D], with the heads merged: [..., N, C]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-3, -2).flatten(-2)


def patches(video: Tensor, size: tuple[int, ...], channels: int) -> Tensor:
    """Cut a clip [B, C, T t, H h, W w] into [B, T, H, W, t, h, w], with C at `channels`; a view."""
    t, h, w = size
    cut = video.unflatten(2, (-1, t)).unflatten(4, (-1, h)).unflatten(6, (-1, w))
    return cut.permute(0, 2, 4, 6, 3, 5, 7, 1).movedim(7, channels)


def constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():  # constants of the graph
        return torch.tensor(values, device=device, dtype=dtype)
    return _cached_constants(values, device, dtype)


@functools.cache  # a copy from the host synchronises
def _cached_constants(
    values: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype)


class BaselineEmbed(MaskedPatchEmbed):
    """Embeds every patch, then gathers the visible ones."""

    def forward(
        self,
        video: Tensor,
        ids_keep: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position: Any = None,
    ) -> Tensor:
        if cu_seqlens is not None:
            raise ValueError("need equally many visible patches in every clip, got cu_seqlens")
        weight = self.proj.weight
        rows = patches(video, (1, *weight.shape[2:])[-3:], channels=4).contiguous()
        # [B, T, H, W, C, t, h, w]; the copy is one of bytes, not of floats
        if video.dtype == torch.uint8:
            rows = self._normalised(rows, torch.promote_types(weight.dtype, torch.float32))
        x = F.linear(rows.to(weight.dtype).flatten(4), weight.flatten(1), self.proj.bias)
        x = x.flatten(2, 3)  # [B, T, P, C]
        if isinstance(position, tuple):
            time, space = position
            x = x + space.to(x.dtype) + time[:, None].to(x.dtype)
        elif position is not None:
            x = x + position.to(x.dtype).view(-1, *x.shape[-2:])
        x = x.flatten(1, 2)
        return x if ids_keep is None else index_select(x, ids_keep)

    def _normalised(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.mean is not None and self.std is not None
        scale = constants(tuple(1 / (255 * s) for s in self.std), rows.device, dtype)
        shift = constants(
            tuple(m / s for m, s in zip(self.mean, self.std, strict=True)), rows.device, dtype
        )
        return (rows * scale.view(-1, 1, 1, 1)).sub_(shift.view(-1, 1, 1, 1))


class BaselineBlock(Block):
    """A ViT block; prunes like EViT, but computes only the attention weights of CLS."""

    def forward(self, x: Tensor, *args: Any, return_ids: bool = False, **options: Any) -> Any:
        pruning = self.pruning
        if args or options or (pruning is not None and pruning.when != "before_mlp"):
            raise ValueError("need equally long samples, pruned before the MLP")
        attn: Any = self.attn
        q, k, v = heads(attn.qkv(self.norm1(x)), 3 * attn.num_heads).chunk(3, 1)
        n = x.shape[1] - 1
        keep = n if pruning is None else pruning.kept(n)
        scores = _cls_weights(q, k) if keep < n else None
        x = x + self.ls1(attn.proj(attention(q, k, v)))
        ids = None
        if scores is not None:
            assert pruning is not None
            x, ids = self._pick(x, scores, keep, pruning)
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return (x, ids) if return_ids else x

    def _pick(
        self, x: Tensor, scores: Tensor, keep: int, pruning: Pruning
    ) -> tuple[Tensor, Tensor]:
        """Keep CLS and the tokens with the highest scores; append the fused others if asked for."""
        ids = scores.topk(keep, sorted=pruning.order != "index").indices
        if pruning.order == "index":
            ids = ids.sort(1).values
        if pruning.fuse is None:
            return index_select(x, torch.cat([torch.zeros_like(ids[:, :1]), ids + 1], 1)), ids
        weights = scores.scatter(1, ids, 0)
        if pruning.fuse == "mean":
            weights = weights / weights.sum(1, keepdim=True)
        fused = weights.to(x.dtype)[:, None] @ x[:, 1:]
        return torch.cat([x[:, :1], index_select(x, ids + 1), fused], 1), ids


def _cls_weights(q: Tensor, k: Tensor) -> Tensor:
    """The attention of CLS to the other tokens, averaged over heads: [B, N - 1]."""
    products = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.mT
    high = torch.promote_types(products.dtype, torch.float32)
    return products.softmax(-1, dtype=high)[:, :, 0, 1:].mean(1)


class BaselineDividedBlock(DividedBlock):
    """Divided attention by reshaping; CLS attends in a call of its own."""

    def forward(self, x: Tensor, space: Any, time: Any) -> Tensor:
        """x: [B, 1 + K, C]; space, time: `_Groups` of the tokens."""
        through_time = self._attend(self.timeattn, self.norm3(x), time)
        x = x + self._attend(self.attn, self.norm1(x + through_time), space)
        return x + self.mlp(self.norm2(x))

    @staticmethod
    def _attend(attn: Any, x: Tensor, groups: "_Groups") -> Tensor:
        q, k, v = heads(attn.qkv(x), 3 * attn.num_heads).chunk(3, 1)
        return attn.proj(groups.attend(q, k, v))


class _Groups:
    """All tokens of a clip attend to each other."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q, k and v [B, H, 1 + K, D]: [B, 1 + K, C]."""
        return attention(q, k, v)


class _Equal(_Groups):
    """Groups of equal size, and CLS: the tokens of each frame, or of each position through time."""

    def __init__(self, T: int, through_time: bool) -> None:
        self.T, self.through_time = T, through_time

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, first = q.shape[0], attention(q[:, :, :1], k, v)
        # Four dimensions: the fused kernels of SDPA do not take five.
        cut = (self._cut(q, False), self._cut(k, True), self._cut(v, True))
        out = attention(*(x.flatten(0, 1) for x in cut)).unflatten(0, (B, -1))  # [B, G, N, C]
        out = out.transpose(1, 2) if self.through_time else out
        return torch.cat([first, out.flatten(1, 2)], 1)

    def _cut(self, x: Tensor, with_cls: bool) -> Tensor:
        """[B, H, 1 + K, D] to [B, G, H, N, D], with CLS in front of each group if `with_cls`."""
        groups = x[:, :, 1:].unflatten(2, (self.T, -1)).transpose(1, 2)
        groups = groups.permute(0, 3, 2, 1, 4) if self.through_time else groups
        if not with_cls:
            return groups
        cls = x[:, None, :, :1].expand(-1, groups.shape[1], -1, -1, -1)
        return torch.cat([cls, groups], 3)


class _Masked(_Groups):
    """Groups of any size, as a boolean mask.

    Args:
        labels: the group of each token after CLS, [B, K].
    """

    def __init__(self, labels: Tensor) -> None:
        labels = F.pad(labels, (1, 0), value=-1)
        same = labels[:, :, None] == labels[:, None]
        self.mask = (same | (labels < 0)[:, :, None] | (labels < 0)[:, None])[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.mask)


class BaselineSpaceTime(SpaceTimeTransformer):
    """The encoder of Frozen in Time, on batches instead of packed rows."""

    def forward(self, video: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        video = video.unsqueeze(2) if video.ndim == 4 else video
        B, T = video.shape[0], frames_of(video, ids_keep, self.grid, self.patch_embed)
        x = self.patch_embed(
            video, ids_keep, position=(self.temporal_embed[0, :T], self.pos_embed[0, 1:])
        )
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1)
        x = torch.cat([cls, x], 1)
        space, time = self._cut(T, ids_keep)
        for block in self.blocks:
            x = block(x, space, time)
        return self.norm(x)

    def _cut(self, T: int, ids_keep: Tensor | None) -> tuple[_Groups, _Groups]:
        patches = self.grid[0] * self.grid[1]
        even = ids_keep is None or self.time == "slot"
        if ids_keep is None or even:
            space: _Groups = _Equal(T, through_time=False)
        else:
            space = _Masked(ids_keep // patches)
        if self.time == "joint":
            return space, _Groups()
        if ids_keep is None or even:
            return space, _Equal(T, through_time=True)
        return space, _Masked(ids_keep % patches)


class BaselineAttention(BertAttention):
    """Attention over padded captions; `groups` is a boolean mask, True for words, or None."""

    def forward(self, x: Tensor, context: Tensor, groups: Any, backend: str) -> Tensor:
        project: Any = self.self
        q, k, v = (
            heads(y, self.heads)
            for y in (project.query(x), project.key(context), project.value(context))
        )
        return self.output(attention(q, k, v, groups), x)


class BaselineBert(Bert):
    """Encodes captions that are padded to the longest."""

    def encode(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x, mask = self.embeddings(ids, columns), _keys(attention_mask)
        for layer in self._layers()[: self.text_layers]:
            x = layer(x, mask, "")
        return x

    def fuse(
        self, text: Tensor, attention_mask: Tensor | None, visual: Tensor, *,
        partner: Tensor | None = None, cu_visual: Tensor | None = None,
        max_visual: int | None = None, words: int | None = None,
    ) -> Tensor:  # fmt: skip
        if cu_visual is not None:
            raise ValueError("need equally many tokens in every clip, got cu_visual")
        visual = visual if partner is None else visual[partner]
        x, mask = text, _keys(attention_mask)
        for layer in self._layers()[self.text_layers :]:
            x = layer(x, mask, "", visual, None)
        return x


def _keys(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else (attention_mask != 0)[:, None, None]


class BaselineSelector(FrameSelector):
    """Selects frames with topk and gathers them."""

    def forward(self, frames: Tensor, text: Tensor, tokens: Tensor) -> SelectedFrames:
        both = torch.cat([frames, text[:, None].expand(-1, frames.shape[1], -1)], -1)
        scores = self.fc2(self.act(self.fc1(both))).squeeze(-1)
        probabilities = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
        ids = probabilities.topk(self.keep).indices.sort(1).values
        kept = index_select(tokens.flatten(2), ids).unflatten(2, tokens.shape[2:])
        selected = probabilities.gather(1, ids)
        factor = 1 + (selected - selected.detach())
        return SelectedFrames(kept * factor[..., None, None].to(tokens.dtype), ids, probabilities)


class BaselinePixels(MaskedPatchLoss):
    """MAE's loss: gathers the masked patches as bytes, then normalises them."""

    def forward(self, prediction: Tensor, video: Tensor, ids_mask: Tensor) -> Tensor:
        if self.options["target"] != "mae":
            raise ValueError(f"need target 'mae', got {self.options['target']!r}")
        size = self.options["patch_size"]
        h, w = (size, size) if isinstance(size, int) else size
        cut = patches(video, (self.options["tubelet_size"], h, w), channels=7)
        H, W = cut.shape[2:4]
        sample = torch.arange(len(ids_mask), device=video.device)[:, None]
        high = torch.promote_types(prediction.dtype, torch.float32)
        target = cut[sample, ids_mask // (H * W), ids_mask // W % H, ids_mask % W].to(high)
        if video.dtype == torch.uint8:
            assert self.mean is not None and self.std is not None
            mean, std = (
                constants(tuple(values), video.device, high) for values in (self.mean, self.std)
            )
            target = (target / 255 - mean) / std
        target = target.flatten(2)
        if self.options["norm_pix"]:
            var, mean = torch.var_mean(target, -1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        return F.mse_loss(prediction.to(high), target)


SWAPS: dict[type, type] = {
    MaskedPatchEmbed: BaselineEmbed,
    Block: BaselineBlock,
    DividedBlock: BaselineDividedBlock,
    SpaceTimeTransformer: BaselineSpaceTime,
    BertAttention: BaselineAttention,
    Bert: BaselineBert,
    FrameSelector: BaselineSelector,
    MaskedPatchLoss: BaselinePixels,
}
