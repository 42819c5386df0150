"""VideoMAE of transformers: masked patches are never embedded, and the loss reads the clip.

For its attention see huggingface/attention.py. Source: VideoMAE, arXiv 2203.12602.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers.models.videomae.modeling_videomae as videomae
from torch import Tensor, nn
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.generic import can_return_tuple

from vidl.kernels.constant import assume_constant
from vidl.kernels.masked_patch_loss import masked_patch_loss
from vidl.nn.patch_embed import embed
from vidl.swapping import patches as convolutions
from vidl.swapping.registry import Family, Rule, state_of


class VideoMAEEmbeddings(videomae.VideoMAEEmbeddings):
    """Embeds only visible patches.

    `bool_masked_pos` is a mask [B, N] bool as in the original, or the indices of the visible
    patches, [B, K] int64, which need no host synchronisation. A clip is floating point as in the
    original, or uint8: then it is normalised inside as by the image processor.
    """

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        patches, state = self.patch_embeddings, state_of(self)
        assert state is not None
        expected = (patches.num_channels, *patches.image_size)
        if pixel_values.ndim != 5 or pixel_values.shape[2:] != expected:
            raise ValueError(
                f"need pixel_values [B, T, {', '.join(map(str, expected))}], got "
                f"{tuple(pixel_values.shape)}"
            )
        ids_keep = None
        if bool_masked_pos is not None:
            B, device = pixel_values.shape[0], pixel_values.device
            ids_keep = visible_patches(bool_masked_pos, B, self.num_patches, device)
        mean, std = normalisation(pixel_values)
        return embed(
            patches.projection,
            pixel_values.transpose(1, 2),
            position_table(self, pixel_values.device),
            ids_keep,
            mean=mean,
            std=std,
            backend=state.backend,
        )


class VideoMAEForPreTraining(videomae.VideoMAEForPreTraining):
    """Works on indices instead of boolean masks, and never stores the labels."""

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor, **kwargs: Any
    ) -> videomae.VideoMAEForPreTrainingOutput:
        state, config = state_of(self), self.config
        assert state is not None
        if bool_masked_pos is None:
            raise ValueError("need bool_masked_pos [B, N] bool, or visible patches [B, K] int64")
        if not config.norm_pix_loss and config.num_channels != 3:
            raise ValueError(f"need 3 channels without norm_pix_loss, got {config.num_channels}")
        B, N = pixel_values.shape[0], self.videomae.embeddings.num_patches
        keep = visible_patches(bool_masked_pos, B, N, pixel_values.device)
        masked = other_patches(keep, N)
        outputs = self.videomae(pixel_values, bool_masked_pos=keep, **kwargs)
        x = self.encoder_to_decoder(outputs.last_hidden_state)
        dtype = pixel_values.dtype if pixel_values.is_floating_point() else self.mask_token.dtype
        positions = position_table(self, pixel_values.device).to(dtype)
        mask_tokens = self.mask_token + positions[masked]
        tokens = torch.cat([x + positions[keep], mask_tokens], 1)
        logits = self.decoder(tokens, masked.shape[1]).logits
        mean, std = normalisation(pixel_values)
        if pixel_values.is_floating_point() and config.num_channels == 3:
            mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        elif not pixel_values.is_floating_point():
            mean = std = None  # the target of a uint8 clip is its pixels in [0, 1]
        loss = masked_patch_loss(
            logits,
            pixel_values.detach().transpose(1, 2),
            masked,
            patch_size=config.patch_size,
            tubelet_size=config.tubelet_size,
            target="videomae",
            norm_pix=config.norm_pix_loss,
            mean=mean,
            std=std,
            backend=state.backend,
        )
        return videomae.VideoMAEForPreTrainingOutput(
            loss=loss.to(torch.promote_types(logits.dtype, dtype)),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def original_arguments(
        self, pixel_values: Tensor, bool_masked_pos: Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of the original model: a normalised clip and a boolean mask."""
        mean, std = normalisation(pixel_values)
        if mean is not None and std is not None:
            scale = [
                torch.tensor(x, device=pixel_values.device)[:, None, None] for x in (mean, std)
            ]
            pixel_values = (pixel_values / 255 - scale[0]) / scale[1]
        if bool_masked_pos.dtype != torch.bool:
            N = self.videomae.embeddings.num_patches
            ids, size = bool_masked_pos, (len(bool_masked_pos), N)
            masked = torch.ones(size, dtype=torch.bool, device=ids.device)
            bool_masked_pos = masked.scatter(1, ids, False)
        return {"pixel_values": pixel_values, "bool_masked_pos": bool_masked_pos, **kwargs}


def visible_patches(mask: Tensor, B: int, N: int, device: torch.device) -> Tensor:
    """The visible patches of each clip, [B, K] int64.

    K must be known on the host, so a boolean mask on a GPU costs one host synchronisation.
    `torch.compile` takes K from the mask that it compiles with, and the graph checks later masks.

    Args:
        mask: [B, N] bool, or the visible patches [B, K] int64.

    Raises:
        ValueError: shapes do not fit, or clips differ in their number of visible patches.
        RuntimeError: in a compiled graph, the number of visible patches differs from that at
            compilation (on CUDA as a device-side assertion).
    """
    if mask.dtype == torch.int64 and mask.ndim == 2 and mask.shape[0] == B and mask.shape[1] <= N:
        return mask.to(device)
    if mask.dtype != torch.bool or mask.shape != (B, N):
        raise ValueError(
            f"need bool_masked_pos [{B}, {N}] bool, or visible patches [{B}, K] int64, got "
            f"{tuple(mask.shape)} {mask.dtype}"
        )
    K = _visible(mask)
    mask = mask.to(device)
    if torch.compiler.is_compiling():
        fits = (mask.sum(1) == N - K).all()
        torch._assert_async(fits, f"need {K} visible patches in each clip, as at compilation")
    return torch.argsort(mask.byte(), dim=1, stable=True)[:, :K]


def other_patches(ids: Tensor, N: int) -> Tensor:
    """The patches that are not in `ids`, [B, K], in ascending order: [B, N - K].

    Raises:
        RuntimeError: `ids` has duplicates (on CUDA as a device-side assertion).
    """
    B, K = ids.shape
    visible = torch.zeros(B, N, dtype=torch.bool, device=ids.device).scatter(1, ids, True)
    torch._assert_async((visible.sum(1) == K).all(), "need every visible patch once")
    return torch.argsort(visible.byte(), dim=1, stable=True)[:, : N - K]


@assume_constant
def _visible(mask: Tensor) -> int:
    """The number of visible patches in each clip."""
    counts = (~mask).sum(1)
    least, most = torch.stack(counts.aminmax()).tolist() if counts.numel() else (0, 0)
    if least != most:
        raise ValueError(
            f"need the same number of visible patches in each clip, got {least} to {most}"
        )
    return least


def position_table(module: nn.Module, device: torch.device) -> Tensor:
    """The fixed position embeddings, [N, C], moved to the device once instead of in every step."""
    table = module.position_embeddings
    assert isinstance(table, Tensor)
    if table.device != device:
        module.position_embeddings = table = table.to(device)
    return table[0]


def normalisation(pixels: Tensor) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Mean and standard deviation for a uint8 clip; None for others."""
    if pixels.dtype != torch.uint8 or pixels.shape[2] != 3:
        return None, None
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def _whole(embeddings: Any) -> str | None:
    patches = embeddings.patch_embeddings
    if type(patches) is not videomae.VideoMAEPatchEmbeddings:
        return f"patch_embeddings is {type(patches).__name__}, which may compute something else"
    return convolutions.why_not(patches.projection)


def _pretraining(model: Any) -> str | None:
    embeddings = model.videomae.embeddings
    if state_of(embeddings) is not None:
        return None
    return _whole(embeddings)


FAMILY = Family(
    rules=[
        Rule(videomae.VideoMAEEmbeddings, VideoMAEEmbeddings, _whole),
        Rule(videomae.VideoMAEForPreTraining, VideoMAEForPreTraining, _pretraining),
    ],
)
