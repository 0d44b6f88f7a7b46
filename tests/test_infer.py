"""infer.py as a user calls it: what is on which stream, which run answers, and one line for every mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import infer
from conftest import ROOT, error_line, script
from language_run import write_dual_run, write_language_run
from reaf_hsenet import load
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.evaluate import scan_model as inference
from reaf_hsenet.runs.generation import Sampling
from reaf_hsenet.script import run_script
from tiny import with_slices


@pytest.fixture(scope="module")
def home(prepared, tmp_path_factory) -> Path:
    """A folder with runs under their default names, and scan.nii.gz."""
    folder = tmp_path_factory.mktemp("home")
    data = with_slices(prepared, folder / "data")
    write_dual_run(folder / "runs/clip1-hsenet", data)
    write_dual_run(folder / "runs/clip1-reaf", data, "reaf")
    write_language_run(folder / "runs/mrg-hsenet", data)
    shutil.copy(load_manifest(data).entries("validation")[0]["source"]["file"], folder / "scan.nii.gz")
    return folder


@pytest.fixture
def at_home(home, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    return home


def called(capsys, *argv) -> tuple[str, str]:
    """(stdout, stderr) of a call that must end well."""
    capsys.readouterr()
    assert infer.main([*map(str, argv), "--device", "cpu"]) == 0
    return capsys.readouterr()


def found(capsys, *argv):
    """Its JSON, which must be all that there is on stdout."""
    return json.loads(called(capsys, *argv, "--json")[0])


def wrong(capsys, words: str, *argv) -> None:
    """The script ends with exit code 2 and one line that has these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(infer.main, list(map(str, argv)))
    out, err = capsys.readouterr()
    *notes, line = err.splitlines()
    assert ended.value.code == 2 and out == "" and line.startswith("error: ") and words in line, err
    assert all(note.startswith(("run: ", "scan.nii.gz: ")) for note in notes), err


def nifti(path: Path, values) -> Path:
    """Axes to right, anterior, superior."""
    nib.save(nib.Nifti1Image(values, np.diag([8.0, 8.0, 8.0, 1.0])), path)
    return path


def test_results_are_on_stdout_and_accounts_on_stderr(at_home, capsys):
    out, err = called(capsys, "classify", "scan.nii.gz")
    rows = [line.rsplit(maxsplit=1) for line in out.splitlines()]
    assert len(rows) == 18 and [float(p) for _, p in rows] == sorted(
        (float(p) for _, p in rows), reverse=True
    )
    run, by, scan = err.splitlines()
    assert by == "classes by prompts: volume"
    assert run == "run: runs/clip1-hsenet, stage clip1, checkpoint last, step 1"
    assert (
        scan.startswith("scan.nii.gz: 48x48x24 voxels, ")
        and "axes to LPS; rescale auto: HU already (" in scan
    )


def test_json_is_what_python_gives(at_home, capsys):
    dual, language = load("runs/clip1-hsenet", device="cpu"), load("runs/mrg-hsenet", device="cpu")
    classes = found(capsys, "classify", "scan.nii.gz", "--prompts", "organ")
    assert classes["path"] == "scan.nii.gz" and classes["run"] == "runs/clip1-hsenet"
    assert {c["name"]: c["probability"] for c in classes["classes"]} == dual.classify("scan.nii.gz", "organ")
    vectors = found(capsys, "embed", "scan.nii.gz", "scan.nii.gz")
    assert [list(v) for v in vectors] == [["path", "embedding"]] * 2
    assert torch.equal(torch.tensor(vectors[1]["embedding"]), dual.embed("scan.nii.gz"))
    made_by = {"run": "runs/mrg-hsenet", "checkpoint": "last, step 1"}
    drawing = {"new_tokens": 9, "sampling": Sampling(0.9, 50, 0.95, 4)}
    flags = ("--new-tokens", 9, "--temperature", 0.9, "--top-k", 50, "--top-p", 0.95, "--seed", 4)
    assert found(capsys, "report", "scan.nii.gz", *flags) == {
        "path": "scan.nii.gz",
        "report": language.report("scan.nii.gz", **drawing),
        **made_by,
    }
    assert found(capsys, "ask", "scan.nii.gz", "Where?", *flags) == {
        "path": "scan.nii.gz",
        "question": "Where?",
        "answer": language.ask("scan.nii.gz", "Where?", **drawing),
        **made_by,
    }
    text = called(capsys, "ask", "scan.nii.gz", "Where?", *flags)[0]
    assert text == language.ask("scan.nii.gz", "Where?", **drawing) + "\n"
    prompted = found(capsys, "report", "scan.nii.gz", "--prompt", "Where?", *flags)["report"]
    assert prompted == language.ask("scan.nii.gz", "Where?", **drawing)


def test_an_index_is_written_and_searched(at_home, capsys, tmp_path):
    index = tmp_path / "new/index.safetensors"
    other = nifti(
        tmp_path / "noise.nii", np.random.default_rng(0).integers(-1000, 500, (20, 20, 20)).astype(np.int16)
    )
    out, _ = called(capsys, "embed", "scan.nii.gz", other, "--out", index)
    assert out == f"{index}: 2 embeddings\n"
    assert load_file(index)["image"].norm(dim=1).tolist() == pytest.approx([1, 1])
    hits = found(capsys, "search", index, "--volume", other)
    assert [hit["id"] for hit in hits] == [str(other), "scan.nii.gz"] and hits[0]["score"] == pytest.approx(
        1, abs=1e-5
    )
    out, _ = called(capsys, "search", index, "--text", "pleural effusion", "--top", 1)
    score, name = out.split()
    expected = load("runs/clip1-hsenet").search(index, text="pleural effusion")[0]
    assert (name, float(score)) == (expected[0], pytest.approx(expected[1], abs=1e-4))
    wrong(capsys, "was made by the model of sha256", "search", index, "--text", "a", "--model", "reaf")


@pytest.mark.slow
def test_the_picture_is_named_after_the_scan(at_home, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run, scan = at_home / "runs/clip1-reaf", at_home / "scan.nii.gz"
    result = found(capsys, "explain", scan, "--run", run)
    assert (result["path"], result["picture"]) == (str(scan), "scan_explained.png") and result[
        "shows"
    ] == "salient regions"
    assert Path("scan_explained.png").read_bytes().startswith(b"\x89PNG")
    assert (
        called(capsys, "explain", scan, "--run", run, "--out", "a.png")[0]
        == "a.png: salient regions of scan, slice\n"
    )


def test_the_default_run_is_the_last_stage_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {c: str(infer.default_run(c, None)) for c in infer.COMMANDS}
    dual = dict.fromkeys(("classify", "embed", "search", "explain"), "runs/clip1-hsenet")
    assert before == {"report": "runs/mrg-hsenet", "ask": "runs/mrg-hsenet", **dual}
    for name in ("clip2-hsenet", "clip2-reaf", "vqa-hsenet", "vqa-reaf"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.json").touch()
    dual = dict.fromkeys(dual, "runs/clip2-hsenet")
    assert {c: str(infer.default_run(c, "hsenet")) for c in infer.COMMANDS} == {
        "report": "runs/mrg-hsenet",
        "ask": "runs/vqa-hsenet",
        **dual,
    }
    dual = dict.fromkeys(dual, "runs/clip1-reaf")
    assert {c: str(infer.default_run(c, "reaf")) for c in infer.COMMANDS} == {
        "report": "runs/mrg-reaf",
        "ask": "runs/vqa-reaf",
        **dual,
    }


def test_a_scan_that_is_no_ct_is_one_line(at_home, capsys, tmp_path):
    noise = np.random.default_rng(0).random((12, 12, 12), dtype=np.float32)
    cases = {
        "a.nii.gz: no such file": tmp_path / "a.nii.gz",
        "b.png: expected a scan that ends in": tmp_path / "b.png",
        "c.nii: is not a readable NIfTI file": tmp_path / "c.nii",
        "d.nii.gz: is truncated or damaged": tmp_path / "d.nii.gz",
        "the values are not HU": nifti(tmp_path / "mr.nii", noise),
        "every voxel is -1000": nifti(tmp_path / "constant.nii", np.full((8, 8, 8), -1000, np.int16)),
        "is a 4D image": nifti(tmp_path / "4d.nii", np.stack([noise, noise], -1)),
        "voxels are NaN or infinite": nifti(tmp_path / "nan.nii", np.where(noise > 0.9, np.nan, noise)),
        "e.pt: is truncated or damaged": tmp_path / "e.pt",
    }
    for name in ("b.png", "c.nii", "e.pt"):
        (tmp_path / name).write_bytes(b"text" * 9)
    (tmp_path / "d.nii.gz").write_bytes((at_home / "scan.nii.gz").read_bytes()[:-2000])
    for words, scan in cases.items():
        for command in (("embed",), ("ask", "--new-tokens", 2)):
            wrong(capsys, words, *command, scan, *(["What?"] if command[0] == "ask" else []))
    out = ("--out", tmp_path / "i.safetensors")
    wrong(capsys, "a.nii.gz: no such file", "embed", "scan.nii.gz", tmp_path / "a.nii.gz", *out)
    assert not (tmp_path / "i.safetensors").exists()


def test_wrong_flags_are_one_line(at_home, capsys, tmp_path):
    ask, search = ("ask", "scan.nii.gz"), ("search", "index.safetensors")
    scan, clip1 = ("scan.nii.gz",), ("--run", "runs/clip1-hsenet")
    cases = {
        "invalid choice: 'describe'": ["describe", "scan.nii.gz"],
        "arguments are required: COMMAND": [],
        "the question is empty": [*ask, "  "],
        "--prompt is empty": ["report", "scan.nii.gz", "--prompt", ""],
        "leaves no room for an answer": [*ask, "effusion " * 600],
        "--new-tokens 600: a question of": [*ask, "What?", "--new-tokens", 600],
        "--new-tokens 0: expected 1 or more": [*ask, "What?", "--new-tokens", 0],
        "--top-k: nothing is drawn at --temperature 0": [*ask, "What?", "--top-k", 3],
        "temperature -1.0: expected": [*ask, "What?", "--temperature", -1],
        "scan.nii.gz: holds no run": [*ask, "What?", "--run", "scan.nii.gz"],
        "runs: holds no run": ["embed", "scan.nii.gz", "--run", "runs"],
        "--model: chooses a default run": "embed scan.nii.gz --run runs/clip1-reaf --model reaf".split(),
        "which has no decoder; name a run of stage mrg or vqa": ["report", *scan, *clip1],
        "a language model; name a dual encoder's": ["embed", "scan.nii.gz", "--run", "runs/mrg-hsenet"],
        "its encoder weighs no patches; stage clip2": ["explain", "scan.nii.gz"],
        "--top 0: expected 1 or more": [*search, "--text", "a", "--top", 0],
        "--text: is empty": [*search, "--text", ""],
        "one of the arguments --text --volume is required": [*search],
        "--volume: not allowed with argument --text": [*search, "--text", "a", "--volume", "scan.nii.gz"],
        "index.safetensors: no such file": [*search, "--text", "a"],
        "scan.nii.gz: is truncated or not a safetensors file": ["search", "scan.nii.gz", "--text", "a"],
        "--out a.txt: expected a file to write that ends in .safetensors": ["embed", *scan, "--out", "a.txt"],
        "--out scan.nii.gz/a.png: expected a file to write": ["explain", *scan, "--out", f"{scan[0]}/a.png"],
        "--prompts other: no such file": ["classify", "scan.nii.gz", "--prompts", "other"],
        "--slope 0: expected a finite number": ["embed", "scan.nii.gz", "--slope", 0],
        "'LPX' is not an orientation": ["embed", "scan.nii.gz", "--assume-orientation", "LPX"],
    }
    for words, argv in cases.items():
        wrong(capsys, words, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(at_home, capsys):
    wrong(capsys, "--device cuda: torch sees no GPU", "embed", "scan.nii.gz", "--device", "cuda")


def test_rescale_and_orientation_are_those_of_preprocess(at_home, capsys, tmp_path):
    noise = np.random.default_rng(0).random((12, 12, 12), dtype=np.float32) * 100
    scan = nifti(tmp_path / "odd.nii", noise)
    wrong(capsys, "say what they are with --rescale", "embed", scan)
    assert "rescale none: taken as they are" in called(capsys, "embed", scan, "--rescale", "none")[1]
    reading = inference.Reading(orientation="stored")
    image = nib.load("scan.nii.gz")
    turned = nifti(tmp_path / "turned.nii", np.asarray(image.dataobj))
    expected = load("runs/clip1-hsenet", reading=reading).embed(turned)
    as_stored = torch.tensor(found(capsys, "embed", turned, "--orientation", "stored")[0]["embedding"])
    as_said = torch.tensor(found(capsys, "embed", turned)[0]["embedding"])
    assert torch.equal(as_stored, expected) and not torch.allclose(as_said, expected, atol=1e-4)


@pytest.mark.slow
def test_the_script_prints_a_result_and_one_line_for_a_mistake(home):
    ended = script("infer.py", "embed", "scan.nii.gz", "--json", cwd=home)
    assert ended.returncode == 0 and len(json.loads(ended.stdout)[0]["embedding"]) == 128
    assert "none.nii: no such file" in error_line(script("infer.py", "report", "none.nii", cwd=home))


def test_ctrl_c_is_one_line_and_exit_code_130(at_home, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "read_scan", interrupted)
    with pytest.raises(SystemExit) as ended:
        run_script(infer.main, ["report", "scan.nii.gz"])
    out, err = capsys.readouterr()
    assert ended.value.code == 130 and out == "" and err.splitlines()[1:] == ["interrupted"]


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_causes_no_traceback(home):
    read, write = os.pipe()
    os.close(read)
    flags = "ask scan.nii.gz What? --temperature 1 --new-tokens 20".split()
    command = [sys.executable, ROOT / "infer.py", *flags]
    ended = subprocess.run(command, cwd=home, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert ended.returncode == 141
    assert [line.split(":")[0] for line in ended.stderr.splitlines()] == ["run", "scan.nii.gz"]
