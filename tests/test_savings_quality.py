"""`vidl savings --quality` and `--scaling`; no test depends on a measured time."""

import pytest

from vidl.bench.training import quality, scaling
from vidl.bench.training.savings import plan
from vidl.cli import main

TINY = [
    "width=32", "heads=1", "depth=1", "text_width=32", "text_heads=1", "text_layers=1",
    "image_size=32", "frames=2", "tubelet_size=1", "data.words=8", "data.batch_size=4",
    "data.workers=0", "data.clips=64", "data.looks=0", "evaluation.pairs=4",
]  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Trials take 0.5 s per step once for each row, and 4 s on a busy machine."""
    pytest.importorskip("tokenizers")
    seconds = iter([4.0, 0.5, 0.5, 4.0, 4.0, 4.0])
    monkeypatch.setattr(quality, "_seconds_per_step", lambda config, budget: next(seconds))


def test_both_rows_are_trained_by_every_seed(quick):
    written = []
    rows = quality.run(quality.plan("mac", 1.0, TINY, seeds=2), written.append)
    assert [len(r[0]["runs"]) for r in written] == [1, 2] and written[-1] == rows
    assert [r["row"] for r in rows] == ["dense", "sparse"]
    dense, sparse = rows
    assert dense["sizes"]["model.mask_ratio"] == "0.0" != sparse["sizes"]["model.mask_ratio"]
    for r in rows:
        assert [run["seed"] for run in r["runs"]] == [0, 1]
        assert all(run["steps"] == 2 and run["seconds"] > 0 for run in r["runs"])
        assert set(r["r1"]) == {"t2v R@1", "v2t R@1"}
        for name, value in r["r1"].items():
            values = [run["r1"][name] for run in r["runs"]]
            assert value == {
                "mean": sum(values) / 2, "lowest": min(values), "highest": max(values)
            }  # fmt: skip
    text = quality.table(rows)
    assert "mean (lowest-highest) of 2 seed(s); chance: 25.0 %" in text and "CPU" in text


@pytest.mark.parametrize("budget, tried, speed", [(600.0, [4, 20], 0.25), (9.0, [4], 1.0)])
def test_the_speed_is_that_of_the_later_steps(monkeypatch, budget, tried, speed):
    seen = []

    def run(config, steps, seed, log_every, evaluate):
        seen.append(steps)
        assert log_every == steps // 2 and evaluate(None) == {}
        later = {4: 1.0, 20: 0.25}[steps]
        return {}, [{"seconds_per_step": 9.0}, {"seconds_per_step": later}]

    monkeypatch.setattr(quality, "_run", run)
    assert quality._seconds_per_step(None, budget) == speed and seen == tried


def test_smaug_becomes_dense_in_all_that_makes_it_sparse():
    changed = quality.rows(quality.plan("smaug", 1.0, ["frames_kept=1"]).config)
    assert changed["sparse"] == {}
    assert set(changed["dense"]) == {"mask_ratio", "keep_rate", "frames_kept"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mac", "--quality", "0"], "need seconds > 0"),
        (["mac", "nonsense=1", "--quality", "1"], "there is no 'model.nonsense'"),
        (["mac", "mask_ratio=0", "--quality", "1"], "masks or prunes tokens"),
        (["mac", "data.source=clips", "data.files=[a.json]", "--quality", "1"], "evaluation.files"),
    ],
)
def test_errors_say_what_was_needed(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["savings", *arguments])
    assert message in capsys.readouterr().err


def test_dry_run_says_what_makes_it_dense(capsys):
    assert main(["savings", "mac", "--quality", "9", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "dense: mac tiny, 9 s of moving_shapes, 3 seeds; {'mask_ratio': 0.0}" in text


SMALL = dict(
    frames=2, image_size=32, patch_size=8, width=64, depth=1, heads=2, text_width=64, text_heads=2,
    text_layers=1, embed_dim=16, mask_ratio=0.5,
)  # fmt: skip


@pytest.fixture
def small_axes(monkeypatch):
    monkeypatch.setattr(scaling, "MASKS", (0.0, 0.5, 0.75))
    monkeypatch.setattr(scaling, "FRAMES", (1, 2))
    monkeypatch.setattr(scaling, "RESOLUTIONS", (0.5, 1.0))
    monkeypatch.setattr(scaling, "BATCHES", (0.5, 1.0))


@pytest.mark.parametrize("name", ["smaug", "mac"])
def test_every_point_is_measured_in_both(small_axes, name):
    fields = SMALL | ({"prune_layers": (0,)} if name == "smaug" else {})
    chosen = plan(name, "tiny", fields, batch=4, steps=1, device="cpu")
    written = []
    rows = scaling.run(chosen, written.append)
    assert sum(written, []) == rows and len(rows) == 2 * 9
    assert {r["candidate"] for r in rows} == {"pytorch", "vidl"}
    for r in rows:
        assert r["status"] == "ok" and r["repetitions"] == 1, r["reason"]
    tokens = {(r["axis"], r["value"]): r["tokens"] for r in rows}
    assert tokens["mask", 0.0] == 4 * 2 * 16 and tokens["mask", 0.75] == 4 * 2 * 4
    assert tokens["frames", 1] * 2 == tokens["frames", 2]
    assert tokens["batch", 2] * 2 == tokens["batch", 4]
    assert tokens["resolution", 16] * 4 == tokens["resolution", 32]
    assert "R^2" in scaling.table(rows) and "CPU" in scaling.table(rows)


def test_a_point_that_fails_leaves_the_others(small_axes, monkeypatch):
    step = scaling._step

    def broken(cell):
        if cell.inputs["video"].shape[2] == 1:
            raise RuntimeError("out of memory\nmore")
        step(cell)

    monkeypatch.setattr(scaling, "_step", broken)
    chosen = plan("mac", "tiny", SMALL, batch=2, steps=1, device="cpu")
    rows = {(r["axis"], r["value"], r["candidate"]): r for r in scaling.run(chosen)}
    assert rows["frames", 1, "vidl"]["reason"] == "RuntimeError: out of memory"
    assert rows["frames", 2, "vidl"]["status"] == "ok"
    assert "failed: RuntimeError: out of memory" in scaling.table(list(rows.values()))


def test_the_line_of_least_squares():
    records = [{"tokens": n, "median_ms": 3.0 + 0.5 * n} for n in (1, 2, 4, 8)]
    line = scaling.fit(records)
    assert (line.fixed, line.slope, line.r2) == tuple(pytest.approx(v) for v in (3.0, 0.5, 1.0))
    bent = scaling.fit([{"tokens": n, "median_ms": float(n * n)} for n in (1, 2, 4, 8)])
    assert bent.r2 < 0.99
    assert scaling.fit(records[:2]) is None and scaling.fit([{"tokens": 1}] * 5) is None
