"""What weights start from when nothing is loaded: at base size as published, in the tiny presets as what
trains them.
"""

from dataclasses import replace

import pytest
import torch

import train
from reaf_hsenet.config import GuidedVisionConfig, TextConfig
from reaf_hsenet.models.clip import build_dual_encoder, start_as_published
from reaf_hsenet.presets import PRESETS, stage_config
from reaf_hsenet.train import contrastive
from tiny import config_of, edited, same_weights, tiny


def started(preset: str, **vision) -> dict[str, torch.Tensor]:
    """The state of a base-width model of one block a tower."""
    config = PRESETS[preset]
    small = {"scan_layers": (0,), "size": (24, 72, 72)} if preset.startswith("reaf") else {}
    encoder = replace(config.vision, depth=1, **small)
    if vision:
        encoder = GuidedVisionConfig(**vars(encoder), **vision)
    torch.manual_seed(0)
    model = build_dual_encoder(replace(config, vision=encoder, text=TextConfig(vocab=2000, depth=1)))
    start_as_published(model)
    return model.state_dict()


def uniform(tensor: torch.Tensor, inputs: int) -> bool:
    """Whether it looks drawn from +-1 / sqrt(inputs), as torch's Linear is."""
    most = inputs**-0.5
    return tensor.abs().max() <= most and tensor.std().item() == pytest.approx(most / 3**0.5, rel=0.08)


def normal(tensor: torch.Tensor, std: float = 0.02) -> bool:
    return tensor.std().item() == pytest.approx(std, rel=0.03) and tensor.abs().max() > 3 * std


def test_hsenets_vit_starts_as_monai_starts_it():
    state = started("hsenet-base", slice_width=768, slices=32)
    block = "vision.blocks.0."
    for name, inputs in (("attn.qkv", 768), ("attn.proj", 768), ("mlp.fc1", 768), ("mlp.fc2", 3072)):
        assert uniform(state[f"{block}{name}.weight"], inputs)
        assert name == "attn.qkv" or uniform(state[f"{block}{name}.bias"], inputs)
    assert state[f"{block}mlp.fc2.weight"].std().item() == pytest.approx(0.0104, abs=2e-4)
    for name in ("guidance.query", "guidance.key", "guidance.value", "guidance.proj"):
        assert uniform(state[f"vision.{name}.weight"], 768) and uniform(state[f"vision.{name}.bias"], 768)
    assert state["vision.score.weight"].abs().max() <= 768**-0.5
    assert normal(state["vision.patch_embed.proj.weight"]) and normal(state["vision.pos_embed"])
    assert not state["vision.patch_embed.proj.bias"].any() and not state["vision.cls_token"].any()
    for name in ("vision_proj", "text_proj"):
        assert uniform(state[f"{name}.weight"], 768) and uniform(state[f"{name}.bias"], 768)


def test_reafs_vit_starts_as_timm_starts_it():
    state = started("reaf-base")
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        assert normal(state[f"vision.blocks.0.{name}.weight"])
        assert not state[f"vision.blocks.0.{name}.bias"].any()
    for name in ("weight", "bias"):
        assert uniform(state[f"vision.patch_embed.proj.{name}"], 4608)
    assert uniform(state["vision.fusion_layer.weight"], 768) and uniform(state["vision_proj.weight"], 768)
    assert state["vision.cls_token"].std().item() == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize("preset", ["hsenet-base", "reaf-base"])
def test_a_text_encoder_starts_as_bert_does(preset):
    state = started(preset)
    block = "text.blocks.0."
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        assert normal(state[f"{block}{name}.weight"]) and not state[f"{block}{name}.bias"].any()
    assert normal(state["text.word_embed.weight"][1:]) and not state["text.word_embed.weight"][0].any()
    assert normal(state["text.pos_embed.weight"])
    assert (state["text.norm.weight"] == 1).all() and not state[f"{block}norm2.bias"].any()


def test_base_presets_start_as_published_and_tiny_ones_do_not():
    for stage, model in (("clip1", "hsenet"), ("clip2", "hsenet"), ("clip1", "reaf")):
        assert stage_config(stage, model, f"{model}-base").start == "published"
        assert stage_config(stage, model, f"{model}-tiny").start == "xavier"


def test_a_run_starts_as_its_recipe_says_and_what_is_loaded_stays(prepared, tmp_path, monkeypatch):
    seen, noted = [], lambda model: seen.append(start_as_published(model))
    monkeypatch.setattr(contrastive, "start_as_published", noted)
    assert train.main(tiny(prepared, tmp_path / "tiny", "--max-steps", 1)) == 0
    assert not seen and config_of(tmp_path / "tiny")["train"]["start"] == "xavier"
    as_published = lambda *names: replace(stage_config(*names), start="published")
    monkeypatch.setattr("reaf_hsenet.train.setup.stage_config", as_published)
    assert train.main(tiny(prepared, tmp_path / "two", "--max-steps", 1, "--init", tmp_path / "tiny")) == 0
    assert seen and same_weights(tmp_path / "tiny", tmp_path / "two")  # the first step's rate is 0


def test_a_finished_run_from_before_a_setting_was_known_is_still_finished(prepared, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(tiny(prepared, out, "--max-steps", 1)) == 0
    with edited(out / "config.json") as config:
        del config["train"]["start"]
    assert train.main(tiny(prepared, out, "--max-steps", 1)) == 0
    assert "finished already" in capsys.readouterr().out
