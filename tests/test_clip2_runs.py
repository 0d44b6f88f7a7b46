"""train.py --stage clip2 and what follows it, on a dozen small phantoms."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import published
import reaf_hsenet.presets as presets
import train
from reaf_hsenet.config import Augmentation, GuidedVisionConfig
from reaf_hsenet.data.loader import CTReportDataset
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.files import read_json, write_json
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.trained import load_trained
from reaf_hsenet.train import contrastive, contrastive_setup, phantom_data
from reaf_hsenet.weights.slice_encoder import describe, load_slice_encoder
from tiny import (
    assert_same,
    config_of,
    flip_last_bit,
    numbers,
    published_stage2,
    resume,
    retrieval,
    slice_encoder,
    stage2,
    tiny,
    weights,
    wrong,
)


@pytest.fixture
def teacher(stages) -> Path:
    return stages / "clip1"


@pytest.fixture
def student(stages) -> Path:
    return stages / "clip2"


@pytest.mark.slow
def test_stage_2_starts_from_its_teacher_and_trains_guidance_and_towers(teacher, student):
    start, end = weights(teacher), weights(student)
    assert set(end) - set(start) == {n for n in end if n.startswith(("vision.guidance.", "vision.score."))}
    assert all(not torch.equal(start[n], end[n]) for n in start)
    config = config_of(student)
    assert config["stage"] == "clip2" and config["model"]["vision"]["slice_width"] == 24
    assert config["slices"]["sha256"] == describe(slice_encoder(), "other name")["sha256"]
    assert config["origin"]["teacher"] == config["origin"]["init"] == str(teacher)
    assert numbers(student, "relation")[0]["relation"] > 0
    assert (student / "vocab.txt").read_text() == (teacher / "vocab.txt").read_text()


def test_an_account_says_what_the_teacher_did_not_have(teacher, tmp_path, capsys):
    assert train.main(stage2(teacher, tmp_path / "r", "--max-steps", 1)) == 0
    assert f"{teacher}: 50 tensors loaded; left at their start: vision.guidance" in capsys.readouterr().out


@pytest.mark.slow
def test_stage_2_resumes_bit_for_bit(student, tmp_path):
    out = shutil.copytree(student, tmp_path / "run")
    Run(out).point("last", 3)
    assert train.main(resume(out, stage="clip2")) == 0
    assert_same(out, student)


@pytest.mark.slow
def test_grad_cache_trains_stage_2_as_one_pass_does(teacher, tmp_path, monkeypatch):
    # Dropout would be drawn anew for each chunk.
    still = partial(GuidedVisionConfig, guidance_dropout=0.0)
    monkeypatch.setattr(contrastive_setup, "GuidedVisionConfig", still)
    plain = tmp_path / "plain"
    assert train.main(stage2(teacher, plain, "--max-steps", 2)) == 0
    for name, chunk in (("whole", 4), ("halves", 2), ("uneven", 3)):
        assert train.main(stage2(teacher, tmp_path / name, "--max-steps", 2, "--grad-cache", chunk)) == 0
        for a, b in zip(numbers(plain, "loss"), numbers(tmp_path / name, "loss"), strict=True):
            assert (a["loss"], a["relation"]) == pytest.approx((b["loss"], b["relation"]), abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_stage_2_is_evaluated_and_compared_with_stage_1(stages, tmp_path, capsys):
    runs = [str(shutil.copytree(stages / name, tmp_path / name)) for name in ("clip1", "clip2")]
    for run in runs:
        assert evaluate.main(retrieval(run)) == 0
        assert evaluate.main([*retrieval(run), "--task", "zeroshot", "--bootstrap", "0"]) == 0
    assert evaluate.main(["--task", "retrieval", "--compare", *runs, "--bootstrap", "20"]) == 0
    assert "report to volume, R@1" in capsys.readouterr().out


def test_without_guidance_stage_2_needs_no_slices(prepared, tmp_path):
    first = tmp_path / "first"
    assert train.main(tiny(prepared, first, "--max-steps", 1)) == 0
    assert train.main(stage2(first, tmp_path / "second", "--max-steps", 1, "--no-guidance")) == 0
    assert not any("guidance" in n for n in weights(tmp_path / "second"))


def other_words(run: Path, out: Path) -> Path:
    """A copy of a run with another vocabulary."""
    words = (shutil.copytree(run, out) / "vocab.txt").read_text().splitlines()
    (out / "vocab.txt").write_text("\n".join([*words[:-1], "another"]) + "\n")
    return out


def test_teacher_and_student_of_two_vocabularies_are_refused(teacher, student, tmp_path):
    other, out = other_words(teacher, tmp_path / "other-words"), tmp_path / "r"
    words = "{}: has another vocabulary than the teacher, .*{}"
    wrong(stage2(teacher, out, "--teacher", other), words.format("clip1", "other-words"))
    wrong(stage2(other, out, "--teacher", teacher), words.format("other-words", "clip1"))
    run = other_words(student, tmp_path / "run")
    wrong(resume(run, stage="clip2"), "run: has another vocabulary than the te")


def test_a_run_started_from_a_stage_2_run_keeps_its_teacher(teacher, student, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, tmp_path / "runs/clip1-hsenet")  # the default, which is not what the run had
    assert train.main(stage2(student, tmp_path / "r", "--max-steps", 1)) == 0
    assert config_of(tmp_path / "r")["origin"]["teacher"] == str(teacher)
    assert f"{Run(teacher).pointer('last')}: the teacher\n" in capsys.readouterr().out


def test_real_data_below_a_folder_named_phantom_get_no_home_made_features(prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "phantom/16x32x32")
    assert train.main(tiny(data, tmp_path / "first", "--max-steps", 1)) == 0
    wrong(stage2(tmp_path / "first", tmp_path / "r"), "manifest.json: has no slice features; make them")
    assert not (data / "slice_encoder").exists()


@pytest.mark.slow
def test_the_built_in_phantoms_get_slice_features_and_an_interrupted_start_keeps_its_encoder(
    prepared, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    small = {"size": 32, "patch": 16, "width": 24, "depth": 1, "heads": 2, "mlp": 48}
    monkeypatch.setattr(phantom_data, "SLICE_ENCODER", small)
    data = shutil.copytree(prepared, tmp_path / "data/phantom/16x32x32")
    assert train.main(tiny(data, tmp_path / "first", "--max-steps", 1)) == 0

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("reaf_hsenet.data.slice_features.add_slice_features", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.main(stage2(tmp_path / "first", tmp_path / "second"))
    made = (data / "slice_encoder/model.safetensors").read_bytes()
    monkeypatch.setattr(phantom_data, "PHANTOM_SEED", 1)  # an encoder made now would be another
    assert train.main(stage2(tmp_path / "first", tmp_path / "second", "--max-steps", 1)) == 0
    assert (data / "slice_encoder/model.safetensors").read_bytes() == made
    manifest = load_manifest(data)
    assert manifest.slices["width"] == 24 and manifest.slices["recipe"] == "phantom"
    manifest.check(["train", "validation"], slices=True)
    loaded, provenance = load_slice_encoder(str(data / "slice_encoder"))
    assert provenance["sha256"] == manifest.slices["sha256"]


@pytest.mark.slow
def test_a_run_resumes_from_another_folder_and_with_its_teacher_moved(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(tiny(stages / "data", Path("first"), "--max-steps", 2)) == 0
    assert train.main(stage2("first/", "second", "--max-steps", 2, "--save-every", 1, "--keep", 9)) == 0
    out = tmp_path / "second"
    again = resume(out, stage="clip2")
    assert train.main([*again, "--init", "./first/"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Run(out).point("last", 1)
    assert train.main(again) == 0
    (tmp_path / "first").rename("moved")
    wrong(again, f"{tmp_path}/first: no run of stage clip1, the teacher; .*--teacher")
    assert train.main([*again, "--teacher", "moved"]) == 0
    assert config_of(out)["origin"]["teacher"] == str(tmp_path / "elsewhere/moved")
    path = Run("moved").pointer("last") / "model.safetensors"
    flip_last_bit(path)
    wrong(again, "model.safetensors: is damaged")
    (path.parent / "checkpoint.json").unlink()  # as other weights would be put there by hand
    wrong(again, "moved: none of its checkpoints is the teacher that the run had")
    wrong([*again, "--out", "nothing"], "nothing: holds no run to resume; name one with --out")


def test_a_finished_run_is_not_taken_for_one_of_another_teacher(teacher, student, tmp_path, capsys):
    out, other = shutil.copytree(student, tmp_path / "run"), shutil.copytree(teacher, tmp_path / "other")
    flip_last_bit(Run(other).pointer("last") / "model.safetensors")
    (Run(other).pointer("last") / "checkpoint.json").unlink()
    flags = ("--max-steps", 6, "--save-every", 3, "--keep", 9)
    assert train.main(stage2(teacher, out, *flags)) == 0
    assert "finished already" in capsys.readouterr().out
    wrong(stage2(teacher, out, *flags, "--teacher", other), "holds a run already")
    wrong(stage2(other, out, *flags, "--teacher", teacher), "holds a run already")


def test_a_teachers_adapters_are_merged_and_not_inherited(stages, teacher, tmp_path):
    lora = ("--lora", "vision", "--lora-r", 2, "--max-steps", 1)
    assert train.main(tiny(stages / "data", tmp_path / "adapted", "--init", teacher, *lora)) == 0
    assert any("lora_" in n for n in weights(tmp_path / "adapted"))
    assert train.main(stage2(tmp_path / "adapted", tmp_path / "whole", "--max-steps", 1)) == 0
    assert not any("lora_" in n for n in weights(tmp_path / "whole"))
    again = taught_only(teacher, tmp_path / "again", *lora)
    assert train.main(again) == 0  # its teacher is what the adapters adapt
    assert any("lora_" in n for n in weights(tmp_path / "again"))


def taught_only(teacher: Path, out: Path, *more) -> list[str]:
    """A command with --teacher and without --init."""
    return ["--teacher" if part == "--init" else part for part in stage2(teacher, out, *more)]


def test_what_a_published_file_does_not_give_is_named_and_the_text_tower_is_the_teachers(
    teacher, tmp_path, capsys
):
    model = load_trained(teacher).model
    tensors = published_stage2(model, model)
    tensors = {n: t + 1 if "language" in n else t for n, t in tensors.items()}
    torch.save(tensors, tmp_path / "clip.bin")
    arguments = stage2(tmp_path / "clip.bin", tmp_path / "r", "--teacher", teacher, "--max-steps", 1)
    assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    inner = sum(n.startswith("stage1_") for n in tensors)
    text = sum(n.startswith("text") for n in model.state_dict())
    assert f"not used: stage1_pretrained_CLIP.* ({inner})" in printed
    assert f"not used, of another vocabulary: text* ({text})" in printed
    assert f"text encoder: of the teacher, {teacher}" in printed
    start, end = weights(teacher), weights(tmp_path / "r")
    # The first step's learning rate is 0.
    assert all(torch.equal(end[n], start[n]) for n in start)


def test_a_manifest_with_too_few_volumes_is_called_by_its_name(prepared, tmp_path):
    entries = read_json(prepared / "manifest.json")["splits"]["train"]
    one, two = ([{"image": str(prepared / e["volume"]), "text": e["text"]}] for e in entries[:2])
    write_json(tmp_path / "few.json", {"train": one, "validation": two})
    few = ["--stage", "clip1", "--data", tmp_path / "few.json", "--out", tmp_path / "r", "--device", "cpu"]
    wrong(few, "few.json: 1 training volumes for 1 processes")


def count_taught(monkeypatch) -> list[int]:
    """How many volumes the teacher of train.py encodes at a time."""
    seen = []

    class Watched(contrastive.Teacher):
        def __init__(self, model, **more):
            super().__init__(model, **more)
            model.vision.register_forward_hook(lambda _, given, made: seen.append(len(given[0])))

    monkeypatch.setattr(contrastive, "Teacher", Watched)
    return seen


@pytest.mark.slow
def test_the_teacher_sees_a_volume_once_where_nothing_changes_it_and_else_every_time(
    stages, teacher, tmp_path, monkeypatch
):
    seen = count_taught(monkeypatch)
    rows = len(load_manifest(stages / "data").entries("train"))
    assert train.main(stage2(teacher, tmp_path / "plain", "--max-steps", 6)) == 0
    assert rows // 4 * 4 <= sum(seen) <= rows
    seen.clear()
    monkeypatch.setitem(presets.TINY_STAGES["clip2", "hsenet"], "augment", Augmentation())
    assert train.main(stage2(teacher, tmp_path / "augmented", "--max-steps", 6)) == 0
    assert sum(seen) == 6 * 4 > rows


@pytest.mark.parametrize("flags", [(), ("--slices-stay",)])
def test_slices_stay_reaches_the_training_set(teacher, tmp_path, monkeypatch, flags):
    made = []

    class Watched(CTReportDataset):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            made.append(self)

    monkeypatch.setattr(contrastive, "CTReportDataset", Watched)
    flip = Augmentation(rotate=0, flip=1, scale=0, shift=0)
    monkeypatch.setitem(presets.TINY_STAGES["clip2", "hsenet"], "augment", flip)
    assert train.main(stage2(teacher, tmp_path / "r", "--max-steps", 1, *flags)) == 0
    stored = torch.from_numpy(np.load(made[0].manifest.slices_path(made[0].entries[0]))).float()
    assert torch.equal(made[0][0, 0].slices, stored if flags else stored.flip(0))


def test_a_text_model_starts_the_text_encoder_in_the_teachers_place(teacher, tmp_path):
    words = len((teacher / "vocab.txt").read_text().splitlines())
    bert, folder = published.bert(), tmp_path / "bert"
    name = next(n for n in bert if n.endswith("word_embeddings.weight"))
    bert[name] = torch.randn(words, bert[name].shape[1])
    published.write_vocabulary(folder, words, published.BERT["config"] | {"vocab_size": words})
    published.write(folder / "model.safetensors", bert)
    shutil.copy(teacher / "vocab.txt", folder)
    flags = ("--text-model", folder, "--max-steps", 1)
    assert train.main(taught_only(teacher, tmp_path / "r", *flags)) == 0
    found, start = weights(tmp_path / "r"), weights(teacher)
    assert torch.equal(found["text.word_embed.weight"], bert[name])
    assert torch.equal(found["vision.pos_embed"], start["vision.pos_embed"])
