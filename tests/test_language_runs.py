"""train.py --stage mrg and --stage vqa on a dozen small phantoms."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from reaf_hsenet.data.feature_cache import FeatureCache
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.int8 import Int8Linear
from reaf_hsenet.presets import stage_config
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.trained import load_trained
from reaf_hsenet.tokenizer.tokenizer import train_words
from reaf_hsenet.train.language_setup import feature_folder
from tiny import (
    AUTO,
    assert_close_weights,
    assert_same,
    config_of,
    edited,
    flip_last_bit,
    language,
    losses,
    numbers,
    resume,
    same_weights,
    stop_at,
    torchrun,
    weights,
    wrong,
)


@pytest.mark.slow
def test_report_generation_trains_encoders_packers_and_a_new_decoder(stages, mrg, tmp_path):
    run, *first = load_trained(mrg, "last"), *(load_trained(stages / name) for name in ("clip1", "clip2"))
    tokens = [trained.model.vision.cls_token for trained in first]
    assert run.config.vision == "dual" and run.guided and run.model.visual_tokens == 4
    saved = weights(mrg)
    assert not torch.equal(saved["encoders.0.cls_token"], tokens[0])
    assert any(name.startswith("encoders.1.guidance.") for name in saved)
    assert "decoder.embed_tokens.weight" in saved
    assert train.main(language(stages, tmp_path / "frozen", "--max-steps", 1, "--no-train-vision")) == 0
    for encoder, token in zip(load_trained(tmp_path / "frozen").model.encoders, tokens, strict=True):
        assert torch.allclose(encoder.cls_token, token, atol=1e-9)
    assert losses(mrg)[-1] < losses(mrg)[0]
    assert (mrg / "slice_encoder" / "slice_encoder.json").is_file()


def test_features_of_volumes_that_are_augmented_are_not_kept():
    command, frozen = SimpleNamespace(cache_features=True), SimpleNamespace(train_vision=False)
    published = stage_config("mrg", "hsenet", "hsenet-base")
    with pytest.raises(InputError, match="--cache-features: augmented volumes.*add --no-augment"):
        feature_folder(command, frozen, published, SimpleNamespace(folder=Path()))


@pytest.mark.slow
def test_it_resumes_bit_for_bit(stages, mrg, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train.main(language(stages, out, "--max-steps", 4, "--save-every", 2, "--keep", 9)) == 143
    assert train.main(resume(out, stage="mrg")) == 0
    assert_same(out, mrg)


@pytest.mark.slow
def test_two_processes_train_as_one_does(stages, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ("--max-steps", 3, "--vision", "stage1", "--projector", "average_pool")  # without dropout
    assert train.main(language(stages, one, *flags, start="clip1")) == 0
    torchrun(2, language(stages, two, *flags, "--batch-size", 2, start="clip1"), cwd=tmp_path)
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
    base = load_file(decoder_folder / "model.safetensors")["model.embed_tokens.weight"]
    own, rows = run.model.decoder.embed_tokens.weight, len(run.tokenizer) - 4
    assert torch.equal(own[:rows], base[:rows]) and torch.allclose(own[rows], base[:rows].mean(0))
    stage_1 = load_trained(stages / "clip1").model.vision
    assert torch.equal(run.model.encoders[0].cls_token, stage_1.cls_token)
    assert train.main(resume(out, "--decoder", decoder_folder, stage="mrg")) == 0


@pytest.mark.slow
def test_a_base_that_has_changed_is_refused(stages, decoder_folder, tmp_path):
    folder = shutil.copytree(decoder_folder, tmp_path / "decoder")
    root = shutil.copytree(stages / "clip1", tmp_path / "clip1").parent
    out = tmp_path / "run"
    flags = ("--max-steps", 1, "--decoder", folder, "--vision", "stage1", "--int8")
    assert train.main(language(root, out, *flags, start="clip1")) == 0
    assert any(isinstance(layer, Int8Linear) for layer in load_trained(out).model.modules())
    path = Run(root / "clip1").pointer("last") / "model.safetensors"
    flip_last_bit(path)
    (path.parent / "checkpoint.json").unlink()  # as other weights would be put there by hand
    with pytest.raises(InputError, match="clip1: none of its checkpoints is the encoder that the run was"):
        load_trained(out)
    flip_last_bit(path)
    flip_last_bit(folder / "model.safetensors")
    with pytest.raises(InputError, match="decoder: its weights are not those that the run was trained on"):
        load_trained(out)


@pytest.mark.slow
def test_cached_features_train_as_volumes_do_and_volumes_are_read_once(
    stages, decoder_folder, tmp_path, monkeypatch
):
    flags = ("--max-steps", 3, "--decoder", decoder_folder, "--no-augment", "--lr", 1e-2)
    caching = (*flags, "--cache-features", tmp_path / "features")
    plain, cached, second = (tmp_path / name for name in ("plain", "cached", "second"))
    assert train.main(language(stages, plain, *flags)) == 0
    assert train.main(language(stages, cached, *caching)) == 0
    assert losses(plain) == pytest.approx(losses(cached), abs=1e-5)
    files = sorted((tmp_path / "features").rglob("*.safetensors"))
    entries = [e for split in ("train", "validation") for e in load_manifest(stages / "data").entries(split)]
    assert [f.stem for f in files] == sorted(e["id"] for e in entries) and len({f.parent for f in files}) == 1
    written = []
    write = FeatureCache.write
    monkeypatch.setattr(
        FeatureCache, "write", lambda self, entry, x: (written.append(entry["id"]), write(self, entry, x))
    )
    files[0].write_bytes(files[0].read_bytes()[:100])  # half written by a machine that died
    assert train.main(language(stages, second, *caching)) == 0
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
    for name in ("clip1", "clip2", "decoder"):
        shutil.copytree(stages / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    flags = "--teacher clip1 --decoder decoder --no-augment --cache-features kept --max-steps 2"
    start = language(Path(), Path("run"), *flags.split(), *AUTO)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert train.main(start) == 143
    assert train.main(start) == 0
    wrong([*start, "--cache-features", "other"], "--cache-features: with --resume.*has .*kept")


@pytest.mark.slow
def test_questions_are_learned_by_kind(stages, tmp_path):
    out, flags = tmp_path / "run", ("--max-steps", 2, "--questions", "presence")
    assert train.main(language(stages, out, *flags, stage="vqa")) == 0
    values = config_of(out)
    assert values["train"]["questions"] == "presence" and values["stage"] == "vqa"
    entry = next(e for e in load_manifest(stages / "data").entries("train") if e.get("qa"))
    row = next(r for r in entry["qa"] if r["kind"] == "presence")
    tokenizer = load_trained(out).tokenizer
    assert tokenizer.decode(tokenizer.encode(row["question"], special_tokens=False)) == row["question"]


def test_a_tokenizer_of_another_decoder_is_refused(stages, decoder_folder, tmp_path):
    folder = shutil.copytree(decoder_folder, tmp_path / "decoder")
    train_words(["other words " + " ".join(f"w{chr(97 + i)}x" for i in range(26))] * 2, 2000).save(folder)
    with edited(folder / "config.json") as values:
        values["bos_token_id"] = 7
    words = "bos has id .* in the tokenizer; expected the tokenizer of"
    wrong(language(stages, tmp_path / "r", "--decoder", folder), words)


def test_questions_that_are_not_there_or_too_long_are_named(stages, tmp_path):
    data = shutil.copytree(stages / "data", tmp_path / "data")
    manifest = load_manifest(data)
    entry, row = [(e, r) for e in manifest.entries("train") for r in e["qa"] if r["kind"] == "location"][-1]
    row["question"] = "Where is the effusion? " * 60
    manifest.save()
    arguments = language(stages, tmp_path / "r", "--data", data, stage="vqa")
    wrong(arguments, f"{entry['id']}: a question of .* tokens, .* leaves no room")
    for entries in manifest.splits.values():
        for entry in entries:
            entry.pop("qa", None)
    manifest.save()
    wrong(arguments, "its train split has no questions of kind location; add those of")
