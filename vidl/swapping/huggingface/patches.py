"""The convolutions by which encoders of transformers embed patches of images and clips."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vidl.kernels.masked_patch_embed import masked_patch_embed
from vidl.swapping.huggingface.attention import defining_file
from vidl.swapping.patches import embed_images, speed, stays, why_not
from vidl.swapping.registry import Family, full_name, remember, state_of
from vidl.swapping.report import Change

# The module that owns the convolution and the name of its attribute, by the folder that defines
# the module. For VideoMAE see huggingface/videomae.py.
OWNERS = {
    "beit": ("BeitPatchEmbeddings", "projection"),
    "bridgetower": ("BridgeTowerVisionEmbeddings", "patch_embedding"),
    "clip": ("CLIPVisionEmbeddings", "patch_embedding"),
    "data2vec": ("Data2VecVisionPatchEmbeddings", "projection"),
    "siglip": ("SiglipVisionEmbeddings", "patch_embedding"),
    "timesformer": ("TimesformerPatchEmbeddings", "projection"),
    "vit": ("ViTPatchEmbeddings", "projection"),
    "vivit": ("VivitTubeletEmbeddings", "projection"),
    "x_clip": ("XCLIPVisionEmbeddings", "patch_embedding"),
}


class Conv2d(nn.Conv2d):
    """The convolution as one matmul, if a vidl kernel runs it."""

    swapped_convolution = True  # for is_convolution

    def forward(self, x: Tensor) -> Tensor:
        state = state_of(self)
        # peft builds its adapter of a convolution by the class of that convolution.
        if state is None or stays(self, x, state.backend):
            return super().forward(x)
        h, w = (n // p for n, p in zip(x.shape[2:], self.kernel_size, strict=True))
        x = x[..., : h * self.kernel_size[0], : w * self.kernel_size[1]]  # as a convolution does
        return embed_images(self, x, state.backend).transpose(1, 2).unflatten(2, (h, w))


class Conv3d(nn.Conv3d):
    """The convolution as one matmul: PyTorch's Conv3d is slow, above all in bfloat16."""

    swapped_convolution = True  # for is_convolution

    def forward(self, x: Tensor) -> Tensor:
        state = state_of(self)
        if state is None:
            return super().forward(x)
        grid = [n // p for n, p in zip(x.shape[2:], self.kernel_size, strict=True)]
        T, H, W = (n * p for n, p in zip(grid, self.kernel_size, strict=True))
        video = x[..., :T, :H, :W]
        tokens = masked_patch_embed(video, self.weight, self.bias, backend=state.backend)
        return tokens.transpose(1, 2).unflatten(2, grid)  # the models transpose back


def _swap(model: nn.Module, backend: str) -> Sequence[Change]:
    changes = []
    for name, module in model.named_modules():
        kind = type(module)
        owner, attribute = OWNERS.get(defining_file(kind), ("", ""))
        if kind.__name__ != owner:
            continue
        projection: Any = getattr(module, attribute)
        name = f"{name}.{attribute}" if name else attribute
        was, became, note = full_name(type(projection)), None, why_not(projection)
        if note is None:
            swapped = Conv2d if type(projection) is nn.Conv2d else Conv3d
            remember(projection, backend, swapped=swapped)
            became = full_name(swapped)
            note = speed(projection, backend) if swapped is Conv2d else ""
        changes.append(Change(name, was, became, note or ""))
    return changes


FAMILY = Family(whole=_swap)
