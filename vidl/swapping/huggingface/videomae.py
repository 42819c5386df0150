"""VideoMAE of transformers: what is masked is never embedded, and the loss reads the clip itself.

Its attention is in huggingface/attention.py. Source: VideoMAE, arXiv 2203.12602.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers.models.videomae.modeling_videomae as videomae
from torch import Tensor, nn
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.generic import can_return_tuple

from vidl.kernels.masked_patch_embed import masked_patch_embed
from vidl.kernels.masked_patch_loss import masked_patch_loss
from vidl.swapping.patches import whole_patches
from vidl.swapping.registry import Family, Rule, state_of


class VideoMAEEmbeddings(videomae.VideoMAEEmbeddings):
    """Embeds the visible patches only.

    `bool_masked_pos` is as before, [B, N] bool; or the visible patches themselves, [B, K] int64,
    for which nothing waits for the device. A clip is as before, or uint8: then it is normalised
    inside, as the image processor does it.
    """

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        patches, state = self.patch_embeddings, state_of(self)
        assert state is not None
        wanted = (patches.num_channels, *patches.image_size)
        if pixel_values.ndim != 5 or pixel_values.shape[2:] != wanted:
            raise ValueError(
                f"need pixel_values [B, T, {', '.join(map(str, wanted))}], got "
                f"{tuple(pixel_values.shape)}"
            )
        ids_keep = None
        if bool_masked_pos is not None:
            B, device = pixel_values.shape[0], pixel_values.device
            ids_keep = visible_patches(bool_masked_pos, B, self.num_patches, device)
        mean, std = normalisation(pixel_values)
        return masked_patch_embed(
            pixel_values.transpose(1, 2),
            patches.projection.weight,
            patches.projection.bias,
            position_table(self, pixel_values.device),
            ids_keep,
            mean=mean,
            std=std,
            backend=state.backend,
        )


class VideoMAEForPreTraining(videomae.VideoMAEForPreTraining):
    """Indices instead of boolean masks, and no label is ever stored."""

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
        hidden = self.mask_token + positions[masked]
        logits = self.decoder(torch.cat([x + positions[keep], hidden], 1), masked.shape[1]).logits
        mean, std = normalisation(pixel_values)
        if pixel_values.is_floating_point() and config.num_channels == 3:
            mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        elif not pixel_values.is_floating_point():
            mean = std = None  # the target of a uint8 clip is its pixels from 0 to 1
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


def visible_patches(mask: Tensor, B: int, N: int, device: torch.device) -> Tensor:
    """The visible patches of each clip, [B, K] int64.

    K must be known on the host. Of a boolean mask on a GPU that is one number to wait for;
    `torch.compile` takes it from the mask that it is compiled with, and the graph checks the
    others.

    Args:
        mask: [B, N] bool, or the visible patches [B, K] int64.

    Raises:
        ValueError: shapes do not fit, or samples have unequally many visible patches.
        RuntimeError: compiled, there are more or fewer visible patches than in the mask it was
            compiled with (on CUDA as a device-side assertion).
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
        torch._assert_async(fits, f"need {K} visible patches a clip, as when this was compiled")
    return torch.argsort(mask.byte(), dim=1, stable=True)[:, :K]


def other_patches(ids: Tensor, N: int) -> Tensor:
    """The patches that `ids`, [B, K], does not name, [B, N - K] in ascending order.

    Raises:
        RuntimeError: it names one twice (on CUDA as a device-side assertion).
    """
    B, K = ids.shape
    named = torch.zeros(B, N, dtype=torch.bool, device=ids.device).scatter(1, ids, True)
    torch._assert_async((named.sum(1) == K).all(), "need every visible patch once")
    return torch.argsort(named.byte(), dim=1, stable=True)[:, : N - K]


@torch.compiler.assume_constant_result
def _visible(mask: Tensor) -> int:
    """Patches that are visible in each sample."""
    counts = (~mask).sum(1)
    least, most = torch.stack(counts.aminmax()).tolist() if counts.numel() else (0, 0)
    if least != most:
        raise ValueError(
            f"need as many visible patches in every clip of a batch, got from {least} to {most}"
        )
    return least


def position_table(module: nn.Module, device: torch.device) -> Tensor:
    """The sines and cosines, [N, C]; they move to a device once, and not in every step."""
    table = module.position_embeddings
    assert isinstance(table, Tensor)
    if table.device != device:
        module.position_embeddings = table = table.to(device)
    return table[0]


def normalisation(pixels: Tensor) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Mean and deviation of a uint8 clip."""
    if pixels.dtype != torch.uint8 or pixels.shape[2] != 3:
        return None, None
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def _whole(embeddings: Any) -> str | None:
    patches = embeddings.patch_embeddings
    if type(patches) is not videomae.VideoMAEPatchEmbeddings:
        return f"patch_embeddings is {type(patches).__name__}, which may compute something else"
    return whole_patches(patches.projection)


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
