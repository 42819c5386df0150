"""Instants of spans, of a fixed rate and of both halves, and the clips that are read with them."""

import random

import pytest

from vidl.cli import main
from vidl.data.cache import CachedClips
from vidl.data.dataset import Clips
from vidl.data.formats import Row
from vidl.data.sampler import Key
from vidl.data.sampling import Sampling, instants
from vidl.data.video import BrokenClip, read_clip
from vidl.training import Config, sources


def test_spans_are_those_of_instants():
    for rng in (None, 0):
        one, other = (random.Random(rng) if rng is not None else None for _ in range(2))
        assert Sampling(views=2).instants(2, 10, 4, one) == instants(2, 10, 4, other)


def test_a_rate_in_evaluation_by_hand():
    # Two views of three frames, one frame in 2 s, of a video of 12 s in units of 1/10 s: a view
    # lasts 4 s from its first to its last frame and begins within 8 s.
    own = Sampling(kind="rate", rate=0.5, views=2).instants(100, 220, 6, None, 10)
    assert own == [120, 140, 160, 160, 180, 200]
    assert Sampling(kind="rate", rate=0.5).instants(0, 4, 2) == [1, 3]
    assert Sampling(kind="rate", rate=30).instants(0, 0.04, 1) == [0.02]  # a still


def test_a_rate_in_training_begins_anywhere():
    sampling, rng = Sampling(kind="rate", rate=2.0, views=3), random.Random(0)
    starts = []
    for _ in range(300):
        drawn = sampling.instants(5, 9, 6, rng)
        views = [drawn[at : at + 2] for at in (0, 2, 4)]
        assert all(5 <= one < 8.5 and abs(other - one - 0.5) < 1e-9 for one, other in views)
        assert [one for one, _ in views] == sorted(one for one, _ in views)
        starts += [one for one, _ in views]
    assert min(starts) < 5.05 and max(starts) > 8.45
    assert sum(start < 6.75 for start in starts) == pytest.approx(450, abs=60)


def test_headtail_draws_half_of_each_half():
    sampling, rng, heads = Sampling(kind="headtail"), random.Random(0), []
    for _ in range(300):
        drawn = sampling.instants(10, 20, 5, rng)
        assert drawn == sorted(drawn) and drawn[0] >= 10 and drawn[-1] < 20
        assert sum(instant < 15 for instant in drawn) == 2
        heads += drawn[:2]
    assert min(heads) < 10.1 and max(heads) > 14.9
    assert sampling.instants(10, 20, 5) == instants(10, 20, 5)


@pytest.mark.parametrize("options, complaint", [
    (dict(kind="random"), "need sampling among spans, rate, headtail, got 'random'"),
    (dict(rate=0.0), "need rate > 0, got 0.0"),
    (dict(views=0), "need views >= 1, got 0"),
    (dict(kind="headtail", views=2), "need sampling spans or rate for 2 views, got headtail"),
])  # fmt: skip
def test_wrong_sampling(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Sampling(**options)


def test_a_view_longer_than_the_video():
    sampling = Sampling(kind="rate", rate=2.0, views=2)
    assert len(sampling.instants(0, 0.51, 4)) == 4
    complaint = "need a clip longer than 0.5 s, a view of 2 frames at data.rate=2, got 0.5 s"
    with pytest.raises(ValueError, match=complaint):
        sampling.instants(0, 0.5, 4)
    with pytest.raises(ValueError, match="need frames as a multiple of 2 views, got 3"):
        sampling.instants(0, 9, 3)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A video of 20 frames in two seconds."""
    pytest.importorskip("av")
    from clips import write_video

    file = tmp_path_factory.mktemp("clips") / "a.mp4"
    write_video(file, 20, size=(32, 32))
    return file


def test_a_clip_at_a_rate(video):
    from clips import numbers

    sampling = Sampling(kind="rate", rate=4.0, views=2)
    # Views of two frames, 0.25 s apart, begin within 1.75 s: at 0.4375 and 1.3125 s.
    assert numbers(read_clip(video, 4, sampling=sampling)) == [4, 6, 13, 15]
    with pytest.raises(BrokenClip, match="need a clip longer than 2.5 s, .* data.rate=4, got 2 s"):
        read_clip(video, 22, sampling=sampling)
    part = read_clip(video, 2, start=1.0, sampling=Sampling(kind="rate", rate=4.0))
    assert numbers(part) == [13, 16]


def test_cached_clips_have_no_rate(video):
    row = Row(str(video), captions=["a"])
    options = dict(frames=4, size=32, train=True)
    with pytest.raises(ValueError, match="need data.sampling spans or headtail with data.cache"):
        CachedClips([row], sampling=Sampling(kind="rate"), **options)
    pictures = CachedClips([row], sampling=Sampling(kind="headtail"), **options).read(Key(0, 0))
    assert pictures.pictures.shape == (4, 32, 32, 3)
    still = Clips([row], sampling=Sampling(kind="rate", rate=4.0, views=2), **options)
    assert still.read(Key(0, 0)).pictures.shape == (4, 32, 32, 3)


def test_views_of_a_run(video, tmp_path, capsys):
    (tmp_path / "a.json").write_text('[{"video": "a.mp4", "caption": "a"}]')
    files = [f"data.files=[{tmp_path}/a.json]", f"data.media={video.parent}"]
    fields = ["model.name=clipbert", *files, "model.views=3", "model.frames=2",
              "model.image_size=32", "data.batch_size=1",
              f"run.folder={tmp_path}/run", "data.workers=0"]  # fmt: skip
    config = Config.read(None, [*fields, "data.sampling=rate", "data.rate=5"])
    clips = sources.open_clips(config, config.recipe(), None)
    assert clips.sampling == Sampling(kind="rate", rate=5.0, views=3) and clips.frames == 6
    assert clips.read(Key(0, 0)).pictures.shape == (6, 32, 32, 3)
    assert main(["pretrain", *fields, "data.sampling=headtail"]) == 1
    complaint = "need data.sampling spans or rate with several views (model.views), got headtail"
    assert complaint in capsys.readouterr().err
    # Each view would last 2.5 s.
    assert main(["pretrain", *fields, "data.sampling=rate", "data.rate=0.4"]) == 1
    assert "a view of 2 frames at data.rate=0.4, got 2 s" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["pretrain", *fields, "data.source=moving_shapes", "data.sampling=rate"])
    assert "need data.sampling=spans with data.source=moving_shapes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["pretrain", *fields, "data.rate=0"])
    assert "need data.rate > 0" in capsys.readouterr().err
