"""A published dual encoder is evaluated, and reads one scan, from its own folder."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import infer
import published
from reaf_hsenet.evaluate.language_evaluation import AnsweredRows
from reaf_hsenet.runs.trained import load_trained
from reaf_hsenet.weights.__main__ import main as convert
from tiny import wrong

MRG = "--task mrg --limit 2 --new-tokens 4 --device cpu".split()
RETRIEVAL = "--task retrieval --device cpu".split()
refused = partial(wrong, main=evaluate.main)


@pytest.fixture(scope="module")
def m3d_clip(tmp_path_factory) -> Path:
    return published.write_m3d_clip(tmp_path_factory.mktemp("weights") / "M3D-CLIP").parent


@pytest.mark.slow
def test_its_folder_is_evaluated_as_its_converted_run_is(
    m3d_clip, text_model, sized_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    assert convert(["convert", str(m3d_clip), str(run), "--text-model", str(text_model)]) == 0
    common = ["--task", "retrieval", "--data", str(sized_data), "--device", "cpu"]
    assert evaluate.main([*common, "--run", str(run)]) == 0
    assert evaluate.main([*common, "--run", str(m3d_clip), "--text-model", str(text_model)]) == 0
    results = [
        json.loads((folder / "retrieval.json").read_text())
        for folder in (run / "eval", tmp_path / "eval/M3D-CLIP")
    ]
    assert results[0]["report_to_volume"] == results[1]["report_to_volume"]
    vectors = [
        load_file(folder / "embeddings_validation.safetensors")
        for folder in (run / "eval", tmp_path / "eval/M3D-CLIP")
    ]
    assert all(torch.equal(vectors[0][name], vectors[1][name]) for name in ("image", "text"))
    assert not (m3d_clip / "eval").exists()


def test_it_embeds_and_classifies_one_scan(m3d_clip, text_model, phantom_root, capsys):
    scan = next(phantom_root.rglob("*.nii.gz"))
    flags = ["--run", str(m3d_clip), "--text-model", str(text_model), "--device", "cpu", "--json"]
    assert infer.main(["embed", str(scan), *flags]) == 0
    vector = torch.tensor(json.loads(capsys.readouterr().out)[0]["embedding"])
    assert vector.norm() == pytest.approx(1, abs=1e-5)
    assert infer.main(["classify", str(scan), *flags]) == 0
    assert len(json.loads(capsys.readouterr().out)["classes"]) == 18


def test_what_it_does_not_have_is_asked_for(m3d_clip, text_model, phantom_root, sized_data, tmp_path):
    scan = next(phantom_root.rglob("*.nii.gz"))
    common = [*RETRIEVAL, "--run", m3d_clip]
    wrong(
        [*common, "--text-model", text_model],
        "--data: .*M3D-CLIP has no data set of its own",
        main=evaluate.main,
    )
    wrong(["report", scan, "--run", m3d_clip, "--device", "cpu"], "has no decoder", main=infer.main)
    bare = shutil.copytree(m3d_clip, tmp_path / "bare")
    (bare / "vocab.txt").unlink()
    bare_run = [*RETRIEVAL, "--run", bare, "--data", sized_data]
    refused(bare_run, "bare: has no vocab.txt.*--text-model")
    damaged = tmp_path / "weights.pt"
    damaged.write_bytes(b"PK\x03\x04 nothing")
    wrong(
        [*RETRIEVAL, "--run", damaged, "--data", sized_data],
        re.escape(str(damaged)),
        main=evaluate.main,
    )


@pytest.fixture(scope="module")
def language(tmp_path_factory, text_model):
    """Packers and adapters as training saves them, parameters in half precision, and what they stand on."""
    folder = tmp_path_factory.mktemp("language")
    parameters = {n: torch.nn.Parameter(t.bfloat16()) for n, t in published.language().items()}
    packers = published.write(folder / "mrg/mm_projector_and_lora.bin", parameters)
    encoders, decoder = (
        published.write_m3d_clip(folder / "2e3", published.hsenet_2e3()),
        published.write_decoder(folder / "decoder"),
    )
    return packers, ["--decoder", str(decoder), "--encoders", str(encoders), "--text-model", str(text_model)]


@pytest.mark.slow
def test_packers_and_adapters_write_the_report_that_their_converted_run_writes(
    language, phantom_root, tmp_path, capsys
):
    packers, flags = language
    assert convert(["convert", str(packers), str(tmp_path / "run"), *flags]) == 0
    decoder, encoders, text_model = flags[1::2]
    model = load_trained(packers, text_model=text_model, decoder=decoder, encoders=encoders)
    run = load_trained(tmp_path / "run")
    assert all(
        torch.equal(tensor, run.model.state_dict()[name]) for name, tensor in model.model.state_dict().items()
    )
    assert (model.config, model.recipe, model.stage) == (run.config, run.recipe, run.stage)
    capsys.readouterr()
    scan, encoder = (
        next(phantom_root.rglob("*.nii.gz")),
        published.write(tmp_path / "slices.bin", published.mae(48)),
    )
    common = [str(scan), "--slice-encoder", str(encoder), "--device", "cpu", "--new-tokens", "5", "--json"]
    assert infer.main(["report", *common, "--run", str(packers), *flags]) == 0
    assert infer.main(["report", *common, "--run", str(tmp_path / "run")]) == 0
    first, second = (json.loads(row) for row in capsys.readouterr().out.splitlines())
    assert first["report"] == second["report"]


@pytest.mark.slow
def test_packers_and_adapters_are_evaluated_as_they_are(
    language, sized_data, text_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    packers, flags = language
    common = [
        *"--task mrg --limit 2 --new-tokens 4 --device cpu --data".split(),
        sized_data,
        "--run",
        packers,
    ]
    assert evaluate.main(list(map(str, [*common, *flags]))) == 0
    assert json.loads((tmp_path / "eval/mm_projector_and_lora/mrg.json").read_text())["n"] == 2
    assert not (packers.parent / "eval").exists()


@pytest.mark.slow
def test_answers_of_packers_that_stood_on_something_else_are_not_used(
    language, sized_data, tmp_path, monkeypatch, capsys
):
    packers, flags = language
    decoder = shutil.copytree(flags[1], tmp_path / "decoder")
    save_file(
        {n: -t for n, t in load_file(decoder / "model.safetensors").items()}, decoder / "model.safetensors"
    )
    other = published.hsenet_2e3()
    other["logit_scale"] += 1
    encoders = published.write_m3d_clip(tmp_path / "2e3", other)
    monkeypatch.setattr(
        AnsweredRows, "finish", lambda *given: None
    )  # as if it were interrupted at the last moment
    common = [
        *"--task mrg --limit 2 --new-tokens 4 --device cpu --data".split(),
        sized_data,
        "--run",
        packers,
    ]
    for change, said in (
        ({}, ""),
        ({}, "2 of 2 answers are there"),
        ({1: decoder}, "2 answers of before are not"),
        ({1: decoder, 3: encoders}, "2 answers of before are not"),
    ):
        capsys.readouterr()
        more = [change.get(i, value) for i, value in enumerate(flags)]
        assert evaluate.main(list(map(str, [*common, *more, "--out", tmp_path / "out"]))) == 0
        assert said in capsys.readouterr().out


def test_what_packers_stand_on_is_asked_for_in_one_line(language, m3d_clip, text_model, sized_data, tmp_path):
    packers, flags = language
    common = [*MRG, "--data", sized_data]
    wrong(
        [*common, "--run", packers],
        "holds packers and adapters only; name what they stand on: --decoder",
        main=evaluate.main,
    )
    retrieval = [*RETRIEVAL, "--data", sized_data]
    refused([*retrieval, "--run", packers], "HSENet-Phi-4-4B.; expected a dual encoder")
    wrong(
        [*common, "--run", m3d_clip, "--text-model", text_model],
        "M3D-CLIP: is M3D-CLIP or HSENet-CLIP, which has no decoder",
        main=evaluate.main,
    )
    refused([*common, "--run", m3d_clip, *flags], "M3D-CLIP: .* has no decoder")
    run = tmp_path / "run"
    assert convert(["convert", str(m3d_clip), str(run), "--text-model", str(text_model)]) == 0
    wrong(
        [*retrieval, "--run", run, "--text-model", text_model],
        "--text-model: is of published weights; the run",
        main=evaluate.main,
    )


def test_a_missing_run_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    wrong(
        [*RETRIEVAL, "--run", "runs/clip1-hsenet"],
        "runs/clip1-hsenet: holds no run",
        main=evaluate.main,
    )
    refused(RETRIEVAL, "runs/clip1-hsenet: holds no run")


def test_its_hash_is_that_of_its_file(m3d_clip, text_model):
    run = load_trained(m3d_clip, text_model=str(text_model))
    assert run.weights.is_file() and len(run.sha256()) == 64 and run.stage == "clip1"


def test_a_converted_run_is_not_resumed(m3d_clip, text_model, tmp_path):
    run = tmp_path / "run"
    assert convert(["convert", str(m3d_clip), str(run), "--text-model", str(text_model)]) == 0
    wrong(
        ["--stage", "clip1", "--out", run, "--resume"], "is converted, not trained.*start from it with --init"
    )
