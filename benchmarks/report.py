"""`infer.py report` from start to end, as a process of its own: seconds to the first word, then tokens a
second.

    PYTHONPATH=. python benchmarks/report.py [--real-size | --dry] [--tokens 32] [--runs 3] [--infer FILE ...]

A made run of stage mrg with random weights: both encoders at base size, packers and adapters, a decoder of
100 M parameters in float32 or (--real-size) Phi-4-mini's shapes in bf16, and a made CT of 512 x 512 x 300
voxels. --infer names scripts to compare, one after another in every round, for example of an older checkout.
--dry: all of it tiny, to see that it runs.
"""

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from decoder import PRESETS as DECODERS
from decoder import phi4mini
from decoder_loading import make
from reaf_hsenet.config import RECIPES, GuidedVisionConfig
from reaf_hsenet.data.language import add_image_tokens
from reaf_hsenet.files import file_sha256
from reaf_hsenet.models.build import build_mllm, trained_state
from reaf_hsenet.models.mllm_config import TINY_KERNEL, MllmConfig
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.language import base_decoder
from reaf_hsenet.settings import to_dict
from reaf_hsenet.tokenizer.tokenizer import train_words
from reaf_hsenet.weights.slice_encoder import describe, save_slice_encoder


def write_scan(path: Path, size: int, slices: int) -> None:
    """A body of soft tissue with two lungs, and noise."""
    x, y, z = np.ogrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j, -1 : 1 : slices * 1j]
    hu = np.where((x / 0.9) ** 2 + (y / 0.7) ** 2 < 1, 40, -1000) * np.ones_like(z, dtype=np.int64)
    for side in (-0.45, 0.45):
        hu[((x - side) / 0.33) ** 2 + (y / 0.5) ** 2 + (z / 0.9) ** 2 < 1] = -850
    hu = (hu + np.random.default_rng(0).normal(0, 20, hu.shape)).astype(np.int16)
    affine = np.diag([-358.4 / size, -358.4 / size, 300 / slices, 1.0])
    affine[:3, 3] = 180, 180, -150
    nib.save(nib.Nifti1Image(hu, affine), path)


def write_run(folder: Path, real_size: bool, dry: bool) -> None:
    torch.manual_seed(0)
    config = DECODERS["phi-4-mini" if real_size else "small"]
    preset, encoder = "hsenet-base", SliceEncoder(224, 16, width=768, depth=12, heads=12, mlp=3072)
    if dry:
        config = phi4mini(512, 64, 2, heads=4, kv_heads=2, mlp=128)
        preset, encoder = "hsenet-tiny", SliceEncoder(32, 16, width=24, depth=1, heads=2, mlp=48)
    # About as many words as the decoder has rows, so that random weights make words.
    words = itertools.islice(map("".join, itertools.product("abcdefghijklmnopqrst", repeat=5)), config.vocab)
    tokenizer = train_words(["a " + " ".join(words)], config.vocab - 8)
    add_image_tokens(tokenizer)
    config = replace(
        config, vocab=len(tokenizer), eos_ids=(tokenizer.eos_id,), bos_id=tokenizer.bos_id, pad_id=None
    )
    decoder = folder / "decoder"
    decoder.mkdir(parents=True)
    make(config, decoder, torch.bfloat16 if real_size else torch.float32)
    save_slice_encoder(folder / "slice_encoder", encoder)
    slices = describe(encoder, str(folder / "slice_encoder"))
    vision = PRESETS[preset].vision
    guided = GuidedVisionConfig(**vars(vision), slices=32, slice_width=encoder.width)
    hashes = {path.name: file_sha256(path) for path in decoder.glob("*.safetensors")}
    origin = {"encoders": None, "decoder": {"name": str(decoder), "sha256": hashes, "added": 0}}
    kernel = TINY_KERNEL if dry else MllmConfig.kernel
    mllm = MllmConfig("dual", (vision, guided), config, kernel=kernel, train_vision=True)
    run = Run(folder)
    run.save(1, trained_state(build_mllm(mllm, base_decoder(mllm, origin))), {}, keep=1, best=True)
    tokenizer.save(run.folder)
    values = {
        "version": "0",
        "stage": "mrg",
        "preset": preset,
        "model": to_dict(mllm),
        "origin": origin,
    }
    run.write_config(
        {
            **values,
            "recipe": to_dict(replace(RECIPES["hsenet"], size=vision.size)),
            "slices": slices,
            "train": {},
            "data": None,
        }
    )


def report(script: Path, scan: Path, run: Path, tokens: int) -> tuple[float, float]:
    """(seconds to the first word, to the end) of one process."""
    command = [
        sys.executable,
        script,
        "report",
        scan,
        "--run",
        run,
        "--new-tokens",
        tokens,
        "--device",
        "cpu",
    ]
    began = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    process.stdout.read(1)
    first = time.perf_counter() - began
    process.stdout.read()
    if process.wait():
        raise SystemExit(f"{script} ended with {process.returncode}")
    return first, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real-size", action="store_true")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--infer", type=Path, nargs="+", default=[Path("infer.py")])
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        write_scan(folder / "scan.nii.gz", *((64, 40) if args.dry else (512, 300)))
        write_run(folder / "run", args.real_size, args.dry)
        found = {script: [] for script in args.infer}
        for _ in range(args.runs):
            for script in args.infer:
                found[script].append(report(script, folder / "scan.nii.gz", folder / "run", args.tokens))
        for script, times in found.items():
            first = statistics.median(first for first, _ in times)
            rest = statistics.median((args.tokens - 1) / (end - first) for first, end in times)
            print(
                f"{script}: first word after {first:.1f} s, then {rest:.2f} tokens/s (medians of {args.runs})"
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
