"""Folders and repositories of the Hub that Hugging Face datasets streams, from a local endpoint."""

import http.server
import importlib
import json
import shutil
import threading
import urllib.parse

import pytest

pytest.importorskip("av")
pytest.importorskip("datasets")
pytest.importorskip("huggingface_hub")

import datasets  # noqa: E402
from test_data_loader import folder, numbers, take  # noqa: E402, F401

from vidl.data.dataset import Clips  # noqa: E402
from vidl.data.loader import Loader  # noqa: E402
from vidl.data.repositories import open_streaming  # noqa: E402
from vidl.data.tables import TableStream  # noqa: E402

CLIPS = 7


class Hub(http.server.BaseHTTPRequestHandler):
    """What the Hub answers about the repository user/clips; a folder for each commit."""

    def log_message(self, *args):
        pass

    def reply(self, body, code=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        # /datasets/user/clips/resolve/COMMIT/FILE, /api/datasets/user/clips/tree/COMMIT/FOLDER,
        # /api/datasets/user/clips/revision/COMMIT
        commits, url = self.server.commits, urllib.parse.urlsplit(self.path)
        repository, *place = url.path.removeprefix("/api").partition("/user/clips")
        what, commit, name = [*place[-1].removeprefix("/").split("/", 2), "", "", ""][:3]
        commit = next(reversed(commits)) if commit in ("", "main") else commit
        if repository != "/datasets" or commit not in commits:
            return self.reply({}, 404, X_Error_Code="RepoNotFound")
        file = commits[commit] / urllib.parse.unquote(name)
        if what == "resolve":
            return self.file(file, commit)
        if what == "tree" and file.is_dir():
            files = file.rglob("*") if "recursive=true" in url.query else file.iterdir()
            return self.reply([{"type": "directory" if file.is_dir() else "file", "oid": "0" * 40,
                                "size": file.stat().st_size,
                                "path": str(file.relative_to(commits[commit]))}
                               for file in sorted(files)])  # fmt: skip
        if what in ("", "revision"):
            facts = {"_id": "1", "id": "user/clips", "sha": commit, "private": False, "tags": []}
            return self.reply(facts | {"downloads": 0, "likes": 0, "siblings": []})
        self.reply({}, 404, X_Error_Code="EntryNotFound")

    def file(self, file, commit):
        if not file.is_file():
            return self.reply(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content, part = file.read_bytes(), self.headers.get("Range")
        facts = {"ETag": f'"{file.name}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if part is None:
            return self.reply(content, **facts)
        begin, _, end = part.removeprefix("bytes=").partition("-")
        last = min(int(end or len(content)), len(content) - 1)
        place = f"bytes {begin}-{last}/{len(content)}"
        self.reply(content[int(begin) : last + 1], 206, Content_Range=place, **facts)


def repository(clips, to, caption="clip"):
    """Clips with captions in metadata.jsonl; one of them is broken."""
    (to / "train").mkdir(parents=True)
    for n in range(CLIPS):
        shutil.copy(clips / "good" / f"{n}.mp4", to / "train")
    (to / "train/2.mp4").write_bytes(b"no video")
    rows = [{"file_name": f"{n}.mp4", "text": f"{caption} {n}"} for n in range(CLIPS)]
    (to / "train/metadata.jsonl").write_text(lines(rows))
    return to


def lines(rows):
    return "\n".join(map(json.dumps, rows))


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):  # noqa: F811
    """Commits of the repository hf-hub:user/clips, of which the last is the newest."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.commits = {"c" * 40: repository(folder, tmp_path / "first")}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    yield server.commits
    server.shutdown()
    server.server_close()
    thread.join()


def stream_of(*names, **options):
    clips = Clips([], frames=1, size=8, train=True, seed=4)
    return TableStream(names, clips, 3, buffer=3, **options)


def test_a_repository_is_read_as_a_folder(hub, tmp_path):
    batches = [
        take(Loader(stream_of(name), limit=1), 5)
        for name in ("hf-hub:user/clips", f"hf-hub:user/clips@{'c' * 40}", str(tmp_path / "first"))
    ]
    assert batches[0] == batches[1] == batches[2]
    batches = [
        take(Loader(stream_of(name), workers=2, limit=1), 4)
        for name in ("hf-hub:user/clips", str(tmp_path / "first"))
    ]
    assert batches[0] == batches[1]
    loader = Loader(stream_of("hf-hub:user/clips"), limit=1)
    for _, batch in zip(range(5), loader, strict=False):
        numbered = [int(text.split()[1]) for text in batch.text]
        assert numbered == numbers(batch.video[:, :, 0].movedim(1, -1))
    assert list(loader.broken) == ["train/2.mp4"] and loader.broken_count >= 2


def test_a_run_resumes_at_the_commit_that_it_began_with(hub, folder, tmp_path):  # noqa: F811
    whole = take(Loader(stream_of("hf-hub:user/clips"), limit=1), 6)
    first = Loader(stream_of("hf-hub:user/clips"), limit=1)
    take(first, 3)
    state = json.loads(json.dumps(first.state_dict()))
    hub["d" * 40] = repository(folder, tmp_path / "second", "changed")
    newest = Loader(stream_of("hf-hub:user/clips"), limit=1)
    assert "changed" in next(iter(newest)).text[0]
    resumed = Loader(stream_of("hf-hub:user/clips"), limit=1)
    resumed.load_state_dict(state)
    assert take(resumed, 3) == whole[3:]


def test_tables_of_a_repository_name_its_files(hub, tmp_path):
    (tmp_path / "first/train/metadata.jsonl").unlink()
    (tmp_path / "first/train").rename(tmp_path / "first/clips")
    table = tmp_path / "first/data/a.jsonl"
    table.parent.mkdir()
    table.write_text(lines({"video": f"clips/{n}.mp4", "text": f"clip {n}"} for n in range(CLIPS)))
    commit = "e" * 40
    hub[commit] = tmp_path / "first"
    with pytest.raises(ValueError, match="need columns .* and caption or text, .*, got video;"):
        stream_of("hf-hub:user/clips")
    loader = Loader(stream_of("hf-hub:user/clips/data/*.jsonl"), limit=1)
    for _, batch in zip(range(3), loader, strict=False):
        texts = [int(text.split()[1]) for text in batch.text]
        assert texts == numbers(batch.video[:, :, 0].movedim(1, -1))
    for name in ("../second.mp4", "https://host/a.mp4", "hf://datasets/user/other@0/a.mp4"):
        commit = chr(ord(commit[0]) + 1) * 40
        hub[commit] = tmp_path / "first"
        table.write_text(lines([{"video": name, "text": "a clip"}]))
        with pytest.raises(ValueError, match=f"need a file below the folder .*{name}"):
            take(Loader(stream_of(f"hf-hub:user/clips@{commit}/data/a.jsonl"), limit=1), 1)


def test_names_that_cannot_be_opened(hub, tmp_path, monkeypatch):
    place = tmp_path / "first"
    for names, options, complaint in (
        (["hf-hub:clips"], {}, "need a repository as hf-hub:USER/NAME, .*, got hf-hub:clips"),
        (["hf-hub:user/clips/*.csv"], {}, "cannot read hf-hub:user/clips/.*csv: DataFilesNotFound"),
        (["hf-hub:user/none"], {}, "the Hub gives, got hf-hub:user/none .*RepositoryNotFound.*"
         "Without a network, run `hf download user/none --repo-type dataset --local-dir data`"),
        ([place], {"split": "test"}, "cannot read .*Bad split: test. Available splits: .'train'"),
        ([place], {"subset": "no"}, "cannot read .*no"),
        ([place, place], {}, "need data.files as local tables, one local folder or one"),
        (["hf-hub:user/clips", place], {}, "need data.files as local tables"),
        ([place / "train/metadata.jsonl"], {"split": "train"}, "need data.split and data.subset w"),
        ([tmp_path / "none"], {}, "need data.files as local tables, .*none"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=complaint) as raised:
            open_streaming(list(map(str, names)), **options)
        assert "\n" not in str(raised.value)
    (place / "train/more").mkdir()
    shutil.copy(place / "train/metadata.jsonl", place / "train/more")
    with pytest.raises(ValueError, match="need one metadata file in the split train .*, got 2"):
        open_streaming([str(place)])
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="Offline.*and set data.files=.data.$"):
        open_streaming(["hf-hub:user/clips"])
