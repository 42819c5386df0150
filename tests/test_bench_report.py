"""The report: README's table is the one that the committed results give, CPU is called CPU."""

import json
import re
from pathlib import Path

import pytest

from vidl.bench.report import digest, markdown, page, records
from vidl.cli import main

ROOT = Path(__file__).parents[1]
OP, SHAPE, OTHER = "masked_patch_loss", "MAE, mask 0.75", "VideoMAE-B, mask 0.9"


def record(median=2.0, ratio=1.5, **other):
    found = {
        "op": OP, "shape": SHAPE, "sizes": {}, "dtype": "float32", "mode": "full", "threads": 2,
        "device": "Some CPU, 2 cores", "device_type": "cpu", "candidate": "vidl native",
        "kind": "ours", "quick": False, "status": "ok", "reason": None, "commit": "abc",
        "timestamp": "2026-11-22T10:00:00+00:00", "versions": {"torch": "2.15.0"},
        "median_ms": median, "p20_ms": median, "p80_ms": median, "limit_ms": 1.0,
        "share_of_limit": 1.0 / median, "ratio_to_strongest": ratio, "strongest_peer": "gather",
        "tflop_per_s": 0.1, "gb_per_s": 10.0, "copy_gb_per_s": 30.0, "matmul_tflop_per_s": 0.2,
    }  # fmt: skip
    return found | other


def savings(candidate, median, **other):
    row, column = candidate.split(", ")
    return record(median, op="savings", shape="mac tiny, 4 clips", mode="step") | {
        "candidate": candidate, "row": row, "column": column, "peak_bytes": 1, "flops": 10,
        "useful_flops": 10 if row == "dense" else 4, "speed_up": 20.0 / median, "loss": 1.0,
        "kind": "ours" if column == "vidl" else "peer", "clips_per_s": 1.0, "tokens_per_s": 2.0,
        "joules_per_step": None, "breakdown_ms": {}, "breakdown_by": "hooks",
        "realised_saving": 20.0 / median / (1 if row == "dense" else 2.5), "hours": 3.0,
        "hours_formula": "formula",
    } | other  # fmt: skip


STEPS = [
    savings("dense, stock", 20.0), savings("dense, vidl", 16.0), savings("sparse, stock", 12.5),
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
    for tokens in (1, 2, 4) for column in ("stock", "vidl")
]  # fmt: skip


def test_readme_has_what_the_committed_results_say():
    devices = digest.devices(records.load(ROOT / records.RESULTS))
    text = (ROOT / "README.md").read_text()
    assert markdown.section_of(text) == markdown.summary(devices), "run: vidl bench report"
    every = (ROOT / records.RESULTS / "README.md").read_text()
    assert every == markdown.details(devices), "run: vidl bench report"


def test_a_cpu_is_called_one_and_no_gpu_is_claimed():
    text = markdown.summary(digest.devices([record()]))
    assert "### CPU: Some CPU, 2 cores" in text and "nothing follows for a GPU" in text
    assert "### GPU\n\nNot measured yet" in text


def test_a_gpu_has_a_heading_of_its_own():
    card = record(device="NVIDIA H200", device_type="cuda", threads=None, dtype="bfloat16")
    text = markdown.summary(digest.devices([record(), card]))
    assert text.index("### CPU: Some CPU") < text.index("### GPU: NVIDIA H200")
    assert "Not measured" not in text
    assert "float32" not in text[text.index("### GPU") :]


def test_what_is_slower_is_shown_too():
    rows = [record(ratio=0.62), record(ratio=1.5, shape=OTHER)]
    text = markdown.summary(digest.devices(rows))
    assert f"| `{OP}` | 2 | 1.06 × (0.62 to 1.50) |" in text


def test_steps_quality_and_scaling_are_shown():
    text = markdown.summary(digest.devices([*STEPS, *QUALITY, *SCALING]))
    assert "| mac tiny, 4 clips | 20 ms | 1.25 × | 1.60 × | 2.50 × | 100% of 2.50 × |" in text
    dense, sparse = "4.0 % (3.0 to 6.0), 7 steps", "6.0 % (5.0 to 8.0), 7 steps"
    assert f"| mac tiny, 9 s | {dense} | {sparse} | 1.0 % |" in text
    assert "mac tiny: R² 1.000, 43% of the unmasked time fixed" in text


def test_quick_looks_old_shapes_and_old_records_do_not_count():
    newer = record(ratio=2.0, timestamp="2026-11-23T10:00:00+00:00")
    gone = record(shape="of another day", ratio=9.0)
    quick = record(quick=True, ratio=8.0, timestamp="2026-11-24T10:00:00+00:00")
    (device,) = digest.devices([newer, record(), gone, quick])
    assert [a.ratio for a in digest.against(device)] == [2.0]


def test_the_fastest_of_ours_with_most_threads_counts():
    rows = [record(2.0, 1.5), record(1.0, 3.0, candidate="vidl triton"),
            record(4.0, 9.0, threads=1)]  # fmt: skip
    (device,) = digest.devices(rows)
    assert [a.ratio for a in digest.against(device)] == [3.0]
    assert {a.threads for a in digest.against(device, most_threads=False)} == {1, 2}


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
    assert "<b>No GPU was measured.</b>" in text and "CPU: Some CPU, 2 cores" in text
    assert "class='slower'" in text and "not measured (no GPU here)" in text
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
    file = page.write(digest.devices([record(), *SCALING]), tmp_path, [])
    assert SHAPE in file.read_text() and "<img" not in file.read_text()


def test_nothing_to_report_is_an_error(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps(record(quick=True)) + "\n")
    with pytest.raises(SystemExit):
        main(["bench", "report", str(tmp_path)])
    assert "no results but quick looks" in capsys.readouterr().err
