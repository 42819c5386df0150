"""Which kernels the current GPU can run: its compute capability and shared memory."""

import functools
import re
from dataclasses import dataclass

import torch

from vidl.kernels.constant import assume_constant

LEAST = (8, 0)  # the tensor-core instructions and asynchronous copies of the kernels


@dataclass(frozen=True)
class Gpu:
    """What the choice of kernels for an NVIDIA GPU depends on."""

    capability: tuple[int, int]
    shared_memory: int  # bytes that a block of threads can have

    def why_not(self, built: str) -> str | None:
        """The reason why this GPU cannot run kernels, or None if it can.

        Args:
            built: the architectures of the kernels in CMake's notation; "": compiled when they run.
        """
        given = "this GPU has {}.{}".format(*self.capability)
        if self.capability < LEAST:
            return f"its kernels need compute capability {LEAST[0]}.{LEAST[1]} or later, {given}"
        if not self.runs(built):
            return f"its kernels were built for compute capability {built}, {given}"
        return None

    def runs(self, architectures: str) -> bool:
        """Whether this GPU runs kernels that were built for these architectures.

        Machine code (80-real, and a part of 80) runs on later GPUs of the same major version, PTX
        (80-virtual, and a part of 80) on all later ones. Both run on one GPU only with its own
        instructions (90a).
        """
        pattern = r"(\d+)(\d)(a?)(-real|-virtual)?"
        parts = [re.fullmatch(pattern, x) for x in architectures.split(";")]
        if None in parts:  # names as "all", or features of one GPU only: let CUDA say
            return True
        return any(
            (least := (int(part[1]), int(part[2]))) <= self.capability
            and (least[0] == self.capability[0] or part[4] != "-real")
            and (least == self.capability or not part[3])
            for part in parts
            if part is not None
        )


def current() -> Gpu | None:
    """The current NVIDIA GPU, or None without one."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return _gpu(torch.cuda.current_device())


@functools.cache
def _gpu(index: int) -> Gpu:
    card = torch.cuda.get_device_properties(index)
    return Gpu((card.major, card.minor), card.shared_memory_per_block_optin)


@assume_constant
def shared_memory() -> int | None:
    """The bytes of shared memory that a block can have on the current NVIDIA GPU, or None."""
    card = current()
    return None if card is None else card.shared_memory
