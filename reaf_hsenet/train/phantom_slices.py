"""A small slice encoder for phantoms, so that stage 2 runs with nothing downloaded.

It learns as BiomedCLIP's did, from pictures and their texts, on the same phantoms: the mean of a volume's
slice features should be near its report, which the stage-1 run's frozen text encoder embeds. Real data have
BiomedCLIP.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reaf_hsenet.data.loader import CTReportDataset
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.pool import worker_pool
from reaf_hsenet.data.prepare import entry_slices
from reaf_hsenet.data.reading import SlicesWanted
from reaf_hsenet.data.slice_features import add_slice_features, normalise
from reaf_hsenet.data.slices import SLICE_RECIPES
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.progress import progress_bar
from reaf_hsenet.runs.trained import Trained
from reaf_hsenet.train.losses import contrastive_logits, contrastive_loss
from reaf_hsenet.weights.slice_encoder import describe, load_slice_encoder, save_slice_encoder

RECIPE = "phantom"
ENCODER = {"size": 64, "patch": 16, "width": 128, "depth": 2, "heads": 4, "mlp": 512}
STEPS, BATCH, SLICES_A_STEP, LEARNING_RATE, SEED = 240, 64, 8, 1e-3, 0


def add_phantom_slices(folder: Path, teacher: Trained, device: torch.device, say) -> None:
    """Train the encoder on the training split, unless it is there, and store all volumes' features."""
    saved, workers = folder / "slice_encoder", len(os.sched_getaffinity(0))
    if (saved / "model.safetensors").is_file():  # of a start that was interrupted: its features are kept too
        say(f"{folder}: continuing the slice features of {saved}")
        encoder, _ = load_slice_encoder(str(saved))
    else:
        say(f"{folder}: has no slice features; training a small slice encoder on the phantoms' own reports")
        encoder = train_slice_encoder(load_manifest(folder), teacher, device, workers, STEPS)
        save_slice_encoder(saved, encoder)
    add_slice_features(
        folder, encoder, describe(encoder, "phantoms", recipe=RECIPE), workers, device, batch=1024
    )


def train_slice_encoder(
    manifest: Manifest, teacher: Trained, device: torch.device, workers: int, steps: int
) -> SliceEncoder:
    """Train a slice encoder contrastively, slices against reports; some slices of every volume a step."""
    text = report_features(manifest, teacher, device)
    entries = manifest.entries("train")
    wanted = SlicesWanted(SLICE_RECIPES[RECIPE], ENCODER["size"])
    take = partial(entry_slices, reading=manifest.reading, wanted=wanted)
    images = []
    with worker_pool(workers) as pool, progress_bar(len(entries), "slices to learn from", "volume") as bar:
        for pictures in pool.map(take, entries, chunksize=16):
            images.append(torch.from_numpy(pictures))
            bar.update()
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    encoder = SliceEncoder(**ENCODER).to(device).train()
    # Standardised channels: what all volumes share would otherwise hide what tells them apart.
    head = nn.Sequential(
        nn.BatchNorm1d(encoder.width, affine=False), nn.Linear(encoder.width, text.shape[1])
    ).to(device)
    scale = torch.tensor(10.0, device=device)
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *head.parameters()], lr=LEARNING_RATE, weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    batch = min(BATCH, len(entries))
    bar = progress_bar(steps, "slice encoder", "step")
    for _ in range(steps):
        rows = rng.choice(len(entries), batch, replace=False)
        picked = [
            images[row][np.sort(rng.choice(len(images[row]), SLICES_A_STEP, replace=False))] for row in rows
        ]
        features = encoder(normalise(torch.cat(picked).to(device))).unflatten(0, (batch, -1)).mean(1)
        loss = contrastive_loss(contrastive_logits(F.normalize(head(features), dim=-1), text[rows], scale))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.update()
    bar.close()
    return encoder.eval()


@torch.inference_mode()
def report_features(manifest: Manifest, teacher: Trained, device: torch.device) -> Tensor:
    """Return unit vectors (n, C) of the training reports."""
    reports = CTReportDataset(manifest, "train", teacher.tokenizer, teacher.config.max_text)
    rng, model, found = np.random.default_rng(SEED), teacher.model.to(device), []
    for start in range(0, len(reports), BATCH):
        rows = [reports.encode(entry["text"], rng) for entry in reports.entries[start : start + BATCH]]
        ids, mask = (t.to(device) for t in teacher.tokenizer.batch(rows))
        found.append(model.encode_text(ids, mask))
    return torch.cat(found).clone()
