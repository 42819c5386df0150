"""Answers of several people: the accuracy of VQA, soft targets, training, evaluation and data."""

import json
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from clips import write_video
from test_data_annotations import put, rows
from test_evaluation import QUIET, Stored, tiny
from test_finetune import SMAUG
from test_finetune import TINY as RUN

from vidl import models
from vidl.cli import main
from vidl.data import annotations, commands, sharding
from vidl.data.formats import Row
from vidl.evaluation import question_answering, vqa_accuracy
from vidl.models.vqa import normalised, shares, soft_scores
from vidl.training import Config, open_run, pretrain, runs

PEOPLE = ["Two", "2.", "two dogs", "2", "the two", "three", "yes", "dogs", "none", "2"]


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("A Red  Ball.", "red ball"),
        ("u.s.", "us"),
        ("2.50", "2.50"),
        (".5 cm.", ".5 cm"),
        ("no.5", "no5"),
        ("100,978", "100978"),
        ("red,blue", "red blue"),
        ("red/blue-green!", "red blue green"),
        ("3:30 PM", "3:30 pm"),
        ("the girl's", "girl's"),
        ("the girl\u2019s \u201cbag\u201d", "girl's bag"),
        ("Dont know", "don't know"),
        ("its ill were", "its ill were"),
        ("ten of twenty", "10 of 20"),
        ("None", "0"),
        ("50% & #1", "50% & #1"),
        ("$5+1", "$5 1"),
        ("an", ""),
        ("?", ""),
        ("", ""),
        ("\tnew\nline ", "new line"),
        ("\u00dcber \u732b", "\u00fcber \u732b"),
    ],
)
def test_answers_are_normalised_as_published(answer, expected):
    assert normalised(answer) == expected
    assert normalised(expected) == expected  # once is enough


def leave_one_out(answer, answers):
    """The definition: the mean of min(1, matches / 3) over all subsets with one person less."""
    subsets = list(combinations([normalised(a) for a in answers], len(answers) - 1))
    return sum(min(1, s.count(normalised(answer)) / 3) for s in subsets) / len(subsets)


@pytest.mark.parametrize("people", [4, 5, 9, 10, 12])
def test_the_accuracy_is_the_mean_over_all_subsets_of_people(people):
    for right in range(people + 1):
        answers = ["right"] * right + [f"wrong {n}" for n in range(people - right)]
        expected = leave_one_out("right", answers)
        assert vqa_accuracy("The right!", answers[::-1]) == pytest.approx(expected)
    assert vqa_accuracy("wrong", ["right"] * people) == 0


def test_the_accuracy_of_ten_people_as_published():
    scores = [vqa_accuracy("a cat", ["cat"] * n + ["dog"] * (10 - n)) for n in range(11)]
    assert scores == pytest.approx([0, 0.3, 0.6, 0.9] + [1] * 7)
    assert vqa_accuracy("2", PEOPLE) == 1 and vqa_accuracy("zero", PEOPLE) == pytest.approx(0.3)
    assert soft_scores(PEOPLE) == pytest.approx(
        {"2": 1, "2 dogs": 0.3, "3": 0.3, "yes": 0.3, "dogs": 0.3, "0": 0.3}
    )
    assert shares(PEOPLE) == {"2": 0.5, "2 dogs": 0.1, "3": 0.1, "yes": 0.1, "dogs": 0.1, "0": 0.1}


def test_few_people_count_by_their_share():
    assert vqa_accuracy("yes", ["yes"]) == vqa_accuracy("yes", ["yes", "Yes."]) == 1
    assert vqa_accuracy("yes", ["yes", "no"]) == 0.5
    assert vqa_accuracy("yes", ["yes", "no", "yes"]) == pytest.approx(2 / 3)


def test_wrong_answers_of_people():
    for wrong in ("yes", None, 3, [1], ["yes", None], {"yes"}, b"yes"):
        with pytest.raises(TypeError, match="need answers as a list of str"):
            vqa_accuracy("yes", wrong)
    with pytest.raises(ValueError, match="need answers of at least one person"):
        vqa_accuracy("yes", [])
    with pytest.raises(TypeError, match="need answer as str, got None"):
        vqa_accuracy(None, ["yes"])
    model = models.Answering(tiny("smaug"), ["yes"])
    for call in (model.targets, lambda x: models.frequent_answers(x, 1)):
        with pytest.raises(ValueError, match="need answers of at least one person"):
            call([[]])
        with pytest.raises(TypeError, match="need answers as a list of str"):
            call([["yes", 3]])
        with pytest.raises(TypeError, match="need answers as a list of str or None"):
            call([{"yes": 1}])


def test_targets_and_frequent_answers():
    known = models.frequent_answers([PEOPLE, "Two", "Two", "Two", None, ["two", "2"]], 3)
    assert known == ["2", "Two", "0"]  # by 7 people, in 3 rows of one answer, by 1
    model = models.Answering(tiny("smaug"), [*known, "Dogs", "dogs"])
    given = [PEOPLE, "Two", "dogs", "cats", None, ["cats", "cow"], ("dogs", "yes")]
    expected = torch.zeros(7, 5)
    # As normalised the answer is the first of those that are equal; "Two" is "2".
    expected[0, [0, 2, 3]] = torch.tensor([1, 0.3, 0.3])
    expected[1, 1] = expected[2, 4] = 1
    expected[6, 3] = 0.5
    torch.testing.assert_close(model.targets(given), expected)
    assert [model.knows(answer) for answer in given] == expected.any(1).tolist()


def batch_of(model, count):
    inputs = model.recipe.example(count, 6)
    return inputs | {"ids": inputs["ids"] % 100}


def test_the_classifier_learns_soft_scores():
    torch.manual_seed(0)
    model = models.Answering(tiny("smaug", dropout=0.0), ["2", "dogs", "yes"])
    inputs, targets = batch_of(model, 4), torch.zeros(4, 3)
    targets[0], targets[2, 1] = torch.tensor([0.9, 0.3, 0.0]), 0.6
    losses = model(**inputs, answers=targets)
    mask = model.recipe.visual_mask(inputs["samples"], 0)
    words = inputs["attention_mask"]
    text = model.encode_text(inputs["ids"], words)
    pooled = model.model.join(model.encode_clips(inputs["video"], mask), text, words).pooled
    p = model.head(pooled).sigmoid()
    entropy = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1)
    expected = (entropy[0] + entropy[2]) / 2  # the others have no known answer
    torch.testing.assert_close(losses["loss"], expected)
    none = model(**inputs, answers=torch.zeros(4, 3))["loss"]
    none.backward()
    assert none == 0 and not any(p.grad.any() for p in model.head.parameters())
    for wrong in (torch.zeros(4, 2), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match="answers"):
            model(**inputs, answers=wrong)
    for wrong in (torch.zeros(4), torch.zeros(4, 3, dtype=torch.bool)):
        with pytest.raises(TypeError, match="answers"):
            model(**inputs, answers=wrong)


def test_views_of_a_clip_share_their_soft_loss():
    torch.manual_seed(0)
    sizes = dict(image_size=32, text_width=64, text_heads=2, text_layers=1, dropout=0.0)
    clipbert = models.create("clipbert", "tiny", **sizes)
    model = models.Answering(clipbert, ["2", "dogs"])
    inputs = batch_of(model, 3)
    targets = torch.tensor([[0.3, 0.9], [1.0, 0.0], [0.6, 0.6]])
    loss = model(**inputs, answers=targets)["loss"]
    mask = model.recipe.visual_mask(inputs["samples"], 0, inputs["video"].shape[2])
    words = inputs["attention_mask"]
    text = model.encode_text(inputs["ids"], words)
    clips = model.encode_clips(inputs["video"], mask)
    logits = model.answer(clips, text, words)  # of both views, combined
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 3
    torch.testing.assert_close(loss, expected)


class Several(Stored):
    """Noise with the answers of several people to every second question."""

    def __init__(self, count=8, **options):
        people = ["red", "Red.", "a red", "blue", "dark red", *["red"] * 5]
        questions = ("who sings", "what runs")
        rows = [
            Row(f"{n // 2}.mp4", question=questions[n % 2], answers=people)
            if n % 2
            else Row(f"{n // 2}.mp4", question=questions[n % 2], answer="red")
            for n in range(count)
        ]
        super().__init__(rows, **options)


@pytest.mark.parametrize("only, right", [("Red", 4.0), ("blue", 4 * 0.3), ("green", 0.0)])
def test_evaluation_with_one_and_with_several_answers(only, right):
    model = models.Answering(tiny("smaug"), [only])
    result = question_answering(model, Several(), QUIET)
    # "Red" is not the answer "red" of four rows, letter by letter, but that of ten people.
    assert (result.questions, result.soft) == (8, 4) and result.right == pytest.approx(right)
    assert result.answerable == (0 if only == "green" else 4)
    stored = json.loads(result.to_json())
    assert stored["soft"] == 4 and stored["accuracy"] == pytest.approx(12.5 * right)
    assert f"8 questions, {right:.1f} correct: {12.5 * right:.1f} %" in str(result)
    assert "4 have answers of several people" in str(result)
    broken = question_answering(model, Several(broken=["0.mp4"]), QUIET)
    assert broken.right == pytest.approx(0.75 * right) and list(broken.broken) == ["0.mp4"]
    with pytest.raises(ValueError, match="need a question and an answer in each row"):
        question_answering(model, Stored([Row("1.mp4", question="why")]), QUIET)


def test_the_answer_of_one_person_counts_as_before():
    data = Stored([row for row in Several().rows if row.answer])
    result = question_answering(models.Answering(tiny("smaug"), ["red"]), data, QUIET)
    assert (result.right, result.soft) == (4, 0) and type(result.right) is int
    assert str(result) == "4 questions, 4 correct: 100.0 %"


def test_rows_of_several_people(tmp_path):
    entries = [
        {"video": "a.mp4", "question": "what?", "answer": ["red", "red", "blue"]},
        {"video": "b.mp4", "question": "what?", "answer": ["red"]},
        {"video": "c.mp4", "question": "what?", "answer": "red"},
    ]
    expected = [
        Row("a.mp4", question="what?", answers=["red", "red", "blue"]),
        Row("b.mp4", question="what?", answer="red"),
        Row("c.mp4", question="what?", answer="red"),
    ]
    file = put(tmp_path, "asked.json", entries)
    assert rows("common", file) == expected
    assert [row.given for row in expected] == [("red", "red", "blue"), "red", "red"]
    assert Row("a.mp4").given is None
    annotations.convert(file, tmp_path / "asked.arrow")
    table = annotations.Annotations([(tmp_path / "asked.arrow", "")])
    assert list(table) == expected
    assert commands._texts(table[0]) == "a.mp4: what? - red, blue"
    assert commands._texts(table[1]) == "b.mp4: what? - red"
    facts = [json.loads(sharding._facts(row)) for row in expected]
    assert [fact["answer"] for fact in facts] == [["red", "red", "blue"], "red", "red"]
    for wrong, message in (
        ([], r"need answer as a text or a list of texts, got \[\]"),
        (["red", 3], r"need answer\[1\] as a non-blank text, got 3"),
        (["red", " "], r"need answer\[1\] as a non-blank text, got ' '"),
        ({"red": 1}, "need answer as a non-blank text or a list of them"),
    ):
        file = put(tmp_path, "wrong.json", [entries[0] | {"answer": wrong}])
        with pytest.raises(ValueError, match=rf"wrong.json:\d+: {message}"):
            rows("common", file)


@pytest.mark.parametrize("version", ["", "v2_"])
def test_vqa(tmp_path, version):
    asked = {"image_id": 9, "question": "What is it?", "question_id": 9000}
    answer = {"answer_confidence": "yes", "answer_id": 1}
    people = ["a cat", "cat"]
    given = {
        "question_id": 9000, "image_id": 9,
        "answers": [answer | {"answer": text} for text in people],
    }  # fmt: skip
    file = put(
        tmp_path,
        f"{version}OpenEnded_mscoco_val2014_questions.json",
        {"info": {}, "questions": [asked]},
    )
    answers = put(tmp_path, f"{version}mscoco_val2014_annotations.json", {"annotations": [given]})
    media = "COCO_val2014_000000000009.jpg"
    expected = Row(media, "image", "9000", question="What is it?", answers=people)
    assert rows("vqa", file) == [expected]
    for wrong, message in (
        (given | {"question_id": 1}, r"questions.json:\d+: .*has no answers to 9000"),
        (given | {"answers": []}, r"questions.json:\d+: need answer as a text .*got \[\]"),
        (given | {"answers": ["cat"]}, r"annotations.json:\d+: need answers as a list of objects"),
        (given | {"answers": [{"answer": 2}]}, r"annotations.json:\d+: need answer as a non-blank"),
        ({"question_id": 9000}, r"annotations.json:\d+: missing key 'answers'"),
    ):
        answers.write_text(json.dumps({"annotations": [wrong]}))
        with pytest.raises(ValueError, match=message):
            rows("vqa", file)
    answers.write_text(json.dumps({"annotations": [given]}))
    file.write_text(json.dumps({"questions": [asked | {"image_id": "9"}]}))
    with pytest.raises(ValueError, match="need image_id as a number, got '9'"):
        rows("vqa", file)
    with pytest.raises(ValueError, match="need the file .*OpenEnded_mscoco_SPLIT_questions.json"):
        rows("vqa", answers)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smaug") / "run"
    pretrain(Config.read(None, [*RUN, *SMAUG, "model.name=smaug", f"run.folder={folder}"]))
    return folder


@pytest.mark.parametrize("form", runs.FORMS)
def test_finetuning_with_the_answers_of_several_people(pretrained, form, tmp_path, capsys):
    pytest.importorskip("av")
    people = (["red", "Red.", "rouge", "red", "red"], ["blue", "blue", "green"], "red")
    entries = []
    for name, answer in zip("abc", people, strict=True):
        write_video(tmp_path / f"{name}.mp4", 6, size=(48, 48))
        entries.append({"video": f"{name}.mp4", "question": "which colour", "answer": answer})
    file, folder = put(tmp_path, "asked.json", entries), tmp_path / "qa"
    command = [
        "finetune", "qa", "--weights", str(pretrained), "--answers", "3", "--form", form,
        f"run.folder={folder}", "data.source=clips", f"data.files=[{file}]", "data.batch_size=3",
        f"evaluation.files=[{file}]", "schedule.steps=2", "run.save_every=1", "--layers", "1",
        "--top", "7", "optimizer.lr=0.01", "schedule.warmup=0",
    ]  # fmt: skip
    assert main(command) == 0
    stored = json.loads((folder / "answers.json").read_text())
    assert stored["form"] == {"name": form, "layers": 1, "top": 7, "soft": True}
    assert stored["answers"] == ["red", "blue", "green"]
    # It resumes: the same second step, bit for bit.
    before = open_run(folder).model.state_dict()
    last = folder / "checkpoints/step-00000002"
    last.rename(tmp_path / "last")
    assert main(command) == 0
    after = open_run(folder).model.state_dict()
    assert not [name for name, x in before.items() if not torch.equal(x, after[name])]
    capsys.readouterr()
    result = tmp_path / "qa.json"
    arguments = ["--weights", str(folder), "--data", str(file), "--json", str(result)]
    assert main(["eval", "qa", *arguments]) == 0
    shown = json.loads(result.read_text())
    assert (shown["questions"], shown["answerable"], shown["soft"]) == (3, 3, 2)
    assert 0 <= shown["right"] <= 3
    assert "2 have answers of several people" in capsys.readouterr().out
    stored["form"]["soft"] = "yes"
    (folder / "answers.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="need an object of form"):
        open_run(folder)
