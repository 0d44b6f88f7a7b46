"""Training starts from published weights, and learns from a published teacher, without converting them."""

import json
from dataclasses import replace

import pytest
import torch

import published
import train
from reaf_hsenet.config import VisionConfig
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.positions import resample_3d
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.runs.trained import load_trained
from reaf_hsenet.train.contrastive_setup import resampled
from reaf_hsenet.weights.__main__ import main as convert
from reaf_hsenet.weights.files import read_checkpoint
from reaf_hsenet.weights.names import M3D_CLIP, TEACHER, import_state
from reaf_hsenet.weights.shapes import initial_state
from tiny import wrong

SHORT = "--batch-size 4 --max-steps 1 --device cpu".split()


def clip2(data, out, *more) -> list[str]:
    return list(map(str, ["--stage", "clip2", "--data", data, "--out", out, *SHORT, *more]))


@pytest.mark.slow
def test_stage_2_learns_from_a_published_stage_1_file_whose_vocabulary_lies_elsewhere(
    sized_data, text_model, tmp_path, capsys
):
    file = published.write_m3d_clip(tmp_path / "M3D-CLIP")
    (file.parent / "vocab.txt").unlink()
    wrong(clip2(sized_data, tmp_path / "run", "--teacher", file), "M3D-CLIP: has no vocab.txt")
    flags = ("--teacher", file, "--text-model", text_model, "--lr", "1e-9")
    assert train.main(clip2(sized_data, tmp_path / "run", *flags)) == 0
    assert "text encoder: of the teacher" in capsys.readouterr().out
    run, teacher = load_trained(tmp_path / "run"), load_trained(file, text_model=str(text_model))
    assert (
        run.guided and run.origin["teacher"] == str(file) and run.origin["teacher_sha256"] == teacher.sha256()
    )
    assert torch.allclose(run.model.text.word_embed.weight, teacher.model.text.word_embed.weight, atol=1e-6)
    assert train.main([*clip2(sized_data, tmp_path / "run"), "--resume"]) == 0
    assert convert(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "m3d-clip"]) == 0
    exported = read_checkpoint(str(tmp_path / "out"))
    assert all(torch.equal(exported[f"{TEACHER}{n}"], t) for n, t in published.m3d_clip().items())
    teacher = published.write_m3d_clip(tmp_path / "2e3", published.hsenet_2e3())
    flags = ("--teacher", teacher, "--text-model", text_model)
    command = clip2(sized_data, tmp_path / "x", *flags)
    wrong(command, "is a clip2 run of hsenet; the teacher is hsenet's clip1")


@pytest.mark.slow
def test_stage_2_from_a_2e3_file_asks_for_its_teacher_and_takes_that_of_its_converted_run(
    sized_data, text_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    whole = published.write_m3d_clip(tmp_path / "2e3", published.hsenet_2e3())
    outer = {n: t for n, t in published.hsenet_2e3().items() if not n.startswith("stage1_")}
    for file in (whole, published.write_m3d_clip(tmp_path / "outer", outer)):
        message = f"--init {file}: does not come with its stage-1 model as a run.*--teacher"
        wrong(clip2(sized_data, tmp_path / "run", "--init", file, "--text-model", text_model), message)
    assert convert(["convert", str(whole), str(tmp_path / "2e3-run"), "--text-model", str(text_model)]) == 0
    assert train.main(clip2(sized_data, tmp_path / "run", "--init", tmp_path / "2e3-run")) == 0
    teacher = json.loads((tmp_path / "run/config.json").read_text())["origin"]["teacher"]
    assert teacher == str(tmp_path / "2e3-run/stage1")
    flags = ["--stage", "clip2", "--init", tmp_path / "2e3-run", "--device", "cpu"]
    wrong(flags, "2e3-run/stage1 has no data set of its own")


@pytest.mark.slow
def test_a_published_folder_without_vocabulary_starts_a_run_with_that_of_text_model(
    sized_data, text_model, tmp_path, monkeypatch
):
    folder = published.write_m3d_clip(tmp_path / "M3D-CLIP").parent
    (folder / "vocab.txt").unlink()
    small = replace(
        PRESETS["hsenet-tiny"],
        vision=VisionConfig((16, 64, 64), (4, 16, 16), width=48, depth=3, heads=4, mlp=96),
        embed=20,
    )
    monkeypatch.setitem(PRESETS, "hsenet-base", small)
    flags = ["--stage", "clip1", "--data", sized_data, *SHORT, "--lr", "1e-9"]
    flags += ["--init", folder, "--text-model", text_model, "--out", tmp_path / "run"]
    assert train.main(list(map(str, flags))) == 0
    found = load_trained(tmp_path / "run").model.state_dict()
    expected = import_state(M3D_CLIP, published.m3d_clip())
    assert all(torch.allclose(found[n], t, atol=1e-6) for n, t in expected.items())


def test_another_input_size_than_the_published_one_is_resampled_for_reaf_and_refused_for_hsenet(tmp_path):
    source, file = published.reaf(False), "hlip.pt"
    state = initial_state(source, file, "reaf", (4, 8, 8), (3, 2, 2))
    table = source["visual.trunk.spatial_posemb"]
    assert torch.equal(state["vision.pos_embed"], resample_3d(table, (3, 2, 2)).flatten(1, 3))
    assert (
        resampled(source, (3, 2, 2))
        == "; its position table is resampled from the grid (2, 2, 2) to (3, 2, 2)"
    )
    assert resampled(source, (2, 2, 2)) == ""
    with pytest.raises(
        InputError, match=r"not those of a grid of \(8, 4, 4\); convert it to that --size first"
    ):
        initial_state(published.m3d_clip(), "m3d.bin", "hsenet", (4, 16, 16), (8, 4, 4))
