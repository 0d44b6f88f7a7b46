"""train.py --stage mrg and --stage vqa on a dozen small phantoms."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from reaf_hsenet.data.feature_cache import FeatureCache
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.questions import report_prompts
from reaf_hsenet.data.slice_features import add_slice_features
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import DecoderConfig, RopeConfig
from reaf_hsenet.models.int8 import Int8Linear
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.trained import load_trained
from reaf_hsenet.tokenizer.tokenizer import train_words
from reaf_hsenet.weights.decoder import save_decoder
from reaf_hsenet.weights.slice_encoder import describe
from test_clip2_runs import encoder, stage2
from test_train import assert_close_weights, numbers, same_weights, stop_at, tiny, torchrun, weights


@pytest.fixture(scope="module")
def stages(prepared, tmp_path_factory) -> Path:
    """A folder with runs clip1 and clip2, and the data with slice features and an encoder of slices."""
    root = tmp_path_factory.mktemp("stages")
    data = shutil.copytree(prepared, root / "data")
    add_slice_features(data, encoder(), describe(encoder(), "tiny", recipe="phantom"), progress=False)
    (data / "slice_encoder").mkdir()
    (data / "slice_encoder" / "slice_encoder.json").write_text("{}")
    assert train.main(tiny(data, root / "clip1", "--max-steps", 2)) == 0
    assert train.main(stage2(root / "clip1", root / "clip2", "--max-steps", 2)) == 0
    return root


def language(stages: Path, out: Path, *more, stage="mrg", start="clip2") -> list[str]:
    return [
        "--stage",
        stage,
        "--init",
        str(stages / start),
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
def finished(stages) -> Path:
    assert train.main(language(stages, stages / "mrg", "--max-steps", 4, "--save-every", 2, "--keep", 9)) == 0
    return stages / "mrg"


@pytest.fixture(scope="module")
def decoder_folder(stages) -> Path:
    """A decoder with weights, as a published one comes: config.json, safetensors, a tokenizer without
    image tokens.
    """
    torch.manual_seed(1)
    texts = [entry["text"] for entry in load_manifest(stages / "data").entries("train")]
    tokenizer = train_words([*texts, *report_prompts()], 300)
    config = DecoderConfig(
        "llama",
        len(tokenizer) + 3,
        32,
        2,
        2,
        1,
        16,
        48,
        1024,
        RopeConfig(dims=16),
        bos_id=tokenizer.bos_id,
        eos_ids=(tokenizer.eos_id,),
    )
    folder = stages / "decoder"
    save_decoder(Decoder(config), folder)
    tokenizer.save(folder)
    return folder


@pytest.mark.slow
def test_report_generation_trains_encoders_packers_and_a_new_decoder(stages, finished, capsys):
    run, stage_1, stage_2 = (
        load_trained(finished, "last"),
        *(load_trained(stages / name) for name in ("clip1", "clip2")),
    )
    assert run.config.vision == "dual" and run.guided and run.model.visual_tokens == 4
    saved = weights(finished)
    assert not torch.equal(saved["encoders.0.cls_token"], stage_1.model.vision.cls_token)
    assert (
        any(name.startswith("encoders.1.guidance.") for name in saved)
        and "decoder.embed_tokens.weight" in saved
    )
    first = train.main(language(stages, stages / "start", "--max-steps", 1, "--lr", 1e-12))
    assert first == 0
    learned = load_trained(stages / "start").model.encoders  # of the labels, before the first step
    assert not torch.allclose(learned[0].cls_token, stage_1.model.vision.cls_token, atol=1e-9)
    assert train.main(language(stages, stages / "frozen", "--max-steps", 1, "--no-train-vision")) == 0
    start = load_trained(stages / "frozen").model
    assert torch.allclose(start.encoders[0].cls_token, stage_1.model.vision.cls_token, atol=1e-9)
    assert torch.allclose(start.encoders[1].cls_token, stage_2.model.vision.cls_token, atol=1e-9)
    losses = [r["loss"] for r in Run(finished).read_log() if "loss" in r]
    assert losses[-1] < losses[0]
    assert (finished / "slice_encoder" / "slice_encoder.json").is_file()


@pytest.mark.slow
def test_it_resumes_bit_for_bit(stages, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train.main(language(stages, out, "--max-steps", 4, "--save-every", 2, "--keep", 9)) == 143
    assert (
        train.main(["--stage", "mrg", "--out", str(out), "--resume", "--log-every", "1", "--device", "cpu"])
        == 0
    )
    assert same_weights(out, finished) and numbers(out) == numbers(finished)


@pytest.mark.slow
def test_two_processes_train_as_one_does(stages, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ("--max-steps", 3, "--vision", "stage1", "--projector", "average_pool")  # without dropout
    assert train.main(language(stages, one, *flags, start="clip1")) == 0
    arguments = language(stages, two, *flags, start="clip1")
    arguments[arguments.index("--batch-size") + 1] = "2"
    done = torchrun(2, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for a, b in zip(numbers(one), numbers(two), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-5)
        if "validation" in a:
            assert a["validation"]["loss"] == pytest.approx(b["validation"]["loss"], abs=1e-4)
    assert_close_weights(one, two)


def test_a_published_decoder_gets_adapters_and_only_what_is_trained_is_saved(
    stages, decoder_folder, tmp_path
):
    out = tmp_path / "run"
    flags = ("--max-steps", 2, "--lr", 1e-2, "--decoder", decoder_folder, "--lora-r", 2, "--vision", "stage1")
    assert train.main(language(stages, out, *flags, start="clip1")) == 0
    saved = weights(out)
    assert all(name.startswith("projectors.") or "lora_" in name for name in saved)
    assert any(t.abs().max() > 0 for n, t in saved.items() if "lora_b" in n)
    run = load_trained(out)
    assert run.config.r == 2 and not run.config.full
    base = load_file(decoder_folder / "model.safetensors")
    own = run.model.decoder.embed_tokens.weight
    rows = len(run.tokenizer) - 4
    assert torch.equal(own[:rows], base["model.embed_tokens.weight"][:rows])
    assert torch.allclose(own[rows], base["model.embed_tokens.weight"][:rows].mean(0))
    stage_1 = load_trained(stages / "clip1").model.vision
    assert torch.equal(run.model.encoders[0].cls_token, stage_1.cls_token)
    again = [
        "--stage",
        "mrg",
        "--out",
        str(out),
        "--resume",
        "--device",
        "cpu",
        "--decoder",
        str(decoder_folder),
    ]
    assert train.main(again) == 0


@pytest.mark.slow
def test_a_base_that_has_changed_is_refused(stages, decoder_folder, tmp_path):
    folder = shutil.copytree(decoder_folder, tmp_path / "decoder")
    root = shutil.copytree(stages / "clip1", tmp_path / "clip1").parent
    out = tmp_path / "run"
    flags = ("--max-steps", 1, "--decoder", folder, "--vision", "stage1", "--int8")
    assert train.main(language(root, out, *flags, start="clip1")) == 0
    assert any(isinstance(layer, Int8Linear) for layer in load_trained(out).model.modules())
    path = Run(root / "clip1").pointer("last") / "model.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    (path.parent / "checkpoint.json").unlink()  # as other weights would be put there by hand
    with pytest.raises(
        InputError, match="clip1: none of its checkpoints is the encoder that the run was trained on"
    ):
        load_trained(out)
    path.write_bytes(kept)
    path = folder / "model.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(InputError, match="decoder: its weights are not those that the run was trained on"):
        load_trained(out)


@pytest.mark.slow
def test_cached_features_train_as_volumes_do_and_volumes_are_read_once(
    stages, decoder_folder, tmp_path, monkeypatch
):
    flags = ("--max-steps", 3, "--decoder", decoder_folder, "--no-augment", "--lr", 1e-2)
    plain, cached, second = (tmp_path / name for name in ("plain", "cached", "second"))
    assert train.main(language(stages, plain, *flags)) == 0
    assert train.main(language(stages, cached, *flags, "--cache-features", tmp_path / "features")) == 0
    losses = [[r["loss"] for r in numbers(run) if "loss" in r] for run in (plain, cached)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    files = sorted((tmp_path / "features").rglob("*.safetensors"))
    entries = [e for split in ("train", "validation") for e in load_manifest(stages / "data").entries(split)]
    assert [f.stem for f in files] == sorted(e["id"] for e in entries) and len({f.parent for f in files}) == 1
    written = []
    write = FeatureCache.write
    monkeypatch.setattr(
        FeatureCache, "write", lambda self, entry, x: (written.append(entry["id"]), write(self, entry, x))
    )
    files[0].write_bytes(files[0].read_bytes()[:100])  # half written by a machine that died
    assert train.main(language(stages, second, *flags, "--cache-features", tmp_path / "features")) == 0
    assert written == [files[0].stem] and same_weights(second, cached)


def test_cached_features_are_of_one_encoder_and_of_what_a_volume_was_made_of(stages, tmp_path):
    manifest = load_manifest(stages / "data")
    entry, shapes = manifest.entries("train")[0], [(4, 2)]

    def cache(sha256: str, dtype: torch.dtype = torch.float32) -> FeatureCache:
        return FeatureCache(tmp_path, [{"sha256": sha256}], manifest, dtype, shapes)

    cache("a").write(entry, [torch.ones(4, 2)])
    assert cache("a").has(entry) and cache("a").read(entry)[0].equal(torch.ones(4, 2))
    assert not cache("b").has(entry) and not cache("a", torch.bfloat16).has(entry)
    assert not cache("a").has(entry | {"source": entry["source"] | {"sha256": "0"}})


def test_the_command_that_started_a_run_with_relative_paths_continues_it(
    stages, decoder_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(stages)
    start = [
        "--stage",
        "mrg",
        "--init",
        "clip2",
        "--teacher",
        "clip1",
        "--decoder",
        "decoder",
        "--no-augment",
        "--batch-size",
        "4",
        "--cache-features",
        "kept",
        "--max-steps",
        "2",
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--resume",
        "auto",
    ]
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert train.main(start) == 143
    assert train.main(start) == 0
    wrong([*start, "--cache-features", "other"], "--cache-features: with --resume.*has .*kept")


@pytest.mark.slow
def test_questions_are_learned_by_kind(stages, tmp_path):
    out = tmp_path / "run"
    assert (
        train.main(
            language(stages, out, "--max-steps", 2, "--questions", "presence", stage="vqa", start="clip2")
        )
        == 0
    )
    values = json.loads((out / "config.json").read_text())
    assert values["train"]["questions"] == "presence" and values["stage"] == "vqa"
    entry = next(e for e in load_manifest(stages / "data").entries("train") if e.get("qa"))
    row = next(r for r in entry["qa"] if r["kind"] == "presence")
    tokenizer = load_trained(out).tokenizer
    assert tokenizer.decode(tokenizer.encode(row["question"], special_tokens=False)) == row["question"]


def wrong(arguments: list, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        train.main(list(map(str, arguments)))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_wrong_flags_are_named(stages, decoder_folder, finished, tmp_path):
    out = tmp_path / "new"
    for flags, message in (
        (("--vision", "reaf"), "--vision reaf: is not of --model hsenet"),
        (
            ("--vision", "stage1"),
            "--init .*clip2: is a clip2 run of hsenet; --vision stage1 needs a clip1 run",
        ),
        (("--decoder", decoder_folder, "--int8", "--full"), "--int8: .*leave out --full"),
        (("--int8",), "--full, --int8, --lora-.*: are of a --decoder with weights"),
        (("--lora-r", 4), "are of a --decoder with weights"),
        (
            ("--decoder", decoder_folder, "--full", "--lora-r", 4),
            r"--lora-\*: .* trained whole has no adapters",
        ),
        (("--decoder", tmp_path / "none"), f"{tmp_path / 'none'}: no such folder"),
        (("--kernel", 3, 1, 1), r"--kernel \(3, 1, 1\)"),
        (
            ("--max-text", 2000),
            "--max-text: 4 visual tokens and 2000 of text do not fit the decoder's context of 1024",
        ),
        (("--max-text", 5), r"raise the text length \(--max-text\)"),
        (("--cache-features",), "--cache-features: encoders that are trained have no lasting features"),
        (
            ("--cache-features", "--no-train-vision"),
            "--cache-features: augmented volumes have other features; add --no-augment",
        ),
        (("--size", 16, 32, 32), "--size: is an option of --stage clip1 and clip2"),
        (("--questions", "location"), "--questions: is an option of --stage vqa"),
        (("--grad-cache", 2), "--grad-cache: is an option of --stage clip1 and clip2"),
        (("--batch-size", 400), "--batch-size 400: .*there are 18"),
    ):
        wrong(language(stages, out, "--max-steps", 1, *flags), message)
    wrong(
        ["--stage", "mrg", "--init", tmp_path / "none", "--out", out],
        "none: no run of stage clip2.*train it first",
    )
    wrong(language(stages, out, start="mrg"), "is a run of stage 'mrg'; expected a dual encoder")
    wrong(["--stage", "clip1", "--vision", "dual"], "--vision: is an option of --stage mrg and vqa")
    wrong(language(stages, finished, "--max-steps", 9), "holds a run already.*--resume")
    wrong(
        ["--stage", "mrg", "--out", finished, "--resume", "--kernel", 2, 1, 1],
        r"--kernel: with --resume.*\(1, 2, 2\)",
    )
    wrong(
        ["--stage", "mrg", "--out", finished, "--resume", "--no-train-vision"],
        "--no-train-vision: with --resume.*has True",
    )
    wrong(
        ["--stage", "mrg", "--out", finished, "--resume", "--teacher", tmp_path],
        "--teacher: with --resume.*has .*clip1",
    )
    wrong(["--stage", "clip1", "--no-train-vision"], "--no-train-vision: is an option of --stage mrg and vqa")
    wrong(["--stage", "vqa", "--out", finished, "--resume"], "is a mrg run of hsenet, not vqa")


def test_a_tokenizer_of_another_decoder_is_refused(stages, decoder_folder, tmp_path):
    folder = shutil.copytree(decoder_folder, tmp_path / "decoder")
    train_words(["other words " + " ".join(f"w{chr(97 + i)}x" for i in range(26))] * 2, 2000).save(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"bos_token_id": 7}))
    wrong(
        language(stages, tmp_path / "r", "--decoder", folder),
        "bos has id .* in the tokenizer; expected the tokenizer of",
    )


def test_questions_that_are_not_there_or_too_long_are_named(stages, tmp_path):
    root = shutil.copytree(stages, tmp_path / "stages")
    manifest = load_manifest(root / "data")
    last = [
        (entry, row)
        for entry in manifest.entries("train")
        for row in entry["qa"]
        if row["kind"] == "location"
    ][-1]
    last[1]["question"] = "Where is the effusion? " * 60
    manifest.save()
    arguments = language(root, tmp_path / "r", "--data", root / "data", stage="vqa")
    wrong(arguments, f"{last[0]['id']}: a question of .* tokens, .* leaves no room")
    for entries in manifest.splits.values():
        for entry in entries:
            entry.pop("qa", None)
    manifest.save()
    wrong(arguments, "its train split has no questions of kind location; add those of")
