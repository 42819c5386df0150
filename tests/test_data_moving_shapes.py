"""Moving shapes: the splits, and captions that match the clips."""

import itertools
import re

import numpy
import pytest
import torch

from vidl.data import moving_shapes
from vidl.data.loader import Loader
from vidl.data.moving_shapes import (
    COLOURS,
    MOTIONS,
    SHAPES,
    Actor,
    MovingShapes,
    coloured_shapes,
    path,
    questions,
    words_of_questions,
)
from vidl.data.sampler import EpochSampler, Key
from vidl.data.text import train_tokenizer


def looks(shapes, count):
    return {(actor.colour, actor.shape) for index in range(count) for actor in shapes.actors(index)}


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_held_out_combinations_are_never_seen(difficulty):
    seen = {
        split: looks(MovingShapes(split, 2000, difficulty=difficulty), 2000)
        for split in moving_shapes.SPLITS
    }
    assert seen == {split: set(coloured_shapes(split)) for split in seen}
    assert [len(seen[split]) for split in ("train", "val", "test")] == [36, 6, 6]
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other
    assert {colour for colour, _ in seen["train"]} == set(COLOURS)
    assert {shape for _, shape in seen["train"]} == set(SHAPES)
    train = MovingShapes("train", 2000, difficulty=difficulty)
    done = {actor.motions[0] for index in range(2000) for actor in train.actors(index)}
    assert done == set(MOTIONS)


@pytest.mark.parametrize("difficulty, motions", [(1, 12), (2, 132), (3, 144)])
def test_captions_that_differ_only_in_motion(difficulty, motions):
    count = min(motions, 100)
    shapes = MovingShapes("test", count, difficulty=difficulty, same_looks=True)
    captions = [shapes.caption(index) for index in range(count)]
    assert len(set(captions)) == count
    assert len(looks(shapes, count)) == (2 if difficulty == 3 else 1)
    assert looks(shapes, count) <= set(coloured_shapes("test"))
    other = MovingShapes("test", count, difficulty=difficulty, same_looks=True, seed=1)
    assert captions != [other.caption(index) for index in range(count)]
    with pytest.raises(ValueError, match=f"need 1 to {motions} clips of difficulty {difficulty}"):
        MovingShapes("test", motions + 1, difficulty=difficulty, same_looks=True)


def test_captions():
    patterns = {
        1: r"an? \w+ \w+ (moves|circles|grows|shrinks)",
        2: r"an? \w+ \w+ .*, then (moves|circles|grows|shrinks)",
        3: r"an? \w+ \w+ .* and an? \w+ \w+ (moves|circles|grows|shrinks)",
    }
    for difficulty, pattern in patterns.items():
        shapes = MovingShapes("train", 50, difficulty=difficulty, size=16, frames=2)
        batch = shapes.__getitems__([Key(0, index) for index in range(50)])
        assert batch.text == [shapes.caption(index) for index in range(50)]
        for text, row in zip(batch.text, batch.rows, strict=True):
            assert re.match(pattern, text) and row.captions == (text,)
            assert " a orange" not in f" {text}" and " an red" not in f" {text}"


def place(pictures, colour):
    """Centre and area of the pixels of a colour in each frame."""
    near = abs(pictures.numpy().astype(int) - COLOURS[colour]).sum(-1) < 60  # [T, H, W]
    area = near.sum((1, 2))
    at = numpy.arange(near.shape[1]) + 0.5
    return (near.sum(1) @ at) / area, (near.sum(2) @ at) / area, area


def test_clips_show_what_their_captions_say():
    shapes = MovingShapes("train", 80, size=64, frames=4, seed=2)
    done = set()
    for index in range(80):
        sample = shapes.read(Key(0, index))
        (actor,) = shapes.actors(index)
        assert sample.pictures.shape == (4, 64, 64, 3) and sample.pictures.dtype == torch.uint8
        x, y, area = place(sample.pictures, actor.colour)
        (motion,) = actor.motions
        done.add(motion)
        words = set(motion.split())
        if "moves" in words:
            assert (x[-1] < x[0] - 8) == ("left" in words), (index, motion)
            assert (x[-1] > x[0] + 8) == ("right" in words), (index, motion)
            assert (y[-1] < y[0] - 8) == ("up" in words), (index, motion)
            assert (y[-1] > y[0] + 8) == ("down" in words), (index, motion)
        elif "circles" in words:
            dx, dy = numpy.diff(x), numpy.diff(y)
            turns = dx[:-1] * dy[1:] - dy[:-1] * dx[1:]
            assert all((turn > 0) == ("clockwise" in words) for turn in turns), (index, motion)
        else:
            assert (area[-1] > 1.5 * area[0]) == (motion == "grows")
            assert (area[0] > 1.5 * area[-1]) == (motion == "shrinks")
    assert done == set(MOTIONS)


@pytest.mark.parametrize("forth, back", list(zip(MOTIONS[::2], MOTIONS[1::2], strict=True)))
def test_a_motion_has_its_reverse(forth, back):
    """Both clips have the same frames in reverse order."""
    phase = 0.7
    there = path([forth], 8, (0.5, 0.5), 0.1, phase)
    again = path([back], 8, (0.5, 0.5), 0.1, phase)
    for one, other in zip(there, again, strict=True):
        assert numpy.allclose(one, other[::-1])


def test_clips_depend_on_seed_and_index_only():
    one, other = (MovingShapes("train", 9, size=32, difficulty=3, seed=s) for s in (0, 1))
    clips = [one.read(Key(epoch, 4)).pictures for epoch in (0, 5)]
    assert torch.equal(*clips)
    assert not torch.equal(clips[0], one.read(Key(0, 5)).pictures)
    assert not torch.equal(clips[0], other.read(Key(0, 4)).pictures)
    loader = Loader(one, EpochSampler(one.images(), 3), workers=1)
    batch = next(iter(loader))
    row = batch.index.tolist().index(batch.index.max().item())
    assert torch.equal(
        batch.video[row].movedim(0, -1), one.read(Key(0, batch.index.max().item())).pictures
    )


def answer_from(actors, question):
    """The answer that a clip of these shapes gives, read from the words of the question."""
    words = question.removesuffix("?").split()
    if words[:2] == ["how", "many"]:
        return {1: "one", 2: "two"}[len(actors)]
    if words[:2] == ["which", "shape"]:
        (actor,) = (actor for actor in actors if actor.colour == words[-1])
        return actor.shape
    if words[1] == "colour":
        motion = question.removesuffix("?").partition(" that ")[2]
        (actor,) = (actor for actor in actors if motion in actor.motions)
        return actor.colour
    at = words.index("the")
    (actor,) = (a for a in actors if [a.colour, a.shape] == words[at + 1 : at + 3])
    assert ("at the" in question) == (len(actor.motions) > 1)
    motion = actor.motions[-1 if question.endswith("at the end?") else 0].split()
    verb = {"move": "moves", "turn": "circles"}.get(words[at + 3])
    if verb is None:
        assert words[at + 3 : at + 6] == ["grow", "or", "shrink"]
        return {"grows": "grow", "shrinks": "shrink"}[" ".join(motion)]
    assert motion[0] == verb
    return " ".join(word for word in motion[1:] if word != "and")


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_questions_have_the_answers_of_their_clips(difficulty):
    options = dict(difficulty=difficulty, size=16, frames=2)
    shapes = MovingShapes("train", 600, task="question", **options)
    seen = set()
    for index in range(len(shapes)):
        row = shapes.row(index)
        assert row.answer == answer_from(shapes.actors(index), row.question)
        assert 1 <= len(row.answer.split()) <= 2 and not row.captions and not row.options
        seen.add(" ".join(row.question.split()[:2]))
    assert seen == {"how many", "which shape", "what colour", "which way", "does the"}
    # The clips are those of the captions, and the text of a sample is the question.
    batch, captions = (
        MovingShapes("train", 9, task=task, **options).__getitems__([Key(0, 3), Key(2, 3)])
        for task in ("question", "caption")
    )
    assert torch.equal(batch.video, captions.video)
    assert batch.text == [shapes.row(3).question] * 2


def test_a_question_has_one_answer():
    one, other = Actor("red", "ring", ("grows",)), Actor("red", "cross", ("grows",))
    named = [("which way does the red ring move?", "up left")]
    assert questions([Actor("red", "ring", ("moves up and left",))])[1:2] == named
    asked = dict(questions([one, other]))
    assert asked == {
        "how many shapes are there?": "two",
        "does the red ring grow or shrink?": "grow",
        "does the red cross grow or shrink?": "grow",
    }
    asked = dict(questions([one, Actor("blue", "ring", ("shrinks",))]))
    assert asked["which shape is red?"] == asked["which shape is blue?"] == "ring"
    assert asked["what colour is the shape that shrinks?"] == "blue"
    for difficulty in (1, 2, 3):
        shapes = MovingShapes("val", 200, difficulty=difficulty)
        for index in range(200):
            asked = [question for question, _ in questions(shapes.actors(index))]
            assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_choices_differ_in_motion_only(difficulty):
    shapes = MovingShapes("val", 400, task="choice", difficulty=difficulty)
    captioned = MovingShapes("val", 400, difficulty=difficulty)
    places, backwards = [], 0
    for index in range(len(shapes)):
        row, actors = shapes.row(index), shapes.actors(index)
        assert row.options[row.correct] == captioned.caption(index)
        assert len(set(row.options)) == 4 and row.question is None
        looks = {word for actor in actors for word in (actor.colour, actor.shape)}
        for option in row.options:
            assert set(option.split()) & {*COLOURS, *SHAPES} == looks
            assert all(f"{actor.colour} {actor.shape} " in option for actor in actors)
        reverse = [
            Actor(a.colour, a.shape, tuple(MOTIONS[MOTIONS.index(m) ^ 1] for m in a.motions[::-1]))
            for a in actors
        ]
        backwards += reverse == actors or moving_shapes.caption_of(reverse) in row.options
        places.append(row.correct)
    assert backwards == len(shapes)  # the clip played backwards is never missing
    assert all(60 < places.count(place) < 140 for place in range(4))


def test_rows_of_a_task_depend_on_seed_and_index_only():
    for task in ("question", "choice"):
        one, again, other = (MovingShapes("val", 50, task=task, seed=s) for s in (0, 0, 1))
        rows = [[shapes.row(index) for index in range(50)] for shapes in (one, again, other)]
        assert rows[0] == rows[1] != rows[2]


def test_the_vocabulary_has_the_words_of_questions():
    captions = MovingShapes("train", 400, difficulty=2)
    texts = [captions.caption(index) for index in range(400)]
    tokenizer = train_tokenizer([*words_of_questions(), *texts])
    for difficulty in (1, 2, 3):
        shapes = MovingShapes("train", 200, task="question", difficulty=difficulty)
        for row in map(shapes.row, range(200)):
            for text in (row.question.removesuffix("?"), row.answer):
                count = int(tokenizer([text], 32)[1].sum())
                assert count == 2 + len(text.split()), text  # no word in pieces


@pytest.mark.parametrize("difficulty, looks", [(1, 1), (1, 5), (2, 4), (3, 7)])
def test_looks_limits_the_coloured_shapes_of_a_batch(difficulty, looks):
    shapes = MovingShapes("train", 400, size=8, frames=1, difficulty=difficulty, looks=looks)
    batches, seen = iter(EpochSampler(shapes.kinds(), 8)), set()
    for _ in range(40):
        actors = [actor for key in next(batches) for actor in shapes.actors(key.index)]
        shown = {(actor.colour, actor.shape) for actor in actors}
        assert len(shown) <= looks
        seen |= shown
    assert seen == set(coloured_shapes("train"))


def test_invalid_arguments():
    with pytest.raises(ValueError, match="need a split among train, val, test and a difficulty"):
        MovingShapes("dev", 5)
    with pytest.raises(ValueError, match="got 'test' and 4"):
        MovingShapes("test", 5, difficulty=4)
    with pytest.raises(
        ValueError, match="need a task among caption, question, choice, pair, got 'qa'"
    ):
        MovingShapes("test", 5, task="qa")
    with pytest.raises(ValueError, match="need 1 or more clips of difficulty 1, got 0"):
        MovingShapes("test", 0)
    with pytest.raises(ValueError, match="need looks >= 2 at difficulty 3, got 1"):
        MovingShapes("train", 5, difficulty=3, looks=1)
