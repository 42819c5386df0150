"""Fine-tuning, evaluation and export of a run on the command line."""

import json
import shutil

import pytest
import torch
from clips import write_video

from vidl import models
from vidl.cli import main
from vidl.data.dataset import Clips
from vidl.data.shards import ShardStream
from vidl.evaluation import Accuracy, Retrieval
from vidl.training import Config, configuration, finetune, open_run, pretrain, runs

pytest.importorskip("safetensors")
pytest.importorskip("yaml")

TINY = [
    "model.image_size=32", "model.frames=2", "model.width=32", "model.heads=2", "model.depth=2",
    "model.text_width=32", "model.text_heads=2", "model.text_layers=1", "model.dropout=0",
    "data.source=moving_shapes", "data.clips=20", "data.words=12", "data.batch_size=4",
    "data.workers=0", "evaluation.pairs=5", "schedule.steps=2", "schedule.warmup=1",
    "run.threads=1", "run.device=cpu", "run.log_every=1",
]  # fmt: skip
SMAUG = ["model.fusion_layers=1", "model.decoder_width=32", "model.frames_kept=1"]
SMAUG += ["model.prune_layers=[1]"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folders = {}
    for name, more in (("smaug", SMAUG), ("mac", [])):
        folder = tmp_path_factory.mktemp(name) / "run"
        pretrain(Config.read(None, [*TINY, *more, f"model.name={name}", f"run.folder={folder}"]))
        folders[name] = folder
    return folders


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four videos, one of them broken, with questions, captions and options."""
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("clips")
    for name in "abc":
        write_video(folder / f"{name}.mp4", 6, size=(48, 48))
    (folder / "d.mp4").write_bytes(b"no video")
    answers = {"a": "red", "b": "blue", "c": "red", "d": "red"}
    rows = {
        "questions": [dict(question="which colour", answer=answers[x]) for x in answers],
        "captions": [dict(caption=f"a {answers[x]} circle") for x in answers],
        "choices": [dict(caption=["red", "a blue", "green"], answer=1) for x in answers],
    }
    for kind, annotations in rows.items():
        entries = [row | {"video": f"{x}.mp4"} for x, row in zip(answers, annotations, strict=True)]
        (folder / f"{kind}.json").write_text(json.dumps(entries))
    return folder


def test_a_run_is_opened_as_it_was_saved(pretrained):
    for path in (pretrained["smaug"], pretrained["smaug"] / "checkpoints/step-00000002"):
        trained = open_run(path)
        assert len(trained.tokenizer) == trained.model.recipe.vocabulary.size
        assert not trained.model.training and trained.config.schedule.steps == 2
    with pytest.raises(ValueError, match="need the folder of a run .*or one of its checkpoints"):
        open_run(pretrained["smaug"] / "checkpoints")


@pytest.mark.parametrize("name", ["smaug", "mac"])
def test_finetuning_for_retrieval(pretrained, name, tmp_path, capsys):
    run = str(pretrained[name])
    command = ["finetune", "retrieval", "--weights", run, f"run.folder={tmp_path}/tuned"]
    assert main([*command, "schedule.steps=3"]) == 0
    tuned = open_run(tmp_path / "tuned")
    assert tuned.model.recipe.mask_ratio == 0 and tuned.config.optimizer.lr == 1e-5
    before, after = open_run(run).model.state_dict(), tuned.model.state_dict()
    assert set(before) - set(after) == {n for n in before if n.startswith("decoder.")}
    assert not torch.equal(before["vision.cls_token"], after["vision.cls_token"])
    torch.testing.assert_close(
        before["vision.cls_token"], after["vision.cls_token"], atol=1e-3, rtol=0
    )
    # It resumes at its last step, and there is nothing left to do.
    capsys.readouterr()
    assert main([*command, "schedule.steps=3"]) == 0


def test_the_run_of_a_stranger_chooses_no_data(pretrained, tmp_path, capsys):
    """Its config.yaml names a shell command, files of this machine and tokenizers."""
    pytest.importorskip("webdataset")
    stranger, proof = tmp_path / "stranger", tmp_path / "proof"
    shutil.copytree(pretrained["mac"], stranger)
    shell = f"pipe:touch {proof}"
    private = tmp_path / "private.json"
    private.write_text('[{"video": "a.mp4", "caption": "a secret"}]')
    Config.read(
        stranger / "config.yaml",
        [
            "data.source=shards", f"data.files=['{shell}']", "data.media=/etc", "data.outside=true",
            f"evaluation.files=[{private}]", "evaluation.media=/etc", "start.vision=/etc/passwd",
        ],
    ).save(stranger / "config.yaml")  # fmt: skip
    command = ["finetune", "retrieval", "--weights", str(stranger), f"run.folder={tmp_path}/tuned"]
    with pytest.raises(SystemExit):
        main(command)
    assert "need data.files" in capsys.readouterr().err
    config = configuration(stranger, None, ["data.files=[mine.json]"])
    assert config.data.source == "clips" and config.data.media is None
    assert not config.data.outside and config.start.vision is None
    assert config.evaluation.files == [] and config.evaluation.media is None
    # Not even the user's own command opens a pipe.
    tokenizer = f"data.tokenizer={stranger}/tokenizer.json"
    assert main([*command, "data.source=shards", f"data.files=['{shell}']", tokenizer]) == 1
    assert "need shards as files or http(s) URLs, got 'pipe:touch" in capsys.readouterr().err
    assert main(["eval", "retrieval", "--weights", str(stranger)]) == 1
    assert "name an annotation file (--data)" in capsys.readouterr().err
    assert not proof.exists()


@pytest.mark.parametrize("shard", ["pipe:ls", "http://x/';ls'", "gs://a/b.tar", "-", "ftp://x/a"])
def test_shards_run_no_command(shard):
    pytest.importorskip("webdataset")
    clips = Clips([], frames=2, size=32, train=True)
    ShardStream(["a.tar", "https://example.org/a-{0..9}.tar?x=1&y=2"], clips, 2)
    with pytest.raises(ValueError, match="need shards as files or http"):
        ShardStream(["a.tar", shard], clips, 2)


@pytest.mark.parametrize("form", runs.FORMS)
def test_finetuning_for_question_answering(pretrained, clips, form, tmp_path, capsys):
    command = [
        "finetune", "qa", "--weights", str(pretrained["smaug"]), "--answers", "1", "--form", form,
        f"run.folder={tmp_path}/qa", "data.source=clips", f"data.files=[{clips}/questions.json]",
        "data.broken=1", "data.batch_size=2", f"evaluation.files=[{clips}/questions.json]",
        "schedule.steps=2", "--layers", "1", "--top", "7",
    ]  # fmt: skip
    assert main(command) == 0
    stored = json.loads((tmp_path / "qa/answers.json").read_text())
    assert stored == {
        "form": {"name": form, "layers": 1, "top": 7, "soft": False},
        "answers": ["red"],
    }
    if form == "ranking":  # the decoder starts with the text encoder of the pre-training run
        name = "embeddings.word_embeddings.weight"
        before = open_run(pretrained["smaug"]).model.text.state_dict()[name]
        model = open_run(tmp_path / "qa").model
        assert (len(model.decoder.encoder.layer), model.top) == (1, 7)
        after = model.decoder.state_dict()[name]
        torch.testing.assert_close(after, before, rtol=0, atol=5e-5)  # after two steps of 1e-5
    result = tmp_path / "qa.json"
    arguments = ["--weights", f"{tmp_path}/qa", "--json", str(result)]
    capsys.readouterr()
    assert main(["eval", "qa", *arguments, "--data", f"{clips}/questions.json"]) == 0
    # It always answers "red": two correct, one wrong, one clip is broken.
    accuracy = json.loads(result.read_text())
    assert (accuracy["questions"], accuracy["right"], accuracy["answerable"]) == (4, 2, 3)
    assert "4 questions, 2 correct: 50.0 %" in (shown := capsys.readouterr().out)
    assert "1 clip could not be read" in shown and "d.mp4" in shown
    assert main(["eval", "retrieval", *arguments]) == 1
    name = type(open_run(tmp_path / "qa").model).__name__
    assert f"need a run for retrieval, got {name}" in capsys.readouterr().err
    other = [*command[4:], f"run.folder={tmp_path}/mac"]
    assert main(["finetune", "qa", "--weights", str(pretrained["mac"]), *other]) == 1
    assert "need a model that fuses captions with clips to answer: smaug" in capsys.readouterr().err


@pytest.mark.parametrize("form", runs.FORMS)
def test_questions_about_moving_shapes(pretrained, form, tmp_path, capsys):
    folder = tmp_path / "qa"
    command = [
        "finetune", "qa", "--weights", str(pretrained["smaug"]), "--form", form,
        f"run.folder={folder}", "schedule.steps=2", "run.save_every=1", "data.words=16",
        "optimizer.lr=0.01", "schedule.warmup=0", "model.dropout=0.1",
    ]  # fmt: skip
    assert main(command) == 0
    assert "step 2: accuracy" in capsys.readouterr().err
    trained = open_run(folder)
    assert trained.config.data.task == "question"
    assert type(trained.model).__name__ == {"classifier": "Answering", "ranking": "Ranking"}[form]
    assert {"one", "circle"} <= set(trained.model.answers)
    before = open_run(pretrained["smaug"]).model.state_dict()
    after = trained.model.model.state_dict()
    assert not torch.equal(before["vision.cls_token"], after["vision.cls_token"])
    # It resumes: the same second step, bit for bit.
    shutil.rmtree(folder / "checkpoints/step-00000002")
    other = [f"--form={other}" for other in runs.FORMS if other != form]
    assert main([*command, *other]) == 1
    assert f"has a run with form {form}" in capsys.readouterr().err
    if form == "ranking":
        assert main([*command, "--top", "9"]) == 1
        assert "and top=128: need the same to resume" in capsys.readouterr().err
    assert main(command) == 0
    again = open_run(folder).model.state_dict()
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(weight, again[name]), name
    capsys.readouterr()
    assert main(["eval", "qa", "--weights", str(folder)]) == 0
    assert "5 questions, " in capsys.readouterr().out
    # A run goes on from the weights of another one that answers.
    options = ["schedule.steps=1", f"run.folder={tmp_path}/more"]
    assert main([*command[:2], "--weights", str(folder), "--form", form, *options]) == 0


def test_captions_of_moving_shapes(pretrained, tmp_path, capsys):
    folder, result = tmp_path / "captions", tmp_path / "captions.json"
    command = [
        "finetune", "caption", "--weights", str(pretrained["smaug"]), "--layers", "2",
        f"run.folder={folder}", "schedule.steps=2", "run.save_every=1", "evaluation.pairs=14",
        "optimizer.lr=0.01", "schedule.warmup=0", "model.dropout=0.1",
    ]  # fmt: skip
    assert main(command) == 0
    assert "step 2: BLEU-4" in capsys.readouterr().err
    trained = open_run(folder)
    assert type(trained.model).__name__ == "Captioning" and trained.config.data.task == "caption"
    assert len(trained.model.decoder.encoder.layer) == 2
    # It resumes: the same second step, bit for bit.
    shutil.rmtree(folder / "checkpoints/step-00000002")
    assert main([*command, "--layers", "1"]) == 1
    assert "has a run with layers=2: need the same to resume it" in capsys.readouterr().err
    assert main(command) == 0
    again = open_run(folder).model.state_dict()
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(weight, again[name]), name
    # More clips than motions, and all their captions.
    evaluate = ["eval", "caption", "--weights", str(folder), "--json", str(result)]
    capsys.readouterr()
    assert main([*evaluate, "--beams", "2", "--words", "6", "--length-penalty", "0.5"]) == 0
    assert "14 clips: BLEU-4 " in capsys.readouterr().out
    stored = json.loads(result.read_text())
    assert len(stored["clips"]) == 14 and stored["broken"] == {}
    assert all(len(clip["caption"].split()) <= 6 for clip in stored["clips"])
    assert len({clip["references"][0].split(" ", 3)[3] for clip in stored["clips"]}) > 4
    # A run goes on from the weights of another one that writes.
    more = ["--weights", str(folder), "--layers", "2", "schedule.steps=1"]
    assert main(["finetune", "caption", *more, f"run.folder={tmp_path}/more"]) == 0


def test_errors_of_captions(pretrained, tmp_path, capsys):
    command = ["finetune", "caption", f"run.folder={tmp_path}/run", "--weights"]
    assert main([*command, str(pretrained["mac"])]) == 1
    able = ", ".join(name for name in models.MODELS if name != "mac")
    assert f"to write captions: {able}; got Mac" in capsys.readouterr().err
    assert main([*command, str(pretrained["smaug"]), "data.words=513"]) == 1
    assert "need data.words <= 512, the positions of the decoder" in capsys.readouterr().err
    weights = ["--weights", str(pretrained["smaug"])]
    assert main(["eval", "caption", *weights]) == 1
    assert "need a run of `vidl finetune caption`, got Smaug" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "retrieval", *weights, "--length-penalty", "1"])
    assert "--length-penalty is for caption, not retrieval" in capsys.readouterr().err
    (tmp_path / "decoder.json").write_text('{"layers": 0}')
    with pytest.raises(ValueError, match="need an object with layers of 1 or more in .*, got"):
        runs.read_layers(tmp_path)


def test_multiple_choice_of_moving_shapes(pretrained, capsys):
    for name in pretrained:
        assert main(["eval", "mc", "--weights", str(pretrained[name])]) == 0
        assert "5 questions, " in capsys.readouterr().out


def test_a_task_needs_its_text(pretrained, tmp_path, capsys):
    command = ["finetune", "qa", "--weights", str(pretrained["smaug"]), "data.task=caption"]
    assert main([*command, f"run.folder={tmp_path}/qa"]) == 1
    assert "need data.task=question for this task, got caption" in capsys.readouterr().err
    options = ["data.task=choice", f"run.folder={tmp_path}/run"]
    with pytest.raises(ValueError, match="need data.task=caption for this task, got choice"):
        pretrain(Config.read(None, [*TINY, *SMAUG, *options]))
    tasks = "retrieval, qa, caption, pair"
    with pytest.raises(ValueError, match=f"need a task among {tasks}, got 'mc'"):
        configuration(pretrained["smaug"], task="mc")
    config = configuration(pretrained["smaug"], task="qa")
    with pytest.raises(ValueError, match="need a form among classifier, ranking, got 'both'"):
        finetune("qa", config, form="both")
    with pytest.raises(ValueError, match="need top >= 1 of the ranking decoder, got 0"):
        finetune("qa", config, form="ranking", top=0)
    ranks = runs.parallel.Ranks(0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="need a task among .*mc, qa, caption, pair, got 'vqa'"):
        runs.evaluate(pretrained["smaug"], "vqa", None, ranks, runs.Options())


def test_answers_of_a_stranger(tmp_path):
    form = {"name": "ranking", "layers": 3, "top": 128}
    for kept in (
        ["red"], {"form": "ranking", "answers": ["red"]}, {"form": form},
        *({"form": form | wrong, "answers": ["red"]}
          for wrong in ({"name": "both"}, {"top": 0}, {"layers": True})),
    ):  # fmt: skip
        text = json.dumps(kept)
        (tmp_path / "answers.json").write_text(text)
        with pytest.raises(ValueError, match="need an object of form .* and answers in .*, got"):
            runs.read_answers(tmp_path)


def test_evaluation_on_the_command_line(pretrained, clips, tmp_path, capsys):
    weights, result = ["--weights", str(pretrained["smaug"])], tmp_path / "found.json"
    captions = ["--data", str(clips / "captions.json")]
    assert (
        main(["eval", "retrieval", *weights, *captions, "--rerank", "2", "--json", str(result)])
        == 0
    )
    shown = capsys.readouterr().out
    assert "4 clips, 4 captions" in shown and "top 2 re-ranked" in shown and "d.mp4" in shown
    assert json.loads(result.read_text())["rerank"] == 2
    assert (
        main(["eval", "retrieval", *weights, "--masked", "--unpruned", "--dtype", "bfloat16"]) == 0
    )
    assert "5 clips, 5 captions" in capsys.readouterr().out  # of moving shapes, as in training
    choices = ["--data", str(clips / "choices.json")]
    assert main(["eval", "mc", "--weights", str(pretrained["mac"]), *choices]) == 0
    assert "4 questions" in capsys.readouterr().out
    assert main(["eval", "retrieval", *weights, *choices]) == 1
    assert "need a caption of every clip" in capsys.readouterr().err
    assert main(["eval", "qa", *weights, *captions]) == 1
    assert "need a run of `vidl finetune qa`, got Smaug" in capsys.readouterr().err
    assert main(["eval", "retrieval", "--weights", str(tmp_path)]) == 1
    assert "need the folder of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "mc", *weights, "--rerank", "2"])


def test_evaluation_of_clips_that_are_all_missing(pretrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VIDL_CACHE", str(tmp_path / "cache"))
    names = [f"{n}.mp4" for n in range(3)]
    rows = [dict(video=n, caption=["a", "b"], answer=1, question="which") for n in names]
    (tmp_path / "mc.json").write_text(json.dumps(rows))
    rows = [dict(video=name, caption=name) for name in names]
    (tmp_path / "retrieval.json").write_text(json.dumps(rows))
    for task in ("mc", "retrieval"):
        result = tmp_path / "result.json"
        command = ["eval", task, "--weights", str(pretrained["mac"]), "--json", str(result)]
        for workers in ("0", "1"):
            data = ["--data", str(tmp_path / f"{task}.json"), "--workers", workers]
            assert main([*command, *data]) == 1
            shown = capsys.readouterr()
            assert shown.out == "" and not result.exists()
            last = shown.err.strip().splitlines()[-1]
            assert last.startswith("vidl eval: none of 3 clips can be read"), last


def test_evaluation_from_python(pretrained, clips):
    with runs.parallel.ranks("cpu") as ranks:
        options = runs.Options(quiet=True)
        files = (clips / "captions.json", None)
        result = runs.evaluate(pretrained["mac"], "retrieval", files, ranks, options)
        assert isinstance(result, Retrieval) and len(result.broken) == 1
        files = (clips / "choices.json", None)
        assert isinstance(runs.evaluate(pretrained["mac"], "mc", files, ranks, options), Accuracy)


def test_export_on_the_command_line(pretrained, tmp_path, capsys):
    assert main(["export", "--weights", str(pretrained["smaug"]), "--out", str(tmp_path)]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert (tmp_path / line).is_file()
    assert main(["export", "--weights", str(tmp_path), "--out", str(tmp_path)]) == 1


def test_finetuning_errors(pretrained, tmp_path, capsys):
    with pytest.raises(ValueError, match="no field 'model.mask_ratios'"):
        configuration(pretrained["mac"], None, ["model.mask_ratios=1"])
    with pytest.raises(SystemExit):
        main(["finetune", "retrieval", "--weights", str(tmp_path)])
    assert "need the folder of a run" in capsys.readouterr().err
