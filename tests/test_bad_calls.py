"""A wrong argument of any public function ends in a ValueError or TypeError that names it.

Each entry of the table is a right call, and the wrong values of each argument. The other arguments
stay as they are. `Groups` and vidl.swapping: test_groups.py and test_swapping.py.
"""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bad_values import (
    COUNT,
    FACTOR,
    FLAG,
    FLOATS,
    GRID,
    IDS,
    MEAN,
    MODULE,
    OPTION,
    OTHER,
    OWN,
    POSITIVE,
    RATE,
    SHARE,
    SIZE,
    STD,
    TENSOR,
    Kind,
    cut,
    optional,
    values,
    without,
)  # fmt: skip

from vidl import masking, models, nn, objectives, ops
from vidl.kernels import library
from vidl.models import export


@dataclass
class Call:
    """A right call of a function, and the wrong values of its arguments."""

    function: Callable[..., Any]
    right: Callable[[], dict[str, Any]] | None  # None: see the function `right` below
    wrong: dict[str, Kind]


CU = torch.tensor([0, 2, 5], dtype=torch.int32)  # two samples in five rows
BACKEND = {"backend": OPTION}
# A mask of any dtype is read as nonzero or not.
PADDING = without(optional(TENSOR), "complex", "flags") | cut(0, 1)
GROUPS = OTHER | values(number=3, tensor=CU)
PLACES = torch.arange(3).expand(2, -1)  # the patches of two samples


def clip(**extra):
    ids = torch.tensor([[0, 3, 7], [1, 2, 6]])
    return dict(video=torch.rand(2, 3, 4, 8, 8)) | extra | dict(ids=ids)


def embed_call():
    video, ids = clip().values()
    weight, bias, space = torch.rand(5, 3, 2, 4, 4), torch.rand(5), torch.rand(8, 5)
    return dict(video=video, weight=weight, bias=bias, position=space, ids_keep=ids)


def packed_embed_call():
    call = embed_call() | dict(ids_keep=torch.arange(5), cu_seqlens=CU)
    call |= dict(position=(torch.rand(2, 5), torch.rand(4, 5)), mean=[0.5] * 3, std=[0.5] * 3)
    return call | dict(video=torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8))


def loss_call():
    video, ids = clip().values()
    call = dict(prediction=torch.rand(2, 3, 96), video=video, ids_masked=ids, patch_size=4)
    return call | dict(tubelet_size=2, target="mae", norm_pix=True, reduction="mean")


def packed_loss_call():
    call = loss_call() | dict(ids_masked=torch.arange(5), cu_seqlens=CU)
    call |= dict(prediction=torch.rand(5, 96), mean=[0.5] * 3, std=[0.5] * 3)
    return call | dict(video=torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8))


def attention_call():
    q, k, v = torch.rand(3, 6, 2, 32)
    return dict(q=q, k=k, v=v, groups=ops.Groups.equal(2, 3))


def biased_call():
    positions = ops.Positions.grid(PLACES, (1, 1, 3))
    return attention_call() | dict(
        bias=torch.rand(5, 2), positions=positions, key_bias=torch.rand(6)
    )


def scores_call(*names):
    return {name: x for name, x in attention_call().items() if name in (*names, "groups")}


def select_call():
    scores, ranks = torch.rand(2, 2, 4)
    return dict(x=torch.rand(2, 5, 8), scores=scores, keep=2, rank_by=ranks, prefix=1)


def packed_select_call():
    x, scores = torch.rand(5, 8), torch.rand(5)
    return dict(x=x, scores=scores, keep=0.5, cu_seqlens=CU, num_kept=3, rank_by=torch.rand(5))


VIDEO = FLOATS | cut(1, 2, 3, 4)
BIASES = {
    "bias": FLOATS | cut(0, 1),
    "positions": GROUPS | values(rows=ops.Positions.grid(PLACES[:1], (1, 1, 3))),
    "key_bias": optional(FLOATS) | cut(0) | values(double=torch.rand(6).double()),
}
QKV = FLOATS | cut(0, 1, 2) | {"double": lambda x: x.double()}
VALUES = without(QKV, "cut2") | {"wide": lambda x: torch.rand(*x.shape[:2], 33)}
PATCH = values(
    none=None, text="abc", number=2, short=(2, 4), halves=(2, 4.0, 4), zero=(2, 0, 4),
    negative=(2, -4, 4), indivisible=(3, 4, 4), bools=(True, 4, 4), tensor=torch.ones(3),
)  # fmt: skip
OPS = {
    "masked_patch_embed": Call(
        ops.masked_patch_embed,
        embed_call,
        {
            "video": VIDEO | cut(0),
            "weight": FLOATS | cut(1, 2, 3),
            "bias": optional(FLOATS) | cut(0),
            "position": optional(FLOATS) | cut(0, 1) | values(triple=(torch.rand(2, 5),) * 3),
            "ids_keep": optional(IDS) | cut(0),
            "cu_seqlens": values(unneeded=CU),
            "mean": values(unneeded=[0.5] * 3),
            "std": values(unneeded=[0.5] * 3),
        },
    ),
    "masked_patch_embed, packed": Call(
        ops.masked_patch_embed,
        packed_embed_call,
        {
            "ids_keep": IDS,
            "cu_seqlens": optional(IDS) | cut(0),
            "position": values(
                half=(torch.rand(2, 5), None), time=(torch.rand(3, 5), torch.rand(4, 5)),
                space=(torch.rand(2, 5), torch.rand(4, 4)),
                meta=(torch.rand(2, 5, device="meta"), torch.rand(4, 5)),
            ),
            "mean": MEAN,
            "std": STD,
        },
    ),
    "masked_patch_loss": Call(
        ops.masked_patch_loss,
        loss_call,
        {
            "prediction": FLOATS | cut(0, 1, 2),
            "video": VIDEO | cut(0) | {"gradient": lambda x: x.clone().requires_grad_()},
            "ids_masked": IDS | cut(0, 1),
            "patch_size": SIZE,
            "tubelet_size": POSITIVE | values(indivisible=3),
            "target": OPTION,
            "norm_pix": FLAG,
            "reduction": OPTION,
            "mean": values(unneeded=[0.5] * 3),
        },
    ),
    "masked_patch_loss, packed": Call(
        ops.masked_patch_loss,
        packed_loss_call,
        {
            "ids_masked": IDS | cut(0),
            "cu_seqlens": optional(IDS) | cut(0),
            "mean": MEAN,
            "std": STD,
        },
    ),
    "frame_difference": Call(
        ops.frame_difference,
        lambda: dict(video=clip()["video"], patch=(2, 4, 4)),
        {
            "video": without(VIDEO, "cut1", "meta"),
            "patch": PATCH,
            "std": values(unneeded=[0.5] * 3),
        },
    ),
    "frame_difference, uint8": Call(
        ops.frame_difference,
        lambda: dict(video=packed_loss_call()["video"], patch=(2, 4, 4), std=[0.5] * 3),
        {"std": STD, "video": cut(1, 2)},
    ),
    "space_time_attention": Call(
        ops.space_time_attention,
        attention_call,
        {
            "q": QKV,
            "k": QKV,
            "v": VALUES,
            "groups": GROUPS | values(rows=ops.Groups.equal(2, 4)),
            "scale": optional(FACTOR),
            "return_lse": FLAG,
            "return_scores": optional(OPTION),
        },
    ),
    "space_time_attention, biased": Call(
        ops.space_time_attention,
        biased_call,
        BIASES,
    ),
    "cls_attention_scores, biased": Call(
        ops.cls_attention_scores,
        lambda: {name: x for name, x in biased_call().items() if name != "v"},
        BIASES,
    ),
    "mean_attention_scores, biased": Call(
        ops.mean_attention_scores,
        lambda: {name: x for name, x in biased_call().items() if name != "v"},
        BIASES,
    ),
    "cls_attention_scores": Call(
        ops.cls_attention_scores,
        functools.partial(scores_call, "q", "k"),
        {"q": QKV, "k": QKV, "groups": GROUPS, "scale": optional(FACTOR)},
    ),
    "mean_attention_scores": Call(
        ops.mean_attention_scores,
        lambda: scores_call("q", "k") | dict(lse=torch.rand(2, 6)),
        {
            "q": QKV,
            "k": QKV,
            "groups": GROUPS,
            "lse": optional(FLOATS) | cut(0, 1),
            "scale": optional(FACTOR),
        },
    ),
    "value_weighted_scores": Call(
        ops.value_weighted_scores,
        functools.partial(scores_call, "q", "k", "v"),
        {"q": QKV, "k": QKV, "v": VALUES, "groups": GROUPS, "scale": optional(FACTOR)},
    ),
    "key_similarity_scores": Call(
        ops.key_similarity_scores,
        functools.partial(scores_call, "k"),
        {"k": FLOATS | cut(0), "groups": GROUPS},
    ),
    "select_tokens": Call(
        ops.select_tokens,
        select_call,
        {
            "x": FLOATS | cut(0, 1),
            "scores": FLOATS | cut(0, 1),
            "keep": POSITIVE | values(many=5),
            "rank_by": optional(FLOATS) | values(shape=torch.rand(2, 3)),
            "rounding": OPTION,
            "order": OPTION,
            "fuse": optional(OPTION),
            "num_kept": values(unneeded=4),
            "prefix": COUNT | values(many=2),
        },
    ),
    "select_tokens, packed": Call(
        ops.select_tokens,
        packed_select_call,
        {
            "x": FLOATS | cut(0),
            "scores": FLOATS | cut(0),
            "rank_by": optional(FLOATS) | cut(0),
            "keep": SHARE,
            "cu_seqlens": optional(IDS) | values(none=None, empty=CU[:0]),
            "num_kept": optional(COUNT),
        },
    ),
}  # fmt: skip
OPS = {name: Call(call.function, call.right, call.wrong | BACKEND) for name, call in OPS.items()}

OTHER_OPS = {
    "kept_count": Call(
        ops.kept_count,
        lambda: dict(n=8, keep=0.5, rounding="ceil"),
        {"n": COUNT, "keep": SHARE, "rounding": OPTION},
    ),
    "run_length_ids": Call(
        ops.run_length_ids,
        lambda: dict(differences=torch.rand(2, 8), slices=2, threshold=0.1),
        {
            "differences": without(FLOATS, "meta"),
            "slices": POSITIVE | values(indivisible=3),
            "threshold": FACTOR,
            "keep": optional(COUNT) | values(many=9),
            "total": optional(COUNT),
        },
    ),
    "Groups.prefix": Call(
        ops.Groups.prefix,
        lambda: dict(cu_video=CU, cu_text=CU, total=10, longest=6),
        {
            "cu_video": without(IDS, "meta") | cut(0) | values(late=CU + 1),
            "cu_text": without(IDS, "meta") | cut(0) | values(late=CU - 1),
            "total": COUNT,
            "longest": COUNT,
        },
    ),
    "Groups.padded": Call(
        ops.Groups.equal(2, 3).padded,
        lambda: dict(lengths=torch.tensor([1, 9])),
        {"lengths": without(IDS, "meta") | cut(0) | values(negative=torch.tensor([1, -1]))},
    ),
    "Positions": Call(
        ops.Positions,
        lambda: dict(query_codes=CU, key_codes=CU, rows=4, wrap=2),
        {"query_codes": IDS, "key_codes": IDS, "rows": POSITIVE, "wrap": COUNT | values(large=4)},
    ),
    "Positions.grid": Call(
        ops.Positions.grid,
        lambda: dict(ids=PLACES, grid=(1, 1, 3), reach=(2, 2, 3)),
        {"ids": without(IDS, "meta"), "grid": GRID, "reach": optional(GRID)},
    ),
    "Positions.first": Call(
        ops.Positions.first,
        lambda: dict(ids=PLACES, grid=(1, 1, 3), size=(1, 1, 3), reach=(2, 2, 3)),
        {"ids": without(IDS, "meta"), "grid": GRID, "size": GRID, "reach": GRID},
    ),
    "Positions.cross": Call(
        ops.Positions.cross,
        lambda: dict(query_ids=PLACES, query_grid=(1, 1, 3), key_ids=PLACES, key_grid=(1, 1, 3)),
        {
            "query_ids": without(IDS, "meta"),
            "query_grid": GRID,
            "key_ids": without(IDS, "meta"),
            "key_grid": GRID,
        },
    ),
    "Positions.sequence": Call(
        ops.Positions.sequence,
        lambda: dict(cu_seqlens=CU, total=5, reach=2),
        {"cu_seqlens": without(IDS, "meta"), "total": COUNT, "reach": COUNT},
    ),
    "Positions.select": Call(
        lambda **a: ops.Positions.grid(PLACES, (1, 1, 3)).select(**a),
        lambda: dict(rows=torch.arange(2)),
        {"rows": without(IDS, "meta")},
    ),
    "ReplicatedGlobal": Call(
        ops.ReplicatedGlobal, lambda: dict(groups=ops.Groups.equal(2, 3)), {"groups": GROUPS}
    ),
    "ReplicatedGlobal.replicate": Call(
        lambda **a: ops.ReplicatedGlobal(ops.Groups.equal(2, 3)).replicate(**a),
        lambda: dict(x=torch.rand(8, 4)),
        {"x": OTHER | cut(0) | values(list=[1.0], meta=torch.rand(8, 4, device="meta"))},
    ),
    "ReplicatedGlobal.average": Call(
        lambda **a: ops.ReplicatedGlobal(ops.Groups.equal(2, 3)).average(**a),
        lambda: dict(x=torch.rand(8, 4)),
        {"x": OTHER | cut(0) | values(list=[1.0], meta=torch.rand(8, 4, device="meta"))},
    ),
}

SAMPLES = torch.tensor([5, 3])
STEP = COUNT | values(
    floats=torch.tensor(1.0), vector=torch.tensor([1]), meta=torch.tensor(1, device="meta")
)
SEED = COUNT | values(large=2**63)
DRAW = {"seed": SEED, "step": STEP, "samples": without(IDS, "meta"), "stream": SEED}


def draw(**extra):
    return dict(seed=1, step=2, samples=SAMPLES, stream=3) | extra


def mask():
    return masking.visual_mask(0, 0, SAMPLES, (2, 2, 2), 0.5)


WORDS = torch.tensor([[101, 7, 8, 102], [101, 9, 102, 0]])
PRESENT = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
VISUAL_MASK = OTHER | values(number=3, tensor=SAMPLES)
MASKING = {
    "uniform": Call(masking.uniform, lambda: draw(n=4), DRAW | {"n": COUNT}),
    "visual_mask": Call(
        masking.visual_mask,
        lambda: draw(grid=(2, 2, 2), mask_ratio=0.5, kind="frame", rounding="floor"),
        DRAW | {
            "grid": GRID,
            "mask_ratio": RATE | values(one=1.0),
            "kind": OPTION,
            "rounding": OPTION,
        },
    ),
    "mask_words": Call(
        masking.mask_words,
        lambda: draw(ids=WORDS, attention_mask=PRESENT, mask_ratio=0.5),
        DRAW | {
            "samples": IDS | cut(0),
            "ids": IDS | cut(0, 1),
            "attention_mask": PADDING | values(none=None),
            "mask_ratio": RATE,
            "replace": OPTION,
            "word_starts": values(
                text="x", list=[True], number=1, ids=PRESENT, short=PRESENT[:, :3].bool(),
                meta=PRESENT.bool().to("meta"),
            ),
            "vocabulary": values(text="x", number=100, list=["a"]),
            "most": optional(COUNT),
        },
    ),
    "most_hidden": Call(
        masking.most_hidden,
        lambda: dict(words=8, mask_ratio=0.5),
        {"words": COUNT, "mask_ratio": RATE},
    ),
    "continuations": Call(
        masking.continuations,
        lambda: dict(words=["a", "##b"]),
        {"words": values(none=None, text="abc", number=3, numbers=[1, 2], nones=[None])},
    ),
    "Vocabulary": Call(
        masking.Vocabulary,
        lambda: dict(size=200, mask=103, special=(0, 1)),
        {
            "size": POSITIVE,
            "mask": COUNT | values(large=200),
            "special": values(
                none=None, text="ab", number=0, texts=("a",), halves=(0.5,), bools=(True,)
            ),
        },
    ),
    "replace_masked": Call(
        masking.replace_masked,
        lambda: dict(tokens=torch.rand(2, 8, 4), mask=mask(), mask_token=torch.rand(4)),
        {
            "tokens": FLOATS | cut(0, 1, 2),
            "mask": VISUAL_MASK,
            "mask_token": FLOATS | cut(0),
        },
    ),
    "zero_masked": Call(
        masking.zero_masked,
        lambda: dict(video=torch.rand(2, 3, 4, 8, 8), mask=mask()),
        {
            "video": without(TENSOR, "complex", "flags")
            | cut(0, 2, 3),
            "mask": VISUAL_MASK,
        },
    ),
}  # fmt: skip


def features(**extra):
    return dict(video=torch.rand(2, 3, 4), text=torch.rand(2, 4)) | extra


SIMILARITY = torch.rand(3, 3)
THREE = torch.arange(3)


def negatives():
    return objectives.hard_negatives(0, 0, THREE, SIMILARITY)


OBJECTIVES = {
    "ContrastiveLoss": Call(
        objectives.ContrastiveLoss,
        lambda: dict(temperature=0.07, bounds=(0.001, 0.5), form="mean", gather=False),
        {
            "temperature": FACTOR | values(zero=0.0, negative=-1.0, high=0.6),
            "learned": FLAG,
            "bounds": values(
                none=None, text="ab", number=1, short=(0.1,), texts=("a", "b"), reverse=(0.5, 0.1),
                nones=(None, None), nan=(float("nan"), 1.0), zero=(0.0, 1.0),
            ),
            "form": OPTION,
            "gather": FLAG,
        },
    ),
    "ContrastiveLoss.forward": Call(
        lambda **a: objectives.ContrastiveLoss()(**a),
        lambda: features(clip_ids=SAMPLES),
        {
            "video": FLOATS | cut(0, 2),
            "text": FLOATS | cut(0, 1),
            "clip_ids": optional(IDS) | cut(0),
        },
    ),
    "ContrastiveLoss.similarity": Call(
        lambda **a: objectives.ContrastiveLoss().similarity(**a),
        features,
        {"video": FLOATS | cut(2), "text": FLOATS | cut(1)},
    ),
    "UnifiedContrastiveLoss": Call(
        objectives.UnifiedContrastiveLoss,
        lambda: dict(queue=4, dim=3, numbers=1),
        {"queue": COUNT, "dim": POSITIVE, "numbers": POSITIVE},
    ),
    "UnifiedContrastiveLoss.forward": Call(
        lambda **a: objectives.UnifiedContrastiveLoss(queue=4, dim=3)(**a),
        lambda: dict(
            video=torch.rand(2, 3), text=torch.rand(2, 3), clip_ids=SAMPLES,
            keys=(torch.rand(2, 3), torch.rand(2, 3)),
        ),
        {
            "video": FLOATS | cut(0, 1),
            "text": FLOATS | cut(0, 1),
            "clip_ids": IDS | cut(0),
            "keys": values(
                none=None, number=3, one=(torch.rand(2, 3),), texts=("a", "b"),
                short=(torch.rand(1, 3), torch.rand(2, 3)),
                narrow=(torch.rand(2, 3), torch.rand(2, 2)),
            ),
        },
    ),
    "Queue": Call(
        objectives.Queue,
        lambda: dict(size=4, dim=3, numbers=2),
        {"size": POSITIVE, "dim": POSITIVE, "numbers": POSITIVE},
    ),
    "Queue.push": Call(
        lambda **a: objectives.Queue(4, 3).push(**a),
        lambda: dict(video=torch.rand(2, 3), text=torch.rand(2, 3), ids=SAMPLES[:, None]),
        {"video": FLOATS | cut(0, 1), "text": FLOATS | cut(0, 1), "ids": IDS | cut(0, 1)},
    ),
    "gather_with_gradient": Call(
        objectives.gather_with_gradient,
        lambda: dict(x=torch.rand(2, 3)),
        {"x": OTHER | values(number=3, list=[1.0], scalar=torch.tensor(1.0))},
    ),
    "masked_word_loss": Call(
        objectives.masked_word_loss,
        lambda: dict(logits=torch.rand(3, 7), labels=THREE),
        {"logits": FLOATS | cut(0), "labels": IDS | cut(0)},
    ),
    "MaskedPatchLoss": Call(
        objectives.MaskedPatchLoss,
        lambda: dict(patch_size=4, tubelet_size=2, target="mae", norm_pix=True),
        {
            "patch_size": SIZE,
            "tubelet_size": POSITIVE,
            "target": OPTION,
            "norm_pix": FLAG,
            "mean": without(MEAN, "short"),
            "std": without(STD, "short"),
            "backend": OPTION,
        },
    ),
    "MaskedPatchLoss.forward": Call(
        lambda **a: objectives.MaskedPatchLoss(4, 2)(**a),
        lambda: dict(
            prediction=torch.rand(2, 3, 96), video=clip()["video"], ids_mask=clip()["ids"]
        ),
        {"prediction": FLOATS | cut(0, 1, 2), "video": VIDEO, "ids_mask": IDS | cut(0, 1)},
    ),
    "hard_negatives": Call(
        objectives.hard_negatives,
        lambda: dict(seed=1, step=2, samples=THREE, similarity=SIMILARITY, clip_ids=THREE),
        {
            "seed": SEED,
            "step": STEP,
            "samples": IDS | cut(0),
            "similarity": FLOATS | cut(0, 1) | values(one=torch.rand(1, 1)),
            "clip_ids": optional(IDS) | cut(0),
        },
    ),
    "matching_loss": Call(
        objectives.matching_loss,
        lambda: dict(logits=torch.rand(9, 2), negatives=negatives()),
        {"logits": FLOATS | cut(0, 1), "negatives": OTHER | values(number=3, tensor=THREE)},
    ),
    "transport_plan": Call(
        objectives.transport_plan,
        lambda: dict(cost=torch.rand(2, 4, 3), words=PRESENT, patches=torch.ones(2, 3)),
        {
            "cost": FLOATS | cut(0, 1, 2),
            "words": PADDING | values(none=None),
            "patches": PADDING | values(none=None),
            "beta": FACTOR | values(zero=0.0, negative=-1.0),
            "iterations": POSITIVE,
        },
    ),
    "word_patch_alignment": Call(
        objectives.word_patch_alignment,
        lambda: dict(
            text=torch.rand(2, 4, 8), clips=torch.rand(2, 3, 8), words=PRESENT,
            patches=torch.ones(2, 3),
        ),
        {
            "text": FLOATS | cut(0, 1, 2),
            "clips": FLOATS | cut(0, 1, 2),
            "words": PADDING | values(none=None),
            "patches": PADDING,
            "beta": FACTOR | values(zero=0.0, negative=-1.0),
            "iterations": POSITIVE,
        },
    ),
}  # fmt: skip

LAYER = dict(dim=8, num_heads=2, mlp_ratio=2.0, qkv_bias=True)
HEADS = POSITIVE | values(indivisible=3)
CALLABLE = values(none=None, text="gelu", number=3)
LAYERS = {
    "dim": POSITIVE,
    "num_heads": HEADS,
    "mlp_ratio": FACTOR | values(zero=0.0, negative=-1.0),
    "qkv_bias": FLAG,
    "act_layer": CALLABLE,
    "norm_layer": CALLABLE,
}
PRUNING = values(text="x", number=0.5, list=[])
ENCODER = dict(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
ENCODERS = {
    **{name: LAYERS[name] for name in ("num_heads", "mlp_ratio", "qkv_bias")},
    "act_layer": CALLABLE,
    "norm_layer": CALLABLE,
    "img_size": SIZE | values(indivisible=9),
    "patch_size": SIZE | values(indivisible=3),
    "in_chans": POSITIVE,
    "embed_dim": POSITIVE,
    "depth": COUNT,
    "tubelet_size": optional(POSITIVE),
    "mean": MEAN,
    "std": STD,
}
NUM_WORDS = optional(COUNT) | values(many=99)


@functools.cache
def bert():
    options = dict(mlp_width=16, max_positions=6, dropout=0.0, mlm_head=True, merge_layers=1)
    return nn.Bert(200, 8, 1, 1, 2, **options)


@functools.cache
def words_decoder():
    return nn.WordsDecoder(200, 8, 1, 2, mlp_width=16, max_positions=6, dropout=0.0)


@functools.cache
def vit():
    return nn.ViT(**ENCODER, prune_layers=[0], pruning=nn.Pruning(0.5))


@functools.cache
def grid_features():
    return nn.GridFeatures("test_resnet", 8, 8, mean=[0.5] * 3, std=[0.5] * 3)


@functools.cache
def joint_vit():
    return nn.JointViT(4 * 2, 4, embed_dim=8, depth=1, num_heads=2, num_frames=2)


@functools.cache
def mae():
    return nn.JointViT(
        8, 4, embed_dim=8, depth=1, num_heads=2, num_frames=4, tubelet_size=None,
        position="sincos_2d", class_token=True,
    )  # fmt: skip


def merged():
    return nn.Merged(torch.rand(2, 3, 8), nn.Captions(WORDS, PRESENT))


@functools.cache
def beit():
    return nn.Beit(**ENCODER, prune_layers=[0], pruning=nn.Pruning(0.5))


@functools.cache
def sparse_beit():
    return nn.Beit(**ENCODER, joint=True, num_frames=2, edges=nn.Edges(2, 1))


@functools.cache
def divided():
    return nn.SpaceTimeTransformer(**ENCODER)


@functools.cache
def timesformer():
    return nn.TimeSformer(**ENCODER, num_frames=2)


def momentum():
    return nn.Momentum(0.9, vision=nn.Projection(8, 4))


@functools.cache
def block():
    return nn.Block(8, 2, pruning=nn.Pruning(0.5))


def timm_block():
    """A block with the modules of timm's; importing timm takes seconds."""
    timm = nn.Block(8, 2)
    timm.attn.attn_drop = torch.nn.Dropout(0.0)
    return dict(block=timm)


@functools.cache
def divided_block():
    return nn.DividedBlock(8, 2)


@functools.cache
def decoder():
    return nn.MaeDecoder((1, 2, 2), 4, 8, dim=8, depth=1, num_heads=2)


@functools.cache
def selector():
    return nn.FrameSelector(8, 6, 2, 4)


@functools.cache
def patch_embed():
    return nn.MaskedPatchEmbed(4, 3, 8, 2)


PRUNE_LAYERS = values(
    none=None, text="a", number=0, large=[1], negative=[-1], halves=[0.5], texts=["a"],
    bools=[False],
)  # fmt: skip
INT = values(none=None, text="x", half=0.5, bool=True, list=[1], tensor=torch.zeros(2))
FRAME_IDS = torch.tensor([[0, 3], [1, 2]])  # two patches of four in two frames
DROP_PATH = RATE | values(one=1.0)  # in [0, 1)


def in_time():
    return nn.groups_in_time(FRAME_IDS, 2, 4)


STATE = values(none=None, text="x", number=3, list=[], values={"norm.weight": 3})
PARTNER = torch.tensor([1, 0])
NN = {
    "Beit": Call(
        nn.Beit,
        lambda: ENCODER | dict(
            joint=True, num_frames=2, edges=nn.Edges(2, 1), prune_layers=[0],
            pruning=nn.Pruning(0.5),
        ),
        without(ENCODERS, "qkv_bias", "tubelet_size")
        | {
            "init_values": optional(FACTOR),
            "num_frames": POSITIVE,
            "joint": FLAG | values(no=False),
            "time": optional(OPTION) | values(joint="last"),
            "edges": values(text="x", number=3, object=object()),
            "prune_layers": PRUNE_LAYERS,
            "pruning": PRUNING
            | values(none=None, fused=nn.Pruning(0.5, fuse="sum"), mean=nn.Pruning(0.5, "mean")),
            "drop_path": DROP_PATH,
            "final_norm": FLAG,
            "backend": OPTION,
        },
    ),
    "Beit.forward": Call(
        lambda **a: beit()(**a),
        lambda: dict(
            video=torch.rand(2, 3, 2, 8, 8), ids_keep=torch.tensor([[0, 3, 5, 6]] * 2),
            time=torch.rand(2, 8),
        ),
        {
            "video": VIDEO | cut(0),
            "ids_keep": optional(IDS) | cut(0, 1),
            "time": optional(FLOATS) | cut(0, 1),
        },
    ),
    "Beit.forward, edges": Call(
        lambda **a: sparse_beit()(**a),
        lambda: dict(video=torch.rand(2, 3, 2, 8, 8), step=1, seed=2),
        {
            "video": without(VIDEO, "cut2") | values(long=torch.rand(2, 3, 3, 8, 8)),
            "step": INT,
            "seed": INT,
        },
    ),
    "Beit.set_keep_rate": Call(
        lambda **a: beit().set_keep_rate(**a), lambda: dict(keep_rate=0.5), {"keep_rate": SHARE}
    ),
    "Beit.load_pretrained": Call(
        lambda **a: beit().load_pretrained(**a),
        lambda: dict(state_dict=beit().state_dict(), mode="bilinear"),
        {"state_dict": STATE, "mode": OPTION},
    ),
    "Edges": Call(
        nn.Edges,
        lambda: dict(block=4, random=1, local=1),
        {"block": POSITIVE, "random": COUNT, "local": POSITIVE | values(even=2)},
    ),
    "Edges.groups": Call(
        nn.Edges(2, 1).groups,
        lambda: dict(batch=2, length=8, seed=3),
        {"batch": COUNT, "length": COUNT, "seed": INT},
    ),
    "BertInTime": Call(
        nn.BertInTime,
        lambda: dict(width=8, layers=1, num_heads=2, mlp_width=16, dropout=0.1),
        {
            "width": POSITIVE,
            "layers": COUNT,
            "num_heads": HEADS,
            "mlp_width": optional(POSITIVE),
            "dropout": RATE,
            "backend": OPTION,
        },
    ),
    "BertInTime.forward": Call(
        lambda **a: nn.BertInTime(8, 1, 2, 16)(**a),
        lambda: dict(x=torch.rand(2, 3, 8), time=in_time()),
        {"x": FLOATS | cut(0, 1, 2), "time": GROUPS | values(rows=ops.Groups.equal(2, 2))},
    ),
    "FramesInTime": Call(
        nn.FramesInTime,
        lambda: dict(dim=8, num_heads=2, qkv_bias=True),
        {
            **{name: LAYERS[name] for name in ("dim", "num_heads", "qkv_bias", "norm_layer")},
            "gate": FLAG,
            "drop_path": DROP_PATH,
            "backend": OPTION,
        },
    ),
    "FramesInTime.forward": Call(
        lambda **a: nn.FramesInTime(8, 2)(**a),
        lambda: dict(x=torch.rand(2, 3, 8), time=in_time()),
        {"x": FLOATS | cut(0, 1, 2), "time": GROUPS | values(rows=ops.Groups.equal(2, 2))},
    ),
    "groups_in_time": Call(
        nn.groups_in_time,
        lambda: dict(ids=FRAME_IDS, frames=2, patches=4, every=False),
        {
            "ids": without(IDS, "meta") | cut(0) | values(large=FRAME_IDS + 1),
            "frames": POSITIVE | values(uneven=3),
            "patches": COUNT | values(few=2),
            "every": FLAG,
        },
    ),
    "KeysOfText": Call(
        nn.KeysOfText,
        lambda: dict(keep_rate=0.5, layer=0, prefix=1),
        {"keep_rate": SHARE, "layer": COUNT, "prefix": COUNT},
    ),
    "KeysOfText.select": Call(
        nn.KeysOfText(0.5).select,
        lambda: dict(clips=torch.rand(2, 4, 8), scores=torch.rand(2, 4), partner=PARTNER),
        {
            "clips": FLOATS | cut(1),
            "scores": FLOATS | cut(0, 1),
            "partner": optional(IDS) | cut(0),
            "backend": OPTION,
        },
    ),
    "Bert": Call(
        nn.Bert,
        lambda: dict(
            vocab_size=20, width=8, text_layers=1, fusion_layers=1, num_heads=2, mlp_width=16,
            visual_width=8, max_positions=6, token_types=2, dropout=0.1, mlm_head=False,
        ),
        {
            "vocab_size": POSITIVE,
            "width": POSITIVE,
            "text_layers": COUNT,
            "fusion_layers": COUNT,
            "num_heads": HEADS,
            "mlp_width": optional(POSITIVE),
            "visual_width": optional(POSITIVE),
            "max_positions": POSITIVE,
            "token_types": COUNT,
            "dropout": RATE,
            "mlm_head": FLAG,
            "merge_layers": COUNT,
            "backend": OPTION,
        },
    ),
    "Bert.merge": Call(
        lambda **a: bert().merge(**a),
        lambda: dict(
            text=torch.rand(2, 4, 8), attention_mask=PRESENT, clips=torch.rand(2, 3, 8),
            partner=PARTNER,
        ),
        {
            "text": FLOATS | cut(0, 1, 2),
            "attention_mask": PADDING,
            "clips": FLOATS | cut(2),
            "partner": optional(IDS) | cut(0),
            "words": NUM_WORDS,
        },
    ),
    "Bert.encode": Call(
        lambda **a: bert().encode(**a),
        lambda: dict(ids=WORDS, attention_mask=PRESENT, words=7),
        {
            "ids": IDS | cut(0, 1) | values(long=torch.ones(2, 7).long()),
            "attention_mask": PADDING,
            "words": NUM_WORDS,
        },
    ),
    "Bert.fuse": Call(
        lambda **a: bert().fuse(**a),
        lambda: dict(
            text=torch.rand(2, 4, 8), attention_mask=PRESENT, visual=torch.rand(2, 3, 8),
            partner=PARTNER,
        ),
        {
            "text": FLOATS | cut(0, 1, 2),
            "attention_mask": PADDING,
            "visual": FLOATS | cut(2),
            "partner": optional(IDS) | cut(0),
            "cu_visual": values(unneeded=CU),
            "max_visual": values(unneeded=3),
            "words": NUM_WORDS,
            "keys": values(text="x", number=0.5, object=object(), late=nn.KeysOfText(0.5, 1)),
        },
    ),
    "Bert.fuse, packed": Call(
        lambda **a: bert().fuse(**a),
        lambda: dict(
            text=torch.rand(2, 4, 8), attention_mask=PRESENT, visual=torch.rand(5, 8),
            cu_visual=CU, max_visual=3,
        ),
        {
            "visual": FLOATS | cut(1),
            "cu_visual": IDS | cut(0),
            "max_visual": COUNT,
        },
    ),
    "Bert.predict_words": Call(
        lambda **a: bert().predict_words(**a),
        lambda: dict(hidden=torch.rand(2, 4, 8), positions=THREE),
        {"hidden": FLOATS | cut(2), "positions": IDS},
    ),
    "Bert.load_pretrained": Call(
        lambda **a: bert().load_pretrained(**a),
        lambda: dict(state_dict=bert().state_dict()),
        {"state_dict": STATE},
    ),
    "Block": Call(
        nn.Block,
        lambda: dict(LAYER),
        LAYERS | {"init_values": optional(FACTOR), "pruning": PRUNING, "backend": OPTION},
    ),
    "Block.from_block": Call(nn.Block.from_block, timm_block, {"block": MODULE}),
    "Block.forward": Call(
        lambda **a: block()(**a),
        lambda: dict(x=torch.rand(2, 4, 8)),
        {"x": FLOATS | cut(2) | values(empty=torch.rand(2, 0, 8)), "return_ids": FLAG},
    ),
    "Block.forward, packed": Call(
        lambda **a: block()(**a),
        lambda: dict(x=torch.rand(5, 8), groups=ops.Groups.joint(CU, 5, 3), num_kept=2),
        {
            "x": FLOATS | cut(0, 1),
            "groups": optional(GROUPS) | values(none=None, rows=ops.Groups.equal(2, 3)),
            "num_kept": optional(COUNT),
        },
    ),
    "Captions": Call(
        nn.Captions,
        lambda: dict(padded=WORDS, attention_mask=PRESENT, words=7),
        {
            "padded": without(TENSOR, "complex", "flags", "more")
            | cut(0, 1) | values(vector=THREE),
            "attention_mask": PADDING,
            "words": NUM_WORDS,
        },
    ),
    "Captions.pack": Call(
        lambda **a: nn.Captions(WORDS, PRESENT).pack(**a),
        lambda: dict(x=torch.rand(2, 4, 8)),
        {"x": OTHER | cut(0, 1) | values(list=[1], meta=torch.rand(2, 4, 8, device="meta"))},
    ),
    "Captions.unpack": Call(
        lambda **a: nn.Captions(WORDS, PRESENT).unpack(**a),
        lambda: dict(x=torch.rand(7, 8)),
        {"x": OTHER | cut(0) | values(list=[1], meta=torch.rand(7, 8, device="meta"))},
    ),
    "Captions.cross": Call(
        lambda **a: nn.Captions(WORDS, PRESENT).cross(**a),
        lambda: dict(cu_keys=CU, num_keys=5, max_keys=3, partner=PARTNER, equal=False),
        {
            "cu_keys": IDS,
            "num_keys": COUNT,
            "max_keys": COUNT,
            "partner": optional(IDS) | cut(0),
            "equal": FLAG,
        },
    ),
    "DividedBlock": Call(
        nn.DividedBlock, lambda: dict(LAYER), LAYERS | {"backend": OPTION}
    ),
    "DividedBlock.forward": Call(
        lambda **a: divided_block()(**a),
        lambda: dict(
            x=torch.rand(6, 8), space=ops.Groups.equal(2, 3), time=ops.Groups.equal(3, 2)
        ),
        {
            "x": FLOATS | cut(0, 1),
            "space": GROUPS | values(rows=ops.Groups.equal(2, 4)),
            "time": GROUPS | values(rows=ops.Groups.equal(2, 4)),
        },
    ),
    "FrameSelector": Call(
        nn.FrameSelector,
        lambda: dict(visual_dim=8, text_dim=6, keep=2, num_frames=4, hidden_dim=5),
        {
            "visual_dim": POSITIVE,
            "text_dim": POSITIVE,
            "keep": POSITIVE | values(many=5),
            "num_frames": POSITIVE | values(few=1),
            "hidden_dim": optional(POSITIVE),
            "backend": OPTION,
        },
    ),
    "FrameSelector.forward": Call(
        lambda **a: selector()(**a),
        lambda: dict(
            frames=torch.rand(2, 4, 8), text=torch.rand(2, 6), tokens=torch.rand(2, 4, 3, 8)
        ),
        {
            "frames": FLOATS | cut(0, 1, 2) | values(one=torch.rand(2, 1, 8)),
            "text": FLOATS | cut(0, 1),
            "tokens": FLOATS | cut(0, 1),
        },
    ),
    "MaeDecoder": Call(
        nn.MaeDecoder,
        lambda: dict(
            grid=(1, 2, 2), patch_size=4, encoder_dim=8, tubelet_size=1, dim=8, depth=1, num_heads=2
        ),
        {
            **{name: LAYERS[name] for name in ("num_heads", "mlp_ratio", "qkv_bias", "norm_layer")},
            "grid": GRID | values(frames=(2, 2, 2)),
            "patch_size": SIZE,
            "encoder_dim": POSITIVE,
            "in_chans": POSITIVE,
            "tubelet_size": POSITIVE,
            "dim": POSITIVE | values(odd=6),
            "depth": COUNT,
            "position": OPTION,
            "prefix": COUNT,
            "embed_bias": FLAG,
            "backend": OPTION,
        },
    ),
    "MaeDecoder.forward": Call(
        lambda **a: decoder()(**a),
        lambda: dict(
            tokens=torch.rand(2, 3, 8), ids_keep=torch.tensor([[0, 3], [1, 2]]),
            ids_mask=torch.tensor([[1, 2], [0, 3]]),
        ),
        {
            "tokens": FLOATS | cut(0, 1, 2),
            "ids_keep": IDS | cut(0, 1),
            "ids_mask": IDS | cut(0),
        },
    ),
    "MaskedPatchEmbed": Call(
        nn.MaskedPatchEmbed,
        lambda: dict(patch_size=4, in_chans=3, embed_dim=8, tubelet_size=2, bias=True),
        {
            "patch_size": SIZE,
            "in_chans": POSITIVE,
            "embed_dim": POSITIVE,
            "tubelet_size": optional(POSITIVE),
            "bias": FLAG,
            "mean": MEAN,
            "std": STD,
            "backend": OPTION,
        },
    ),
    "MaskedPatchEmbed.from_conv": Call(
        nn.MaskedPatchEmbed.from_conv,
        lambda: dict(conv=torch.nn.Conv2d(3, 8, 4, 4)),
        {
            "conv": MODULE | values(
                linear=torch.nn.Linear(3, 3), overlap=torch.nn.Conv2d(3, 8, 4, 2),
                padded=torch.nn.Conv2d(3, 8, 4, 4, 1), dilated=torch.nn.Conv2d(3, 8, 4, 4, 0, 2),
                grouped=torch.nn.Conv2d(4, 8, 4, 4, groups=2),
            ),
            "mean": MEAN,
            "std": STD,
            "backend": OPTION,
        },
    ),
    "MaskedPatchEmbed.forward": Call(
        lambda **a: patch_embed()(**a),
        lambda: dict(video=clip()["video"], ids_keep=clip()["ids"], position=torch.rand(8, 8)),
        {
            "video": VIDEO | cut(0) | values(image=torch.rand(2, 3, 8, 8)),
            "ids_keep": optional(IDS) | cut(0),
            "cu_seqlens": values(text="x", number=1, list=[0, 2, 5], unneeded=CU),
            "position": optional(FLOATS) | cut(0, 1) | values(half=(torch.rand(2, 8), None)),
        },
    ),
    "Projection": Call(
        nn.Projection,
        lambda: dict(width=8, dim=4, relu=True),
        {"width": POSITIVE, "dim": POSITIVE, "relu": FLAG},
    ),
    "Projection.forward": Call(
        lambda **a: nn.Projection(8, 4)(**a),
        lambda: dict(x=torch.rand(2, 8)),
        {"x": without(FLOATS, "more") | cut(1)},
    ),
    "Pruning": Call(
        nn.Pruning,
        lambda: dict(keep_rate=0.5, scores="cls", when="before_mlp", rounding="ceil"),
        {
            "keep_rate": SHARE,
            "scores": OPTION,
            "when": OPTION,
            "order": optional(OPTION),
            "fuse": optional(OPTION),
            "rounding": OPTION,
        },
    ),
    "Pruning.kept": Call(nn.Pruning(0.5).kept, lambda: dict(n=4), {"n": COUNT}),
    "Pruning.drops": Call(nn.Pruning(0.5).drops, lambda: dict(n=4), {"n": COUNT}),
    "Pruning.select": Call(
        nn.Pruning(0.5).select,
        lambda: dict(x=torch.rand(2, 5, 8), scores=torch.rand(2, 5), prefix=1),
        {
            "x": FLOATS | cut(0, 1),
            "scores": without(FLOATS, "more") | cut(0, 1),
            "prefix": COUNT,
        },
    ),
    "SpaceTimeTransformer": Call(
        nn.SpaceTimeTransformer,
        lambda: dict(ENCODER),
        ENCODERS | {"num_frames": POSITIVE, "time": OPTION, "backend": OPTION},
    ),
    "SpaceTimeTransformer.forward": Call(
        lambda **a: divided()(**a),
        lambda: dict(video=torch.rand(2, 3, 2, 8, 8), ids_keep=torch.tensor([[0, 3, 5, 6]] * 2)),
        {
            "video": FLOATS | cut(1, 3, 4) | values(long=torch.rand(2, 3, 5, 8, 8)),
            "ids_keep": optional(IDS) | cut(0, 1),
        },
    ),
    "TimeSformer": Call(
        nn.TimeSformer,
        lambda: dict(ENCODER),
        ENCODERS | {"num_frames": POSITIVE, "stills": FLAG, "backend": OPTION},
    ),
    "TimeSformer.resized": Call(
        lambda **a: timesformer().resized(**a),
        lambda: dict(state_dict=timesformer().state_dict()),
        {"state_dict": without(STATE, "missing", "shape")},
    ),
    "TimeSformer.forward": Call(
        lambda **a: timesformer()(**a),
        lambda: dict(video=torch.rand(2, 3, 2, 8, 8), ids_keep=torch.tensor([[0, 3, 4, 7]] * 2)),
        {
            "video": FLOATS | cut(1, 3, 4) | values(long=torch.rand(2, 3, 5, 8, 8)),
            "ids_keep": optional(IDS) | cut(0, 1) | values(other=torch.tensor([[0, 3, 4, 6]] * 2)),
        },
    ),
    "TimeSformer.load_pretrained": Call(
        lambda **a: timesformer().load_pretrained(**a),
        lambda: dict(state_dict=timesformer().state_dict()),
        {"state_dict": STATE},
    ),
    "TimeSformerBlock": Call(
        nn.TimeSformerBlock, lambda: dict(LAYER), LAYERS | {"backend": OPTION}
    ),
    "TimeSformerBlock.forward": Call(
        lambda **a: timesformer().blocks[0](**a),
        lambda: dict(
            x=torch.rand(2, 5, 8), frames=2, space=ops.Groups.equal(4, 3),
            time=ops.Groups.equal(4, 2),
        ),
        {
            "x": FLOATS | cut(0, 1, 2),
            "frames": POSITIVE | values(many=3),
            "space": GROUPS | values(rows=ops.Groups.equal(2, 4)),
            "time": optional(GROUPS) | values(rows=ops.Groups.equal(2, 5)),
        },
    ),
    "Momentum": Call(
        nn.Momentum,
        lambda: dict(rate=0.9, vision=nn.Projection(8, 4)),
        {"rate": RATE, "vision": MODULE},
    ),
    "Momentum.start": Call(
        lambda **a: momentum().start(**a),
        lambda: dict(model=torch.nn.ModuleDict({"vision": nn.Projection(8, 4)})),
        {"model": MODULE | values(other=nn.Projection(8, 4))},
    ),
    "Momentum.update": Call(
        lambda **a: momentum().update(**a),
        lambda: dict(model=torch.nn.ModuleDict({"vision": nn.Projection(8, 4)})),
        {"model": MODULE | values(other=nn.Projection(8, 4))},
    ),
    "SpaceTimeTransformer.load_pretrained": Call(
        lambda **a: divided().load_pretrained(**a),
        lambda: dict(state_dict=divided().state_dict(), frames="zeros"),
        {"state_dict": STATE, "frames": OPTION},
    ),
    "resize_table": Call(
        nn.resize_table,
        lambda: dict(table=torch.rand(8, 2), old=(1, 1, 3), new=(1, 2, 3), mode="bilinear"),
        {"table": without(FLOATS, "meta") | cut(0), "old": GRID, "new": GRID, "mode": OPTION},
    ),
    "inflate_table": Call(
        nn.inflate_table,
        lambda: dict(table=torch.rand(8, 2), grid=(1, 1, 3), frames=2),
        {"table": without(FLOATS, "meta") | cut(0), "grid": GRID, "frames": POSITIVE},
    ),
    "WordsDecoder": Call(
        nn.WordsDecoder,
        lambda: dict(
            vocab_size=20, width=8, layers=1, num_heads=2, mlp_width=16, visual_width=8,
            max_positions=6, token_types=2, dropout=0.1,
        ),
        {
            "vocab_size": POSITIVE,
            "width": POSITIVE,
            "layers": POSITIVE,
            "num_heads": HEADS,
            "mlp_width": optional(POSITIVE),
            "visual_width": optional(POSITIVE),
            "max_positions": POSITIVE,
            "token_types": COUNT,
            "dropout": RATE,
            "backend": OPTION,
        },
    ),
    "WordsDecoder.forward": Call(
        lambda **a: words_decoder()(**a),
        lambda: dict(
            ids=WORDS, attention_mask=PRESENT, visual=torch.rand(2, 3, 8), partner=PARTNER
        ),
        {
            "ids": IDS | cut(0, 1) | values(long=torch.ones(2, 7).long()),
            "attention_mask": PADDING,
            "visual": FLOATS | cut(2),
            "partner": optional(IDS) | cut(0),
            "cu_visual": values(unneeded=CU),
            "max_visual": values(unneeded=3),
            "words": NUM_WORDS,
        },
    ),
    "WordsDecoder.write": Call(
        lambda **a: words_decoder().write(**a),
        lambda: dict(visual=torch.rand(2, 3, 8), texts=2),
        {
            "visual": FLOATS | cut(2),
            "texts": POSITIVE,
            "cu_visual": values(unneeded=CU),
            "max_visual": values(unneeded=3),
        },
    ),
    "WordsDecoder.start_from": Call(
        lambda **a: words_decoder().start_from(**a), lambda: dict(text=bert()), {"text": MODULE}
    ),
    "ViT": Call(
        nn.ViT,
        lambda: ENCODER | dict(prune_layers=[0], pruning=nn.Pruning(0.5)),
        ENCODERS
        | {
            "init_values": optional(FACTOR),
            "pre_norm": FLAG,
            "prune_layers": PRUNE_LAYERS,
            "pruning": PRUNING | values(none=None),
            "backend": OPTION,
        },
    ),
    "ViT.forward": Call(
        lambda **a: vit()(**a),
        lambda: dict(
            video=torch.rand(2, 3, 2, 8, 8), ids_keep=torch.tensor([[0, 3, 5, 6]] * 2),
            time=torch.rand(2, 8),
        ),
        {
            "video": VIDEO | cut(0),
            "ids_keep": optional(IDS) | cut(0, 1),
            "time": optional(FLOATS) | cut(0, 1),
        },
    ),
    "GridFeatures": Call(
        nn.GridFeatures,
        lambda: dict(cnn="test_resnet", width=8, stride=8, places=4, dropout=0.0, mean=None,
                     std=None),
        {"cnn": OPTION, "width": POSITIVE, "stride": POSITIVE | values(four=4),
         "places": POSITIVE, "dropout": RATE, "mean": MEAN, "std": STD},
    ),
    "GridFeatures.forward": Call(
        lambda **a: grid_features()(**a),
        lambda: dict(video=torch.rand(2, 3, 4, 32, 32), views=2,
                     ids_keep=torch.tensor([[0, 3, 5, 6]] * 2)),
        {"video": VIDEO | cut(0), "views": POSITIVE | values(three=3),
         "ids_keep": optional(IDS) | cut(0, 1) | {"large": lambda x: x + 4}},
    ),
    "GridFeatures.load_pretrained": Call(
        lambda **a: grid_features().load_pretrained(**a),
        lambda: dict(state_dict=grid_features().cnn.state_dict()),
        {"state_dict": STATE},
    ),
    "JointViT": Call(
        nn.JointViT,
        lambda: ENCODER | dict(tubelet_size=2, num_frames=2),
        without(ENCODERS, "tubelet_size")
        | {"num_frames": POSITIVE, "embed_dim": POSITIVE, "backend": OPTION}
        | {"position": OPTION, "class_token": FLAG},
    ),
    "JointViT.embed, by frame": Call(
        lambda **a: mae().embed(**a),
        lambda: dict(
            video=torch.rand(2, 3, 4, 8, 8), ids_keep=torch.tensor([[0, 3, 5]] * 2),
            time=torch.rand(4, 8),
        ),
        {"video": VIDEO | cut(0), "ids_keep": optional(IDS) | cut(0), "time": optional(FLOATS)
         | cut(0, 1)},
    ),
    "JointViT.embed": Call(
        lambda **a: joint_vit().embed(**a),
        lambda: dict(video=torch.rand(2, 3, 4, 8, 8), ids_keep=torch.tensor([[0, 3, 5]] * 2)),
        {"video": VIDEO | cut(0), "ids_keep": optional(IDS) | cut(0)}
        | {"time": values(given=torch.rand(2, 8), text="x")},
    ),
    "JointViT.forward": Call(
        lambda **a: joint_vit()(**a),
        lambda: dict(x=torch.rand(6, 8), groups=ops.Groups.equal(2, 3)),
        {"x": FLOATS | cut(0, 1), "groups": without(GROUPS, "none")},
    ),
    "JointViT.load_pretrained": Call(
        lambda **a: joint_vit().load_pretrained(**a),
        lambda: dict(state_dict=joint_vit().state_dict()),
        {"state_dict": STATE},
    ),
    "Merged": Call(
        nn.Merged,
        lambda: dict(clips=torch.rand(2, 3, 8), captions=nn.Captions(WORDS, PRESENT)),
        {"clips": FLOATS | cut(0), "captions": OTHER | values(number=3, tensor=WORDS)},
    ),
    "Merged.rows": Call(
        lambda **a: merged().rows(**a),
        lambda: dict(clips=torch.rand(2, 3, 8), text=torch.rand(2, 4, 8)),
        {"clips": FLOATS | cut(0, 1, 2), "text": FLOATS | cut(0, 1)},
    ),
    "Merged.split": Call(
        lambda **a: merged().split(**a),
        lambda: dict(x=merged().rows(torch.rand(2, 3, 8), torch.rand(2, 4, 8))),
        {"x": FLOATS | cut(0)},
    ),
    "Words": Call(
        nn.Words,
        lambda: dict(vocab_size=200, width=8, max_positions=16, token_types=2, dropout=0.1),
        {
            **{name: POSITIVE for name in ("vocab_size", "width", "max_positions")},
            "token_types": COUNT,
            "dropout": RATE,
            "mlm_head": FLAG,
        },
    ),
    "Words.predict_words": Call(
        lambda **a: nn.Words(200, 8, 16, mlm_head=True).predict_words(**a),
        lambda: dict(hidden=TEXT, positions=torch.arange(3)),
        {"hidden": FLOATS | cut(2), "positions": IDS},
    ),
    "Words.forward": Call(
        lambda **a: nn.Words(200, 8, 16)(**a),
        lambda: dict(ids=WORDS, attention_mask=PRESENT),
        {
            "ids": IDS | cut(0, 1) | values(long=torch.ones(2, 600).long()),
            "attention_mask": PADDING,
            "words": NUM_WORDS,
        },
    ),
    "Words.load_pretrained": Call(
        lambda **a: nn.Words(200, 8, 16).load_pretrained(**a),
        lambda: dict(state_dict=nn.Words(200, 8, 16).state_dict()),
        {"state_dict": STATE},
    ),
    "ViT.set_keep_rate": Call(
        lambda **a: vit().set_keep_rate(**a), lambda: dict(keep_rate=0.5), {"keep_rate": SHARE}
    ),
    "ViT.load_pretrained": Call(
        lambda **a: vit().load_pretrained(**a),
        lambda: dict(state_dict=vit().state_dict()),
        {"state_dict": STATE},
    ),
}  # fmt: skip

TINY = dict(
    image_size=8, patch_size=4, width=8, depth=1, heads=2, text_width=8, text_layers=1,
    text_heads=2, dropout=0.0, embed_dim=4, mask_ratio=0.5, vocabulary=masking.Vocabulary(200),
)  # fmt: skip
SMAUG = dict(
    prune_layers=(0,), fusion_layers=1, decoder_width=8, decoder_depth=1, decoder_heads=2
)  # fmt: skip


@functools.cache
def smaug():
    return models.Smaug(models.SmaugRecipe(**TINY, **SMAUG))


@functools.cache
def mac():
    return models.Mac(models.MacRecipe(**TINY))


FUSION = dict(prune_layers=(0,), fusion_layers=1)
OWN_FIELDS = {
    "simvtp": dict(
        frames=4,
        tubelet_size=1,
        text_layers=0,
        embed_dim=8,
        decoder_width=8,
        decoder_depth=1,
        decoder_heads=2,
    ),
    "vlc": dict(frames=4, text_layers=0, decoder_width=8, decoder_depth=1, decoder_heads=2),
    "singularity": FUSION | dict(frames=4),
    "vindlu": FUSION,
    "svitt": FUSION | dict(fusion_layers=2, block=4, random_blocks=1),
    "alpro": dict(mask_ratio=0.5, mask="tube", merge_layers=1, text_layers=1, entities=3),
    "omnivl": dict(
        frames=4, mask_ratio=0.5, mask="tube", fusion_layers=1, text_layers=1, writer_layers=1
    ),
}


@functools.cache
def system(name):
    entry = models.MODELS[name]
    return entry.model(type(entry.presets["base"])(**TINY | OWN_FIELDS[name]))


def of_systems():
    """The calls of the other systems."""
    calls = {}
    for name in OWN_FIELDS:
        entry, model = models.MODELS[name], functools.partial(system, name)
        kind, recipe = entry.model.__name__, type(entry.presets["base"])
        calls[recipe.__name__] = Call(recipe, lambda n=name: TINY | OWN_FIELDS[n], OWN_RECIPE[name])
        calls[kind] = Call(
            entry.model,
            lambda m=model: dict(recipe=m().recipe),
            {"recipe": OTHER | values(number=3, other=models.MacRecipe(**TINY))},
        )
        calls[f"{kind}.forward"] = Call(lambda m=model, **a: m()(**a), batch, BATCH)
        width = 8 if name == "simvtp" else 4
        calls |= encoders(kind, model, width if models.can(entry.model, models.Aligns) else None)
        clips = CLIPS[:, 0] if name in ("simvtp", "svitt", "vlc", "alpro", "omnivl") else CLIPS
        fuse = FUSE | {"clips": FLOATS | cut(clips.ndim - 1)}
        join = lambda c=clips: dict(  # noqa: E731
            clips=c, text=TEXT, attention_mask=PRESENT, partner=PARTNER
        )
        calls[f"{kind}.join"] = Call(lambda m=model, **a: m().join(**a), join, fuse)
        calls[f"{kind}.match"] = Call(lambda m=model, **a: m().match(**a), join, fuse)
    return calls


CLIPBERT = dict(
    cnn="test_resnet", stride=8, image_size=32, frames=2, views=2, text_width=8, text_layers=1,
    text_heads=2, dropout=0.0, mask_ratio=0.5, vocabulary=masking.Vocabulary(200),
)  # fmt: skip


@functools.cache
def clipbert():
    return models.ClipBert(models.ClipBertRecipe(**CLIPBERT))


def of_clipbert():
    """The calls of ClipBERT, whose CNN needs larger frames."""
    recipe = {
        **{name: POSITIVE for name in ("frames", "views", "views_tested", "text_layers")},
        **{name: LOSSES["mlm"] for name in ("mlm", "vtm")},
        "stride": POSITIVE | values(four=4), "image_size": POSITIVE | values(other=24),
        "aggregate": OPTION, "mask": values(clip="clip"), "tubelet_size": values(two=2),
    }  # fmt: skip
    own = lambda **extra: batch(video=torch.zeros(2, 3, 4, 32, 32).byte()) | extra  # noqa: E731
    video = dict(mask=clipbert().recipe.visual_mask(SAMPLES, 0), video=own()["video"])
    join = lambda: dict(  # noqa: E731
        clips=CLIPS, text=TEXT, attention_mask=PRESENT, partner=PARTNER
    )
    fuse = FUSE | {"attention_mask": without(PADDING, "none") | values(none=None)}
    return {
        "ClipBertRecipe": Call(models.ClipBertRecipe, lambda: CLIPBERT, recipe),
        "ClipBert": Call(
            models.ClipBert,
            lambda: dict(recipe=clipbert().recipe),
            {"recipe": OTHER | values(number=3, other=models.MacRecipe(**TINY))},
        ),
        "ClipBert.forward": Call(lambda **a: clipbert()(**a), own, BATCH),
        "ClipBert.encode_clips": Call(
            lambda **a: clipbert().encode_clips(**a),
            lambda: video,
            {"video": VIDEO, "mask": optional(VISUAL_MASK)},
        ),
        "ClipBert.join": Call(lambda **a: clipbert().join(**a), join, fuse),
        "ClipBert.match": Call(lambda **a: clipbert().match(**a), join, fuse),
    }


@functools.cache
def pairing():
    return models.Pairing(models.Smaug(models.SmaugRecipe(**TINY, **SMAUG)))


@functools.cache
def answering():
    return models.Answering(models.Smaug(models.SmaugRecipe(**TINY, **SMAUG)), ["yes", "no"])


def tokenized(texts, words):
    """A tokenizer, as far as `Ranking` needs one: [CLS], one word, [SEP]."""
    ids = torch.tensor([[101, 3 + number, 102] for number, _ in enumerate(texts)])
    return ids, torch.ones_like(ids)


@functools.cache
def ranked():
    smaug = models.Smaug(models.SmaugRecipe(**TINY, **SMAUG))
    return models.Ranking(smaug, ["yes", "no"], tokenized, layers=1)


@functools.cache
def captioning():
    smaug = models.Smaug(models.SmaugRecipe(**TINY, **SMAUG))
    return models.Captioning(smaug, tokenized, layers=1).eval()


def batch(**extra):
    video = torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8)
    return dict(video=video, ids=WORDS, attention_mask=PRESENT, samples=SAMPLES, step=1) | extra


def visual_mask():
    return smaug().recipe.visual_mask(SAMPLES, 0)


BATCH = {
    "video": VIDEO | cut(0),
    "ids": IDS | cut(0, 1) | values(long=torch.ones(2, 600).long()),
    "attention_mask": PADDING | values(none=None),
    "samples": IDS | cut(0),
    "step": STEP,
    "clip_ids": values(
        text="x",
        list=[0, 1],
        number=1,
        floats=torch.rand(2),
        short=SAMPLES[:1],
        meta=SAMPLES.to("meta"),
    ),
    "words": NUM_WORDS,
}
CLIPS = torch.rand(2, 4, 3, 8)
TEXT = torch.rand(2, 4, 8)
FUSE = {
    "clips": FLOATS | cut(3),
    "text": FLOATS | cut(0, 1, 2),
    "attention_mask": PADDING,
    "partner": optional(IDS) | cut(0),
    "words": NUM_WORDS,
}
LOSSES = {name: FACTOR | values(negative=-1.0) for name in ("vtc", "vtm", "mlm")}
PRUNED = {
    "prune_layers": values(
        none=None, text="a", large=(1,), negative=(-1,), halves=(0.5,), bools=(False,)
    ),
    "keep_rate": SHARE,
    "fusion_layers": POSITIVE,
    **LOSSES,
}  # fmt: skip
VIT = {
    **{name: POSITIVE for name in ("patch_size", "width", "heads")},
    "depth": COUNT,
}
MERGED = {
    **{name: POSITIVE for name in ("decoder_width", "decoder_heads")},
    "decoder_depth": COUNT,
    "text_layers": values(one=1),
    "text_width": values(other=16),
    **{name: FACTOR | values(negative=-1.0) for name in ("vtm", "mlm", "mvm")},
}
OWN_RECIPE = {
    "simvtp": MERGED | {"embed_dim": values(other=16), "vtc": LOSSES["vtc"]},
    "vlc": MERGED
    | {"wpa": FACTOR | values(negative=-1.0), "mask": values(clip="clip"),
       "tubelet_size": values(two=2)},
    "singularity": PRUNED
    | {"frames_tested": COUNT, "ensemble": OPTION, "time_layers": COUNT,
       "mask": values(clip="clip"), "tubelet_size": values(two=2)},
    "vindlu": PRUNED
    | {"time": OPTION, "drop_path": RATE | values(one=1.0), "mask": values(clip="clip")},
    "svitt": PRUNED | {"block": COUNT, "random_blocks": COUNT, "keep_keys": SHARE},
    "alpro": LOSSES
    | {"pem": LOSSES["vtc"], "mask": values(frame="frame"), "merge_layers": POSITIVE,
       "entities": POSITIVE, "threshold": RATE, "text_width": values(other=16),
       "text_layers": POSITIVE},
    "omnivl": {name: x for name, x in LOSSES.items() if name != "mlm"}
    | {"lm": LOSSES["vtc"], "mask": values(frame="frame"), "fusion_layers": POSITIVE,
       "writer_layers": POSITIVE, "queue": COUNT, "momentum": RATE},
}  # fmt: skip
RECIPE = {
    **{name: POSITIVE for name in ("frames", "image_size", "tubelet_size")},
    **{name: POSITIVE for name in ("text_width", "text_heads", "embed_dim")},
    **{name: COUNT for name in ("text_layers", "seed")},
    "mask": OPTION,
    "mask_ratio": RATE | values(one=1.0),
    "dropout": RATE,
    "vocabulary": values(none=None, text="x", number=200),
    "word_ratio": RATE,
    "temperature": FACTOR | values(zero=0.0, negative=-1.0),
    "mean": optional(MEAN) | values(none=None),
    "std": optional(STD) | values(none=None),
    "gather": FLAG,
    "backend": OPTION,
}
ENCODE_CLIPS = {
    "video": VIDEO | values(long=torch.rand(2, 3, 6, 8, 8)),
    "mask": optional(VISUAL_MASK),
}
ENCODE_TEXT = {
    "ids": BATCH["ids"],
    "attention_mask": PADDING,
    "words": NUM_WORDS,
}


def encoders(name, model, embed_dim=4):
    """The calls that all models have; with `embed_dim` those of features too."""
    text = lambda: dict(ids=WORDS, attention_mask=PRESENT)  # noqa: E731
    own = lambda: model().recipe.visual_mask(SAMPLES, 0) or visual_mask()  # noqa: E731
    clips = lambda: dict(video=batch()["video"], mask=own())  # noqa: E731
    calls = {
        f"{name}.encode_clips": Call(lambda **a: model().encode_clips(**a), clips, ENCODE_CLIPS),
        f"{name}.encode_text": Call(lambda **a: model().encode_text(**a), text, ENCODE_TEXT),
    }
    if embed_dim is None:
        return calls
    return calls | {
        f"{name}.embed_clips": Call(lambda **a: model().embed_clips(**a), clips, ENCODE_CLIPS),
        f"{name}.embed_text": Call(lambda **a: model().embed_text(**a), text, ENCODE_TEXT),
        f"{name}.similarity": Call(
            lambda **a: model().similarity(**a),
            lambda: dict(clips=torch.rand(2, embed_dim), text=torch.rand(3, embed_dim)),
            {"clips": without(FLOATS, "more") | cut(1)} | {"text": FLOATS | cut(1)},
        ),
    }


SEVERAL = values(
    none=None, text="yes", number=3, numbers=[1], lists=[[3]], none_of=[[]], deep=[[["yes"]]]
)


def answers(name, model):
    """The calls that all models which answer questions have."""
    return {
        f"{name}.forward": Call(
            lambda **a: model()(**a),
            lambda: batch(answers=torch.tensor([0, -1])),
            BATCH | {"answers": optional(IDS) | cut(0) | values(weights=torch.zeros(2, 9))},
        ),
        f"{name}.answer": Call(
            lambda **a: model().answer(**a),
            lambda: dict(clips=CLIPS, text=TEXT, attention_mask=PRESENT, partner=PARTNER),
            FUSE,
        ),
        f"{name}.numbers": Call(
            lambda **a: model().numbers(**a),
            lambda: dict(answers=["yes", None, "other"]),
            {"answers": values(none=None, text="yes", number=3, numbers=[1], lists=[["yes"]])},
        ),
        f"{name}.targets": Call(
            lambda **a: model().targets(**a),
            lambda: dict(answers=["yes", None, ["yes", "other"]]),
            {"answers": SEVERAL},
        ),
        f"{name}.knows": Call(
            lambda **a: model().knows(**a),
            lambda: dict(answers=["yes", "no"]),
            {"answers": values(number=3, numbers=[1], empty=[], set={"yes"})},
        ),
    }


class Words:
    """A tokenizer, as far as `export` needs one."""

    pad_id = 0

    def __len__(self):
        return 200

    def save(self, file):
        file.write_text("{}")


MODEL = MODULE | values(linear=torch.nn.Linear(2, 2))
ANSWERS = {
    "model": MODEL | values(mac=models.Mac),
    "answers": values(
        none=None, text="yes", number=3, empty=[], twice=["a", "a"], numbers=[1, 2], nones=[None]
    ),
}
MODELS = {
    "recipe": Call(
        models.recipe,
        lambda: dict(name="smaug", preset="tiny"),
        {"name": OPTION, "preset": OPTION, "widht": values(unknown=3), "width": POSITIVE},
    ),
    "create": Call(
        models.create,
        lambda: dict(name="smaug", preset="tiny") | TINY | SMAUG,
        {"name": OPTION, "preset": OPTION, "widht": values(unknown=3), "width": POSITIVE},
    ),
    # The two bases have no objects of their own.
    "Recipe": Call(models.MacRecipe, lambda: dict(TINY), RECIPE),
    "VitRecipe": Call(models.MacRecipe, lambda: dict(TINY), VIT),
    "FusionRecipe": Call(models.FusionRecipe, lambda: TINY | FUSION, PRUNED),
    "can": Call(
        models.can,
        lambda: dict(model=mac(), ability=models.Aligns),
        {"model": OTHER | values(number=3), "ability": OTHER | values(number=3)},
    ),
    "MacRecipe": Call(
        models.MacRecipe, lambda: dict(TINY), {"time": OPTION, "mask": values(clip="clip")}
    ),
    "SmaugRecipe": Call(
        models.SmaugRecipe,
        lambda: TINY | SMAUG,
        {
            "mask": values(clip="clip"),
            "prune_layers": values(
                none=None, text="a", large=(1,), negative=(-1,), halves=(0.5,), bools=(False,)
            ),
            "keep_rate": SHARE,
            "fuse": optional(OPTION),
            "frame_time": OPTION,
            "frames_kept": POSITIVE | values(many=5),
            "fusion_layers": POSITIVE,
            **{name: POSITIVE for name in ("decoder_width", "decoder_heads")},
            "decoder_depth": COUNT,
            **{name: FACTOR | values(negative=-1.0) for name in ("vtc", "vtm", "mlm", "mvm")},
        },
    ),
    "Smaug": Call(
        models.Smaug,
        lambda: dict(recipe=smaug().recipe),
        {"recipe": OTHER | values(number=3, other=models.MacRecipe(**TINY))},
    ),
    "Mac": Call(
        models.Mac,
        lambda: dict(recipe=mac().recipe),
        {"recipe": OTHER | values(number=3, other=models.SmaugRecipe(**TINY, **SMAUG))},
    ),
    "Smaug.forward": Call(lambda **a: smaug()(**a), batch, BATCH),
    "Mac.forward": Call(lambda **a: mac()(**a), batch, BATCH),
    **encoders("Smaug", smaug),
    **encoders("Mac", mac),
    **of_systems(),
    **of_clipbert(),
    "Smaug.fuse": Call(
        lambda **a: smaug().fuse(**a),
        lambda: dict(clips=CLIPS, text=TEXT, attention_mask=PRESENT, partner=PARTNER),
        FUSE,
    ),
    "Smaug.match": Call(
        lambda **a: smaug().match(**a),
        lambda: dict(clips=CLIPS, text=TEXT, attention_mask=PRESENT, partner=PARTNER),
        FUSE,
    ),
    "Answering": Call(
        models.Answering,
        lambda: dict(model=models.Smaug(smaug().recipe), answers=["yes", "no"]),
        ANSWERS,
    ),
    "Ranking": Call(
        models.Ranking,
        lambda: dict(
            model=models.Smaug(smaug().recipe), answers=["yes", "no"], tokenizer=tokenized,
            layers=1, top=2,
        ),
        ANSWERS | {"tokenizer": CALLABLE, "layers": POSITIVE, "top": POSITIVE},
    ),
    **answers("Answering", answering),
    **answers("Ranking", ranked),
    "Captioning": Call(
        models.Captioning,
        lambda: dict(model=models.Smaug(smaug().recipe), tokenizer=tokenized, layers=1),
        {"model": MODEL | values(mac=models.Mac), "tokenizer": CALLABLE, "layers": POSITIVE},
    ),
    "Pairing": Call(
        models.Pairing,
        lambda: dict(model=models.Smaug(smaug().recipe)),
        {"model": MODEL | values(mac=models.Mac)},
    ),
    "Pairing.forward": Call(
        lambda **a: pairing()(**a),
        lambda: batch(labels=torch.tensor([True, False]), video=torch.zeros(2, 3, 8, 8, 8)),
        BATCH | {"labels": without(optional(IDS), "flags") | cut(0)},
    ),
    "Pairing.encode_clips": Call(
        lambda **a: pairing().encode_clips(**a),
        lambda: dict(video=torch.zeros(2, 3, 8, 8, 8)),
        {"video": VIDEO},
    ),
    "Pairing.compare": Call(
        lambda **a: pairing().compare(**a),
        lambda: dict(clips=torch.rand(2, 2, 4, 3, 8), text=TEXT, attention_mask=PRESENT,
                     partner=PARTNER),
        FUSE | {"clips": FLOATS | cut(1, 4)},
    ),
    "Captioning.forward": Call(lambda **a: captioning()(**a), batch, BATCH),
    "Captioning.generate": Call(
        lambda **a: captioning().generate(**a),
        lambda: dict(clips=CLIPS, words=3, beams=2, length_penalty=1.0),
        {
            "clips": FLOATS | cut(3), "words": POSITIVE | values(many=600), "beams": POSITIVE,
            "length_penalty": FACTOR,
        },
    ),
    "frequent_answers": Call(
        models.frequent_answers,
        lambda: dict(answers=["yes", None, "no"], most=1),
        {
            "answers": SEVERAL | values(empty=[]),
            "most": POSITIVE,
        },
    ),
    "summarize": Call(
        models.summarize,
        lambda: dict(model=mac(), batch=2, words=4, steps=0),
        {
            "model": MODEL,
            "batch": POSITIVE | values(one=1),
            "words": POSITIVE | values(long=600),
            "steps": COUNT,
        },
    ),
    **{
        name: Call(getattr(export, name), lambda: dict(model=mac()), {"model": MODEL})
        for name in (
            "vision_weights", "text_weights", "text_config", "vision_options", "vision_config",
            "tokenizer_config",
        )
    },
    "export": Call(
        export.export,
        None,
        {
            "model": MODEL,
            "folder": values(none=None, number=3, list=["a"]),
            "tokenizer": OTHER | values(number=3, list=["a"]),
        },
    ),
}  # fmt: skip

TABLE = {
    f"{module}.{name}": call
    for module, calls in (
        ("ops", OPS | OTHER_OPS),
        ("masking", MASKING),
        ("objectives", OBJECTIVES),
        ("nn", NN),
        ("models", MODELS),
    )
    for name, call in calls.items()
}
BACKENDS = [
    backend
    for backend in ("native", "triton", "reference", "auto")
    if backend == "auto" or not library.why_not(backend, "select_tokens", "cpu", torch.float32)
]


def right(name: str, tmp_path: Any) -> dict[str, Any]:
    """The arguments of the right call."""
    if name == "models.export":
        pytest.importorskip("safetensors")
        return dict(model=mac(), folder=tmp_path, tokenizer=Words())
    return TABLE[name].right()


@pytest.mark.parametrize("name", TABLE)
def test_the_right_call_passes(name, tmp_path):
    TABLE[name].function(**right(name, tmp_path))


@pytest.mark.parametrize(
    "name, argument",
    [
        pytest.param(name, argument, id=f"{name}-{argument}")
        for name, call in TABLE.items()
        for argument in call.wrong
    ],
)
def test_bad_calls_name_the_argument(name, argument, tmp_path):
    arguments = right(name, tmp_path)
    unclear = []
    for fault, wrong in TABLE[name].wrong[argument].items():
        changed = arguments | {argument: wrong(arguments.get(argument))}
        by_backend = name.removeprefix("ops.") in OPS and argument != "backend"
        answers = {
            answer(TABLE[name].function, changed | options)
            for options in ([{"backend": b} for b in BACKENDS] if by_backend else [{}])
        }
        names = [argument] if fault in OWN else [*arguments, argument]
        clear = re.compile(rf"(TypeError|ValueError): (.*\W)?({'|'.join(names)})\b", re.DOTALL)
        if len(answers) > 1 or not clear.match(next(iter(answers))):
            unclear.append((fault, *answers))
    assert not unclear, "\n".join(map(str, unclear))


def answer(function, arguments):
    """The error of a call, or what it returned."""
    try:
        return f"accepted: {type(function(**arguments)).__name__}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_there_are_many_bad_calls():
    assert sum(len(kind) for call in TABLE.values() for kind in call.wrong.values()) >= 300


def test_every_public_function_is_in_the_table():
    done = {"Groups"}  # test_groups.py
    # Results, which no caller makes; and bases.
    done |= {"RunLengths", "Selected", "Frames", "SelectedFrames", "MaskedWords", "VisualMask"}
    done |= {
        "Negatives",
        "Cost",
        "Answers",
        "Summary",
        "System",
        "TwoTowers",
        "Inputs",
        "Seen",
        "Joint",
    }
    done |= {"Card", "Entry", "Encodes", "Aligns", "Joins", "Matches", "Describes", "FineTuned"}
    done |= {"Taught"}
    for module in (ops, masking, objectives, nn, models):
        for name in module.__all__:
            if inspect.isroutine(getattr(module, name)) or inspect.isclass(getattr(module, name)):
                known = f"{module.__name__.removeprefix('vidl.')}.{name}" in TABLE
                assert known or name in done, name
