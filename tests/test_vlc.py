"""VLC: the encoder against MAE's and ViLT's, and a whole step against plain PyTorch."""

import plain
import pytest
import torch
import torch.nn.functional as F

from vidl import models
from vidl.masking import Vocabulary, mask_words
from vidl.models.learning import swap_half
from vidl.models.system import Inputs
from vidl.nn import JointViT

SIZES = dict(
    frames=1, image_size=32, patch_size=8, width=64, depth=2, heads=2, text_width=64, text_heads=2,
    decoder_width=64, decoder_depth=1, decoder_heads=2, dropout=0.0,
    vocabulary=Vocabulary(60, 4, (0, 1, 2, 3, 4)), backend="reference",
)  # fmt: skip
STEP = 3


def model_of(**fields):
    torch.manual_seed(0)
    model = models.create("vlc", "tiny", **(SIZES | fields))
    if model.recipe.frames > 1:
        torch.nn.init.normal_(model.time)
    return model


def batch(model, B=5, words=7):
    torch.manual_seed(1)
    inputs = model.recipe.example(B, words)
    inputs["ids"] = inputs["ids"].clamp(min=5)
    inputs["ids"][:, 0] = 2
    for caption, length in ((1, 4), (3, 6), (4, 2)):  # the last one has no word between its ends
        inputs["attention_mask"][caption, length:] = 0
    return inputs


def sines(side, dim):
    """MAE's positions [side side, dim], which are kept in float32: columns, then rows."""
    rate = [10000 ** (-i / (dim // 4)) for i in range(dim // 4)]
    table = []
    for row in range(side):
        for column in range(side):
            angles = [x * torch.tensor(rate, dtype=torch.float64) for x in (column, row)]
            table.append(torch.cat([g(angle) for angle in angles for g in (torch.sin, torch.cos)]))
    return torch.stack(table).float().double()


def embedded(w, r, inputs, ids_keep):
    """CLS and the visible patches of each clip, with positions, times and types."""
    pixels = plain.normalised(inputs["video"], r.mean, r.std)
    x = plain.embedded(w.of("vision.patch_embed.proj"), pixels)
    T, side = pixels.shape[2], r.image_size // r.patch_size
    x = x + sines(side, r.width).repeat(T, 1)
    if r.frames > 1:
        x = x + w["time"][:T].repeat_interleave(side * side, 0)
    x = x if ids_keep is None else plain.rows(x, ids_keep)
    cls = w["vision.cls_token"].expand(len(x), -1, -1)
    return torch.cat([cls, x], 1) + w["token_type_embeddings.weight"][1]


def encoded(w, r, text, words, clips):
    """The words and the patches of a pass; words first, as in the authors' code."""
    seen = torch.cat([words, torch.ones(clips.shape[:2], dtype=torch.bool)], 1)
    x = plain.blocks(w.of("vision.blocks"), torch.cat([text, clips], 1), r.heads, seen[:, None])
    x = plain.norm(w.of("vision.norm"), x, 1e-6)
    return x.split([text.shape[1], clips.shape[1]], 1)


def pixel_loss(w, r, inputs, mask, clips):
    """MAE's decoder on each frame, with all patches in their places."""
    T, side = mask.grid[0], mask.grid[1]
    P, table = side * side, F.pad(sines(side, r.decoder_width), (0, 0, 1, 0))
    video = plain.normalised(inputs["video"], r.mean, r.std)
    losses = []
    for b in range(len(clips)):
        tokens = plain.linear(w.of("decoder.decoder_embed"), clips[b])
        for t in range(T):
            full = w["decoder.mask_token"][0].expand(P, -1).clone()
            for place, patch in enumerate(mask.ids_keep[b].tolist()):
                if patch // P == t:
                    full[patch % P] = tokens[1 + place]
            x = torch.cat([tokens[:1], full])[None] + table
            x = plain.blocks(w.of("decoder.decoder_blocks"), x, r.decoder_heads)
            x = plain.norm(w.of("decoder.decoder_norm"), x, 1e-6)
            x = plain.linear(w.of("decoder.decoder_pred"), x)[0, 1:]
            target = plain.patches(video[b : b + 1, :, t : t + 1], r.patch_size)[0]
            mean, var = target.mean(1, keepdim=True), target.var(1, keepdim=True)
            target = (target - mean) / (var + 1e-6).sqrt()
            for patch in mask.ids_mask[b].tolist():
                if patch // P == t:
                    losses.append((x[patch % P] - target[patch % P]).square().mean())
    return torch.stack(losses).mean()


def plain_losses(model, inputs, w):
    r = model.recipe
    mask = r.visual_mask(inputs["samples"], STEP, inputs["video"].shape[2])
    ids, words = inputs["ids"], inputs["attention_mask"] != 0
    hidden = mask_words(
        r.seed, STEP, inputs["samples"], ids, inputs["attention_mask"], r.word_ratio,
        vocabulary=r.vocabulary,
    )  # fmt: skip
    clips = embedded(w, r, inputs, None if mask is None else mask.ids_keep)
    types = w["token_type_embeddings.weight"]
    text = plain.bert_embeddings(w.of("text.embeddings"), hidden.ids) + types[0]
    text, own = encoded(w, r, text, words, clips)
    known = hidden.labels >= 0
    rows = text.flatten(0, 1)[hidden.positions[known]]
    losses = {} if mask is None else {"mvm": pixel_loss(w, r, inputs, mask, own)}
    losses["mlm"] = F.cross_entropy(plain.predict_words(w.of("text"), rows), hidden.labels[known])

    partner, swapped = swap_of(model, inputs)
    text = plain.bert_embeddings(w.of("text.embeddings"), ids) + types[0]
    text, others = encoded(w, r, text, words, clips[partner])
    pooled = plain.linear(w.of("pooler"), text[:, 0]).tanh()
    logits = plain.linear(w.of("matches"), pooled)
    losses["vtm"] = F.cross_entropy(logits, 1 - swapped.long())
    total = 0
    for b, length in enumerate(words.sum(1).tolist()):
        if length > 2:
            distance = plain.transport_distance(text[b, 1 : length - 1], others[b, 1:])
            total = total + (-distance if swapped[b] else distance)
    losses["wpa"] = total / len(ids)
    return losses


def swap_of(model, inputs, step=STEP, clip_ids=None):
    names = ("video", "ids", "attention_mask", "samples")
    return swap_half(model.recipe, Inputs(*(inputs[name] for name in names), step, clip_ids))


@pytest.mark.parametrize("fields", [
    {}, dict(frames=3, mask="tube"), dict(frames=2, mask="frame"), dict(mask_ratio=0.0),
], ids=str)  # fmt: skip
def test_a_step_equals_plain_pytorch(fields):
    model = model_of(word_ratio=0.3, **fields)
    inputs = batch(model)
    # A clip in float64: the op normalises bytes with float32 constants.
    clip = {"video": plain.normalised(inputs["video"], model.recipe.mean, model.recipe.std)}
    plain.assert_same_step(
        model, inputs | clip | {"step": STEP}, lambda w: plain_losses(model, inputs, w)
    )


def test_a_still_beside_clips_of_several_frames():
    model = model_of(frames=3)
    inputs = batch(model)
    inputs["video"] = inputs["video"][:, :, :1]
    clip = {"video": plain.normalised(inputs["video"], model.recipe.mean, model.recipe.std)}
    plain.assert_same_step(
        model, inputs | clip | {"step": STEP}, lambda w: plain_losses(model, inputs, w)
    )
    assert model.time.grad is not None and not model.time.grad[1:].any()


def test_half_of_the_clips_are_swapped():
    model = model_of()
    inputs = batch(model, B=9)
    partners = torch.zeros(9, 9)
    for step in range(400):
        partner, swapped = swap_of(model, inputs, step)
        assert swapped.sum() == 5 and torch.equal(swapped, partner != torch.arange(9))
        partners[torch.arange(9), partner] += 1
    shares = partners / 400
    assert (shares.diag() - 4 / 9).abs().max() < 0.1
    others = shares[~torch.eye(9, dtype=torch.bool)]
    assert (others - 5 / 9 / 8).abs().max() < 0.05
    # The same clip under other captions is never another clip; without one, nothing is swapped.
    clip_ids = torch.tensor([7, 7, 7, 7, 7, 7, 7, 7, 5])
    for step in range(20):
        partner, swapped = swap_of(model, inputs, step, clip_ids)
        assert torch.equal(swapped, clip_ids[partner] != clip_ids)
    assert not swap_of(model, inputs, 0, torch.zeros(9, dtype=torch.int64))[1].any()


def test_the_encoder_equals_mae():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, layer_norm_eps=1e-6, mask_ratio=0.6,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.ViTMAEForPreTraining(config).double().eval()
    theirs.vit.embeddings.position_embeddings.data[0, 1:] = sines(4, 32)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    ours = JointViT(
        32, 8, embed_dim=32, depth=2, num_heads=2, num_frames=1, tubelet_size=None,
        position="sincos_2d", class_token=True,
    ).double()  # fmt: skip
    skipped = ours.load_pretrained(theirs.state_dict())
    assert any(name.startswith("decoder") for name in skipped)
    video = torch.randn(2, 3, 1, 32, 32, dtype=torch.float64)
    kept = torch.stack([torch.randperm(16)[:6].sort().values for _ in range(2)])
    noise = torch.full((2, 16), 2.0).scatter_(1, kept, torch.arange(6).expand(2, -1) / 6)
    truth = theirs.vit(video[:, :, 0], noise=noise).last_hidden_state
    out = ours(ours.embed(video, kept))
    assert out.shape == truth.shape == (2, 7, 32)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)


def test_words_and_patches_together_equal_vilt():
    """ViLT has learned positions of patches; here they are set to the sines."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViltConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=256, image_size=32, patch_size=8, layer_norm_eps=1e-6,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    vilt = transformers.ViltModel(config).double().eval()
    for parameter in vilt.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vilt.embeddings.text_embeddings.LayerNorm.eps = 1e-12
    positions = F.pad(sines(4, 64), (0, 0, 1, 0))
    vilt.embeddings.position_embeddings.data.copy_(positions)
    model = model_of().double().eval()
    state, text = vilt.state_dict(), "embeddings.text_embeddings."
    words = {n.removeprefix(text): x for n, x in state.items() if n.startswith(text)}
    state = {n: x for n, x in state.items() if not n.startswith((text, "pooler"))}
    types = state.pop("embeddings.token_type_embeddings.weight")
    model.vision.load_pretrained(state)
    model.text.embeddings.load_state_dict(words, strict=False)
    model.token_type_embeddings.weight.data.copy_(types)
    model.pooler.load_state_dict(vilt.pooler.dense.state_dict())

    inputs = batch(model)
    video = torch.randn(5, 3, 1, 32, 32, dtype=torch.float64)
    ids, attention_mask = inputs["ids"], inputs["attention_mask"]
    with torch.no_grad():
        truth = vilt(ids, attention_mask, pixel_values=video[:, :, 0])
        joint = model.join(
            model.encode_clips(video), model.encode_text(ids, attention_mask), attention_mask
        )
    at = attention_mask != 0
    torch.testing.assert_close(joint.pooled, truth.pooler_output, rtol=0, atol=1e-9)
    text = truth.last_hidden_state[:, : ids.shape[1]]
    torch.testing.assert_close(joint.text[at], text[at], rtol=0, atol=1e-9)


def test_pairs_equal_those_alone():
    """A caption beside its clip gives the same logits alone and in a batch with padding."""
    model = model_of(frames=2).double().eval()
    inputs = batch(model)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        clips = model.encode_clips(inputs["video"])
        text = model.encode_text(inputs["ids"], mask)
        partner = torch.tensor([2, 2, 0, 1, 4])
        together = model.match(clips, text, mask, partner, mask.numel() - 1)
        alone = [model.match(clips[p : p + 1], text[i : i + 1], mask[i : i + 1])
                 for i, p in enumerate(partner.tolist())]  # fmt: skip
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_word_head_loads_from_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    bert = transformers.BertForPreTraining(config).double().eval()
    model = model_of().double()
    skipped = model.starts()["text"].load_pretrained(bert.state_dict())
    assert not any("predictions.transform" in name for name in skipped)
    rows = torch.randn(2, 5, 64, dtype=torch.float64)
    torch.testing.assert_close(
        model.predict_words(rows, torch.arange(10)), bert.cls.predictions(rows).flatten(0, 1)
    )


def test_base_is_the_published_one():
    r = models.recipe("vlc")
    assert (r.frames, r.image_size, r.grid, r.visible) == (1, 384, (1, 24, 24), 230)
    assert (r.width, r.depth, r.heads, r.patch_size) == (768, 12, 12, 16)
    assert (r.decoder_width, r.decoder_depth, r.decoder_heads) == (512, 8, 16)
    assert (r.mask_ratio, r.word_ratio) == (0.6, 0.15)
    assert (r.mlm, r.mvm, r.vtm, r.wpa) == (1, 1, 1, 0.1)


def test_more_frames_begin_with_the_weights_of_one():
    one, four = model_of(), model_of(frames=4)
    four.load_state_dict(four.resized(one.state_dict()))
    assert not four.time.any()
    inputs = batch(one)
    with torch.no_grad():
        ours, theirs = (m.eval().encode_clips(inputs["video"]) for m in (four, one))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fields, complaint", [
    (dict(text_width=32), "need text_width=64, the width"),
    (dict(text_layers=2), "need text_layers=0"),
    (dict(frames=2, tubelet_size=2), "need tubelet_size=1"),
    (dict(mask="clip"), "need mask 'frame' or 'tube'"),
    (dict(wpa=-0.1), "need wpa >= 0"),
])  # fmt: skip
def test_errors(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        model_of(**fields)
