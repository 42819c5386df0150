"""Clips in tables that Hugging Face datasets streams."""

import collections
import json
import sys

import pytest

pytest.importorskip("av")
pytest.importorskip("datasets")

import datasets  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from test_data_loader import FILES, folder, numbers, take  # noqa: E402, F401
from test_training import EXAMPLES, MAC, records, same_weights, train  # noqa: E402

from vidl import cli  # noqa: E402
from vidl.data.dataset import Clips, TooManyBroken  # noqa: E402
from vidl.data.loader import Loader  # noqa: E402
from vidl.data.tables import TableStream  # noqa: E402
from vidl.data.text import train_tokenizer  # noqa: E402

BROKEN = {5, 14}


@pytest.fixture(autouse=True)
def _awake(monkeypatch):
    """datasets sleeps for 5 s after its threads have read the last row of Parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)


@pytest.fixture(scope="module")
def good(folder):  # noqa: F811
    """The clips, of which two are broken."""
    for n in BROKEN:
        (folder / "good" / f"{n}.mp4").write_bytes(b"junk %d" % n)
    return folder / "good"


def written(good, form, to, files=4):
    """Tables of the same clips in several forms."""
    to.mkdir()
    names = []
    for number in range(files):
        rows = list(range(FILES))[number::files]
        content = [(good / f"{n}.mp4").read_bytes() for n in rows]
        texts = [f"clip {n}" for n in rows]
        names.append(str(to / f"{number}.{form.partition(' ')[2] or form}"))
        if form == "features parquet":
            clips = [{"path": f"{n}.mp4", "bytes": x} for n, x in zip(rows, content, strict=True)]
            kinds = {"video": datasets.Video(decode=False), "text": datasets.Value("string")}
            table = datasets.Dataset.from_dict({"video": clips, "text": texts})
            table.cast(datasets.Features(kinds)).to_parquet(names[-1])
        elif form == "bytes parquet":
            captions = [[text] for text in texts]
            pq.write_table(pa.table({"video": content, "caption": captions}), names[-1])
        else:
            files_of = [str(good / f"{n}.mp4") for n in rows]
            table = datasets.Dataset.from_dict({"file_name": files_of, "text": texts})
            if form == "csv":
                table.to_csv(names[-1])
            else:
                table.to_json(names[-1])
    return names


def stream_of(tables, **options):
    clips = Clips([], frames=2, size=8, train=True, seed=4)
    return TableStream(tables, clips, 3, buffer=5, **options)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "form",
    ["features parquet", *(pytest.param(x, marks=SLOW) for x in ("bytes parquet", "jsonl", "csv"))],
)
def test_clips_keep_their_captions(good, form, tmp_path):
    tables = written(good, form, tmp_path / "tables")
    loader = Loader(stream_of(tables, outside=True), workers=2, limit=1)
    batches, seen = iter(loader), collections.Counter()
    for _ in range(12):
        batch = next(batches)
        indices = [int(text.split()[1]) for text in batch.text]
        assert indices == numbers(batch.video[:, :, 0].movedim(1, -1)) and len(indices) == 3
        seen.update(indices)
    assert set(seen) == set(range(FILES)) - BROKEN
    assert len(loader.broken) == 2


@pytest.mark.parametrize(
    "files, workers",  # files are a multiple of the workers, or not
    [(3, 2), *(pytest.param(*x, marks=SLOW) for x in ((4, 2), (4, 0), (3, 0)))],
)
def test_a_resumed_stream_equals_an_uninterrupted_one(good, files, workers, tmp_path):
    tables = written(good, "bytes parquet", tmp_path / "tables", files)
    whole = take(Loader(stream_of(tables), workers=workers, limit=1), 12)
    assert len({str(batch) for batch in whole}) == 12  # epochs differ
    for step in (1, 9):
        first = Loader(stream_of(tables), workers=workers, limit=1)
        begun = take(first, step)
        second = Loader(stream_of(tables), workers=workers, limit=1)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + take(second, 12 - step) == whole


@pytest.mark.parametrize("files", [4, 3])
def test_ranks_and_workers_share_the_rows(good, files, tmp_path):
    tables = written(good, "jsonl", tmp_path / "tables", files)
    seen = []
    for rank in (0, 1):
        stream = stream_of(tables, rank=rank, world_size=2)
        stream.begin(0, 2)
        seen += [[raw["text"] for raw in stream._epoch(3, worker, [])] for worker in (0, 1)]
    assert sorted(sum(seen, [])) == sorted(f"clip {n}" for n in range(FILES))
    assert all(seen)


def test_errors(good, tmp_path):
    tables = written(good, "jsonl", tmp_path / "tables")
    with pytest.raises(ValueError, match=r"need tables \(data.files\) as local files, got none"):
        stream_of([])
    with pytest.raises(ValueError, match=r"as local files, got hf://datasets/a/b.parquet"):
        stream_of(["hf://datasets/a/b.parquet"])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"of one format among .*, got .jsonl, .txt"):
        stream_of([*tables, str(tmp_path / "a.txt")])
    (tmp_path / "a.jsonl").write_text('{"video": "a.mp4", "label": 3}\n')
    with pytest.raises(ValueError, match="and caption or text, in .*a.jsonl, got video, label"):
        stream_of([str(tmp_path / "a.jsonl")])
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"junk" * 9)
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            stream_of([str(tmp_path / name)])
    with pytest.raises(ValueError, match=r"below the folder of the media.*data.outside=true"):
        take(Loader(stream_of(tables), limit=1), 1)
    (tmp_path / "u.jsonl").write_text('{"video": "http://host/a.mp4", "text": "a"}\n')
    with pytest.raises(ValueError, match="vidl opens no URLs"):
        take(Loader(stream_of([str(tmp_path / "u.jsonl")], outside=True), limit=1), 1)
    pair = {"video": "a.mp4", "second": "/etc/hostname", "label": True, "text": "a"}
    (tmp_path / "p.jsonl").write_text(json.dumps(pair) + "\n")
    with pytest.raises(ValueError, match="need rows of one clip in tables, got one with second"):
        take(Loader(stream_of([str(tmp_path / "p.jsonl")]), limit=1), 1)
    rows = [{"path": "a.mp4", "text": "a"}, {"path": "a.png", "text": "a"}, {"path": "a.mp4"}]
    (tmp_path / "k.jsonl").write_text("\n".join(map(json.dumps, rows * 20)))
    with pytest.raises(TooManyBroken) as raised:
        take(Loader(stream_of([str(tmp_path / "k.jsonl")]), limit=1), 1)
    assert "clips cannot be read" in str(raised.value)


def test_a_run_resumes_in_its_tables(tmp_path):
    rows = json.loads((EXAMPLES / "clips.json").read_text())[:8]
    tables = [tmp_path / f"{number}.jsonl" for number in range(2)]
    for number, table in enumerate(tables):
        table.write_text("\n".join(map(json.dumps, rows[number::2])))
    train_tokenizer(text for row in rows for text in row["caption"]).save(tmp_path / "t.json")
    options = [*MAC, "data.source=datasets", f"data.files=['{tmp_path}/*.jsonl']"]
    options += [f"data.media={EXAMPLES / 'clips'}", "data.batch_size=3", "run.save_every=2"]
    options += ["evaluation.every=5", "schedule.steps=6"]
    with pytest.raises(ValueError, match=r"need data.tokenizer with data.source 'datasets'"):
        train(tmp_path / "none", options)
    options += [f"data.tokenizer={tmp_path / 't.json'}"]

    def broken(training):
        raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="gone"):
        train(tmp_path / "broken", options, evaluate=broken)
    for name in ("broken", "whole"):
        train(tmp_path / name, options, evaluate=lambda training: {})
    losses = [
        [r["loss"] for r in records(tmp_path / x) if "loss" in r] for x in ("broken", "whole")
    ]
    assert losses[0] == losses[1] and len(losses[1]) == 6
    assert same_weights(tmp_path / "broken", tmp_path / "whole")


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.jsonl").write_text('{"video": "a.mp4", "text": "a"}\n')
    train_tokenizer(["a"]).save(tmp_path / "t.json")
    options = [*MAC, "data.source=datasets", f"data.files={tmp_path / 'a.jsonl'}"]
    options += [f"data.tokenizer={tmp_path / 't.json'}", f"run.folder={tmp_path / 'run'}"]
    assert cli.main(["pretrain", *options]) == 1
    assert 'needs datasets (extra "datasets"): pip install' in capsys.readouterr().err
