"""The last feature map of a CNN as a grid of visual tokens."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_count,
    check_dtype,
    check_shape,
    check_tensors,
    require,
)
from vidl.kernels.patches import check_video, per_channel
from vidl.nn.arguments import check_dropout, check_state
from vidl.nn.bert import EPS
from vidl.nn.checkpoints import load_or_explain

STRIDES = (8, 16, 32)


class GridFeatures(nn.Module):
    """A ResNet of timm whose last feature map gives the tokens of clips.

        grid  = mean over the frames of ReLU(maxpool 2x2(conv 3x3(ResNet(frame))))
        token = LayerNorm(grid + row + column + type)

    A place of the grid covers twice the stride of the CNN in pixels. Parameters of the CNN are
    named as in timm and torchvision. Its batch norms use their running statistics also in training,
    which keeps the statistics of pretrained weights; their weights and biases learn. Source:
    ClipBERT, arXiv 2102.06183, 3.2.

    Args:
        cnn: name of a ResNet in timm, such as "resnet50".
        width: channels of a token, C.
        stride: pixels between neighbours in the last feature map of the CNN: 8, 16 or 32. Below 32
            the last stages are dilated.
        places: rows, and columns, that have an embedding; the largest grid has so many of each.
        dropout: rate for the tokens.
        mean, std: normalisation of uint8 clips; None: floating-point clips only.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: timm has no such ResNet, or a number is out of range.
    """

    def __init__(
        self,
        cnn: str = "resnet50",
        width: int = 768,
        stride: int = 32,
        places: int = 100,
        dropout: float = 0.1,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_count("width", width, 1)
        check_count("places", places, 1)
        check_dropout(dropout)
        check_stride(stride)
        per_channel(3, mean, std)
        self.width, self.stride, self.places = width, stride, places
        self.cnn = _resnet(cnn, stride)
        self.conv = nn.Conv2d(self.cnn.num_features, width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        self.row_pos_embed = nn.Parameter(torch.empty(places, width))
        self.col_pos_embed = nn.Parameter(torch.empty(places, width))
        self.token_type_embeddings = nn.Embedding(1, width)
        for table in (self.row_pos_embed, self.col_pos_embed, self.token_type_embeddings.weight):
            nn.init.normal_(table, std=0.02)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        for name, values, neutral in (("mean", mean, 0.0), ("std", std, 1.0)):
            numbers = torch.tensor([neutral] * 3 if values is None else list(values))
            self.register_buffer(name, numbers.view(3, 1, 1), persistent=False)
        self.takes_bytes = mean is not None and std is not None
        self.train()  # a new batch norm would learn statistics

    def forward(self, video: Tensor, views: int = 1, ids_keep: Tensor | None = None) -> Tensor:
        """Compute the tokens of clips.

        Args:
            video: [B, 3, T, H, W], uint8 or normalised; any strides. H and W are multiples of twice
                the stride.
            views: parts of T / views consecutive frames; the frames of a part are averaged.
            ids_keep: the kept places of all parts, [B, K] int64 in [0, P) with P = views * rows *
                columns, part after part, the same number of each part; None: all places.

        Returns:
            [B, views, K / views, C].

        Raises:
            TypeError, ValueError: shapes, dtypes or numbers do not fit.
        """
        frames = self._frames(video, views)
        maps = F.relu(F.max_pool2d(self.conv(self.cnn.forward_features(frames)), 2))
        rows, columns = maps.shape[2:]
        B, P = video.shape[0], rows * columns
        grid = maps.unflatten(0, (B, views, -1)).mean(2).flatten(3).mT  # [B, views, P, C]
        places = self.row_pos_embed[:rows, None] + self.col_pos_embed[None, :columns]
        places = (places + self.token_type_embeddings.weight[0]).flatten(0, 1).expand_as(grid)
        x = (grid + places).flatten(1, 2)
        if ids_keep is not None:
            self._check_ids(x, ids_keep, views, P)
            x = x.gather(1, ids_keep[..., None].expand(-1, -1, self.width))
        return self.dropout(self.norm(x)).unflatten(1, (views, -1))

    def train(self, mode: bool = True) -> "GridFeatures":
        """Set the training mode, in which batch norms keep their statistics."""
        super().train(mode)
        for module in self.cnn.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Load the weights of a ResNet of timm or torchvision into the CNN.

        Set `mean` and `std` to those that the weights were trained with: those of ImageNet for
        both libraries.

        Returns:
            The names of weights that were skipped: the classifier.

        Raises:
            ValueError: weights are missing, unexpected or of another shape (all are named).
        """
        check_state(state_dict)
        weights = {name.removeprefix("module."): x for name, x in state_dict.items()}
        skipped = [name for name in weights if name.startswith("fc.")]
        counters = [n for n in self.cnn.state_dict() if n.endswith(".num_batches_tracked")]
        kept = {name: x for name, x in weights.items() if name not in skipped}
        load_or_explain(self.cnn, kept, may_miss=counters)
        return skipped

    def _frames(self, video: Tensor, views: int) -> Tensor:
        """Check the clips; their frames, normalised, [B T, 3, H, W]."""
        check_tensors(video=video, model=self.conv.weight)
        check_video(video)
        check_count("views", views, 1)
        check_shape("video", video, "B", 3, "T", "H", "W")
        T, H, W = video.shape[2:]
        cell = 2 * self.stride
        if T == 0 or T % views:
            raise ValueError(f"need video of {views} views with equally many frames, got {T}")
        if H % cell or W % cell or not 0 < max(H, W) <= cell * self.places:
            raise ValueError(
                f"need video whose height and width are multiples of {cell}, up to "
                f"{cell * self.places}, got {tuple(video.shape)}"
            )
        frames = video.transpose(1, 2).flatten(0, 1)
        if video.is_floating_point():
            return frames
        if not self.takes_bytes:
            raise ValueError("need mean and std of GridFeatures for a video in uint8")
        mean: Any = self.mean
        std: Any = self.std
        return (frames.to(mean.dtype) / 255 - mean) / std

    def _check_ids(self, x: Tensor, ids_keep: Tensor, views: int, places: int) -> None:
        check_tensors(video=x, ids_keep=ids_keep)
        check_dtype("ids_keep", ids_keep, torch.int64)
        check_shape("ids_keep", ids_keep, x.shape[0], "K")
        if ids_keep.shape[1] % views:
            raise ValueError(
                f"need ids_keep with equally many places of {views} views, got "
                f"{tuple(ids_keep.shape)}"
            )
        part = torch.arange(ids_keep.shape[1], device=x.device) // (ids_keep.shape[1] // views or 1)
        inside = (ids_keep // places == part).all()
        require(inside, "need ids_keep in [0, {places}) of each view", places=places)


def check_stride(stride: int) -> None:
    """The stride of a CNN is one that timm can build."""
    check_count("stride", stride)
    if stride not in STRIDES:
        raise ValueError(f"need stride among {', '.join(map(str, STRIDES))}, got {stride}")


def _resnet(name: str, stride: int) -> Any:
    """A ResNet of timm with random weights, without classifier."""
    import timm

    if not isinstance(name, str):
        raise TypeError(f"need cnn as the name of a ResNet in timm, got {name!r}")
    names = timm.list_models(module="resnet")
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"need cnn as the name of a ResNet in timm, got {name!r}{hint}")
    return timm.create_model(name, num_classes=0, global_pool="", output_stride=stride)
