"""Does `vidl.swap` speed up a training step of a model of timm or transformers?

Forward and backward through all weights of a model with random weights; the optimizer step is the
same for all candidates and left out. A workload names the model, the batch and the baselines. The
output of every candidate is compared first, and the gradient of the first weights, to which all
later layers contribute.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import vidl
from vidl.bench.measure.cases import Candidate, Work, ours
from vidl.bench.ops.pruning import Attention, matrix, sdpa_and_product
from vidl.bench.ops.select_tokens import gather
from vidl.ops import kept_count

OPS = ("masked_patch_embed", "space_time_attention", "select_tokens")
PARAMETERS = ("first",)
Sizes = dict[str, Any]
Change = Callable[[nn.Module, Sizes], None]  # changes a model in place before its first step


@dataclass(frozen=True)
class Inputs:
    """A batch; the workload defines x and mask."""

    x: Tensor
    mask: Tensor | None
    first: Tensor  # a placeholder for the model's first weights; receives their gradient
    grad: Tensor  # of the output
    sizes: Sizes


@dataclass(frozen=True)
class Workload:
    """A model in training, described by functions.

    Attributes:
        model: builds the model with its library.
        first: returns the first weights of a model.
        batch: draws x and the mask; also returns the shape of the output.
        forward: computes the output from a model, x and the mask.
        swap: swaps vidl's kernels into a model.
        baselines: returns the changes that make a model a baseline, by name.
        multiplications: counts the multiply-adds of a forward.
    """

    model: Callable[[Sizes], nn.Module]
    first: Callable[[Any], Tensor]
    batch: Callable[[Sizes, torch.Generator], tuple[Tensor, Tensor | None, tuple[int, ...]]]
    forward: Callable[[Any, Tensor, Tensor | None], Tensor]
    swap: Callable[[nn.Module, Sizes, str], None]
    baselines: Callable[[Sizes], dict[str, Change]]
    multiplications: Callable[[Sizes], int]


def make(*, dtype: torch.dtype, device: str, generator: torch.Generator, **sizes: Any) -> Inputs:
    workload = WORKLOADS[sizes["model"]]
    x, mask, shape = workload.batch(sizes, generator)
    x = x.to(device, dtype if x.is_floating_point() else None)
    grad = (torch.randn(shape, generator=generator) / shape[0]).to(device, dtype)
    first = torch.zeros_like(workload.first(outline(frozen(sizes))), device=device, dtype=dtype)
    return Inputs(x, None if mask is None else mask.to(device), first, grad, sizes)


def work(*, dtype: torch.dtype, **sizes: Any) -> dict[str, Work]:
    """Weights are read in each pass, their gradients written; backward has twice the FLOPs."""
    weights = sum(p.numel() for p in outline(frozen(sizes)).parameters()) * dtype.itemsize
    flops = 2 * WORKLOADS[sizes["model"]].multiplications(sizes)
    return {"forward": Work(weights, flops), "backward": Work(2 * weights, 2 * flops)}


def truth(inputs: Inputs) -> Tensor:
    changes = WORKLOADS[inputs.sizes["model"]].baselines(inputs.sizes)
    return step(inputs, next(iter(changes)))


def step(inputs: Inputs, variant: str) -> Tensor:
    """The output of a variant of the model; its backward goes through all weights."""
    model = changed(frozen(inputs.sizes), variant, inputs.grad.device, inputs.grad.dtype)
    workload = WORKLOADS[inputs.sizes["model"]]
    out = workload.forward(model, inputs.x, inputs.mask)
    if not torch.is_grad_enabled():
        return out
    return AllWeights.apply(inputs.first, [out], model, workload.first(model))


class AllWeights(torch.autograd.Function):
    """Returns the one gradient that the harness asks for, after computing those of all weights."""

    @staticmethod
    def forward(ctx, first, out, model, weights):
        ctx.out, ctx.model, ctx.weights = out[0], model, weights
        return out[0].detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.model.zero_grad()
        torch.autograd.backward(ctx.out, grad)
        return ctx.weights.grad, None, None, None


def frozen(sizes: Sizes) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(sizes.items()))


@functools.lru_cache(maxsize=8)
def outline(sizes: tuple[tuple[str, Any], ...]) -> nn.Module:
    """The model on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return WORKLOADS[dict(sizes)["model"]].model(dict(sizes))


@functools.lru_cache(maxsize=8)
def changed(
    sizes: tuple[tuple[str, Any], ...], variant: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A variant of the model; all variants have the same weights.

    Args:
        variant: "vidl <backend>", or the name of a baseline of the workload.
    """
    named = dict(sizes)
    workload = WORKLOADS[named["model"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = workload.model(named)
    model = model.to(device, dtype)
    if variant.startswith("vidl "):
        workload.swap(model, named, variant.removeprefix("vidl "))
    else:
        workload.baselines(named)[variant](model, named)
    return model


def candidates(sizes: Sizes, device: str, dtype: torch.dtype) -> list[Candidate]:
    """vidl with each backend, and the baselines of the workload."""

    def swapped(inputs: Inputs, backend: str) -> Tensor:
        return step(inputs, f"vidl {backend}")

    names = WORKLOADS[sizes["model"]].baselines(sizes)
    others = [Candidate(n, "baseline", functools.partial(step, variant=n)) for n in names]
    return [*ours(OPS, swapped, device, dtype), *others]


LAYERS = (3, 6, 9)  # of timm's ViT that prune


def vit(sizes: Sizes) -> nn.Module:
    import timm

    return timm.create_model(sizes["name"], **dict(sizes.get("options", ())))


def vit_batch(
    sizes: Sizes, generator: torch.Generator
) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
    model: Any = outline(frozen(sizes))
    pixels = torch.randn(sizes["B"], 3, *model.patch_embed.img_size, generator=generator)
    return pixels, None, (sizes["B"], model.num_classes)


def swap_vit(model: nn.Module, sizes: Sizes, backend: str) -> None:
    if sizes["rate"] < 1:
        vidl.prune(model, sizes["rate"], LAYERS, fuse="sum", backend=backend)
    else:
        vidl.swap(model, backend=backend)


class EvitBlock(nn.Module):
    """A timm block that prunes like EViT, in plain PyTorch."""

    def __init__(self, block: Any, rate: float, attention: Attention) -> None:
        super().__init__()
        self.block, self.rate, self.attention = block, rate, attention

    def forward(self, x: Tensor) -> Tensor:
        block, attn = self.block, self.block.attn
        qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim))
        out, scores = self.attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + attn.proj(out.transpose(1, 2).flatten(2))
        ids = scores.topk(kept_count(x.shape[1] - 1, self.rate), sorted=False).indices
        ids = ids.sort(1).values
        fused = scores.scatter(1, ids, 0.0).to(x.dtype)[:, None] @ x[:, 1:]
        x = torch.cat([x[:, :1], gather(x, ids + 1), fused], 1)
        return x + block.mlp(block.norm2(x))


def evit(model: Any, sizes: Sizes, *, attention: Attention) -> None:
    for layer in LAYERS:
        model.blocks[layer] = EvitBlock(model.blocks[layer], sizes["rate"], attention)


def vit_baselines(sizes: Sizes) -> dict[str, Change]:
    if sizes["rate"] == 1:
        return {"timm": lambda model, sizes: None}
    return {
        "timm, SDPA + CLS product": functools.partial(evit, attention=sdpa_and_product),
        "timm, attention matrix": functools.partial(evit, attention=matrix),
    }


def vit_multiplications(sizes: Sizes) -> int:
    model: Any = outline(frozen(sizes))
    C, N = model.embed_dim, model.patch_embed.num_patches + 1
    weights = model.patch_embed.proj.weight.numel() * (N - 1)
    for layer, block in enumerate(model.blocks):
        linear = sum(p.numel() for p in block.parameters() if p.ndim == 2)
        mlp = sum(p.numel() for p in block.mlp.parameters() if p.ndim == 2)
        before = N
        if sizes["rate"] < 1 and layer in LAYERS:
            N = kept_count(N - 1, sizes["rate"]) + 2
        weights += before * (linear - mlp) + 2 * before * before * C + N * mlp
    return sizes["B"] * (weights + model.head.weight.numel())


def video_mae(sizes: Sizes) -> nn.Module:
    import transformers

    return transformers.VideoMAEForPreTraining(
        transformers.VideoMAEConfig(**dict(sizes.get("options", {})))
    )


def tubes(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Clips with tube masks: the same patches are masked in all frames."""
    config: Any = outline(frozen(sizes)).config
    pixels, slices = config.image_size, config.num_frames // config.tubelet_size
    clip = torch.randn(sizes["B"], config.num_frames, 3, pixels, pixels, generator=generator)
    P = (pixels // config.patch_size) ** 2
    ranks = torch.rand(sizes["B"], P, generator=generator).argsort(1).argsort(1)
    return clip, (ranks >= sizes["visible"]).repeat(1, slices), (1,)


def video_mae_multiplications(sizes: Sizes) -> int:
    model: Any = outline(frozen(sizes))
    config, N = model.config, model.videomae.embeddings.num_patches
    visible = config.num_frames // config.tubelet_size * sizes["visible"]
    weights = model.videomae.embeddings.patch_embeddings.projection.weight.numel()
    weights += model.encoder_to_decoder.weight.numel()
    total = visible * weights + (N - visible) * model.decoder.head.weight.numel()
    for layers, rows in (
        (model.videomae.encoder.layer, visible),
        (model.decoder.decoder_layers, N),
    ):
        total += sum(layer_multiplications(layer, rows) for layer in layers)
    return sizes["B"] * total


def layer_multiplications(layer: nn.Module, rows: int) -> int:
    """Multiply-adds of a transformers layer for one sample of `rows` tokens."""
    matrices = [p for p in layer.parameters() if p.ndim == 2]
    return rows * sum(p.numel() for p in matrices) + 2 * rows * rows * matrices[0].shape[1]


def bert(sizes: Sizes) -> nn.Module:
    import transformers

    options = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    return transformers.BertModel(
        transformers.BertConfig(**options, **dict(sizes.get("options", {})))
    )


def words(sizes: Sizes) -> Tensor:
    """The number of words of each caption, 8 to 20."""
    return 8 + 5 * torch.arange(sizes["B"]) % 13


def padded(sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    B, L = sizes["B"], sizes["L"]
    config: Any = outline(frozen(sizes)).config
    ids = torch.randint(1, config.vocab_size, (B, L), generator=generator)
    return ids, (torch.arange(L) < words(sizes)[:, None]).long(), (B, L, config.hidden_size)


def of_words(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The hidden states of words; those at padding are undefined, and set to zero."""
    assert mask is not None
    hidden = model(ids, mask).last_hidden_state
    return hidden.masked_fill(mask[..., None] == 0, 0)


def bert_multiplications(sizes: Sizes) -> int:
    model: Any = outline(frozen(sizes))
    lengths = words(sizes).tolist()
    return sum(layer_multiplications(layer, n) for layer in model.encoder.layer for n in lengths)


def transformers_alone(sizes: Sizes) -> dict[str, Change]:
    return {"transformers": lambda model, sizes: None}


def swap_all(model: nn.Module, sizes: Sizes, backend: str) -> None:
    vidl.swap(model, backend=backend)


WORKLOADS = {
    "vit": Workload(
        vit,
        lambda model: model.patch_embed.proj.weight,
        vit_batch,
        lambda model, x, mask: model(x),
        swap_vit,
        vit_baselines,
        vit_multiplications,
    ),
    "videomae": Workload(
        video_mae,
        lambda model: model.videomae.embeddings.patch_embeddings.projection.weight,
        tubes,
        lambda model, x, mask: model(x, mask).loss[None],
        swap_all,
        transformers_alone,
        video_mae_multiplications,
    ),
    "bert": Workload(
        bert,
        lambda model: model.embeddings.position_embeddings.weight,
        padded,
        of_words,
        swap_all,
        transformers_alone,
        bert_multiplications,
    ),
}

_VIT = dict(model="vit", name="vit_base_patch16_224", B=dict(cuda=64, cpu=4))
SHAPES: dict[str, Sizes] = {}
if find_spec("timm") is not None:
    SHAPES["ViT-B/16"] = _VIT | dict(rate=1.0)
    SHAPES["ViT-B/16, keep 0.7 in layers 3, 6, 9"] = _VIT | dict(rate=0.7)

_MAE = dict(model="videomae", visible=20, B=dict(cuda=32, cpu=1))
_BERT = dict(model="bert", B=dict(cuda=256, cpu=16))
if find_spec("transformers") is not None:
    SHAPES["VideoMAE-B, 90 % masked"] = _MAE
    SHAPES["BERT-base, 8 to 20 words padded to 32"] = _BERT | dict(L=32)
    SHAPES["BERT-base, 8 to 20 words padded to 20"] = _BERT | dict(L=20)
