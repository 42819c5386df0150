"""BERT of transformers: layers compute only words, not padding."""

from typing import Any

import torch
import transformers.models.bert.modeling_bert as bert
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from vidl.nn.captions import Captions
from vidl.swapping.huggingface.attention import Visible, collected
from vidl.swapping.registry import Family, Rule


class BertEncoder(bert.BertEncoder):
    """Packs the words of all captions, runs the layers, and unpacks, with zeros at padding.

    The number of words must be known on the host. It is read from a mask on a GPU once a forward;
    transformers itself reads its masks too, to see whether there is padding. Under `torch.compile`
    all rows are computed, still without attention to padding.

    All rows including padding are also computed if hidden states of every layer are requested
    (`output_hidden_states`), if attention weights are dropped out, or if a caption has no word: its
    outputs are those of the original. (`torch.compile` cannot see that, and gives zeros.)
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        keys = attention_mask.keys if isinstance(attention_mask, Visible) else None
        more = any(isinstance(x, Tensor) for x in (*args, *kwargs.values()))
        # transformers 5.24 renamed this argument.
        cached = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if keys is None or more or cached or collected() or self._drops_out():
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
        result = super().forward(packed, captions.joint(), *args, **kwargs)
        result.last_hidden_state = captions.unpack(result.last_hidden_state[0])
        return result

    def _drops_out(self) -> bool:
        return self.training and any(layer.attention.self.dropout.p > 0 for layer in self.layer)


def _why_not(encoder: Any) -> str | None:
    config = encoder.config
    if config.is_decoder:
        return "a decoder: causal attention stays with PyTorch"
    if config.chunk_size_feed_forward:
        return f"chunk_size_feed_forward={config.chunk_size_feed_forward} needs padded captions"
    return None


def _note(encoder: Any, backend: str) -> str:
    drop = encoder.config.attention_probs_dropout_prob
    if not drop:
        return ""
    return (
        f"in training it also computes padding, because attention_probs_dropout_prob={drop} drops "
        "out attention weights: set it to 0 in the config before you build the model"
    )


FAMILY = Family(rules=[Rule(bert.BertEncoder, BertEncoder, _why_not, _note)])
