"""Tiny models of transformers with random weights, and their inputs."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TEXT = dict(
    vocab_size=50,
    hidden_size=64,
    num_attention_heads=2,
    intermediate_size=96,
    num_hidden_layers=2,
    max_position_embeddings=12,
)
VISION = dict(
    hidden_size=64,
    num_attention_heads=2,
    intermediate_size=96,
    num_hidden_layers=2,
    image_size=32,
    patch_size=8,
)
VIDEOMAE = dict(
    VISION,
    num_frames=4,
    decoder_hidden_size=64,
    decoder_num_attention_heads=2,
    decoder_num_hidden_layers=2,
    decoder_intermediate_size=96,
)
# BEiT's own layer scale of 0.1 would hide errors of its attention.
RELATIVE = dict(
    VISION,
    use_relative_position_bias=True,
    use_absolute_position_embeddings=False,
    use_mean_pooling=False,
    layer_scale_init_value=0.5,
    drop_path_rate=0.0,
)
SHARED = dict(RELATIVE, use_shared_relative_position_bias=True)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
BERT = dict(TEXT, **NO_DROPOUT)
LENGTHS = (9, 4, 1)  # of captions
PATCHES = 2 * 4 * 4  # of a clip of VideoMAE


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def captions() -> dict[str, Tensor]:
    """Three captions, padded to nine words."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 50, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return dict(input_ids=ids, attention_mask=mask.long())


def hidden(visible: Sequence[int] = (5, 5)) -> Tensor:
    """Masks of clips, [B, PATCHES] bool, with these numbers of visible patches."""
    generator = torch.Generator().manual_seed(1)
    ranks = torch.rand(len(visible), PATCHES, generator=generator).argsort(1).argsort(1)
    return ranks >= torch.tensor(visible)[:, None]


def clips() -> dict[str, Tensor]:
    return dict(pixel_values=randn(2, 4, 3, 32, 32))


def images() -> dict[str, Tensor]:
    return dict(pixel_values=randn(3, 3, 32, 32))


def bridgetower() -> nn.Module:
    vision = dict(hidden_size=64, num_hidden_layers=3, image_size=32, patch_size=8)
    config = transformers.BridgeTowerConfig(
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=96,
        num_hidden_layers=2,
        text_config=dict(BERT, num_hidden_layers=3),
        vision_config=vision,
    )
    return transformers.BridgeTowerModel(config)


def clip_like(kind: str, **vision: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        text_config=dict(TEXT, projection_dim=64),
        vision_config=dict(VISION, projection_dim=64, **vision),
        projection_dim=64,
    )
    return getattr(transformers, f"{kind}Model")(config)


@dataclass
class Case:
    """A model, its inputs, its outputs, and the outputs that count only at words."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    outputs: Sequence[str]
    words: Sequence[str] = field(default=())

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make()
        for parameter in model.parameters():  # no trivial biases and positions
            if parameter.ndim == 2 and parameter.std() > 0.5:
                parameter.data *= 0.1  # X-CLIP's prompts would multiply every rounding error
            parameter.data += 0.05 * torch.randn_like(parameter)
        return model.eval()


def simple(name: str, config: dict[str, Any], **options: Any) -> Callable[[], nn.Module]:
    kind = getattr(transformers, name)
    return lambda: kind(kind.config_class(**config), **options)


CASES = {
    "VideoMAEForPreTraining": Case(
        simple("VideoMAEForPreTraining", VIDEOMAE),
        lambda: dict(clips(), bool_masked_pos=hidden()),
        ("loss", "logits"),
    ),
    "VideoMAEForVideoClassification": Case(
        simple("VideoMAEForVideoClassification", VIDEOMAE), clips, ("logits",)
    ),
    "Vivit": Case(
        simple("VivitModel", dict(VISION, num_frames=4, tubelet_size=[2, 8, 8])),
        clips,
        ("last_hidden_state", "pooler_output"),
    ),
    "Timesformer": Case(
        simple("TimesformerModel", dict(VISION, num_frames=4)), clips, ("last_hidden_state",)
    ),
    "TimesformerJoint": Case(
        simple("TimesformerModel", dict(VISION, num_frames=4, attention_type="joint_space_time")),
        clips,
        ("last_hidden_state",),
    ),
    "ViT": Case(simple("ViTModel", VISION), images, ("last_hidden_state", "pooler_output")),
    "Beit": Case(
        simple("BeitModel", RELATIVE),
        images,
        ("last_hidden_state", "pooler_output"),
    ),
    "BeitShared": Case(
        simple("BeitModel", SHARED),
        images,
        ("last_hidden_state", "pooler_output"),
    ),
    "Data2VecVision": Case(simple("Data2VecVisionModel", RELATIVE), images, ("last_hidden_state",)),
    "Data2VecVisionShared": Case(
        simple("Data2VecVisionModel", dict(SHARED, use_relative_position_bias=False)),
        images,
        ("last_hidden_state",),
    ),
    "CLIP": Case(
        lambda: clip_like("CLIP"),
        lambda: dict(images(), **captions()),
        ("logits_per_image", "text_embeds", "image_embeds"),
    ),
    "Siglip": Case(
        lambda: clip_like("Siglip"),
        lambda: dict(images(), **captions()),
        ("logits_per_image", "text_embeds", "image_embeds"),
    ),
    "XCLIP": Case(
        lambda: clip_like(
            "XCLIP",
            num_frames=4,
            mit_hidden_size=64,
            mit_num_attention_heads=2,
            mit_intermediate_size=96,
            drop_path_rate=0.0,
        ),
        lambda: dict(clips(), **captions()),
        ("text_embeds", "video_embeds"),
    ),
    "Bert": Case(
        simple("BertModel", BERT),
        captions,
        ("last_hidden_state", "pooler_output"),
        ("last_hidden_state",),
    ),
    "BridgeTower": Case(
        bridgetower,
        lambda: dict(images(), **captions()),
        ("text_features", "image_features", "pooler_output"),
        ("text_features",),
    ),
}


def outputs(model: nn.Module, case: Case, dtype: torch.dtype, **more: Any) -> list[Tensor]:
    """The outputs of the model; for captions only at words, as padding has no meaning."""
    inputs = {
        name: x.to(dtype) if x.is_floating_point() else x for name, x in case.inputs().items()
    }
    out = model(**inputs, **more)
    mask = inputs.get("attention_mask")
    return [out[name][mask.bool()] if name in case.words else out[name] for name in case.outputs]


def results(model: nn.Module, case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The outputs, and their gradients with respect to all parameters."""
    model = copy.deepcopy(model).to(dtype)
    tensors = outputs(model, case, dtype)
    joined = torch.cat([x.flatten().to(tensors[0].dtype) for x in tensors])
    leaves = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(joined.shape, generator=generator, dtype=torch.float64).to(joined.dtype)
    grads = torch.autograd.grad(joined, leaves, numbers, allow_unused=True)
    return [
        *tensors,
        *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)),
    ]
