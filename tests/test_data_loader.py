"""Batches: exact resumption, kinds of rows in step over ranks, broken clips."""

import collections
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy
import pytest
import torch
from clips import EXAMPLES, STEP, numbers

from vidl.data import shards as shard_files
from vidl.data.dataset import Clips, TooManyBroken
from vidl.data.formats import Row
from vidl.data.loader import Loader
from vidl.data.moving_shapes import MovingShapes
from vidl.data.sampler import EpochSampler, InOrder, Key
from vidl.data.shards import ShardStream
from vidl.data.text import load_tokenizer, train_tokenizer
from vidl.data.video import BrokenClip

av = pytest.importorskip("av")
av.logging.set_level(None)
FILES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 clips of constant brightness; every third one is broken in one of several ways."""
    folder = tmp_path_factory.mktemp("clips")
    for n in range(FILES):
        file = folder / f"{n}.mp4"
        with av.open(str(file), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width = stream.height = 16
            stream.pix_fmt = "yuv420p"
            for _ in range(3):
                picture = numpy.full((16, 16, 3), STEP * n, numpy.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode())
        (folder / "good").mkdir(exist_ok=True)
        (folder / "good" / file.name).write_bytes(file.read_bytes())
        if n % 3 == 2:
            data = file.read_bytes()
            damages = [lambda d: b"", lambda d: b"junk" * 50, lambda d: d[: len(d) // 2]]
            file.write_bytes(damages[n // 3 % 3](data)) if n != 5 else file.unlink()
    return folder


def rows_of(folder, kind="video"):
    return [Row(str(folder / f"{n}.mp4"), kind=kind, captions=[f"clip {n}"]) for n in range(FILES)]


def clips_of(folder, train=True, **options):
    return Clips(rows_of(folder), frames=2, size=8, train=train, **options)


def told(batch):
    """The content of a batch, to compare two runs."""
    return batch.index.tolist(), batch.text, batch.video.sum().item(), batch.video.shape


def take(loader, count):
    batches = iter(loader)
    return [told(next(batches)) for _ in range(count)]


def keys(sampler, count):
    batches = iter(sampler)
    return [[(key.epoch, key.index) for key in next(batches)] for _ in range(count)]


def test_an_epoch_has_every_row_once():
    sampler = EpochSampler([False] * 12, 4, seed=1)
    assert sampler.steps_per_epoch == 3
    batches = keys(sampler, 6)
    for epoch in range(2):
        drawn = [key for batch in batches[3 * epoch : 3 * epoch + 3] for key in batch]
        assert sorted(drawn) == [(epoch, row) for row in range(12)]
    assert [row for _, row in sum(batches[:3], [])] != [row for _, row in sum(batches[3:], [])]


def test_ranks_share_a_batch():
    whole = keys(EpochSampler([False] * 24, 8), 6)
    halves = [keys(EpochSampler([False] * 24, 4, rank=rank, world_size=2), 6) for rank in (0, 1)]
    for both, *parts in zip(whole, *halves, strict=True):
        assert sorted(both) == sorted(sum(parts, []))


def test_all_ranks_have_the_same_kind_at_a_step():
    images = [n % 3 == 0 for n in range(60)]  # 20 images, 40 videos
    ranks = [EpochSampler(images, 4, rank=rank, world_size=2) for rank in (0, 1)]
    assert ranks[0].steps_per_epoch == 2 + 5
    kinds = [
        [{images[row] for _, row in batch} for batch in keys(sampler, 14)] for sampler in ranks
    ]
    assert kinds[0] == kinds[1] and all(len(kind) == 1 for kind in kinds[0])
    assert kinds[0][:7].count({True}) == kinds[0][7:].count({True}) == 2
    assert kinds[0][:7] != kinds[0][7:]  # another order in another epoch


def test_a_sampler_resumes_at_any_step():
    images = [n % 4 == 0 for n in range(40)]
    whole = keys(EpochSampler(images, 3, seed=5), 30)
    for step in (0, 1, 7, 11, 12, 25):
        sampler = EpochSampler(images, 3, seed=5)
        sampler.load_state_dict(sampler.state_dict(step))
        assert keys(sampler, 30 - step) == whole[step:]
    state = EpochSampler(images, 3, seed=5).state_dict(4)
    assert all(isinstance(value, int) for value in state.values())
    with pytest.raises(ValueError, match="need the same data, seed and global batch"):
        EpochSampler(images, 3, seed=6).load_state_dict(state)


def test_too_few_rows():
    with pytest.raises(ValueError, match="need 8 on each of 2 ranks for one batch, got 12 rows"):
        EpochSampler([False] * 12, 8, world_size=2)
    with pytest.raises(ValueError, match="got 3 rows of one kind"):
        EpochSampler([False] * 12 + [True] * 3, 4)
    with pytest.raises(ValueError, match="at least one row"):
        EpochSampler([], 4)
    with pytest.raises(ValueError, match="rank=2, world_size=2"):
        EpochSampler([False] * 12, 4, rank=2, world_size=2)


def test_evaluation_has_each_row_once():
    images = [False] * 7 + [True] * 4
    ranks = [InOrder(images, 3, rank=rank, world_size=2) for rank in (0, 1)]
    seen = [key.index for sampler in ranks for batch in sampler for key in batch]
    assert sorted(seen) == list(range(11))
    assert [[key.index for key in batch] for batch in ranks[0]] == [[0, 2, 4], [6], [7, 9]]


def test_a_batch(folder):
    batch = clips_of(folder / "good")[Key(0, 4)]
    assert batch.video.shape == (1, 3, 2, 8, 8) and batch.video.dtype == torch.uint8
    assert batch.text == ["clip 4"] and batch.index.tolist() == [4] and not batch.broken
    assert numbers(batch.video[:, :, 0].movedim(1, -1)) == [4]
    moved = batch.to("cpu")
    assert told(moved) == told(batch) and len(batch) == 1


def test_training_differs_by_epoch_and_evaluation_does_not():
    rows = [Row(str(EXAMPLES / "worker.mp4"), captions=["a", "b", "c"])]
    train = Clips(rows, frames=2, size=32, train=True)
    told_by_epoch = [told(train[Key(epoch, 0)]) for epoch in range(6)]
    assert told_by_epoch == [told(train[Key(epoch, 0)]) for epoch in range(6)]
    assert len({str(told) for told in told_by_epoch}) == 6
    assert len({told[1][0] for told in told_by_epoch}) > 1  # captions too
    test = Clips(rows, frames=2, size=32, train=False)
    assert told(test[Key(0, 0)]) == told(test[Key(5, 0)]) and test[Key(5, 0)].text == ["a"]


def test_clips_whose_text_says_left_or_right_are_not_flipped():
    file = EXAMPLES / "worker.mp4"
    for text, flips in [("walks to the left", False), ("left-handed", False), ("walks away", True)]:
        plain = Clips([Row(str(file), captions=[text])], frames=1, size=32, train=True, flip=False)
        clips = Clips([Row(str(file), captions=[text])], frames=1, size=32, train=True)
        pairs = [(plain[Key(e, 0)].video, clips[Key(e, 0)].video) for e in range(12)]
        assert any(not torch.equal(a, b) for a, b in pairs) == flips
        assert all(torch.equal(a, b) or torch.equal(a.flip(-1), b) for a, b in pairs)


def test_questions_and_images(folder, tmp_path):
    still = tmp_path / "still.png"
    av.VideoFrame.from_ndarray(numpy.full((9, 9, 3), 80, numpy.uint8)).save(str(still))
    rows = [
        Row(str(still), kind="image", captions=["grey"]),
        Row(str(folder / "good/3.mp4"), question="how bright?", answer="dark"),
        Row(str(folder / "good/4.mp4"), options=["dark", "bright"], correct=0),
    ]
    clips = Clips(rows, frames=2, size=8, train=False)
    assert clips[Key(0, 0)].video.shape == (1, 3, 1, 8, 8)  # an image has one frame
    asked = clips.__getitems__([Key(0, 1), Key(0, 2)])
    assert asked.text == ["how bright?", ""]
    assert asked.rows[0].answer == "dark" and asked.rows[1].options == ("dark", "bright")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(folder, workers):
    """Resumption in the middle of an epoch with another number of workers."""
    whole = take(Loader(loaded(folder), EpochSampler([False] * FILES, 6), limit=1), 8)
    first = Loader(loaded(folder), EpochSampler([False] * FILES, 6), workers=workers, limit=1)
    batches = iter(first)
    begun = [told(next(batches)) for _ in range(4)]
    state = json.loads(json.dumps(first.state_dict()))  # as in a checkpoint
    assert state["step"] == 4  # although workers have prefetched more
    second = Loader(loaded(folder), EpochSampler([False] * FILES, 6), workers=2, limit=1)
    second.load_state_dict(state)
    assert begun + take(second, 4) == whole
    assert second.seen >= 8 * 6 and second.broken_count >= first.broken_count


def loaded(folder):
    return clips_of(folder, seed=3)


def test_two_ranks_have_the_rows_of_one(folder):
    def pairs(batch):
        return sorted(zip(batch.text, batch.video.flatten(1).sum(1).tolist(), strict=True))

    def run(rank, world_size):
        sampler = EpochSampler([False] * FILES, 6 // world_size, rank=rank, world_size=world_size)
        loader = Loader(clips_of(folder / "good", seed=3), sampler)
        batches = iter(loader)
        return [next(batches) for _ in range(4)]

    for both, left, right in zip(run(0, 1), run(0, 2), run(1, 2), strict=True):
        assert pairs(both) == sorted(pairs(left) + pairs(right))


def test_broken_clips_are_dropped_with_their_captions(folder):
    """Six of twenty are broken in four ways; captions still match the brightness of clips."""
    loader = Loader(clips_of(folder), EpochSampler([False] * FILES, 6), workers=1, limit=0.5)
    batches, seen = iter(loader), collections.Counter()
    for _ in range(9):
        batch = next(batches)
        indices = [int(text.split()[1]) for text in batch.text]
        assert indices == numbers(batch.video[:, :, 0].movedim(1, -1)) == batch.index.tolist()
        assert len(set(indices)) == 6  # no clip twice in a batch
        seen.update(indices)
    broken = {n for n in range(FILES) if n % 3 == 2}
    assert set(seen) == set(range(FILES)) - broken
    assert set(loader.broken) <= {str(folder / f"{n}.mp4") for n in broken}
    lines = loader.report().splitlines()
    assert lines[0].startswith(f"{loader.broken_count} of {loader.seen} times")
    assert lines[1:] == [f"  {name}: {why}" for name, why in loader.broken.items()]
    assert f"  {folder / '5.mp4'}: No such file or directory" in lines


def test_evaluation_counts_broken_clips_without_replacement(folder):
    clips = clips_of(folder, train=False)
    loader = Loader(clips, InOrder(clips.images(), 4), limit=1)
    for _ in range(2):  # twice over the same loader
        batches = list(loader)
        indices = [index for batch in batches for index in batch.index.tolist()]
        assert indices == [n for n in range(FILES) if n % 3 != 2]
    assert loader.broken_count == 12 and len(loader.broken) == 6 and loader.seen == 40
    with pytest.raises(BrokenClip, match="2.mp4"):
        list(Loader(clips_of(folder, train=False, if_broken="raise"), InOrder(clips.images(), 4)))
    nothing = Clips([Row("no.mp4", captions=["a"])], frames=2, size=8, train=False)
    assert len(nothing[Key(0, 0)]) == 0 and nothing[Key(0, 0)].video.shape[0] == 0


def test_too_many_broken_clips_stop_the_run(folder):
    loader = Loader(clips_of(folder), EpochSampler([False] * FILES, 6), limit=0.1)
    with pytest.raises(TooManyBroken, match=r"clips, more than 10%, cannot be read\n") as caught:
        take(loader, 100)
    assert str(folder / "2.mp4") in str(caught.value)
    assert loader.broken_count > 10 and loader.step < 10
    with pytest.raises(TooManyBroken, match="more than 0%"):
        take(Loader(clips_of(folder), EpochSampler([False] * FILES, 6), limit=0), 100)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_folder_is_an_error(tmp_path, workers):
    rows = [Row(str(tmp_path / f"{n}.mp4"), captions=["a"]) for n in range(100)]
    clips = Clips(rows, frames=2, size=8, train=True)
    loader = Loader(clips, EpochSampler([False] * 100, 4), workers=workers, limit=1)
    with pytest.raises(TooManyBroken, match="20 clips in a row cannot be read; the last is"):
        next(iter(loader))


def test_workers_use_one_thread_and_end(folder):
    class Threads(MovingShapes):
        def images(self):
            return numpy.zeros(8, bool)

        def read(self, key):
            sample = super().read(key)
            return type(sample)(sample.pictures, torch.get_num_threads(), sample.row, sample.text)

    loader = Loader(Threads("train", 8, size=16), EpochSampler([False] * 8, 4), workers=2)
    before = torch.get_rng_state()
    batches = iter(loader)
    assert next(batches).index.tolist() == [1] * 4
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used
    processes = loader._loader._iterator._workers
    assert len(processes) == 2 and loader.wait_seconds > 0
    batches.close()
    del loader, batches
    assert all(not process.is_alive() for process in processes)


def test_real_clips_in_workers(tmp_path, monkeypatch):
    annotations = pytest.importorskip("vidl.data.annotations")
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path))
    rows = annotations.load(EXAMPLES.parent / "clips.json")
    captions = {caption for row in rows for caption in row.captions}
    clips = Clips(rows, frames=2, size=32, train=True)
    batches = [
        told(next(iter(Loader(clips, EpochSampler(clips.images(), 6), workers=workers))))
        for workers in (0, 2)
    ]
    assert batches[0] == batches[1] and set(batches[0][1]) <= captions


def test_samplers_and_data_sets_that_do_not_fit(folder):
    with pytest.raises(ValueError, match="need a sampler with a ClipSet"):
        Loader(clips_of(folder))
    with pytest.raises(ValueError, match="need if_broken among replace, count, raise, got 'skip'"):
        clips_of(folder, if_broken="skip")


def test_tokens(tmp_path):
    captions = ["a red circle moves left", "a blue square moves right"]
    tokenizer = train_tokenizer(captions * 3, size=200)
    ids, mask = tokenizer(["A red square", "a circle moves left and right and left"], 7)
    assert ids.shape == mask.shape == (2, 7) and ids.dtype == torch.int64
    assert ids[0].tolist()[0] == tokenizer.cls_id and ids[0].tolist()[4] == tokenizer.sep_id
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    assert ids[0, 5:].tolist() == [tokenizer.pad_id] * 2
    assert ids[1, -1] == tokenizer.sep_id  # truncated, but with [SEP] at the end
    assert tokenizer.decode(ids[0].tolist()) == "a red square"
    assert tokenizer.tokens()[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(tokenizer) == len(tokenizer.tokens())
    assert "moves" in tokenizer.tokens() and "##s" in tokenizer.tokens()
    assert tokenizer.unk_id not in tokenizer(["scarlet"], 9)[0]  # composed of characters
    assert tokenizer.unk_id in tokenizer(["zebra"], 9)[0]
    again = train_tokenizer(captions * 3, size=200)
    assert again.tokens() == tokenizer.tokens()
    with pytest.raises(ValueError, match="need size >= .* got 10"):
        train_tokenizer(captions, size=10)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert torch.equal(load_tokenizer(path)(["A red square"], 7)[0], ids[:1])
    with pytest.raises(ValueError, match="need words >= 3 .*, got 2"):
        tokenizer(["a"], 2)


def test_a_vocabulary_of_bert(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    texts = ["Playing a dog", "a [MASK] ing"]
    want = theirs(texts, padding="max_length", max_length=8, return_tensors="pt")
    ids, mask = load_tokenizer(tmp_path)(texts, 8)
    assert torch.equal(ids, want["input_ids"]) and torch.equal(mask, want["attention_mask"])
    theirs.save_pretrained(tmp_path / "hf")
    assert torch.equal(load_tokenizer(tmp_path / "hf")(texts, 8)[0], ids)

    (tmp_path / "vocab.txt").write_text("[UNK]\na\n")
    with pytest.raises(ValueError, match=r"without \[PAD\], \[CLS\], \[SEP\], \[MASK\]"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="need tokenizer.json or vocab.txt, or a folder"):
        load_tokenizer(tmp_path / "nothing")


CASED = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Paris", "A", "a", "caf", "##é", "##e", "人"]


@pytest.mark.parametrize(
    "config",
    [
        {"do_lower_case": False},
        {"do_lower_case": True},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "tokenize_chinese_chars": False},
    ],
)
def test_options_of_a_vocabulary(tmp_path, config, recwarn):
    """They are read from tokenizer_config.json, as in transformers."""
    (tmp_path / "vocab.txt").write_text("\n".join(CASED) + "\n")
    config = config | {"tokenizer_class": "BertTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids, mask = load_tokenizer(tmp_path)(["A Paris café, a人"], 12)
    assert not [warning for warning in recwarn if "lower-cased" in str(warning.message)]
    assert torch.equal(load_tokenizer(tmp_path / "vocab.txt")(["A Paris café, a人"], 12)[0], ids)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(["A Paris café, a人"])["input_ids"][0] == ids[0, : int(mask.sum())].tolist()


def test_a_cased_vocabulary_without_options_warns(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(CASED) + "\n")
    with pytest.warns(UserWarning, match="2 words such as 'Paris' have capitals: need do_lower_c"):
        load_tokenizer(tmp_path)
    for config, message in (
        ("{", "tokenizer_config.json: not JSON"),
        ("[]", r"tokenizer_config.json: need an object, got \[\]"),
        ('{"do_lower_case": "no"}', "need do_lower_case as true or false, got 'no'"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)


def test_batches_have_tokens(folder):
    tokenizer = train_tokenizer([f"clip {n}" for n in range(FILES)])
    clips = clips_of(folder / "good", tokenizer=tokenizer, words=5)
    batch = next(iter(Loader(clips, EpochSampler([False] * FILES, 4), workers=1)))
    assert [tokenizer.decode(ids.tolist()) for ids in batch.ids] == batch.text
    assert batch.attention_mask.sum(1).tolist() == [4] * 4


@pytest.fixture(scope="module")
def shards(folder):
    """Five shards of four clips; two clips are broken."""
    pytest.importorskip("webdataset")
    files = []
    for number in range(5):
        files.append(str(folder / f"{number:05}.tar"))
        with tarfile.open(files[-1], "w") as tar:
            for n in range(4 * number, 4 * number + 4):
                data = (folder / "good" / f"{n}.mp4").read_bytes()
                caption = json.dumps({"caption": f"clip {n}"}) if n % 2 else f"clip {n}"
                parts = {"mp4": data if n not in (5, 14) else b"junk"}
                parts["json" if n % 2 else "txt"] = caption.encode()
                for suffix, content in parts.items():
                    entry = tarfile.TarInfo(f"{n:04}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return files


def stream_of(shards, **options):
    clips = Clips([], frames=2, size=8, train=True, seed=4)
    return ShardStream(shards, clips, 3, buffer=5, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards(shards, workers):
    loader = Loader(stream_of(shards), workers=workers, limit=1)
    batches, seen = iter(loader), collections.Counter()
    for _ in range(12):
        batch = next(batches)
        indices = [int(text.split()[1]) for text in batch.text]
        assert indices == numbers(batch.video[:, :, 0].movedim(1, -1)) and len(indices) == 3
        seen.update(indices)
    assert set(seen) == set(range(FILES)) - {5, 14}
    assert {name[-4:] for name in loader.broken} == {"0005", "0014"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 4, 9])
def test_shards_resume(shards, workers, step):
    whole = take(Loader(stream_of(shards), workers=workers, limit=1), 12)
    first = Loader(stream_of(shards), workers=workers, limit=1)
    begun = take(first, step)
    state = json.loads(json.dumps(first.state_dict()))
    second = Loader(stream_of(shards), workers=workers, limit=1)
    second.load_state_dict(state)
    assert begun + take(second, 12 - step) == whole


def test_ranks_share_the_shards(shards):
    seen = []
    for rank in (0, 1):
        stream = stream_of(shards, rank=rank, world_size=2)
        stream.begin(0, 1)
        seen.append({read.raw["__key__"] for read in stream._epoch(0, 0, [], None)})
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == FILES


def test_shard_errors(shards, tmp_path):
    with pytest.raises(ValueError, match="need at least 6 shards, one per worker and rank"):
        next(iter(Loader(stream_of(shards, world_size=3), workers=2)))
    loader = Loader(stream_of(shards), limit=1)
    take(loader, 1)
    other = Loader(stream_of(shards), workers=2, limit=1)
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="need 1 workers, as before, got 2"):
        next(iter(other))
    with pytest.raises(TooManyBroken, match="need one of jpg"):
        take(Loader(stream_of(shards, kind="image"), limit=1), 1)
    with pytest.raises(TooManyBroken, match="no sample from its shards.*no.tar"):
        take(Loader(stream_of([str(tmp_path / "no.tar")]), limit=1), 1)


def test_globs_of_shards(shards):
    folder = Path(shards[0]).parent
    assert stream_of([str(folder / "*.tar")]).files == sorted(map(str, shards))
    with pytest.raises(ValueError, match=r"need files that match .*\*.tgz, got none"):
        stream_of([str(folder / "*.tgz")])
    url = "https://example.org/*.tar"  # a glob has no meaning there
    assert stream_of([url]).files == [url]


def write_shard(file, samples):
    """Write samples, each a dict of suffix and content."""
    with tarfile.open(file, "w") as tar:
        for key, parts in samples.items():
            for suffix, content in parts.items():
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return str(file)


@pytest.mark.parametrize(
    "parts, wanted",
    [
        ({"json": {"caption": "a dog"}, "txt": "of the txt"}, "a dog"),
        ({"json": {"caption": ["a dog"]}}, "a dog"),
        ({"json": {"caption": "dog \ud83d"}}, "dog \ufffd"),
        ({"json": {"caption": "dog \ud83d\ude00"}}, "dog \U0001f600"),
        ({"json": {"url": "x"}, "txt": "of the txt"}, "of the txt"),
        ({"json": {"caption": None}, "txt": "of the txt"}, "of the txt"),
        ({"json": {"caption": " "}, "txt": "of the txt"}, "of the txt"),
        ({"json": ["x"], "txt": "of the txt"}, "of the txt"),
        ({"json": "[" * 100_000, "txt": "of the txt"}, "of the txt"),
        ({"txt": "\ufeffof the txt"}, "of the txt"),
        ({"json": {"caption": None}}, None),
        ({"json": {"caption": 7}}, None),
        ({"json": {"caption": {"en": "a dog"}}}, None),
        ({"json": {"caption": []}}, None),
        ({"json": {"caption": [None]}}, None),
        ({"json": {"caption": ["a", ""]}}, None),
        ({"json": {"caption": ""}}, None),
        ({"json": ["x"]}, None),
        ({"json": "{"}, None),
        ({"txt": " \n"}, None),
        ({"txt": b"\xff\xfe"}, None),
        ({}, None),
    ],
)
def test_captions_of_shards(parts, wanted):
    raw = {}
    for suffix, content in parts.items():
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        raw[suffix] = text if isinstance(text, bytes) else text.encode()
    if wanted is None:
        with pytest.raises(BrokenClip, match="s.tar/5: no caption: "):
            shard_files.captions_of(raw, "s.tar/5")
    else:
        assert shard_files.captions_of(raw, "s.tar/5") == [wanted]


def test_a_sample_without_a_caption_is_broken(folder, tmp_path):
    """It neither ends the run nor is it trained with the keys of its caption."""
    pytest.importorskip("webdataset")
    mp4 = (folder / "good" / "1.mp4").read_bytes()
    samples = {f"{n:03}": {"mp4": mp4, "txt": b"a circle"} for n in range(8)}
    samples["003"] = {"mp4": mp4, "json": json.dumps({"caption": {"en": "a dog"}}).encode()}
    file = write_shard(tmp_path / "s.tar", samples)
    loader = Loader(stream_of([file]), limit=1)
    for _, batch in zip(range(6), loader, strict=False):
        assert batch.text == ["a circle"] * 3
    assert list(loader.broken) == [f"{file}/003"]


@pytest.mark.parametrize("place, lost", [("in data", ["004"]), ("at a header", [])])
def test_a_cut_shard_names_its_lost_samples(folder, tmp_path, place, lost):
    pytest.importorskip("webdataset")
    mp4 = (folder / "good" / "1.mp4").read_bytes()
    samples = {f"{n:03}": {"mp4": mp4, "txt": b"a circle"} for n in range(8)}
    file = write_shard(tmp_path / "s.tar", samples)
    with tarfile.open(file) as tar:
        member = tar.getmember("004.mp4")
        at = member.offset if place == "at a header" else member.offset_data + 100
    with open(file, "r+b") as cut:
        cut.truncate(at)
    whole = write_shard(tmp_path / "t.tar", samples)
    broken: list = []
    read = [sample["__key__"] for sample in shard_files._samples(file, broken)]
    assert read == ["000", "001", "002", "003"]
    assert [name for name, _ in broken] == [file, *(f"{file}/{key}" for key in lost)]
    assert "unexpected end" in broken[0][1] or "no end marker" in broken[0][1]
    assert len(list(shard_files._samples(whole, whole_broken := []))) == 8 and not whole_broken


def test_other_shards_cannot_resume(shards, tmp_path):
    """More, fewer, other or larger shards would skip and repeat clips."""
    first = Loader(stream_of(shards[:2]), limit=1)
    whole = take(Loader(stream_of(shards[:2]), limit=1), 4)
    take(first, 2)
    state = json.loads(json.dumps(first.state_dict()))
    for changed in (shards[:3], shards[:1], [shards[0], shards[2]]):
        with pytest.raises(ValueError, match="need the 2 shards of the interrupted run"):
            Loader(stream_of(changed), limit=1).load_state_dict(state)
    copies = [shutil.copy(file, tmp_path) for file in shards[:2]]
    moved = Loader(stream_of(copies), limit=1)
    moved.load_state_dict(state)
    assert take(moved, 2) == whole[2:]
    with open(copies[1], "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match="need the 2 shards of the interrupted run"):
        Loader(stream_of(copies), limit=1).load_state_dict(state)


SIGNALLED = """
import multiprocessing, subprocess, sys
from vidl.data.loader import Loader
from vidl.data.moving_shapes import MovingShapes
from vidl.data.sampler import EpochSampler

clips = MovingShapes("train", 64, frames=1, size=16)
loader = Loader(clips, EpochSampler(clips.kinds(), batch_size=2), workers=2)
batches = iter(loader)
for _ in range(2):  # one of each worker, so that both have begun
    next(batches)
workers = [str(process.pid) for process in multiprocessing.active_children()]
for name in ("-INT", "-TERM"):
    subprocess.run(["kill", name, *workers], check=True)
for _ in range(6):  # more than were read in advance
    next(batches)
print(len(workers), "workers")
"""


def test_workers_end_with_their_parent_only():
    """A scheduler signals all processes of a run, which still finishes its step."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and done.stdout == "2 workers\n", done.stderr
