"""Clips of moving shapes, drawn on the fly, whose captions name colour, shape and motion.

Clips for training and retrieval without a file. Every motion comes with its reverse, and shapes are
put anywhere: the frames of a clip without their order do not tell the two apart, nor does one
frame. A model that ignores time cannot.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from vidl.data.dataset import ClipSet, Sample
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
# In pairs, each the reverse of the other.
MOTIONS = (
    *("moves left", "moves right", "moves up", "moves down"),
    *("moves up and left", "moves down and right", "moves up and right", "moves down and left"),
    *("circles clockwise", "circles counterclockwise", "grows", "shrinks"),
)
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPLITS = ("train", "val", "test")
DIFFICULTIES = (1, 2, 3)
REACH = 0.4  # how far a shape moves, of the frame's side


@dataclass(frozen=True)
class Actor:
    """One shape of a clip and what it does."""

    colour: str
    shape: str
    motions: tuple[str, ...]  # one after the other

    @property
    def text(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} {', then '.join(self.motions)}"


class MovingShapes(ClipSet):
    """Moving shapes and captions such as "a red circle moves left".

    difficulty 1: one shape, one motion: 12 motions. 2: one shape, one motion after the other: 132
    pairs. 3: two shapes, each with a motion of its own: 144 pairs.

    A coloured shape (of 48) is in one split only: 36 in train, 6 in val, 6 in test. Each colour and
    each shape is seen in training, but never a red circle if that is held out. Clips depend on
    (seed, split, index) alone; an epoch is `length` of them.

    Args:
        split: "train", "val" or "test".
        length: how many clips.
        difficulty: 1, 2 or 3.
        frames: of a clip, T.
        size: side of a frame.
        same_looks: captions differ in motion only: all clips show the same coloured shapes, each
            motion once; `length` is then at most the number of motions.
        looks: a batch of training has clips of so many coloured shapes, or of fewer where they do
            not divide; the fewer, the more its clips differ in motion only. 0: of any.
        seed, tokenizer, words: as `ClipSet` has them. The captions of the three splits, and which
            coloured shapes they have, do not depend on the seed.

    Raises:
        ValueError: no such split or difficulty, `length` is too much for `same_looks`, or `looks`
            are fewer than a clip shows.
    """

    def __init__(
        self,
        split: str,
        length: int,
        *,
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
        super().__init__(seed=seed, tokenizer=tokenizer, words=words)
        self.split, self.length, self.difficulty = split, length, difficulty
        self.frames, self.size, self.same_looks = frames, size, same_looks
        self._motions, self._looks = motions(difficulty), coloured_shapes(split)
        self._shown = 2 if difficulty == 3 else 1
        if looks and looks < self._shown:
            raise ValueError(f"need looks >= {self._shown} at difficulty {difficulty}, got {looks}")
        # A clip draws its looks from one of so many groups.
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

    def actors(self, index: int) -> list[Actor]:
        """Who is in a clip, and does what."""
        rng = generator(self.seed, 0, index, f"{self.split} actors")
        motion = rng.choice(self._motions)
        if self.same_looks:
            rng = generator(self.seed, 0, 0, f"{self.split} looks")
            motion = rng.sample(self._motions, self.length)[index]
        looks = rng.sample(self._looks[index % self._groups :: self._groups], self._shown)
        each = [(one,) for one in motion] if self.difficulty == 3 else [motion]
        return [Actor(*look, done) for look, done in zip(looks, each, strict=True)]

    def caption(self, index: int) -> str:
        """The caption of a clip."""
        return " and ".join(actor.text for actor in self.actors(index))

    def row(self, index: int) -> Row:
        return Row(f"moving_shapes/{self.split}/{index}", captions=[self.caption(index)])

    def read(self, key: Key) -> Sample:
        row = self.row(key.index)
        return Sample(
            self._draw(self.actors(key.index), key.index), key.index, row, row.captions[0]
        )

    def _draw(self, actors: list[Actor], index: int) -> Tensor:
        """Clip of the actors in front of a grey that is not quite even: uint8 [T, H, W, 3]."""
        rng = generator(self.seed, 0, index, f"{self.split} places")
        S = self.size
        noise = numpy.random.Generator(numpy.random.PCG64(rng.getrandbits(64)))
        grey = rng.uniform(30, 90) + 12 * noise.standard_normal((S, S), numpy.float32)
        planes = numpy.empty((3, self.frames, S, S), numpy.float32)
        planes[:] = grey
        # two shapes begin in halves of their own, the first one in any
        half = rng.choice((0.0, 0.5))
        for actor in actors:
            place = rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.65)
            if len(actors) > 1:
                place = half + rng.uniform(0.2, 0.3), place[1]
                half = 0.5 - half
            radius, phase = rng.uniform(0.11, 0.15), rng.uniform(0, 2 * math.pi)
            x, y, r = path(actor.motions, self.frames, place, radius, phase)  # [T] each
            cover = _cover(actor.shape, x, y, r, S)  # [T, S, S]
            for plane, value in zip(planes, COLOURS[actor.colour], strict=True):
                plane += cover * (value - plane)
        clip = planes.clip(0, 255).astype(numpy.uint8)
        return torch.from_numpy(numpy.ascontiguousarray(clip.transpose(1, 2, 3, 0)))


def motions(difficulty: int) -> list[tuple[str, ...]]:
    """All that can be done at a difficulty, by one shape or by two."""
    if difficulty == 1:
        return [(motion,) for motion in MOTIONS]
    if difficulty == 2:
        return list(itertools.permutations(MOTIONS, 2))
    return list(itertools.product(MOTIONS, repeat=2))


def coloured_shapes(split: str) -> list[tuple[str, str]]:
    """The (colour, shape) pairs of a split: each colour and each shape is in training."""
    return [
        (colour, shape)
        for (i, colour), (j, shape) in itertools.product(enumerate(COLOURS), enumerate(SHAPES))
        if {0: "test", 1: "val"}.get((i - j) % len(COLOURS), "train") == split
    ]


def path(
    done: Sequence[str], frames: int, place: tuple[float, float], radius: float, phase: float
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Where a shape is in each frame, and how large, of the frame's side: x, y, radius, each [T].

    Every motion is symmetric in time about the middle of its part of the clip, so that it and its
    reverse visit the same places.
    """
    now = (numpy.arange(frames) + 0.5) / frames * len(done)
    x, y = (numpy.full(frames, at) for at in place)
    r = numpy.full(frames, radius)
    for number, motion in enumerate(done):
        progress = (now - number).clip(0, 1) - 0.5  # -1/2 before it, 1/2 after it
        verb, *how = motion.replace(" and ", " ").split()
        if verb == "moves":
            length = REACH / math.sqrt(len(how))
            x += sum(STEPS[way][0] for way in how) * length * progress
            y += sum(STEPS[way][1] for way in how) * length * progress
        elif verb == "circles":
            turn = 2 * math.pi * progress * (1 if how == ["clockwise"] else -1)
            x += REACH / 2 * numpy.cos(phase + turn)
            y += REACH / 2 * numpy.sin(phase + turn)  # y points down: this is clockwise
        else:
            r *= 3.0 ** (progress if verb == "grows" else -progress)
    return x, y, r


def _cover(
    shape: str, x: numpy.ndarray, y: numpy.ndarray, r: numpy.ndarray, S: int
) -> numpy.ndarray:
    """How much of each pixel the shape covers: float32 [T, S, S]."""
    pixels = (numpy.arange(S, dtype=numpy.float32) + 0.5) / S
    x, y, r = (each.astype(numpy.float32)[:, None, None] for each in (x, y, r))
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
    return ((1 - edge) * r * S + 0.5).clip(0, 1)
