"""Annotation formats on small files in their published form, and the Arrow table."""

import errno
import json
import pickle
import zlib
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from vidl.cli import main
from vidl.data import formats
from vidl.data.formats import BadAnnotation, Row

pyarrow = pytest.importorskip("pyarrow")
annotations = pytest.importorskip("vidl.data.annotations")


def put(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return file


def rows(name, file, **options):
    return list(formats.FORMATS[name](file, **options))


def test_common(tmp_path):
    file = put(
        tmp_path,
        "common.json",
        [
            {"video": "a/1.mp4", "caption": ["one", "uno"]},
            {"image": "2.jpg", "caption": "two"},
            {"video": "3.mp4", "caption": "three", "start": 1.5, "end": 4},
            {"video": "4.mp4", "question": "how many?", "answer": "two", "question_id": 7},
            {"image": "5.jpg", "question": "what?", "answer": ["this", "that"]},
            {"video": "6.mp4", "caption": ["a", "b", "c"], "answer": 2},
            {"video": "7.mp4", "question": "which?", "options": ["x", "y"], "answer": 0},
        ],
    )
    assert rows("common", file) == [
        Row("a/1.mp4", captions=["one", "uno"]),
        Row("2.jpg", kind="image", captions=["two"]),
        Row("3.mp4", captions=["three"], start=1.5, end=4),
        Row("4.mp4", id="7", question="how many?", answer="two"),
        Row("5.jpg", kind="image", question="what?", answers=["this", "that"]),
        Row("6.mp4", options=["a", "b", "c"], correct=2),
        Row("7.mp4", question="which?", options=["x", "y"], correct=0),
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in json.loads(file.read_text()))
    assert rows("common", put(tmp_path, "common.jsonl", lines)) == rows("common", file)


def test_webvid(tmp_path):
    header = "videoid,contentUrl,duration,page_dir,name\n"
    text = '21,https://x/21.mp4,PT00H00M30S,000001_000050,"A ""red"" car, moving"\n'
    file = put(tmp_path, "results_2M_val.csv", header + text + "22,u,PT1S,000001_000050,\n")
    media = "000001_000050/21.mp4"
    with pytest.warns(UserWarning, match="val.csv: 1 rows without a name are skipped"):
        read = rows("webvid", file)
    assert read == [Row(media, id="21", captions=['A "red" car, moving'])]


def test_cc3m(tmp_path):
    url = "http://x.org/a.jpg"
    file = put(tmp_path, "Train_GCC-training.tsv", f'a "typical" bus station\t{url}\n')
    name = str(zlib.crc32(url.encode()))
    assert rows("cc3m", file) == [Row(name, kind="image", captions=['a "typical" bus station'])]


MSRVTT = {
    "info": {"year": "2016"},
    "videos": [
        {"id": 0, "video_id": "video0", "category": 9, "url": "u", "split": "train"},
        {"id": 1, "video_id": "video1", "category": 9, "url": "u", "split": "test"},
    ],
    "sentences": [
        {"sen_id": 0, "video_id": "video0", "caption": "a car"},
        {"sen_id": 1, "video_id": "video1", "caption": "a dog"},
        {"sen_id": 2, "video_id": "video0", "caption": "a red car"},
    ],
}


def test_msrvtt(tmp_path):
    file = put(tmp_path, "MSRVTT_data.json", MSRVTT)
    train = Row("video0.mp4", id="video0", captions=["a car", "a red car"])
    test = Row("video1.mp4", id="video1", captions=["a dog"])
    assert rows("msrvtt", file) == [train, test]
    assert rows("msrvtt", file, split="test") == [test]
    with pytest.raises(ValueError, match="need a split among test, train, got 'val'"):
        rows("msrvtt", file, split="val")
    ids = put(tmp_path, "MSRVTT_train.9k.csv", "video_id\nvideo1\n")
    assert rows("msrvtt", file, ids=ids) == [test]

    frozen = {"annotations": [{"image_id": "video1", "id": 3, "caption": "a dog"}]}
    assert rows("msrvtt", put(tmp_path, "MSR_VTT.json", frozen)) == [test]

    pairs = "key,vid_key,video_id,sentence\nret0,msr1,video1,a dog\n"
    assert rows("msrvtt", put(tmp_path, "MSRVTT_JSFUSION_test.csv", pairs)) == [test]


def test_paragraphs(tmp_path):
    entries = [
        {"video": "1@N00.avi", "description": "a cat comes. ", "times": [[0, 0]]},
        {"video": "2.mp4", "description": "a dog", "times": [[1, 1]]},
        {"video": "1@N00.avi", "description": "it goes.", "times": [[2, 3]]},
    ]
    assert rows("didemo", put(tmp_path, "test_data.json", entries)) == [
        Row("1@N00.avi", id="1@N00.avi", captions=["a cat comes. it goes."]),
        Row("2.mp4", id="2.mp4", captions=["a dog"]),
    ]
    entry = {"duration": 9.0, "timestamps": [[0, 4], [4, 9]], "sentences": ["A man.", " He runs."]}
    assert rows("activitynet", put(tmp_path, "val_1.json", {"v_x-Y_z": entry})) == [
        Row("v_x-Y_z.mp4", id="v_x-Y_z", captions=["A man. He runs."])
    ]


def test_questions(tmp_path):
    entry = {
        "answer": "couch",
        "category_id": 14,
        "id": 5,
        "question": "on what?",
        "video_id": 6513,
    }
    assert rows("msrvtt-qa", put(tmp_path, "val_qa.json", [entry])) == [
        Row("video6513.mp4", id="5", question="on what?", answer="couch")
    ]
    asked = put(
        tmp_path, "val_q.json", [{"video_name": "x", "question": "where", "question_id": "x_0"}]
    )
    put(tmp_path, "val_a.json", [{"answer": "outdoors", "type": 3, "question_id": "x_0"}])
    assert rows("activitynet-qa", asked) == [
        Row("v_x.mp4", id="x_0", question="where", answer="outdoors")
    ]


@pytest.mark.parametrize(
    "format, name, content, message",
    [
        (
            "common",
            "a.json",
            '[\n{"video": "1", "caption": "a"},\n{"video": "2"}\n]',
            "a.json:3: missing",
        ),
        ("common", "a.json", '[\n{"caption": "a"}\n]', "a.json:2: missing key 'video'"),
        (
            "common",
            "a.json",
            '[\n{"video": "1", "caption": " "}\n]',
            "a.json:2: need caption as a non-blank text or a list of them, got ' '",
        ),
        ("common", "a.json", '[\n{"video": "1", "caption": "a"}\n{}]', "a.json:3: need , or ]"),
        ("common", "a.json", '[\n{"video": "1", "caption": "a"},', "a.json:2: Expecting value"),
        ("common", "a.json", '[\n"1"]', "a.json:2: need an object, got '1'"),
        ("common", "a.json", "video,caption", "a.json:1: need a JSON list or object, got 'video,c"),
        ("common", "a.json", "", "a.json:1: need a JSON list or object, got ''"),
        (
            "common",
            "a.json",
            '[{"video": "1", "caption": ["a", "b"], "answer": 2}]',
            "a.json:1: need answer as an index into 2 options, got 2",
        ),
        (
            "common",
            "a.jsonl",
            '{"video": "1", "caption": "a"}\n{"video"',
            "a.jsonl:2: Expecting",
        ),
        (
            "webvid",
            "a.csv",
            "videoid,name\n",
            "a.csv:1: need columns videoid, page_dir, name",
        ),
        ("webvid", "a.csv", "videoid,page_dir,name\n1,2\n", "a.csv:2: need 3 columns"),
        ("cc3m", "a.tsv", "a bus\thttp://x\na car\n", "a.tsv:2: need caption <tab> url, got 1 col"),
        ("msrvtt", "a.json", "{}", "a.json:1: need a list named 'sentences' or 'annotations'"),
        (
            "msrvtt",
            "a.json",
            '{"sentences": [\n{"caption": "a"}]}',
            "a.json:2: missing key 'video_id'",
        ),
        ("didemo", "a.json", '[\n{"video": "1"}]', "a.json:2: missing key 'description'"),
        (
            "activitynet",
            "a.json",
            '{\n"v_1": {"sentences": []}}',
            "a.json:2: need sentences",
        ),
        ("msrvtt-qa", "a.json", '[\n\n{"question": "a"}]', "a.json:3: missing key 'video_id'"),
    ],
)
def test_errors_name_file_and_line(tmp_path, format, name, content, message):
    with pytest.raises(BadAnnotation) as caught:
        rows(format, put(tmp_path, name, content))
    assert message in str(caught.value)


GOOD = {"video": "a.mp4", "caption": "a man"}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"caption": {"en": "a man"}},
            "need caption as a non-blank text or a list of them, got {'",
        ),
        ({"caption": ["a man", 7]}, "need caption[1] as a non-blank text, got 7"),
        ({"caption": None}, "missing key 'caption'"),
        ({"caption": []}, "missing key 'caption'"),
        ({"video": 7}, "need video as a non-blank text or a list of them, got 7"),
        ({"video": []}, "need video as a file name, got []"),
        ({"video": None}, "need video as a file name, got None"),
        ({"start": "00:01:02"}, "need start as a number, got '00:01:02'"),
        ({"end": "62"}, "need end as a number, got '62'"),
        ({"start": True}, "need start as a number, got True"),
        ({"start": 10**400}, "int too large to convert to float"),
        ({"start": float("nan")}, "need start as a number, got nan"),
        ({"question": ["how?"]}, "need question as a non-blank text, got ['how?']"),
        ({"question": "how many?", "answer": {}}, "need answer as a non-blank text or a list"),
        ({"question": "which?", "options": ["a"], "answer": True}, "need answer as an index"),
        ({"question": "which?", "options": {"a": 1}, "answer": 0}, "need options as a non-blank"),
        ({"id": [1]}, "need id as a non-blank text or a number, got [1]"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_values_of_other_types_are_errors(tmp_path, change, message, suffix):
    entries = [json.dumps(GOOD), json.dumps(GOOD | change)]
    content = "[" + ",\n".join(entries) + "]" if suffix == "json" else "\n".join(entries)
    with pytest.raises(BadAnnotation) as caught:
        rows("common", put(tmp_path, f"a.{suffix}", content))
    assert f"a.{suffix}:2: {message}" in str(caught.value)


def test_a_number_is_no_text_answer(tmp_path):
    entry = {"video": "a.mp4", "question": "how many?", "answer": 2}
    with pytest.raises(BadAnnotation, match="a.json:2: need answer as a non-blank text"):
        rows("common", put(tmp_path, "a.json", [entry]))


LINE = json.dumps(GOOD)
DEEP = "[" * 100_000
WEBVID = "videoid,page_dir,name\n"


@pytest.mark.parametrize(
    "format, name, content, message",
    [
        ("common", "a.json", f"[{LINE}]\n{LINE}", "a.json:2: need the end of the file after ]"),
        ("common", "a.json", f"[{LINE}]\n[{LINE}]", "a.json:2: need the end of the file after ]"),
        ("common", "a.json", f"{LINE}\n{LINE}", "a.json:1: need an object, got 'a.mp4'"),
        (
            "common",
            "a.json",
            '[{"video": "1", "caption": "a", "caption": "b"}]',
            "'caption' occurs",
        ),
        ("common", "a.jsonl", f'{LINE}\n{{"id": 1, "id": 2}}', "a.jsonl:2: key 'id' occurs twice"),
        ("common", "a.jsonl", f"{LINE}\n[]", "a.jsonl:2: need an object, got []"),
        ("common", "a.jsonl", f"{LINE} {LINE}", "a.jsonl:1: Extra data"),
        ("common", "a.json", "[\n" + DEEP, "a.json:2: nested too deeply"),
        ("common", "a.jsonl", "\n" + DEEP, "a.jsonl:2: nested too deeply"),
        ("msrvtt", "a.json", '{"sentences": [\n],\n"sentences": []}', "a.json:3: key 'sentences'"),
        ("msrvtt", "a.json", '{"sentences": []}\n{}', "a.json:2: need the end of the file after }"),
        ("msrvtt", "a.json", '{"sentences": [1]}', "a.json:1: need an object, got 1"),
        ("msrvtt", "a.json", '{"sentences": {}}', "need a list named 'sentences'"),
        (
            "msrvtt",
            "a.json",
            '{"sentences": [{"video_id": "v", "caption": {}}]}',
            "need caption as",
        ),
        ("msrvtt", "a.csv", "video_id,sentence\nv,\n", "a.csv:2: need sentence as a non-blank"),
        ("webvid", "a.csv", WEBVID + '1,d,"a\n2,d,b\n3,d,c\n', "a.csv:2: in the row that begins"),
        ("webvid", "a.csv", WEBVID + '1,d,"a"b\n', "a.csv:2: in the row that begins here"),
        ("webvid", "a.csv", WEBVID + "1,d,a, b\n", "a.csv:2: need 3 columns, got 4"),
        ("webvid", "a.csv", WEBVID + ",d,a\n", "a.csv:2: need videoid as a non-blank text"),
        ("webvid", "a.csv", "name,page_dir,videoid,name\n", "a.csv:1: need distinct columns"),
        ("didemo", "a.json", '["a"]', "a.json:1: need an object, got 'a'"),
        ("didemo", "a.json", '[{"video": "1", "description": 2}]', "need description as a non-bl"),
        ("activitynet", "a.json", '{"v_1": []}', "a.json:1: need an object, got []"),
        ("activitynet", "a.json", '{"v_1": {"sentences": "a"}}', "as a list of texts, got 'a'"),
        ("activitynet", "a.json", '[{"sentences": ["a"]}]', "with their ids as keys"),
        (
            "msrvtt-qa",
            "a.json",
            '[{"video_id": [], "question": "a", "answer": "b"}]',
            "video_id as",
        ),
        ("csv", "a.csv", "video,caption\na.mp4,\n", "a.csv:2: need caption as a non-blank text"),
        ("csv", "a.csv", "file,caption\n", "a.csv:1: need one column video, image, file_name or p"),
        ("csv", "a.csv", "video,path,text\n", "caption, text or question, got video, path, text;"),
        ("csv", "a.csv", "path,label\na,b\n", "got path, label; name others with --format csv"),
        ("csv", "a.csv", "", "question, got nothing"),
        ("csv", "metadata.csv", "file_name,text\n,a\n", "metadata.csv:2: need file_name as a non"),
        ("common", "metadata.jsonl", '\n{"file_name": 1}', "metadata.jsonl:2: need file_name as"),
        ("common", "metadata.jsonl", '{"file_name": "a"}', "metadata.jsonl:1: missing key 'capt"),
    ],
)
def test_rows_never_vanish(tmp_path, format, name, content, message):
    with pytest.raises(BadAnnotation) as caught:
        rows(format, put(tmp_path, name, content))
    assert message in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "format, name, content",
    [
        ("common", "a.json", '[{"video": "1", "caption": "ein Bär"}]'),
        ("common", "a.jsonl", '{"video": "1", "caption": "ein Bär"}'),
        ("csv", "a.csv", "video,caption\n1,ein Bär\n"),
        ("webvid", "a.csv", WEBVID + "1,d,ein Bär\n"),
        ("cc3m", "a.tsv", "ein Bär\thttp://x\n"),
        ("msrvtt", "a.csv", "video_id,sentence\nv,ein Bär\n"),
        ("msrvtt", "a.json", '{"annotations": [{"image_id": "v", "caption": "ein Bär"}]}'),
        ("didemo", "a.json", '[{"video": "1", "description": "ein Bär"}]'),
        ("activitynet", "a.json", '{"v_1": {"sentences": ["ein Bär"]}}'),
    ],
)
def test_encodings(tmp_path, encoding, format, name, content):
    file = tmp_path / name
    file.write_bytes(content.encode(encoding))
    assert [row.captions for row in rows(format, file)] == [("ein Bär",)]
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(BadAnnotation, match=rf"{name}:\d: .*can't decode byte 0xe4"):
        rows(format, file)


def test_halves_of_characters_are_replaced(tmp_path):
    file = put(tmp_path, "a.json", [GOOD | {"caption": "dog \ud83d"}])
    annotations.convert(file, tmp_path / "a.arrow")
    assert annotations.load(tmp_path / "a.arrow")[0].captions == ("dog \ufffd",)


def test_tables_with_any_columns(tmp_path):
    text = 'path,text,from\na.mp4,"a man, a dog",1.5\nb.mp4,b,\n'
    names = {"video": "path", "caption": "text", "start": "from"}
    wanted = [Row("a.mp4", captions=["a man, a dog"], start=1.5), Row("b.mp4", captions=["b"])]
    assert rows("csv", put(tmp_path, "a.csv", text), columns=names) == wanted
    tabs = text.replace(",", "\t").replace("\t a dog", ", a dog")
    assert rows("csv", put(tmp_path, "a.tsv", tabs), columns=names) == wanted
    with pytest.raises(ValueError, match="need fields among video, image, .*, got kind"):
        rows("csv", tmp_path / "a.csv", columns={"kind": "text"})
    with pytest.raises(BadAnnotation, match="a.csv:2: need start as a number, got 'a.mp4'"):
        rows("csv", tmp_path / "a.csv", columns=names | {"start": "path"})


def test_columns_with_known_names(tmp_path):
    wanted = [Row("a.mp4", captions=["a man"]), Row("b.PNG", kind="image", captions=["b"])]
    for header in ("path,caption", "file_name,text"):
        file = put(tmp_path, "a.csv", f"{header},label\na.mp4,a man,3\nb.PNG,b,4\n")
        assert rows("csv", file) == wanted
    text = "id,video,question,answer,start,end\n7,a.mp4,who?,me,1.5,2\n"
    wanted = [Row("a.mp4", id="7", question="who?", answer="me", start=1.5, end=2)]
    assert rows("csv", put(tmp_path, "b.csv", text)) == wanted
    lines = '{"file_name": "a.mp4", "text": ["a", "b"]}\n{"file_name": "1.jpg", "text": "c"}'
    wanted = [Row("a.mp4", captions=["a", "b"]), Row("1.jpg", kind="image", captions=["c"])]
    assert rows("common", put(tmp_path, "metadata.jsonl", lines)) == wanted


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "name, content",
    [
        ("metadata.csv", "file_name,text\na/1.mp4,one\n2.jpg,two\n"),
        (
            "metadata.jsonl",
            '{"file_name": "a/1.mp4", "text": "one"}\n{"file_name": "2.jpg", "text": "two"}',
        ),
        (None, None),
    ],
)
def test_folders(tmp_path, cache, name, content):
    folder = tmp_path / "clips"
    for file in ("a/1.mp4", "2.jpg", ".hidden.mp4", "a/.thumbnails/1.mp4", "notes.md"):
        put(folder, file, "")
    texts = {"metadata": content} if name else {"a/1.txt": "one\n", "2.txt": "two"}
    for file, text in texts.items():
        put(folder, name or file, text)
    wanted = {
        (f"{folder}/a/1.mp4", "video", ("one",)),
        (f"{folder}/2.jpg", "image", ("two",)),
    }
    for given in (folder, str(tmp_path / "cl*"), *([folder / name] if name else [])):
        loaded = annotations.load(given)
        assert {(row.media, row.kind, row.captions) for row in loaded} == wanted
        assert len(loaded) == 2
    elsewhere = annotations.load((folder, tmp_path / "other"))
    assert {row.media for row in elsewhere} == {
        str(tmp_path / "other" / file) for file in ("a/1.mp4", "2.jpg")
    }
    # a changed folder is read again
    put(folder, name or "2.txt", content.replace("two", "three") if name else "three")
    assert {row.captions for row in annotations.load(folder)} == {("one",), ("three",)}


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "clips: need metadata.csv or metadata.jsonl, or clips with texts beside them"),
        ({"a.txt": "a"}, "clips: need metadata.csv or metadata.jsonl, or clips with texts"),
        ({"metadata.csv": "", "metadata.jsonl": ""}, "metadata.csv and metadata.jsonl, got both"),
        ({"a.mp4": ""}, "a.mp4: need its caption in a.txt beside it, or metadata.csv or metadata"),
        ({"a.mp4": "", "a.txt": " \n"}, "a.txt:1: need a caption, got a blank text"),
        ({"a.mp4": "", "a.txt": b"a\xff"}, "a.txt:1: need a text in UTF-8: "),
        ({"a.mp4": "", "a.txt": "a", "b.mp4": ""}, "b.mp4: need its caption in b.txt"),
        ({"metadata.csv": "file_name,text\na.mp4\n"}, "metadata.csv:2: need 2 columns, got 1"),
    ],
)
def test_errors_of_folders(tmp_path, cache, files, message):
    (tmp_path / "clips").mkdir()
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / "clips" / name).write_bytes(content)
        else:
            put(tmp_path / "clips", name, content)
    with pytest.raises(ValueError) as caught:
        annotations.load(tmp_path / "clips")
    assert message in str(caught.value) and str(tmp_path / "clips") in str(caught.value)


def test_texts_without_a_clip_are_named(tmp_path, cache):
    for file in ("a.mp4", "a.txt", "b.txt"):
        put(tmp_path / "clips", file, file)
    with pytest.warns(UserWarning, match=r"1 texts without a clip are skipped, as .*b.txt"):
        assert len(annotations.load(tmp_path / "clips")) == 1


def test_globs(tmp_path, cache):
    for n in range(3):
        put(tmp_path, f"[part{n}].json", [{"video": f"{n}.mp4", "caption": "a"}])
    put(tmp_path, "0.mp4", "")
    names = [row.media for row in annotations.load(tmp_path / "*.json")]
    assert names == [str(tmp_path / f"{n}.mp4") for n in range(3)]
    assert len(annotations.load(tmp_path / "[[]part[01]].json")) == 2
    assert len(annotations.load(tmp_path / "[part1].json")) == 1  # a file, not a glob
    with pytest.raises(ValueError, match=r"need files that match .*\*.csv, got none"):
        annotations.load(tmp_path / "*.csv")

    command = ["data", "convert", str(tmp_path / "*.json")]
    assert main([*command, str(tmp_path / "all.arrow")]) == 0
    assert len(annotations.load(tmp_path / "all.arrow")) == 3
    assert main(command) == 1  # no name for the table
    put(tmp_path, "more/3.json", [{"video": "3.mp4", "caption": "a"}])
    assert main(["data", "convert", str(tmp_path / "**/*.json"), str(tmp_path / "no.arrow")]) == 1
    assert not (tmp_path / "no.arrow").exists()


def test_missing_answers_are_an_error(tmp_path):
    question = {"video_name": "x", "question": "where", "question_id": "x_0"}
    asked = put(tmp_path, "val_q.json", [question])
    put(tmp_path, "val_a.json", [])
    with pytest.raises(BadAnnotation, match="val_q.json:2: .*val_a.json has no answer to x_0"):
        rows("activitynet-qa", asked)
    answers = [{"question_id": "x_0", "answer": answer} for answer in ("a", "b")]
    put(tmp_path, "val_a.json", answers)
    with pytest.raises(ValueError, match="val_a.json: question x_0 has two answers"):
        rows("activitynet-qa", asked)
    with pytest.raises(ValueError, match="need the file with the questions"):
        rows("activitynet-qa", tmp_path / "val_a.json")


def test_rows_survive_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "ROWS_AT_A_TIME", 3)  # several batches in one file
    captioned = [Row(f"{n}.mp4", captions=[f"clip {n}", "ü"], start=n / 3) for n in range(7)]
    asked = [
        Row("q.jpg", kind="image", id="q", question="how?", options=["a", "b"], correct=1),
        Row("r.mp4", question="who?", answer="me"),
    ]
    assert annotations.write(captioned, tmp_path / "captioned.arrow") == 7
    assert annotations.write(asked, tmp_path / "asked.arrow") == 2
    table = annotations.Annotations(
        [(tmp_path / "captioned.arrow", "x"), (tmp_path / "asked.arrow", "y")]
    )
    assert len(table) == 9
    for index, row in enumerate([*captioned, *asked]):
        media = f"{'x' if index < 7 else 'y'}/{row.media}"
        assert table[index] == replace(row, media=media)
    assert table.kinds().tolist() == [False] * 7 + [True, False]
    with pytest.raises(IndexError, match="need a row below 9, got 9"):
        table[9]
    assert list(table) == [table[n] for n in range(9)]

    copy = pickle.loads(pickle.dumps(table))  # as for a worker: file names, not rows
    assert copy[8] == table[8] and len(pickle.dumps(table)) < 1000


def test_json_is_converted_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))
    file = put(tmp_path, "clips.json", [{"video": "1.mp4", "caption": "a"}])
    table = annotations.load(file)
    assert table[0] == Row(str(tmp_path / "1.mp4"), captions=["a"])
    (table,) = (tmp_path / "cache").iterdir()
    before = table.stat().st_mtime_ns
    assert annotations.load((file, "other"))[0].media == "other/1.mp4"
    assert table.stat().st_mtime_ns == before
    put(tmp_path, "clips.json", [{"video": "1.mp4", "caption": "b"}])
    (tmp_path / "clips").mkdir()
    row = annotations.load(file)[0]
    assert row.captions == ("b",) and row.media == str(tmp_path / "clips" / "1.mp4")


@pytest.mark.parametrize(
    "media",
    [
        "http://example.org/a.mp4", "pipe:0", "concat:a.mp4|/etc/passwd",
        "subfile,,start,0,end,9,,:a",
        "tcp://1.2.3.4:5", "file:/etc/passwd", "/etc/passwd", "../a.mp4", "a/../../b.mp4", "a/..",
    ],
)  # fmt: skip
def test_annotations_reach_only_files_below_the_folder(tmp_path, monkeypatch, media):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))
    names = ["good, 10:30.mp4", "b..mp4", media]
    file = put(tmp_path, "a.json", [{"video": name, "caption": "a"} for name in names])
    with pytest.raises(ValueError) as error:
        annotations.load(file)
    assert "need files below the folder of the media" in str(error.value)
    assert repr(media) in str(error.value) and "in row 2" in str(error.value)
    if media.startswith(("/", "../", "a/")):
        rows = annotations.load(file, outside=True)
        assert len(rows) == 3 == len(pickle.loads(pickle.dumps(rows)))
        assert main(["data", "check", str(file), "--outside"]) == 1  # the files are missing
    else:
        with pytest.raises(ValueError, match="vidl opens no URLs"):
            annotations.load(file, outside=True)
    assert main(["data", "check", str(file)]) == 1


@pytest.mark.parametrize("folder", ["mine", "clips", "."])
def test_clips_beside_the_annotations_are_located(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))
    rows = [{"video": f"{n}.mp4", "caption": "a"} for n in range(3)]
    file = put(tmp_path, "mine.json", rows)
    for other in ("mine", "clips"):
        put(tmp_path, f"{other}/other.mp4", "")
    put(tmp_path, f"{folder}/1.mp4", "")
    assert annotations.load(file)[1].media == str(tmp_path / folder / "1.mp4")
    assert annotations.load((file, tmp_path / "elsewhere"))[0].media == str(
        tmp_path / "elsewhere/0.mp4"
    )


def test_tables_are_written_atomically(tmp_path):
    file = put(tmp_path, "a.json", '[{"video": "1", "caption": "a"}, {"video": "2"}]')
    with pytest.raises(BadAnnotation):
        annotations.convert(file, tmp_path / "a.arrow")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(ValueError, match="a.json: need annotations, got no rows"):
        annotations.convert(put(tmp_path, "a.json", "[]"), tmp_path / "a.arrow")
    with pytest.raises(ValueError, match="need a format among common, csv, webvid"):
        annotations.convert(file, tmp_path / "a.arrow", format="coco")


def test_a_full_disk(tmp_path, monkeypatch):
    """The error names the table, and nothing is left; an error of reading names what is read."""
    file = put(tmp_path, "a.json", [{"video": "1.mp4", "caption": "a"}])

    class Full:
        def __init__(self, path, mode):
            Path(path).write_bytes(b"some")

        def __enter__(self):
            raise OSError(errno.ENOSPC, "Error writing bytes to file. No space left on device")

        def __exit__(self, *error):
            raise AssertionError

    for cached in (False, True):
        folder = tmp_path / f"out{cached}"
        monkeypatch.setenv("VIDL_CACHE", str(folder))
        with monkeypatch.context() as patch:
            patch.setattr(pyarrow, "OSFile", Full)
            with pytest.raises(OSError, match="No space left on device") as caught:
                annotations.load(file) if cached else annotations.convert(file, folder / "a.arrow")
        assert caught.value.errno == errno.ENOSPC
        assert Path(caught.value.filename).parent == folder
        assert Path(caught.value.filename).suffix == ".arrow"
        assert list(folder.iterdir()) == []
    with pytest.raises(FileNotFoundError) as caught:
        annotations.convert(tmp_path / "no.json", tmp_path / "a.arrow")
    assert caught.value.filename == str(tmp_path / "no.json")
    with pytest.raises(OSError) as caught:  # noqa: PT011  a folder is there
        annotations.convert(file, folder)
    assert caught.value.filename == str(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "outFalse", "outTrue"]


def test_invalid_tables_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="b.arrow: need an Arrow file written by vidl"):
        annotations.load(put(tmp_path, "b.arrow", "no table"))
    with pytest.raises(ValueError, match=r"c.xml: need .arrow, .json, .* or a folder; else `vid"):
        annotations.load(put(tmp_path, "c.xml", "a,b"))


def test_workers_do_not_hold_the_rows(tmp_path):
    """Memory for a million rows grows only by the rows that are read."""
    count = 200_000
    file = tmp_path / "many.arrow"
    annotations.write((Row(f"{n}.mp4", captions=[f"caption {n} " * 5]) for n in range(count)), file)
    table = annotations.Annotations([(file, "")])
    assert table[count - 1].captions == (f"caption {count - 1} " * 5,)
    assert numpy.count_nonzero(table.kinds()) == 0
    assert pyarrow.total_allocated_bytes() < 1 << 20 < file.stat().st_size


def test_convert_command(tmp_path, capsys):
    for name in ("media/v_a.webm", "media/v_b.avi.mp4", "media/v_c.mp4"):
        put(tmp_path, name, "")
    entries = {f"v_{name}": {"sentences": [f"clip {name}"]} for name in "acd"}
    file = put(tmp_path, "val_1.json", entries)
    out, media = tmp_path / "out.arrow", str(tmp_path / "media")
    command = ["data", "convert", str(file), str(out), "--format", "activitynet", "--media", media]
    assert main(command) == 0
    assert "out.arrow: 3 rows" in capsys.readouterr().out
    names = [row.media for row in annotations.Annotations([(out, "")])]
    assert names == ["v_a.webm", "v_c.mp4", "v_d.mp4"]

    file = put(tmp_path, "didemo.json", [{"video": "v_b.avi", "description": "b"}])
    assert main(["data", "convert", str(file), "--format", "didemo", "--media", media]) == 0
    assert annotations.load(tmp_path / "didemo.arrow")[0].media.endswith("/v_b.avi.mp4")

    file = put(tmp_path, "msr.json", MSRVTT)
    assert main(["data", "convert", str(file), "--format", "msrvtt", "--split", "train"]) == 0
    assert [row.id for row in annotations.load(tmp_path / "msr.arrow")] == ["video0"]

    assert main(["data", "convert", str(tmp_path / "no.json")]) == 1
    assert "no.json" in capsys.readouterr().err
    assert (
        main(["data", "convert", str(tmp_path / "msr.json"), "--media", str(tmp_path / "no")]) == 1
    )
    assert f"need the folder of the media, got {tmp_path}/no" in capsys.readouterr().err

    file = put(tmp_path, "own.csv", "path,text\na.mp4,a man\n")
    command = ["data", "convert", str(file), "--format", "csv", "--columns"]
    assert main([*command, "video=path,caption=text"]) == 0
    assert annotations.load(tmp_path / "own.arrow")[0].captions == ("a man",)
    assert main([*command, "video=path,caption=texts"]) == 1
    assert "own.csv:1: need columns path, texts, got path, text" in capsys.readouterr().err
    for wrong in ([*command, "path"], [*command, "video=path", "--format", "common"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "--columns is for --format csv, not common" in capsys.readouterr().err
