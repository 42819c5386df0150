"""MaeDecoder: MAE's decoder in plain PyTorch, its position embeddings, and its loss."""

import math

import pytest
import torch
from compare import assert_model_as_accurate
from tiny import GRID, PATCHES, WIDTH, B, T, clip, randomise, results

from vidl.masking import visual_mask
from vidl.nn import MaeDecoder, Pruning, ViT
from vidl.nn.decoder import sincos_1d, sincos_2d
from vidl.ops import masked_patch_loss

SMALL = dict(patch_size=8, encoder_dim=WIDTH, dim=64, depth=2, num_heads=2)
SAMPLES = torch.arange(B)
PRUNING = Pruning(0.7, fuse="sum")


def encoded(ids_keep, prefix=1):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(B, prefix + ids_keep.shape[1], WIDTH, generator=generator)


def blocks(model, x):
    """Plain pre-norm blocks with the parameters of the decoder."""
    for block in model.decoder_blocks:
        qkv = block.attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, 2, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + block.attn.proj(out.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return x


def mae(model, tokens, ids_keep, ids_mask):
    """MAE: append mask tokens and unshuffle all tokens to the positions of their patches."""
    x = model.decoder_embed(tokens)
    whole = torch.cat([x[:, 1:], model.mask_token.expand(len(x), ids_mask.shape[1], -1)], 1)
    ids_restore = torch.cat([ids_keep, ids_mask], 1).argsort(1)
    whole = whole.gather(1, ids_restore[..., None].expand(-1, -1, whole.shape[2]))
    x = torch.cat([x[:, :1], whole], 1) + model.decoder_pos_embed
    predicted = model.decoder_pred(model.decoder_norm(blocks(model, x)))[:, 1:]
    return predicted.gather(1, ids_mask[..., None].expand(-1, -1, predicted.shape[2]))


def videomae(model, tokens, ids_keep, ids_mask):
    """VideoMAE: append mask tokens and predict the last M."""
    x, place = model.decoder_embed(tokens), model.decoder_pos_embed.expand(len(tokens), -1, -1)
    rows = lambda ids: place.gather(1, ids[..., None].expand(-1, -1, place.shape[2]))  # noqa: E731
    x = torch.cat([x + rows(ids_keep), model.mask_token + rows(ids_mask)], 1)
    return model.decoder_pred(model.decoder_norm(blocks(model, x)[:, -ids_mask.shape[1] :]))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "rule, grid, options",
    [
        (mae, (1, 4, 4), dict()),
        (mae, GRID, dict(position="learned")),
        (videomae, GRID, dict(position="sincos_1d", prefix=0, embed_bias=False, tubelet_size=2)),
    ],
    ids=["MAE", "learned", "VideoMAE"],
)
def test_is_the_decoder_written_plainly(rule, grid, options, backend):
    model = MaeDecoder(grid, **SMALL, **options, backend=backend)
    fixed = model.decoder_pos_embed.clone() if "learned" not in options.values() else None
    randomise(model)
    if fixed is not None:
        model.decoder_pos_embed.data.copy_(fixed)
    assert model.decoder_pos_embed.requires_grad == (fixed is None)
    mask = visual_mask(0, 0, SAMPLES, grid, 0.7)
    ids = mask.ids_keep, mask.ids_mask
    tokens = encoded(mask.ids_keep, options.get("prefix", 1))
    ours = results(model, lambda model, x: model(x, *ids), torch.float32, tokens)
    low, true = (
        results(model, lambda model, x: rule(model, x, *ids), dtype, tokens)
        for dtype in (torch.float32, torch.float64)
    )
    assert ours[0].shape[2] == options.get("tubelet_size", 1) * 8 * 8 * 3
    assert_model_as_accurate(ours, low, true, torch.float32)


def test_positions_are_those_of_the_sources():
    ours = MaeDecoder((1, 3, 5), **SMALL).decoder_pos_embed
    assert not ours[0, 0].any() and torch.equal(ours[0, 1:], sincos_2d(3, 5, 64).float())
    for row in range(3):
        for column in range(5):
            angles = [[index / 10000 ** (i / 16) for i in range(16)] for index in (column, row)]
            waves = [f(angle) for some in angles for f in (math.sin, math.cos) for angle in some]
            position = ours[0, 1 + 5 * row + column]
            torch.testing.assert_close(position.data, torch.tensor(waves), rtol=1e-6, atol=1e-6)
    pytest.importorskip("transformers")
    from transformers.models.videomae import modeling_videomae

    theirs = modeling_videomae.get_sinusoid_encoding_table(48, 64)[0]
    torch.testing.assert_close(sincos_1d(48, 64).float(), theirs, rtol=1e-6, atol=1e-6)


def test_the_loss_of_pruned_frames():
    """Masked visual modelling of single frames, from pruning with a fused token to the loss."""
    torch.manual_seed(0)
    mask = visual_mask(0, 0, SAMPLES, GRID, 0.5)
    encoder = ViT(32, 8, embed_dim=WIDTH, depth=2, num_heads=2, prune_layers=(0,), pruning=PRUNING)
    decoder = MaeDecoder((1, 4, 4), **SMALL)
    frames = encoder(clip(), mask.ids_keep)
    ids_mask = mask.per_frame().ids_mask
    predicted = decoder(frames.tokens, frames.ids, ids_mask)
    assert predicted.shape == (B * T, PATCHES // 2, 192)
    predicted = predicted.view(B, -1, 192)
    loss = masked_patch_loss(predicted, clip(), mask.ids_mask, patch_size=8)
    loss.backward()
    learning = [p for p in (*encoder.parameters(), *decoder.parameters()) if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning)
    assert decoder.decoder_pos_embed.grad is None

    # The fused token has no position embedding, and the order of tokens does not matter.
    order = torch.randperm(frames.ids.shape[1])
    tokens = torch.cat([frames.tokens[:, :1], frames.tokens[:, 1:][:, order]], 1)
    again = decoder(tokens, frames.ids[:, order], ids_mask).view(B, -1, 192)
    torch.testing.assert_close(again, predicted)


def test_nothing_masked_or_nothing_visible():
    decoder = MaeDecoder((1, 4, 4), **SMALL)
    every, none = torch.arange(16).expand(B, -1), torch.empty(B, 0, dtype=torch.int64)
    assert decoder(encoded(every), every, none).shape == (B, 0, 192)
    assert decoder(encoded(none), none, every).shape == (B, 16, 192)


def test_loads_the_decoder_of_mae():
    names = set(MaeDecoder((1, 4, 4), **SMALL).state_dict())
    parts = ("decoder_embed", "decoder_norm", "decoder_pred", "decoder_blocks.1.attn.qkv")
    assert {"mask_token", "decoder_pos_embed"} <= names
    assert {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")} <= names
    assert all(name == "mask_token" or name.startswith("decoder") for name in names)


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="position among"):
        MaeDecoder((1, 4, 4), **SMALL, position="2d")
    with pytest.raises(ValueError, match="one frame"):
        MaeDecoder(GRID, **SMALL)
    with pytest.raises(ValueError, match="even dim"):
        MaeDecoder(GRID, **(SMALL | dict(dim=63, num_heads=3)), position="sincos_1d")
    with pytest.raises(ValueError, match="grid"):
        MaeDecoder((4, 4), **SMALL)
    with pytest.raises(ValueError, match="prefix"):
        MaeDecoder((1, 4, 4), **SMALL, prefix=-1)
    with pytest.raises(ValueError, match=r"tokens \[B, 1 \+ K, 64\]"):
        ids = torch.arange(4).expand(B, -1)
        MaeDecoder((1, 4, 4), **SMALL)(torch.zeros(B, 4, WIDTH), ids, ids)
