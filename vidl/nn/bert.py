"""BERT for captions: text layers, then fusion layers that also attend to a clip."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_count,
    check_dtype,
    check_flag,
    check_floating,
    check_shape,
    check_tensors,
)
from vidl.kernels.groups import Groups
from vidl.kernels.library import check_backend
from vidl.nn.arguments import check_dropout, check_heads, check_state
from vidl.nn.captions import Captions
from vidl.nn.checkpoints import load_or_explain
from vidl.nn.keys_of_text import KeysOfText
from vidl.nn.merged import Merged
from vidl.nn.pruning import Scores, scored_attention

EPS = 1e-12
BASE_WIDTH = 768


class PredictsWords(nn.Module):
    """Word embeddings, and BERT's head that predicts words, with them as its output layer.

    A subclass creates `embeddings` and calls `add_word_head`, or has no head.
    """

    embeddings: "BertEmbeddings"
    width: int

    def add_word_head(self) -> None:
        """Create the head, named as `cls` in Hugging Face's `BertForMaskedLM`."""
        self.cls = nn.Module()
        self.cls.predictions = _MlmHead(self.width, self.embeddings.word_embeddings.num_embeddings)

    def predict_words(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Compute logits of words, only at the given positions.

        Args:
            hidden: tokens of captions, [B, L, C], such as the output of `Bert.fuse`.
            positions: [M] int64 in [0, B L), as from `vidl.masking.mask_words`.

        Returns:
            [M, vocab_size].

        Raises:
            ValueError: the model was built without `mlm_head=True`.
        """
        if not hasattr(self, "cls"):
            raise ValueError(f"need {type(self).__name__}(mlm_head=True) to predict words")
        head: Any = self.cls
        check_tensors(hidden=hidden, positions=positions, model=head.predictions.bias)
        check_floating(hidden=hidden)
        check_shape("hidden", hidden, "B", "L", self.width)
        check_dtype("positions", positions, torch.int64)
        check_shape("positions", positions, "M")
        rows = hidden.flatten(0, 1).index_select(0, positions)
        return head.predictions(rows, self.embeddings.word_embeddings.weight)


class Bert(PredictsWords):
    """BERT whose last layers fuse captions with visual tokens.

    The first `text_layers` are BERT's. The `fusion_layers` after them also attend to the visual
    tokens, between self-attention and MLP; ALBEF and Singularity split BERT-base into 9 + 3 layers.
    Layers are post-norm with GELU. Parameters are named as in Hugging Face's `BertModel`, those of
    fusion layers as in its cross-attention layers, so its state_dict loads. Captions are packed:
    see `vidl.nn.captions.Captions` for `words`. Dropout applies to hidden states, as
    `hidden_dropout_prob`. Attention weights are never stored, so they cannot be dropped out
    (`attention_probs_dropout_prob` must be 0). There is no pooler: CLS is `hidden[:, 0]`. Sources:
    BERT, arXiv 1810.04805; ALBEF, arXiv 2107.07651, 3.1; Singularity, arXiv 2206.03428, 3.1.

    Args:
        vocab_size: number of words.
        width: channels of a token, C.
        text_layers, fusion_layers: number of layers; BERT-base has 12 in total.
        num_heads: number of heads, H.
        mlp_width: width of the MLP's hidden layer; default 4 C.
        visual_width: channels of the visual tokens; default C.
        max_positions: length of the longest caption.
        token_types: number of segment embeddings (captions use the first); 0: none, as in
            DistilBERT.
        dropout: rate for hidden states.
        merge_layers: layers after these in which words and clip are one sequence; see `merge`.
        mlm_head: add a head that predicts words, with the word embedding as its output layer, named
            as `cls` in `BertForMaskedLM`.
        backend: of the attention.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        width: int = 768,
        text_layers: int = 9,
        fusion_layers: int = 3,
        num_heads: int = 12,
        mlp_width: int | None = None,
        visual_width: int | None = None,
        max_positions: int = 512,
        token_types: int = 2,
        dropout: float = 0.1,
        *,
        mlm_head: bool = False,
        merge_layers: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_heads("width", width, num_heads)
        for name, count, least in (
            ("vocab_size", vocab_size, 1), ("text_layers", text_layers, 0),
            ("fusion_layers", fusion_layers, 0), ("mlp_width", mlp_width, 1),
            ("visual_width", visual_width, 1), ("max_positions", max_positions, 1),
            ("token_types", token_types, 0), ("merge_layers", merge_layers, 0),
        ):  # fmt: skip
            if count is not None or name not in ("mlp_width", "visual_width"):
                check_count(name, count, least)  # type: ignore[arg-type]
        check_dropout(dropout)
        check_flag("mlm_head", mlm_head)
        check_backend(backend)
        if text_layers + fusion_layers + merge_layers < 1:
            raise ValueError(
                f"need at least one layer, got text_layers={text_layers}, "
                f"fusion_layers={fusion_layers} and merge_layers={merge_layers}"
            )
        self.text_layers, self.fusion_layers, self.backend = text_layers, fusion_layers, backend
        self.merge_layers = merge_layers
        self.width, self.visual_width = width, width if visual_width is None else visual_width
        self.embeddings = BertEmbeddings(vocab_size, width, max_positions, token_types, dropout)
        mlp_width = 4 * width if mlp_width is None else mlp_width
        fused = [None] * text_layers + [self.visual_width] * fusion_layers + [None] * merge_layers
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            BertLayer(width, num_heads, mlp_width, dropout, visual) for visual in fused
        )
        if mlm_head:
            self.add_word_head()
        self.apply(functools.partial(initialise, width=width))

    def encode(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """Run the text layers.

        Args:
            ids: words, [B, L] int64.
            attention_mask: [B, L], nonzero at words; None: no padding.
            words: number of rows to compute: the number of words, or an upper bound; see
                `Captions`.

        Returns:
            [B, L, C], zero at padding; CLS comes first.

        Raises:
            ValueError: shapes do not fit, or captions are longer than `max_positions`.
        """
        captions = self._read(ids, attention_mask, words)
        x = self.embeddings(captions.pack(ids), captions.columns())
        groups = self._own(captions)
        for layer in self._layers()[: self.text_layers]:
            x = layer(x, groups, self.backend)
        return captions.unpack(x)

    def fuse(
        self,
        text: Tensor,
        attention_mask: Tensor | None,
        visual: Tensor,
        *,
        partner: Tensor | None = None,
        cu_visual: Tensor | None = None,
        max_visual: int | None = None,
        words: int | None = None,
        keys: KeysOfText | None = None,
    ) -> Tensor:
        """Run the fusion layers: captions attend to themselves and to visual tokens.

        Keys and values of a clip are computed once, for all captions that attend to it, as in the
        positive and negative pairs of video-text matching; after a layer of `keys`, for each
        caption.

        Args:
            text: output of `encode`, [B, L, C].
            attention_mask: [B, L], nonzero at words; None: no padding.
            visual: tokens of S clips, [S, N, visual_width], or packed [total, visual_width] with
                `cu_visual`.
            partner: the clip of each caption, [B] int64 in [0, S); None: caption b attends to clip
                b, and S = B.
            cu_visual: offsets of the clips in a packed `visual`, [S + 1] int32.
            max_visual: an upper bound of the tokens of any clip in a packed `visual`.
            words: number of rows to compute: the number of words, or an upper bound; see
                `Captions`.
            keys: which visual tokens later fusion layers see; None: all.

        Returns:
            [B, L, C], zero at padding.

        Raises:
            ValueError: shapes do not fit, there are no fusion layers, or `keys` is given with
                packed visual tokens.
        """
        tensors = dict(text=text, attention_mask=attention_mask, visual=visual)
        optional = ("attention_mask", "partner", "cu_visual")
        check_tensors(optional, **tensors, partner=partner, cu_visual=cu_visual)
        check_floating(text=text, visual=visual)
        if not self.fusion_layers:
            raise ValueError("need Bert(fusion_layers=...) with at least 1 layer to fuse")
        check_shape("text", text, "B", "L", self.width)
        self._check_visual(text.shape[0], visual, partner, cu_visual, max_visual)
        self._check_keys(keys, cu_visual)
        captions = Captions(text, attention_mask, words)
        x = captions.pack(text)
        x = self._fused(captions, x, visual, partner, cu_visual, max_visual, keys)
        return captions.unpack(x)

    def merge(
        self,
        text: Tensor,
        attention_mask: Tensor | None,
        clips: Tensor,
        *,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the merge layers: a caption and its clip are one sequence for self-attention.

        Source: ALPRO, arXiv 2112.09583, 3.1.

        Args:
            text: output of `encode`, [B, L, C].
            attention_mask: [B, L], nonzero at words; None: no padding.
            clips: tokens of S clips, [S, N, C].
            partner: the clip of each caption, [B] int64 in [0, S); None: caption b has clip b, and
                S = B.
            words: number of rows of words to compute, or an upper bound; see `Captions`.

        Returns:
            The captions, [B, L, C], zero at padding, and the clip of each, [B, N, C].

        Raises:
            ValueError: shapes do not fit, or there are no merge layers.
        """
        tensors = dict(text=text, attention_mask=attention_mask, clips=clips, partner=partner)
        check_tensors(("attention_mask", "partner"), **tensors)
        check_floating(text=text, clips=clips)
        if not self.merge_layers:
            raise ValueError("need Bert(merge_layers=...) with at least 1 layer to merge")
        check_shape("text", text, "B", "L", self.width)
        check_shape("clips", clips, "S", "N", self.width)
        if partner is not None:
            check_dtype("partner", partner, torch.int64)
            check_shape("partner", partner, text.shape[0])
        elif clips.shape[0] != text.shape[0]:
            raise ValueError(
                f"need partner for {text.shape[0]} captions in text and {clips.shape[0]} clips"
            )
        clips = clips if partner is None else clips[partner]
        merged = Merged(clips, Captions(text, attention_mask, words))
        x, groups = merged.rows(clips, text), merged.joint()
        for layer in self._layers()[self.text_layers + self.fusion_layers :]:
            x = layer(x, groups, self.backend)
        clips, text = merged.split(x)
        return text, clips

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Load the weights of Hugging Face's BERT or DistilBERT, with or without its heads.

        Names may begin with `bert.` or `distilbert.`. The weights of the pooler, of next-sentence
        prediction and, without `mlm_head`, of word prediction are skipped. The cross-attention of
        fusion layers may be missing, as in BERT itself: it keeps its initial weights.

        Returns:
            The names of weights that were skipped.

        Raises:
            ValueError: weights are missing, unexpected or of another shape (all are named), or the
                checkpoint's output layer is not its word embedding.
        """
        check_state(state_dict)
        unused = ["pooler.", "cls.seq_relationship.", "embeddings.position_ids"]
        unused += [] if hasattr(self, "cls") else ["cls."]
        skipped = [name for name in state_dict if bert_name(name).startswith(tuple(unused))]
        weights = {bert_name(n): w for n, w in state_dict.items() if n not in skipped}
        weights = with_tied_head(weights)
        crossing = [name for name in self.state_dict() if ".crossattention." in name]
        fresh = not any(".crossattention." in name for name in weights)
        load_or_explain(self, weights, may_miss=crossing if fresh else ())
        return skipped

    def _layers(self) -> nn.ModuleList:
        layers = self.encoder.layer
        assert isinstance(layers, nn.ModuleList)
        return layers

    def _own(self, captions: Captions) -> Groups:
        """The groups of self-attention."""
        return captions.joint()

    def _read(self, ids: Tensor, attention_mask: Tensor | None, words: int | None) -> Captions:
        """Check the ids of captions, and pack them."""
        words_of: Any = self.embeddings.word_embeddings.weight
        optional = ("attention_mask",)
        check_tensors(optional, ids=ids, attention_mask=attention_mask, model=words_of)
        check_dtype("ids", ids, torch.int64)
        if ids.ndim != 2 or ids.shape[1] > self.embeddings.max_positions:
            raise ValueError(
                f"need ids [B, L], L at most {self.embeddings.max_positions}, got "
                f"{tuple(ids.shape)}"
            )
        return Captions(ids, attention_mask, words)

    def _fused(
        self,
        captions: Captions,
        x: Tensor,
        visual: Tensor,
        partner: Tensor | None,
        cu_visual: Tensor | None,
        max_visual: int | None,
        keys: KeysOfText | None = None,
    ) -> Tensor:
        """The packed words `x` of captions after the fusion layers."""
        if cu_visual is None:
            S, max_visual = visual.shape[:2]
            visual = visual.flatten(0, 1)
            cu_keys = torch.arange(S + 1, dtype=torch.int32, device=visual.device) * max_visual
        else:
            cu_keys = cu_visual
        assert max_visual is not None
        own = self._own(captions)
        cross = captions.cross(cu_keys, visual.shape[0], max_visual, partner, cu_visual is None)
        clips = visual
        last = self.text_layers + self.fusion_layers
        for number, layer in enumerate(self._layers()[self.text_layers : last]):
            if keys is None or number != keys.layer or not keys.drops(max_visual):
                x = layer(x, own, self.backend, clips, cross)
                continue
            x, scores = layer(x, own, self.backend, clips, cross, "cls")
            scores = scores.view(captions.batch, max_visual)
            kept = keys.select(visual.unflatten(0, (-1, max_visual)), scores, partner, self.backend)
            clips, count = kept.flatten(0, 1), kept.shape[1]
            steps = torch.arange(kept.shape[0] + 1, dtype=torch.int32, device=clips.device)
            cross = captions.cross(steps * count, clips.shape[0], count, None, True)
        return x

    def _check_keys(self, keys: KeysOfText | None, cu_visual: Tensor | None) -> None:
        if keys is not None and not isinstance(keys, KeysOfText):
            raise TypeError(f"need keys=KeysOfText(keep_rate, ...), got {keys!r}")
        if keys is not None and keys.layer >= self.fusion_layers:
            raise ValueError(
                f"need keys with a layer below fusion_layers={self.fusion_layers}, got {keys}"
            )
        if keys is not None and cu_visual is not None:
            raise ValueError("need equally many tokens in every clip with keys, got cu_visual")

    def _check_visual(
        self,
        B: int,
        visual: Tensor,
        partner: Tensor | None,
        cu_visual: Tensor | None,
        max_visual: int | None,
    ) -> None:
        if (cu_visual is None) != (max_visual is None):
            raise ValueError("need cu_visual and max_visual together, for packed visual tokens")
        packed = cu_visual is not None
        if cu_visual is not None:
            check_dtype("cu_visual", cu_visual, torch.int32)
            check_shape("cu_visual", cu_visual, "S + 1")
        if max_visual is not None:
            check_count("max_visual", max_visual)
        if visual.ndim != 3 - packed or visual.shape[-1] != self.visual_width:
            raise ValueError(
                f"need visual [S, N, {self.visual_width}], or [total, {self.visual_width}] with "
                f"cu_visual, got {tuple(visual.shape)}"
            )
        clips = visual.shape[0] if cu_visual is None else cu_visual.shape[0] - 1
        if partner is None and clips != B:
            raise ValueError(f"need partner for {B} captions and {clips} clips in visual")
        if partner is not None:
            check_dtype("partner", partner, torch.int64)
            check_shape("partner", partner, B)


class BertEmbeddings(nn.Module):
    """Word, position and segment embeddings of packed words, and LayerNorm.

    Parameters are named as in Hugging Face's `BertEmbeddings`.
    """

    def __init__(
        self, vocab_size: int, width: int, max_positions: int, token_types: int, dropout: float
    ) -> None:
        super().__init__()
        self.max_positions = max_positions
        self.word_embeddings = nn.Embedding(vocab_size, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(max_positions, width)
        self.token_type_embeddings = nn.Embedding(token_types, width) if token_types else None
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, columns: Tensor) -> Tensor:
        x = self.word_embeddings(ids)
        if self.token_type_embeddings is not None:
            x = x + self.token_type_embeddings(torch.zeros_like(ids))
        return self.dropout(self.LayerNorm(x + self.position_embeddings(columns)))


class BertLayer(nn.Module):
    """Self-attention, cross-attention if `visual_width` is given, and MLP, on packed rows."""

    def __init__(
        self, width: int, heads: int, mlp_width: int, dropout: float, visual_width: int | None
    ) -> None:
        super().__init__()
        self.attention = BertAttention(width, width, heads, dropout)
        if visual_width is not None:
            self.crossattention = BertAttention(width, visual_width, heads, dropout)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(width, mlp_width)
        self.output = _Residual(mlp_width, width, dropout)

    def forward(
        self,
        x: Tensor,
        groups: Groups,
        backend: str,
        visual: Tensor | None = None,
        cross: Groups | None = None,
        scores: Scores | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """The rows after the layer; with `scores`, also the importance of the keys of `cross`."""
        x = self.attention(x, x, groups, backend)
        importance = None
        if scores is not None:
            assert visual is not None
            attention: Any = self.crossattention
            x, importance = attention.scored(x, visual, cross, backend, scores)
        elif visual is not None:
            x = self.crossattention(x, visual, cross, backend)
        x = self.mlp(x)
        return x if scores is None else (x, importance)

    def mlp(self, x: Tensor) -> Tensor:
        """The MLP, then residual and LayerNorm."""
        return self.output(F.gelu(self.intermediate.dense(x)), x)  # type: ignore[operator]


class BertAttention(nn.Module):
    """Attention to the rows of a context, then residual and LayerNorm."""

    def __init__(self, width: int, context: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.self = nn.Module()
        self.self.query = nn.Linear(width, width)
        self.self.key = nn.Linear(context, width)
        self.self.value = nn.Linear(context, width)
        self.output = _Residual(width, width, dropout)

    def forward(self, x: Tensor, context: Tensor, groups: Groups, backend: str) -> Tensor:
        return self.scored(x, context, groups, backend, None)[0]

    def scored(
        self, x: Tensor, context: Tensor, groups: Groups, backend: str, scores: Scores | None
    ) -> tuple[Tensor, Tensor | None]:
        """The rows, and the importance of each key of the groups as in `Pruning`, or None."""
        return self.attend(x, *self.keys(context), groups, backend, scores)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows of a context, [rows, H, D] both."""
        project: Any = self.self
        k, v = project.key(context), project.value(context)
        return k.unflatten(1, (self.heads, -1)), v.unflatten(1, (self.heads, -1))

    def attend(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        groups: Groups,
        backend: str,
        scores: Scores | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`scored` with given keys and values."""
        project: Any = self.self
        q = project.query(x).unflatten(1, (self.heads, -1))
        out, importance = scored_attention(q, k, v, groups, scores, backend=backend)
        return self.output(out.flatten(1), x), importance


class _Residual(nn.Module):
    """LayerNorm(x + Dropout(Linear(y)))."""

    def __init__(self, inner: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.dropout(self.dense(y)))


class _MlmHead(nn.Module):
    """Linear, GELU, LayerNorm, and the dot product with each word embedding."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = nn.Module()
        self.transform.dense = nn.Linear(width, width)
        self.transform.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        transform: Any = self.transform
        x = transform.LayerNorm(F.gelu(transform.dense(x)))
        return F.linear(x, words, self.bias)


def with_tied_head(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the output layer of the word head, which is the word embedding.

    Raises:
        ValueError: it is not.
    """
    weights = dict(weights)
    decoder = weights.pop("cls.predictions.decoder.weight", None)
    words = weights.get("embeddings.word_embeddings.weight")
    if decoder is not None and words is not None and not torch.equal(decoder, words):
        raise ValueError("need a checkpoint whose output layer is its word embedding")
    bias = weights.pop("cls.predictions.decoder.bias", None)
    if bias is not None:
        weights.setdefault("cls.predictions.bias", bias)
    return weights


def initialise(module: nn.Module, width: int) -> None:
    """BERT's initialisation: normal with a deviation of 0.02; biases and the padding word zero.

    In models narrower than BERT's 768 channels, linear layers get a larger deviation, which makes
    up for fewer inputs: otherwise different captions have almost equal features at first.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02 * max(1.0, BASE_WIDTH / width) ** 0.5)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx].detach())


# Hugging Face's prefixes, DistilBERT's names, and old names of LayerNorm's parameters.
_RENAMED = {
    r"^(distil)?bert\.": "",
    r"^transformer\.layer\.": "encoder.layer.",
    r"\.attention\.q_lin\.": ".attention.self.query.",
    r"\.attention\.k_lin\.": ".attention.self.key.",
    r"\.attention\.v_lin\.": ".attention.self.value.",
    r"\.attention\.out_lin\.": ".attention.output.dense.",
    r"\.sa_layer_norm\.": ".attention.output.LayerNorm.",
    r"\.ffn\.lin1\.": ".intermediate.dense.",
    r"\.ffn\.lin2\.": ".output.dense.",
    r"\.output_layer_norm\.": ".output.LayerNorm.",
    r"^vocab_transform\.": "cls.predictions.transform.dense.",
    r"^vocab_layer_norm\.": "cls.predictions.transform.LayerNorm.",
    r"^vocab_projector\.": "cls.predictions.decoder.",
    r"\.gamma$": ".weight",
    r"\.beta$": ".bias",
}


def bert_name(name: str) -> str:
    for pattern, ours in _RENAMED.items():
        name = re.sub(pattern, ours, name)
    return name
