"""A run of a language stage with random weights, for tests of what comes after training."""

from pathlib import Path

import torch

from reaf_hsenet.config import GuidedVisionConfig, VisionConfig
from reaf_hsenet.data.language import add_image_tokens
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.questions import report_prompts
from reaf_hsenet.models.build import build_mllm, trained_state
from reaf_hsenet.models.decoder_config import DecoderConfig, RopeConfig
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.settings import to_dict
from reaf_hsenet.tokenizer.tokenizer import train_words

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
    encoder = VisionConfig(size, tuple(n // 4 for n in size), WIDTH, 1, 2, 2 * WIDTH)
    encoders = [encoder]
    if guided:
        encoders.append(
            GuidedVisionConfig(
                **vars(encoder), slices=manifest.slices["slices"], slice_width=manifest.slices["width"]
            )
        )
    decoder = DecoderConfig(
        "llama",
        len(tokenizer),
        WIDTH,
        1,
        2,
        2,
        16,
        2 * WIDTH,
        CONTEXT,
        RopeConfig(dims=16),
        tied=True,
        eos_ids=(tokenizer.eos_id,),
        bos_id=tokenizer.bos_id,
    )
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
