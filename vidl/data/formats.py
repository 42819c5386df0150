"""Readers of annotation formats; each docstring describes its format."""

import csv
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One annotation of a video or image.

    Retrieval: `captions`. Open-ended questions: `question` and `answer`. Multiple choice: `options`
    with the index `correct`, and optionally a `question`.
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

    def __post_init__(self) -> None:
        for name in ("captions", "options"):  # tuples are hashable
            object.__setattr__(self, name, tuple(getattr(self, name)))


class BadAnnotation(ValueError):
    """An invalid annotation: file, line and what is needed."""

    def __init__(self, file: str | Path, line: int, problem: str):
        super().__init__(f"{file}:{line}: {problem}")


def without_surrogates(text: str) -> str:
    """A text in which halves of characters, as in "\\ud83d", are replaced: UTF-8 has none."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def common(file: Path) -> Iterator[Row]:
    """The JSON format of Singularity, VindLU and UMT; or one such object per line (.jsonl).

    A list of {"video" or "image": file, "caption": text or [text, ...]}; for questions
    {..., "question": text, "answer": text or [text]}; for multiple choice {..., "caption":
    [text, ...], "answer": index} or {..., "question": text, "options": [text, ...], "answer":
    index}. Optional: "id" or "question_id", and "start" and "end" in seconds.
    """
    for line, entry in _entries(file):
        try:
            yield _common_row(entry)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            problem = f"missing key {error}" if isinstance(error, KeyError) else str(error)
            raise BadAnnotation(file, line, problem) from None


def _common_row(entry: dict[str, Any]) -> Row:
    kind = "image" if "image" in entry else "video"
    media, captions, answer = entry[kind], entry.get("caption", []), entry.get("answer")
    if isinstance(media, list):  # COCO lists several images of the same caption
        media = media[0]
    captions = [captions] if isinstance(captions, str) else list(captions)
    options: list[str] = list(entry.get("options", []))
    if isinstance(answer, int) and not options:
        captions, options = [], captions
    correct = None
    if options:
        correct, answer = answer, None
        if not isinstance(correct, int) or not 0 <= correct < len(options):
            raise ValueError(f"need answer as an index into {len(options)} options, got {correct}")
    if isinstance(answer, list):
        answer = answer[0]
    texts = [media, *captions, *options]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"need non-empty texts, got {texts}")
    if not captions and not options and answer is None:
        raise KeyError("caption")
    return Row(
        media=media,
        kind=kind,
        id=str(entry.get("question_id", entry.get("id", ""))),
        captions=captions,
        question=entry.get("question"),
        answer=answer,
        options=options,
        correct=correct,
        start=entry.get("start"),
        end=entry.get("end"),
    )


def webvid(file: Path) -> Iterator[Row]:
    """WebVid: CSV with `videoid`, `name` (the caption) and `page_dir`.

    Rows without a name are skipped. Media: {page_dir}/{videoid}.mp4 in the folder `videos`.
    """
    for _, row in _table(file, ("videoid", "page_dir", "name")):
        if row["name"].strip():
            media = f"{row['page_dir']}/{row['videoid']}.mp4"
            yield Row(media, id=row["videoid"], captions=[row["name"]])


def cc3m(file: Path) -> Iterator[Row]:
    """Conceptual Captions: TSV of caption and URL, without a header.

    Media: the decimal CRC-32 of the URL, as stored by Frozen in Time.
    """
    with open(file, encoding="utf-8", newline="") as text:
        for line, row in enumerate(csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
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
        for _, row in _table(file, ("video_id", "sentence")):
            yield Row(f"{row['video_id']}.mp4", id=row["video_id"], captions=[row["sentence"]])
        return
    name = "sentences" if _has(file, "sentences") else "annotations"
    captions: dict[str, list[str]] = {}
    for line, _, sentence in _members(file, name):
        video = sentence.get("video_id", sentence.get("image_id"))
        if not video or not sentence.get("caption"):
            raise BadAnnotation(file, line, f"need video_id and caption, got {sentence}")
        captions.setdefault(video, []).append(sentence["caption"])
    if split is not None:
        splits = {video["video_id"]: video.get("split") for _, _, video in _members(file, "videos")}
        if split not in splits.values():
            names = sorted(set(map(str, splits.values())))
            raise ValueError(f"{file}: need a split among {', '.join(names)}, got {split!r}")
        captions = {video: texts for video, texts in captions.items() if splits.get(video) == split}
    if ids is not None:
        wanted = [(line, row["video_id"]) for line, row in _table(ids, ("video_id",))]
        for line, video in wanted:
            if video not in captions:
                raise BadAnnotation(ids, line, f"{file} has no caption of {video}")
        captions = {video: captions[video] for _, video in wanted}
    for video, texts in captions.items():
        yield Row(f"{video}.mp4", id=video, captions=texts)


def didemo(file: Path) -> Iterator[Row]:
    """DiDeMo: list of {"video", "description"}; descriptions of a video form one paragraph."""
    paragraphs: dict[str, list[str]] = {}
    for line, _, entry in _members(file):
        if not entry.get("video") or not str(entry.get("description", "")).strip():
            raise BadAnnotation(file, line, f"need video and description, got {entry}")
        paragraphs.setdefault(entry["video"], []).append(entry["description"].strip())
    for video, descriptions in paragraphs.items():
        yield Row(video, id=video, captions=[" ".join(descriptions)])


def activitynet(file: Path) -> Iterator[Row]:
    """ActivityNet Captions: {"v_ID": {"sentences": [text, ...]}}, joined to one paragraph.

    Media: v_ID.mp4, or another suffix that the folder of the media has.
    """
    for line, video, entry in _members(file):
        sentences = [text.strip() for text in entry.get("sentences", ()) if text.strip()]
        if not sentences:
            raise BadAnnotation(file, line, f"need sentences of {video}, got {entry}")
        yield Row(f"{video}.mp4", id=video, captions=[" ".join(sentences)])


def msrvtt_qa(file: Path) -> Iterator[Row]:
    """MSRVTT-QA and MSVD-QA: list of {"question", "answer", "video_id": number, "id"}.

    Media: video{video_id}.mp4.
    """
    for line, _, entry in _members(file):
        missing = {"question", "answer", "video_id"} - entry.keys()
        if missing:
            raise BadAnnotation(file, line, f"need {', '.join(sorted(missing))}, got {entry}")
        media, name = f"video{entry['video_id']}.mp4", str(entry.get("id", ""))
        yield Row(media, id=name, question=entry["question"], answer=entry["answer"])


def activitynet_qa(file: Path) -> Iterator[Row]:
    """ActivityNet-QA: `*_q.json`, list of {"video_name", "question", "question_id"}.

    The answers are in `*_a.json` beside it: list of {"question_id", "answer"}. Media:
    v_{video_name}.mp4.
    """
    if not file.name.endswith("_q.json"):
        raise ValueError(f"{file}: need the file with the questions, *_q.json")
    answers_file = file.with_name(file.name.replace("_q.json", "_a.json"))
    answers = {entry["question_id"]: entry["answer"] for _, _, entry in _members(answers_file)}
    for line, _, entry in _members(file):
        missing = {"video_name", "question", "question_id"} - entry.keys()
        if missing:
            raise BadAnnotation(file, line, f"need {', '.join(sorted(missing))}, got {entry}")
        name = entry["question_id"]
        if name not in answers:
            raise BadAnnotation(file, line, f"{answers_file} has no answer to {name}")
        media = f"v_{entry['video_name']}.mp4"
        yield Row(media, id=name, question=entry["question"], answer=str(answers[name]))


FORMATS: dict[str, Callable[..., Iterator[Row]]] = {
    "common": common,
    "webvid": webvid,
    "cc3m": cc3m,
    "msrvtt": msrvtt,
    "didemo": didemo,
    "activitynet": activitynet,
    "msrvtt-qa": msrvtt_qa,
    "activitynet-qa": activitynet_qa,
}


def _table(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values of each row of a CSV file with a header."""
    with open(file, encoding="utf-8", newline="") as text:
        reader = csv.DictReader(text)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            given = ", ".join(reader.fieldnames or ()) or "nothing"
            raise BadAnnotation(file, 1, f"need columns {', '.join(columns)}, got {given}")
        for row in reader:
            if any(row[name] is None for name in columns):
                raise BadAnnotation(
                    file, reader.line_num, f"need {len(columns)} columns, got {row}"
                )
            yield reader.line_num, row


def _entries(file: Path) -> Iterator[tuple[int, Any]]:
    """Line number and object of each entry of a JSON list, or of a file with one object a line."""
    if file.suffix != ".jsonl":
        yield from ((line, entry) for line, _, entry in _members(file))
        return
    with open(file, encoding="utf-8") as text:
        for number, line in enumerate(text, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise BadAnnotation(file, number, error.msg) from None


def _has(file: Path, name: str) -> bool:
    return re.search(rf'"{name}"\s*:\s*\[', file.read_text(encoding="utf-8")) is not None


def _members(file: Path, name: str | None = None) -> Iterator[tuple[int, str, Any]]:
    """Line, key and value of each member of a JSON list or object, parsed one by one.

    Args:
        file: a JSON file.
        name: key of the list; None: the top level is the list or object.
    """
    text = file.read_text(encoding="utf-8")
    at = 0
    if name is not None:
        match = re.search(rf'"{name}"\s*:\s*(?=\[)', text)
        if match is None:
            raise BadAnnotation(file, 1, f"need a list named {name!r}")
        at = match.end()
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")

    def skip(at: int) -> int:
        return blank.match(text, at).end()  # type: ignore[union-attr]  # it always matches

    at = skip(at)
    opening = text[at : at + 1]
    if opening not in ("[", "{"):
        raise BadAnnotation(file, 1, f"need a JSON list or object, got {text[at : at + 20]!r}")
    closing = "]" if opening == "[" else "}"
    line, counted, at = text.count("\n", 0, at) + 1, at, skip(at + 1)
    try:
        while text[at : at + 1] != closing:
            key = ""
            if opening == "{":
                key, at = decoder.raw_decode(text, at)
                at = skip(skip(at) + 1)  # the colon
            line, counted = line + text.count("\n", counted, at), at
            value, at = decoder.raw_decode(text, at)
            if name is not None or opening == "{" or isinstance(value, dict):
                yield line, key, value
            else:
                raise BadAnnotation(file, line, f"need an object, got {value!r:.40}")
            at = skip(at)
            if text[at : at + 1] not in (",", closing):
                raise json.JSONDecodeError(f"need , or {closing}", text, at)
            at = skip(at + 1) if text[at] == "," else at
    except json.JSONDecodeError as error:
        raise BadAnnotation(file, error.lineno, error.msg) from None
