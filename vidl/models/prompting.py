"""Prompting entity modelling (PEM): a frozen model tells which entities a part of a clip shows."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.masking import uniform
from vidl.nn import Bert, Projection, TimeSformer
from vidl.nn.checkpoints import load_or_explain

# Stream of `uniform` for the rectangles; those of other draws are 1 to 6.
RECTANGLES = 7 << 58
AREA, ASPECT = (0.3, 0.5), (0.3, 3.33)
TEMPLATES = tuple(
    f"{medium} of {article} {{}}"
    for medium, article in itertools.product(
        ("a video", "a clip", "footage", "a recording"), ("a", "the", "one")
    )
)
# Words of captions that name no entity.
_FUNCTION_WORDS = (
    "a an the this that these those some any each one two and or but not no if as of in on at by "
    "to from with without into onto over under up down out off for about near then while when "
    "where who which what how is are was were be been being has have had do does did can could "
    "will would may might must should it its he she they we you i his her their our your my him "
    "them us me there here very just also"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


def rectangles(seed: int, step: int | Tensor, samples: Tensor, rows: int, columns: int) -> Tensor:
    """A random rectangle of patches in the frames of each clip, [B, rows, columns] bool.

    It has 30 to 50 % of the area and an aspect ratio of 0.3 to 3.33, both before it is rounded to
    whole patches and cut to the frame.

    Args:
        seed, step, samples: see `vidl.masking.uniform`.
        rows, columns: patches of a frame.
    """
    drawn = uniform(seed, step, samples, 4, stream=RECTANGLES).double()
    area = (AREA[0] + drawn[:, 0] * (AREA[1] - AREA[0])) * rows * columns
    low, high = (math.log(aspect) for aspect in ASPECT)
    aspect = (low + drawn[:, 1] * (high - low)).exp()
    inside = torch.ones(len(samples), rows, columns, dtype=torch.bool, device=samples.device)
    sides = (
        ((area * aspect).sqrt(), rows, drawn[:, 2]),
        ((area / aspect).sqrt(), columns, drawn[:, 3]),
    )
    for axis, (side, size, where) in enumerate(sides):
        side = side.round().clamp(1, size)
        begin = (where * (size - side + 1)).floor()
        place = torch.arange(size, device=samples.device)
        within = (place >= begin[:, None]) & (place < (begin + side)[:, None])
        inside &= within[:, :, None] if axis == 0 else within[:, None, :]
    return inside


def frequent_entities(captions: Iterable[str], most: int) -> list[str]:
    """The most frequent words of captions that may name an entity; ties in alphabetical order.

    Function words are left out; a list of nouns would need a tagger.

    Raises:
        ValueError: there are fewer words than `most`.
    """
    counts = Counter(word for text in captions for word in re.findall(r"[^\W\d_]+", text.lower()))
    words = sorted(counts.keys() - FUNCTION_WORDS, key=lambda word: (-counts[word], word))
    if len(words) < most:
        raise ValueError(
            f"need entities <= {len(words)}, the distinct words of the captions but function "
            f"words, got {most}"
        )
    return words[:most]


class Prompter(nn.Module):
    """A frozen clip encoder that compares clips with prompts of entities.

        p = softmax(cos(clip, prompts) / temperature)

    The prompts are random until `teach`. Source: ALPRO, arXiv 2112.09583, 3.3.

    Args:
        recipe: of `vidl.models.Alpro`.
    """

    prompts: Tensor
    temperature: Tensor
    taught: Tensor

    def __init__(self, recipe: Any) -> None:
        super().__init__()
        self.recipe = r = recipe
        self.vision = clip_encoder(r)
        self.project_clip = Projection(r.width, r.embed_dim)
        self.register_buffer("prompts", F.normalize(torch.randn(r.entities, r.embed_dim), dim=1))
        self.register_buffer("temperature", torch.tensor([r.temperature]))
        self.register_buffer("taught", torch.tensor([False]))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """The probability of every entity in each clip, [B, entities], float32 or better."""
        v = self.project_clip(self.vision(video)[:, 0])
        v = F.normalize(v.to(torch.promote_types(v.dtype, torch.float32)), dim=1)
        with torch.autocast(v.device.type, enabled=False):
            return (v @ self.prompts.to(v.dtype).T / self.temperature.to(v.dtype)).softmax(1)

    @torch.no_grad()
    def teach(
        self,
        weights: Mapping[str, Tensor],
        tokenizer: Callable[[Sequence[str], int], tuple[Tensor, Tensor]],
        entities: Sequence[str],
    ) -> None:
        """Take the weights of a trained model, and encode the prompts of entities with it.

        A prompt is the mean over `TEMPLATES`, normalised before and after.

        Args:
            weights: of `vidl.models.Alpro`.
            tokenizer: that of their captions, as in `vidl.models.Ranking`.
            entities: words, as many as the recipe has entities.

        Raises:
            ValueError: weights are missing or of another shape (all are named).
        """
        r, name = self.recipe, "text.embeddings.word_embeddings.weight"
        words = len(weights[name]) if name in weights else r.vocabulary.size
        text, project = text_encoder(r, words), Projection(r.text_width, r.embed_dim)
        parts = {
            "vision.": self.vision, "project_clip.": self.project_clip,
            "text.": text, "project_text.": project,
        }  # fmt: skip
        for prefix, part in parts.items():
            own = {n.removeprefix(prefix): x for n, x in weights.items() if n.startswith(prefix)}
            known = part.state_dict()
            load_or_explain(part, {n: x for n, x in own.items() if n in known})
        self.temperature.copy_(weights["contrast.temperature"])
        text.eval()
        for number, entity in enumerate(entities):
            ids, mask = tokenizer([template.format(entity) for template in TEMPLATES], 16)
            t = F.normalize(project(text.encode(ids, mask)[:, 0]), dim=1)
            self.prompts[number] = F.normalize(t.mean(0), dim=0)
        self.taught.fill_(True)


def clip_encoder(recipe: Any) -> TimeSformer:
    """The clip encoder of ALPRO."""
    r = recipe
    return TimeSformer(
        r.image_size, r.patch_size, embed_dim=r.width, depth=r.depth, num_heads=r.heads,
        num_frames=r.grid[0], backend=r.backend, **r.embedding,
    )  # fmt: skip


def text_encoder(recipe: Any, words: int, **more: Any) -> Bert:
    """The text encoder of ALPRO for a vocabulary; `more`: further options of `vidl.nn.Bert`."""
    r = recipe
    return Bert(
        words, r.text_width, r.text_layers, 0, r.text_heads, dropout=r.dropout,
        backend=r.backend, **more,
    )  # fmt: skip
