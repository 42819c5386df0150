"""Trained models and encoders of the Hugging Face Hub, with a local folder and a local cache."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from test_finetune import SMAUG, TINY

from vidl.training import Config, pretrain

pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A cache of the Hub with bert-base-uncased, and no network."""
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "0" * 40
    folder = tmp_path / "cache/models--bert-base-uncased"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def test_names_of_the_hub(offline, monkeypatch, tmp_path):
    from vidl.training.names import TOKENIZER, WEIGHTS, local

    (offline / "vocab.txt").write_text("[PAD]\n")
    for name in ("bert-base-uncased", "hf-hub:bert-base-uncased"):
        assert local(name, "data.tokenizer", TOKENIZER) == str(offline / "vocab.txt")
    # Paths, and names of files that do not exist, are never asked for.
    for path in (str(tmp_path), "missing/vocab.txt", "/tmp/bert", "../bert"):
        assert local(path, "data.tokenizer", TOKENIZER) == path
    assert local("runs/first", "start.model", WEIGHTS, marked=True) == "runs/first"
    with pytest.raises(ValueError) as error:
        local("hf-hub:timm/vit_base", "start.vision", WEIGHTS)
    for part in ("need start.vision", "model.safetensors", "`hf download timm/vit_base`"):
        assert part in str(error.value)


def test_a_run_is_published_and_loaded(tmp_path, offline):
    from vidl.training.hub import Published

    folder = tmp_path / "run"
    pretrain(Config.read(None, [*TINY, *SMAUG, "model.name=smaug", f"run.folder={folder}"]))
    first = Published(folder)
    first.save_pretrained(tmp_path / "published")
    second = Published.from_pretrained(str(tmp_path / "published"))
    one, two = (published.trained.model.state_dict() for published in (first, second))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert second.trained.tokenizer.tokens() == first.trained.tokenizer.tokens()
    card = (tmp_path / "published/README.md").read_text()
    for part in ("library_name: vidl", "| data | moving_shapes", "| steps | 2 |", "| dense |",
                 "| t2v R@1 |", "- `fusion_layers: 1`", "on 1 process(es)"):  # fmt: skip
        assert part in card, part
    # Nothing of this machine is published.
    texts = [file.read_text() for file in Path(tmp_path / "published").glob("*.[mjy]*[dnl]")]
    assert len(texts) >= 4 and not any(str(tmp_path) in text for text in texts)
    about = json.loads((tmp_path / "published/config.json").read_text())
    assert about["system"] == "smaug"
    # What is published can be published again, without the log of the run.
    second.save_pretrained(tmp_path / "again")
    assert "final loss" not in (tmp_path / "again/README.md").read_text()
