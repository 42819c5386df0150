"""Which kernels the GPUs of other machines can run, and why not, with made-up GPUs."""

import pytest
import torch

from vidl.kernels import gpu, library

SHARED = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (12, 0): 99}


@pytest.fixture
def card(monkeypatch):
    """A function that makes this machine one with a GPU, and kernels built for `architectures`."""
    # Not torch's function, whose answers `_has_kernel` keeps for later tests.
    monkeypatch.setattr(library, "_has_kernel", lambda name, backend, device: device == "cuda")
    monkeypatch.setattr(library, "interpreting", lambda: False)

    def make(capability, architectures="80-real;90a-real;90-virtual"):
        card = gpu.Gpu(capability, SHARED[capability] * 1024)
        monkeypatch.setattr(gpu, "current", lambda: card)
        monkeypatch.setattr(library, "build_record", lambda: {"cuda_architectures": architectures})

    return make


OPS = [name for name in library.OPS if not name.endswith("_bwd")]


@pytest.mark.parametrize("op", OPS)
def test_older_gpus_get_a_reason(op, card):
    card((7, 5), architectures="75")
    for backend in ("native", "triton"):
        reason = library.why_not(backend, op, "cuda", torch.float16)
        assert reason == "its kernels need compute capability 8.0 or later, this GPU has 7.5"
    assert library.choose("auto", op, "cuda", torch.float16) == "torch"
    with pytest.raises(RuntimeError, match=r"need compute capability 8\.0"):
        library.choose("native", op, "cuda", torch.float16)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_on_later_gpus(op, capability, card):
    card(capability)
    for backend in ("native", "triton"):
        assert library.why_not(backend, op, "cuda", torch.bfloat16) is None


@pytest.mark.parametrize(
    "architectures, runs",
    [
        ("90", {(9, 0), (12, 0)}),
        ("90-real", {(9, 0)}),
        ("80-real;90", {(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)}),
        ("80-real;90a-real;90-virtual", {(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)}),
        ("90a", {(9, 0)}),
        ("86-real", {(8, 6), (8, 9)}),
        ("80-virtual", {(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)}),
        ("120", {(12, 0)}),
        ("native", set(SHARED) - {(7, 5)}),
    ],
)
def test_a_gpu_without_machine_code_gets_a_reason(architectures, runs, card):
    for capability in set(SHARED) - {(7, 5)}:
        card(capability, architectures)
        reason = library.why_not("native", "select_tokens", "cuda", torch.float32)
        assert (reason is None) == (capability in runs)
        assert reason is None or f"built for compute capability {architectures}, this" in reason


@pytest.mark.parametrize("capability", sorted(set(SHARED) - {(7, 5)}))
def test_heads_of_attention_must_fit_into_shared_memory(capability, card):
    card(capability)
    fit = {
        size: library.why_not(
            "native", "space_time_attention", "cuda", torch.bfloat16, head_size=size
        )
        for size in (32, 64, 80, 96, 128)
    }
    refused = {size: reason for size, reason in fit.items() if reason}
    if SHARED[capability] > 99:
        assert not refused
    else:
        text = "heads of 128 need 105472 bytes of shared memory for a block, this GPU has 101376"
        assert refused == {128: text}


def test_without_a_gpu_there_is_nothing_to_ask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.current() is None and gpu.shared_memory() is None
