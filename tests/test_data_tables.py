"""Clips in tables that Hugging Face datasets streams."""

import collections
import io
import json
import shutil
import sys
import tarfile

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


def write_shard(name, rows, content):
    """A tar file whose samples do not all have the same facts."""
    with tarfile.open(name, "w") as tar:
        for n, clip in zip(rows, content, strict=True):
            facts = {"caption": [f"clip {n}"] * (1 + n % 2)} | ({"id": n} if n > 6 else {})
            for suffix, data in (("mp4", clip), ("json", json.dumps(facts).encode())):
                member = tarfile.TarInfo(f"{n:05}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def written(good, form, to, files=4):
    """Tables of the same clips in several forms."""
    to.mkdir()
    if form.startswith("folder"):
        (to / "train").mkdir()
        for n in range(FILES):
            shutil.copy(good / f"{n}.mp4", to / "train")
        rows = [{"file_name": f"{n}.mp4", "text": f"clip {n}"} for n in range(FILES)]
        (to / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return [str(to)]
    names = []
    for number in range(files):
        rows = list(range(FILES))[number::files]
        content = [(good / f"{n}.mp4").read_bytes() for n in rows]
        texts = [f"clip {n}" for n in rows]
        names.append(str(to / f"{number}.{form.partition(' ')[2] or form}"))
        if form == "tar":
            write_shard(names[-1], rows, content)
        elif form == "features parquet":
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
    [
        "features parquet",
        "tar",
        "folder",
        *(pytest.param(x, marks=SLOW) for x in ("bytes parquet", "jsonl", "csv")),
    ],
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


FORMS = ["bytes parquet", "jsonl", "tar", "folder"]


@pytest.mark.parametrize(
    "form, files, workers",  # files are a multiple of the workers, or not
    [
        ("bytes parquet", 3, 2),
        ("tar", 4, 2),
        ("folder", 1, 0),
        *(pytest.param(form, n, w, marks=SLOW) for form in FORMS for n in (4, 3) for w in (2, 0)),
    ],
)
def test_a_resumed_stream_equals_an_uninterrupted_one(good, form, files, workers, tmp_path):
    tables = written(good, form, tmp_path / "tables", files)
    options = dict(outside=True) if form == "jsonl" else {}

    def loader():
        return Loader(stream_of(tables, **options), workers=workers, limit=1)

    whole = take(loader(), 12)
    assert whole[:6] != whole[6:]  # epochs differ
    for step in (1, 5, 9):
        first = loader()
        begun = take(first, step)
        second = loader()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + take(second, 12 - step) == whole


def test_a_resumed_stream_reads_on_at_its_block(good, tmp_path, monkeypatch):
    tables = written(good, "jsonl", tmp_path / "tables", 2)
    loader = Loader(stream_of(tables, outside=True), limit=1)
    batches = take(loader, 5)
    state = loader.state_dict()
    ((_, epoch, drawn, (begin, _, position)),) = state["stream"]["places"]
    assert epoch == 0 and 5 < begin <= drawn and position is not None
    count = 0
    reads = TableStream._reads

    def counted(self, table, position, rows=1):
        nonlocal count
        for read in reads(self, table, position, rows):
            count += len(read[1])
            yield read

    monkeypatch.setattr(TableStream, "_reads", counted)
    resumed = Loader(stream_of(tables, outside=True), limit=1)
    resumed.load_state_dict(state)
    after = take(resumed, 1)
    assert count <= 1 + 2 * 5 and after[0] not in batches  # of 24 rows


def test_a_position_that_gives_other_rows_is_found(good, tmp_path):
    """Releases of datasets may count differently; then the epoch is read from its beginning."""
    tables = written(good, "jsonl", tmp_path / "tables", 2)
    whole = take(Loader(stream_of(tables, outside=True), limit=1), 7)
    loader = Loader(stream_of(tables, outside=True), limit=1)
    take(loader, 4)
    state = json.loads(json.dumps(loader.state_dict()))
    mark = state["stream"]["places"][0][3]
    begin, digest, position = mark
    assert begin > 0
    mark[2] = None  # the first row of the epoch, which is another one
    resumed = Loader(stream_of(tables, outside=True), limit=1)
    resumed.load_state_dict(state)
    assert take(resumed, 3) == whole[4:]
    before = {**state, "stream": state["stream"] | {"places": [[0, 0, 12]]}}
    with pytest.raises(
        ValueError, match="got one of an earlier version, which shuffled in another"
    ):
        Loader(stream_of(tables, outside=True), limit=1).load_state_dict(before)
    mark[:] = [begin, digest + 1, position]
    resumed = Loader(stream_of(tables, outside=True), limit=1)
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="need the rows of the interrupted run .* same release"):
        take(resumed, 1)


@pytest.mark.parametrize("form, files", [("jsonl", 4), ("jsonl", 3), ("tar", 2), ("folder", 1)])
@pytest.mark.parametrize("buffer", [1, 4, 100])
def test_ranks_and_workers_share_the_rows(good, form, files, buffer, tmp_path):
    tables = written(good, form, tmp_path / "tables", files)
    for epoch in (0, 3):
        seen = []
        for rank in (0, 1):
            clips = Clips([], frames=2, size=8, train=True, seed=4)
            stream = TableStream(tables, clips, 3, buffer=buffer, rank=rank, world_size=2)
            stream.begin(0, 2)
            for worker in (0, 1):
                rows = list(stream._epoch(epoch, worker, [], None))
                assert [row.number for row in rows] == list(range(len(rows)))
                entries = [stream._entry(row.raw) for row in rows]
                seen.append([(x.get("text") or x["caption"][0]) for x in entries])
        assert sorted(sum(seen, [])) == sorted(f"clip {n}" for n in range(FILES))
        assert all(seen)


def test_columns_have_other_names(good, tmp_path):
    rows = [{"clip": f"{n}.mp4", "description": f"clip {n}", "caption": 7} for n in range(6)]
    rows[5]["clip"] = None
    (good / "columns.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = {"video": "clip", "caption": "description"}
    loader = Loader(stream_of([str(good / "columns.jsonl")], columns=names), limit=1)
    batch = next(iter(loader))
    assert [int(text.split()[1]) for text in batch.text] == numbers(
        batch.video[:, :, 0].movedim(1, -1)
    )
    with pytest.raises(ValueError, match="need fields among .* in data.columns, got sound"):
        stream_of([str(good / "columns.jsonl")], columns={"sound": "clip"})
    with pytest.raises(ValueError, match="got clip, description, caption; data.columns names"):
        stream_of([str(good / "columns.jsonl")])


def test_errors(good, tmp_path):
    tables = written(good, "jsonl", tmp_path / "tables")
    with pytest.raises(ValueError, match=r"need data.files as local tables, .*, got none"):
        stream_of([])
    with pytest.raises(ValueError, match=r"hf-hub:USER/NAME, .*, got hf://datasets/a/b.parquet"):
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
    write_shard(tmp_path / "a.tar", [0], [b"no video" * 999])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(
        ValueError, match="cannot read .*a.tar: .*; data.source=shards reads tar files"
    ):
        take(Loader(stream_of([str(tmp_path / "a.tar")]), limit=1), 1)
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
