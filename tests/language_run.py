"""Runs with random weights, for tests of what comes after training."""

from dataclasses import replace
from pathlib import Path

import torch

from reaf_hsenet.config import RECIPES, GuidedVisionConfig, VisionConfig
from reaf_hsenet.data.language import add_image_tokens
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.questions import report_prompts
from reaf_hsenet.models.build import build_mllm, trained_state
from reaf_hsenet.models.clip import build_dual_encoder
from reaf_hsenet.models.decoder_config import DecoderConfig, RopeConfig
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.settings import to_dict
from reaf_hsenet.tokenizer.tokenizer import train_wordpiece, train_words

WIDTH, CONTEXT = 32, 512


def write_language_run(
    folder: Path, data: Path, stage: str = "mrg", seed: int = 0, guided: bool = False
) -> Path:
    """A run of `stage` on the prepared folder `data`: all in its own checkpoint, at any sensible size of
    volume.

    guided: with a second encoder that takes the folder's slice features.
    """
    torch.manual_seed(seed)
    manifest = load_manifest(data)
    size = manifest.recipe.size
    tokenizer = train_words([*(e["text"] for e in manifest.entries("train")), *report_prompts()], 400)
    add_image_tokens(tokenizer)
    encoder = VisionConfig(size, tuple(n // 4 for n in size), width=WIDTH, depth=1, heads=2, mlp=2 * WIDTH)
    encoders = [encoder]
    if guided:
        encoders.append(
            GuidedVisionConfig(
                **vars(encoder), slices=manifest.slices["slices"], slice_width=manifest.slices["width"]
            )
        )
    sizes = {"width": WIDTH, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp": 2 * WIDTH}
    ends = {"tied": True, "eos_ids": (tokenizer.eos_id,), "bos_id": tokenizer.bos_id}
    rope = RopeConfig(dims=16)
    decoder = DecoderConfig("llama", len(tokenizer), **sizes, context=CONTEXT, rope=rope, **ends)
    config = MllmConfig(
        "dual" if guided else "stage1",
        tuple(encoders),
        decoder,
        kernel=(2, 2, 2),
        full=True,
        train_vision=True,
    )
    run = Run(folder)
    model = build_mllm(config)
    run.save(1, trained_state(model), {}, keep=1, best=True)
    tokenizer.save(run.folder)
    run.write_config(
        {
            "version": "0",
            "stage": stage,
            "preset": "hsenet-tiny",
            "model": to_dict(config),
            "recipe": to_dict(manifest.recipe),
            "origin": {"encoders": None, "decoder": None},
            "slices": manifest.slices if guided else None,
            "train": {},
            "data": str(data),
        }
    )
    return run.folder


def write_dual_run(folder: Path, data: Path, model: str = "hsenet", guided: bool = False) -> Path:
    """A dual encoder's run with the weights that it starts from; guided: HSENet's stage 2."""
    manifest, preset = load_manifest(data), PRESETS[f"{model}-tiny"]
    recipe = (
        manifest.recipe
        if model == "hsenet"
        else replace(RECIPES["reaf"], size=(16, 32, 32), spacing=(14, 10, 10))
    )
    vision = replace(preset.vision, size=(16, 32, 32), patch=(4, 8, 8))
    if guided:
        slices = {"slices": manifest.slices["slices"], "slice_width": manifest.slices["width"]}
        vision = GuidedVisionConfig(**vars(vision), **slices)
    tokenizer = train_wordpiece([entry["text"] for entry in manifest.entries("train")], 1000)
    config = replace(preset, vision=vision, text=replace(preset.text, vocab=len(tokenizer.vocab)))
    torch.manual_seed(0)
    network = build_dual_encoder(config)
    if guided:
        torch.nn.init.normal_(network.vision.score.weight)  # scores that differ visibly
    run = Run(folder)
    run.write_config(
        {
            "stage": "clip2" if guided else "clip1",
            "model": to_dict(config),
            "recipe": to_dict(recipe),
            "data": str(data),
            "slices": manifest.slices if guided else None,
        }
    )
    tokenizer.save(folder)
    run.save(1, network.state_dict(), {}, keep=1, best=True)
    return Path(folder)
