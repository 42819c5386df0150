"""Accuracy on sentences about two clips."""

from collections.abc import Sequence

from torch import Tensor

from vidl.data.dataset import ClipSet
from vidl.data.formats import Row
from vidl.evaluation.encoding import Gallery, Options, encode_texts
from vidl.evaluation.questions import Accuracy, answer_all
from vidl.models.pairing import Pairing


def pairs_of_clips(
    model: Pairing,
    dataset: ClipSet,
    options: Options = Options(),  # noqa: B008  (it is frozen)
) -> Accuracy:
    """Tell whether sentences hold for two clips each, as in NLVR2.

    A pair with several sentences is encoded once. A tie of both logits counts as "does not hold".
    Runs over all ranks.

    Args:
        model: `vidl.models.Pairing`, fine-tuned; otherwise see `retrieval`.
        dataset: rows with a caption, `second` and `label`.
        options: batches, pruning; pairs are not masked.

    Raises:
        ValueError: a row has no second clip or no label, or `options.masked` is set.
    """
    if options.masked:
        raise ValueError("need masked=False for pairs of clips, got True")

    def right(clips: Tensor, rows: Sequence[Row], partner: Tensor, gallery: Gallery) -> Tensor:
        texts = encode_texts(model.model, gallery, [row.captions[0] for row in rows])
        partner = partner.to(clips.device)
        logits = model.compare(clips, texts.tokens, texts.attention_mask, partner).cpu()
        holds = logits[:, 1] > logits[:, 0]
        return holds == holds.new_tensor([bool(row.label) for row in rows])

    def check(row: Row) -> bool:
        if row.second is None or row.label is None or not row.captions:
            raise ValueError(
                f"need a caption, second and label in each row of pairs, got none for {row.media}"
            )
        return True

    return answer_all(model, dataset, options, right, check, pairs=True)
