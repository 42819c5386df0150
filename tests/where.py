"""The backend and the device that a test of an op runs on."""

from dataclasses import dataclass

import emulated
import pytest
import torch

from vidl.kernels import library


@dataclass(frozen=True)
class Where:
    backend: str
    device: str

    def skip_unless_runs(self, op: str, dtype: torch.dtype = torch.float32) -> None:
        """Skip the test with a reason if `op` cannot run in `dtype` here."""
        if self.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        if self.backend == "emulated":
            emulated.load()
        if reason := library.why_not(self.backend, op, self.device, dtype):
            pytest.skip(reason)

    def widest(self, op: str) -> torch.dtype:
        """float32, or float16 if the kernels do not support float32; skips if `op` cannot run."""
        self.skip_unless_runs(op, torch.float16)
        reason = library.why_not(self.backend, op, self.device, torch.float32)
        return torch.float16 if reason else torch.float32
