"""Several nodes: an agent of torchrun for each, here on one machine over loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_training import MAC, free_port, records, train

from vidl.training import checkpoints

ROOT = Path(__file__).parents[1]


def nodes(folders, options):
    """Run pretrain with an agent in each folder; returns the exit status and output of each."""
    port = free_port()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(folders)),
        "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "vidl",
        "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1",
    ]  # fmt: skip
    environment = {n: x for n, x in os.environ.items() if n not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    agents = []
    for number, folder in enumerate(folders):
        conf = ["--rdzv-conf", f"is_host={number == 0},join_timeout=300"]
        agents.append(
            subprocess.Popen(
                [*command, *conf, "-m", "vidl", "pretrain", *options],
                cwd=folder, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    try:
        shown = [agent.communicate(timeout=300)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [(agent.returncode, text) for agent, text in zip(agents, shown, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_nodes_compute_what_one_rank_computes(kind, tmp_path):
    options = [*MAC, "model.dropout=0", "schedule.steps=4", "run.save_every=2"]
    train(tmp_path / "one", options, "data.batch_size=8")
    more = [f"run.parallel={kind}", f"run.folder={tmp_path / 'two'}"]
    for _, (status, text) in zip(range(2), nodes([tmp_path] * 2, [*options, *more]), strict=True):
        assert status == 0, text
    one, two = ([r for r in records(tmp_path / x) if "loss" in r] for x in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    assert sorted(checkpoints.steps(tmp_path / "two")) == [2, 4]
    assert not list((tmp_path / "two").glob(".rank-*"))


@pytest.mark.slow
def test_nodes_with_folders_of_their_own_are_refused(tmp_path):
    """Each would resume from its own checkpoints."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    shown = nodes(folders, [*MAC, "run.folder=run"])
    assert all(status != 0 for status, _ in shown)
    text = "".join(text for _, text in shown)
    assert "need run.folder on a file system that all nodes share: rank 0 does not see" in text
    assert not list((folders[0] / "run").glob("checkpoints/*"))
