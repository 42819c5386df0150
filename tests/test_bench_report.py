"""The report: README and the page agree with the committed results, and CPU is called CPU."""

import json
import re
from pathlib import Path

import pytest

from vidl.bench.report import bounds, digest, markdown, page, records
from vidl.bench.report.verdict import in_words
from vidl.cli import main

ROOT = Path(__file__).parents[1]
OP, SHAPE, OTHER = "masked_patch_loss", "MAE, mask 0.75", "VideoMAE-B, mask 0.9"


def record(median=2.0, ratio=1.5, **other):
    values = {
        "op": OP, "shape": SHAPE, "sizes": {}, "dtype": "float32", "mode": "full", "threads": 2,
        "device": "Some CPU, 2 cores", "device_type": "cpu", "candidate": "vidl native",
        "kind": "ours", "quick": False, "status": "ok", "reason": None, "commit": "abc",
        "timestamp": "2026-11-22T10:00:00+00:00", "versions": {"torch": "2.15.0"},
        "median_ms": median, "p20_ms": median, "p80_ms": median, "limit_ms": 1.0,
        "share_of_limit": 1.0 / median, "ratio_to_strongest": ratio, "strongest_baseline": "gather",
        "tflop_per_s": 0.1, "gb_per_s": 10.0, "copy_gb_per_s": 30.0, "matmul_tflop_per_s": 0.2,
    }  # fmt: skip
    return values | other


def savings(candidate, median, **other):
    row, column = candidate.split(", ")
    return record(median, op="savings", shape="mac tiny, 4 clips", mode="step") | {
        "candidate": candidate, "row": row, "column": column, "peak_bytes": 1, "flops": 10,
        "useful_flops": 10 if row == "dense" else 4, "speed_up": 20.0 / median, "loss": 1.0,
        "kind": "ours" if column == "vidl" else "baseline", "clips_per_s": 1.0, "tokens_per_s": 2.0,
        "joules_per_step": None, "breakdown_ms": {}, "breakdown_by": "hooks",
        "realised_saving": 20.0 / median / (1 if row == "dense" else 2.5), "hours": 3.0,
        "ratio_to": dict.fromkeys((f"{row}, pytorch", f"{row}, torch.compile"), 1.0),
        "hours_formula": "formula",
    } | other  # fmt: skip


COMPILED = savings("sparse, torch.compile", 9.0)
STEPS = [
    savings("dense, pytorch", 20.0), savings("dense, vidl", 16.0), savings("sparse, pytorch", 12.5),
    savings("sparse, vidl", 8.0),
]  # fmt: skip
QUALITY = [
    record(op="quality", shape="mac tiny, 9 s", mode="train", candidate=f"{row}, vidl") | {
        "row": row, "pairs": 100,
        "runs": [{"steps": 7, "seconds": 9.0, "r1": {"t2v R@1": r1 + d}} for d in (-1, -1, 2)],
        "r1": {"t2v R@1": {"mean": r1, "lowest": r1 - 1, "highest": r1 + 2}},
    }
    for row, r1 in (("dense", 4.0), ("sparse", 6.0))
]  # fmt: skip
SCALING = [
    record(3.0 + tokens, op="scaling", shape=f"mac tiny, mask {tokens}", mode="encoder") | {
        "candidate": column, "recipe": "mac", "preset": "tiny", "axis": "mask", "value": tokens,
        "tokens": tokens, "peak_bytes": None,
    }
    for tokens in (1, 2, 4) for column in ("pytorch", "vidl")
]  # fmt: skip


def test_readme_has_what_the_committed_results_say():
    devices = digest.devices(records.load(ROOT / records.RESULTS))
    text = (ROOT / "README.md").read_text()
    assert markdown.section_of(text) == markdown.summary(devices), "run: vidl bench report"
    every = (ROOT / records.RESULTS / "README.md").read_text()
    assert every == markdown.details(devices), "run: vidl bench report"


def test_a_cpu_is_called_one_and_no_gpu_is_claimed():
    text = markdown.summary(digest.devices([record()]))
    assert "### CPU: Some CPU, 2 cores" in text and "they do not predict GPU performance" in text
    assert "### GPU\n\nNot measured yet" in text


def test_a_gpu_has_a_heading_of_its_own():
    card = record(device="NVIDIA H200", device_type="cuda", threads=None, dtype="bfloat16")
    text = markdown.summary(digest.devices([record(), card]))
    assert text.index("### CPU: Some CPU") < text.index("### GPU: NVIDIA H200")
    assert "Not measured" not in text
    assert "float32" not in text[text.index("### GPU") :]


def test_the_device_with_the_most_results_has_the_tables():
    other = record(ratio=0.62, device="Other CPU", timestamp="2026-11-25T10:00:00+00:00")
    devices = digest.devices([other, record(), record(shape=OTHER)])
    text = markdown.summary(devices)
    assert text.count("### CPU") == text.count("| operation |") == 1
    assert "### CPU: Some CPU, 2 cores" in text
    assert "### Other CPUs\n\n- Other CPU. Operations in float32, 1 shape:" in text
    assert all(f"## {device.title}" in markdown.details(devices) for device in devices)


def test_slower_results_are_shown_too():
    rows = [record(ratio=0.62), record(ratio=1.5, shape=OTHER)]
    text = markdown.summary(digest.devices(rows))
    assert f"| `{OP}`, 2 shapes | not measured | not measured |" in text
    assert "| 1.06 × (0.62 to 1.50) |" in text and "slower at 1" in text
    assert f"the lowest is 0.62 × (`{OP}`, {SHAPE})" in text


def test_steps_quality_and_scaling_are_shown():
    devices = digest.devices([*STEPS, *QUALITY, *SCALING])
    row = "| mac tiny, 4 clips | 20 ms | 12.5 ms | not measured | 8 ms | 2.50 × | 1.56 × |"
    assert row in markdown.summary(devices)
    text = markdown.details(devices)
    row = "| sparse step, mac tiny, 4 clips | 12.5 ms (12.5 to 12.5) | not measured "
    row += "| 8 ms (8 to 8) | 1.56 × |"
    assert f"{row} 2.50 × | 100% of 2.50 × |" in text
    dense, sparse = (
        f"{r1}, 7 steps in 9 to 9 s" for r1 in ("4.0 % (3.0 to 6.0)", "6.0 % (5.0 to 8.0)")
    )
    assert f"| mac tiny, 9 s | {dense} | {sparse} | 1.0 % |" in text
    assert "| mac tiny | 1.000 | 43% |" in text


def test_torch_compile_is_a_baseline_of_steps_and_ops():
    text = markdown.summary(digest.devices([*STEPS, COMPILED]))
    assert "| 12.5 ms | 9 ms | 8 ms | 2.50 × | 1.12 × |" in text
    names = {"eager": 3.0, "eager, torch.compile": 2.0, "GEMM alone": 0.5}
    kinds = dict(zip(names, ("baseline", "baseline", "floor"), strict=True))
    others = [record(candidate=name, kind=kind) for name, kind in kinds.items()]
    (device,) = digest.devices([record(2.0, ratio_to=names), *others])
    (c,) = digest.comparisons(device)
    assert (c.eager_ms, c.compiled_ms) == (6.0, 4.0)


def test_words_of_old_records_are_translated():
    old = {"op": "masked_patch_embed", "kind": "peer", "candidate": "sparse, stock, compiled"}
    old |= {"column": "stock, compiled", "strongest_peer": None, "ratio_to": {"vidl compiled": 2.0}}
    old |= {"sizes": {"B": 2, "K": 3, "D": 8, "p": 16}}
    assert records.translate(old) == {
        "op": "masked_patch_embed", "kind": "baseline", "candidate": "sparse, torch.compile",
        "column": "torch.compile", "strongest_baseline": None, "ratio_to": {"vidl native": 2.0},
        "sizes": {"B": 2, "kept": 3, "C": 8, "patch_size": 16},
    }  # fmt: skip


def test_models_that_learn_differently_are_said_to():
    assert "learn alike" in " ".join(in_words(*digest.devices(QUALITY)))
    better = QUALITY[1] | {"r1": {"t2v R@1": {"mean": 60.0, "lowest": 50.0, "highest": 70.0}}}
    assert "models differ" in " ".join(in_words(*digest.devices([QUALITY[0], better])))


def test_quick_runs_old_shapes_and_old_records_do_not_count():
    newer = record(ratio=2.0, timestamp="2026-11-23T10:00:00+00:00")
    gone = record(shape="of another day", ratio=9.0)
    quick = record(quick=True, ratio=8.0, timestamp="2026-11-24T10:00:00+00:00")
    (device,) = digest.devices([newer, record(), gone, quick])
    assert [c.speedup for c in digest.comparisons(device)] == [2.0]


def test_the_fastest_backend_with_most_threads_counts():
    rows = [record(2.0, 1.5), record(1.0, 3.0, candidate="vidl triton"),
            record(4.0, 9.0, threads=1)]  # fmt: skip
    (device,) = digest.devices(rows)
    assert [c.speedup for c in digest.comparisons(device)] == [3.0]
    assert {c.threads for c in digest.comparisons(device, most_threads=False)} == {1, 2}


@pytest.mark.parametrize(
    "text", ["none", f"{markdown.MARKERS[0]} once", "".join(markdown.MARKERS * 2)]
)
def test_markers_must_be_there_once(text):
    with pytest.raises(ValueError, match="once each"):
        markdown.replace_section(text, "new")


def test_only_the_section_is_rewritten():
    begin, end = markdown.MARKERS
    text = markdown.replace_section(f"before\n{begin}\nold\n{end}\nafter\n", "new\nlines")
    assert text == f"before\n{begin}\nnew\nlines\n{end}\nafter\n"
    assert markdown.section_of(text) == "new\nlines"


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"{markdown.MARKERS[0]}\nold\n{markdown.MARKERS[1]}\n")
    results = tmp_path / "results"
    results.mkdir()
    rows = [record(), record(0.5, 0.5, mode="forward"), *STEPS, *QUALITY, *SCALING]
    (results / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["bench", "report", str(results), "--readme", str(readme)]) == 0
    text = (results / "report" / "index.html").read_text()
    assert "<b>GPU:</b> Not measured yet." in text and "CPU: Some CPU, 2 cores" in text
    assert "class='slower'" in text and "GPU-hours of a full schedule: not measured" in text
    pictures = re.findall(r"img src='(.*?)'", text)
    assert len(pictures) == 5
    for name in pictures:
        assert (results / "report" / name).stat().st_size > 5000
        assert (results / "report" / name.replace(".png", ".svg")).is_file()
    assert "### CPU" in readme.read_text() and "old" not in readme.read_text()
    assert (
        f"| {SHAPE} | float32 | forward | 2 | 0.500 | 0.50 × | gather |"
        in (results / "README.md").read_text()
    )


def test_the_page_needs_no_plots(tmp_path):
    file = page.write(digest.devices([record(), *SCALING]), tmp_path, [], tmp_path / "none.md")
    text = file.read_text()
    assert SHAPE in text and "<img" not in text and "not measured</h2>" not in text


def test_the_page_labels_the_bounds_of_the_kernels(tmp_path):
    predicted = tmp_path / "predicted.md"
    predicted.write_text(
        "# CUDA\n\n| a | b |\n|---|---:|\n| model | 1 |\n\n## Bounds, not measured\n\n"
        "| shape | bound |\n|---|---:|\n| A5 <spatial> | 503 |\n\n## Counts\n\n| no |\n"
    )
    text = page.write(digest.devices([record()]), tmp_path, [], predicted).read_text()
    _, label, section = text.partition("bounds, not measured</h2>")
    assert label and "No GPU was used" in section
    assert "<tr><th>shape</th><th>bound</th></tr>" in section
    assert "<tr><td>A5 &lt;spatial&gt;</td><td>503</td></tr></table>" in section.replace("\n", "")
    assert "model<" not in section and "<td>no<" not in section
    predicted.write_text("# CUDA\n")
    with pytest.raises(ValueError, match="need a table under '## Bounds, not measured' in"):
        bounds.table(predicted)


def test_the_committed_bounds_can_be_read():
    head, *rows = bounds.table(ROOT / bounds.PAGE)
    assert head[:2] == ["shape", "phase"] and len(rows) > 60


def test_nothing_to_report_is_an_error(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps(record(quick=True)) + "\n")
    with pytest.raises(SystemExit):
        main(["bench", "report", str(tmp_path)])
    assert "no results except those of --quick" in capsys.readouterr().err
