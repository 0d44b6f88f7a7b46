"""Published checkpoints become runs that give the published outputs, and go back under their names bit
for bit.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

import fill
import published
from published import BERT, CASES, REAF
from reaf_hsenet.config import (
    RECIPES,
    ClipConfig,
    GuidedVisionConfig,
    LoraConfig,
    TextConfig,
    VisionConfig,
)
from reaf_hsenet.errors import InputError, OutputError
from reaf_hsenet.models.clip import build_dual_encoder
from reaf_hsenet.models.packer import SpatialPacker
from reaf_hsenet.models.positions import resample_3d
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.published import fusion_constants, open_source
from reaf_hsenet.runs.trained import load_trained, published_run
from reaf_hsenet.tokenizer.loading import load_tokenizer
from reaf_hsenet.weights import names
from reaf_hsenet.weights.__main__ import main
from reaf_hsenet.weights.files import load_strictly, read_checkpoint
from reaf_hsenet.weights.shapes import bert_config, flat_reaf


def cli(*arguments) -> int:
    return main(list(map(str, arguments)))


def line(*arguments) -> str:
    with pytest.raises(InputError) as caught:
        cli(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(found: dict, expected: dict) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def golden_tokens(vision, name: str) -> float:
    """Largest error over the golden sample, in units of its deviation."""
    case = CASES[name]
    inputs = [case.input(n) for n in case["inputs"]]
    assert case["outputs"]["tokens"]["sample_index"] == "full"
    with torch.no_grad():
        tokens = vision(*inputs)
    return ((tokens - case.stored["tokens"]).abs().max() / case["outputs"]["tokens"]["std"]).item()


def test_m3d_clip_becomes_a_run_with_the_golden_outputs_of_both_towers(tmp_path, text_model, capsys):
    file = published.write_m3d_clip(tmp_path / "m3d", file="pytorch_model.bin")
    assert cli("convert", file, tmp_path / "run", "--text-model", text_model) == 0
    assert "M3D-CLIP or HSENet-CLIP, stage clip1" in capsys.readouterr().out
    run = load_trained(tmp_path / "run")
    assert (run.stage, run.preset, run.guided) == ("clip1", "hsenet-base", False)
    assert run.recipe == replace(RECIPES["hsenet"], size=(16, 64, 64))
    assert golden_tokens(run.model.vision, "hsenet_vit_stage1_tiny") < 1e-5
    ids, mask, types = (BERT.stored[f"input.{n}"] for n in ("ids", "mask", "token_type_ids"))
    with torch.no_grad():
        assert (run.model.text(ids, mask, types) - BERT.stored["last_hidden_state"]).abs().max() < 1e-5
    weights = published.m3d_clip()
    assert torch.equal(run.model.scale(), weights["logit_scale"])  # multiplies as it is
    assert torch.equal(run.model.text_proj.bias, weights["mm_language_proj.bias"])
    assert run.tokenizer.vocab[:2] == ["[PAD]", "[UNK]"] and len(run.tokenizer) == 200


def test_2e3_becomes_a_guided_run_and_its_stage_1_a_run_of_its_own(tmp_path, text_model):
    file = published.write_m3d_clip(tmp_path / "2e3", published.hsenet_2e3())
    assert cli("convert", file, tmp_path / "run", "--text-model", text_model) == 0
    run = load_trained(tmp_path / "run")
    assert (run.stage, run.guided, run.slices) == ("clip2", True, {"slices": 32, "width": 48})
    assert golden_tokens(run.model.vision, "hsenet_vit_stage2_tiny") < 1e-5
    teacher = load_trained(run.origin["teacher"])
    assert teacher.stage == "clip1" and teacher.sha256() == run.origin["teacher_sha256"]
    assert golden_tokens(teacher.model.vision, "hsenet_vit_stage1_tiny") < 1e-5
    assert teacher.model.scale() != run.model.scale()


def test_a_slice_encoder_that_is_named_is_described_and_one_of_another_width_refused(tmp_path, text_model):
    file = published.write_m3d_clip(tmp_path / "2e3", published.hsenet_2e3())
    fits, other = (published.write(tmp_path / f"{w}.bin", published.mae(w)) for w in (48, 24))
    flags = ("--text-model", text_model, "--slice-encoder")
    assert cli("convert", file, tmp_path / "run", *flags, fits) == 0
    slices = json.loads((tmp_path / "run/config.json").read_text())["slices"]
    assert slices["width"] == 48 and len(slices["sha256"]) == 64
    assert "gives 32 features of 24 channels; this encoder takes 32 of 48" in line(
        "convert", file, tmp_path / "no", *flags, other
    )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("fusion", "prefix"), [(True, ""), (True, "module."), (False, "")])
def test_reaf_and_hlip_become_runs_with_the_outputs_of_the_model_built_directly(tmp_path, fusion, prefix):
    assert cli("convert", published.write_reaf(tmp_path / "reaf", fusion, prefix), tmp_path / "run") == 0
    run = load_trained(tmp_path / "run")
    config = replace(REAF, vision=replace(REAF.vision, fusion="weighted_mean" if fusion else None))
    model = build_dual_encoder(config).eval()
    load_strictly(
        model,
        flat_reaf(names.import_state(names.REAF, published.reaf(fusion)), REAF.vision.grid)
        | fusion_constants(config.vision),
        "REAF",
    )
    volume = torch.from_numpy(fill.volume("volume", (2, 1, 8, 16, 16), 0))
    ids = torch.from_numpy(fill.token_ids("ids", (2, 9), 40, 0))
    with torch.no_grad():
        for found, expected in zip(
            run.model(volume, ids, torch.ones_like(ids)),
            model(volume, ids, torch.ones_like(ids)),
            strict=True,
        ):
            assert torch.equal(found, expected)
    assert run.recipe == replace(RECIPES["reaf"], size=(8, 16, 16)) and run.model.scale_kind == "exp"


def test_another_input_size_resamples_the_position_table_and_says_so(tmp_path, text_model, capsys):
    for kind, file, size, grid in (
        ("hsenet", published.write_m3d_clip(tmp_path / "in"), (32, 64, 96), (8, 4, 6)),
        ("reaf", published.write_reaf(tmp_path / "trunk"), (16, 16, 24), (4, 2, 3)),
    ):
        words = ("--text-model", text_model) if kind == "hsenet" else ()
        assert cli("convert", file, tmp_path / kind, "--size", *size, *words) == 0
        assert "the position table is resampled from the grid" in capsys.readouterr().out
        run = load_trained(tmp_path / kind)
        assert run.config.vision.size == run.recipe.size == size and run.config.vision.grid == grid
        table = published.m3d_clip()["vision_encoder.patch_embedding.position_embeddings"].unflatten(
            1, (4, 4, 4)
        )
        if kind == "reaf":
            table = published.reaf()["visual.trunk.spatial_posemb"]
        assert torch.equal(run.model.vision.pos_embed, resample_3d(table, grid).flatten(1, 3))
        with torch.no_grad():
            assert run.model.encode_image(torch.rand(1, 1, *size)).isfinite().all()
    assert "not a multiple of the patch" in line("convert", file, tmp_path / "no", "--size", 7, 16, 16)


@pytest.mark.parametrize("kind", ["m3d-clip", "2e3", "reaf", "hlip"])
def test_published_converted_exported_is_published_bit_for_bit(tmp_path, text_model, kind):
    if kind in ("m3d-clip", "2e3"):
        weights = published.m3d_clip() if kind == "m3d-clip" else published.hsenet_2e3()
        weights["language_encoder.embeddings.position_ids"] = torch.arange(64)[None]
        weights["mm_vision_proj.weight"] = weights["mm_vision_proj.weight"].half()  # a file keeps its types
        file, words = published.write_m3d_clip(tmp_path / "in", weights), ("--text-model", text_model)
    else:
        file, weights, words = (
            published.write_reaf(tmp_path / "in", kind == "reaf"),
            published.reaf(kind == "reaf"),
            (),
        )
    assert cli("convert", file, tmp_path / "run", *words) == 0
    wanted = "m3d-clip" if kind == "2e3" else kind
    assert cli("export", tmp_path / "run", tmp_path / "out", "--format", wanted) == 0
    same(read_checkpoint(str(tmp_path / "out")), weights)
    assert (tmp_path / "out/vocab.txt").read_bytes() == (tmp_path / "run/vocab.txt").read_bytes()
    other = "reaf" if wanted != "reaf" else "m3d-clip"
    assert f"--format {other}: " in line("export", tmp_path / "run", tmp_path / "other", "--format", other)


@pytest.mark.parametrize("kind", ["m3d-clip", "2e3", "reaf", "lora"])
def test_a_run_that_is_exported_and_converted_computes_the_same(tmp_path, kind):
    text = TextConfig(vocab=40, width=16, depth=2, heads=4, mlp=32, positions=20)
    vision = VisionConfig((8, 16, 16), (4, 8, 8), width=24, depth=2, heads=3, mlp=48)
    if kind == "2e3":
        vision = GuidedVisionConfig(**vars(vision), slice_width=16)
    if kind == "reaf":
        config = replace(
            REAF, vision=replace(REAF.vision, fusion="mean", slice_class="mean", heads=3, scan_layers=(0, 2))
        )
    else:
        lora = LoraConfig(("vision", "text"), 2) if kind == "lora" else None
        config = ClipConfig(vision=vision, text=text, embed=12, logit_scale="exp", max_text=17, lora=lora)
    recipe = replace(RECIPES[config.model], size=config.vision.size, spacing=(9.0, 5.0, 5.0))
    folder = published.new_run(
        tmp_path / "run", config, recipe, "clip2" if kind == "2e3" else "clip1", kind == "lora"
    )
    assert cli("export", folder, tmp_path / "out", "--format", "reaf" if kind == "reaf" else "m3d-clip") == 0
    assert cli("convert", tmp_path / "out", tmp_path / "again") == 0
    first, second = load_trained(folder), load_trained(tmp_path / "again")
    assert (second.recipe, second.slices) == (first.recipe, first.slices) and second.config == replace(
        first.config, lora=None
    )
    volume, ids = torch.rand(2, 1, *config.vision.size), torch.randint(5, 40, (2, 9))
    slices = torch.randn(2, 32, 16) if kind == "2e3" else None
    with torch.no_grad():
        pairs = zip(
            first.model(volume, ids, ids > 0, slices), second.model(volume, ids, ids > 0, slices), strict=True
        )
        assert all(torch.allclose(a, b, atol=1e-5 if kind == "lora" else 0, rtol=0) for a, b in pairs)


def test_a_runs_text_encoder_is_exported_as_the_bert_folder_it_came_from(tmp_path, text_model):
    file = published.write_m3d_clip(tmp_path / "m3d")
    cli("convert", file, tmp_path / "run", "--text-model", text_model)
    assert cli("export", tmp_path / "run", tmp_path / "bert", "--format", "transformers") == 0
    same(load_file(tmp_path / "bert/model.safetensors"), BERT.weights())
    assert bert_config(tmp_path / "bert") == bert_config(text_model)
    assert (
        published_run(open_source(str(file)), str(tmp_path / "bert")).config.text.heads
        == BERT["config"]["num_attention_heads"]
    )


@pytest.fixture(scope="module")
def language_run(tmp_path_factory, text_model):
    folder = tmp_path_factory.mktemp("language")
    encoders = published.write_m3d_clip(folder / "2e3", published.hsenet_2e3())
    decoder = published.write_decoder(folder / "decoder")
    packers = published.write(folder / "packers/mm_projector_and_lora.bin", published.language())
    flags = ("--decoder", decoder, "--encoders", encoders, "--text-model", text_model)
    assert cli("convert", packers, folder / "run", *flags) == 0
    return folder


def test_hsenets_packers_and_adapters_become_a_run_with_the_golden_logits(language_run):
    run, case = load_trained(language_run / "run"), CASES["lora_phi3_tiny"]
    assert (run.stage, run.config.vision, run.config.kernel, run.config.alpha) == (
        "mrg",
        "dual",
        (1, 4, 4),
        8,
    )
    with torch.no_grad():
        logits = run.model.decoder(case.stored["input.ids"], mask=case.stored["input.mask"])[..., :320]
    assert ((logits - case.stored["logits"]).abs() * case.stored["input.mask"][..., None]).max() < 2e-4
    golden = CASES["hsenet_vit_stage2_tiny"]
    volume, slices = golden.input("volume"), golden.input("image_2d")
    for i, packer in enumerate(("mm_projector", "mm_projector2")):
        direct = SpatialPacker(48, 96, (4, 4, 4), (1, 4, 4)).eval()
        state = names.import_state(names.language_table("spatial_packer"), published.language())
        mine = f"projectors.{i}."
        state = {n.removeprefix(mine): t for n, t in state.items() if n.startswith(mine)}
        load_strictly(direct, state, packer)
        tokens = CASES[f"hsenet_vit_stage{i + 1}_tiny"].stored["tokens"][:, 1:]
        with torch.no_grad():
            found = run.model.projector(i)(run.model.features(volume, slices)[i])
            assert torch.allclose(found, direct(tokens), atol=1e-4)


def test_the_language_run_goes_back_to_its_published_files_bit_for_bit(language_run, tmp_path):
    assert cli("export", language_run / "run", tmp_path / "out", "--format", "transformers") == 0
    same(torch.load(tmp_path / "out/mm_projector_and_lora.bin", weights_only=True), published.language())
    adapter = {n: t for n, t in published.language().items() if "lora_" in n}
    same(
        load_file(tmp_path / "out/adapter/adapter_model.safetensors"),
        {n.replace(".default", ""): t for n, t in adapter.items()},
    )
    base, found = (load_file(f / "model.safetensors") for f in (language_run / "decoder", tmp_path / "out"))
    grown = found.pop("model.embed_tokens.weight")
    assert torch.equal(grown[:320], base.pop("model.embed_tokens.weight")) and len(grown) == 324
    same(found, base)
    # What was exported is taken again, on the run that it was made with.
    packers, base = tmp_path / "out/mm_projector_and_lora.bin", language_run / "decoder"
    flags = ("--decoder", base, "--encoders", language_run / "run/encoder", "--stage", "vqa")
    assert cli("convert", packers, tmp_path / "again", *flags) == 0
    run, first = load_trained(tmp_path / "again"), load_trained(language_run / "run")
    assert run.stage == "vqa" and run.config.max_text == 8 + 330 - 256
    same(run.model.state_dict(), first.model.state_dict())


def test_a_decoders_text_is_split_as_gpt_2_does_where_its_folder_has_that_vocabulary(
    language_run, tmp_path, capsys
):
    decoder = published.write_decoder(tmp_path / "decoder")
    letters = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256), strict=True))
    rest = {f"r{i}": i for i in range(256, 320) if i != 313} | {"<|endoftext|>": 313}
    (decoder / "vocab.json").write_text(json.dumps(letters | rest))
    (decoder / "merges.txt").write_text("#version: 0.2\n")
    packers, encoders = language_run / "packers/mm_projector_and_lora.bin", language_run / "run/encoder"
    assert cli("convert", packers, tmp_path / "run", "--decoder", decoder, "--encoders", encoders) == 0
    assert "GPT-2's split of vocab.json" in capsys.readouterr().out
    tokenizer = load_tokenizer(
        tmp_path / "run"
    )  # tokenizer.json of the decoder's own folder knows t0, t1, ... alone
    assert tokenizer.tokens(tokenizer.encode("t1 b")) == ["t", "1", "Ġ", "b"]


def test_what_packers_stand_on_must_be_named_and_fit(language_run, tmp_path, text_model):
    packers, decoder = language_run / "packers/mm_projector_and_lora.bin", language_run / "decoder"
    for known in ((), ("--decoder", decoder), ("--encoders", "x")):
        needed = line("convert", packers, tmp_path / "r", *known)
        assert "name what they stand on: --decoder" in needed and "--encoders" in needed
    m3d = published.write_m3d_clip(tmp_path / "m3d")
    words = ("--text-model", text_model)
    assert "without a stage-1 model" in line(
        "convert", packers, tmp_path / "r", "--decoder", decoder, "--encoders", m3d, *words
    )
    on = ("--decoder", decoder, "--encoders", language_run / "run/encoder")
    state = published.language()
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight"
    changed = published.write(tmp_path / "changed.bin", {**state, name: state[name][:-1]})
    assert "down_proj.lora_B.default.weight is (95, 4), expected (96, 4)" in line(
        "convert", changed, tmp_path / "r", *on
    )
    one = {n: t for n, t in state.items() if "mm_projector2" not in n}
    assert "has no mm_projector2" in line(
        "convert", published.write(tmp_path / "one.bin", one), tmp_path / "r", *on
    )
    assert "--decoder: is of HSENet's packers" in line("convert", m3d, tmp_path / "r", "--decoder", decoder)
    assert not (tmp_path / "r").exists()


def test_a_vocabulary_is_asked_for_and_must_be_the_text_encoders(tmp_path, text_model):
    file = published.write_m3d_clip(tmp_path / "m3d")
    (file.parent / "vocab.txt").unlink()
    assert (
        "has no vocab.txt, by which the text encoder reads reports; name the text encoder's folder"
        in line("convert", file, tmp_path / "r")
    )
    short = published.write_vocabulary(tmp_path / "short", 150)
    assert "has 150 tokens, the text encoder 200" in line(
        "convert", file, tmp_path / "r", "--text-model", short
    )
    assert not (tmp_path / "r").exists()


def test_settings_that_contradict_the_shapes_are_refused(tmp_path, text_model):
    for settings, words in (
        ({"hidden_size": 96}, "hidden_size is 96, the tensors have 48"),
        ({"num_layers": 5}, "num_layers is 5, the tensors have 3"),
        ({"patch_size": [4, 8, 8]}, "patch_size is [4, 8, 8], the tensors have 1024 voxels a patch"),
        ({"img_size": [32, 64, 64]}, "the tensors have 64 tokens"),
        ({"num_heads": 7}, "7 heads do not share vision's width of 48"),
        ({"img_size": "large"}, "img_size is 'large'; expected three whole numbers"),
    ):
        file = published.write_m3d_clip(tmp_path / "m3d", **settings)
        assert words in line("convert", file, tmp_path / "r", "--text-model", text_model), settings
    text = published.write_vocabulary(tmp_path / "text", 200, {**BERT["config"], "num_hidden_layers": 9})
    file = published.write_m3d_clip(tmp_path / "m3d")
    assert "num_hidden_layers is 9, the tensors have 3" in line(
        "convert", file, tmp_path / "r", "--text-model", text
    )
    (file.parent / "config.json").unlink()
    assert "tell no sizes and are not the published ones; put a config.json" in line(
        "convert", file, tmp_path / "r"
    )
    assert not (tmp_path / "r").exists()


def test_nothing_is_written_over_and_nothing_half_written(tmp_path, text_model):
    file = published.write_m3d_clip(tmp_path / "m3d")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept.txt").write_text("kept")
    assert "is there already" in line("convert", file, tmp_path / "full", "--text-model", text_model)
    run = published.new_run(tmp_path / "run", REAF, replace(RECIPES["reaf"], size=REAF.vision.size))
    assert "is there already" in line("export", run, tmp_path / "full", "--format", "reaf")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["kept.txt"]
    state = published.m3d_clip()
    for name, change, words in (
        (
            "vision_encoder.blocks.1.attn.qkv.weight",
            lambda t: t[:-1],
            "vision.blocks.1.attn.qkv.weight is (143, 48), expected (144, 48)",
        ),
        (
            "vision_encoder.norm.bias",
            lambda t: t * float("nan"),
            "NaN or infinite values in vision_encoder.norm.bias",
        ),
        (
            "vision_encoder.norm.weight",
            lambda t: t.long(),
            "vision.norm.weight is int64, expected floating point",
        ),
        ("logit_scale", lambda t: t / 0, "NaN or infinite values in logit_scale"),
        (
            "vision_encoder.blocks.2.extra.weight",
            lambda t: torch.ones(3),
            "vision.blocks.2.extra.weight is not known",
        ),
    ):
        published.write(file, {**state, name: change(state.get(name))})
        assert words in line("convert", file, tmp_path / "r", "--text-model", text_model)
        assert not (tmp_path / "r").exists()
    gone = {n: t for n, t in state.items() if ".blocks.1." not in n}
    published.write(file, gone)
    assert "has 2 blocks of vision., numbered up to 2" in line(
        "convert", file, tmp_path / "r", "--text-model", text_model
    )


def test_a_run_that_cannot_be_written_to_its_end_is_removed(tmp_path, text_model, monkeypatch):
    def full(*_):
        raise OutputError("the disk is full")

    monkeypatch.setattr(Run, "write_config", full)
    file = published.write_m3d_clip(tmp_path / "2e3", published.hsenet_2e3())
    assert "the disk is full" in line("convert", file, tmp_path / "r", "--text-model", text_model)
    assert not (tmp_path / "r").exists()


def test_a_text_encoder_alone_is_no_run_and_the_line_says_what_it_is_for(tmp_path):
    file = published.write(tmp_path / "bert/model.safetensors", published.bert())
    assert "which is not converted; use it with: train.py --stage clip1 --text-model" in line(
        "convert", file, tmp_path / "r"
    )
    assert "no such folder" in line("convert", "./nothing.pt", tmp_path / "r")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "expected an object of settings, found list"),
        ("null", "expected an object of settings, found NoneType"),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": "x"}', "lora_alpha is 'x'; expected a number"),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}', "lora_alpha is nan; expected a number"),
        ('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}', "r is 8, the adapters have rank 4"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_settings_of_adapters_that_are_none_are_refused(language_run, tmp_path, text, words):
    packers = published.write(tmp_path / "packers.bin", published.language())
    (tmp_path / "adapter_config.json").write_text(text)
    on = ("--decoder", language_run / "decoder", "--encoders", language_run / "run/encoder")
    assert words in line("convert", packers, tmp_path / "r", *on)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_slices": "x"},
        {"num_slices": -1},
        {"num_slices": 1.5},
        {"reaf_hsenet": 3},
        {"reaf_hsenet": {"model": 3}},
        {"reaf_hsenet": {"model": {"vision": {"size": "a"}}}},
        {"reaf_hsenet": {"model": {"vision": {"size": [1, 2]}}}},
        {"reaf_hsenet": {"model": {"vision": {"width": 10**9}}}},
        {"reaf_hsenet": {"model": {"text": {"depth": 10**6}}}},
        {"reaf_hsenet": {"model": {"vision": {"heads": 0}}}},
    ],
)
def test_settings_beside_the_weights_that_make_no_sense_are_refused_with_their_file(
    tmp_path, text_model, settings
):
    file = published.write_m3d_clip(tmp_path / "2e3", published.hsenet_2e3(), **settings)
    assert "2e3/config.json: " in line("convert", file, tmp_path / "r", "--text-model", text_model)
    for key, value in (
        ("num_attention_heads", 7),
        ("num_attention_heads", "4"),
        ("layer_norm_eps", "a"),
        ("pad_token_id", -1),
    ):
        words = published.write_vocabulary(tmp_path / "words", 200, {**BERT["config"], key: value})
        assert "words/config.json: " in line(
            "convert", published.write_m3d_clip(tmp_path / "m3d"), tmp_path / "r", "--text-model", words
        )


def test_hlip_of_several_scans_is_told_from_that_of_one(tmp_path):
    state = published.reaf(False) | {"visual.trunk.sequential_posemb": torch.ones(1, 40, 24)}
    published.write_vocabulary(tmp_path / "mri", REAF.text.vocab)
    file = published.write(tmp_path / "mri/brain.pt", {"state_dict": state})
    assert "has sequential_posemb, HLIP's positions of several scans a study" in line(
        "convert", file, tmp_path / "r"
    )


def test_the_frozen_slice_encoder_inside_a_2e3_file_is_kept_and_not_used(tmp_path, text_model):
    extra = {"visual_encoder_2D.blocks.0.norm1.weight": torch.ones(3)}
    file = published.write_m3d_clip(tmp_path / "2e3", published.hsenet_2e3() | extra)
    assert cli("convert", file, tmp_path / "run", "--text-model", text_model) == 0
    assert cli("export", tmp_path / "run", tmp_path / "out", "--format", "m3d-clip") == 0
    same(read_checkpoint(str(tmp_path / "out")), published.hsenet_2e3() | extra)
