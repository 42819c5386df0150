"""SimVTP: the encoder against VideoMAE's, and a whole step against plain PyTorch."""

import plain
import pytest
import torch
import torch.nn.functional as F

from vidl import models
from vidl.masking import Vocabulary, mask_words
from vidl.nn import JointViT, Words
from vidl.objectives import hard_negatives

SIZES = dict(
    frames=4, image_size=32, patch_size=8, width=64, depth=2, heads=2, text_width=64, text_heads=2,
    embed_dim=64, decoder_width=64, decoder_depth=1, decoder_heads=2, dropout=0.0,
    vocabulary=Vocabulary(60, 4, (0, 1, 2, 3, 4)), backend="reference",
)  # fmt: skip


def model_of(**fields):
    torch.manual_seed(0)
    return models.create("simvtp", "tiny", **(SIZES | fields))


def batch(model, B=4, words=7):
    torch.manual_seed(1)
    inputs = model.recipe.example(B, words)
    inputs["ids"] = inputs["ids"].clamp(min=5)
    inputs["ids"][:, 0] = 2
    inputs["attention_mask"][1, 4:] = 0
    inputs["attention_mask"][3, 6:] = 0
    return inputs


def plain_losses(model, inputs, w, step=3):
    r, B = model.recipe, len(inputs["ids"])
    mask = r.visual_mask(inputs["samples"], step)
    words = inputs["attention_mask"] != 0
    hidden = mask_words(
        r.seed, step, inputs["samples"], inputs["ids"], inputs["attention_mask"], r.word_ratio,
        replace="mask", vocabulary=r.vocabulary,
    )  # fmt: skip
    pixels = plain.normalised(inputs["video"], r.mean, r.std)
    everything = plain.embedded(w.of("vision.patch_embed.proj"), pixels)
    everything = everything + plain.sines(everything.shape[1], r.width)
    clips = plain.rows(everything, mask.ids_keep)
    text = plain.bert_embeddings(w.of("text.embeddings"), hidden.ids)

    def encode(x, seen):
        x = plain.blocks(w.of("vision.blocks"), x, r.heads, seen[:, None])
        return plain.norm(w.of("vision.norm"), x, 1e-6)

    def mean(x, seen):
        return (x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)

    K = clips.shape[1]
    all_seen = torch.ones(B, K, dtype=torch.bool)
    v = mean(encode(clips, all_seen), all_seen)
    t = mean(encode(text, words), words)
    negatives = hard_negatives(r.seed, step, inputs["samples"], torch.zeros(B, B))
    partner = torch.cat([torch.arange(B), negatives.clips])
    seen = torch.cat([all_seen.repeat(2, 1), words.repeat(2, 1)], 1)
    joint = encode(torch.cat([clips[partner], text.repeat(2, 1, 1)], 1), seen)
    logits = plain.linear(w.of("matches"), mean(joint, seen))
    labels = torch.cat([torch.ones(B), torch.zeros(B)]).long()

    rows = joint[:B, K:].flatten(0, 1)[hidden.positions]
    known = hidden.labels >= 0
    mlm = F.cross_entropy(plain.linear(w.of("words"), rows)[known], hidden.labels[known])

    x = plain.linear(w.of("decoder.decoder_embed"), joint[:B, :K])
    table = plain.sines(everything.shape[1], r.decoder_width)
    visible = x + table[mask.ids_keep]
    masked = w["decoder.mask_token"] + table[mask.ids_mask]
    x = plain.blocks(
        w.of("decoder.decoder_blocks"), torch.cat([visible, masked], 1), r.decoder_heads
    )
    x = plain.norm(w.of("decoder.decoder_norm"), x[:, K:], 1e-6)
    x = plain.linear(w.of("decoder.decoder_pred"), x)
    # VideoMAE normalises each patch and channel: unbiased variance, 1e-6 outside of the root.
    target = plain.patches(inputs["video"].double() / 255, r.patch_size, r.tubelet_size)
    target = plain.rows(target, mask.ids_mask).unflatten(-1, (-1, 3))
    target = (target - target.mean(-2, keepdim=True)) / (target.var(-2, keepdim=True).sqrt() + 1e-6)
    return {
        "mvm": F.mse_loss(x, target.flatten(-2)),
        "mlm": mlm,
        "vtc": plain.contrastive(v, t, w["contrast.temperature"], "sum"),
        "vtm": F.cross_entropy(logits, labels),
    }


@pytest.mark.parametrize("mask", ["tube", "clip"])
def test_a_step_equals_plain_pytorch(mask):
    model = model_of(mask=mask)
    inputs = batch(model)
    # A clip in float64: the op normalises bytes with float32 constants.
    clip = {"video": plain.normalised(inputs["video"], model.recipe.mean, model.recipe.std)}
    plain.assert_same_step(
        model, inputs | clip | {"step": 3}, lambda w: plain_losses(model, inputs, w)
    )


def test_the_encoder_equals_videomae():
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=4, tubelet_size=2, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, qkv_bias=True,
        use_mean_pooling=False, layer_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.VideoMAEForPreTraining(config).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = JointViT(32, 8, embed_dim=32, depth=2, num_heads=2, num_frames=2).double()
    skipped = ours.load_pretrained(theirs.state_dict())
    assert any(name.startswith("decoder") for name in skipped)
    video = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
    kept = torch.stack([torch.randperm(32)[:11].sort().values for _ in range(2)])
    hidden = torch.ones(2, 32, dtype=torch.bool).scatter_(1, kept, False)
    truth = theirs.videomae(video.transpose(1, 2), bool_masked_pos=hidden).last_hidden_state
    out = ours(ours.embed(video, kept))
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)


def test_words_load_from_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.0,
    )  # fmt: skip
    bert = transformers.BertModel(config).double().eval()
    words = Words(60, 32, dropout=0.0).double()
    skipped = words.load_pretrained(bert.state_dict())
    assert "pooler.dense.weight" in skipped
    ids, mask = torch.randint(60, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    out = words(ids, mask)
    truth = bert.embeddings(ids)
    torch.testing.assert_close(out[mask != 0], truth[mask != 0])
    assert not out[1, 5:].any()


def test_pairs_share_the_own_pairs():
    """A caption fused alone with its clip gives the same logits as within the step."""
    model = model_of().double().eval()
    inputs = batch(model)
    with torch.no_grad():
        clips = model.encode_clips(inputs["video"])
        text = model.encode_text(inputs["ids"], inputs["attention_mask"])
        partner = torch.tensor([2, 2, 0, 1])
        together = model.match(clips, text, inputs["attention_mask"], partner)
        alone = [model.match(clips[p : p + 1], text[i : i + 1], inputs["attention_mask"][i : i + 1])
                 for i, p in enumerate(partner.tolist())]  # fmt: skip
    torch.testing.assert_close(together, torch.cat(alone))


def test_base_is_the_published_one():
    r = models.recipe("simvtp")
    assert (r.frames, r.tubelet_size, r.grid, r.visible) == (16, 2, (8, 14, 14), 160)
    assert (r.width, r.depth, r.heads, r.decoder_width, r.decoder_depth) == (768, 12, 12, 384, 4)
    assert (r.mask, r.mask_ratio, r.word_ratio, r.temperature) == ("tube", 0.9, 0.75, 0.05)
    assert r.vtc == r.vtm == r.mlm == r.mvm == 1


@pytest.mark.parametrize("fields, complaint", [
    (dict(text_width=32), "need text_width=64, the width"),
    (dict(embed_dim=32), "need embed_dim=64, the width"),
    (dict(text_layers=2), "need text_layers=0"),
])  # fmt: skip
def test_errors(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        model_of(**fields)
