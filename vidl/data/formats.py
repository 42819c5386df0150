"""Readers of annotation formats; each docstring describes its format."""

import csv
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidl.data.parsing import (
    BadAnnotation,
    checked,
    json_lines,
    lines,
    members,
    name_field,
    number_field,
    table,
    text_field,
    texts_field,
    without_surrogates,
)

# What `columns` can read from a table.
FIELDS = (
    "video", "image", "caption", "question", "answer", "id", "start", "end", "second", "label",
)  # fmt: skip
# Other names of a file; the first one, with "text" for the caption, is that of Hugging Face.
NAMES = ("file_name", "path")
# Suffixes of files.
VIDEOS = (
    "mp4", "webm", "mkv", "avi", "mov", "m4v", "mpg", "mpeg", "ts", "flv", "ogv", "wmv", "3gp",
    "gif",
)  # fmt: skip
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")


@dataclass(frozen=True)
class Row:
    """One annotation of a video or image.

    Retrieval: `captions`. Open-ended questions: `question` and `answer`, or `answers`, those of
    several people. Multiple choice: `options`
    with the index `correct`, and optionally a `question`. A sentence about two clips: `captions`,
    the other clip, `second`, and whether the sentence holds, `label`.
    """

    media: str  # file, relative to the folder of the media
    kind: str = "video"  # or "image"
    id: str = ""
    captions: Sequence[str] = ()
    question: str | None = None
    answer: str | None = None
    options: Sequence[str] = ()
    correct: int | None = None
    start: float | None = None  # of the annotated part, in seconds
    end: float | None = None
    second: str | None = None  # another file, of the same kind
    label: bool | None = None
    answers: Sequence[str] = ()  # of two or more people; then there is no `answer`

    def __post_init__(self) -> None:
        for name in ("captions", "options", "answers"):  # tuples are hashable
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))

    @property
    def given(self) -> str | Sequence[str] | None:
        """The answer, or those of several people; None: there is none."""
        return self.answers or self.answer


def kind_of(name: str) -> str:
    """Whether a file is a video or an image, by its suffix."""
    return "image" if name.rpartition(".")[2].lower() in IMAGES else "video"


def common(file: Path) -> Iterator[Row]:
    """The JSON format of Singularity, VindLU and UMT; or one such object per line (.jsonl).

    A list of {"video" or "image": file, "caption": text or [text, ...]}; for questions
    {..., "question": text, "answer": text}, or a list of the answers of several people; for
    multiple choice {..., "caption": [text, ...], "answer": index} or {..., "question": text,
    "options": [text, ...], "answer": index}; for a sentence about two clips {..., "second": file,
    "caption": text, "label": true or false}. Optional: "id" or "question_id", and "start" and
    "end" in seconds. A file may also be named by "file_name" or "path", and a caption by "text",
    as in metadata.jsonl of Hugging Face.
    """
    if file.suffix == ".jsonl":
        entries = json_lines(file)
    else:
        entries = ((line, entry) for line, _, entry in members(file))
    return checked(file, entries, common_row)


def common_row(entry: dict[str, Any]) -> Row:
    """The row of one object of `common`.

    Raises:
        KeyError, ValueError: a field is missing or has another type.
    """
    name = next((name for name in NAMES if name in entry), None)
    if name is not None and "video" not in entry and "image" not in entry:
        entry = entry | {kind_of(text_field(entry, name)): entry[name]}
    if "text" in entry and "caption" not in entry and "question" not in entry:
        entry = entry | {"caption": entry["text"]}
    kind = "image" if "image" in entry else "video"
    # COCO lists several images of the same caption
    media = next(iter(texts_field(entry, kind)), None) if entry[kind] else None
    if media is None:
        raise ValueError(f"need {kind} as a file name, got {entry[kind]!r}")
    captions, options = texts_field(entry, "caption"), texts_field(entry, "options")
    answer, correct = entry.get("answer"), None
    answers: Sequence[str] = ()
    if isinstance(answer, int) and not options:
        captions, options = [], captions
    if options:
        correct, answer = answer, None
        if type(correct) is not int or not 0 <= correct < len(options):
            raise ValueError(f"need answer as an index into {len(options)} options, got {correct}")
    elif answer is not None:
        answer, answers = _answers(entry)
    if not captions and not options and not answers and answer is None:
        raise KeyError("caption")
    question = entry.get("question")
    second, label = _second(entry, captions)
    return Row(
        media=media,
        kind=kind,
        id=name_field(entry, "question_id", "") or name_field(entry, "id", ""),
        captions=captions,
        question=None if question is None else text_field(entry, "question"),
        answer=answer,
        options=options,
        correct=correct,
        start=number_field(entry, "start"),
        end=number_field(entry, "end"),
        second=second,
        label=label,
        answers=answers,
    )


def _answers(entry: dict[str, Any]) -> tuple[str | None, Sequence[str]]:
    """The answer of one person, or those of several."""
    answers = texts_field(entry, "answer")
    if not answers:
        raise ValueError("need answer as a text or a list of texts, got []")
    return (answers[0], ()) if len(answers) == 1 else (None, answers)


def _second(entry: dict[str, Any], captions: Sequence[str]) -> tuple[str | None, bool | None]:
    """The second clip of a pair, and whether the sentence holds; None without a second clip."""
    if entry.get("second") is None:
        return None, None
    label = entry.get("label")
    if isinstance(label, str) and label.strip().lower() in ("true", "false"):
        label = label.strip().lower() == "true"
    if not isinstance(label, bool):
        raise ValueError(f"need label as true or false in a row with second, got {label!r}")
    if len(captions) != 1:
        raise ValueError(f"need one caption in a row with second, got {len(captions)}")
    if entry.get("start") is not None or entry.get("end") is not None:
        raise ValueError("need a row with second without start and end, which are of one clip")
    return text_field(entry, "second"), label


def columns(file: Path, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """A CSV or, with suffix .tsv, a TSV file with a header, such as `path,caption`.

    Args:
        file: the annotations.
        columns: the column of each field: "video" or "image", "caption" or "question" and "answer",
            and optionally "id", "start" and "end", or "second" and "label"; default: the columns
            with these names, with
            "file_name" or "path" for the file and "text" for the caption.

    Raises:
        ValueError: unknown fields.
    """
    unknown = [field for field in columns or () if field not in FIELDS]
    if unknown:
        raise ValueError(f"need fields among {', '.join(FIELDS)}, got {', '.join(unknown)}")
    delimiter = "\t" if file.suffix == ".tsv" else ","
    names = dict(columns) if columns else _known_columns(file, delimiter)

    def row(values: dict[str, str]) -> Row:
        entry: dict[str, Any] = {field: values[column] for field, column in names.items()}
        for field in ("start", "end"):
            text = entry.pop(field, "").strip()
            if text:
                try:
                    entry[field] = float(text)
                except ValueError:
                    raise ValueError(f"need {field} as a number, got {text!r}") from None
        for field in ("id", "second"):
            if not entry.get(field, "x").strip():
                del entry[field]
        return common_row(entry)

    return checked(file, table(file, list(names.values()), delimiter), row)


def _known_columns(file: Path, delimiter: str) -> dict[str, str]:
    """The columns of a table whose names are those of fields.

    Raises:
        BadAnnotation: a file or a text has no such column, or a file has two.
    """
    _, header = next(lines(file, delimiter), (1, []))
    media = [name for name in ("video", "image", *NAMES) if name in header]
    if len(media) != 1 or not {"caption", "text", "question"} & set(header):
        raise BadAnnotation(
            file,
            1,
            f"need one column video, image, {' or '.join(NAMES)}, and a column caption, text or "
            f"question, got {', '.join(header) or 'nothing'}; name others with --format csv "
            "--columns video=...,caption=...",
        )
    return {name: name for name in (*FIELDS, *NAMES, "text") if name in header}


def webvid(file: Path) -> Iterator[Row]:
    """WebVid: CSV with `videoid`, `name` (the caption) and `page_dir`.

    Rows without a name are skipped with a warning. Media: {page_dir}/{videoid}.mp4 in the folder
    `videos`.
    """
    skipped = 0

    def named() -> Iterator[tuple[int, dict[str, str]]]:
        nonlocal skipped
        for line, row in table(file, ("videoid", "page_dir", "name")):
            if row["name"].strip():
                yield line, row
            else:
                skipped += 1

    def row(values: dict[str, str]) -> Row:
        name = text_field(values, "videoid")
        media = f"{text_field(values, 'page_dir')}/{name}.mp4"
        return Row(media, id=name, captions=[values["name"]])

    yield from checked(file, named(), row)
    if skipped:
        warnings.warn(f"{file}: {skipped} rows without a name are skipped", stacklevel=2)


def cc3m(file: Path) -> Iterator[Row]:
    """Conceptual Captions: TSV of caption and URL, without a header.

    Media: the decimal CRC-32 of the URL, as stored by Frozen in Time.
    """
    for line, row in lines(file, "\t", csv.QUOTE_NONE):
        if len(row) != 2 or not row[0].strip():
            raise BadAnnotation(file, line, f"need caption <tab> url, got {len(row)} columns")
        yield Row(str(zlib.crc32(row[1].encode())), kind="image", captions=[row[0]])


def msrvtt(file: Path, split: str | None = None, ids: Path | None = None) -> Iterator[Row]:
    """MSR-VTT: the original JSON, Frozen in Time's JSON, or the 1k-A test set (CSV).

    Original: {"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}.
    Frozen: {"annotations": [{"image_id", "caption"}]}. 1k-A: `key,vid_key,video_id,sentence`.
    Media: {video_id}.mp4.

    Args:
        file: the annotations.
        split: keep only the videos of this split of the original JSON: train, validate or test.
        ids: keep only the videos in the column `video_id` of this CSV, e.g. MSRVTT_train.9k.csv.
    """
    if file.suffix == ".csv":
        yield from checked(file, table(file, ("video_id", "sentence")), _pair)
        return
    captions: dict[str, list[str]] = {}
    sentences = ((line, entry) for line, _, entry in members(file, "sentences", "annotations"))
    for video, caption in checked(file, sentences, _sentence):
        captions.setdefault(video, []).append(caption)
    if split is not None:
        videos = ((line, entry) for line, _, entry in members(file, "videos"))
        splits = dict(checked(file, videos, lambda entry: (entry["video_id"], entry.get("split"))))
        if split not in splits.values():
            names = sorted(set(map(str, splits.values())))
            raise ValueError(f"{file}: need a split among {', '.join(names)}, got {split!r}")
        without = [video for video in captions if video not in splits]
        if without:
            raise ValueError(f"{file}: need all captioned videos in videos, {without[0]} is not")
        captions = {video: texts for video, texts in captions.items() if splits[video] == split}
    if ids is not None:
        wanted = [(line, row["video_id"]) for line, row in table(ids, ("video_id",))]
        for line, video in wanted:
            if video not in captions:
                raise BadAnnotation(ids, line, f"{file} has no caption of {video}")
        captions = {video: captions[video] for _, video in wanted}
    for video, texts in captions.items():
        yield Row(f"{video}.mp4", id=video, captions=texts)


def _pair(values: dict[str, str]) -> Row:
    video = text_field(values, "video_id")
    return Row(f"{video}.mp4", id=video, captions=[text_field(values, "sentence")])


def _sentence(entry: dict[str, Any]) -> tuple[str, str]:
    video = "video_id" if "video_id" in entry or "image_id" not in entry else "image_id"
    return text_field(entry, video), text_field(entry, "caption")


def didemo(file: Path) -> Iterator[Row]:
    """DiDeMo: list of {"video", "description"}; descriptions of a video form one paragraph."""
    paragraphs: dict[str, list[str]] = {}
    entries = ((line, entry) for line, _, entry in members(file))
    for video, description in checked(
        file, entries, lambda entry: (text_field(entry, "video"), text_field(entry, "description"))
    ):
        paragraphs.setdefault(video, []).append(description.strip())
    for video, descriptions in paragraphs.items():
        yield Row(video, id=video, captions=[" ".join(descriptions)])


def activitynet(file: Path) -> Iterator[Row]:
    """ActivityNet Captions: {"v_ID": {"sentences": [text, ...]}}, joined to one paragraph.

    Blank sentences are left out. Media: v_ID.mp4, or another suffix that the folder of the media
    has.
    """

    def row(member: tuple[str, dict[str, Any]]) -> Row:
        video, entry = member
        if not video.strip():
            raise ValueError("need an object of videos, with their ids as keys")
        sentences = entry["sentences"]
        if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
            raise ValueError(f"need sentences of {video} as a list of texts, got {sentences!r:.80}")
        paragraph = " ".join(text.strip() for text in sentences if text.strip())
        if not paragraph:
            raise ValueError(f"need sentences of {video}, got {sentences!r:.80}")
        return Row(f"{video}.mp4", id=video, captions=[without_surrogates(paragraph)])

    entries = ((line, (video, entry)) for line, video, entry in members(file))
    return checked(file, entries, row)


def msrvtt_qa(file: Path) -> Iterator[Row]:
    """MSRVTT-QA and MSVD-QA: list of {"question", "answer", "video_id": number, "id"}.

    Media: video{video_id}.mp4.
    """
    entries = ((line, entry) for line, _, entry in members(file))
    return checked(file, entries, _numbered_question)


def _numbered_question(entry: dict[str, Any]) -> Row:
    return Row(
        f"video{name_field(entry, 'video_id')}.mp4",
        id=name_field(entry, "id", ""),
        question=text_field(entry, "question"),
        answer=text_field(entry, "answer"),
    )


def activitynet_qa(file: Path) -> Iterator[Row]:
    """ActivityNet-QA: `*_q.json`, list of {"video_name", "question", "question_id"}.

    The answers are in `*_a.json` beside it: list of {"question_id", "answer"}. Media:
    v_{video_name}.mp4.
    """
    if not file.name.endswith("_q.json"):
        raise ValueError(f"{file}: need the file with the questions, *_q.json")
    answers_file = file.with_name(file.name.replace("_q.json", "_a.json"))
    given = ((line, entry) for line, _, entry in members(answers_file))
    answers: dict[str, str] = {}
    for name, answer in checked(answers_file, given, _answer):
        if answers.setdefault(name, answer) != answer:
            raise ValueError(f"{answers_file}: question {name} has two answers")

    def row(entry: dict[str, Any]) -> Row:
        media = f"v_{name_field(entry, 'video_name')}.mp4"
        question, name = text_field(entry, "question"), name_field(entry, "question_id")
        if name not in answers:
            raise ValueError(f"{answers_file} has no answer to {name}")
        return Row(media, id=name, question=question, answer=answers[name])

    entries = ((line, entry) for line, _, entry in members(file))
    return checked(file, entries, row)


def _answer(entry: dict[str, Any]) -> tuple[str, str]:
    return name_field(entry, "question_id"), name_field(entry, "answer")


def vqa(file: Path) -> Iterator[Row]:
    """VQA on images of COCO: `*OpenEnded_mscoco_SPLIT_questions.json`, with a list "questions".

    It has {"image_id", "question", "question_id"}. The answers are in
    `*mscoco_SPLIT_annotations.json` beside it, in a list "annotations" of {"question_id",
    "answers": [{"answer"}, ...]}. Media: COCO_{SPLIT}_{image_id}.jpg, the number with 12 digits.
    """
    name = re.fullmatch(r"(.*)OpenEnded_mscoco_(\w+)_questions\.json", file.name)
    if name is None:
        raise ValueError(f"{file}: need the file *OpenEnded_mscoco_SPLIT_questions.json")
    split = name[2]
    answers_file = file.with_name(f"{name[1]}mscoco_{split}_annotations.json")
    given = ((line, entry) for line, _, entry in members(answers_file, "annotations"))
    answers = dict(checked(answers_file, given, _answers_of_people))

    def row(entry: dict[str, Any]) -> Row:
        image, name = entry["image_id"], name_field(entry, "question_id")
        if type(image) is not int or image < 0:
            raise ValueError(f"need image_id as a number, got {image!r:.80}")
        if name not in answers:
            raise ValueError(f"{answers_file} has no answers to {name}")
        answer, several = _answers({"answer": answers[name]})
        question, media = text_field(entry, "question"), f"COCO_{split}_{image:012d}.jpg"
        return Row(media, "image", name, question=question, answer=answer, answers=several)

    entries = ((line, entry) for line, _, entry in members(file, "questions"))
    return checked(file, entries, row)


def _answers_of_people(entry: dict[str, Any]) -> tuple[str, list[str]]:
    answers = entry["answers"]
    if not isinstance(answers, list) or not all(isinstance(one, dict) for one in answers):
        raise ValueError(f"need answers as a list of objects, got {answers!r:.80}")
    return name_field(entry, "question_id"), [text_field(one, "answer") for one in answers]


def nlvr2(file: Path) -> Iterator[Row]:
    """NLVR2: one {"identifier", "sentence", "label": "True" or "False"} a line, about two images.

    Media: the identifier without its last number, and -img0.png and -img1.png; with "directory", as
    in the training set, in this folder.
    """

    def row(entry: dict[str, Any]) -> Row:
        name = text_field(entry, "identifier")
        folder = name_field(entry, "directory", "")
        stem = f"{folder}/" * bool(folder) + name.rpartition("-")[0]
        fields = {"second": f"{stem}-img1.png", "label": entry["label"]}
        captions = [text_field(entry, "sentence")]
        second, label = _second(fields, captions)
        return Row(f"{stem}-img0.png", "image", name, captions, second=second, label=label)

    return checked(file, json_lines(file), row)


FORMATS: dict[str, Callable[..., Iterator[Row]]] = {
    "common": common,
    "csv": columns,
    "webvid": webvid,
    "cc3m": cc3m,
    "msrvtt": msrvtt,
    "didemo": didemo,
    "activitynet": activitynet,
    "msrvtt-qa": msrvtt_qa,
    "activitynet-qa": activitynet_qa,
    "nlvr2": nlvr2,
    "vqa": vqa,
}
