"""The objectives of pre-training, as functions of a model and of what a step has encoded."""

from typing import Any

from torch import Tensor

from vidl.masking import mask_words
from vidl.models.system import Seen
from vidl.objectives import hard_negatives, masked_word_loss, matching_loss


def contrast(model: Any, seen: Seen) -> Tensor:
    """VTC: clips and captions of a batch are compared by their features."""
    return model.contrast(seen.v, seen.t, seen.inputs.clip_ids)


def match_hard(model: Any, seen: Seen) -> Tensor:
    """VTM over 3 B pairs: a caption with its clip, with a hard negative clip, and the reverse."""
    inputs = seen.inputs
    similarity = model.similarity(seen.v, seen.t)
    negatives = hard_negatives(
        model.recipe.seed, inputs.step, inputs.samples, similarity, inputs.clip_ids
    )
    captions, partner = negatives.pairs()
    mask, words = inputs.attention_mask[captions], inputs.words
    most = None if words is None else 2 * words + inputs.ids.numel()
    pairs = model.match(seen.clips, seen.text[captions], mask, partner, most)
    return matching_loss(pairs, negatives)


def fill_words(model: Any, seen: Seen) -> Tensor:
    """MLM: words of the caption are masked and predicted from the rest and the clip."""
    inputs, r = seen.inputs, model.recipe
    hidden = mask_words(
        r.seed, inputs.step, inputs.samples, inputs.ids, inputs.attention_mask, r.word_ratio,
        vocabulary=r.vocabulary,
    )  # fmt: skip
    text = model.encode_text(hidden.ids, inputs.attention_mask, words=inputs.words)
    joint = model.join(seen.clips, text, inputs.attention_mask, words=inputs.words)
    logits = model.text.predict_words(joint.text, hidden.positions)
    return masked_word_loss(logits, hidden.labels)


def reconstruct_pixels(model: Any, seen: Seen) -> Tensor | None:
    """MVM: the pixels of masked patches are predicted; None without a mask."""
    if seen.mask is None:
        return None
    pixels = model.reconstruct(seen.more, seen.mask)
    return model.pixels(pixels, seen.inputs.video, seen.mask.ids_mask)
