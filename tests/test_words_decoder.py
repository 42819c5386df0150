"""WordsDecoder against BertLMHeadModel of transformers: same weights, ragged texts and rows."""

import copy

import pytest
import torch
from compare import assert_model_as_accurate, gradients
from torch import nn

from vidl.nn import Captions, WordsDecoder

transformers = pytest.importorskip("transformers")

VISUAL, WIDTH, WORDS = 48, 64, 50
LENGTHS = (7, 1, 4, 9, 5)
B, L = len(LENGTHS), 9
SIZES = dict(vocab_size=WORDS, width=WIDTH, num_heads=2, mlp_width=96, max_positions=12)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "native"])


def baseline(layers=2):
    """A decoder with cross-attention whose biases and LayerNorms are not trivial."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        is_decoder=True,
        add_cross_attention=True,
        attn_implementation="eager",
    )
    model = transformers.BertLMHeadModel(config)
    for layer in model.bert.encoder.layer:
        layer.crossattention.self.key = nn.Linear(VISUAL, WIDTH)
        layer.crossattention.self.value = nn.Linear(VISUAL, WIDTH)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def ours_of(model, backend="auto", layers=2):
    ours = WordsDecoder(layers=layers, visual_width=VISUAL, dropout=0.0, backend=backend, **SIZES)
    ours.load_pretrained(model.state_dict())
    return ours


def texts(seed=1):
    ids = torch.randint(1, WORDS, (B, L), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    return ids.masked_fill(~mask, 0), mask


def stock(model, visual, ids, mask, seen=None):
    """The logits at words, by transformers."""
    out = model(
        input_ids=ids,
        attention_mask=mask.long(),
        encoder_hidden_states=visual,
        encoder_attention_mask=None if seen is None else seen.long(),
        use_cache=False,
    )
    return out.logits[mask]


def assert_as_transformers(ours, model, visual, run_ours, run_model):
    """Logits, and gradients of the rows and of every parameter."""
    results = []
    for run, module, dtype in (
        (run_ours, ours, torch.float32),
        (run_model, model, torch.float32),
        (run_model, copy.deepcopy(model).double(), torch.float64),
    ):
        leaf = visual.to(dtype).requires_grad_()
        own = {name.removeprefix("bert."): p for name, p in module.named_parameters()}
        leaves = [leaf, *(own[name] for name, _ in ours.named_parameters())]
        results.append(gradients(run(module, leaf), leaves))
    assert_model_as_accurate(*results, torch.float32)


def test_names_are_those_of_transformers():
    model = baseline()
    names = {name.removeprefix("bert.") for name, _ in model.named_parameters()}
    assert {name for name, _ in ours_of(model).named_parameters()} == names


@BACKENDS
@pytest.mark.parametrize("words", [None, sum(LENGTHS) + 3, B * L], ids=["exact", "bound", "all"])
def test_ragged_texts_as_transformers(backend, words):
    model = baseline()
    ids, mask = texts()

    def ours(ours, visual):
        logits = ours(ids, mask, visual, words=words)
        assert logits.shape == (B, L, WORDS) and (logits[~mask] == 0).all()
        return logits[mask]

    assert_as_transformers(
        ours_of(model, backend),
        model,
        torch.randn(B, 6, VISUAL),
        ours,
        lambda model, visual: stock(model, visual, ids, mask),
    )


@BACKENDS
def test_texts_without_padding(backend):
    model = baseline(layers=1)
    ids, mask = torch.randint(1, WORDS, (B, L)), torch.ones(B, L, dtype=torch.bool)
    assert_as_transformers(
        ours_of(model, backend, layers=1),
        model,
        torch.randn(B, 6, VISUAL),
        lambda ours, visual: ours(ids, None, visual).flatten(0, 1),
        lambda model, visual: stock(model, visual, ids, mask),
    )


@BACKENDS
@pytest.mark.parametrize("extra", [0, 4])
def test_ragged_rows_that_texts_share(backend, extra):
    """As the answers to questions: the packed rows end with `extra` rows of no clip."""
    model = baseline()
    ids, mask = texts()
    partner = torch.tensor([2, 0, 2, 2, 1])  # clip 3 has no text
    sizes = torch.tensor([3, 6, 5, 2])
    seen = torch.arange(6) < sizes[:, None]
    cu_visual = torch.tensor([0, 3, 9, 14, 16], dtype=torch.int32)

    def ours(ours, visual):
        rows = torch.cat([visual[seen], visual.flatten(0, 1)[:extra]])
        options = dict(partner=partner, cu_visual=cu_visual, max_visual=6)
        return ours(ids, mask, rows, **options)[mask]

    assert_as_transformers(
        ours_of(model, backend),
        model,
        torch.randn(4, 6, VISUAL),
        ours,
        lambda model, visual: stock(model, visual[partner], ids, mask, seen[partner]),
    )


def test_a_text_without_words():
    ours = ours_of(baseline())
    ids, mask = texts()
    mask[1] = False
    out = ours(ids, mask, torch.randn(B, 6, VISUAL))
    assert (out[1] == 0).all() and out.isfinite().all()


def test_no_word_sees_the_next():
    ours = ours_of(baseline())
    ids, mask = texts()
    visual = torch.randn(B, 6, VISUAL)
    changed = ids.clone()
    changed[3, 5] = ids[3, 5] % (WORDS - 1) + 1
    before, after = ours(ids, mask, visual), ours(changed, mask, visual)
    assert torch.equal(before[3, :5], after[3, :5])
    assert not torch.equal(before[3, 5:], after[3, 5:])
    # The layers alone are causal too.
    fused, other = (ours.fuse(ours.encode(x, mask), mask, visual) for x in (ids, changed))
    assert torch.equal(fused[3, :5], other[3, :5])


def test_weights_of_other_models():
    model = baseline()
    with pytest.raises(ValueError, match="missing: .*encoder.layer.2.attention"):
        ours_of(model, layers=3)
    config = copy.deepcopy(model.config)
    config.is_decoder = config.add_cross_attention = False
    masked = transformers.BertForMaskedLM(config)
    ours = WordsDecoder(layers=2, visual_width=VISUAL, **SIZES)
    before = copy.deepcopy(ours.state_dict())
    ours.load_pretrained(masked.state_dict())  # BERT has no cross-attention: it stays
    name = "encoder.layer.1.crossattention.self.query.weight"
    assert torch.equal(ours.state_dict()[name], before[name])
    words = masked.bert.embeddings.word_embeddings.weight
    assert torch.equal(ours.embeddings.word_embeddings.weight, words)


def test_where_the_words_of_captions_begin():
    ids, mask = texts()
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    for words in (None, sum(LENGTHS) + 3):
        assert torch.equal(Captions(ids, mask, words).cu_words(), offsets)
    assert Captions(ids).cu_words().tolist() == list(range(0, B * L + 1, L))


@BACKENDS
@pytest.mark.parametrize("packed", [False, True])
def test_a_word_at_a_time_as_whole_texts(backend, packed):
    """Three texts about each of two clips, whose second one has fewer rows if they are packed."""
    ours = ours_of(baseline(), backend).eval()
    ids = torch.randint(1, WORDS, (6, L))
    visual, cu_visual, options = torch.randn(2, 6, VISUAL), None, {}
    if packed:
        cu_visual = torch.tensor([0, 6, 10], dtype=torch.int32)
        visual = visual.flatten(0, 1)[:10]
        options = dict(cu_visual=cu_visual, max_visual=6)
    partner = torch.arange(2).repeat_interleave(3)
    with torch.no_grad():
        expected = ours(ids, None, visual, partner=partner, **options)
        texts = ours.write(visual, texts=3, **options)
        for at in range(L):
            logits = texts.step(ids[:, at])
            torch.testing.assert_close(logits, expected[:, at], rtol=1e-5, atol=1e-5)
            if at == 3:  # other texts about the same clip continue
                chosen = torch.tensor([2, 2, 0, 4, 3, 4])
                texts.choose(chosen)
                ids = torch.cat([ids[chosen, : at + 1], ids[:, at + 1 :]], 1)
                expected = ours(ids, None, visual, partner=partner, **options)
    assert (texts.rows, texts.length) == (6, L)


def test_a_text_has_as_many_words_as_positions():
    ours = ours_of(baseline()).eval()
    texts = ours.write(torch.randn(B, 6, VISUAL))
    for _ in range(12):
        texts.step(torch.ones(B, dtype=torch.int64))
    with pytest.raises(ValueError, match="need ids of at most 12 words, the positions of the dec"):
        texts.step(torch.ones(B, dtype=torch.int64))
