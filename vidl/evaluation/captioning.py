"""Captions of the clips of a data set, and how close they are to its own captions."""

import dataclasses
import json
from dataclasses import dataclass

from vidl.data.dataset import ClipSet
from vidl.evaluation.caption_metrics import bleu, cider_d, rouge_l
from vidl.evaluation.encoding import Gallery, Options, encoded_clips, evaluating, of_all_ranks
from vidl.evaluation.retrieval import broken_lines, captions_of
from vidl.models.captioning import BEAMS, Captioning


@dataclass(frozen=True)
class Captioned:
    """A clip with the caption of a model, which is empty if the clip could not be read.

    Attributes:
        media: file of the clip.
        caption: what the model wrote.
        references: the captions of the data set.
    """

    media: str
    caption: str
    references: list[str]


@dataclass(frozen=True)
class CaptionScores:
    """The result of `captioning`.

    Attributes:
        bleu, rouge_l, cider_d: BLEU-4, ROUGE-L and CIDEr-D times 100, as papers print them; see
            `vidl.evaluation.bleu`, `rouge_l` and `cider_d`.
        clips: all clips with their captions, including broken ones.
        broken: clips that could not be read, and why; their captions are empty.
    """

    bleu: float
    rouge_l: float
    cider_d: float
    clips: list[Captioned]
    broken: dict[str, str] = dataclasses.field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """The metrics by their names in papers."""
        return {"BLEU-4": self.bleu, "ROUGE-L": self.rouge_l, "CIDEr-D": self.cider_d}

    def to_json(self) -> str:
        """The result as JSON, with all captions."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        scores = ", ".join(f"{name} {value:.1f}" for name, value in self.numbers().items())
        return "\n".join([f"{len(self.clips)} clips: {scores}", *broken_lines(self.broken)])


def captioning(
    model: Captioning,
    dataset: ClipSet,
    options: Options = Options(),  # noqa: B008  (it is frozen)
    *,
    words: int | None = None,
    beams: int = BEAMS,
    length_penalty: float = 1.0,
) -> CaptionScores:
    """Write a caption of each clip and compare it with the captions of the data set.

    Rows with the same clip are one clip, with the captions of all of them as references. Runs over
    all ranks; every rank returns the same result.

    Args:
        model: `vidl.models.Captioning`, fine-tuned; otherwise see `retrieval`.
        dataset: rows with captions.
        options: batches, masks, pruning.
        words: the longest caption, in words and [SEP]; default: as in the data set.
        beams, length_penalty: see `vidl.models.Captioning.generate`.

    Raises:
        ValueError: a clip has no caption, the data set is for training, `words` is more than the
            decoder has positions, or a number is out of range.
    """
    gallery = Gallery(dataset)
    references = captions_of(gallery)
    most = dataset.words - 1 if words is None else words  # [CLS] is not written
    tokenizer, end = dataset.tokenizer, model.special.end
    assert tokenizer is not None  # Gallery has checked it
    broken: dict[str, str] = {}
    own: dict[int, str] = {}
    with evaluating(model, options):
        for numbers, clips in encoded_clips(model, gallery, options, broken):
            written = model.generate(clips, most, beams=beams, length_penalty=length_penalty)
            for number, ids in zip(numbers, written.ids.tolist(), strict=True):
                own[number] = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
    broken = {name: why for part in of_all_ranks(broken) for name, why in part.items()}
    captions = {number: text for part in of_all_ranks(own) for number, text in part.items()}
    texts = [captions.get(number, "") for number in range(len(gallery))]
    scores = [100 * metric(texts, references) for metric in (bleu, rouge_l, cider_d)]
    rows = [
        Captioned(gallery.row(number).media, text, own_references)
        for number, (text, own_references) in enumerate(zip(texts, references, strict=True))
    ]
    return CaptionScores(scores[0], scores[1], scores[2], rows, broken)
