"""Estimates count what a step computes, and their ranges follow the rates of the card."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from vidl import models
from vidl.bench.training import cards, estimate, savings
from vidl.bench.training.baseline import baseline_of
from vidl.bench.training.steps import batch_of
from vidl.cli import main
from vidl.models.summary import flop_counter

FIELDS = dict(depth=1, frames=2, text_layers=1, width=64, heads=2, image_size=32, patch_size=8)


@pytest.fixture(scope="module")
def plan():
    return savings.plan("mac", "tiny", FIELDS, batch=8, device="cpu")


@pytest.fixture(scope="module")
def rows(plan):
    return {row.name: row for row in estimate.rows(plan, cards.CARDS["a100"])}


def test_bytes_of_activations_and_weights():
    linear = torch.nn.Linear(4, 5)
    meter = estimate._Meter(linear, estimate._Part("cpu"), 2)
    x = torch.zeros(3, 4)
    with torch.no_grad(), meter:
        F.linear(x, linear.weight)
    (count,) = meter.counts
    assert count.flops == 2 * 3 * 4 * 5
    # Two bytes a number. The weight reaches the matmul as its transpose, which is a view.
    assert (count.activations, count.weights) == (2 * (3 * 4 + 3 * 5), 2 * 4 * 5)


@pytest.mark.parametrize("column", ["torch", "vidl"])
def test_all_flops_of_a_step_are_counted(plan, rows, column):
    variants = list(plan.recipe.variants().values())
    for name, variant in (("dense", variants[0]), ("sparse", variants[-1])):
        row = rows[f"{name}, {column}"]
        model = models.MODELS["mac"].model(variant).train()
        if column == "torch":
            model = baseline_of(model)
        with flop_counter() as counter:
            model(**batch_of(variant, estimate.COUNTED, "cpu"))["loss"].backward()
        assert sum(x.flops for x in row.operations) == counter.get_total_flops()
        assert row.parameters == sum(p.numel() for p in model.parameters())
        parts = {x.part for x in row.operations if x.flops}
        assert {"embed", "attention", "MLP", "text"} <= parts
        attention = sum(x.flops for x in row.operations if x.attention)
        assert 0 < attention < counter.get_total_flops() / 2


def test_ranges_follow_the_card_and_the_schedule(plan, rows):
    card = cards.CARDS["a100"]
    dense, sparse = (
        estimate.estimate(rows[name], card, plan, 1) for name in ("dense, vidl", "sparse, vidl")
    )
    for e in (dense, sparse):
        assert 0 < e.step[0] < e.step[1] and e.memory[0] < e.memory[1]
        assert e.step[0] == pytest.approx(sum(best for best, _ in e.parts.values()))
    assert sparse.step[0] < dense.step[0] and sparse.memory[0] < dense.memory[0]
    steps = plan.epochs * plan.clips / plan.batch
    assert dense.hours[1] == pytest.approx(steps * dense.step[1] / 3600)
    twice = dataclasses.replace(
        card, **{rate: 2 * getattr(card, rate) for rate in ("matmul", "attention", "bandwidth")}
    )
    faster = estimate.estimate(rows["dense, vidl"], twice, plan, 1)
    assert faster.step[0] == pytest.approx(dense.step[0] / 2)  # at best the host costs nothing
    four = estimate.estimate(rows["dense, vidl"], card, plan, 4)
    assert four.hours[1] > dense.hours[1]  # of all GPUs: they exchange gradients


def test_torch_moves_more_than_vidl(rows):
    moved = {name: sum(x.activations for x in row.operations) for name, row in rows.items()}
    assert moved["dense, torch"] > moved["dense, vidl"] > moved["sparse, vidl"]


def test_nothing_overlaps_on_a_device_that_waits(plan):
    operation = estimate.Count("MLP", attention=False, flops=30.0, activations=0.0, weights=50.0)
    row = estimate.Row("dense, vidl", [operation], parameters=0, saved=0)
    reached = cards.Efficiency(matmul=0.5, attention=1.0, bandwidth=0.5, link=1.0, host=7.0)
    card = cards.Card("toy", 20.0, 1.0, 10.0, 1.0, 0.0, best=reached, worst=reached)
    clips = plan.batch / estimate.COUNTED
    flops, size = 30 * clips / 10, 50 / 5  # the bytes of weights do not grow with the batch
    assert estimate.estimate(row, card, plan, 1).step[0] == max(flops, size, 7)
    waits = dataclasses.replace(card, waits=True)
    assert estimate.estimate(row, waits, plan, 1).step[0] == flops + size + 7


def test_rates_of_this_device():
    card = cards.this()
    assert card.source == "measured" and card.number == (2 if torch.cuda.is_available() else 4)
    assert 0 < card.best.host < 1e-2 and card.waits != torch.cuda.is_available()
    # Of any CPU and GPU, with a wide margin.
    assert 1e8 < card.attention < 1e16 and 1e8 < card.matmul < 1e16
    assert 1e8 < card.bandwidth < 1e14 and 1e8 < card.memory < 1e13


def test_a_recipe_that_saves_nothing_is_dense():
    plan = savings.plan(
        "mac", "tiny", FIELDS | {"mask_ratio": 0.0}, device="cpu", need_savings=False
    )
    counted = estimate.rows(plan, cards.CARDS["a100"])
    assert [row.name for row in counted] == ["dense, torch", "dense, vidl"]


def test_command(capsys):
    fields = [f"{name}={value}" for name, value in FIELDS.items()]
    assert main(["estimate", "mac", *fields, "--preset", "tiny", "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    assert "1 x H100 SXM · an ESTIMATE: no step ran on it" in shown
    assert "dense, torch" in shown and "sparse, vidl" in shown
    assert "35% to 70% of the FLOP/s" in shown and "GPU-hours, 10 epochs of 5.44 M" in shown
    with pytest.raises(SystemExit):
        main(["estimate", "mac", "--gpu", "h100", "--gpus", "0"])
    assert "need gpus >= 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["estimate", "mac", "--gpu", "this", "--gpus", "2"])
    assert "need --gpus 1 with --gpu this" in capsys.readouterr().err
