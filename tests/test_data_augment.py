"""Augmentations of torchvision on clips."""

import random
import sys

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("torchvision")

from test_data_loader import folder, rows_of, take  # noqa: E402, F401
from test_training import EXAMPLES, MAC, train  # noqa: E402

from vidl import cli  # noqa: E402
from vidl.data.augment import augmentation, augmented  # noqa: E402
from vidl.data.dataset import Clips  # noqa: E402
from vidl.data.loader import Loader  # noqa: E402
from vidl.data.sampler import EpochSampler  # noqa: E402

NAMES = ["randaugment", "trivialaugment", "jitter"]


@pytest.mark.parametrize("name", NAMES)
def test_all_frames_of_a_clip_get_the_same_transform(name):
    generator = torch.Generator().manual_seed(0)
    still = torch.randint(256, (1, 24, 20, 3), dtype=torch.uint8, generator=generator)
    clip, transform = still.repeat(4, 1, 1, 1), augmentation(name)
    before, results = torch.random.get_rng_state(), []
    for seed in range(12):
        out = augmented(clip, transform, random.Random(seed))
        assert out.dtype == torch.uint8 and out.shape == clip.shape
        assert (out == out[:1]).all()
        torch.manual_seed(seed + 100)  # the global generator has no part in it
        assert torch.equal(out, augmented(clip, transform, random.Random(seed)))
        results.append(out)
    torch.random.set_rng_state(before)
    augmented(clip, transform, random.Random(0))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sum(not torch.equal(out, clip) for out in results) >= 6
    assert any(not torch.equal(out, results[0]) for out in results)


def test_batches_do_not_depend_on_the_workers(folder):  # noqa: F811
    def loader(workers, augment, train=True):
        rows = rows_of(folder / "good")
        clips = Clips(rows, frames=2, size=8, train=train, seed=4, augment=augment)
        return Loader(clips, EpochSampler(clips.kinds(), 4), workers=workers)

    own = take(loader(0, "jitter"), 4)
    assert own == take(loader(2, "jitter"), 4)
    plain = take(loader(0, "none"), 4)
    assert [x[:2] for x in own] == [x[:2] for x in plain] and own != plain  # same rows and texts
    tested = [take(loader(0, name, train=False), 2) for name in ("jitter", "none")]
    assert tested[0] == tested[1]  # no augmentation in evaluation


def test_errors(tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match="need augment among none, randaugment, .* got 'mixup'"):
        augmentation("mixup")
    with pytest.raises(ValueError, match="need data.augment=none with data.source moving_shapes"):
        train(tmp_path / "run", [*MAC, "data.augment=jitter"])
    options = [*MAC, "data.source=clips", f"data.files={EXAMPLES / 'clips.json'}"]
    options += [f"run.folder={tmp_path / 'run'}"]
    with pytest.raises(SystemExit):
        cli.main(["pretrain", *options, "data.augment=mixup"])
    assert "need data.augment as" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert cli.main(["pretrain", *options, "data.augment=jitter"]) == 1
    assert 'needs torchvision (extra "augment"): pip install' in capsys.readouterr().err
