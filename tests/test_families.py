"""What a checkpoint is, is read from its tensors' names and shapes: family, configuration, every tensor's
place.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import published
from conftest import ROOT, error_line
from language_run import write_language_run
from published import REAF
from reaf_hsenet.config import RECIPES, GuidedVisionConfig, ReafVisionConfig
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.lora import add_lora
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.runs.published import expected_state, open_source
from reaf_hsenet.weights import names
from reaf_hsenet.weights.__main__ import main
from reaf_hsenet.weights.adapters import save_adapter
from reaf_hsenet.weights.decoder import load_decoder
from reaf_hsenet.weights.names import M3D_CLIP, classifier_table, export_state, places
from reaf_hsenet.weights.published import FAMILIES, Published, open_published, recognise
from reaf_hsenet.weights.shapes import dual_config, text_shapes, with_axes
from reaf_hsenet.weights.slice_encoder import save_slice_encoder


def adapter(folder):
    decoder = load_decoder(str(published.write_decoder(folder / "decoder")))
    add_lora(decoder.layers, ("qkv_proj", "down_proj"), 3, 12)
    save_adapter(decoder, folder / "adapter")
    return folder / "adapter"


def slice_encoder(folder):
    save_slice_encoder(folder / "own", SliceEncoder(32, 16, width=24, depth=1, heads=3, mlp=48))
    return folder / "own"


def dual_run(folder):
    return published.new_run(folder / "run", REAF, replace(RECIPES["reaf"], size=REAF.vision.size))


def decoder(folder):
    return published.write_decoder(folder / "decoder")


# What is written below a folder, a tensor of it, and where that goes: (our name, its part of how many), None:
# nowhere.
MADE = {
    "m3d-clip": (
        lambda f: published.write_m3d_clip(f / "a"),
        "vision_encoder.blocks.1.mlp.linear2.bias",
        ("vision.blocks.1.mlp.fc2.bias", 1, 1),
    ),
    "hsenet-2e3": (
        lambda f: published.write_m3d_clip(f / "a", published.hsenet_2e3()),
        "vision_encoder.slice_guided_attention.Wq.bias",
        ("vision.guidance.query.bias", 1, 1),
    ),
    "reaf": (
        lambda f: published.write_reaf(f / "a", prefix="module."),
        "visual.trunk.spatial_posemb",
        ("vision.pos_embed", 1, 1),
    ),
    "hlip": (
        lambda f: published.write_reaf(f / "a", fusion=False),
        "text.transformer.encoder.layer.0.attention.self.value.bias",
        ("text.blocks.0.attn.qkv.bias", 3, 3),
    ),
    "trunk": (
        lambda f: published.write(
            f / "t.pth",
            {
                n.removeprefix("visual.trunk."): t
                for n, t in published.reaf(False).items()
                if n.startswith("visual.trunk.")
            },
        ),
        "cls_token",
        ("vision.cls_token", 1, 1),
    ),
    "m3d-trunk": (
        lambda f: published.write(
            f / "v.bin", {n: t for n, t in published.m3d_clip().items() if n.startswith("vision_encoder.")}
        ),
        "vision_encoder.blocks.0.attn.out_proj.bias",
        ("vision.blocks.0.attn.proj.bias", 1, 1),
    ),
    "hsenet-language": (
        lambda f: published.write(f / "mm_projector_and_lora.bin", published.language()),
        "base_model.model.model.mm_projector2.proj_mpls.2.bias",
        ("projectors.1.head.fc2.bias", 1, 1),
    ),
    "biomedclip": (
        lambda f: published.write(f / "open_clip_pytorch_model.bin", published.biomedclip()),
        "visual.trunk.patch_embed.proj.weight",
        ("patch_embed.weight", 1, 1),
    ),
    "mae": (
        lambda f: published.write(f / "mae.pth", {"model": published.mae()}),
        "pos_embed",
        ("pos_embed", 1, 1),
    ),
    "vit": (
        lambda f: published.write(
            f / "v.safetensors", {n: t for n, t in published.mae().items() if n[:4] not in ("mask", "deco")}
        ),
        "blocks.0.mlp.fc1.bias",
        ("blocks.0.mlp.fc1.bias", 1, 1),
    ),
    "slice-encoder": (slice_encoder, "cls_token", ("cls_token", 1, 1)),
    "bert": (
        lambda f: published.write(f / "b.bin", published.bert()),
        "bert.encoder.layer.2.attention.self.key.weight",
        ("blocks.2.attn.qkv.weight", 2, 3),
    ),
    "cxr-bert": (
        lambda f: published.write(
            f / "c.bin", published.bert() | {"cls_projection_head.dense_to_hidden.weight": torch.ones(2, 64)}
        ),
        "cls_projection_head.dense_to_hidden.weight",
        None,
    ),
    "classifier": (
        lambda f: published.write(f / "RadBertClassifier.pth", published.classifier()),
        "classifier.weight",
        ("head.weight", 1, 1),
    ),
    "adapter": (
        adapter,
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
        ("base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", 1, 1),
    ),
    "decoder": (decoder, "model.norm.weight", ("model.norm.weight", 1, 1)),
    "run-dual": (dual_run, "vision.cls_token", ("vision.cls_token", 1, 1)),
}


@pytest.mark.parametrize("key", MADE)
def test_a_checkpoint_is_recognised_by_its_names_and_its_tensors_have_places(tmp_path, key):
    make, name, place = MADE[key]
    source = open_source(str(make(tmp_path)))
    assert source.family.key == key
    found = places(source.family.table, source.tensors)
    found = [(ours, parts.index(name) + 1, len(parts)) for ours, parts in found.items() if name in parts]
    assert name in source.tensors and found == ([place] if place else [])


def test_every_family_but_a_language_run_is_made_above_and_that_is_recognised_too(prepared, tmp_path):
    assert {family.key for family in FAMILIES} == {*MADE, "run-language"}
    assert open_source(str(write_language_run(tmp_path / "run", prepared))).family.key == "run-language"


def test_a_roberta_classifiers_two_layers_have_their_places():
    tensors = published.classifier(roberta=True)
    found = places(classifier_table(tensors), tensors)
    assert found["pooler.dense.weight"] == ["classifier.dense.weight"]
    assert found["head.weight"] == ["classifier.out_proj.weight"]


def shapes_only(config):
    """A published checkpoint of a configuration without data."""
    state = {n: t for n, t in expected_state(config).items() if not n.startswith("vision.fusion.")}
    if config.model == "reaf":
        return export_state(names.REAF, with_axes(state, config.vision))
    return export_state(M3D_CLIP, state)


HLIP = replace(PRESETS["reaf-base"], vision=ReafVisionConfig(fusion=None, regions=0, region_size=(1, 1, 1)))


@pytest.mark.parametrize(
    "config",
    [
        PRESETS["hsenet-base"],
        replace(PRESETS["hsenet-base"], vision=GuidedVisionConfig()),
        PRESETS["reaf-base"],
        replace(HLIP, vision=replace(HLIP.vision, patch=(8, 24, 24))),
        replace(HLIP, vision=replace(HLIP.vision, patch=(8, 16, 16))),
    ],
    ids=["M3D-CLIP", "2E3", "REAF", "HLIP 8,24,24", "HLIP 8,16,16"],
)
def test_the_published_sizes_are_read_from_the_shapes_alone(config, tmp_path):
    reaf, tensors = config.model == "reaf", shapes_only(config)
    source = Published("shapes", tmp_path / "file", tensors, recognise(tensors))
    vision = replace(config.vision, drop_path=ReafVisionConfig.drop_path) if reaf else config.vision
    assert dual_config(source) == replace(config, vision=vision)
    assert any("12 heads, by the published rule" in note for note in source.notes)
    hsenet = "hsenet-2e3" if hasattr(config.vision, "slices") else "m3d-clip"
    assert source.family.key == (hsenet if not reaf else "reaf" if config.vision.fusion else "hlip")


def test_a_dry_run_says_what_a_checkpoint_is_and_writes_nothing(tmp_path, capsys):
    file = published.write_m3d_clip(tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    main(["convert", str(file), "--dry-run"])
    said = capsys.readouterr().out
    assert (
        "M3D-CLIP or HSENet-CLIP\n" in said
        and "stage clip1\n" in said
        and "vision.patch (4, 16, 16)" in said
        and "heads, by the published rule" in said
    )
    assert (
        "known, not used here: language_encoder.pooler" in said
        and f"for: evaluate.py --task retrieval or zeroshot --run {file}" in said
    )
    file = published.write(tmp_path / "c.pth", published.classifier())
    main(["convert", str(file), "--dry-run"])
    assert "a report classifier" in capsys.readouterr().out and sorted(tmp_path.rglob("*")) == sorted(
        [*before, file]
    )


def test_a_dry_run_names_what_is_missing_left_over_misshapen_and_not_finite(tmp_path):
    for change, words in (
        (lambda s: s.pop("vision_encoder.norm.bias"), "vision.norm.bias"),
        (
            lambda s: s.update({"vision_encoder.blocks.1.mlp.linear1.bias": torch.ones(5)}),
            r"vision.blocks.1.mlp.fc1.bias is \(5,\), expected \(96,\)",
        ),
        (lambda s: s.update({"vision_encoder.extra.weight": torch.ones(2)}), "extra.weight"),
        (lambda s: s.update(logit_scale=torch.tensor(float("inf"))), "NaN or infinite values in logit_scale"),
    ):
        state = published.m3d_clip()
        change(state)
        file = published.write_m3d_clip(tmp_path / "a", state)
        with pytest.raises(InputError, match=words):
            main(["convert", str(file), "--dry-run"])


def test_a_dry_run_says_what_a_file_is_before_what_it_lacks(tmp_path, capsys):
    file = published.write(tmp_path / "mm_projector_and_lora.bin", published.language())
    with pytest.raises(InputError, match="lora.bin: holds packers and adapters only"):
        main(["convert", str(file), "--dry-run"])
    assert "HSENet's packers and adapters (HSENet-Phi-4-4B)\nfile: " in capsys.readouterr().out


def test_a_folder_to_write_or_a_dry_run_is_asked_for(tmp_path):
    file = str(published.write_m3d_clip(tmp_path / "a"))
    for more, words in (
        ((), "--dry-run: expected either a folder"),
        ((str(tmp_path / "run"), "--dry-run"), "RUN: expected either a folder"),
    ):
        with pytest.raises(InputError, match=words):
            main(["convert", file, *more])


def test_an_unknown_family_is_refused_with_what_its_names_look_like(tmp_path):
    state = {f"unet.down.{i}.weight": torch.ones(2) for i in range(9)} | {"unet.time": torch.ones(1)}
    file = published.write(tmp_path / "unet.pt", state)
    with pytest.raises(
        InputError,
        match=r"of no known family: its 10 tensors are unet.down.\* \(9\), unet.time; see docs/weights.md",
    ):
        open_source(str(file))


def test_a_text_config_of_roberta_is_told_by_its_single_token_type(tmp_path):
    state = {n: t for n, t in published.bert("").items()}
    state["embeddings.token_type_embeddings.weight"] = torch.ones(1, 64)
    found = text_shapes(open_published("roberta", published.write(tmp_path / "roberta.bin", state)))
    assert (found.kind, found.pad_id, found.layer_norm_eps, found.vocab) == ("roberta", 1, 1e-5, 200)


@pytest.mark.slow
def test_the_program_ends_in_one_line_and_exit_code_2_for_a_file_that_is_none(tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    program = [sys.executable, "-m", "reaf_hsenet.weights", "convert", str(tmp_path / "text.pt"), "--dry-run"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "text.pt: is truncated or not a checkpoint" in error_line(done)
