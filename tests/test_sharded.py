"""Runs that FSDP2 shards: every rank writes its part, and any number of ranks reads them."""

import os
import shutil

import pytest
import torch
import torch.multiprocessing as mp
from test_training import MAC, SMAUG, TINY, _rank, free_port, records, same_weights, train

from vidl import cli
from vidl.training import Config, checkpoints, optimizer, parallel, sharded
from vidl.training.runs import open_run

FSDP = [*SMAUG, "run.parallel=fsdp", "model.dropout=0", "model.vtm=0", "model.mlm=0"]
FSDP += ["schedule.steps=4", "run.threads=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two ranks: an uninterrupted run, and one that SIGTERM stopped after step 2 and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    two_runs(folder, FSDP)
    return folder


def two_runs(folder, base):
    whole, moved = ([*base, f"run.folder={folder / name}"] for name in ("whole", "moved"))
    options = [[*whole, "run.save_every=2"], [*moved, "evaluation.every=2"], moved]
    mp.spawn(_rank, ([(free_port(), fields) for fields in options],), nprocs=2)


def assert_resumed_exactly(folder):
    whole, moved = ([r for r in records(folder / x) if "loss" in r] for x in ("whole", "moved"))
    assert whole == moved and [r["step"] for r in whole] == [1, 2, 3, 4]
    assert same_weights(folder / "whole", folder / "moved")


def test_a_sharded_run_resumes_exactly(runs):
    assert_resumed_exactly(runs)
    assert sorted(checkpoints.steps(runs / "moved")) == [2, 4]
    newest = checkpoints.newest(runs / "whole")
    assert not (newest / checkpoints.WEIGHTS).exists()
    sizes = [path.stat().st_size for path in sorted((newest / "weights").iterdir())]
    assert len(sizes) == 2 and max(sizes) < 1.5 * min(sizes)  # each rank has about a half


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_queue_and_momentum_copies_resume_exactly(kind, tmp_path):
    own = ("name=omnivl", "text_layers=1", "fusion_layers=1", "writer_layers=1", "queue=8")
    more = [f"run.parallel={kind}", "schedule.steps=4", "run.threads=1"]
    two_runs(tmp_path, [*TINY, *(f"model.{field}" for field in own), *more])
    assert_resumed_exactly(tmp_path)


def test_one_rank_resumes_a_sharded_run(runs, tmp_path):
    """The losses of one rank throughout, and a checkpoint that no process group reads."""
    more = ["data.batch_size=8"]
    train(tmp_path / "one", FSDP, *more)
    shutil.copytree(runs / "whole", tmp_path / "two")
    train(tmp_path / "two", FSDP, *more, "run.resume=2")
    one, two = ([r for r in records(tmp_path / name) if "loss" in r] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), (key, a["step"])
    before, after = (optimizer_state(tmp_path / "two", name) for name in ("4-abandoned", "4"))
    assert before.keys() == after.keys() and len(before) > 100
    for name, x in after.items():
        torch.testing.assert_close(before[name], x, rtol=1e-3, atol=1e-5)


def optimizer_state(folder, name):
    """The state of the optimizer at a checkpoint, by flat names."""
    config = Config.read(folder / "config.yaml")
    model = open_run(folder).model
    model.train()
    parallel.freeze_unused(model, model.recipe.example(2, 12))
    adam = optimizer.make(model, config.optimizer)
    path = folder / f"checkpoints/step-0000000{name}"
    checkpoints.load(path, model, adam, torch.device("cpu"))
    return sharded._parts(model, adam)[sharded.OPTIMIZER]


def test_a_damaged_shard_is_named(runs, tmp_path, capsys):
    for part in ("weights", "optimizer"):
        shutil.copytree(runs / "whole", tmp_path / part)
        newest = checkpoints.newest(tmp_path / part)
        file = sorted((newest / part).iterdir())[1]
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
        options = [*FSDP, "data.batch_size=8", f"run.folder={tmp_path / part}"]
        assert cli.main(["pretrain", *options]) == 1
        shown = capsys.readouterr().err
        assert f"{newest} is damaged" in shown and file.name in shown
        assert "run.resume=2 resumes the one before" in shown
        file.unlink()
        with pytest.raises(ValueError, match=f"{part}/{file.name} is missing"):
            checkpoints.weights_of(tmp_path / part)


def _full_disk(rank, options, port):
    """The second rank has a disk on which nothing fits."""
    import resource

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    assert cli.main(["pretrain", *options]) == 1


@pytest.mark.slow
def test_a_full_disk_of_one_rank_stops_all_and_leaves_nothing(tmp_path, capfd):
    pytest.importorskip("resource")
    options = [*MAC, "run.parallel=fsdp", "schedule.steps=1", f"run.folder={tmp_path}"]
    mp.spawn(_full_disk, (options, str(free_port())), nprocs=2)
    shown = capfd.readouterr().err
    assert f"{tmp_path}/checkpoints/.step-00000001/weights" in shown
    assert "cannot be written" in shown and "Traceback" not in shown
    assert not list((tmp_path / "checkpoints").iterdir())
