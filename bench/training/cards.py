"""Rates of cards for `vidl estimate`: published ones, and those of the device at hand."""

import dataclasses
import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vidl.bench.measure import hardware


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What a run reaches: parts of the rates of a card, and seconds of the host per operation."""

    matmul: float
    attention: float
    bandwidth: float
    link: float
    host: float


BEST = Efficiency(matmul=0.7, attention=0.5, bandwidth=0.9, link=0.8, host=0.0)
WORST = Efficiency(matmul=0.35, attention=0.1, bandwidth=0.6, link=0.4, host=8e-6)


@dataclasses.dataclass(frozen=True)
class Card:
    """Rates of a device.

    Attributes:
        matmul, attention: FLOP/s in numbers of `number` bytes, without sparsity.
        bandwidth: bytes per second of its memory.
        memory: bytes.
        link: bytes per second to other GPUs of the machine, in one direction.
        source: where the rates are from.
        best, worst: what a run reaches of them.
        waits: whether nothing overlaps: the times of FLOPs, bytes and host are added, as on a CPU.
    """

    name: str
    matmul: float
    attention: float
    bandwidth: float
    memory: float
    link: float
    number: int = 2
    source: str = "published"
    best: Efficiency = BEST
    worst: Efficiency = WORST
    waits: bool = False


def _published(name: str, matmul: float, bandwidth: float, memory: float, link: float) -> Card:
    return Card(name, matmul, matmul, bandwidth, memory, link)


# In bfloat16 on the tensor cores.
CARDS = {
    "h200": _published("H200 SXM", 989e12, 4.8e12, 141e9, 450e9),
    "h100": _published("H100 SXM", 989e12, 3.35e12, 80e9, 450e9),
    "a100": _published("A100 SXM 80 GB", 312e12, 2.039e12, 80e9, 300e9),
    "v100": _published("V100 SXM2 32 GB, in float16", 125e12, 0.9e12, 32e9, 150e9),
    "a6000": _published("RTX A6000", 154.8e12, 0.768e12, 48e9, 32e9),
}
# The rates of the device at hand are those of large operands. Operations reach less where they are
# small or compute functions, short groups of attention much less; the cache serves some faster.
MEASURED_BEST = Efficiency(matmul=1.0, attention=0.8, bandwidth=1.3, link=1.0, host=0.0)
MEASURED_WORST = Efficiency(matmul=0.9, attention=0.35, bandwidth=0.7, link=1.0, host=0.0)
WIDTH, ROWS, HEADS = 768, 2048, 12  # of the measured matmul and attention: those of a base model
FRAME = 197  # tokens that attend to each other


def this() -> Card:
    """The rates of the CUDA device, or of the CPU in float32 if there is none, measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = ROWS * (16 if device == "cuda" else 1)
    x, weight = (torch.randn(n, WIDTH, device=device).to(dtype) for n in (rows, WIDTH))
    matmul = 2 * rows * WIDTH**2 / hardware.best_time(lambda: F.linear(x, weight), device)
    groups = rows // ROWS * 8
    q = torch.randn(groups, HEADS, FRAME, WIDTH // HEADS, device=device).to(dtype)
    attend = hardware.best_time(lambda: F.scaled_dot_product_attention(q, q, q), device)
    attention = 4 * groups * FRAME**2 * WIDTH / attend
    host = _host_time(device)
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Card(
        hardware.device_name(device),
        matmul,
        attention,
        hardware.copy_rate(device, torch.get_num_threads()),
        float(memory),
        0.0,
        torch.tensor([], dtype=dtype).element_size(),
        "measured",
        dataclasses.replace(MEASURED_BEST, host=host),
        dataclasses.replace(MEASURED_WORST, host=2 * host),
        waits=device == "cpu",
    )


class _Calls(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not is_view(func)
        return func(*args, **(kwargs or {}))


def is_view(func: Any) -> bool:
    """Whether an operation returns a view of its input."""
    aliases = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _host_time(device: str) -> float:
    """Seconds of the host per operation, with its views, modules and autograd: of a tiny layer."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).to(device)
    x = torch.ones(1, 2, 8, device=device)

    def step() -> None:
        layer(x).sum().backward()

    with _Calls() as calls:
        step()
    return hardware.best_time(step, device) / calls.number
