"""Energy per call of a GPU, read from NVML where it is available."""

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

LEAST = 2.0  # seconds; the counter is updated every 20 to 100 ms


def joules(call: Callable[[], object], device: str) -> float | None:
    """Joules per call, averaged over repeated calls; None without NVML or a GPU."""
    counter = _counter() if device == "cuda" else None
    if counter is None:
        return None
    torch.cuda.synchronize()
    begin, before, calls = time.perf_counter(), counter(), 0
    while time.perf_counter() - begin < LEAST:
        call()
        calls += 1
        torch.cuda.synchronize()
    return (counter() - before) / 1e3 / calls


def _counter() -> Callable[[], int] | None:
    """A function that returns the millijoules used by the current GPU so far, or None."""
    try:
        nvml: Any = importlib.import_module("cuda.bindings.nvml")
        nvml.init_v2()
        bus: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        place = f"{bus.pci_domain_id:08x}:{bus.pci_bus_id:02x}:{bus.pci_device_id:02x}.0"
        handle = nvml.device_get_handle_by_pci_bus_id_v2(place)
        nvml.device_get_total_energy_consumption(handle)
    except Exception:  # not installed, not permitted or not supported; NVML has its own classes
        return None
    return lambda: int(nvml.device_get_total_energy_consumption(handle))
