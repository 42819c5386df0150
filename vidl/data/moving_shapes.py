"""Synthetic clips of moving shapes whose captions name colour, shape and motion.

For training, retrieval, open questions and multiple choice without files. Every motion has its
reverse, and shapes start anywhere: neither a single frame nor the unordered frames of a clip
distinguish a motion from its reverse. So a model that ignores time fails.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from vidl.data.dataset import ClipSet, Sample, text_of
from vidl.data.formats import Row
from vidl.data.sampler import Key
from vidl.data.text import Tokenizer
from vidl.data.video import generator

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (60, 90, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "orange": (240, 140, 30),
    "cyan": (60, 205, 215),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
# In pairs: a motion and its reverse.
MOTIONS = (
    *("moves left", "moves right", "moves up", "moves down"),
    *("moves up and left", "moves down and right", "moves up and right", "moves down and left"),
    *("circles clockwise", "circles counterclockwise", "grows", "shrinks"),
)
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPLITS = ("train", "val", "test")
DIFFICULTIES = (1, 2, 3)
TASKS = ("caption", "question", "choice", "pair")
OPTIONS = 4  # of a choice
REACH = 0.4  # how far a shape moves, relative to the size of the frame


@dataclass(frozen=True)
class Actor:
    """One shape of a clip and its motions."""

    colour: str
    shape: str
    motions: tuple[str, ...]  # one after the other

    @property
    def text(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} {', then '.join(self.motions)}"


class MovingShapes(ClipSet):
    """Moving shapes and captions such as "a red circle moves left".

    Difficulty 1: one shape with one of 12 motions. 2: one shape with two motions in a row (132
    pairs). 3: two shapes with one motion each (144 pairs).

    Each of the 48 coloured shapes is in one split only: 36 in train, 6 in val, 6 in test. Each
    colour and each shape is seen in training, but not the combinations of the other splits. Clips
    depend on (seed, split, index) only; an epoch has `length` clips.

    The text of a clip is its caption; or a question with an answer of one or two words, such as
    "which way does the red circle move?" and "left" (see `questions`); or a choice of four captions
    of the same coloured shapes, whose motions differ. One of the wrong captions describes the clip
    played backwards, unless that has the same caption. A pair is two clips and a sentence, their
    captions joined by "and"; in about half of the pairs it does not hold: a clip has the reverse of
    one of the motions.

    Args:
        split: "train", "val" or "test".
        length: number of clips.
        task: what the rows have: "caption"; "question", with an answer; "choice", with options; or
            "pair", with a second clip and a label. The clips, the first of a pair, do not depend
            on it.
        difficulty: 1, 2 or 3.
        frames: frames of a clip, T.
        size: height and width of a frame.
        same_looks: captions differ only in the motion: all clips show the same coloured shapes, and
            each motion occurs once; `length` is then at most the number of motions.
        looks: maximal number of different coloured shapes in a training batch; the fewer, the more
            clips differ only in the motion. 0: no limit.
        seed, tokenizer, words: see `ClipSet`. The coloured shapes of the splits do not depend on
            the seed.

    Raises:
        ValueError: unknown split, difficulty or task, `length` is too large for `same_looks`, or
            `looks` is smaller than the number of shapes in a clip.
    """

    def __init__(
        self,
        split: str,
        length: int,
        *,
        task: str = "caption",
        difficulty: int = 1,
        frames: int = 8,
        size: int = 64,
        same_looks: bool = False,
        looks: int = 0,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        words: int = 32,
    ):
        if split not in SPLITS or difficulty not in DIFFICULTIES:
            wanted = f"a split among {', '.join(SPLITS)} and a difficulty of 1, 2 or 3"
            raise ValueError(f"need {wanted}, got {split!r} and {difficulty!r}")
        if task not in TASKS:
            raise ValueError(f"need a task among {', '.join(TASKS)}, got {task!r}")
        super().__init__(seed=seed, tokenizer=tokenizer, words=words)
        self.split, self.length, self.difficulty, self.task = split, length, difficulty, task
        self.frames, self.size, self.same_looks = frames, size, same_looks
        self._motions, self._looks = motions(difficulty), coloured_shapes(split)
        self._shown = 2 if difficulty == 3 else 1
        if looks and looks < self._shown:
            raise ValueError(f"need looks >= {self._shown} at difficulty {difficulty}, got {looks}")
        # number of groups of coloured shapes; a clip draws its shapes from one group
        self._groups = math.ceil(len(self._looks) / looks) if looks else 1
        if not length > 0 or (same_looks and length > len(self._motions)):
            most = f"1 to {len(self._motions)}" if same_looks else "1 or more"
            raise ValueError(f"need {most} clips of difficulty {difficulty}, got {length}")

    def __len__(self) -> int:
        return self.length

    def images(self) -> numpy.ndarray:
        return numpy.zeros(self.length, bool)

    def kinds(self) -> numpy.ndarray:
        return numpy.arange(self.length) % self._groups

    def actors(self, index: int, *, second: bool = False) -> list[Actor]:
        """The shapes of a clip and their motions; `second`: of the second clip of a pair."""
        if second:
            rng = generator(self.seed, 0, index, f"{self.split} second actors")
            looks = rng.sample(self._looks[index % self._groups :: self._groups], self._shown)
            return self._acting(looks, rng.choice(self._motions))
        rng = generator(self.seed, 0, index, f"{self.split} actors")
        motion = rng.choice(self._motions)
        if self.same_looks:
            rng = generator(self.seed, 0, 0, f"{self.split} looks")
            motion = rng.sample(self._motions, self.length)[index]
        looks = rng.sample(self._looks[index % self._groups :: self._groups], self._shown)
        return self._acting(looks, motion)

    def _acting(self, looks: Sequence[tuple[str, str]], motion: tuple[str, ...]) -> list[Actor]:
        """Coloured shapes with a combination of motions from `motions`."""
        parts = [(part,) for part in motion] if self.difficulty == 3 else [motion]
        return [Actor(*look, part) for look, part in zip(looks, parts, strict=True)]

    def caption(self, index: int) -> str:
        """The caption of a clip."""
        return caption_of(self.actors(index))

    def row(self, index: int) -> Row:
        media, actors = f"moving_shapes/{self.split}/{index}", self.actors(index)
        if self.task == "caption":
            return Row(media, captions=[caption_of(actors)])
        rng = generator(self.seed, 0, index, f"{self.split} {self.task}")
        if self.task == "pair":
            return self._pair(index, rng)
        if self.task == "question":
            question, answer = rng.choice(questions(actors))
            return Row(media, question=question, answer=answer)
        options = self._options(actors, rng)
        return Row(media, options=options, correct=options.index(caption_of(actors)))

    def _pair(self, index: int, rng: random.Random) -> Row:
        """Two clips and a sentence about both."""
        clips = [self.actors(index), self.actors(index, second=True)]
        label = rng.random() < 0.5
        if not label:
            actors = rng.choice(clips)
            number = rng.randrange(len(actors))
            actors[number] = _reversed(actors[number], rng)
        names = [f"moving_shapes/{self.split}/{part}{index}" for part in ("", "second/")]
        sentence = " and ".join(map(caption_of, clips))
        return Row(names[0], captions=[sentence], second=names[1], label=label)

    def _options(self, actors: list[Actor], rng: random.Random) -> list[str]:
        """Captions of these shapes, in random order: the right one and wrong ones."""
        looks = [(actor.colour, actor.shape) for actor in actors]
        motion = tuple(part for actor in actors for part in actor.motions)
        backwards = tuple(MOTIONS[MOTIONS.index(part) ^ 1] for part in motion)
        if self.difficulty == 2:
            backwards = backwards[::-1]
        chosen = list(dict.fromkeys([motion, backwards]))
        others = [other for other in self._motions if other not in chosen]
        chosen += rng.sample(others, OPTIONS - len(chosen))
        rng.shuffle(chosen)
        return [caption_of(self._acting(looks, other)) for other in chosen]

    def read(self, key: Key) -> Sample:
        row = self.row(key.index)
        pictures = self._draw(self.actors(key.index), key.index, "places")
        if row.second is not None:
            other = self._draw(self.actors(key.index, second=True), key.index, "second places")
            pictures = torch.cat([pictures, other])
        return Sample(pictures, key.index, row, text_of(row))

    def _draw(self, actors: list[Actor], index: int, purpose: str) -> Tensor:
        """Draw the actors on a noisy grey background: uint8 [T, H, W, 3]."""
        rng = generator(self.seed, 0, index, f"{self.split} {purpose}")
        size = self.size
        noise = numpy.random.Generator(numpy.random.PCG64(rng.getrandbits(64)))
        grey = rng.uniform(30, 90) + 12 * noise.standard_normal((size, size), numpy.float32)
        planes = numpy.empty((3, self.frames, size, size), numpy.float32)
        planes[:] = grey
        # two shapes start in different halves, in random order
        half = rng.choice((0.0, 0.5))
        for actor in actors:
            place = rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.65)
            if len(actors) > 1:
                place = half + rng.uniform(0.2, 0.3), place[1]
                half = 0.5 - half
            radius, phase = rng.uniform(0.11, 0.15), rng.uniform(0, 2 * math.pi)
            x, y, r = path(actor.motions, self.frames, place, radius, phase)  # [T], [T], [T]
            cover = _cover(actor.shape, x, y, r, size)  # [T, size, size]
            for plane, value in zip(planes, COLOURS[actor.colour], strict=True):
                plane += cover * (value - plane)
        clip = planes.clip(0, 255).astype(numpy.uint8)
        return torch.from_numpy(numpy.ascontiguousarray(clip.transpose(1, 2, 3, 0)))


def motions(difficulty: int) -> list[tuple[str, ...]]:
    """All combinations of motions at a difficulty."""
    if difficulty == 1:
        return [(motion,) for motion in MOTIONS]
    if difficulty == 2:
        return list(itertools.permutations(MOTIONS, 2))
    return list(itertools.product(MOTIONS, repeat=2))


def _reversed(actor: Actor, rng: random.Random) -> Actor:
    """The actor with one of its motions reversed."""
    motions, number = list(actor.motions), rng.randrange(len(actor.motions))
    motions[number] = MOTIONS[MOTIONS.index(motions[number]) ^ 1]
    return Actor(actor.colour, actor.shape, tuple(motions))


def caption_of(actors: Sequence[Actor]) -> str:
    """The caption of the shapes of a clip."""
    return " and ".join(actor.text for actor in actors)


def questions(actors: Sequence[Actor]) -> list[tuple[str, str]]:
    """All questions about the shapes of a clip, with their answers: number, motion, shape, colour.

    A shape is named by its colour, or by its motion, only if no other one has the same.
    """
    asked = [("how many shapes are there?", ("one", "two")[len(actors) - 1])]
    for actor in actors:
        others = [other for other in actors if other is not actor]
        asked += [_question_of_motion(actor, number) for number in range(len(actor.motions))]
        if all(other.colour != actor.colour for other in others):
            asked.append((f"which shape is {actor.colour}?", actor.shape))
        for motion in actor.motions:
            if not any(motion in other.motions for other in others):
                asked.append((f"what colour is the shape that {motion}?", actor.colour))
    return asked


def _question_of_motion(actor: Actor, number: int) -> tuple[str, str]:
    """A question about one of the motions of a shape, and its answer."""
    verb, *directions = actor.motions[number].replace(" and ", " ").split()
    name = f"the {actor.colour} {actor.shape}"
    when = (" at the start", " at the end")[number] if len(actor.motions) > 1 else ""
    if verb == "moves":
        return f"which way does {name} move{when}?", " ".join(directions)
    if verb == "circles":
        return f"which way does {name} turn{when}?", directions[0]
    return f"does {name} grow or shrink{when}?", verb.removesuffix("s")


def words_of_questions() -> list[str]:
    """Questions and answers that have every word of `questions`, except colours and shapes."""
    clips = [
        [Actor("red", "circle", pair)] for pair in zip(MOTIONS[::2], MOTIONS[1::2], strict=True)
    ]
    clips.append([Actor("red", "circle", MOTIONS[:1]), Actor("blue", "ring", MOTIONS[1:2])])
    return [text for actors in clips for pair in questions(actors) for text in pair]


def coloured_shapes(split: str) -> list[tuple[str, str]]:
    """The (colour, shape) pairs of a split; train has every colour and every shape."""
    return [
        (colour, shape)
        for (i, colour), (j, shape) in itertools.product(enumerate(COLOURS), enumerate(SHAPES))
        if {0: "test", 1: "val"}.get((i - j) % len(COLOURS), "train") == split
    ]


def path(
    motions: Sequence[str], frames: int, place: tuple[float, float], radius: float, phase: float
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Position and radius of a shape in each frame, relative to the frame size: x, y, r, [T] each.

    Every motion is symmetric in time about the middle of its part of the clip, so a motion and its
    reverse visit the same positions.
    """
    now = (numpy.arange(frames) + 0.5) / frames * len(motions)
    x, y = (numpy.full(frames, start) for start in place)
    r = numpy.full(frames, radius)
    for number, motion in enumerate(motions):
        progress = (now - number).clip(0, 1) - 0.5  # -1/2 before the motion, 1/2 after it
        verb, *directions = motion.replace(" and ", " ").split()
        if verb == "moves":
            length = REACH / math.sqrt(len(directions))
            x += sum(STEPS[step][0] for step in directions) * length * progress
            y += sum(STEPS[step][1] for step in directions) * length * progress
        elif verb == "circles":
            turn = 2 * math.pi * progress * (1 if directions == ["clockwise"] else -1)
            x += REACH / 2 * numpy.cos(phase + turn)
            y += REACH / 2 * numpy.sin(phase + turn)  # y points down: this is clockwise
        else:
            r *= 3.0 ** (progress if verb == "grows" else -progress)
    return x, y, r


def _cover(
    shape: str, x: numpy.ndarray, y: numpy.ndarray, r: numpy.ndarray, size: int
) -> numpy.ndarray:
    """The share of each pixel that the shape covers: float32 [T, size, size]."""
    pixels = (numpy.arange(size, dtype=numpy.float32) + 0.5) / size
    x, y, r = (values.astype(numpy.float32)[:, None, None] for values in (x, y, r))
    dx, dy = (pixels[None, None, :] - x) / r, (pixels[None, :, None] - y) / r
    ax, ay = abs(dx), abs(dy)
    # 1 at the edge, less inside, in units of the radius
    if shape == "circle":
        edge = numpy.hypot(dx, dy)
    elif shape == "square":
        edge = numpy.maximum(ax, ay) + 0.15
    elif shape == "diamond":
        edge = (ax + ay) / 1.1
    elif shape == "triangle":
        edge = numpy.maximum(dy, 0.866 * ax - 0.5 * dy) + 0.45
    elif shape == "cross":
        bars = numpy.maximum(ax - 0.35, ay - 1), numpy.maximum(ax - 1, ay - 0.35)
        edge = 1 + numpy.minimum(*bars)
    else:  # ring
        edge = 1 + abs(numpy.hypot(dx, dy) - 0.75) - 0.25
    return ((1 - edge) * r * size + 0.5).clip(0, 1)
