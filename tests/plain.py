"""Transformers, losses and pixels in plain PyTorch, for parity tests of whole training steps.

Nothing here calls an op of vidl. Weights are read by name from a state_dict.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.masking import mask_words
from vidl.objectives import hard_negatives


class Weights(dict):
    """A state_dict; `weights.of("vision.norm")` has the names below a prefix."""

    def of(self, prefix: str) -> "Weights":
        return Weights({n[len(prefix) + 1 :]: x for n, x in self.items()
                        if n.startswith(prefix + ".")})  # fmt: skip


def leaves(model: torch.nn.Module) -> Weights:
    """Copies of all parameters with gradients, and the buffers, in float64."""
    own = {n: p.detach().double().requires_grad_(p.requires_grad)
           for n, p in model.named_parameters()}  # fmt: skip
    return Weights(own | {n: b.detach().double() for n, b in model.named_buffers()})


def linear(w: Weights, x: Tensor) -> Tensor:
    return F.linear(x, w["weight"], w.get("bias"))


def norm(w: Weights, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w["weight"], w["bias"], eps)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    seen: Tensor | None = None,
    bias: Tensor | float = 0,
) -> Tensor:
    """q [B, N, C], k and v [B, M, C]; seen [B, 1 or N, M] bool."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5 + bias
    if seen is not None:
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def vit_block(w: Weights, x: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    """A pre-norm block with the names of timm."""
    q, k, v = linear(w.of("attn.qkv"), norm(w.of("norm1"), x, 1e-6)).chunk(3, -1)
    x = x + linear(w.of("attn.proj"), softmax_attention(q, k, v, heads, seen))
    hidden = F.gelu(linear(w.of("mlp.fc1"), norm(w.of("norm2"), x, 1e-6)))
    return x + linear(w.of("mlp.fc2"), hidden)


def blocks(w: Weights, x: Tensor, heads: int, seen: Tensor | None = None) -> Tensor:
    count = len({name.split(".")[0] for name in w})
    for number in range(count):
        x = vit_block(w.of(str(number)), x, heads, seen)
    return x


def attention(w: Weights, x: Tensor, heads: int) -> Tensor:
    """Self-attention with the names of timm."""
    q, k, v = linear(w.of("qkv"), x).chunk(3, -1)
    return linear(w.of("proj"), softmax_attention(q, k, v, heads))


def timesformer(
    w: Weights, heads: int, pixels: Tensor, ids_keep: Tensor | None = None, still: bool = False
) -> Tensor:
    """CLS and patches frame by frame; `still`: images with their own embedding, without time."""
    places = w["pos_embed"][0, 1:]
    x = embedded(w.of("image_embed.proj" if still else "patch_embed.proj"), pixels)
    B, T = len(x), x.shape[1] // len(places)
    x = x + places.repeat(T, 1)
    if not still:
        x = x + w["time_embed"][0, :T].repeat_interleave(len(places), 0)
    x = x if ids_keep is None else rows(x, ids_keep)
    cls = (w["cls_token"] + w["pos_embed"][:, :1]).expand(B, -1, -1)
    for number in range(len({name.split(".")[0] for name in w.of("blocks")})):
        block = w.of(f"blocks.{number}")
        if not still:
            y = x.unflatten(1, (T, -1)).transpose(1, 2)  # [B, n, T, C]
            of_places = norm(block.of("temporal_norm1"), y, 1e-6).flatten(0, 1)
            moved = attention(block.of("temporal_attn"), of_places, heads).view_as(y)
            x = x + linear(block.of("temporal_fc"), moved).transpose(1, 2).flatten(1, 2)
        averages, frames = [], []
        for frame in x.unflatten(1, (T, -1)).unbind(1):
            y = norm(block.of("norm1"), torch.cat([cls, frame], 1), 1e-6)
            out = attention(block.of("attn"), y, heads)
            averages.append(out[:, :1])
            frames.append(frame + out[:, 1:])
        x = torch.cat([cls + sum(averages) / T, *frames], 1)
        hidden = F.gelu(linear(block.of("mlp.fc1"), norm(block.of("norm2"), x, 1e-6)))
        x = x + linear(block.of("mlp.fc2"), hidden)
        cls, x = x[:, :1], x[:, 1:]
    return norm(w.of("norm"), torch.cat([cls, x], 1), 1e-6)


def relative_rows(ids: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The rows of BEiT's table for CLS and patches ids [N] of a clip, [1 + N, 1 + N].

    The table has a row for each displacement (time, row, column), then those from CLS to a patch,
    from a patch to CLS, and from CLS to itself.
    """
    T, H, W = grid
    place = torch.stack([ids // (H * W), ids // W % H, ids % W])
    dt, dy, dx = (place[:, :, None] - place[:, None]) + torch.tensor([T, H, W])[:, None, None] - 1
    own = (dt * (2 * H - 1) + dy) * (2 * W - 1) + dx
    first = (2 * T - 1) * (2 * H - 1) * (2 * W - 1)
    index = torch.full((1 + len(ids), 1 + len(ids)), first + 2)
    index[0, 1:], index[1:, 0], index[1:, 1:] = first, first + 1, own
    return index


def beit_attention(
    w: Weights, x: Tensor, heads: int, index: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of x [B, N, C] with rows index [B, N, N] of a table, and the weights of CLS."""
    bias = torch.cat([w["q_bias"], torch.zeros_like(w["q_bias"]), w["v_bias"]])
    q, k, v = (F.linear(x, w["qkv.weight"]) + bias).chunk(3, -1)
    added = w["relative_position_bias_table"][index].permute(0, 3, 1, 2)
    out = linear(w.of("proj"), softmax_attention(q, k, v, heads, seen, added))
    q, k = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k))
    logits = q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5 + added[:, :, :1]
    return out, logits.softmax(-1).mean(1)[:, 0]


def beit_block(
    w: Weights, x: Tensor, heads: int, index: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    out, scores = beit_attention(w.of("attn"), norm(w.of("norm1"), x, 1e-6), heads, index, seen)
    x = x + w["gamma_1"] * out
    hidden = F.gelu(linear(w.of("mlp.fc1"), norm(w.of("norm2"), x, 1e-6)))
    return x + w["gamma_2"] * linear(w.of("mlp.fc2"), hidden), scores


def kept(x: Tensor, ids: Tensor, scores: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """CLS and the share of tokens with the highest scores, in order; x [B, 1 + n, C]."""
    n = math.ceil(rate * ids.shape[1])
    chosen = scores[:, 1:].topk(n, dim=1).indices.sort(1).values
    return torch.cat([x[:, :1], rows(x[:, 1:], chosen)], 1), ids.gather(1, chosen)


def bert_embeddings(w: Weights, ids: Tensor) -> Tensor:
    x = w["word_embeddings.weight"][ids] + w["position_embeddings.weight"][: ids.shape[1]]
    return norm(w.of("LayerNorm"), x + w["token_type_embeddings.weight"][0], 1e-12)


def bert_attention(
    w: Weights, x: Tensor, context: Tensor, heads: int, seen: Tensor | None
) -> Tensor:
    q = linear(w.of("self.query"), x)
    k, v = (linear(w.of(f"self.{name}"), context) for name in ("key", "value"))
    out = linear(w.of("output.dense"), softmax_attention(q, k, v, heads, seen))
    return norm(w.of("output.LayerNorm"), x + out, 1e-12)


def bert_layer(
    w: Weights, x: Tensor, heads: int, words: Tensor, visual: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A post-norm layer with the names of transformers; words [B, L] bool."""
    x = bert_attention(w.of("attention"), x, x, heads, words[:, None])
    if visual is not None:
        x = bert_attention(w.of("crossattention"), x, visual, heads, visible)
    hidden = F.gelu(linear(w.of("intermediate.dense"), x))
    return norm(w.of("output.LayerNorm"), x + linear(w.of("output.dense"), hidden), 1e-12)


def predict_words(w: Weights, x: Tensor) -> Tensor:
    """The word head of BERT; w has `cls` and `embeddings`."""
    head = w.of("cls.predictions")
    x = norm(head.of("transform.LayerNorm"), F.gelu(linear(head.of("transform.dense"), x)), 1e-12)
    return x @ w["embeddings.word_embeddings.weight"].T + head["bias"]


def patches(video: Tensor, size: int, tubelet: int = 1) -> Tensor:
    """Pixels [B, 3, T, H, W] to [B, N, tubelet size size 3]."""
    B, C, T, H, W = video.shape
    x = video.reshape(B, C, T // tubelet, tubelet, H // size, size, W // size, size)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)


def normalised(video: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shape = (1, 3, 1, 1, 1)
    m, s = (torch.tensor(x, dtype=torch.float64).view(shape) for x in (mean, std))
    return (video.double() / 255 - m) / s


def embedded(w: Weights, pixels: Tensor) -> Tensor:
    """All patches of normalised clips; w has a convolution of patches, [B, N, C]."""
    weight = w["weight"] if w["weight"].ndim == 5 else w["weight"].unsqueeze(2)
    conv = F.conv3d(pixels, weight, w["bias"], stride=weight.shape[2:])
    return conv.flatten(2).mT


def rows(x: Tensor, ids: Tensor) -> Tensor:
    """Rows ids [B, K] of x [B, N, C] or [N, C]."""
    x = x.expand(ids.shape[0], *x.shape[-2:])
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def contrastive(v: Tensor, t: Tensor, temperature: Tensor, form: str = "mean") -> Tensor:
    """InfoNCE of features [B, C] or [B, T, C] and [B, C], all clips different."""
    v, t = F.normalize(v, dim=-1), F.normalize(t, dim=-1)
    s = (v @ t.T if v.ndim == 2 else (v @ t.T).mean(1)) / temperature
    own = torch.arange(len(s))
    loss = F.cross_entropy(s, own) + F.cross_entropy(s.T, own)
    return loss / 2 if form == "mean" else loss


def sines(length: int, dim: int) -> Tensor:
    """The fixed positions of VideoMAE, which are kept in float32."""
    place = torch.arange(length, dtype=torch.float64)[:, None]
    channel = torch.arange(dim)
    angle = place / 10000 ** (2 * (channel // 2) / dim).double()
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float().double()


def captions(w: Weights, r: Any, ids: Tensor, words: Tensor) -> Tensor:
    """The text layers of BERT."""
    x = bert_embeddings(w.of("text.embeddings"), ids)
    for number in range(r.text_layers):
        x = bert_layer(w.of(f"text.encoder.layer.{number}"), x, r.text_heads, words)
    return x


def fused(
    w: Weights, r: Any, text: Tensor, words: Tensor, visual: Tensor, keep: float = 1.0
) -> Tensor:
    """The fusion layers of BERT; `keep`: share of the keys after the second layer from the end."""
    for number in range(r.fusion_layers):
        layer, x = w.of(f"text.encoder.layer.{r.text_layers + number}"), text
        text = bert_layer(layer, x, r.text_heads, words, visual)
        if keep < 1 and number == min(1, r.fusion_layers - 2):
            x = bert_attention(layer.of("attention"), x, x, r.text_heads, words[:, None])
            cross = layer.of("crossattention.self")
            q, k = (
                y.unflatten(-1, (r.text_heads, -1)).transpose(1, 2)
                for y in (linear(cross.of("query"), x[:, :1]), linear(cross.of("key"), visual))
            )
            scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0]
            ids = torch.arange(visual.shape[1] - 1).expand(len(visual), -1)
            visual, _ = kept(visual, ids, scores, keep)
    return text


def fusing_losses(
    w: Weights, r: Any, inputs: dict[str, Any], clips: Tensor, v: Tensor, keep: float = 1.0
) -> dict[str, Tensor]:
    """VTC, VTM with hard negatives and MLM, as in ALBEF and Singularity.

    Args:
        clips: tokens of each clip, [B, N, C].
        v: features of clips before their projection, [B, C] or [B, T, C].
        keep: see `fused`.
    """
    ids, mask, step = inputs["ids"], inputs["attention_mask"], inputs["step"]
    words, own = mask != 0, torch.arange(len(ids))
    text = captions(w, r, ids, words)
    v, t = linear(w.of("project_clip"), v), linear(w.of("project_text"), text[:, 0])
    temperature = w["contrast.temperature"]
    vtc = contrastive(v, t, temperature)
    v, t = F.normalize(v, dim=-1), F.normalize(t, dim=-1)
    similarity = (v @ t.T if v.ndim == 2 else (v @ t.T).mean(1)) / temperature
    negatives = hard_negatives(r.seed, step, inputs["samples"], similarity)
    of_text = torch.cat([own, own, negatives.captions])
    of_clip = torch.cat([own, negatives.clips, own])
    pairs = fused(w, r, text[of_text], words[of_text], clips[of_clip], keep)
    labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
    vtm = F.cross_entropy(linear(w.of("matches"), pairs[:, 0]), labels)
    hidden = mask_words(
        r.seed, step, inputs["samples"], ids, mask, r.word_ratio, vocabulary=r.vocabulary
    )
    text = fused(w, r, captions(w, r, hidden.ids, words), words, clips, keep)
    known = hidden.labels >= 0
    logits = predict_words(w.of("text"), text.flatten(0, 1)[hidden.positions[known]])
    return {"vtc": vtc, "vtm": vtm, "mlm": F.cross_entropy(logits, hidden.labels[known])}


def transport_plan(cost: Tensor, beta: float, iterations: int) -> Tensor:
    """IPOT of one sample [L, N]: algorithm 1 of arXiv 1802.04307 with one inner iteration."""
    words, patches = (torch.full((n,), 1 / n, dtype=cost.dtype) for n in cost.shape)
    G, T, b = torch.exp(-cost / beta), torch.ones_like(cost), words
    for _ in range(iterations):
        Q = G * T
        a = patches / (Q.T @ b)
        b = words / (Q @ a)
        T = torch.diag(b) @ Q @ torch.diag(a)
    return T


def transport_distance(
    text: Tensor, clip: Tensor, beta: float = 0.5, iterations: int = 50
) -> Tensor:
    """The optimal transport distance between words [L, C] and patches [N, C] of one sample."""
    cost = torch.stack([
        torch.stack([1 - torch.dot(x, y) / (x.norm() * y.norm()) for y in clip]) for x in text
    ])  # fmt: skip
    return (transport_plan(cost.detach(), beta, iterations) * cost).sum()


def assert_same_step(model: Any, inputs: dict, losses, tolerance: float = 1e-9) -> None:
    """Losses and gradients of a model in float64 against `losses(weights) -> dict`."""
    model = model.double()
    weights = leaves(model)
    expected = losses(weights)
    sum(model.weight(name) * loss for name, loss in expected.items()).backward()
    model.zero_grad()
    ours = model(**inputs)
    ours["loss"].backward()
    assert set(ours) == {"loss", *expected}
    for name, loss in expected.items():
        torch.testing.assert_close(ours[name].double(), loss, rtol=1e-6, atol=1e-6, msg=name)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        theirs = weights[name].grad
        theirs = torch.zeros_like(parameter) if theirs is None else theirs
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = max(float(theirs.abs().max()), 1e-3)
        torch.testing.assert_close(own / scale, theirs / scale, rtol=0, atol=tolerance,
                                   msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip
