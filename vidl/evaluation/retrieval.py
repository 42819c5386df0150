"""Which clip does a caption belong to, and which caption a clip?"""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidl.data.dataset import ClipSet
from vidl.evaluation.encoding import (
    Gallery,
    Options,
    Texts,
    device_of,
    encode_texts,
    encoded_clips,
    evaluating,
    of_all_ranks,
    place,
    shown,
)
from vidl.evaluation.ranks import Ranking, ranking, ranks, reranked
from vidl.models import TwoTowers

DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}


@dataclass(frozen=True)
class Retrieval:
    """What `retrieval` finds.

    Attributes:
        clips, captions: how many there were, broken ones among them.
        rankings: "t2v" and "v2t", by the similarity of features.
        rerank: how many candidates of each query were judged again; 0: none.
        reranked: "t2v" and "v2t" after that; empty without it.
        broken: clips that could not be read, and why. Their captions found nothing, they found no
            caption, which is the last rank and a miss at any k, and they were in nobody's way.
    """

    clips: int
    captions: int
    rankings: dict[str, Ranking]
    rerank: int = 0
    reranked: dict[str, Ranking] = dataclasses.field(default_factory=dict)
    broken: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        first = next(iter(self.rankings.values()))
        names = [*(f"R@{k}" for k in first.recall), "median", "mean"]
        title = f"{self.clips} clips, {self.captions} captions"
        lines = [f"{title:<32}" + "".join(f"{name:>9}" for name in names)]
        groups = {"": self.rankings, f", best {self.rerank} re-ranked": self.reranked}
        for suffix, found in groups.items():
            for key, each in found.items():
                values = [*each.recall.values(), each.median, each.mean]
                cells = "".join(f"{value:>9.1f}" for value in values)
                lines.append(f"{DIRECTIONS[key] + suffix:<32}{cells}")
        return "\n".join(lines + broken_lines(self.broken))


def broken_lines(broken: dict[str, str]) -> list[str]:
    """A line for each clip that could not be read, and one before them."""
    if not broken:
        return []
    return [
        f"{len(broken)} clip{'s' * (len(broken) > 1)} could not be read, and count as missed:",
        *(f"  {name}: {why}" for name, why in broken.items()),
    ]


def retrieval(
    model: TwoTowers,
    dataset: ClipSet,
    options: Options = Options(),  # noqa: B008  (it is frozen)
    *,
    rerank: int = 0,
) -> Retrieval:
    """Search clips by captions, and captions by clips.

    Every clip is compared with every caption by the similarity of features. With `rerank` the
    fusion encoder then judges the best candidates of each query, in both directions, as ALBEF and
    Singularity do. A clip with several captions is found by each of them; it finds the best one of
    them. Rows that show the same clip are one clip. Runs over all ranks of torch.distributed, and
    each returns the same. Sources: ALBEF, arXiv 2107.07651, 3.4; Singularity, arXiv 2206.03428.

    Args:
        model: not wrapped: of a DDP its `module`; not sharded.
        dataset: with captions, a tokenizer, and clips as they are for evaluation (`train=False`).
        options: batches, masks, pruning.
        rerank: how many of the best candidates are judged again; 0: none. Singularity has 128. The
            tokens of all clips are then kept, in the memory of the host.

    Raises:
        ValueError: there are no captions, the data set is one for training, or the model was not
            trained to match.
    """
    if rerank < 0:
        raise ValueError(f"need rerank >= 0, got {rerank}")
    if rerank and not matches(model):
        raise ValueError("need a model trained with vtm to re-rank, as Smaug with vtm > 0")
    gallery = Gallery(dataset)
    captions, clip_of = _captions(gallery)
    with evaluating(model, options):
        similarity, read, matching, broken = _compare(model, gallery, captions, options, rerank)
    correct = clip_of == torch.arange(len(gallery))[:, None]  # [V, captions]
    first = {"t2v": ranks(similarity.T, correct.T), "v2t": ranks(similarity, correct)}
    hits = {"t2v": read[clip_of], "v2t": read}
    again = {}
    for key, scores in matching.items():
        views = (x.T if key == "t2v" else x for x in (similarity, scores, correct))
        again[key] = ranking(reranked(*views), hits[key])
    rankings = {key: ranking(first[key], hits[key]) for key in first}
    return Retrieval(len(gallery), len(captions), rankings, rerank, again, broken)


def matches(model: Any) -> bool:
    """Whether a model was trained to tell which caption matches a clip."""
    return hasattr(model, "match") and model.recipe.vtm > 0


def _captions(gallery: Gallery) -> tuple[list[str], Tensor]:
    """The captions of all clips, and the clip of each, [captions]."""
    captions, clip_of = [], []
    for clip, rows in enumerate(gallery.rows):
        own = [text for row in rows for text in gallery.dataset.row(row).captions]
        if not own:
            raise ValueError(f"need a caption of every clip, got none of {gallery.row(clip).media}")
        captions += own
        clip_of += [clip] * len(own)
    return captions, torch.tensor(clip_of)


def _compare(
    model: TwoTowers, gallery: Gallery, captions: list[str], options: Options, rerank: int
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, str]]:
    """Similarities [V, captions]; which clips were read; scores of matching; what is broken.

    The scores are of the best candidates of each query of a direction, [V, captions], -inf beyond.
    """
    # Equal captions are encoded once: rounding must not tell them apart.
    numbers = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    text_of = torch.tensor([numbers[text] for text in captions])
    texts = _all_texts(model, gallery, list(numbers), options, keep=rerank > 0)
    broken: dict[str, str] = {}
    own, tokens = _similarities(model, gallery, texts, options, broken, keep=rerank > 0)
    broken = {name: why for part in of_all_ranks(broken) for name, why in part.items()}
    similarity = torch.full((len(gallery), len(numbers)), -math.inf)
    read = torch.zeros(len(gallery), dtype=torch.bool)
    for clips, rows in (batch for part in of_all_ranks(own) for batch in part):
        similarity[clips], read[clips] = rows, True
    whole = similarity[:, text_of]
    if not rerank:
        return whole, read, {}, broken
    best = _best(whole, read, rerank)
    wanted = torch.zeros_like(similarity).index_add_(
        1, text_of, (best["t2v"] | best["v2t"]).float()
    )
    scores = torch.full_like(similarity, -math.inf)
    found = list(_matching(model, texts, tokens, wanted > 0, options))
    for clips, columns, values in (batch for part in of_all_ranks(found) for batch in part):
        scores[clips, columns] = values
    judged = {key: scores[:, text_of].masked_fill(~best[key], -math.inf) for key in best}
    return whole, read, judged, broken


def _all_texts(
    model: TwoTowers, gallery: Gallery, captions: list[str], options: Options, keep: bool
) -> Texts:
    """All captions, on the host; each rank encodes some of them. Tokens only if they are kept."""
    rank, ranks = place()
    size = options.text_batch
    batches = [captions[at : at + size] for at in range(0, len(captions), size)]
    own = {}
    for number in shown(range(rank, len(batches), ranks), "captions", options):
        texts = encode_texts(model, gallery, batches[number])
        tokens = texts.tokens if keep else texts.tokens[:, :0]
        own[number] = texts.features.cpu(), tokens.cpu(), texts.attention_mask.cpu()
    everyone = {number: each for part in of_all_ranks(own) for number, each in part.items()}
    columns = zip(*(everyone[number] for number in range(len(batches))), strict=True)
    return Texts(*map(torch.cat, columns))


def _similarities(
    model: TwoTowers,
    gallery: Gallery,
    texts: Texts,
    options: Options,
    broken: dict[str, str],
    keep: bool,
) -> tuple[list[tuple[list[int], Tensor]], dict[int, Tensor]]:
    """Of the clips of this rank with all captions; and their tokens on the host, if kept."""
    features, found = texts.features.to(device_of(model)), []
    kept: dict[int, Tensor] = {}
    for numbers, tokens in encoded_clips(model, gallery, options, broken):
        found.append((numbers, model.similarity(model.clip_features(tokens), features).cpu()))
        if keep:
            kept |= zip(numbers, tokens.cpu(), strict=True)
    return found, kept


def _best(similarity: Tensor, read: Tensor, k: int) -> dict[str, Tensor]:
    """The k best candidates of each query, of equal ones the first; [V, captions] bool."""
    best = {}
    for key, scores in (("t2v", similarity.T), ("v2t", similarity)):
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
        best[key] = (chosen.T if key == "t2v" else chosen) & read[:, None]
    return best


def _matching(
    model: Any, texts: Texts, tokens: dict[int, Tensor], wanted: Tensor, options: Options
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Clips, captions and scores of the wanted pairs whose clip is this rank's."""
    own = torch.tensor(sorted(tokens), dtype=torch.int64)
    if not len(own):  # all are broken
        return
    pairs = wanted[own].nonzero()  # ordered by clip: a batch has few clips
    for batch in shown(pairs.split(options.text_batch), "re-ranking pairs", options):
        clips, captions = own[batch[:, 0]], batch[:, 1]
        each, partner = clips.unique(return_inverse=True)
        visual = torch.stack([tokens[clip] for clip in each.tolist()]).to(device_of(model))
        yield clips, captions, match_scores(model, visual, texts[captions], partner).cpu()


def match_scores(model: Any, clips: Tensor, texts: Texts, partner: Tensor) -> Tensor:
    """The log-odds that texts match clips, [P] float32.

    Args:
        model: that `matches`.
        clips: tokens of V clips.
        texts: P texts; on the host, where their words are counted, or where the model is.
        partner: the clip of each text, [P] int64 in [0, V).
    """
    mask, device = texts.attention_mask, clips.device
    words = int(mask.sum()) if mask.device.type == "cpu" else None
    tokens, mask, partner = texts.tokens.to(device), mask.to(device), partner.to(device)
    logits = model.match(clips, tokens, mask, partner, words).float()
    return logits[:, 1] - logits[:, 0]
