"""Search for probable texts word by word: greedy, or by beams."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vidl.kernels.arguments import check_count, finite

# On a GPU, steps between two looks at whether all texts have ended: each look waits for the device.
STEPS = 8


class Writes(Protocol):
    """What the search needs of `vidl.nn.words_decoder.Writing`."""

    rows: int
    device: torch.device

    def step(self, ids: Tensor) -> Tensor: ...

    def choose(self, texts: Tensor) -> None: ...


class Written(NamedTuple):
    """Texts, one for each clip.

    Attributes:
        ids: the words, [S, L] int64: without the word that begins a text, with the one that ends
            it, if it has ended, and then padding.
        scores: log p of a text over its number of words to the power of the length penalty, [S].
    """

    ids: Tensor
    scores: Tensor


class Special(NamedTuple):
    """Words with a meaning of their own.

    Attributes:
        begin: the word before a text, [CLS].
        end: the word that ends it, [SEP].
        pad: padding.
        never: words that no text has.
    """

    begin: int
    end: int
    pad: int = 0
    never: tuple[int, ...] = ()


def greedy_search(
    texts: Writes, special: Special, most: int, *, length_penalty: float = 1.0
) -> Written:
    """Take the most probable word at every step.

    Args:
        texts: one text for each clip, without a word yet.
        special: ids of special words.
        most: the longest text, in words, including the end.
        length_penalty: see `beam_search`; only the scores depend on it.

    Raises:
        ValueError: most < 1.
    """
    check_count("most", most, 1)
    length_penalty = finite("length_penalty", length_penalty)
    rows, device = texts.rows, texts.device
    never = torch.tensor(special.never, dtype=torch.int64, device=device)
    ids = torch.full((rows, most), special.pad, device=device)
    scores = torch.zeros(rows, device=device)
    words = torch.zeros(rows, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    word = torch.full((rows,), special.begin, device=device)
    for at in range(most):
        likely, word = _log_p(texts.step(word), never).max(1)
        scores = scores + likely.masked_fill(done, 0)
        words = words + ~done
        word = word.masked_fill(done, special.pad)
        ids[:, at] = word
        done = done | (word == special.end)
        if _all(done, at):
            break
    return Written(ids, scores / words**length_penalty)


def beam_search(
    texts: Writes,
    special: Special,
    most: int,
    beams: int,
    *,
    length_penalty: float = 1.0,
) -> Written:
    """Continue the `beams` most probable beginnings of a text at every step.

        score = log p(words) / words^length_penalty

    A text that ends among the `beams` most probable ones is a candidate, and the next beginnings
    continue in its place. The search for a clip stops with `beams` candidates, or at the longest
    texts, which are candidates too; the best score wins. One beam is the greedy search. Sources:
    Sutskever et al., arXiv 1409.3215, 3.2; length penalty: Wu et al., arXiv 1609.08144, 7.

    Args:
        texts: `beams` texts for each clip, without a word yet.
        special, most: see `greedy_search`.
        beams: beginnings that continue, K.
        length_penalty: 1: the mean log p of a word; 0: log p, which prefers short texts.

    Raises:
        ValueError: a number is out of range.
    """
    check_count("most", most, 1)
    check_count("beams", beams, 1)
    length_penalty = finite("length_penalty", length_penalty)
    K, S, device = beams, texts.rows // beams, texts.device
    never = torch.tensor(special.never, dtype=torch.int64, device=device)
    first = torch.arange(S, device=device)[:, None] * K  # the first text of each clip
    words = torch.full((S, K, most), special.pad, device=device)
    live = torch.full((S, K), -torch.inf, device=device)
    live[:, 0] = 0  # all texts are equal before the first word: one continues
    best = torch.full((S,), -torch.inf, device=device)
    ids = torch.full((S, most), special.pad, device=device)
    count = torch.zeros(S, dtype=torch.int64, device=device)  # candidates of each clip
    word = torch.full((S, K), special.begin, device=device)
    for at in range(most):
        log_p = _log_p(texts.step(word.flatten()), never).unflatten(0, (S, K))
        total = live[:, :, None] + log_p  # [S, K, vocabulary]
        size = total.shape[2]
        # At most K of these end, as each text ends once: at least K continue.
        values, places = total.flatten(1).topk(min(2 * K, K * size))
        parent, word = places // size, places % size
        begun = words.gather(1, parent[:, :, None].expand(-1, -1, most))
        begun[:, :, at] = word
        # Candidates.
        ends = (word == special.end) | (at == most - 1)
        among = torch.arange(values.shape[1], device=device) < K
        ends = ends & among & values.isfinite() & (count < K)[:, None]
        scores = (values / (at + 1) ** length_penalty).masked_fill(~ends, -torch.inf)
        score, which = scores.max(1)
        better = score > best
        best = torch.where(better, score, best)
        text = begun.gather(1, which[:, None, None].expand(-1, 1, most))[:, 0]
        ids = torch.where(better[:, None], text, ids)
        count = count + ends.sum(1)
        if at == most - 1 or _all(count >= K, at):
            break
        # Those that continue.
        values = values.masked_fill(word == special.end, -torch.inf)
        live, chosen = values.topk(K)
        word = word.gather(1, chosen)
        words = begun.gather(1, chosen[:, :, None].expand(-1, -1, most))
        texts.choose((first + parent.gather(1, chosen)).flatten())
    return Written(ids, best)


def _log_p(logits: Tensor, never: Tensor) -> Tensor:
    """log p of every word, in float32 or better; those of `never` have -inf."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.index_fill(1, never, -torch.inf).log_softmax(1)


def _all(done: Tensor, at: int) -> bool:
    """Whether all texts have ended, as far as the host knows it after step `at`."""
    looks = done.device.type == "cpu" or (at + 1) % STEPS == 0
    return looks and bool(done.all())
