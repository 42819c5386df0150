"""Contrastive batches that are encoded in chunks: the gradients are those of the whole batch."""

import contextlib

import pytest
import torch
import torch.multiprocessing as mp
from test_training import MAC, SMAUG, TINY, _rank, free_port, records, train

from vidl import cli, models
from vidl.masking import Vocabulary
from vidl.training import Config, checkpoints, chunks

SIZES = dict(
    frames=2, image_size=32, patch_size=16, width=32, depth=2, heads=2, text_width=32,
    text_layers=2, text_heads=2, embed_dim=32, mask_ratio=0.5, temperature=0.5,
    vocabulary=Vocabulary(60, 4, (0, 1, 2, 3, 4)), backend="reference",
)  # fmt: skip
FUSION = dict(fusion_layers=1, prune_layers=(0,), keep_rate=0.7, vtm=0, mlm=0)
DECODER = dict(decoder_width=32, decoder_depth=1, decoder_heads=2)
SYSTEMS = {
    "mac": {},
    "smaug": FUSION | DECODER | dict(mvm=0.7, vtc=1.3),
    "singularity": FUSION | dict(time_layers=1, frames_tested=2),
    "vindlu": FUSION,
    "svitt": FUSION | dict(keep_keys=1.0),
    "simvtp": DECODER | dict(tubelet_size=1, text_layers=0, vtm=0, mlm=0, mvm=0.7),
    "alpro": dict(vtm=0, mlm=0, pem=0),
}


def model_of(name, dropout):
    torch.manual_seed(0)
    fields = {n: x for n, x in (SIZES | SYSTEMS[name]).items() if accepts(name, n)}
    model = models.create(name, "tiny", **fields, dropout=dropout).double().train()
    for parameter in model.parameters():  # no time embedding or bias at 0
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    torch.manual_seed(1)
    inputs = model.recipe.example(6, 7) | {"step": 3, "clip_ids": torch.tensor([0, 1, 2, 0, 4, 5])}
    inputs["ids"] = inputs["ids"].clamp(min=5)
    inputs["attention_mask"][1, 4:] = 0
    inputs["attention_mask"][4, 3:] = 0
    return model, inputs


def accepts(name, field):
    return field in {f for f in vars(models.recipe(name, "tiny"))}


def parts(inputs, size):
    whole = {n: x.split(size) for n, x in inputs.items() if isinstance(x, torch.Tensor)}
    return [inputs | {n: x[i] for n, x in whole.items()} for i in range(len(whole["ids"]))]


def gradients(model):
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return grads


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert sum(x.abs().max() > 1e-9 for x in expected.values()) > len(expected) / 2
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", SYSTEMS)
def test_gradients_are_those_of_the_whole_batch(name):
    model, inputs = model_of(name, 0.0)
    losses = model(**inputs)
    (losses["loss"] / 4).backward()
    whole = gradients(model)
    chunked = chunks.backward(
        model, model, parts(inputs, 2), [1, 2, 3], contextlib.nullcontext, scale=0.25
    )
    assert_equal(gradients(model), whole)
    assert list(chunked) == list(losses)
    for key, loss in losses.items():
        torch.testing.assert_close(chunked[key], loss.detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["mac", "smaug", "simvtp"])
def test_both_passes_have_the_same_dropout(name):
    """Equal to chunks that keep their graphs until the loss of all of them."""
    model, inputs = model_of(name, 0.3)
    seeds, seen = [5, 6, 7], []
    for chunk, seed in zip(parts(inputs, 2), seeds, strict=True):
        torch.manual_seed(seed)
        seen.append(model(**chunk, losses=chunks.SEPARABLE))
    v, t = (torch.cat([chunk[key] for chunk in seen]) for key in "vt")
    loss = model.weight("vtc") * model.contrast(v, t, inputs["clip_ids"])
    if "mvm" in seen[0]:
        loss = loss + model.weight("mvm") * sum(chunk["mvm"] for chunk in seen) / 3
    loss.backward()
    whole = gradients(model)
    for order in (seeds, [5, 6, 8]):
        chunks.backward(model, model, parts(inputs, 2), order, contextlib.nullcontext)
        actual = gradients(model)
        if order == seeds:
            assert_equal(actual, whole)
        else:  # the dropout of a chunk depends on its seed
            assert any(not torch.allclose(actual[n], g) for n, g in whole.items())


def test_no_graph_holds_more_than_one_chunk(monkeypatch):
    """In the first pass nothing is kept, and the decoder of pixels does not run."""
    model, inputs = model_of("smaug", 0.0)
    seen = []
    forward = model.forward

    def noted(**arguments):
        out = forward(**arguments)
        seen.append((len(out["v"]), out["v"].requires_grad, "mvm" in out))
        return out

    monkeypatch.setattr(model, "forward", noted)
    chunks.backward(model, model, parts(inputs, 3), [0, 1], contextlib.nullcontext)
    assert seen == [(3, False, False)] * 2 + [(3, True, True)] * 2


@pytest.mark.slow
def test_two_ranks_in_chunks_equal_one_with_the_whole_batch(tmp_path):
    more = ["model.dropout=0", "schedule.steps=4"]
    runs = {
        "mac": [*MAC, *more, "optimizer.accumulate=2"],
        "smaug": [*SMAUG, *more, "model.vtm=0", "model.mlm=0"],
    }
    ranks = []
    for name, options in runs.items():
        train(tmp_path / name, options, "data.batch_size=8")
        for kind in ("ddp", "fsdp"):
            folder = f"run.folder={tmp_path / name}-{kind}"
            ranks.append([*options, "optimizer.chunk=2", f"run.parallel={kind}", folder])
    mp.spawn(_rank, ([(free_port(), options) for options in ranks],), nprocs=2)
    for name in runs:
        for kind in ("ddp", "fsdp"):
            one, two = (
                [r for r in records(path) if "loss" in r]
                for path in (tmp_path / name, f"{tmp_path / name}-{kind}")
            )
            assert len(one) == len(two) == 4
            for a, b in zip(one, two, strict=True):
                for key in ("loss", "grad_norm", "lr", *a["losses"]):
                    assert b[key] == pytest.approx(a[key], rel=1e-4), (name, kind, key)
    temperatures = [
        checkpoints.weights_of(f"{tmp_path}/smaug{end}")["contrast.temperature"]
        for end in ("", "-ddp", "-fsdp")
    ]
    assert temperatures[0] != 0.07
    for other in temperatures[1:]:
        torch.testing.assert_close(other, temperatures[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ([*SMAUG, "optimizer.chunk=2", "model.mlm=0"], "need model.vtm=0 with optimizer.chunk"),
        ([*SMAUG, "optimizer.chunk=2"], "need model.vtm=0 model.mlm=0 with optimizer.chunk"),
        ([*TINY, "model.name=vlc", "model.text_layers=0", "optimizer.chunk=2"],
         "need optimizer.chunk=0, or a model .* vtc .*mac.* got Vlc"),
        ([*TINY, "model.name=omnivl", "model.queue=0", "optimizer.chunk=2"],
         "need optimizer.chunk=0, or a model .* vtc .*alpro.* got Omnivl"),
        ([*SMAUG, "optimizer.chunk=2", "model.vtc=0"], "need optimizer.chunk=0, or .* got Smaug"),
        ([*MAC, "optimizer.chunk=3"], "need data.batch_size as a multiple of optimizer.chunk=3"),
        ([*MAC, "optimizer.chunk=-1"], "need optimizer.chunk >= 0, got -1"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_chunked(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", options)


def test_answers_are_not_chunked(tmp_path, capsys):
    options = [*SMAUG, "schedule.steps=1", f"run.folder={tmp_path / 'run'}"]
    assert cli.main(["pretrain", *options]) == 0
    tuned = ["schedule.steps=1", "data.batch_size=4", "optimizer.chunk=2", "data.workers=0"]
    tuned += [f"run.folder={tmp_path / 'qa'}", "data.clips=20", "run.device=cpu"]
    assert cli.main(["finetune", "qa", "--weights", str(tmp_path / "run"), *tuned]) == 1
    shown = capsys.readouterr().err
    assert "need optimizer.chunk=0" in shown and "Traceback" not in shown
    assert Config.read(tmp_path / "run/config.yaml").optimizer.chunk == 0
