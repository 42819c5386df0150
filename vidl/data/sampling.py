"""Which instants of a video are read: one of each span, a fixed rate, or half of each half."""

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["spans", "rate", "headtail"]
KINDS: tuple[Kind, ...] = ("spans", "rate", "headtail")


def instants(
    begin: float, end: float, frames: int, rng: random.Random | None = None
) -> list[float]:
    """One instant in each of `frames` equal spans of [begin, end).

    instant i = begin + (i + u_i) (end - begin) / frames,  u_i = 1/2, or uniform in [0, 1)

    Args:
        begin: begin of the clip, in any unit.
        end: end of the clip.
        frames: number of spans, T.
        rng: draws a random instant of each span (`rand`); None: the centres (`middle`).

    Returns:
        T instants, ascending.

    Raises:
        ValueError: frames < 1.

    Source: Temporal Segment Networks, arXiv 1608.00859; `rand` and `middle` of Frozen in Time.
    """
    if frames < 1:
        raise ValueError(f"need at least 1 frame, got {frames}")
    span = end - begin  # divided last, so that instants of frames are exact
    return [begin + (i + (rng.random() if rng else 0.5)) * span / frames for i in range(frames)]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the frames of a sample are chosen.

    - "spans": one frame of each of T equal spans, see `instants`. Views are consecutive parts of
      the video.
    - "rate": frames at a fixed rate, from a random begin in training and from the middle in
      evaluation. Each view has a begin of its own; in evaluation they are evenly spaced. Sources:
      VideoMAE, arXiv 2203.12602 (every 4th frame); ClipBERT, arXiv 2102.06183 (views).
    - "headtail": in training half of the frames are drawn from the first half of the video, and
      half from the second; in evaluation the same as "spans". Source: the code of ALPRO, arXiv
      2112.09583.

    Attributes:
        kind: see above.
        rate: frames per second of "rate".
        views: clips of a sample, each with T / views frames.

    Raises:
        ValueError: unknown kind, a number is out of range, or "headtail" has several views.
    """

    kind: Kind = "spans"
    rate: float = 7.5
    views: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"need sampling among {', '.join(KINDS)}, got {self.kind!r}")
        if not self.rate > 0:
            raise ValueError(f"need rate > 0, got {self.rate}")
        if self.views < 1:
            raise ValueError(f"need views >= 1, got {self.views}")
        if self.kind == "headtail" and self.views > 1:
            raise ValueError(f"need sampling spans or rate for {self.views} views, got headtail")

    def instants(
        self,
        begin: float,
        end: float,
        frames: int,
        rng: random.Random | None = None,
        second: float = 1.0,
    ) -> list[float]:
        """The instants of the frames of a sample, view after view.

        Args:
            begin, end: of the video, in units of 1 / `second` seconds.
            frames: of all views.
            rng: draws random instants; None: as in evaluation.
            second: units of a second.

        Raises:
            ValueError: the video is shorter than a view, or has no equal number of frames of each
                view.
        """
        if self.kind == "spans" or (self.kind == "headtail" and rng is None):
            return instants(begin, end, frames, rng)
        if frames < 1 or frames % self.views:
            raise ValueError(f"need frames as a multiple of {self.views} views, got {frames}")
        if self.kind == "headtail":
            assert rng is not None
            half, head = (end - begin) / 2, frames // 2
            drawn = [rng.random() * half + (number >= head) * half for number in range(frames)]
            return [begin + instant for instant in sorted(drawn)]
        count, step = frames // self.views, second / self.rate
        room = end - begin - (count - 1) * step  # where a view may begin
        if room <= 0:
            raise ValueError(
                f"need a clip longer than {(count - 1) / self.rate:.3g} s, a view of {count} "
                f"frames at data.rate={self.rate:g}, got {(end - begin) / second:.3g} s"
            )
        if rng is None:
            starts = [(view + 0.5) / self.views * room for view in range(self.views)]
        else:
            starts = sorted(rng.random() * room for _ in range(self.views))
        return [begin + start + number * step for start in starts for number in range(count)]


SPANS = Sampling()
