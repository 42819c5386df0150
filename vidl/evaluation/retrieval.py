"""Text-to-video and video-to-text retrieval."""

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
    shown,
)
from vidl.evaluation.ranks import RankStatistics, rank_statistics, ranks, reranked
from vidl.models.abilities import Aligns, Matches, can, need
from vidl.objectives.contrastive import rank_and_size

DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}


@dataclass(frozen=True)
class Retrieval:
    """The result of `retrieval`.

    Attributes:
        clips, captions: number of clips and captions, including broken clips.
        rankings: "t2v" and "v2t", by the similarity of features; by the matching of all pairs if
            the model has no features.
        rerank: number of candidates that were re-ranked for each query; 0: none.
        reranked: "t2v" and "v2t" after re-ranking; empty without it.
        broken: clips that could not be read, and why. A broken clip and its captions get the last
            rank and are misses at any k; as candidates they rank behind all others.
    """

    clips: int
    captions: int
    rankings: dict[str, RankStatistics]
    rerank: int = 0
    reranked: dict[str, RankStatistics] = dataclasses.field(default_factory=dict)
    broken: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        first = next(iter(self.rankings.values()))
        names = [*(f"R@{k}" for k in first.recall), "median", "mean"]
        title = f"{self.clips} clips, {self.captions} captions"
        lines = [f"{title:<32}" + "".join(f"{name:>9}" for name in names)]
        groups = {"": self.rankings, f", top {self.rerank} re-ranked": self.reranked}
        for suffix, rankings in groups.items():
            for key, ranked in rankings.items():
                values = [*ranked.recall.values(), ranked.median, ranked.mean]
                cells = "".join(f"{value:>9.1f}" for value in values)
                lines.append(f"{DIRECTIONS[key] + suffix:<32}{cells}")
        return "\n".join(lines + broken_lines(self.broken))


def broken_lines(broken: dict[str, str]) -> list[str]:
    """A title and a line for each clip that could not be read."""
    if not broken:
        return []
    return [
        f"{len(broken)} clip{'s' * (len(broken) > 1)} could not be read (counted as misses):",
        *(f"  {name}: {why}" for name, why in broken.items()),
    ]


def retrieval(
    model: Any,
    dataset: ClipSet,
    options: Options = Options(),  # noqa: B008  (it is frozen)
    *,
    rerank: int = 0,
) -> Retrieval:
    """Evaluate retrieval: clips by captions (t2v) and captions by clips (v2t).

    Every clip is compared with every caption by the similarity of features. With `rerank` the
    fusion encoder re-ranks the best candidates of each query in both directions, as in ALBEF and
    Singularity. A model without features scores all pairs by its matching head, as ViLT does:
    clips are encoded once and their tokens kept in CPU memory, but the cost grows with clips times
    captions. If a clip has several captions, each of them is a query for t2v, and the best one
    counts for v2t. Rows with the same clip are one clip. Runs over all ranks of torch.distributed;
    every rank returns the same result. Sources: ALBEF, arXiv 2107.07651, 3.4; Singularity, arXiv
    2206.03428; ViLT, arXiv 2102.03334.

    Args:
        model: not wrapped (for DDP pass its `module`) and not sharded.
        dataset: has captions, a tokenizer and `train=False`.
        options: batches, masks, pruning.
        rerank: number of candidates to re-rank for each query; 0: none. Singularity uses 128. The
            tokens of all clips are then kept in CPU memory.

    Raises:
        ValueError: a clip has no caption, the data set is for training, the model neither has
            features nor was trained to match, or `rerank` is set and it does not have both.
    """
    if rerank < 0:
        raise ValueError(f"need rerank >= 0, got {rerank}")
    check_compares(model, "for retrieval")
    if rerank:
        need(model, Aligns, to="to re-rank (without features all pairs are matched)")
        check_matches(model, "to re-rank")
    gallery = Gallery(dataset)
    of_clips = captions_of(gallery)
    captions = [text for own in of_clips for text in own]
    clip_of = torch.arange(len(gallery)).repeat_interleave(torch.tensor([*map(len, of_clips)]))
    with evaluating(model, options):
        similarity, read, matching, broken = _compare(model, gallery, captions, options, rerank)
    correct = clip_of == torch.arange(len(gallery))[:, None]  # [clips, captions]
    first = {"t2v": ranks(similarity.T, correct.T), "v2t": ranks(similarity, correct)}
    hits = {"t2v": read[clip_of], "v2t": read}
    second = {}
    for key, scores in matching.items():
        views = (x.T if key == "t2v" else x for x in (similarity, scores, correct))
        second[key] = rank_statistics(reranked(*views), hits[key])
    rankings = {key: rank_statistics(first[key], hits[key]) for key in first}
    return Retrieval(len(gallery), len(captions), rankings, rerank, second, broken)


def matches(model: Any) -> bool:
    """Whether a model was trained with the matching loss."""
    return can(model, Matches) and model.recipe.vtm > 0


def check_matches(model: Any, to: str) -> None:
    """Raise ValueError unless a model was trained with the matching loss."""
    need(model, Matches, to=to)
    if not matches(model):
        raise ValueError(f"need a model trained with vtm > 0 {to}, got vtm=0")


def check_compares(model: Any, to: str) -> None:
    """Raise ValueError unless a model has features or was trained with the matching loss."""
    need(model, Aligns, Matches, to=to)
    if not can(model, Aligns):
        check_matches(model, to)


def captions_of(gallery: Gallery) -> list[list[str]]:
    """The captions of each clip.

    Raises:
        ValueError: a clip has none.
    """
    captions = []
    for clip, rows in enumerate(gallery.rows):
        own = [text for row in rows for text in gallery.dataset.row(row).captions]
        if not own:
            raise ValueError(f"need a caption of every clip, got none of {gallery.row(clip).media}")
        captions.append(own)
    return captions


def _compare(
    model: Any, gallery: Gallery, captions: list[str], options: Options, rerank: int
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, str]]:
    """Similarities [clips, captions], which clips were read, matching scores, broken clips.

    The matching scores, [clips, captions] by direction, are -inf except for the best candidates of
    each query.
    """
    # Equal captions are encoded once, so that rounding cannot break a tie.
    numbers = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    text_of = torch.tensor([numbers[text] for text in captions])
    aligned = can(model, Aligns)
    texts = _all_texts(model, gallery, list(numbers), options, keep=rerank > 0 or not aligned)
    broken: dict[str, str] = {}
    tokens: dict[int, Tensor] = {}
    if aligned:
        own, tokens = _similarities(model, gallery, texts, options, broken, keep=rerank > 0)
    else:
        own = _all_pairs(model, gallery, texts, options, broken)
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
    matched = list(_matching(model, texts, tokens, wanted > 0, options))
    for clips, columns, values in (batch for part in of_all_ranks(matched) for batch in part):
        scores[clips, columns] = values
    matching = {key: scores[:, text_of].masked_fill(~best[key], -math.inf) for key in best}
    return whole, read, matching, broken


def _all_texts(
    model: Any, gallery: Gallery, captions: list[str], options: Options, keep: bool
) -> Texts:
    """All captions on the CPU; each rank encodes a part. `keep`: with their tokens."""
    rank, ranks = rank_and_size()
    size = options.text_batch
    batches = [captions[at : at + size] for at in range(0, len(captions), size)]
    own = {}
    for number in shown(range(rank, len(batches), ranks), "captions", options):
        texts = encode_texts(model, gallery, batches[number])
        tokens = texts.tokens if keep else texts.tokens[:, :0]
        own[number] = texts.features.cpu(), tokens.cpu(), texts.attention_mask.cpu()
    encoded = {number: texts for part in of_all_ranks(own) for number, texts in part.items()}
    columns = zip(*(encoded[number] for number in range(len(batches))), strict=True)
    return Texts(*map(torch.cat, columns))


def _similarities(
    model: Any,
    gallery: Gallery,
    texts: Texts,
    options: Options,
    broken: dict[str, str],
    keep: bool,
) -> tuple[list[tuple[list[int], Tensor]], dict[int, Tensor]]:
    """Similarities of this rank's clips with all captions, and with `keep` the clips' tokens."""
    features, similarities = texts.features.to(device_of(model)), []
    kept: dict[int, Tensor] = {}
    for numbers, tokens in encoded_clips(model, gallery, options, broken):
        similarities.append(
            (numbers, model.similarity(model.clip_features(tokens), features).cpu())
        )
        if keep:
            kept |= zip(numbers, tokens.cpu(), strict=True)
    return similarities, kept


def _all_pairs(
    model: Any, gallery: Gallery, texts: Texts, options: Options, broken: dict[str, str]
) -> list[tuple[list[int], Tensor]]:
    """Matching scores of this rank's clips with all captions, in batches of pairs."""
    tokens: dict[int, Tensor] = {}
    for numbers, clips in encoded_clips(model, gallery, options, broken):
        tokens |= zip(numbers, clips.cpu(), strict=True)
    own = torch.tensor(list(tokens), dtype=torch.int64)
    count = len(texts.features)
    scores = torch.empty(len(own) * count)
    starts = range(0, len(scores), options.text_batch)
    for at in shown(starts, "batches of pairs", options):
        pairs = torch.arange(at, min(at + options.text_batch, len(scores)))
        scores[pairs] = _matched(model, texts, tokens, own[pairs // count], pairs % count)
    return [(own.tolist(), scores.view(len(own), count))]


def _best(similarity: Tensor, read: Tensor, k: int) -> dict[str, Tensor]:
    """The k best candidates of each query, ties in order; [clips, captions] bool."""
    best = {}
    for key, scores in (("t2v", similarity.T), ("v2t", similarity)):
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
        best[key] = (chosen.T if key == "t2v" else chosen) & read[:, None]
    return best


def _matching(
    model: Any, texts: Texts, tokens: dict[int, Tensor], wanted: Tensor, options: Options
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Clips, captions and scores of those wanted pairs whose clip belongs to this rank."""
    own = torch.tensor(sorted(tokens), dtype=torch.int64)
    if not len(own):  # all are broken
        return
    pairs = wanted[own].nonzero()  # ordered by clip: a batch has few clips
    for batch in shown(pairs.split(options.text_batch), "re-ranking pairs", options):
        clips, captions = own[batch[:, 0]], batch[:, 1]
        yield clips, captions, _matched(model, texts, tokens, clips, captions)


def _matched(
    model: Any, texts: Texts, tokens: dict[int, Tensor], clips: Tensor, captions: Tensor
) -> Tensor:
    """The log-odds of pairs, on the CPU; the tokens of a clip are sent to the device once."""
    distinct, partner = clips.unique(return_inverse=True)
    visual = torch.stack([tokens[clip] for clip in distinct.tolist()]).to(device_of(model))
    return match_scores(model, visual, texts[captions], partner).cpu()


def match_scores(model: Any, clips: Tensor, texts: Texts, partner: Tensor) -> Tensor:
    """The log-odds that texts match clips, [B] float32.

    Args:
        model: a model for which `matches` is true.
        clips: tokens of S clips.
        texts: B texts on the CPU, where counting words needs no synchronisation, or on the model's
            device.
        partner: the clip of each text, [B] int64 in [0, S).
    """
    mask, device = texts.attention_mask, clips.device
    words = int(mask.sum()) if mask.device.type == "cpu" else None
    tokens, mask, partner = texts.tokens.to(device), mask.to(device), partner.to(device)
    logits = model.match(clips, tokens, mask, partner, words).float()
    return logits[:, 1] - logits[:, 0]
