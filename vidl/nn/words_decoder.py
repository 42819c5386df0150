"""A decoder of words: BERT with causal attention to words, and attention to given rows."""

from typing import Any

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_count,
    check_dtype,
    check_floating,
    check_shape,
    check_tensors,
)
from vidl.kernels.groups import Groups
from vidl.nn.bert import Bert
from vidl.nn.captions import Captions


class WordsDecoder(Bert):
    """Predicts the next word of a text from the words before it and from the rows of a clip.

    Every layer has causal self-attention, cross-attention and MLP, as the fusion layers of `Bert`;
    the output layer is the word embedding. Parameters are named as in Hugging Face's
    `BertLMHeadModel` with `is_decoder` and `add_cross_attention`, without the prefix `bert.`, and
    `load_pretrained` loads its state_dict, or that of a BERT with as many layers. Dropout and
    packing are those of `Bert`. Sources: BERT, arXiv 1810.04805; its use as a decoder of answers:
    ALBEF, arXiv 2107.07651, 3.4.

    Args:
        layers: number of layers; Singularity answers questions with 3.
        visual_width: channels of the rows; default C.
        vocab_size, width, num_heads, mlp_width, max_positions, token_types, dropout, backend: see
            `Bert`.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        width: int = 768,
        layers: int = 3,
        num_heads: int = 12,
        mlp_width: int | None = None,
        visual_width: int | None = None,
        max_positions: int = 512,
        token_types: int = 2,
        dropout: float = 0.1,
        *,
        backend: str = "auto",
    ) -> None:
        check_count("layers", layers, 1)
        super().__init__(
            vocab_size, width, 0, layers, num_heads, mlp_width, visual_width, max_positions,
            token_types, dropout, mlm_head=True, backend=backend,
        )  # fmt: skip

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        visual: Tensor,
        *,
        partner: Tensor | None = None,
        cu_visual: Tensor | None = None,
        max_visual: int | None = None,
        words: int | None = None,
    ) -> Tensor:
        """The logits of the word after each word.

        Args:
            ids: words, [B, L] int64; the first is usually [CLS].
            attention_mask: [B, L], nonzero at words; None: no padding.
            visual: rows of S clips, [S, N, visual_width], or packed [total, visual_width] with
                `cu_visual`.
            partner: the clip of each text, [B] int64 in [0, S); None: text b attends to clip b, and
                S = B.
            cu_visual: offsets of the clips in a packed `visual`, [S + 1] int32. With `partner`,
                rows after the last clip are not used.
            max_visual: an upper bound of the rows of any clip in a packed `visual`.
            words: number of words to compute, or an upper bound; see `Captions`.

        Returns:
            [B, L, vocab_size], zero at padding.

        Raises:
            ValueError: shapes do not fit.
        """
        optional = ("partner", "cu_visual")
        check_tensors(optional, ids=ids, visual=visual, partner=partner, cu_visual=cu_visual)
        check_floating(visual=visual)
        captions = self._read(ids, attention_mask, words)
        self._check_visual(ids.shape[0], visual, partner, cu_visual, max_visual)
        x = self.embeddings(captions.pack(ids), captions.columns())
        x = self._fused(captions, x, visual, partner, cu_visual, max_visual)
        head: Any = self.cls
        return captions.unpack(head.predictions(x, self.embeddings.word_embeddings.weight))

    def write(
        self,
        visual: Tensor,
        *,
        texts: int = 1,
        cu_visual: Tensor | None = None,
        max_visual: int | None = None,
    ) -> "Writing":
        """Begin texts about clips, which are written word by word.

        Args:
            visual: rows of S clips, [S, N, visual_width], or packed [total, visual_width] with
                `cu_visual`.
            texts: texts about each clip.
            cu_visual, max_visual: see `forward`.

        Raises:
            ValueError: shapes do not fit.
        """
        model: Any = self.embeddings.word_embeddings.weight
        check_tensors(("cu_visual",), visual=visual, cu_visual=cu_visual, model=model)
        check_floating(visual=visual)
        check_count("texts", texts, 1)
        clips = visual.shape[0] if cu_visual is None else cu_visual.shape[0] - 1
        self._check_visual(clips, visual, None, cu_visual, max_visual)
        return Writing(self, visual, texts, cu_visual, max_visual)

    def start_from(self, text: nn.Module) -> None:
        """Copy the weights of a text encoder: embeddings, word head and the last layers.

        Weights that the text encoder does not have in this shape keep their values, such as
        cross-attention to rows of another width. Source: ALBEF, arXiv 2107.07651, 3.4.

        Args:
            text: a `Bert`, or `Words`, which has no layers.
        """
        if not isinstance(text, nn.Module):
            raise TypeError(f"need text as Bert or Words, got {type(text).__name__}")
        own, weights = self.state_dict(), text.state_dict()
        layers = len({n.split(".")[2] for n in weights if n.startswith("encoder.layer.")})
        moved = self.fusion_layers - layers
        for name, weight in weights.items():
            if name.startswith("encoder.layer."):
                layer, _, rest = name.removeprefix("encoder.layer.").partition(".")
                name = f"encoder.layer.{int(layer) + moved}.{rest}"
            if name in own and own[name].shape == weight.shape:
                own[name].copy_(weight)

    def _own(self, captions: Captions) -> Groups:
        return captions.causal()


class Writing:
    """Texts that `WordsDecoder.write` has begun.

    Keys and values of the clips and of the words so far are kept, so that a step computes one word
    of each text. The logits are those of `WordsDecoder.forward` for the whole texts.

    Attributes:
        rows: number of texts; those about the same clip are next to each other.
        length: number of words so far.
        device: that of the clips.
    """

    def __init__(
        self,
        decoder: WordsDecoder,
        visual: Tensor,
        texts: int,
        cu_visual: Tensor | None,
        max_visual: int | None,
    ) -> None:
        self.decoder, self.length, self.device = decoder, 0, visual.device
        device = self.device
        if cu_visual is None:
            clips, most = visual.shape[:2]
            visual = visual.flatten(0, 1)
            self._cross = Groups.equal(clips, texts, keys=most, device=device)
        else:
            assert max_visual is not None  # `write` has checked it
            clips = cu_visual.shape[0] - 1
            steps = torch.arange(clips + 1, dtype=torch.int32, device=device) * texts
            self._cross = Groups.cross(
                steps, cu_visual, num_queries=clips * texts, num_keys=visual.shape[0],
                max_queries=texts, max_keys=max_visual,
            )  # fmt: skip
        self.rows = clips * texts
        self._layers: list[Any] = list(decoder._layers())
        self._clips = [layer.crossattention.keys(visual) for layer in self._layers]
        # Keys and values of the words, [rows, words, H, D] both.
        self._words: list[tuple[Tensor, Tensor]] = []

    def step(self, ids: Tensor) -> Tensor:
        """The logits of the word after the next word of each text, [rows, vocab_size].

        Args:
            ids: the next word of each text, [rows] int64; the first is usually [CLS].

        Raises:
            ValueError: shapes do not fit, or the texts have as many words as the decoder has
                positions.
        """
        decoder = self.decoder
        weight: Any = decoder.embeddings.word_embeddings.weight
        check_tensors(ids=ids, decoder=weight)
        check_dtype("ids", ids, torch.int64)
        check_shape("ids", ids, self.rows)
        if self.length >= decoder.embeddings.max_positions:
            raise ValueError(
                f"need ids of at most {self.length} words, the positions of the decoder, got more"
            )
        x = decoder.embeddings(ids, torch.full_like(ids, self.length))
        self.length += 1
        own = Groups.equal(self.rows, 1, keys=self.length, device=ids.device)
        before, self._words = self._words, []
        for number, layer in enumerate(self._layers):
            k, v = (y[:, None] for y in layer.attention.keys(x))
            if before:
                k, v = torch.cat([before[number][0], k], 1), torch.cat([before[number][1], v], 1)
            self._words.append((k, v))
            k, v = k.flatten(0, 1), v.flatten(0, 1)
            x, _ = layer.attention.attend(x, k, v, own, decoder.backend)
            k, v = self._clips[number]
            x, _ = layer.crossattention.attend(x, k, v, self._cross, decoder.backend)
            x = layer.mlp(x)
        head: Any = decoder.cls
        return head.predictions(x, weight)

    def choose(self, texts: Tensor) -> None:
        """Replace the texts by others of them about the same clip.

        Args:
            texts: [rows] int64, the text that continues in each row.
        """
        self._words = [(k.index_select(0, texts), v.index_select(0, texts)) for k, v in self._words]
