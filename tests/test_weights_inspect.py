"""What a checkpoint is, is read from its tensors' names and shapes: family, configuration, every tensor's place."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import published
from conftest import ROOT, error_line
from language_run import write_language_run
from published import BERT, REAF
from reaf_hsenet.config import RECIPES, GuidedVisionConfig, ReafVisionConfig
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.lora import add_lora
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.runs.dual import expected_state
from reaf_hsenet.runs.export import m3d_clip_tensors, reaf_tensors, under_published_names
from reaf_hsenet.runs.inspection import inspect
from reaf_hsenet.weights.__main__ import main
from reaf_hsenet.weights.adapters import save_adapter
from reaf_hsenet.weights.decoder import load_decoder
from reaf_hsenet.weights.families import FAMILIES, identify
from reaf_hsenet.weights.names import bert_state, m3d_clip_state, reaf_names
from reaf_hsenet.weights.shapes import Reader, dual_config, text_shapes
from reaf_hsenet.weights.slice_encoder import save_slice_encoder
from test_weights_convert import new_run, write_reaf


def adapter(folder):
    decoder = load_decoder(str(published.write_decoder(folder / "decoder")))
    add_lora(decoder.layers, ("qkv_proj", "down_proj"), 3, 12)
    save_adapter(decoder, folder / "adapter")
    return folder / "adapter"


def slice_encoder(folder):
    save_slice_encoder(folder / "own", SliceEncoder(32, 16, 24, 1, 3, 48))
    return folder / "own"


def dual_run(folder):
    return new_run(folder / "run", REAF, replace(RECIPES["reaf"], size=REAF.vision.size))


def decoder(folder):
    return published.write_decoder(folder / "decoder")


# What is written below a folder, the family that it is, some of its configuration, and one place.
MADE = {
    "m3d-clip": (lambda f: published.write_m3d_clip(f / "a"), {"vision": {"patch": (4, 16, 16), "heads": 4}, "embed": 20},
                 "vision_encoder.blocks.1.mlp.linear2.bias", "vision.blocks.1.mlp.fc2.bias"),
    "hsenet-2e3": (lambda f: published.write_m3d_clip(f / "a", published.hsenet_2e3()), {"vision": {"slice_width": 48, "slices": 32}},
                   "stage1_pretrained_CLIP.mm_vision_proj.bias", "stage1.vision_proj.bias"),
    "reaf": (lambda f: write_reaf(f / "a", prefix="module."), {"vision": {"fusion": "weighted_mean"}, "logit_scale": "exp"},
             "visual.trunk.spatial_posemb", "vision.pos_embed"),
    "hlip": (lambda f: write_reaf(f / "a", fusion=False), {"vision": {"fusion": None, "size": (8, 16, 16)}},
             "text.transformer.encoder.layer.0.attention.self.value.bias", "text.blocks.0.attn.qkv.bias [3 of 3]"),
    "trunk": (lambda f: published.write(f / "t.pth", {n.removeprefix("visual.trunk."): t for n, t in published.reaf(False).items()
                                                       if n.startswith("visual.trunk.")}), None, "cls_token", "vision.cls_token"),
    "hsenet-language": (lambda f: published.write(f / "mm_projector_and_lora.bin", published.language()), {"r": 4, "alpha": 8},
                        "base_model.model.model.mm_projector2.proj_mpls.2.bias", "projectors.1.head.fc2.bias"),
    "biomedclip": (lambda f: published.write(f / "open_clip_pytorch_model.bin", published.biomedclip()), {"size": 64, "patch": 16},
                   "visual.trunk.patch_embed.proj.weight", "patch_embed.weight"),
    "mae": (lambda f: published.write(f / "mae.pth", {"model": published.mae()}), {"width": 24, "depth": 1}, "pos_embed", "pos_embed"),
    "vit": (lambda f: published.write(f / "v.safetensors", {n: t for n, t in published.mae().items() if n[:4] not in ("mask", "deco")}),
            {"mlp": 48}, "blocks.0.mlp.fc1.bias", "blocks.0.mlp.fc1.bias"),
    "slice-encoder": (slice_encoder, {"heads": 3, "size": 32}, "cls_token", "cls_token"),
    "bert": (lambda f: published.write(f / "b.bin", published.bert()), {"vocab": 200, "kind": "bert"},
             "bert.encoder.layer.2.attention.self.key.weight", "blocks.2.attn.qkv.weight [2 of 3]"),
    "cxr-bert": (lambda f: published.write(f / "c.bin", published.bert() | {"cls_projection_head.dense_to_hidden.weight": torch.ones(2, 64)}),
                 {"positions": 64}, "cls_projection_head.dense_to_hidden.weight", None),
    "classifier": (lambda f: published.write(f / "RadBertClassifier.pth", published.classifier()), {"labels": 18},
                   "classifier.weight", "head.weight"),
    "adapter": (adapter, {"r": 3, "alpha": 12, "layers": ["down_proj", "qkv_proj"]},
                "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight", "decoder.layers.0.mlp.down_proj.lora_a"),
    "decoder": (decoder, {"family": "phi3", "heads": 6}, "model.norm.weight", "norm.weight"),
    "run-dual": (dual_run, {"stage": "clip1"}, "vision.cls_token", "vision.cls_token"),
}  # fmt: skip


def contains(found, wanted) -> bool:
    if isinstance(wanted, dict):
        return all(contains(found[key], value) for key, value in wanted.items())
    return found == wanted


@pytest.mark.parametrize("key", MADE)
def test_a_checkpoint_is_recognised_by_its_names_and_every_tensor_has_a_place(tmp_path, key):
    make, configuration, name, place = MADE[key]
    found = inspect(str(make(tmp_path)))
    assert found.key == key and found.whole, (found.missing, found.left_over, found.wrong)
    assert contains(found.configuration, configuration or {})
    assert next(row.ours for row in found.tensors if row.published == name) == place
    assert all((row.ours is None) == (row.published in found.not_used) for row in found.tensors)
    assert found.uses and not any("FILE" in use or "FOLDER" in use for use in found.uses)


def test_every_family_but_a_language_run_is_made_above_and_that_is_recognised_too(prepared, tmp_path):
    assert {family.key for family in FAMILIES} == {*MADE, "run-language"}
    found = inspect(str(write_language_run(tmp_path / "run", prepared)))
    assert found.key == "run-language" and found.configuration["stage"] == "mrg"


def test_a_roberta_classifiers_two_layers_have_their_places(tmp_path):
    found = inspect(str(published.write(tmp_path / "r.bin", published.classifier(roberta=True))))
    assert found.key == "classifier" and found.configuration["kind"] == "roberta" and found.whole
    assert next(r.ours for r in found.tensors if r.published == "classifier.dense.weight") == "pooler.dense.weight"


def shapes_only(config, names, renaming):
    """A published checkpoint of a configuration without data."""
    state = {n: t for n, t in expected_state(config).items() if not n.startswith("vision.fusion.")}
    found = under_published_names(state, list(names), renaming, "shapes")
    if config.model == "reaf":
        kernel, table = "visual.trunk.patch_embed.proj.weight", "visual.trunk.spatial_posemb"
        found[kernel] = found[kernel].reshape(-1, 1, *config.vision.patch)
        found[table] = found[table].unflatten(1, config.vision.grid)
    return found


HLIP = replace(PRESETS["reaf-base"], vision=ReafVisionConfig(fusion=None, regions=0, region_size=(1, 1, 1)))


@pytest.mark.parametrize("config", [
    PRESETS["hsenet-base"],
    replace(PRESETS["hsenet-base"], vision=GuidedVisionConfig()),
    PRESETS["reaf-base"],
    replace(HLIP, vision=replace(HLIP.vision, patch=(8, 24, 24))),
    replace(HLIP, vision=replace(HLIP.vision, patch=(8, 16, 16))),
], ids=["M3D-CLIP", "2E3", "REAF", "HLIP 8,24,24", "HLIP 8,16,16"])  # fmt: skip
def test_the_published_sizes_are_read_from_the_shapes_alone(config):
    reaf = config.model == "reaf"
    names, renaming = (reaf_tensors, reaf_names) if reaf else (m3d_clip_tensors, m3d_clip_state)
    found = shapes_only(config, names(config.vision, config.text), renaming)
    vision = replace(config.vision, drop_path=ReafVisionConfig.drop_path) if reaf else config.vision
    reader = Reader(renaming(found), "shapes")
    assert dual_config(found, reader) == replace(config, vision=vision)
    assert any("12 heads, by the published rule" in note for note in reader.notes)
    assert identify(found, "shapes").key == (("hlip" if config.vision.fusion is None else "reaf") if reaf else
                                             "hsenet-2e3" if hasattr(config.vision, "slices") else "m3d-clip")


def test_missing_left_over_misshapen_and_not_finite_tensors_are_named_and_the_exit_code_is_1(tmp_path, capsys):
    state = published.m3d_clip()
    del state["vision_encoder.norm.bias"]
    state["vision_encoder.blocks.1.mlp.linear1.bias"] = torch.ones(5)
    state["vision_encoder.extra.weight"] = torch.ones(2)
    state["logit_scale"] = torch.tensor(float("inf"))
    file = published.write_m3d_clip(tmp_path / "a", state)
    assert main(["inspect", str(file), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == ["vision.norm.bias"] and found["left_over"] == ["vision_encoder.extra.weight"]
    assert found["not_used"] == ["language_encoder.pooler.dense.bias", "language_encoder.pooler.dense.weight"]
    assert found["wrong"] == ["vision.blocks.1.mlp.fc1.bias is (5,), expected (96,)", "logit_scale has NaN or infinite values"]


def test_the_table_groups_blocks_unless_all_tensors_are_asked_for(tmp_path, capsys):
    file = published.write_m3d_clip(tmp_path / "a")
    assert main(["inspect", str(file)]) == 0
    short = capsys.readouterr().out
    assert main(["inspect", str(file), "--all"]) == 0
    full = capsys.readouterr().out
    assert "vision_encoder.blocks.*.attn.qkv.weight (3)" in short and "vision.blocks.*.attn.qkv.weight" in short
    assert "vision_encoder.blocks.2.attn.qkv.weight" in full and "blocks.*" not in full
    for text in (short, full):
        assert "M3D-CLIP or HSENet-CLIP" in text and "vision.patch (4, 16, 16)" in text and "heads, by the published rule" in text
        assert "missing: none" in text and "evaluate.py --task retrieval" in text


def test_an_unknown_family_is_refused_with_what_its_names_look_like(tmp_path):
    state = {f"unet.down.{i}.weight": torch.ones(2) for i in range(9)} | {"unet.time": torch.ones(1)}
    file = published.write(tmp_path / "unet.pt", state)
    with pytest.raises(InputError, match=r"of no known family: its 10 tensors are unet.down.\* \(9\), unet.time; see docs/weights.md"):
        inspect(str(file))


def test_a_config_that_contradicts_a_berts_or_decoders_shapes_is_refused(tmp_path):
    file = published.write(tmp_path / "bert/model.safetensors", published.bert())
    config = file.parent / "config.json"
    config.write_text(json.dumps({**BERT["config"], "vocab_size": 300}))
    with pytest.raises(InputError, match="config.json: vocab_size is 300, the tensors have 200"):
        inspect(str(file.parent))
    config.write_text(json.dumps(BERT["config"]))
    found = inspect(str(file.parent))
    assert found.configuration["heads"] == BERT["config"]["num_attention_heads"] and not found.notes
    folder = decoder(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vocab_size": 400}))
    with pytest.raises(InputError, match=r"vocab_size and hidden_size are \(400, 96\), the tensors have \(320, 96\)"):
        inspect(str(folder))


def test_an_adapter_whose_rank_or_pairs_do_not_fit_is_found_out(tmp_path):
    state = published.language()
    gone = "base_model.model.model.layers.2.mlp.down_proj.lora_B.default.weight"
    file = published.write(tmp_path / "packers.bin", {n: t for n, t in state.items() if n != gone})
    assert inspect(str(file)).missing == ["decoder.layers.2.mlp.down_proj.lora_b"]
    folder = adapter(tmp_path)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, "r": 8}))
    with pytest.raises(InputError, match=r"adapters are of rank \[3\], adapter_config.json says 8"):
        inspect(str(folder))


def test_a_text_config_of_roberta_is_told_by_its_single_token_type():
    state = {n: t for n, t in published.bert("").items()}
    state["embeddings.token_type_embeddings.weight"] = torch.ones(1, 64)
    found = text_shapes(Reader(bert_state(state), "roberta"))
    assert (found.kind, found.pad_id, found.layer_norm_eps, found.vocab) == ("roberta", 1, 1e-5, 200)


def test_the_program_ends_in_one_line_and_exit_code_2_for_a_file_that_is_none(tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    program = [sys.executable, "-m", "reaf_hsenet.weights", "inspect", str(tmp_path / "text.pt")]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "text.pt: is truncated or not a checkpoint" in error_line(done)
