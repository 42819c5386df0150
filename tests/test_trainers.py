"""Callbacks of trainers and the context manager: swapped during training, savings counted."""

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vidl
from vidl.models.summary import flop_counter
from vidl.swapping.swap import swapped_modules
from vidl.swapping.trainers import Swapped

EXAMPLES = Path(__file__).parents[1] / "examples"


def vit(**options):
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=32, patch_size=8, embed_dim=64, num_heads=2, depth=3, num_classes=4)
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **sizes | options)


def prune(model):
    return vidl.prune(model, keep_rate=0.5, layers=[0, 1])


def is_swapped(model):
    return next(swapped_modules(model), None) is not None


def flops_of(model, images):
    with flop_counter() as counter:
        model(images).sum().backward()
    return counter.get_total_flops()


def test_the_savings_are_those_of_real_steps():
    """FLOPs and tokens of both models, counted apart; numbers, weights and hooks stay."""
    images, model = torch.rand(4, 3, 32, 32), vit(proj_drop_rate=0.1)
    original = flops_of(copy.deepcopy(model), images)
    pruned = copy.deepcopy(model)
    prune(pruned)
    torch.manual_seed(1)
    computed, loss = flops_of(pruned, images), pruned(images).sum()
    with Swapped(model, prune) as swapped:
        assert is_swapped(model)
        torch.manual_seed(1)
        model(images).sum().backward()
        torch.testing.assert_close(model(images).sum(), loss)  # the same random numbers
        with torch.no_grad():
            model(images)  # not a training step
        model.eval()(images)
    assert not is_swapped(model) and not model._forward_pre_hooks
    totals, savings = swapped.savings.totals(), swapped.savings
    assert savings.samples == 8
    assert totals["flops"] == 2 * computed and totals["flops_original"] == 2 * original
    # 16 patches and a class token; half of the patches stay in each of the first two layers
    assert totals["tokens_original"] == 8 * 3 * 17
    assert totals["tokens"] == 8 * (17 + 9 + 5)


def test_an_error_restores_the_model_and_a_count_that_fails_is_a_reason():
    model = vit()
    with pytest.raises(KeyError), Swapped(model) as swapped:
        raise KeyError
    assert not is_swapped(model) and "no training step was seen" in str(swapped.savings)

    class Uncopyable(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.generator = vit(), (number for number in range(3))

        def forward(self, x):
            return self.vit(x)

    model = Uncopyable()
    with Swapped(model) as swapped:
        model(torch.rand(2, 3, 32, 32)).sum().backward()
    assert not is_swapped(model) and swapped.savings.totals() == {}
    assert "FLOPs and tokens not counted: TypeError: " in str(swapped.savings)


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.rand(3, 32, 32, generator=generator), "labels": index % 4}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_transformers(precision, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from huggingface import VISION

    from vidl.swapping.trainers import TransformersCallback

    torch.manual_seed(0)
    config = transformers.ViTConfig(**VISION, num_labels=4)
    model = transformers.ViTForImageClassification(config)
    callback = TransformersCallback(lambda model: vidl.prune(model, keep_rate=0.5, layers=[0]))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        bf16=precision == "bfloat16", save_steps=2, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, callbacks=[callback], train_dataset=Pictures())
    assert is_swapped(model)
    trainer.train()
    assert not is_swapped(model) and callback.savings.samples == 6
    totals = callback.savings.totals()
    assert 0 < totals["flops"] < totals["flops_original"]
    assert totals["tokens"] == 6 * (17 + 9) and totals["tokens_original"] == 6 * (17 + 17)
    assert trainer.state.log_history[-1]["vidl/flops"] == totals["flops"]
    assert "6 training samples, forward and backward:" in capsys.readouterr().out
    # The checkpoint is that of the original class, and the model works without vidl's forward.
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-3")
    images = torch.stack([Pictures()[index]["pixel_values"] for index in range(2)])
    expected = loaded.eval()(images).logits
    torch.testing.assert_close(model.eval()(images).logits, expected)


def test_lightning(tmp_path, capsys):
    lightning = pytest.importorskip("lightning")
    from vidl.swapping.trainers import LightningCallback

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.vit = vit()

        def training_step(self, batch, number):
            assert is_swapped(self)
            logits = self.vit(batch["pixel_values"])
            return nn.functional.cross_entropy(logits, batch["labels"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    model, callback = Classifier(), LightningCallback(lambda model: prune(model))
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=3, callbacks=[callback], logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(Pictures(), batch_size=2))
    assert not is_swapped(model) and callback.savings.samples == 6
    assert callback.savings.totals()["tokens"] == 6 * (17 + 9 + 5)
    assert "6 training samples, forward and backward:" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accelerate_videomae", "accelerate_vit"])
def test_examples(name, capsys, monkeypatch):
    for library in ("accelerate", "av", "transformers", "timm"):
        pytest.importorskip(library)
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60
    monkeypatch.setattr(sys, "argv", [name, "8"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    first, last = (float(line.split("loss ")[1]) for line in shown.splitlines()[:2])
    assert last < first and "FLOP, " in shown and "saved" in shown
