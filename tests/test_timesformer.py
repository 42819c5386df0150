"""TimeSformer against transformers: whole and masked clips, gradients, weights of other models."""

import pytest
import torch

from vidl.nn import TimeSformer, ViT

transformers = pytest.importorskip("transformers")

B, T, SIZE, PATCH, WIDTH = 2, 3, 16, 4, 64
PLACES = (SIZE // PATCH) ** 2
BACKENDS = pytest.mark.parametrize("backend", ["reference", "native"])


def theirs():
    torch.manual_seed(0)
    config = transformers.TimesformerConfig(
        image_size=SIZE, patch_size=PATCH, num_frames=T, hidden_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=4 * WIDTH, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.TimesformerModel(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def ours_of(model, backend="reference", frames=T, size=SIZE):
    ours = TimeSformer(
        size, PATCH, embed_dim=WIDTH, depth=2, num_heads=2, num_frames=frames, backend=backend
    )
    ours = ours.double() if backend == "reference" else ours
    assert ours.load_pretrained(model.state_dict()) == []
    return ours


def in_their_order(x):
    """CLS and patches frame by frame, as CLS and the frames of each place."""
    return torch.cat([x[:, :1], x[:, 1:].unflatten(1, (T, -1)).transpose(1, 2).flatten(1, 2)], 1)


@BACKENDS
def test_as_transformers(backend):
    model = theirs()
    ours = ours_of(model, backend)
    video = torch.randn(B, 3, T, SIZE, SIZE).to(ours.cls_token.dtype)
    truth = model(video.double().transpose(1, 2)).last_hidden_state
    out = in_their_order(ours(video))
    tolerance = 1e-10 if backend == "reference" else 1e-4
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=tolerance)
    weight = torch.randn_like(truth)
    (truth * weight).sum().backward()
    (out * weight.to(out.dtype)).sum().backward()
    layer = "encoder.layer.{}."
    pairs = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "time_embed": "embeddings.time_embeddings",
        "blocks.0.temporal_attn.qkv.weight": layer + "temporal_attention.attention.qkv.weight",
        "blocks.0.temporal_fc.weight": layer + "temporal_dense.weight",
        "blocks.1.attn.proj.weight": layer + "attention.output.dense.weight",
        "blocks.1.mlp.fc1.bias": layer + "intermediate.dense.bias",
    }
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, other in pairs.items():
        own, true = ours.get_parameter(name).grad.double(), gradients[other.format(name[7])]
        scale = float(true.abs().max())
        torch.testing.assert_close(own / scale, true / scale, rtol=0, atol=tolerance, msg=name)


@BACKENDS
def test_masked_clips_are_clips_without_these_places(backend):
    """Transformers sees the visible patches as whole frames, with their own positions."""
    model = theirs()
    ours = ours_of(model, backend)
    video = torch.randn(B, 3, T, SIZE, SIZE).to(ours.cls_token.dtype)
    kept = torch.stack([torch.randperm(PLACES)[:4].sort().values for _ in range(B)])
    ids = (torch.arange(T)[None, :, None] * PLACES + kept[:, None]).flatten(1)
    with torch.no_grad():
        out = ours(video, ids)
        pixels = video.double().transpose(1, 2).flatten(0, 1)
        embeddings = model.embeddings
        x = embeddings.patch_embeddings.projection(pixels).flatten(2).mT  # [B T, places, C]
        x = x.unflatten(0, (B, T)) + embeddings.position_embeddings[:, None, 1:]
        x = x + embeddings.time_embeddings[:, :, None]
        x = torch.stack([frames[:, places] for frames, places in zip(x, kept, strict=True)])
        cls = embeddings.cls_token + embeddings.position_embeddings[:, :1]
        x = torch.cat([cls.expand(B, -1, -1), x.transpose(1, 2).flatten(1, 2)], 1)
        for layer in model.encoder.layer:
            layer.config.image_size = 2 * PATCH  # its frames have 2 x 2 patches
            x = layer(x)[0]
        truth = model.layernorm(x)
    torch.testing.assert_close(in_their_order(out).double(), truth, rtol=0, atol=1e-4)


def test_frames_must_show_the_same_places():
    ours = ours_of(theirs())
    ids = torch.tensor([[0, 1, PLACES, PLACES + 2, 2 * PLACES, 2 * PLACES + 1]]).expand(B, -1)
    with pytest.raises((RuntimeError, ValueError), match="same places in every frame"):
        ours(torch.randn(B, 3, T, SIZE, SIZE).double(), ids)
    with pytest.raises(ValueError, match="need video of at most num_frames=3 frames, got 4"):
        ours(torch.randn(B, 3, 4, SIZE, SIZE).double())


def test_a_new_block_is_that_of_an_image_model():
    torch.manual_seed(0)
    vit = ViT(SIZE, PATCH, embed_dim=WIDTH, depth=2, num_heads=2)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = TimeSformer(SIZE, PATCH, embed_dim=WIDTH, depth=2, num_heads=2, num_frames=T)
    ours.load_pretrained(vit.state_dict())
    image = torch.randn(B, 3, SIZE, SIZE)
    torch.testing.assert_close(ours(image), vit(image).tokens, rtol=1e-4, atol=1e-5)
    # Equal frames: each is the image.
    still = ours(image[:, :, None].expand(-1, -1, T, -1, -1))
    patches = still[:, 1:].unflatten(1, (T, -1))
    torch.testing.assert_close(patches, ours(image)[:, None, 1:].expand_as(patches))
    ours(image).sum().backward()
    assert ours.blocks[0].temporal_fc.weight.grad.abs().max() > 0


def test_weights_for_other_sizes():
    model = theirs()
    ours = ours_of(model, frames=2 * T, size=2 * SIZE)
    before = model.embeddings.time_embeddings
    torch.testing.assert_close(ours.time_embed[0, ::2].double(), before[0])
    assert ours.pos_embed.shape == (1, 1 + 4 * PLACES, WIDTH)
    weights = model.state_dict()
    del weights["encoder.layer.1.temporal_dense.weight"]
    with pytest.raises(ValueError, match=r"missing: blocks.1.temporal_fc.weight"):
        ours.load_pretrained(weights)


def with_stills(frames=T, tubelet=None):
    torch.manual_seed(1)
    ours = TimeSformer(
        SIZE, PATCH, embed_dim=WIDTH, depth=2, num_heads=2, num_frames=frames, stills=True,
        tubelet_size=tubelet,
    )  # fmt: skip
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return ours


@pytest.mark.parametrize("tubelet", [None, 2])
def test_a_still_is_an_image_of_a_vit(tubelet):
    """With its own patch embedding, whatever attention over time does; masked too."""
    ours, vit = (
        with_stills(tubelet=tubelet),
        ViT(SIZE, PATCH, embed_dim=WIDTH, depth=2, num_heads=2),
    )
    weights = ours.state_dict()
    for name in vit.state_dict():
        image = weights[name.replace("patch_embed", "image_embed")]
        vit.get_parameter(name).data.copy_(image)
    image = torch.randn(B, 3, SIZE, SIZE)
    ids = torch.stack([torch.randperm(PLACES)[:5].sort().values for _ in range(B)])
    for kept in (None, ids):
        out, truth = ours(image, kept), vit(image, kept).tokens
        torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(image[:, :, None], kept), out)
    out.sum().backward()
    unused = [p for n, p in ours.named_parameters() if "temporal" in n or "time_embed" in n
              or n.startswith("patch_embed")]  # fmt: skip
    assert all(p.grad is not None and not p.grad.any() for p in unused)
    assert ours.image_embed.proj.weight.grad.any()
    ours.zero_grad()
    ours(torch.randn(B, 3, 2, SIZE, SIZE)).sum().backward()
    assert not ours.image_embed.proj.weight.grad.any() and ours.patch_embed.proj.weight.grad.any()


def test_weights_of_images_and_of_other_frames_with_stills():
    images, clips = with_stills(frames=1), with_stills(frames=4, tubelet=2)
    assert {n for n, p in images.named_parameters() if not p.requires_grad} == {
        n for n in images.state_dict()
        if n.startswith(("patch_embed", "time_embed")) or "temporal" in n
    }  # fmt: skip
    clips.load_pretrained(images.state_dict())
    image = images.image_embed.proj.weight
    torch.testing.assert_close(clips.image_embed.proj.weight, image)
    torch.testing.assert_close(clips.patch_embed.proj.weight.sum(2), image)
    # Weights of clips only: the embedding of images is that of a clip of equal frames.
    video = torch.nn.Conv3d(3, WIDTH, (2, PATCH, PATCH)).weight.detach()
    alone = {n: x for n, x in clips.state_dict().items() if not n.startswith("image_embed")}
    clips.load_pretrained(alone | {"patch_embed.proj.weight": video})
    torch.testing.assert_close(clips.image_embed.proj.weight, video.sum(2))
    torch.testing.assert_close(clips.image_embed.proj.bias, clips.patch_embed.proj.bias)
