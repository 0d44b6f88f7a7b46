"""reaf_hsenet.load: one scan gives what the prepared data set gives, however it is stored; and what is
refused.
"""

import csv
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff
from safetensors.torch import load_file, save_file

import evaluate
from conftest import ROOT
from language_run import CONTEXT, write_dual_run, write_language_run
from reaf_hsenet import load
from reaf_hsenet.data import reading
from reaf_hsenet.data.loader import CTReportDataset, read_prepared, read_slices
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.volume import TableRow, read_volume
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate import figures
from reaf_hsenet.evaluate import scan_model as inference
from reaf_hsenet.evaluate.scan_model import ScanModel
from reaf_hsenet.evaluate.search_index import SearchIndex, read_index
from reaf_hsenet.runs import answering
from reaf_hsenet.runs.answering import answer
from reaf_hsenet.runs.generation import Sampling
from reaf_hsenet.weights.slice_encoder import describe, save_slice_encoder
from tiny import slice_encoder, with_slices


@pytest.fixture(scope="module")
def sliced(prepared, tmp_path_factory) -> Path:
    return with_slices(prepared, tmp_path_factory.mktemp("sliced") / "data")


@pytest.fixture(scope="module")
def runs(sliced, tmp_path_factory) -> Path:
    """A folder with clip1-hsenet, clip2-hsenet, clip1-reaf, mrg-hsenet and vqa-guided."""
    folder = tmp_path_factory.mktemp("runs")
    write_dual_run(folder / "clip1-hsenet", sliced)
    write_dual_run(folder / "clip2-hsenet", sliced, guided=True)
    write_dual_run(folder / "clip1-reaf", sliced, "reaf")
    write_language_run(folder / "mrg-hsenet", sliced)
    write_language_run(folder / "vqa-guided", sliced, "vqa", guided=True)
    return folder


@pytest.fixture(scope="module")
def scans(sliced) -> list[Path]:
    """The source files of the validation split, in its order."""
    return [Path(entry["source"]["file"]) for entry in load_manifest(sliced).entries("validation")]


def wrong(words: str, call, *arguments, **more) -> None:
    with pytest.raises(InputError, match=words) as caught:
        call(*arguments, **more)
    assert "\n" not in str(caught.value)


def blank(scan: Path, out: Path, values=None) -> Path:
    """A copy with a blank header, as CT-RATE's first version has."""
    image = nib.load(scan)
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    stored = nib.Nifti1Image(
        (np.asarray(image.dataobj) if values is None else values).astype(np.float32), None, header
    )
    stored.header["qform_code"] = stored.header["sform_code"] = 0
    nib.save(stored, out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip1-hsenet", "clip2-hsenet"])
def test_a_scan_has_the_embedding_that_the_prepared_data_set_has(runs, scans, tmp_path, name):
    assert (
        evaluate.main(
            ["--task", "retrieval", "--run", str(runs / name), "--out", str(tmp_path), "--device", "cpu"]
        )
        == 0
    )
    expected = load_file(tmp_path / "embeddings_validation.safetensors")["image"]
    model = load(runs / name)
    found = torch.stack([model.embed(scan) for scan in scans])
    assert (found - expected).abs().max() < 1e-5 < (expected[0] - expected[1]).abs().max()
    assert model.search(tmp_path / "embeddings_validation.safetensors", scan=scans[2], top=1)[0][
        1
    ] == pytest.approx(1, abs=1e-5)


def test_the_network_sees_the_volume_as_float16_has_it(runs, sliced, scans):
    manifest, model = load_manifest(sliced), ScanModel(runs / "clip1-hsenet")
    assert torch.equal(
        model.read(scans[0])[2].volume[0], read_prepared(manifest, manifest.entries("validation")[0])
    )
    entry = manifest.entries("validation")[0]
    assert torch.allclose(
        ScanModel(runs / "clip2-hsenet").read(scans[0])[1][0], read_slices(manifest, entry), atol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip2-hsenet", "clip1-reaf"])
def test_every_storage_order_of_a_scan_gives_its_embedding(runs, scans, tmp_path, name):
    model, image, out = load(runs / name), nib.load(scans[0]), tmp_path / "turned.nii"
    voxels, expected = np.asarray(image.dataobj), model.embed(scans[0])
    for order, signs in itertools.product(
        itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)
    ):
        turn = np.array([order, signs], float).T
        affine = image.affine @ inv_ornt_aff(turn, voxels.shape)
        nib.save(nib.Nifti1Image(apply_orientation(voxels, turn), affine), out)
        assert (model.embed(out) - expected).abs().max() < 1e-4, (order, signs)
    nib.save(nib.Nifti1Image(voxels[::-1], image.affine), out)  # mirrored: another patient
    assert (model.embed(out) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("prompts", ["volume", "organ"])
def test_classes_have_the_scores_of_the_zeroshot_task(runs, scans, tmp_path, prompts):
    run = runs / "clip2-hsenet"
    flags = ["--run", run, "--out", tmp_path, "--prompts", prompts]
    flags += "--task zeroshot --device cpu --bootstrap 0".split()
    assert evaluate.main(list(map(str, flags))) == 0
    with open(tmp_path / "zeroshot_scores.csv", newline="") as file:
        expected = list(csv.DictReader(file))[1]
    found = load(run).classify(scans[1], prompts)
    assert len(found) == 18 and list(found.values()) == sorted(found.values(), reverse=True)
    for name, probability in found.items():
        assert probability == pytest.approx(float(expected[name]), abs=1e-5)


def test_the_label_set_says_which_classes_there_are(runs, scans):
    model = load(runs / "clip1-hsenet")
    assert "Mosaic attenuation pattern" in model.classify(scans[0])
    others = model.classify(scans[0], label_set="rad-chestct")
    assert len(others) == 16 and "Calcification" in others and "Mosaic attenuation pattern" not in others


def test_a_text_is_embedded_as_reports_are(runs, sliced):
    manifest = load_manifest(sliced)
    text = '  "Bilateral"   pleural &amp; pericardial (effusion).  '
    for name in ("clip1-hsenet", "clip1-reaf"):
        model = load(runs / name)
        config = model.run.config
        data = CTReportDataset(
            manifest, "validation", model.run.tokenizer, config.max_text, style=config.model
        )
        ids, mask = model.run.tokenizer.batch([data.encode(text, np.random.default_rng(0))])
        with torch.inference_mode():
            expected = model.run.model.encode_text(ids, mask)[0]
        assert torch.equal(model.embed_text(text), expected)
    model = load(runs / "clip1-hsenet")
    assert model.embed_text("effusion " * 900).norm() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["mrg-hsenet", "vqa-guided"])
def test_an_answer_is_the_one_that_the_prepared_volume_gets(runs, sliced, scans, name):
    model, manifest = load(runs / name), load_manifest(sliced)
    entry, sampling = manifest.entries("validation")[2], Sampling(1.0, seed=5)
    volume = read_prepared(manifest, entry)[None]
    slices = read_slices(manifest, entry)[None] if model.guided else None
    for question, made in (("Is there effusion?", model.ask), ("What do you see?", model.report)):
        expected = answer(
            model.run.model, model.run.tokenizer, [question], volume, slices, new_tokens=24, sampling=sampling
        )
        assert made(scans[2], question, new_tokens=24, sampling=sampling) == expected[0] != ""


def test_the_prompt_for_a_report_is_the_published_one(runs, scans):
    model, sampling = load(runs / "mrg-hsenet"), Sampling(1.0, seed=1)
    asked = [
        model.report(scans[0], prompt, new_tokens=24, sampling=sampling)
        for prompt in (None, "Can you summarize with findings the images presented?", "Describe.")
    ]
    assert asked[0] == asked[1] != asked[2]


def test_text_comes_while_it_is_made(runs, scans, monkeypatch):
    made, steps = [], answering.steps
    monkeypatch.setattr(answering, "steps", lambda *a, **k: (made.append(s) or s for s in steps(*a, **k)))
    model, sampling = load(runs / "mrg-hsenet"), Sampling(1.0, seed=2)
    pieces = model.stream(scans[0], new_tokens=40, sampling=sampling)
    first = next(pieces)
    assert 0 < len(made) < 20
    rest = list(pieces)
    assert len(rest) > 5 and first + "".join(rest) == model.report(scans[0], new_tokens=40, sampling=sampling)


def test_an_answer_is_as_long_as_asked_for_or_as_the_context_allows(runs, scans, monkeypatch):
    counts = []
    monkeypatch.setattr(
        inference, "stream_answer", lambda *a, **k: counts.append(k["new_tokens"]) or iter([])
    )
    model = load(runs / "mrg-hsenet")
    model.ask(scans[0], "Is there effusion?")
    model.ask(scans[0], "effusion " * (CONTEXT - 40))
    model.report(scans[0])
    model.report(scans[0], new_tokens=7)
    assert counts[0] == 74 and 0 < counts[1] < 40 and 400 < counts[2] < 512 and counts[3] == 7
    wrong(
        "a question of .* tokens, 8 of them of the image, leaves no room",
        model.ask,
        scans[0],
        "effusion " * CONTEXT,
    )
    wrong("--new-tokens 512: .* context of 512", model.report, scans[0], new_tokens=512)
    wrong("question is empty", model.ask, scans[0], "  ")


def test_what_is_wrong_with_the_input_is_said_before_weights_are_read(runs, scans, tmp_path, monkeypatch):
    for name in ("load_trained",):
        monkeypatch.setattr(inference, name, lambda *a, **k: pytest.fail("weights were read"))
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), np.nan, np.float32), np.eye(4)), tmp_path / "nan.nii")
    language, dual = ScanModel(runs / "mrg-hsenet"), ScanModel(runs / "clip1-hsenet")
    wrong("nan.nii: 512 voxels are NaN", language.report, tmp_path / "nan.nii")
    wrong("leaves no room for an answer", language.ask, scans[0], "effusion " * CONTEXT)
    wrong("--prompts other: no such file", dual.classify, scans[0], prompts="other")
    wrong("nan.nii", dual.classify, tmp_path / "nan.nii")
    wrong("none.safetensors: no such file", dual.search, tmp_path / "none.safetensors", text="effusion")
    wrong("--text: is empty", dual.embed_text, " ")


def test_what_a_run_cannot_do_is_said(runs, scans, tmp_path):
    wrong(
        "clip1-hsenet: is a run of stage clip1, which has no decoder; name a run of stage mrg or vqa",
        load(runs / "clip1-hsenet").report,
        scans[0],
    )
    language = load(runs / "mrg-hsenet")
    index = SearchIndex(torch.eye(3), ["a", "b", "c"], "0")
    calls = [
        (language.embed, scans[0]),
        (language.classify, scans[0]),
        (language.embed_text, "a"),
        (language.search, index, "a"),
    ]
    for call, *arguments in calls:
        wrong("mrg-hsenet: is a run of stage mrg, a language model; name a dual encoder's", call, *arguments)
    for name in ("clip1-hsenet", "mrg-hsenet"):
        wrong(
            f"{name}: its encoder weighs no patches", load(runs / name).explain, scans[0], tmp_path / "a.png"
        )
    wrong("none: holds no run", load, runs / "none")
    wrong("--precision fp8: expected one of fp32, bf16", load, runs / "mrg-hsenet", precision="fp8")
    wrong("--precision bf16: .* a run with a decoder", load, runs / "clip1-hsenet", precision="bf16")
    wrong("--slice-encoder: .* takes no slice features", load, runs / "clip1-hsenet", slice_encoder="x")


def test_the_decoder_takes_the_precision_that_is_asked_for(runs, scans):
    model = load(runs / "mrg-hsenet", precision="bf16")
    assert {p.dtype for p in model.run.model.decoder.parameters()} == {torch.bfloat16}
    assert isinstance(model.report(scans[0], new_tokens=3), str)


@pytest.mark.parametrize("fast", [True, False])
def test_encoders_beside_a_bf16_decoder_compute_in_bf16_where_the_processor_is_fast_in_it(
    runs, scans, monkeypatch, fast
):
    monkeypatch.setattr(answering, "packable", lambda weight: fast)
    model = load(runs / "mrg-hsenet", precision="bf16")
    seen = []
    layer = next(m for m in model.run.model.encoders[0].modules() if isinstance(m, torch.nn.Linear))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model.report(scans[0], new_tokens=1)
    assert seen == [torch.bfloat16 if fast else torch.float32]


def test_the_slice_encoder_is_the_named_one_or_the_runs_or_the_data_sets(runs, sliced, scans, tmp_path):
    expected = load(runs / "clip2-hsenet").embed(scans[0])
    run, data = shutil.copytree(runs / "clip2-hsenet", tmp_path / "run"), tmp_path / "nowhere"
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": str(data)}))
    sha256 = config["slices"]["sha256"][:12]
    message = (
        f"run: takes slice features of phantoms, sha256 {sha256}; name that encoder with --slice-encoder"
    )
    wrong(message, load(run).embed, scans[0])
    right = str(sliced / "slice_encoder")
    assert torch.equal(load(run, slice_encoder=right).embed(scans[0]), expected)
    shutil.copytree(right, run / "slice_encoder")
    assert torch.equal(load(run).embed(scans[0]), expected)
    save_slice_encoder(tmp_path / "other", slice_encoder(1))
    other = describe(slice_encoder(1), "other")["sha256"][:12]
    wrong(
        f"--slice-encoder .*other: has sha256 {other} .*; .* slice features of phantoms, sha256 {sha256}",
        load(run, slice_encoder=str(tmp_path / "other")).embed,
        scans[0],
    )
    shutil.rmtree(run / "slice_encoder")
    (run / "config.json").write_text(
        json.dumps({**config, "data": str(data), "slices": {**config["slices"], "encoder": right}})
    )
    assert torch.equal(load(run).embed(scans[0]), expected)


def test_a_search_finds_a_scan_by_itself_best_first(runs, scans, tmp_path):
    model = load(runs / "clip1-hsenet")
    vectors = torch.stack([model.embed(scan) for scan in scans])
    SearchIndex(vectors, list(map(str, scans)), model.sha256).write(tmp_path / "index.safetensors")
    found = model.search(tmp_path / "index.safetensors", scan=scans[3], top=99)
    assert (
        found[0][0] == str(scans[3])
        and found[0][1] == pytest.approx(1, abs=1e-5)
        and len(found) == len(scans)
    )
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    text = model.search(tmp_path / "index.safetensors", text="pleural effusion", top=2)
    order = (vectors @ model.embed_text("pleural effusion")).argsort(descending=True)
    assert [name for name, _ in text] == [str(scans[i]) for i in order[:2].tolist()]
    wrong(
        f"made by the model of sha256 {model.sha256[:12]}, .*clip1-reaf.* has "
        f"{load(runs / 'clip1-reaf').sha256[:12]}",
        load(runs / "clip1-reaf").search,
        tmp_path / "index.safetensors",
        text="a",
    )


def test_a_file_that_is_no_index_is_refused(tmp_path):
    wrong("none.safetensors: no such file; make an index", read_index, tmp_path / "none.safetensors")
    good = SearchIndex(torch.eye(4), list("abcd"), "0")
    good.write(tmp_path / "good.safetensors")
    read = read_index(tmp_path / "good.safetensors")
    assert torch.equal(read.image, good.image) and (read.ids, read.model) == (good.ids, good.model)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-9])
    wrong("cut.safetensors: is truncated or not a safetensors file", read_index, tmp_path / "cut.safetensors")
    save_file({"weight": torch.eye(3)}, tmp_path / "weights.safetensors")
    wrong("weights.safetensors: is no index", read_index, tmp_path / "weights.safetensors")
    save_file({"image": torch.eye(3)}, tmp_path / "short.safetensors", {"ids": "a\nb", "model": "0"})
    wrong("short.safetensors: is no index", read_index, tmp_path / "short.safetensors")
    save_file({"image": torch.eye(2)}, tmp_path / "old.safetensors", {"ids": "a\nb"})
    wrong("old.safetensors: does not say which model made it", read_index, tmp_path / "old.safetensors")
    wrong(
        "one line of UTF-8 text; rename the file",
        SearchIndex(torch.eye(1), ["a\nb"], "0").write,
        tmp_path / "x.safetensors",
    )
    assert not (tmp_path / "x.safetensors").exists()


def test_a_blank_header_and_raw_values_are_read_with_what_is_given(runs, scans, tmp_path):
    image = nib.load(scans[0])
    raw = blank(scans[0], tmp_path / "raw.nii.gz", np.asarray(image.dataobj, np.float32) + 1024)
    run = runs / "clip1-hsenet"
    wrong("no orientation .*--assume-orientation", load(run).embed, raw)
    axes = "".join(nib.aff2axcodes(image.affine))
    reading = inference.Reading(assume_orientation=axes)
    wrong("by its header the scan is 48 x 48 x", load(run, reading=reading).embed, raw)
    spacing = tuple(map(float, image.header.get_zooms()))
    without = load(run, reading=reading, table=TableRow(spacing))
    wrong("not HU.*--rescale, or give the --slope and --intercept", without.embed, raw)
    lines = []
    table = TableRow(spacing, 1.0, -1024.0)
    found = load(run, reading=reading, table=table, say=lines.append).embed(raw)
    assert (found - load(run).embed(scans[0])).abs().max() < 1e-5
    assert len(lines) == 1 and f"axes to {axes}; rescale auto: raw values" in lines[0]


@pytest.mark.slow
def test_salient_regions_and_patch_scores_are_drawn(runs, scans, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn, regions, scores = {}, figures.saliency_figure, figures.score_figure
    monkeypatch.setattr(figures, "saliency_figure", lambda *a: (drawn.update(regions=a), regions(*a)))
    monkeypatch.setattr(figures, "score_figure", lambda *a: (drawn.update(scores=a), scores(*a)))
    reaf = load(runs / "clip1-reaf")
    found = reaf.explain(scans[0], tmp_path / "a.png")
    assert (
        found["shows"] == "salient regions"
        and found["axes"] == "SPL"
        and set(found["maps"]) == {"scan", "slice"}
    )
    path, volume, maps, title, axes, spacing = drawn["regions"]
    expected = reaf.run.model.vision.salient_regions(reaf.read(scans[0])[2].volume)
    assert all(torch.equal(maps[n], expected[n][0]) for n in maps) and torch.equal(
        volume, reaf.read(scans[0])[2].volume[0, 0]
    )
    assert (title, axes, spacing) == (scans[0].name, "SPL", (14, 10, 10))
    for name in ("clip2-hsenet", "vqa-guided"):
        model = load(runs / name)
        found = model.explain(scans[0], tmp_path / f"{name}.png")
        encoder = model.run.model.encoders[1] if model.has_decoder else model.run.model.vision
        with torch.inference_mode():
            patches = encoder.embed(model.read(scans[0])[2].volume)
            expected = encoder.patch_scores(patches, model.read(scans[0])[1])[0].reshape(4, 4, 4)
        d, h, w = found["maps"]["2E3"]["strongest"]
        assert (
            found["shows"] == "patch scores"
            and found["axes"] == "SLP"
            and expected[d, h, w] == expected.max() > expected.min()
        )
        assert torch.equal(drawn["scores"][2]["2E3"], expected)
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_score_figure_shows_every_patch_in_planes_through_the_highest(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    kept, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (kept.append(figure), save(figure, path)))
    scores = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    scores[2, 1, 3] = 2
    figures.score_figure(tmp_path / "a.png", torch.rand(12, 16, 20), {"2E3": scores}, "a")
    overlays = [np.asarray(axes.images[1].get_array()) for axes in kept[0].axes[:3]]
    large = scores.repeat_interleave(4, 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert np.array_equal(overlays[0], large[8]) and np.array_equal(overlays[1], large[:, 4].flip(0))
    assert np.array_equal(overlays[2], large[:, :, 12].flip(0))


def test_without_matplotlib_explain_says_what_to_install(runs, scans, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    wrong(
        "explain: matplotlib is not installed; pip install matplotlib",
        ScanModel(runs / "clip1-reaf").explain,
        scans[0],
        "a.png",
    )


@pytest.mark.slow
def test_the_package_is_imported_without_torch_and_load_is_in_it():
    code = "import sys, reaf_hsenet; assert 'torch' not in sys.modules; assert callable(reaf_hsenet.load)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    import reaf_hsenet

    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        reaf_hsenet.lode  # noqa: B018


def test_a_scan_is_read_once_for_its_volume_and_its_slices(runs, scans, monkeypatch):
    read = []
    monkeypatch.setattr(
        reading, "read_volume", lambda path, *a, **k: (read.append(path), read_volume(path, *a, **k))[1]
    )
    model = load(runs / "clip2-hsenet")
    assert model.guided
    model.embed(scans[0])
    assert read == [scans[0]]
