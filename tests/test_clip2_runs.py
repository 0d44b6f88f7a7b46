"""train.py --stage clip2 and what follows it, on a dozen small phantoms."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from reaf_hsenet.checkpoint import Run
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.slice_features import add_slice_features, describe
from reaf_hsenet.embedding import load_dual_encoder
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.phantom_slices import train_slice_encoder
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
    return ["--stage", "clip2", "--init", str(teacher), "--out", str(out), "--batch-size", "4", "--log-every", "1",
            "--device", "cpu", *map(str, more)]


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "clip2"
    assert train.main(stage2(teacher, out, "--max-steps", 6)) == 0
    return out


def test_stage_2_starts_from_its_teacher_and_trains_guidance_and_towers(teacher, finished, capsys):
    start, end = weights(teacher, "best"), weights(finished)
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


def test_stage_2_resumes_bit_for_bit(teacher, finished, tmp_path):
    out = tmp_path / "run"
    assert train.main(stage2(teacher, out, "--max-steps", 6, "--save-every", 3, "--keep", 9)) == 0
    (out / "checkpoints/last").write_text("step-000003\n")
    assert train.main(["--stage", "clip2", "--out", str(out), "--resume", "--log-every", "1", "--device", "cpu"]) == 0
    assert same_weights(out, finished) and numbers(out) == numbers(finished)


def test_grad_cache_trains_stage_2_as_one_pass_does(teacher, tmp_path):
    # Dropout of the guidance is drawn chunk by chunk, so it is compared with a chunk of the whole batch.
    for name, chunk in (("whole", 4), ("again", 4)):
        assert train.main(stage2(teacher, tmp_path / name, "--max-steps", 2, "--grad-cache", chunk)) == 0
    assert train.main(stage2(teacher, tmp_path / "plain", "--max-steps", 2)) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "again")
    plain, cached = weights(tmp_path / "plain"), weights(tmp_path / "whole")
    assert all((plain[n] - cached[n]).abs().max() < 1e-4 for n in plain)


def test_stage_2_is_evaluated_and_compared_with_stage_1(teacher, finished, sliced, capsys):
    for run in (teacher, finished):
        for task in ("retrieval", "zeroshot"):
            more = ["--bootstrap", "0"] if task == "zeroshot" else []
            assert evaluate.main(["--task", task, "--run", str(run), "--device", "cpu", *more]) == 0
    assert evaluate.main(["--task", "retrieval", "--compare", str(teacher), str(finished), "--bootstrap", "20"]) == 0
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
    wrong(stage2(teacher, out, "--data", prepared), "manifest.json: has no slice features.*preprocess.py --slices")
    wrong(["--stage", "clip2", "--teacher", str(tmp_path / "none")], "none: no run of stage clip1, the teacher")
    wrong(["--stage", "clip2", "--teacher", str(finished)], "is a clip2 run of hsenet; the teacher is hsenet's clip1")
    wrong(["--stage", "clip2", "--model", "reaf", "--init", str(teacher)], "clip2: is a stage of hsenet")
    wrong(stage2(teacher, out, "--preset", "hsenet-base"), "--preset hsenet-base: has width 768, the teacher .* 128")
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
        evaluate.main(["--task", "retrieval", "--run", str(finished), "--data", str(other), "--device", "cpu"])


def test_another_vocabulary_than_the_teachers_is_refused(teacher, tmp_path):
    from test_pretrained import LAYOUTS, write_folder

    folder = write_folder(tmp_path / "bert", *LAYOUTS["BertModel"])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(195))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    wrong(stage2(teacher, tmp_path / "r", "--text-model", folder), "bert: has another vocabulary than the teacher")


def test_the_phantoms_slice_encoder_learns_from_the_teachers_reports(teacher, sliced):
    run, manifest = load_dual_encoder(teacher), load_manifest(sliced)
    one, two = (train_slice_encoder(manifest, run, torch.device("cpu"), steps=s) for s in (2, 2))
    assert all(torch.equal(t, two.state_dict()[n]) for n, t in one.state_dict().items())
    assert one.width == 128 and not one.training
