"""The models of `vidl.models` as a careful user writes them without vidl: the peer of whole steps.

Same modules, same parameters, same results; no op of vidl. Patches are embedded, then gathered;
attention is `scaled_dot_product_attention`, in a batch of frames or positions where these are equal
and with a boolean mask where they are not; pruning takes the product of CLS's query with the keys
beside it, `topk`, a gather and a weighted sum; captions are padded, under a boolean mask; targets
of masked pixels are cut out as bytes, then normalised. Of several ways to write a part it is the
one that was the fastest in `bench/results/` on the CPU, and runs without a host synchronisation.
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


def stock(model: nn.Module) -> nn.Module:
    """The same model without vidl's ops; it shares the parameters and buffers of the given one.

    Raises:
        ValueError: a module of it has options that are not written here.
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    shared |= {id(b): b for b in model.buffers()}
    made = copy.deepcopy(model, shared)
    for module in made.modules():
        swapped = SWAPS.get(type(module))
        if swapped is not None:
            module.__class__ = swapped
    return made


def heads(x: Tensor, count: int) -> Tensor:
    """[..., N, C] to [..., H, N, D]; a view."""
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[..., H, N, D] to [..., N, C]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-3, -2).flatten(-2)


def patches(video: Tensor, size: tuple[int, ...], channels: int) -> Tensor:
    """A clip [B, C, T t, H h, W w] as [B, T, H, W, t, h, w], and C as dimension `channels`."""
    t, h, w = size
    cut = video.unflatten(2, (-1, t)).unflatten(4, (-1, h)).unflatten(6, (-1, w))
    return cut.permute(0, 2, 4, 6, 3, 5, 7, 1).movedim(7, channels)


def constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling():  # they become a part of the program
        return torch.tensor(values, device=device, dtype=dtype)
    return _kept_constants(values, device, dtype)


@functools.cache  # a copy from the host is a synchronisation
def _kept_constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype)


class StockEmbed(MaskedPatchEmbed):
    """Every patch is embedded, then the visible ones are gathered."""

    def forward(
        self,
        video: Tensor,
        ids_keep: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position: Any = None,
    ) -> Tensor:
        if cu_seqlens is not None:
            raise ValueError("need as many visible patches in every clip")
        weight = self.proj.weight
        rows = patches(video, (1, *weight.shape[2:])[-3:], channels=4).contiguous()
        # [B, T, H, W, C, t, h, w]: bytes are moved, not floats
        if video.dtype == torch.uint8:
            rows = self._normalised(rows, torch.promote_types(weight.dtype, torch.float32))
        x = F.linear(rows.to(weight.dtype).flatten(4), weight.flatten(1), self.proj.bias)
        x = x.flatten(2, 3)  # [B, T, P, D]
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


class StockBlock(Block):
    """A ViT's block; where it prunes, as EViT does but with the weights of CLS alone."""

    def forward(self, x: Tensor, *args: Any, return_ids: bool = False, **options: Any) -> Any:
        pruning = self.pruning
        if args or options or (pruning is not None and pruning.when != "before_mlp"):
            raise ValueError("need equal samples, pruned before the MLP")
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
        """CLS, the best, and if wanted the sum or mean of the others."""
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
    """The attention of the first query to the others, averaged over heads: [B, N - 1]."""
    products = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.mT
    high = torch.promote_types(products.dtype, torch.float32)
    return products.softmax(-1, dtype=high)[:, :, 0, 1:].mean(1)


class StockDividedBlock(DividedBlock):
    """Divided attention by reshaping; CLS attends apart."""

    def forward(self, x: Tensor, space: Any, time: Any) -> Tensor:
        """x [B, 1 + K, C]; space and time: what `_Frames` or `_Masked` is."""
        through_time = self._attend(self.timeattn, self.norm3(x), time)
        x = x + self._attend(self.attn, self.norm1(x + through_time), space)
        return x + self.mlp(self.norm2(x))

    @staticmethod
    def _attend(attn: Any, x: Tensor, groups: "_Groups") -> Tensor:
        q, k, v = heads(attn.qkv(x), 3 * attn.num_heads).chunk(3, 1)
        return attn.proj(groups.attend(q, k, v))


class _Groups:
    """All tokens of a clip attend to one another."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, 1 + K, D] to [B, 1 + K, C]."""
        return attention(q, k, v)


class _Equal(_Groups):
    """Equal groups beside CLS: T of n neighbours (frames), or n of the T with as many between."""

    def __init__(self, T: int, through_time: bool) -> None:
        self.T, self.through_time = T, through_time

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, first = q.shape[0], attention(q[:, :, :1], k, v)
        # In a batch of four dimensions: of five none of the fused kernels takes.
        cut = (self._cut(q, False), self._cut(k, True), self._cut(v, True))
        out = attention(*(x.flatten(0, 1) for x in cut)).unflatten(0, (B, -1))  # [B, G, N, C]
        out = out.transpose(1, 2) if self.through_time else out
        return torch.cat([first, out.flatten(1, 2)], 1)

    def _cut(self, x: Tensor, with_cls: bool) -> Tensor:
        """[B, H, 1 + K, D] to [B, G, H, N, D], with CLS in front of each group if wanted."""
        groups = x[:, :, 1:].unflatten(2, (self.T, -1)).transpose(1, 2)
        groups = groups.permute(0, 3, 2, 1, 4) if self.through_time else groups
        if not with_cls:
            return groups
        cls = x[:, None, :, :1].expand(-1, groups.shape[1], -1, -1, -1)
        return torch.cat([cls, groups], 3)


class _Masked(_Groups):
    """Groups of any size, by a boolean mask.

    Args:
        labels: the group of each token after CLS, [B, K].
    """

    def __init__(self, labels: Tensor) -> None:
        labels = F.pad(labels, (1, 0), value=-1)
        same = labels[:, :, None] == labels[:, None]
        self.mask = (same | (labels < 0)[:, :, None] | (labels < 0)[:, None])[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.mask)


class StockSpaceTime(SpaceTimeTransformer):
    """The encoder of Frozen in Time, on batches in place of packed rows."""

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


class StockAttention(BertAttention):
    """Padded rows; `groups` is the boolean mask of keys that are words, or None."""

    def forward(self, x: Tensor, context: Tensor, groups: Any, backend: str) -> Tensor:
        project: Any = self.self
        q, k, v = (
            heads(y, self.heads)
            for y in (project.query(x), project.key(context), project.value(context))
        )
        return self.output(attention(q, k, v, groups), x)


class StockBert(Bert):
    """Captions padded to the longest."""

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
            raise ValueError("need clips with as many tokens each")
        visual = visual if partner is None else visual[partner]
        x, mask = text, _keys(attention_mask)
        for layer in self._layers()[self.text_layers :]:
            x = layer(x, mask, "", visual, None)
        return x


def _keys(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else (attention_mask != 0)[:, None, None]


class StockSelector(FrameSelector):
    """topk, and a gather of whole frames."""

    def forward(self, frames: Tensor, text: Tensor, tokens: Tensor) -> SelectedFrames:
        both = torch.cat([frames, text[:, None].expand(-1, frames.shape[1], -1)], -1)
        scores = self.fc2(self.act(self.fc1(both))).squeeze(-1)
        probabilities = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
        ids = probabilities.topk(self.keep).indices.sort(1).values
        kept = index_select(tokens.flatten(2), ids).unflatten(2, tokens.shape[2:])
        chosen = probabilities.gather(1, ids)
        factor = 1 + (chosen - chosen.detach())
        return SelectedFrames(kept * factor[..., None, None].to(tokens.dtype), ids, probabilities)


class StockPixels(MaskedPatchLoss):
    """The masked patches are gathered as bytes, then normalised; MAE's targets."""

    def forward(self, prediction: Tensor, video: Tensor, ids_mask: Tensor) -> Tensor:
        if self.options["target"] != "mae":
            raise ValueError("need MAE's targets")
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
                constants(tuple(each), video.device, high) for each in (self.mean, self.std)
            )
            target = (target / 255 - mean) / std
        target = target.flatten(2)
        if self.options["norm_pix"]:
            var, mean = torch.var_mean(target, -1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        return F.mse_loss(prediction.to(high), target)


SWAPS: dict[type, type] = {
    MaskedPatchEmbed: StockEmbed,
    Block: StockBlock,
    DividedBlock: StockDividedBlock,
    SpaceTimeTransformer: StockSpaceTime,
    BertAttention: StockAttention,
    Bert: StockBert,
    FrameSelector: StockSelector,
    MaskedPatchLoss: StockPixels,
}
