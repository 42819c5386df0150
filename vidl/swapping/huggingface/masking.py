"""ViT, ViViT, CLIP and SigLIP of transformers, trained on a random part of their patches.

X-CLIP is not supported: it averages patches at the same position over frames.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers.models.clip.modeling_clip as clip
import transformers.models.siglip.modeling_siglip as siglip
import transformers.models.vit.modeling_vit as vit
import transformers.models.vivit.modeling_vivit as vivit
from torch import Tensor, nn

from vidl.nn.patch_embed import embed
from vidl.swapping import patches
from vidl.swapping.registry import Family, full_name, remember, state_of
from vidl.swapping.report import Change


class Masking:
    """Embeds a random part of the patches in training; a subclass has `embed_visible`."""

    def forward(self, pixel_values: Tensor, *args: Any, **options: Any) -> Tensor:
        embeddings: Any = self
        if not masks(embeddings):
            return super().forward(pixel_values, *args, **options)  # type: ignore[misc]
        _refuse(*args, **options)
        return embeddings.embed_visible(pixel_values)


class ViTEmbeddings(Masking, vit.ViTEmbeddings):
    """ViT: a class token, then visible patches."""

    def embed_visible(self, pixels: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, 1 + K, C]."""
        x = visible(self, pixels.unsqueeze(2), self.position_embeddings[0, 1:])
        return self.dropout(_behind(self.cls_token + self.position_embeddings[:, :1], x))


class VivitEmbeddings(Masking, vivit.VivitEmbeddings):
    """ViViT: a class token, then visible tubelets."""

    def embed_visible(self, pixels: Tensor) -> Tensor:
        """[B, T, C_in, H, W] to [B, 1 + K, C]."""
        x = visible(self, pixels.transpose(1, 2), self.position_embeddings[0, 1:])
        return self.dropout(_behind(self.cls_token + self.position_embeddings[:, :1], x))


class CLIPVisionEmbeddings(Masking, clip.CLIPVisionEmbeddings):
    """CLIP: a class token, then visible patches."""

    def embed_visible(self, pixels: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, 1 + K, C]."""
        position = self.position_embedding(self.position_ids)[0]
        x = visible(self, pixels.unsqueeze(2), position[1:])
        return _behind((self.class_embedding + position[0])[None, None], x)


class SiglipVisionEmbeddings(Masking, siglip.SiglipVisionEmbeddings):
    """SigLIP: visible patches, without a class token."""

    def embed_visible(self, pixels: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, K, C]."""
        position = self.position_embedding(self.position_ids)[0]
        return visible(self, pixels.unsqueeze(2), position)


def masks(embeddings: nn.Module) -> bool:
    """Whether these embeddings mask patches now."""
    state = state_of(embeddings)
    assert state is not None
    return embeddings.training and state.memory["ratio"] > 0


def visible(embeddings: nn.Module, video: Tensor, position: Tensor) -> Tensor:
    """Embed a random part of the patches and add their position embeddings: [B, K, C].

    Args:
        video: [B, C_in, T, H, W].
        position: of all patches, [N, C].
    """
    state, projection = state_of(embeddings), _projection(embeddings)
    assert state is not None
    (B, N), device = (video.shape[0], position.shape[0]), video.device
    K = max(1, int(N * (1 - state.memory["ratio"])))
    ids = torch.rand(B, N, device=device).argsort(1)[:, :K].sort(1).values
    return embed(projection, video, position, ids, backend=state.backend)


def _behind(cls: Tensor, x: Tensor) -> Tensor:
    """Tokens of each sample after a class token, [1, 1, C]."""
    return torch.cat([cls.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)


def _refuse(*args: Any, **options: Any) -> None:
    """Raise if a mask or interpolated positions are given, which the original would accept."""
    given = [value for value in (*args, *options.values()) if value is not None]
    if any(isinstance(value, Tensor) or value for value in given):
        raise ValueError(
            "a model that masks random patches in training needs a call without bool_masked_pos "
            "and interpolate_pos_encoding; vidl.unswap(model) restores the one that takes them"
        )


def _projection(embeddings: Any) -> Any:
    if hasattr(embeddings, "patch_embeddings"):
        return embeddings.patch_embeddings.projection
    return embeddings.patch_embedding


SWAPPED: dict[type[nn.Module], type[nn.Module]] = {
    vit.ViTEmbeddings: ViTEmbeddings,
    vivit.VivitEmbeddings: VivitEmbeddings,
    clip.CLIPVisionEmbeddings: CLIPVisionEmbeddings,
    siglip.SiglipVisionEmbeddings: SiglipVisionEmbeddings,
}


def mask(model: nn.Module, ratio: float, backend: str) -> Sequence[Change]:
    """`vidl.mask` of encoders of transformers."""
    changes = []
    for name, module in model.named_modules():
        state = state_of(module)
        kind = type(module) if state is None else state.original
        if kind not in SWAPPED:
            continue
        reason = _why_not(module)
        if reason is None:
            state = remember(module, backend, swapped=SWAPPED[kind])
            state.memory["ratio"] = ratio
        became = full_name(SWAPPED[kind]) if reason is None else None
        note = f"masks {ratio:g} of its patches in training" if reason is None else reason
        changes.append(Change(name, full_name(kind), became, note))
    return changes


def _why_not(embeddings: Any) -> str | None:
    if getattr(embeddings, "mask_token", None) is not None:
        return "it has a mask token, so it embeds masked patches"
    projection = _projection(embeddings)
    # A projection that vidl.swap has changed was checked then.
    return None if state_of(projection) is not None else patches.why_not(projection)


FAMILY = Family(mask=mask)
