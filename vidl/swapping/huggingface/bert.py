"""BERT of transformers: layers compute only words, not padding."""

from typing import Any

import torch
import transformers.models.bert.modeling_bert as bert
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from vidl.nn.captions import Captions
from vidl.swapping.huggingface.attention import Packed, Visible, collected
from vidl.swapping.registry import Family, Rule


class BertEncoder(bert.BertEncoder):
    """Packs the words of all captions, runs the layers, and unpacks, with zeros at padding.

    The number of words must be known on the host. It is read from a mask on a GPU once a forward;
    transformers itself reads its masks too, to see whether there is padding. Under `torch.compile`
    all rows are computed, still without attention to padding.

    All rows including padding are also computed if hidden states of every layer are requested
    (`output_hidden_states`), or if a caption has no word: its outputs are those of the original.
    (`torch.compile` cannot see that, and gives zeros.)

    Dropout of attention weights is PyTorch's: queries, keys and values are unpacked for it, and all
    other layers still compute words only.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        keys = attention_mask.keys if isinstance(attention_mask, Visible) else None
        more = any(isinstance(x, Tensor) for x in (*args, *kwargs.values()))
        # transformers 5.24 renamed this argument.
        cached = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if keys is None or more or cached or collected():
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        words = None
        if not torch.compiler.is_compiling():
            counts = torch.stack([keys.sum(), keys.any(1).all().long()])
            total, all_have_words = counts.tolist()
            if not all_have_words:
                return super().forward(hidden_states, attention_mask, *args, **kwargs)
            words = total if keys.is_cuda else None
        captions = Captions(hidden_states, keys, words)
        packed = captions.pack(hidden_states)[None]
        mask = Packed(captions, keys, captions.joint())
        result = super().forward(packed, mask, *args, **kwargs)
        result.last_hidden_state = captions.unpack(result.last_hidden_state[0])
        return result


def _why_not(encoder: Any) -> str | None:
    config = encoder.config
    if config.is_decoder:
        return "a decoder: causal attention stays with PyTorch"
    if config.chunk_size_feed_forward:
        return f"chunk_size_feed_forward={config.chunk_size_feed_forward} needs padded captions"
    return None


FAMILY = Family(rules=[Rule(bert.BertEncoder, BertEncoder, _why_not)])
