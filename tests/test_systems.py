"""What holds for every system: it trains, resumes bit for bit, is evaluated, saved and loaded.

`test_models.py` also runs over all of them: every parameter learns, and kernels and reference learn
the same.
"""

import json
import re
from pathlib import Path

import flops
import pytest
import torch
from safetensors.torch import load_file
from tiny import fitting

from vidl import models
from vidl.cli import main
from vidl.evaluation import Options, multiple_choice, retrieval
from vidl.kernels import library
from vidl.models import Aligns, Joins, Matches, Taught, can, cards
from vidl.training import Config, checkpoints, open_run, pretrain

ROOT = Path(__file__).parents[1]
NAMES = list(models.MODELS)
SMALL = dict(
    image_size=32, patch_size=8, frames=2, width=64, depth=2, heads=2, text_width=64, text_heads=2,
    embed_dim=64,
)  # fmt: skip
OWN = {
    "smaug": dict(prune_layers=(0,), frames_kept=1, decoder_width=64, decoder_depth=1,
                  decoder_heads=2, fusion_layers=1, text_layers=1),
    "mac": dict(text_layers=1),
    "simvtp": dict(decoder_width=64, decoder_depth=1, decoder_heads=2),
    "vlc": dict(decoder_width=64, decoder_depth=1, decoder_heads=2),
    "singularity": dict(frames=1, frames_tested=2, prune_layers=(0,), text_layers=1,
                        fusion_layers=1),
    "alpro": dict(text_layers=1, merge_layers=1, entities=4),
    "vindlu": dict(prune_layers=(0,), text_layers=1, fusion_layers=1),
    "svitt": dict(prune_layers=(0,), text_layers=1, fusion_layers=2, block=4, random_blocks=1),
    "clipbert": dict(frames=1, views=2, views_tested=3, text_layers=2),
    "omnivl": dict(text_layers=1, fusion_layers=1, writer_layers=1, queue=8),
}  # fmt: skip
RUN = [
    "data.source=moving_shapes", "data.clips=16", "data.words=12", "data.batch_size=4",
    "data.workers=0", "evaluation.pairs=4", "schedule.steps=4", "schedule.warmup=1",
    "run.log_every=1", "run.threads=1", "run.device=cpu",
]  # fmt: skip


def fields(name):
    return fitting(name, SMALL | OWN[name])


def config(name, folder, *more):
    own = [f"model.{key}={list(value) if isinstance(value, tuple) else value}"
           for key, value in fields(name).items()]  # fmt: skip
    return Config.read(None, [*RUN, f"model.name={name}", *own, f"run.folder={folder}", *more])


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """The options of a run of each system that learns from a frozen model of its kind."""
    options = {}
    for name in NAMES:
        if can(models.MODELS[name].model, Taught):
            folder = tmp_path_factory.mktemp(name) / "teacher"
            alone = ("model.pem=0", "model.vtm=0", "model.mlm=0", "schedule.steps=1")
            pretrain(config(name, folder, *alone), lambda training: {})
            options[name] = (f"start.teacher={folder}",)
    return options


def weights(folder):
    return load_file(checkpoints.newest(Path(folder)) / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_and_is_evaluated(name, teachers, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = teachers.get(name, ())
    result = pretrain(config(name, whole, *more))
    assert result["finished"] and {"t2v R@1", "v2t R@1"} <= set(result["evaluation"])
    objectives = [x for x in models.MODELS[name].model.objectives if x in result["losses"]]
    assert objectives == list(models.MODELS[name].model.objectives)

    def interrupt(training):
        if training.step == 2:
            raise KeyboardInterrupt
        return {}

    every = ("evaluation.every=2", "run.save_every=1", *more)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config(name, parts, *every), interrupt)
    assert pretrain(config(name, parts, *every), lambda training: {})["finished"]
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]

    trained = open_run(whole)
    model, data = trained.model, searched(trained)
    quiet = Options(quiet=True, batch_size=4)
    rerank = 2 if can(model, Matches) and can(model, Aligns) else 0
    assert retrieval(model, data, quiet, rerank=rerank).captions == 4
    if can(model, Joins):
        answering = models.Answering(model, ["left", "right"])
        loss = answering(**model.recipe.example(2, 6), answers=torch.tensor([0, -1]))["loss"]
        loss.backward()
        learning = [p for p in answering.parameters() if p.requires_grad]
        assert learning and all(p.grad is not None for p in learning)


def searched(trained):
    from vidl.training import sources

    return sources.open_searched(trained.config, trained.model.recipe, trained.tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_on_real_clips(name, tmp_path):
    clips = ROOT / "examples" / "clips.json"
    command = [
        "pretrain", f"model.name={name}", "model.preset=tiny", f"data.files=[{clips}]",
        "data.batch_size=8", "schedule.steps=20", "schedule.warmup=2", "run.log_every=5",
        f"run.folder={tmp_path / 'run'}", f"evaluation.files=[{clips}]", "run.device=cpu",
    ]  # fmt: skip
    if can(models.MODELS[name].model, Taught):
        teacher = f"run.folder={tmp_path / 'teacher'}"
        assert main([*command, "model.pem=0", "model.vtm=0", "model.mlm=0", teacher]) == 0
        # With 15 % of the words, two in a caption, the loss of twenty steps is mostly noise.
        command += [f"start.teacher={tmp_path / 'teacher'}", "model.word_ratio=0.5"]
    assert main(command) == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if "loss" in record]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_recipe(name):
    """The rows of the encoder's blocks, before the first and after the last."""
    torch.manual_seed(0)
    model = models.create(name, "tiny", **fields(name))
    rows = []
    video = model.recipe.example(2, 6)["video"]
    mask = model.recipe.visual_mask(torch.arange(2), 0)
    if name == "clipbert":  # the encoder sees words too
        with torch.no_grad():
            clips = model.encode_clips(video, mask)
        assert clips.shape[:-1].numel() == 2 * model.recipe.tokens()["encoder"]
        return
    blocks = model.vision.blocks

    def count(module, args, out):
        out = out[0] if isinstance(out, tuple) else out
        rows.append((args[0].shape[:-1].numel(), out.shape[:-1].numel()))

    for block in (blocks[0], blocks[-1]):
        block.register_forward_hook(count)
    with torch.no_grad():
        clips = model.encode_clips(video, mask)
        if not rows:  # the encoder runs later, on clips and words
            model.vision(clips)
    tokens = model.recipe.tokens()
    after = [count for stage, count in tokens.items() if stage.startswith("after layer")]
    assert rows[0][0] == 2 * tokens["encoder"]
    assert rows[-1][1] == 2 * (after[-1] if after else tokens["encoder"])


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name, tmp_path):
    torch.manual_seed(0)
    model = models.create(name, "tiny", **fields(name))
    other = models.create(name, "tiny", **fields(name))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    inputs = model.recipe.example(4, 6)
    one, two = (m.eval()(**inputs)["loss"] for m in (model, other))
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", NAMES)
def test_presets_and_variants(name):
    entry = models.MODELS[name]
    assert {"tiny", "small", "base"} <= set(entry.presets)
    for recipe in entry.presets.values():
        variants = recipe.variants()
        assert list(variants)[0] == "dense" and list(variants.values())[-1] == recipe
        assert variants["dense"].mask_ratio == 0
        assert models.recipe(name, **vars(recipe)) == recipe
    tiny = entry.presets["tiny"]
    assert tiny.variants()["dense"] != tiny, "the preset tiny is sparse"
    if name not in ("smaug", "mac"):  # whose base is sparse
        sparse = entry.presets["sparse"]
        assert sparse.variants()["dense"] != sparse


def test_the_tables_of_systems_are_current():
    table = cards.markdown(models.MODELS)
    for page in (ROOT / "README.md", ROOT / "docs" / "systems.md"):
        text = page.read_text()
        match = re.search(r"<!-- systems -->\n(.*)\n<!-- /systems -->", text, re.DOTALL)
        assert match and match[1] == table, f"run `vidl systems --write {page.relative_to(ROOT)}`"


@pytest.mark.slow
def test_the_flops_of_systems_are_current():
    """One system after the other: each needs up to 8 GB."""
    op = ("space_time_attention", "cpu", torch.float32)
    if reason := library.why_not("native", *op):
        pytest.skip(f"the backend torch counts padding, too; native: {reason}")
    numbers = flops.counted_apart(NAMES)
    assert numbers.keys() == cards.counted().keys()
    for name, kinds in numbers.items():
        assert kinds == pytest.approx(cards.counted()[name], rel=1e-3), (
            f"{name}: run `PYTHONPATH=. python tests/flops.py > vidl/models/flops.json`"
        )


def test_systems_on_the_command_line(capsys, tmp_path):
    assert main(["systems"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: {models.MODELS[name].model.card.title}" in shown for name in NAMES)
    assert shown.count("GFLOP:") == len(NAMES) and cards.counted().keys() == set(NAMES)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- systems -->\nold\n<!-- /systems -->\nafter\n")
    assert main(["systems", "--write", str(page)]) == 0
    assert page.read_text().startswith("before\n<!-- systems -->\n| system |")
    assert "old" not in page.read_text() and page.read_text().endswith("after\n")
    (tmp_path / "other.md").write_text("nothing")
    with pytest.raises(SystemExit):
        main(["systems", "--write", str(tmp_path / "other.md")])
    assert "need the lines <!-- systems -->" in capsys.readouterr().err


def test_a_recipe_on_the_command_line(capsys):
    words = [f"{key}={list(value) if isinstance(value, tuple) else value}"
             for key, value in fields("singularity").items()]  # fmt: skip
    assert main(["recipe", "singularity", "--preset", "tiny", *words]) == 0
    shown = capsys.readouterr().out
    for part in ("arxiv.org/abs/2206.03428", "our choice:", "model.ensemble:", "GFLOP", "dense"):
        assert part in shown
    with pytest.raises(SystemExit):
        main(["recipe", "singularity", "keep_rat=0.5"])
    assert "did you mean 'keep_rate'" in capsys.readouterr().err


def test_an_ability_that_is_missing_names_the_systems_that_have_it():
    mac = models.create("mac", "tiny", **fields("mac"))
    able = [name for name in NAMES if can(models.MODELS[name].model, Joins)]
    with pytest.raises(ValueError, match=f"fuses captions.*: {', '.join(able)}; got Mac"):
        models.Answering(mac, ["yes"])
    assert not can(mac, Matches) and can(mac, Aligns) and set(able) == set(NAMES) - {"mac"}
    with pytest.raises(ValueError, match="matches captions with clips for fused=True: smaug"):
        multiple_choice(mac, None, fused=True)


def test_a_checkpoint_of_another_system_is_refused(tmp_path):
    pretrain(config("mac", tmp_path / "mac"), lambda training: {})
    with pytest.raises(ValueError, match="a run of vindlu.*one of mac"):
        pretrain(config("vindlu", tmp_path / "vindlu", f"start.model={tmp_path / 'mac'}"))
