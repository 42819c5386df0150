"""Bert against BertModel and DistilBertModel of transformers: same weights, ragged captions."""

import copy

import pytest
import torch
import torch._dynamo.testing
from compare import assert_as_accurate, gradients
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vidl.nn import Bert, Captions, Projection

transformers = pytest.importorskip("transformers")
from transformers.models.bert.modeling_bert import BertLayer  # noqa: E402

SIZES = dict(vocab_size=50, width=64, num_heads=2, mlp_width=96, max_positions=12, dropout=0.0)
VISUAL = 48
LENGTHS = (7, 1, 4, 9, 5)
B, L = len(LENGTHS), 9
BACKENDS = pytest.mark.parametrize("backend", ["reference", "native"])


def config(**options):
    return transformers.BertConfig(
        vocab_size=50,
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
        **options,
    )


def baseline(text_layers=2, fusion_layers=2):
    """BertModel whose last layers have cross-attention, without a causal mask."""
    torch.manual_seed(0)
    model = transformers.BertModel(config(num_hidden_layers=text_layers), add_pooling_layer=False)
    decoder = config(is_decoder=True, add_cross_attention=True)
    for _ in range(fusion_layers):
        layer = BertLayer(decoder)
        # In Hugging Face visual tokens have the width of words, unlike in ALBEF.
        layer.crossattention.self.key = nn.Linear(VISUAL, 64)
        layer.crossattention.self.value = nn.Linear(VISUAL, 64)
        model.encoder.layer.append(layer)
    for parameter in model.parameters():  # no trivial LayerNorms and biases
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def additive(mask):
    """[B, num_keys] to the additive mask of transformers."""
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None, None]


def stock_encode(model, ids, mask, layers=2):
    x = model.embeddings(ids)
    for layer in model.encoder.layer[:layers]:
        x = layer(x, additive(mask))
    return x


def stock_fuse(model, x, mask, visual, visual_mask=None, layers=2):
    seen = None if visual_mask is None else additive(visual_mask)
    for layer in model.encoder.layer[layers:]:
        x = layer(x, additive(mask), visual, encoder_attention_mask=seen)
    return x


def ours_of(model, backend="auto", **options):
    ours = Bert(text_layers=2, fusion_layers=2, visual_width=VISUAL, backend=backend, **SIZES)
    ours.load_state_dict(model.state_dict(), strict=True)
    return ours


def captions(seed=1):
    ids = torch.randint(1, 50, (B, L), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    return ids.masked_fill(~mask, 0), mask


def assert_as_transformers(ours, model, visual, run_ours, run_model):
    """Results, and gradients of visual tokens and of every parameter of `ours` that has a part.

    Args:
        run_ours, run_model: (module, visual) -> result.
    """
    results = []
    for run, module, dtype in (
        (run_ours, ours, torch.float32),
        (run_model, model, torch.float32),
        (run_model, copy.deepcopy(model).double(), torch.float64),
    ):
        leaf = visual.to(dtype).requires_grad_()
        parameters = dict(module.named_parameters())
        leaves = [leaf, *(parameters[name] for name, _ in ours.named_parameters())]
        results.append(gradients(run(module, leaf), leaves))
    # Compare all results at once, each scaled by its largest number. Softmax is invariant to the
    # bias of keys, so its gradient is zero up to rounding and is scaled like that of the weight.
    names = ["result", "visual", *(name for name, _ in ours.named_parameters())]
    sizes = dict(zip(names, (true.abs().max().item() for true in results[2]), strict=True))
    units = [sizes[name.replace("key.bias", "key.weight")] for name in names]
    assert_as_accurate(
        *(
            torch.cat([x.flatten() / unit for x, unit in zip(tensors, units, strict=True)])
            for tensors in results
        ),
        torch.float32,
    )


def assert_near(ours, expected):
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_names_are_those_of_transformers():
    model = baseline()
    assert set(ours_of(model).state_dict()) == set(model.state_dict())
    head = Bert(mlm_head=True, text_layers=1, fusion_layers=0, **SIZES)
    masked = transformers.BertForMaskedLM(config(num_hidden_layers=1)).state_dict()
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    expected = {name.removeprefix("bert.") for name in masked} - tied
    assert set(head.state_dict()) == expected


def test_the_base_model_has_the_parameters_of_bert_base():
    with torch.device("meta"):
        ours = Bert(text_layers=12, fusion_layers=0)
    count = sum(p.numel() for p in ours.parameters())
    assert count == 109_482_240 - (768 * 768 + 768)  # as published, less the pooler


def both(model, visual, ids, mask, visual_mask=None, partner=None):
    """Encode and fuse with `model` alone; return the words of the result."""
    if partner is not None:
        visual, visual_mask = visual[partner], visual_mask[partner]
    hidden = stock_encode(model, ids, mask)
    return stock_fuse(model, hidden, mask, visual, visual_mask)[mask]


@BACKENDS
@pytest.mark.parametrize("words", [None, sum(LENGTHS) + 3, B * L], ids=["exact", "bound", "all"])
def test_ragged_captions_as_transformers(backend, words):
    model = baseline()
    ids, mask = captions()

    def ours(ours, visual):
        hidden = ours.encode(ids, mask, words=words)
        out = ours.fuse(hidden, mask, visual, words=words)
        assert (hidden[~mask] == 0).all() and (out[~mask] == 0).all()
        return out[mask]

    assert_as_transformers(
        ours_of(model, backend),
        model,
        torch.randn(B, 6, VISUAL),
        ours,
        lambda model, visual: both(model, visual, ids, mask),
    )


@BACKENDS
def test_captions_without_padding(backend):
    model = baseline()
    ids, mask = torch.randint(1, 50, (B, L)), torch.ones(B, L, dtype=torch.bool)
    assert_as_transformers(
        ours_of(model, backend),
        model,
        torch.randn(B, 6, VISUAL),
        lambda ours, visual: ours.fuse(ours.encode(ids), None, visual).flatten(0, 1),
        lambda model, visual: both(model, visual, ids, mask),
    )


@BACKENDS
def test_ragged_visual_tokens(backend):
    model = baseline()
    ids, mask = captions()
    sizes = torch.tensor([3, 6, 4, 1, 5])
    visual_mask = torch.arange(6) < sizes[:, None]
    cu_visual = torch.tensor([0, *sizes.cumsum(0)], dtype=torch.int32)

    def ours(ours, visual):
        rows = visual[visual_mask]
        hidden = ours.encode(ids, mask)
        return ours.fuse(hidden, mask, rows, cu_visual=cu_visual, max_visual=6)[mask]

    assert_as_transformers(
        ours_of(model, backend),
        model,
        torch.randn(B, 6, VISUAL),
        ours,
        lambda model, visual: both(model, visual, ids, mask, visual_mask),
    )


@BACKENDS
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_partners_share_keys_and_values(backend, padded, ragged):
    model = baseline()
    ids, mask = captions()
    mask = mask if padded else torch.ones_like(mask)
    partner = torch.tensor([2, 0, 2, 2, 1])  # clip 3 has no caption
    sizes = torch.tensor([3, 6, 5, 2]) if ragged else torch.tensor([6, 6, 6, 6])
    visual_mask = torch.arange(6) < sizes[:, None]
    options = {}
    if ragged:
        options = dict(cu_visual=torch.tensor([0, 3, 9, 14, 16], dtype=torch.int32), max_visual=6)

    def ours(ours, visual):
        given = mask if padded else None
        rows = visual[visual_mask] if ragged else visual
        hidden = ours.encode(ids, given)
        return ours.fuse(hidden, given, rows, partner=partner, **options)[mask]

    assert_as_transformers(
        ours_of(model, backend),
        model,
        torch.randn(4, 6, VISUAL),
        ours,
        lambda model, visual: both(model, visual, ids, mask, visual_mask, partner),
    )


def test_masks_with_holes_and_on_the_left():
    model = baseline()
    ours = ours_of(model)
    ids, _ = captions()
    mask = torch.rand(B, L) < 0.6
    mask[:, 4] = True
    out, expected = ours.encode(ids, mask), stock_encode(model, ids, mask)
    assert_near(out[mask], expected[mask])


def test_a_caption_without_words():
    ours = ours_of(baseline())
    ids, mask = captions()
    mask[1] = False
    hidden = ours.encode(ids, mask)
    out = ours.fuse(hidden, mask, torch.randn(B, 6, VISUAL))
    assert (out[1] == 0).all() and out.isfinite().all()
    nothing = ours.encode(ids, torch.zeros_like(mask))
    assert (nothing == 0).all()


@BACKENDS
@pytest.mark.parametrize(
    "batch, length, tokens, clips", [(0, 9, 6, 0), (0, 5, 6, 3), (2, 0, 6, 2), (2, 5, 0, 2)]
)
def test_nothing_at_all(backend, batch, length, tokens, clips):
    ours = Bert(text_layers=1, fusion_layers=1, visual_width=VISUAL, backend=backend, **SIZES)
    ids = torch.ones(batch, length, dtype=torch.int64)
    visual, partner = torch.randn(clips, tokens, VISUAL), torch.zeros(batch, dtype=torch.int64)
    for mask in (None, ids):
        out = ours.fuse(ours.encode(ids, mask), mask, visual, partner=partner)
        out.sum().backward()
        assert out.shape == (batch, length, 64) and out.isfinite().all()


def test_padding_changes_nothing():
    ours = ours_of(baseline())
    ids, mask = captions()
    other = torch.where(mask, ids, 33)
    for words in (None, B * L):
        assert torch.equal(
            ours.encode(ids, mask, words=words), ours.encode(other, mask, words=words)
        )


def test_groups_are_sound():
    _, mask = captions()
    for words in (None, sum(LENGTHS) + 5, B * L):
        packed = Captions(mask, mask, words)
        packed.joint().check()
        cu = torch.tensor([0, 3, 9, 14, 16, 16], dtype=torch.int32)
        packed.cross(cu, 16, 6, None, False).check()
        packed.cross(cu, 16, 6, torch.tensor([4, 1, 1, 3, 2]), False).check()
        equal = torch.arange(4, dtype=torch.int32) * 6
        packed.cross(equal, 18, 6, torch.tensor([2, 1, 1, 0, 2]), True).check()


def test_autocast_and_dropout():
    ours = ours_of(baseline())
    ids, mask = captions()
    with torch.autocast("cpu", torch.bfloat16):
        out = ours.fuse(ours.encode(ids, mask), mask, torch.randn(B, 6, VISUAL))
    out.float().sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert not torch.equal(ours.encode(ids, mask), ours.encode(ids, mask))
    ours.eval()
    assert torch.equal(ours.encode(ids, mask), ours.encode(ids, mask))


def test_padding_is_not_computed_nor_a_clip_twice():
    ours = ours_of(baseline())
    ids, mask = captions()
    visual = torch.randn(B, 6, VISUAL)

    def count(run):
        """Floating-point operations of the linear layers."""
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_flop_counts()["Global"][torch.ops.aten.addmm]

    def fuse(clips, partner=None):
        text = torch.randn(3 * B, L, 64)
        ours.fuse(text, mask.repeat(3, 1), clips, partner=partner)

    few, all_ = (count(lambda n=n: ours.encode(ids, mask, words=n)) for n in (sum(LENGTHS), B * L))
    assert few * B * L == all_ * sum(LENGTHS)
    shared = count(lambda: fuse(visual, torch.arange(B).repeat(3)))
    repeated = count(lambda: fuse(visual.repeat(3, 1, 1)))
    # Two layers, keys and values, 2B clips of 6 tokens fewer.
    assert repeated - shared == 2 * 2 * (2 * 2 * B * 6 * VISUAL * 64)


@pytest.mark.parametrize("known", [False, True], ids=["all", "words"])
def test_compiles_without_a_graph_for_each_length(known):
    torch._dynamo.reset()
    ours = Bert(text_layers=1, fusion_layers=1, visual_width=VISUAL, **SIZES)
    visual = torch.randn(B, 6, VISUAL)

    def run(ids, mask, visual, partner, words):
        hidden = ours.encode(ids, mask, words=words)
        return ours.fuse(hidden, mask, visual, partner=partner, words=words)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for shift in range(4):
        ids, mask = captions()
        mask[0, : shift + 1] = False
        partner = torch.arange(B).roll(shift)
        words = sum(LENGTHS) - shift if known else None
        inputs = (ids, mask, visual, partner, words)
        torch.testing.assert_close(compiled(*inputs), run(*inputs))
    assert counter.frame_count == (2 if known else 1)  # the second graph takes any number of words


def test_every_backend_on_every_device(where):
    where.skip_unless_runs("space_time_attention")
    ours = ours_of(baseline(), "reference")
    inputs = [*captions(), torch.randn(4, 6, VISUAL), torch.tensor([2, 0, 2, 2, 1])]

    def run(inputs):
        ids, mask, visual, partner = inputs
        out = ours.fuse(ours.encode(ids, mask), mask, visual, partner=partner)
        return gradients(out, list(ours.parameters()))

    expected = run(inputs)
    ours.to(where.device).backend = where.backend
    results = run([x.to(where.device) for x in inputs])
    for our, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(our.cpu(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_the_same_on_cuda_without_synchronising():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    ours = ours_of(baseline())
    (ids, mask), visual = captions(), torch.randn(B, 6, VISUAL)
    partner = torch.arange(B).roll(1)
    here = ours.fuse(ours.encode(ids, mask), mask, visual, partner=partner)
    ours.cuda()
    ids, mask, visual, partner = (x.cuda() for x in (ids, mask, visual, partner))
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = ours.fuse(ours.encode(ids, mask), mask, visual, partner=partner)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(there.cpu(), here)


def test_predicts_words_as_transformers():
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config(num_hidden_layers=2)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = Bert(text_layers=2, fusion_layers=0, mlm_head=True, **SIZES)
    ours.load_pretrained(model.state_dict())
    ids, mask = captions()
    positions = torch.tensor([0, 3, 18, 21])
    logits = ours.predict_words(ours.encode(ids, mask), positions)
    expected = model(input_ids=ids, attention_mask=mask.long()).logits.flatten(0, 1)[positions]
    assert_near(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    assert_near(
        ours.embeddings.word_embeddings.weight.grad,
        model.bert.embeddings.word_embeddings.weight.grad,
    )


@BACKENDS
@pytest.mark.parametrize("head", [False, True])
def test_distilbert(backend, head):
    torch.manual_seed(0)
    sizes = transformers.DistilBertConfig(
        vocab_size=50, dim=64, n_heads=2, hidden_dim=96, n_layers=2, max_position_embeddings=12,
        dropout=0.0, attention_dropout=0.0, attn_implementation="eager",
    )  # fmt: skip
    kind = transformers.DistilBertForMaskedLM if head else transformers.DistilBertModel
    model = kind(sizes)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = Bert(
        text_layers=2, fusion_layers=0, token_types=0, mlm_head=head, backend=backend, **SIZES
    )
    ours.load_pretrained(model.state_dict())
    ids, mask = captions()
    out = ours.encode(ids, mask)
    tower = model.distilbert if head else model
    expected = tower(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert_near(out[mask], expected[mask])
    if head:
        positions = torch.tensor([0, 3])
        logits = model(input_ids=ids, attention_mask=mask.long()).logits.flatten(0, 1)
        assert_near(ours.predict_words(out, positions), logits[positions])
    cotangent = torch.randn_like(expected)[mask]
    (out[mask] * cotangent).sum().backward()
    (expected[mask] * cotangent).sum().backward()
    layer = ours.encoder.layer[0]
    assert_near(layer.attention.self.query.weight.grad,
                tower.transformer.layer[0].attention.q_lin.weight.grad)  # fmt: skip
    assert_near(layer.output.LayerNorm.bias.grad,
                tower.transformer.layer[0].output_layer_norm.bias.grad)  # fmt: skip


def test_cross_attention_may_be_missing_from_a_checkpoint():
    bert = transformers.BertForPreTraining(config(num_hidden_layers=4)).state_dict()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): weight
        for name, weight in bert.items()
    }
    ours = Bert(text_layers=2, fusion_layers=2, **SIZES)
    before = copy.deepcopy(ours.encoder.layer[3].crossattention.state_dict())
    skipped = ours.load_pretrained(old)
    heads = [name for name in old if "pooler" in name or name.startswith("cls.")]
    assert heads and skipped == heads
    for name, weight in ours.encoder.layer[3].crossattention.state_dict().items():
        assert torch.equal(weight, before[name])
    words = bert["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(ours.embeddings.word_embeddings.weight, words)
    assert ours.load_pretrained(ours.state_dict()) == []


def test_a_checkpoint_that_does_not_fit_is_explained():
    ours = Bert(text_layers=2, fusion_layers=1, mlm_head=True, **SIZES)
    weights = dict(ours.state_dict())
    crossing = "encoder.layer.2.crossattention.self.key.weight"
    missing = ["embeddings.LayerNorm.bias", crossing, "cls.predictions.bias"]
    for name in missing:
        del weights[name]
    weights["encoder.layer.3.output.dense.bias"] = torch.zeros(64)
    weights["embeddings.position_embeddings.weight"] = torch.zeros(9, 64)
    with pytest.raises(ValueError, match="do not fit") as error:
        ours.load_pretrained(weights)
    assert f"missing: {', '.join(sorted(missing))}" in str(error.value)
    assert "unexpected: encoder.layer.3.output.dense.bias" in str(error.value)
    assert "embeddings.position_embeddings.weight [9, 64], not [12, 64]" in str(error.value)
    with pytest.raises(ValueError, match="output layer"):
        untied = {**ours.state_dict(), "cls.predictions.decoder.weight": torch.zeros(50, 64)}
        ours.load_pretrained(untied)


def test_projections_are_those_of_singularity_and_frozen():
    x = torch.randn(3, 64)
    for relu, sequence in ((False, nn.Sequential()), (True, nn.Sequential(nn.ReLU()))):
        ours, linear = Projection(64, 8, relu=relu), nn.Linear(64, 8)
        ours.load_state_dict(linear.state_dict(), strict=True)
        assert torch.equal(ours(x), sequence.append(linear)(x))


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="multiple"):
        Bert(**{**SIZES, "num_heads": 3})
    with pytest.raises(ValueError, match="layers"):
        Bert(text_layers=0, fusion_layers=0, **SIZES)
    ours = Bert(text_layers=1, fusion_layers=1, visual_width=VISUAL, **SIZES)
    ids, mask = captions()
    with pytest.raises(ValueError, match="at most 12"):
        ours.encode(torch.zeros(2, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="attention_mask"):
        ours.encode(ids, mask[:, :3])
    with pytest.raises(ValueError, match="words"):
        ours.encode(ids, mask, words=B * L + 1)
    with pytest.raises(ValueError, match="attention_mask"):
        ours.encode(ids, words=3)
    with pytest.raises(RuntimeError, match="more words"):
        ours.encode(ids, mask, words=sum(LENGTHS) - 1)
    text, visual = torch.zeros(B, L, 64), torch.zeros(B, 6, VISUAL)
    with pytest.raises(ValueError, match="partner"):
        ours.fuse(text, mask, visual[:2])
    with pytest.raises(ValueError, match="partner"):
        ours.fuse(text, mask, visual, partner=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="visual"):
        ours.fuse(text, mask, torch.zeros(B, 6, 64))
    with pytest.raises(ValueError, match="together"):
        ours.fuse(text, mask, visual, max_visual=6)
    with pytest.raises(ValueError, match="text"):
        ours.fuse(torch.zeros(B, L, 32), mask, visual)
    with pytest.raises(ValueError, match="mlm_head"):
        ours.predict_words(text, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="fusion"):
        Bert(text_layers=1, fusion_layers=0, **SIZES).fuse(text, mask, torch.zeros(B, 6, 64))
