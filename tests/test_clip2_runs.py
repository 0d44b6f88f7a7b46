"""train.py --stage clip2 and what follows it, on a dozen small phantoms."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import reaf_hsenet.presets as presets
import train
from reaf_hsenet.config import Augmentation, GuidedVisionConfig
from reaf_hsenet.data.loader import CTReportDataset
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.slice_features import add_slice_features
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.trained import load_dual_encoder
from reaf_hsenet.train import contrastive, guided_setup, phantom_slices
from reaf_hsenet.train.phantom_slices import train_slice_encoder
from reaf_hsenet.weights.slice_encoder import describe
from test_train import numbers, same_weights, tiny, weights


def encoder(seed=0) -> SliceEncoder:
    torch.manual_seed(seed)
    return SliceEncoder(size=32, patch=16, width=24, depth=1, heads=2, mlp=48)


@pytest.fixture(scope="module")
def sliced(prepared, tmp_path_factory) -> Path:
    """The prepared phantoms, with slice features."""
    out = shutil.copytree(prepared, tmp_path_factory.mktemp("sliced") / "data")
    add_slice_features(out, encoder(), describe(encoder(), "tiny", recipe="phantom"), progress=False)
    return out


@pytest.fixture(scope="module")
def teacher(sliced, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "clip1"
    assert train.main(tiny(sliced, out, "--max-steps", 6)) == 0
    return out


def stage2(teacher: Path, out: Path, *more) -> list[str]:
    return [
        "--stage",
        "clip2",
        "--init",
        str(teacher),
        "--out",
        str(out),
        "--batch-size",
        "4",
        "--log-every",
        "1",
        "--device",
        "cpu",
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "clip2"
    assert train.main(stage2(teacher, out, "--max-steps", 6)) == 0
    return out


@pytest.mark.slow
def test_stage_2_starts_from_its_teacher_and_trains_guidance_and_towers(teacher, finished, capsys):
    start, end = weights(teacher), weights(finished)
    assert set(end) - set(start) == {n for n in end if n.startswith(("vision.guidance.", "vision.score."))}
    assert all(not torch.equal(start[n], end[n]) for n in start)
    config = json.loads((finished / "config.json").read_text())
    assert config["stage"] == "clip2" and config["model"]["vision"]["slice_width"] == 24
    assert config["slices"]["sha256"] == describe(encoder(), "other name")["sha256"]
    assert config["origin"]["teacher"] == config["origin"]["init"] == str(teacher)
    logged = [r for r in Run(finished).read_log() if "relation" in r]
    assert logged[0]["relation"] > 0
    assert (finished / "vocab.txt").read_text() == (teacher / "vocab.txt").read_text()


def test_an_account_says_what_the_teacher_did_not_have(teacher, tmp_path, capsys):
    assert train.main(stage2(teacher, tmp_path / "r", "--max-steps", 1)) == 0
    assert f"{teacher}: 50 tensors loaded; left at their start: vision.guidance" in capsys.readouterr().out


@pytest.mark.slow
def test_stage_2_resumes_bit_for_bit(teacher, finished, tmp_path):
    out = tmp_path / "run"
    assert train.main(stage2(teacher, out, "--max-steps", 6, "--save-every", 3, "--keep", 9)) == 0
    (out / "checkpoints/last").write_text("step-000003\n")
    assert (
        train.main(["--stage", "clip2", "--out", str(out), "--resume", "--log-every", "1", "--device", "cpu"])
        == 0
    )
    assert same_weights(out, finished) and numbers(out) == numbers(finished)


@pytest.mark.slow
def test_grad_cache_trains_stage_2_as_one_pass_does(teacher, tmp_path, monkeypatch):
    # Dropout would be drawn anew for each chunk.
    monkeypatch.setattr(guided_setup, "GuidedVisionConfig", partial(GuidedVisionConfig, guidance_dropout=0.0))
    plain = tmp_path / "plain"
    assert train.main(stage2(teacher, plain, "--max-steps", 2)) == 0
    for name, chunk in (("whole", 4), ("halves", 2), ("uneven", 3)):
        assert train.main(stage2(teacher, tmp_path / name, "--max-steps", 2, "--grad-cache", chunk)) == 0
        logs = ([r for r in numbers(run) if "loss" in r] for run in (plain, tmp_path / name))
        for a, b in zip(*logs, strict=True):
            assert (a["loss"], a["relation"]) == pytest.approx((b["loss"], b["relation"]), abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_stage_2_is_evaluated_and_compared_with_stage_1(teacher, finished, sliced, capsys):
    for run in (teacher, finished):
        for task in ("retrieval", "zeroshot"):
            more = ["--bootstrap", "0"] if task == "zeroshot" else []
            assert evaluate.main(["--task", task, "--run", str(run), "--device", "cpu", *more]) == 0
    assert (
        evaluate.main(["--task", "retrieval", "--compare", str(teacher), str(finished), "--bootstrap", "20"])
        == 0
    )
    assert "report to volume, R@1" in capsys.readouterr().out


def test_without_guidance_stage_2_needs_no_slices(prepared, tmp_path):
    first = tmp_path / "first"
    assert train.main(tiny(prepared, first, "--max-steps", 1)) == 0
    assert train.main(stage2(first, tmp_path / "second", "--max-steps", 1, "--no-guidance")) == 0
    assert not any("guidance" in n for n in weights(tmp_path / "second"))


def wrong(argv: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        train.main(argv)
    assert "\n" not in str(caught.value)


def test_wrong_input_of_stage_2_is_named(teacher, finished, sliced, prepared, tmp_path):
    out = tmp_path / "out"
    wrong(
        stage2(teacher, out, "--data", prepared),
        "manifest.json: has no slice features.*preprocess.py --slices",
    )
    wrong(
        ["--stage", "clip2", "--teacher", str(tmp_path / "none")], "none: no run of stage clip1, the teacher"
    )
    wrong(
        ["--stage", "clip2", "--teacher", str(finished)],
        "is a clip2 run of hsenet; the teacher is hsenet's clip1",
    )
    wrong(["--stage", "clip2", "--model", "reaf", "--init", str(teacher)], "clip2: is a stage of hsenet")
    wrong(
        stage2(teacher, out, "--preset", "hsenet-base"),
        "--preset hsenet-base: has width 768, the teacher .* 128",
    )
    wrong(stage2(teacher, out, "--size", 32, 32, 32), "--size: stage clip2 has its teacher's")
    data = shutil.copytree(sliced, tmp_path / "data")
    features = sorted((data / "slices").glob("**/*.npy"))
    np.save(features[0], np.load(features[0])[:20])
    wrong(stage2(teacher, out, "--data", data), f"{features[0].name}: has .* bytes, expected")
    features[0].unlink()
    wrong(stage2(teacher, out, "--data", data), f"{features[0].name}: is in the manifest but absent")


def test_features_of_another_encoder_are_refused_in_evaluation(finished, prepared, tmp_path):
    other = shutil.copytree(prepared, tmp_path / "other")
    add_slice_features(other, encoder(1), describe(encoder(1), "tiny", recipe="phantom"), progress=False)
    with pytest.raises(InputError, match="its slice features have another sha256"):
        evaluate.main(
            ["--task", "retrieval", "--run", str(finished), "--data", str(other), "--device", "cpu"]
        )


def test_another_vocabulary_than_the_teachers_is_refused(teacher, tmp_path):
    from test_pretrained import LAYOUTS, write_folder

    folder = write_folder(tmp_path / "bert", *LAYOUTS["BertModel"])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(195))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    wrong(
        stage2(teacher, tmp_path / "r", "--text-model", folder),
        "bert: has another vocabulary than the teacher",
    )


@pytest.mark.slow
def test_the_phantoms_slice_encoder_learns_from_the_teachers_reports(teacher, sliced):
    run, manifest = load_dual_encoder(teacher), load_manifest(sliced)
    one, two = (train_slice_encoder(manifest, run, torch.device("cpu"), workers=1, steps=s) for s in (2, 2))
    assert all(torch.equal(t, two.state_dict()[n]) for n, t in one.state_dict().items())
    assert one.width == 128 and not one.training


def change_manifest(data: Path, out: Path, **values) -> Path:
    """A copy of a data set whose manifest says something else."""
    shutil.copytree(data, out)
    manifest = json.loads((out / "manifest.json").read_text())
    for name, value in values.items():
        manifest[name] |= value
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


@pytest.fixture(scope="module")
def other_words(sliced, tmp_path_factory) -> Path:
    """A stage-1 run on reports of other words, so with another vocabulary."""
    data = shutil.copytree(sliced, tmp_path_factory.mktemp("words") / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    for entry in manifest["splits"]["train"]:
        entry["text"] = "Hepatomegaly and thyroid goitre. " + entry["text"]
    (data / "manifest.json").write_text(json.dumps(manifest))
    out = tmp_path_factory.mktemp("runs") / "other-words"
    assert train.main(tiny(data, out, "--max-steps", 1)) == 0
    return out


def test_teacher_and_student_of_two_vocabularies_are_refused(teacher, other_words, finished, tmp_path):
    out = tmp_path / "r"
    wrong(
        stage2(teacher, out, "--teacher", other_words),
        "clip1: has another vocabulary than the teacher, .*other-words",
    )
    wrong(
        stage2(other_words, out, "--teacher", teacher),
        "other-words: has another vocabulary than the teacher, .*clip1",
    )
    run = shutil.copytree(finished, tmp_path / "run")
    words = (run / "vocab.txt").read_text().splitlines()
    (run / "vocab.txt").write_text("\n".join([*words[:-1], "another"]) + "\n")
    wrong(
        ["--stage", "clip2", "--out", str(run), "--resume", "--device", "cpu"],
        "run: has another vocabulary than the te",
    )


def test_a_run_started_from_a_stage_2_run_keeps_its_teacher(teacher, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, tmp_path / "runs/clip1-hsenet")  # the default, which is not what the run had
    assert train.main(stage2(finished, tmp_path / "r", "--max-steps", 1)) == 0
    assert json.loads((tmp_path / "r/config.json").read_text())["origin"]["teacher"] == str(teacher)
    assert f"{Run(teacher).pointer('last')}: the teacher\n" in capsys.readouterr().out


def test_flags_of_stage_2_are_checked(teacher, sliced, tmp_path):
    out = tmp_path / "r"
    for value in ("nan", "-1", "inf"):
        wrong(
            stage2(teacher, out, "--relation", value),
            f"--relation {value}.*: expected (0 or more|1000 or less)",
        )
    for value in ("0", "-5"):
        wrong(
            stage2(teacher, out, "--relation-steps", value), f"--relation-steps {value}: expected more than 0"
        )
    for flag in (
        ("--relation", 0.5),
        ("--relation", 0),
        ("--relation-steps", 9),
        ("--teacher", "nowhere"),
        ("--no-guidance",),
        ("--slices-stay",),
    ):
        wrong(tiny(sliced, out, *flag), f"{flag[0]}: is an option of --stage clip2")
    wrong(
        stage2(teacher, out, "--no-guidance", "--slices-stay"),
        "--slices-stay: with --no-guidance there are no slice",
    )


def test_volumes_of_another_recipe_than_the_teachers_are_refused(teacher, finished, sliced, tmp_path):
    data = change_manifest(sliced, tmp_path / "data", recipe={"window": [-1150, 350]})
    words = "have window -1150x350, but .*clip1 needs window -1000x200"
    wrong(stage2(teacher, tmp_path / "r", "--data", data), words)
    wrong(tiny(data, tmp_path / "r", "--init", teacher), words)


def test_slice_features_are_those_of_the_run_that_is_started_from_or_resumed(finished, prepared, tmp_path):
    other = shutil.copytree(prepared, tmp_path / "other")
    add_slice_features(other, encoder(1), describe(encoder(1), "tiny", recipe="phantom"), progress=False)
    words = "its slice features have another sha256 than "
    wrong(stage2(finished, tmp_path / "r", "--data", other), f"{words}--init .*clip2")
    wrong(
        ["--stage", "clip2", "--out", str(finished), "--resume", "--data", str(other), "--device", "cpu"],
        f"{words}.*clip2",
    )


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
    for name, value in (("STEPS", 2), ("BATCH", 4), ("SLICES_A_STEP", 2)):
        monkeypatch.setattr(phantom_slices, name, value)
    small = {"size": 32, "patch": 16, "width": 24, "depth": 1, "heads": 2, "mlp": 48}
    monkeypatch.setattr(phantom_slices, "ENCODER", small)
    data = shutil.copytree(prepared, tmp_path / "data/phantom/16x32x32")
    assert train.main(tiny(data, tmp_path / "first", "--max-steps", 1)) == 0

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(phantom_slices, "add_slice_features", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.main(stage2(tmp_path / "first", tmp_path / "second"))
    made = (data / "slice_encoder/model.safetensors").read_bytes()
    monkeypatch.setattr(phantom_slices, "SEED", 1)  # an encoder trained now would be another
    assert train.main(stage2(tmp_path / "first", tmp_path / "second", "--max-steps", 1)) == 0
    assert (data / "slice_encoder/model.safetensors").read_bytes() == made
    manifest = load_manifest(data)
    assert manifest.slices["width"] == 24 and manifest.slices["recipe"] == "phantom"
    manifest.check(["train", "validation"], slices=True)
    loaded, provenance = phantom_slices.load_slice_encoder(str(data / "slice_encoder"))
    assert provenance["sha256"] == manifest.slices["sha256"]


@pytest.mark.slow
def test_a_run_resumes_from_another_folder_and_with_its_teacher_moved(sliced, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(tiny(sliced, Path("first"), "--max-steps", 2)) == 0
    assert train.main(stage2("first/", "second", "--max-steps", 2, "--save-every", 1, "--keep", 9)) == 0
    out = tmp_path / "second"
    resume = ["--stage", "clip2", "--out", str(out), "--resume", "--device", "cpu"]
    assert train.main([*resume, "--init", "./first/"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (out / "checkpoints/last").write_text("step-000001\n")
    assert train.main(resume) == 0
    (tmp_path / "first").rename("moved")
    wrong(resume, f"{tmp_path}/first: no run of stage clip1, the teacher; .*--teacher")
    assert train.main([*resume, "--teacher", "moved"]) == 0
    assert json.loads((out / "config.json").read_text())["origin"]["teacher"] == str(
        tmp_path / "elsewhere/moved"
    )
    path = Run("moved").pointer("last") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    wrong(resume, "model.safetensors: is damaged")
    (path.parent / "checkpoint.json").unlink()  # as other weights would be put there by hand
    wrong(resume, "moved: none of its checkpoints is the teacher that the run had")
    wrong(
        [*resume[:2], "--out", "nothing", "--resume"], "nothing: holds no run to resume; name one with --out"
    )


def test_a_finished_run_is_not_taken_for_one_of_another_teacher(teacher, finished, sliced, tmp_path, capsys):
    assert train.main(stage2(teacher, finished, "--max-steps", 6)) == 0
    assert "finished already" in capsys.readouterr().out
    assert train.main(tiny(sliced, tmp_path / "other", "--max-steps", 2)) == 0
    wrong(stage2(teacher, finished, "--max-steps", 6, "--teacher", tmp_path / "other"), "holds a run already")
    wrong(stage2(tmp_path / "other", finished, "--max-steps", 6, "--teacher", teacher), "holds a run already")


def test_a_teachers_adapters_are_merged_and_not_inherited(teacher, tmp_path):
    lora = ("--lora", "vision", "--lora-r", 2)
    manifest = json.loads((teacher / "config.json").read_text())["data"]
    adapted = tmp_path / "adapted"
    assert train.main(tiny(Path(manifest), adapted, "--init", teacher, *lora, "--max-steps", 1)) == 0
    assert any("lora_" in n for n in weights(adapted))
    assert train.main(stage2(adapted, tmp_path / "whole", "--max-steps", 1)) == 0
    assert not any("lora_" in n for n in weights(tmp_path / "whole"))
    again = [
        "--stage",
        "clip2",
        "--teacher",
        str(teacher),
        "--out",
        str(tmp_path / "again"),
        "--batch-size",
        "4",
        "--max-steps",
        "1",
        "--device",
        "cpu",
        *map(str, lora),
    ]
    assert train.main(again) == 0  # its teacher is what the adapters adapt
    assert any("lora_" in n for n in weights(tmp_path / "again"))


def test_what_a_published_file_does_not_give_is_named_and_the_text_tower_is_the_teachers(
    teacher, tmp_path, capsys
):
    from test_clip2 import published_stage2

    model = load_dual_encoder(teacher).model
    published = published_stage2(model, model)
    published = {n: t + 1 if "language" in n else t for n, t in published.items()}
    torch.save(published, tmp_path / "clip.bin")
    arguments = stage2(tmp_path / "clip.bin", tmp_path / "r", "--teacher", teacher, "--max-steps", 1)
    assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    inner = sum(n.startswith("stage1_") for n in published)
    text = sum(n.startswith("text") for n in model.state_dict())
    assert f"not used: stage1_pretrained_CLIP.* ({inner})" in printed
    assert f"not used, of another vocabulary: text* ({text})" in printed
    assert f"text encoder: of the teacher, {teacher}" in printed
    start, end = weights(teacher), weights(tmp_path / "r")
    # The first step's learning rate is 0.
    assert all(torch.equal(end[n], start[n]) for n in start)


def test_a_reaf_run_cannot_start_stage_2(teacher, tmp_path):
    run = shutil.copytree(teacher, tmp_path / "reaf")
    config = json.loads((run / "config.json").read_text())
    config["model"]["model"] = "reaf"
    (run / "config.json").write_text(json.dumps(config))
    wrong(stage2(run, tmp_path / "r"), "--init .*reaf: is a run of reaf; it cannot start --model hsenet")


def test_a_manifest_with_too_few_volumes_is_called_by_its_name(sliced, tmp_path):
    data = shutil.copytree(sliced, tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    one, two = manifest["splits"]["train"][:2]
    rows = [{"image": str(data / entry["volume"]), "text": entry["text"]} for entry in (one, two)]
    (data / "few.json").write_text(json.dumps({"train": rows[:1], "validation": rows[1:]}))
    wrong(
        [
            "--stage",
            "clip1",
            "--data",
            str(data / "few.json"),
            "--out",
            str(tmp_path / "r"),
            "--device",
            "cpu",
        ],
        "few.json: 1 training volumes for 1 processes",
    )


def teacher_watched(monkeypatch) -> dict:
    """Counts the volumes that the teacher of train.py encodes."""
    seen = {"volumes": 0}

    class Watched(contrastive.Teacher):
        def __init__(self, model, *more):
            super().__init__(model, *more)
            model.vision.register_forward_hook(
                lambda _, x, __: seen.__setitem__("volumes", seen["volumes"] + len(x[0]))
            )

    monkeypatch.setattr(contrastive, "Teacher", Watched)
    return seen


@pytest.mark.slow
def test_the_teacher_sees_a_volume_once_where_nothing_changes_it_and_else_every_time(
    teacher, tmp_path, monkeypatch
):
    seen = teacher_watched(monkeypatch)
    rows = len(load_manifest(json.loads((teacher / "config.json").read_text())["data"]).entries("train"))
    assert train.main(stage2(teacher, tmp_path / "plain", "--max-steps", 6)) == 0
    assert rows // 4 * 4 <= seen["volumes"] <= rows
    seen["volumes"] = 0
    monkeypatch.setitem(presets.TINY_STAGES["clip2", "hsenet"], "augment", Augmentation())
    assert train.main(stage2(teacher, tmp_path / "augmented", "--max-steps", 6)) == 0
    assert seen["volumes"] == 6 * 4 > rows


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


def test_a_text_model_starts_the_text_encoder_in_the_teachers_place(teacher, tmp_path, capsys):
    from test_pretrained import LAYOUTS, write_folder

    rows = len((teacher / "vocab.txt").read_text().splitlines())
    published = dict(LAYOUTS["BertModel"][0])
    torch.manual_seed(0)
    published["embeddings.word_embeddings.weight"] = words = torch.randn(rows, 64)
    folder = write_folder(tmp_path / "bert", published, "model.safetensors", vocab_size=rows)
    shutil.copy(teacher / "vocab.txt", folder)
    out = tmp_path / "r"
    assert (
        train.main(
            [
                "--stage",
                "clip2",
                "--teacher",
                str(teacher),
                "--text-model",
                str(folder),
                "--out",
                str(out),
                "--batch-size",
                "4",
                "--max-steps",
                "1",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    found, start = weights(out), weights(teacher)
    assert torch.equal(found["text.word_embed.weight"], words)
    assert torch.equal(found["vision.pos_embed"], start["vision.pos_embed"])
