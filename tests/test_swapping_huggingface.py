"""vidl.swap, vidl.prune and vidl.mask of transformers, against the unswapped models."""

import copy
import json
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_model_as_accurate
from gloo import on_two_ranks
from tiny import token_importance
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

transformers = pytest.importorskip("transformers")
from huggingface import (  # noqa: E402
    BERT,
    CASES,
    LENGTHS,
    PATCHES,
    TEXT,
    VIDEOMAE,
    VISION,
    captions,
    clips,
    hidden,
    outputs,
    randn,
    results,
    simple,
)
from transformers.models.bert import modeling_bert  # noqa: E402
from transformers.models.timesformer.modeling_timesformer import TimesformerDropPath  # noqa: E402

import vidl  # noqa: E402
import vidl.swapping.huggingface.attention as interface  # noqa: E402
from vidl.bench.measure import cases  # noqa: E402
from vidl.bench.measure.check import check  # noqa: E402
from vidl.bench.ops import swapped  # noqa: E402
from vidl.kernels.groups import Groups  # noqa: E402
from vidl.ops import kept_count, space_time_attention  # noqa: E402

EVERY = pytest.mark.parametrize("name", CASES)
PRETRAINING = CASES["VideoMAEForPreTraining"]


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def bert(**options):
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**{**BERT, **options})).eval()


def words(model, **more):
    """The hidden states of all words."""
    inputs = captions()
    return model(**inputs, **more).last_hidden_state[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@EVERY
def test_outputs_and_gradients(name, dtype):
    case = CASES[name]
    model = case.model().train()
    true, low = results(model, case, torch.float64), results(model, case, dtype)
    vidl.swap(model)
    ours = results(model, case, dtype)
    assert [x.dtype for x in ours] == [x.dtype for x in low]
    # Softmax is invariant to the bias of keys, so its gradient is zero up to rounding: its relative
    # error means nothing.
    sizes = [float(x.detach().square().mean().sqrt()) for x in true]
    none = [i for i, size in enumerate(sizes) if size < 1e-9 * max(sizes)]
    for i in none:
        assert ours[i].abs().max() <= 2 * low[i].abs().max() + torch.finfo(dtype).eps * max(sizes)
    parts = ([x for i, x in enumerate(tensors) if i not in none] for tensors in (ours, low, true))
    assert_model_as_accurate(*parts, dtype)


@EVERY
def test_there_and_back(name, tmp_path):
    case = CASES[name]
    model = case.model()
    before, weights = outputs(model, case, torch.float32), model.state_dict()
    kinds = {n: type(m) for n, m in model.named_modules()}
    vidl.swap(model)
    swapped = outputs(model, case, torch.float32)
    close(swapped, before)
    assert list(model.state_dict()) == list(weights)

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, case, torch.float32)[0], swapped[0])
        vidl.unswap(other)
        assert torch.equal(outputs(other, case, torch.float32)[0], before[0])

    model.save_pretrained(tmp_path)
    assert "vidl" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        kinds[""].__name__
    ]
    loaded = kinds[""].from_pretrained(tmp_path, attn_implementation=attention_of(case)).eval()
    assert torch.equal(outputs(loaded, case, torch.float32)[0], before[0])

    vidl.unswap(model)
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    again = outputs(model, case, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))


def attention_of(case):
    return case.model().config._attn_implementation


QUICK = ("VideoMAEForPreTraining", "Timesformer", "Bert")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in CASES]
)
def test_compiles(name):
    case = CASES[name]
    model = case.model()
    vidl.swap(model)
    expected = results(model, case)
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
    results_compiled = outputs(compiled, case, torch.float32)
    close(results_compiled, expected[: len(results_compiled)])
    results_compiled[0].sum().backward()
    model.zero_grad()
    outputs(model, case, torch.float32)[0].sum().backward()
    for a, b in zip(compiled.parameters(), model.parameters(), strict=True):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (a, b)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in CASES if n != "BridgeTower"])
def test_checkpoints_of_gradients(name):
    case = CASES[name]
    model = case.model().train()
    vidl.swap(model)
    before = results(model, case)
    model.activation_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    close(results(model, case), before)


@EVERY
def test_hidden_states(name):
    case = CASES[name]
    model = case.model()
    before = outputs_of_layers(model, case)
    vidl.swap(model)
    close(outputs_of_layers(model, case), before)


def outputs_of_layers(model, case):
    out = model(**case.inputs(), output_hidden_states=True)
    parts = (out, *(out.get(part) for part in ("text_model_output", "vision_model_output")))
    states = [part.hidden_states for part in parts if part is not None and "hidden_states" in part]
    flat = []
    while states:
        state = states.pop()
        if isinstance(state, torch.Tensor):
            flat.append(state)
        else:
            states += state
    assert len(flat) > 2
    return flat


def _rank(rank, folder):
    model = PRETRAINING.model()
    vidl.swap(model)
    inputs = {name: x[rank : rank + 1] for name, x in PRETRAINING.inputs().items()}
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(**inputs).loss.backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_data_parallel(tmp_path):
    on_two_ranks(_rank, tmp_path)
    ours = [torch.load(f"{tmp_path}/{rank}.pt") for rank in range(2)]
    model = PRETRAINING.model()
    model(**PRETRAINING.inputs()).loss.backward()
    for mine, others, parameter in zip(*ours, model.parameters(), strict=True):
        assert torch.equal(mine, others)
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_loads_without_vidl(tmp_path):
    model = PRETRAINING.model()
    vidl.swap(model)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, transformers\n"
        f"model = transformers.AutoModel.from_pretrained({str(tmp_path)!r})\n"
        "assert type(model).__name__ == 'VideoMAEModel', type(model)\n"
        "assert not [name for name in sys.modules if name.startswith('vidl')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_name_can_be_asked_for(tmp_path):
    model = bert()
    expected = words(model)
    model.set_attn_implementation("vidl")
    close([words(model)], [expected])
    model.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path, attn_implementation="vidl").eval()
    assert loaded.config._attn_implementation == "vidl"
    close([words(loaded)], [expected])
    built = transformers.AutoModel.from_config(model.config, attn_implementation="vidl").eval()
    built.load_state_dict(model.state_dict())
    close([words(built)], [expected])


def test_padding_never_reaches_a_word():
    model, inputs = bert(attn_implementation="vidl"), captions()
    before = words(model)
    inputs["input_ids"][inputs["attention_mask"] == 0] = 7
    after = model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    assert torch.equal(before, after)


@pytest.mark.parametrize("how", ["left", "holes"])
def test_padding_anywhere(how):
    model, inputs = bert(), captions()
    mask = inputs["attention_mask"].flip(1) if how == "left" else torch.tensor([[1, 0, 1] * 3] * 3)
    expected = model(inputs["input_ids"], mask).last_hidden_state
    model.set_attn_implementation("vidl")
    # Padded queries are equal too: SigLIP reads the last one.
    close([model(inputs["input_ids"], mask).last_hidden_state], [expected])
    vidl.swap(model)
    hidden = model(inputs["input_ids"], mask).last_hidden_state
    close([hidden[mask.bool()]], [expected[mask.bool()]])
    assert not hidden[mask == 0].any()


def test_masks_that_are_no_padding_are_those_of_sdpa():
    model, inputs = bert(), captions()
    mask = torch.rand(3, 1, 9, 9).round().bool() | torch.eye(9, dtype=torch.bool)
    expected = model(inputs["input_ids"], mask).last_hidden_state
    vidl.swap(model)
    assert torch.equal(model(inputs["input_ids"], mask).last_hidden_state, expected)


def test_a_decoder_with_cross_attention_and_a_cache():
    options = dict(is_decoder=True, add_cross_attention=True)
    model, inputs = bert(**options), captions()
    visual, seen = randn(3, 5, 64), torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    more = dict(encoder_hidden_states=visual, encoder_attention_mask=seen)
    expected = words(model, **more)
    report = str(vidl.swap(model))
    assert "it is causal" in report and "a decoder" in report
    close([words(model, **more)], [expected])
    ids = inputs["input_ids"][:1]  # nine words, the last one with a cache of the others
    first = model(ids[:, :8], use_cache=True, **{n: x[:1] for n, x in more.items()})
    cache = dict(past_key_values=first.past_key_values)
    last = model(ids[:, 8:], **cache, **{n: x[:1] for n, x in more.items()})
    close([last.last_hidden_state[0, 0]], [expected[8]])


@pytest.mark.parametrize("option", interface.UNSUPPORTED)
def test_what_cannot_be_computed_raises(option):
    attention = bert(attn_implementation="vidl").encoder.layer[0].attention.self
    q, k, v = randn(3, 1, 2, 4, 32)
    # Called directly, because layers consume some of these options.
    with pytest.raises(ValueError, match=f"{option} in BertSelfAttention: call vidl.unswap"):
        interface.attention(attention, q, k, v, None, **{option: torch.ones(1)})


def test_the_position_bias_of_t5_is_refused_with_the_remedy():
    sizes = dict(d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2, vocab_size=50)
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    expected = model(**captions()).last_hidden_state
    model.set_attn_implementation("vidl")
    with pytest.raises(
        ValueError, match=r"position_bias in T5Attention: .*set_attn_implementation\('sdpa'\)"
    ):
        model(**captions())
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**captions()).last_hidden_state, expected)


def test_unknown_masks_raise():
    with pytest.raises(TypeError, match="a mask of type str in BertSelfAttention"):
        bert(attn_implementation="vidl").encoder.layer[0](randn(1, 4, 64), "causal")


@pytest.mark.parametrize("name", ["Bert", "VideoMAEForVideoClassification", "Vivit", "CLIP"])
def test_weights_of_attention_are_refused(name):
    model, inputs = CASES[name].model(), CASES[name].inputs()
    model.set_attn_implementation("eager")
    vidl.swap(model)
    # VideoMAE does not pass output_attentions to its attention.
    with pytest.raises(ValueError, match="output_attentions=True in .*: call vidl.unswap"):
        model(**inputs, output_attentions=True)
    vidl.unswap(model)
    assert model.config._attn_implementation == "eager"


def test_timesformer_still_gives_weights():
    case = CASES["Timesformer"]
    model = case.model()
    expected = model(**case.inputs(), output_attentions=True).attentions
    vidl.swap(model)
    out = model(**case.inputs(), output_attentions=True)
    close(out.attentions, expected)
    close([out.last_hidden_state], outputs(model, case, torch.float32))


def test_rows_packed_by_the_caller():
    attention = bert(attn_implementation="vidl").encoder.layer[0].attention.self
    x, groups = randn(7, 64), Groups.joint(torch.tensor([0, 3, 7], dtype=torch.int32), 7, 4)
    out = attention(x[None], groups)[0][0]
    q, k, v = (f(x).view(7, 2, 32) for f in (attention.query, attention.key, attention.value))
    close([out], [space_time_attention(q, k, v, groups).flatten(1)])


def test_dropout_of_weights_is_that_of_sdpa():
    model = bert(attention_probs_dropout_prob=0.5).train()

    def step():
        torch.manual_seed(3)
        model.zero_grad()
        out = words(model)
        out.square().sum().backward()
        return [out, *(p.grad for p in model.encoder.parameters())]

    expected = step()
    assert "drops out weights (0.5)" in str(vidl.swap(model))
    close(step(), expected)
    assert rows_of(model) == sum(LENGTHS)
    model.activation_checkpointing_enable()
    close(step(), expected)
    model.eval()
    assert rows_of(model) == sum(LENGTHS)
    evaluated = words(model)
    vidl.unswap(model)
    close([evaluated], [words(model)])


def test_dropout_of_weights_compiles():
    torch.manual_seed(0)
    model = bert(attention_probs_dropout_prob=0.5).train()
    for layer in model.encoder.layer:  # dropout of all weights: PyTorch's draw does not matter
        layer.attention.self.dropout.p = 1.0
    vidl.swap(model)
    inputs = captions()
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).last_hidden_state[real]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close([compiled(**inputs).last_hidden_state[real]], [expected])


def test_dropout_of_bridgetower_is_that_of_sdpa():
    model = CASES["BridgeTower"].model().train()
    for module in model.modules():
        if type(module).__name__.endswith(("SelfAttention", "CrossAttention")):
            module.dropout.p = 0.5
    torch.manual_seed(3)
    expected = outputs(model, CASES["BridgeTower"], torch.float32)
    vidl.swap(model)
    torch.manual_seed(3)
    close(outputs(model, CASES["BridgeTower"], torch.float32), expected)


def test_heads_without_a_kernel():
    model = bert(num_attention_heads=8)
    expected = words(model)
    assert "keeps PyTorch's attention" in str(vidl.swap(model))
    close([words(model)], [expected])


def rows_of(model, **more):
    """The number of rows that the layers compute."""
    seen = []
    handle = model.encoder.layer[1].register_forward_hook(
        lambda module, args, out: seen.append(out.shape[0] * out.shape[1])
    )
    words(model, **more)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("without", [[0, 1, 2], [1], [0]])
def test_captions_without_a_word_are_those_of_the_original(without):
    model, inputs = bert(), captions()
    inputs["attention_mask"][without] = 0
    expected = model(**inputs)
    vidl.swap(model)
    ours = model(**inputs)
    real = inputs["attention_mask"].bool()
    real[without] = True
    close([ours.last_hidden_state[real]], [expected.last_hidden_state[real]])
    close([ours.pooler_output], [expected.pooler_output])


def naflex():
    options = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config = transformers.Siglip2VisionConfig(**options, num_patches=16, patch_size=8)
    mask = torch.tensor([[1] * 16, [1] * 9 + [0] * 7])
    inputs = dict(pixel_attention_mask=mask, spatial_shapes=torch.tensor([[4, 4], [3, 3]]))
    return transformers.Siglip2VisionModel(config).eval(), dict(
        inputs, pixel_values=randn(2, 16, 192)
    )


def test_a_model_that_reads_its_mask_is_refused_with_the_remedy():
    model, inputs = naflex()
    expected = model(**inputs).pooler_output
    model.set_attn_implementation("vidl")
    with pytest.raises(ValueError, match=r"mask.repeat.*set_attn_implementation\('sdpa'\)"):
        model(**inputs)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**inputs).pooler_output, expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: mask.dtype,
        lambda mask: mask[:, None],
        lambda mask: torch.zeros(2) + mask,
        lambda mask: torch.where(mask, 0.0, -1.0),
    ],
)
def test_no_use_of_the_mask_as_a_tensor_is_silent(use):
    options = dict(device=torch.device("cpu"), mask_function=interface.bidirectional_mask_function)
    mask = interface.visible(2, 4, 4, attention_mask=torch.ones(2, 4).bool(), **options)
    with pytest.raises(ValueError, match="reads its mask as a tensor"):
        use(mask)
    assert copy.deepcopy(mask).groups is not None


def test_layers_compute_words_only():
    model = bert()
    assert rows_of(model) == len(LENGTHS) * max(LENGTHS)
    vidl.swap(model)
    assert rows_of(model) == sum(LENGTHS)
    assert rows_of(model, output_hidden_states=True) == len(LENGTHS) * max(LENGTHS)


def test_captions_without_padding_are_not_packed():
    model, inputs = bert(), captions()
    expected = model(inputs["input_ids"]).last_hidden_state
    vidl.swap(model)
    for mask in (None, torch.ones_like(inputs["attention_mask"])):
        close([model(inputs["input_ids"], mask).last_hidden_state], [expected])


def test_heads_of_bert():
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).eval()
    inputs = captions()
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    expected = model(**inputs, labels=labels).loss
    vidl.swap(model)
    close([model(**inputs, labels=labels).loss], [expected])


def test_masked_patches_are_never_embedded():
    model, inputs = PRETRAINING.model(), PRETRAINING.inputs()
    vidl.swap(model)
    expected = model(**inputs).logits
    mask = inputs["bool_masked_pos"].view(2, 2, 4, 4)
    pixels = mask.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    inputs["pixel_values"] = inputs["pixel_values"].masked_fill(pixels[:, :, None], float("nan"))
    assert torch.equal(model(**inputs).logits, expected)


def test_visible_patches_instead_of_a_mask():
    model, inputs = PRETRAINING.model(), PRETRAINING.inputs()
    vidl.swap(model)
    expected = model(**inputs)
    ids = (~inputs["bool_masked_pos"]).nonzero()[:, 1].view(2, -1)
    out = model(inputs["pixel_values"], ids)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    other = model(inputs["pixel_values"], ids.flip(1))  # in any order
    close([other.logits, other.loss], [expected.logits, expected.loss])


@pytest.mark.parametrize("visible", [(4, 6), (3, 8)])
def test_unequal_masks_raise(visible):
    model, mask = PRETRAINING.model(), hidden(visible)
    vidl.swap(model)
    for part in (model, model.videomae):
        with pytest.raises(ValueError, match=f"got {visible[0]} to {visible[1]}"):
            part(clips()["pixel_values"], bool_masked_pos=mask)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (hidden()[:1], ValueError),
        (hidden()[:, :-1], ValueError),
        (hidden().int(), ValueError),
        (torch.zeros(2, PATCHES + 1, dtype=torch.int64), ValueError),
        (torch.zeros(2, 3, dtype=torch.int64), RuntimeError),
        (None, ValueError),
    ],
)
def test_wrong_masks_raise(mask, error):
    model = PRETRAINING.model()
    vidl.swap(model)
    with pytest.raises(error, match="need"):
        model(clips()["pixel_values"], mask)


def test_wrong_clips_raise():
    model = PRETRAINING.model()
    vidl.swap(model)
    for shape in [(2, 4, 3, 32, 40), (2, 4, 1, 32, 32), (2, 3, 32, 32)]:
        with pytest.raises(ValueError, match=r"need pixel_values \[B, T, 3, 32, 32\]"):
            model(torch.zeros(shape), hidden())


def test_a_compiled_model_keeps_its_number_of_visible_patches():
    model = PRETRAINING.model()
    vidl.swap(model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    model(**PRETRAINING.inputs())
    with pytest.raises(RuntimeError, match="need 5 visible patches in each clip"):
        model(**clips(), bool_masked_pos=hidden((6, 6)))
    # Indices of another shape would only compile another graph.
    ids = (~hidden((6, 6))).nonzero()[:, 1].view(2, -1)
    assert model(**clips(), bool_masked_pos=ids).logits.shape[1] == PATCHES - 6


def test_uint8_clips():
    model = PRETRAINING.model()
    vidl.swap(model)
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (2, 4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    mean, std = (
        torch.tensor(x).view(3, 1, 1)
        for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # as in the image processor
    )
    expected = model((video / 255 - mean) / std, hidden())
    out = model(video, hidden())
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [dict(norm_pix_loss=False), dict(num_channels=2)])
def test_other_losses(options):
    torch.manual_seed(0)
    model = simple("VideoMAEForPreTraining", {**VIDEOMAE, **options})()
    video = randn(2, 4, options.get("num_channels", 3), 32, 32)
    expected = model(video, hidden())
    vidl.swap(model)
    out = model(video, hidden())
    close([out.loss, out.logits], [expected.loss, expected.logits])
    expected = model(video, hidden(), return_dict=False)
    assert torch.equal(expected[0], out.loss)


def test_autocast():
    model, inputs = PRETRAINING.model(), PRETRAINING.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs)
        vidl.swap(model)
        out = model(**inputs)
    assert out.loss.dtype == expected.loss.dtype and out.logits.dtype == expected.logits.dtype
    torch.testing.assert_close(out.logits, expected.logits, rtol=0.1, atol=0.1)


def test_the_table_of_positions_stays():
    model = PRETRAINING.model()
    table = model.position_embeddings.clone()
    vidl.swap(model)
    model(**PRETRAINING.inputs())
    vidl.unswap(model)
    assert torch.equal(model.position_embeddings, table)


def test_stochastic_depth_of_timesformer():
    model = CASES["Timesformer"].model().train()
    for layer in model.encoder.layer:  # its configuration accepts only integers
        layer.drop_path = TimesformerDropPath(0.5)
    torch.manual_seed(5)
    expected = model(**clips()).last_hidden_state
    vidl.swap(model)
    torch.manual_seed(5)
    close([model(**clips()).last_hidden_state], [expected])


def test_dropout_of_timesformer():
    config = dict(CASES["Timesformer"].model().config.to_dict(), attention_probs_dropout_prob=0.5)
    torch.manual_seed(0)
    model = simple("TimesformerModel", config)().train()
    torch.manual_seed(5)
    expected = model(**clips()).last_hidden_state
    assert "drops out attention weights (0.5)" in str(vidl.swap(model))
    torch.manual_seed(5)
    close([model(**clips()).last_hidden_state], [expected])


def test_sizes_that_a_convolution_cuts():
    model = CASES["ViT"].model()
    images = randn(2, 3, 35, 41)
    expected = model(images, interpolate_pos_encoding=True).last_hidden_state
    vidl.swap(model)
    close([model(images, interpolate_pos_encoding=True).last_hidden_state], [expected])


def by_hand(model, pixels, rate, layers, scores):
    """Pruning after attention with a weight matrix, by the original modules of ViT or ViViT."""
    x = model.embeddings(pixels)
    for number, layer in enumerate(model.layers):
        normed, attn = layer.layernorm_before(x), layer.attention
        out, weights = attn(normed, None)
        x = x + out
        if number in layers:
            k, v = (
                projection(normed).unflatten(-1, (attn.num_attention_heads, -1)).transpose(1, 2)
                for projection in (attn.k_proj, attn.v_proj)
            )
            importance = token_importance(scores, weights, k, v)
            keep = kept_count(x.shape[1] - 1, rate)
            ids = 1 + importance[:, 1:].topk(keep).indices.sort(1).values
            kept = x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))
            x = torch.cat([x[:, :1], kept], 1)
        x = x + layer.mlp(layer.layernorm_after(x))
    return model.layernorm(x)


@pytest.mark.parametrize("scores", ["cls", "mean", "value", "similarity"])
@pytest.mark.parametrize("name", ["ViT", "Vivit"])
def test_prune(name, scores):
    case = CASES[name]
    model = case.model()
    model.set_attn_implementation("eager")
    pixels = case.inputs()["pixel_values"]
    before = outputs(model, case, torch.float32)
    expected = by_hand(model, pixels, 0.6, (0, 1), scores)
    report = vidl.prune(model, 0.6, [0, 1], scores=scores)
    assert "keeps 0.6 of its tokens" in str(report)
    out = model(pixels, output_hidden_states=True)
    close([out.last_hidden_state], [expected])
    first = kept_count(before[0].shape[1] - 1, 0.6)
    sizes = [1 + first, 1 + kept_count(first, 0.6)]
    assert [x.shape[1] for x in out.hidden_states[1:]] == sizes
    model.train().activation_checkpointing_enable()
    model(pixels).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.layers.parameters())
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(pixels, output_attentions=True)
    vidl.unswap(model)
    assert torch.equal(model.eval()(pixels).last_hidden_state, before[0])


@pytest.mark.parametrize("fuse, scores", [(None, "mean"), ("sum", "mean"), (None, "similarity")])
def test_prune_videomae(fuse, scores):
    case = CASES["VideoMAEForVideoClassification"]
    model, rows = case.model(), []
    vidl.prune(model, 0.5, [0], scores=scores, fuse=fuse)
    model.videomae.encoder.layer[1].register_forward_hook(lambda m, i, o: rows.append(o.shape[1]))
    model(**case.inputs()).logits.sum().backward()
    assert rows == [PATCHES // 2 + (fuse is not None)]
    vidl.prune(model, 1.0, [0], scores=scores, fuse=fuse)  # keeps all tokens
    before = outputs(model, case, torch.float32)
    vidl.unswap(model)
    close(before, outputs(model, case, torch.float32))


def test_what_cannot_be_pruned():
    for name, why in [
        ("VideoMAEForVideoClassification", "no class token"),
        ("VideoMAEForPreTraining", "that vidl can prune"),
        ("Bert", "that vidl can prune"),
    ]:
        model = CASES[name].model()
        with pytest.raises(ValueError, match=why):
            vidl.prune(model, 0.5, [0])
        assert model.config._attn_implementation == "sdpa"
    config = transformers.ViTConfig(**VISION, encoder_stride=8)
    with pytest.raises(ValueError, match="needs the features of a whole grid"):
        vidl.prune(transformers.ViTForMaskedImageModeling(config), 0.5, [0])


@pytest.mark.parametrize("name", ["ViT", "Vivit", "CLIP", "Siglip"])
def test_mask(name):
    case = CASES[name]
    model = case.model()
    before = outputs(model, case, torch.float32)
    embeddings = getattr(model, "vision_model", model).embeddings
    pixels = case.inputs()["pixel_values"]
    every = embeddings(pixels)
    assert "masks 0.75 of its patches in training" in str(vidl.mask(model, 0.75))
    close(outputs(model, case, torch.float32), before)

    model.train()
    visible = embeddings(pixels)
    prefix = name != "Siglip"
    assert visible.shape[1] == prefix + (every.shape[1] - prefix) // 4
    for sample, whole in zip(visible, every, strict=True):  # a subset of all tokens, in order
        places = torch.cdist(sample, whole).argmin(1)
        close([sample], [whole[places]])
        assert places.tolist() == sorted(set(places.tolist())) and (places[0] == 0 or not prefix)
    assert not torch.equal(visible, embeddings(pixels))
    outputs(model, case, torch.float32)[0].sum().backward()
    with pytest.raises(ValueError, match="without bool_masked_pos and interpolate"):
        embeddings(pixels, interpolate_pos_encoding=True)

    vidl.mask(model, 0.0)
    close(outputs(model, case, torch.float32), before)
    vidl.unswap(model)
    assert type(embeddings).__module__.startswith("transformers.")


def test_what_cannot_be_masked():
    with pytest.raises(ValueError, match="found none in"):
        vidl.mask(CASES["Bert"].model(), 0.5)
    config = transformers.ViTConfig(**VISION, encoder_stride=8)
    with pytest.raises(ValueError, match="a mask token"):
        vidl.mask(transformers.ViTForMaskedImageModeling(config), 0.5)


def test_the_report():
    report = vidl.swap(CASES["Siglip"].model())
    assert any("Siglip" in c.was and "PoolingHead" in c.was for c in report.left)
    assert "SiglipAttention by attn_implementation='vidl'" in str(report)
    report = vidl.swap(CASES["CLIP"].model())
    notes = {c.note for c in report.swapped if c.name.startswith("text_model")}
    assert notes == {"stays with PyTorch's attention, because it is causal"}


def test_another_version_of_transformers_leaves_the_rest(monkeypatch):
    name = "vidl.swapping.huggingface.bert"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(modeling_bert, "BertEncoder")
    with pytest.warns(UserWarning, match=r"cannot change models of .*huggingface.bert.*"):
        vidl.swap(CASES["ViT"].model())
    monkeypatch.undo()
    vidl.swap(bert())


def test_nothing_to_swap():
    config = transformers.T5Config(d_model=32, num_layers=1, num_heads=2, d_ff=32, vocab_size=20)
    with pytest.raises(ValueError, match=r"no module of .*T5Model can be swapped"):
        vidl.swap(transformers.T5Model(config))


@pytest.mark.parametrize(
    "sizes",
    [
        dict(model="videomae", visible=3, options=tuple(VIDEOMAE.items())),
        dict(model="bert", L=20, options=tuple({**TEXT, "max_position_embeddings": 20}.items())),
    ],
    ids=["videomae", "bert"],
)
def test_benchmark(sizes, monkeypatch):
    """The benchmark's candidates are correct, and its FLOPs are those that PyTorch counts."""
    monkeypatch.setattr(swapped, "SHAPES", {"tiny": sizes | {"B": {"cpu": 3}}})
    (case,) = cases.plan(["swapped"], dtypes=["float32"], device="cpu").cases
    trials = check(case)
    assert [t.candidate.name for t in trials if t.status not in ("ok", "cannot run")] == []
    assert {t.candidate.name for t in trials if t.status == "ok"} > {"vidl native"}
    inputs = case.make()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        swapped.step(inputs, "vidl native")
    pooler = 2 * 3 * 64 * 64 if sizes["model"] == "bert" else 0  # no output depends on it
    assert counter.get_total_flops() == case.work("forward")[0].flops + pooler


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("videomae", "8 of 128 patches embedded"),
        ("timesformer", "attention weights of a layer (8, 3, 17, 17)"),
        pytest.param("bert", "233 words of 512 rows", marks=pytest.mark.slow),
    ],
)
def test_the_examples_run(name, says, capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / f"swap_{name}.py"))
    assert says in capsys.readouterr().out
