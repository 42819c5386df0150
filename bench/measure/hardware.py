"""Copy and matmul rates of the device, the limits against which results are compared."""

import functools
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vidl import info


@dataclass(frozen=True)
class Limits:
    """Measured rates of a device."""

    copy: float  # bytes per second of a large copy, bytes read plus bytes written
    matmul: float  # floating-point operations per second, in the faster of two dtypes
    matmul_dtype: torch.dtype

    def seconds(self, size: float, flops: float) -> float:
        """The lower limit of the time to move `size` bytes and compute `flops`."""
        return max(size / self.copy, flops / self.matmul)


@functools.cache
def limits(device: str, threads: int, dtype: torch.dtype) -> Limits:
    """Measure the device, once per process, device, number of threads and dtype.

    The matmul rate is the better of `dtype` and float32, because a CPU without bfloat16 units
    multiplies faster in float32, and an implementation may convert.

    Args:
        threads: the number of CPU threads that PyTorch is set to.
    """
    rates = {x: matmul_rate(device, threads, x) for x in {dtype, torch.float32}}
    fastest = max(rates, key=lambda x: rates[x])
    return Limits(copy_rate(device, threads), rates[fastest], fastest)


@functools.cache
def copy_rate(device: str, threads: int) -> float:
    """Bytes per second, read plus written, of `copy_` on buffers larger than the cache."""
    size = 2**30 if device == "cuda" else max(2**27, 2 * last_level_cache(device))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / best_time(lambda: target.copy_(source), device)


@functools.cache
def matmul_rate(device: str, threads: int, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matmul, the best of several sizes."""
    best = 0.0
    for n in (4096, 8192) if device == "cuda" else (512, 1024, 2048):
        a = torch.randn(n, n, device=device).to(dtype)
        b = torch.randn(n, n, device=device).to(dtype).t()  # as F.linear has it
        out = torch.empty(n, n, device=device, dtype=dtype)
        calls: list[Callable[[], object]] = [functools.partial(torch.mm, a, b, out=out)]
        if device == "cpu" and torch.backends.mkldnn.is_available():
            # oneDNN, which torch only calls in compiled code; MKL does not use AVX-512 on each CPU.
            linear = torch.ops.mkldnn._linear_pointwise
            calls.append(functools.partial(linear, a, b.t(), None, "none", [], ""))
        seconds = min(best_time(call, device) for call in calls)
        best = max(best, 2 * n**3 / seconds)
        if seconds > 0.2:  # a dtype without hardware support: larger sizes would take minutes
            break
    return best


def best_time(call: Callable[[], object], device: str, repetitions: int = 10) -> float:
    """Seconds of the fastest of several calls, after a warm-up call."""
    times: list[float] = []
    for _ in range(repetitions + 1):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        if sum(times) > 1 and len(times) > 3:
            break
    return min(times[1:])


@functools.cache
def last_level_cache(device: str) -> int:
    """Bytes of the largest cache: the L2 of a GPU, the L3 of a CPU (32 MiB where unknown)."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KMG])", file.read_text().strip()):
            sizes.append(int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes) or 32 << 20


def device_name(device: str) -> str:
    """The device name of results: that of the GPU, or of the CPU with its vectors and cores.

    Virtual machines hide the model of a CPU: "AMD EPYC" has twice the rate with AVX-512.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = info.cpu()
    return f"{cpu['model']}, {cpu['torch_capability']}, {cpu['cores']} cores"


def slug(name: str) -> str:
    """The folder of a device: "AMD EPYC, AVX2, 2 cores" becomes amd-epyc-avx2-2-cores."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantiles."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), fifths[0], fifths[3]
