"""Estimates count what a step computes, and their ranges follow the rates of the card."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from vidl import models
from vidl.bench.training import estimate, savings
from vidl.bench.training.steps import batch_of
from vidl.cli import main
from vidl.models.summary import flop_counter

FIELDS = dict(depth=1, frames=2, text_layers=1, width=64, heads=2, image_size=32, patch_size=8)


@pytest.fixture(scope="module")
def plan():
    return savings.plan("mac", "tiny", FIELDS, batch=8, device="cpu")


@pytest.fixture(scope="module")
def rows(plan):
    return list(estimate.rows(plan))


def test_bytes_of_activations_and_weights():
    linear = torch.nn.Linear(4, 5)
    meter = estimate._Meter(linear, estimate._Part("cpu"))
    x = torch.zeros(3, 4)
    with torch.no_grad(), meter:
        F.linear(x, linear.weight)
    (count,) = meter.counts
    assert count.flops == 2 * 3 * 4 * 5
    # Two bytes a number. The weight reaches the matmul as its transpose, which is a view.
    assert (count.activations, count.weights) == (2 * (3 * 4 + 3 * 5), 2 * 4 * 5)


def test_all_flops_of_a_step_are_counted(plan, rows):
    variants = list(plan.recipe.variants().values())
    for row, variant in zip(rows, (variants[0], variants[-1]), strict=True):
        model = models.MODELS["mac"].model(variant).train()
        with flop_counter() as counter:
            model(**batch_of(variant, estimate.COUNTED, "cpu"))["loss"].backward()
        assert sum(x.flops for x in row.operations) == counter.get_total_flops()
        assert row.parameters == sum(p.numel() for p in model.parameters())
    parts = {x.part for x in rows[0].operations if x.flops}
    assert {"embed", "attention", "MLP", "text"} <= parts


def test_ranges_follow_the_card_and_the_schedule(plan, rows):
    card = estimate.CARDS["a100"]
    dense, sparse = (estimate.estimate(row, card, plan, 1) for row in rows)
    for e in (dense, sparse):
        assert 0 < e.step[0] < e.step[1] and e.memory[0] < e.memory[1]
        assert e.step[0] == pytest.approx(sum(best for best, _ in e.parts.values()))
    assert sparse.step[0] < dense.step[0] and sparse.memory[0] < dense.memory[0]
    steps = plan.epochs * plan.clips / plan.batch
    assert dense.hours[1] == pytest.approx(steps * dense.step[1] / 3600)
    twice = dataclasses.replace(card, matmul=2 * card.matmul, bandwidth=2 * card.bandwidth)
    faster = estimate.estimate(rows[0], twice, plan, 1)
    assert faster.step[0] == pytest.approx(dense.step[0] / 2)  # at best the host costs nothing
    four = estimate.estimate(rows[0], card, plan, 4)
    assert four.hours[1] > dense.hours[1]  # of all GPUs: they exchange gradients


def test_a_recipe_that_saves_nothing_is_dense():
    plan = savings.plan(
        "mac", "tiny", FIELDS | {"mask_ratio": 0.0}, device="cpu", need_savings=False
    )
    assert [row.name for row in estimate.rows(plan)] == ["dense"]


def test_command(capsys):
    fields = [f"{name}={value}" for name, value in FIELDS.items()]
    assert main(["estimate", "mac", *fields, "--preset", "tiny", "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    assert "1 x H100 SXM · an ESTIMATE: nothing was measured on a GPU" in shown
    assert "35% to 70% of the FLOP/s" in shown and "GPU-hours, 10 epochs of 5.44 M" in shown
    with pytest.raises(SystemExit):
        main(["estimate", "mac", "--gpu", "h100", "--gpus", "0"])
    assert "need gpus >= 1, got 0" in capsys.readouterr().err
