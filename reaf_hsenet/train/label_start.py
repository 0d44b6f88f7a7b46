"""A start for encoders that a decoder from scratch will look through: first they learn the scans' labels.

The mean patch token of each encoder goes through a linear layer to the labels' logits, learned with binary
cross-entropy. The layers are then thrown away. Without it a new decoder does learn to look, several times as
slowly. Not published.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from reaf_hsenet.config import TrainConfig
from reaf_hsenet.data.augment import augment_with_slices
from reaf_hsenet.data.bad_volumes import BadVolumes
from reaf_hsenet.data.loader import part_unreadable, read_sample
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.progress import progress_bar

BATCH, LEARNING_RATE, WEIGHT_DECAY = 32, 1e-3, 0.1


def learn_labels(
    model: Mllm,
    manifest: Manifest,
    settings: TrainConfig,
    guided: bool,
    bad: BadVolumes,
    device: torch.device,
) -> None:
    """Train the encoders on the labels for settings.label_epochs passes over the training split.

    guided: volumes come with slice features. Every rank makes the same passes. The encoders' weights are
    changed
    in place, and lie on the processor afterwards.
    """
    entries = manifest.entries("train")
    encoders = model.encoders.to(device).train()
    # A linear layer each, so that the labels have to stand in the mean patch token itself, where the
    # projector will find them.
    heads = nn.ModuleList(
        nn.Linear(len(encoder.norm.weight), len(manifest.labels)) for encoder in encoders
    ).to(device)
    batch = min(BATCH, len(entries))
    steps = settings.label_epochs * (len(entries) // batch)
    parameters = [*encoders.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    # Up over a tenth of the steps, then down to almost 0.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    bar = progress_bar(steps, "labels", "step", shown=bad.ranks.main)
    for epoch in range(settings.label_epochs):
        # By (seed, epoch): every rank has the same order, computes the same gradients, and has nothing to
        # share.
        order = np.random.default_rng((settings.seed, epoch)).permutation(len(entries))
        for rows in order[: len(order) // batch * batch].reshape(-1, batch):
            items = [_sample(manifest, row, epoch, settings, guided) for row in rows]
            # Every rank reads the same rows and meets the same bad ones; the agreement counts them once.
            good, unreadable = part_unreadable(items)
            bad.agree(unreadable)
            if good:
                volume, slices, labels = zip(*good, strict=True)
                target = torch.stack(labels).to(device)
                guides = torch.stack(slices).to(device) if guided else None
                features = model.features(torch.stack(volume).to(device), guides)
                # (B, N, C) -> (B, C) -> (B, 18) of each encoder, which are trained side by side.
                told = [head(tokens.mean(1)) for head, tokens in zip(heads, features, strict=True)]
                sum(F.binary_cross_entropy_with_logits(logits, target) for logits in told).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            # Also without a readable volume: the schedule has a fixed length.
            schedule.step()
            bar.update()
    bar.close()
    # Back to where the rest of the model is; the training state moves or shards it whole.
    encoders.cpu()


def _sample(manifest: Manifest, row: int, epoch: int, settings: TrainConfig, guided: bool):
    """Return (volume, slices or None, labels (18,)), augmented as in training, or Unreadable."""
    entry = manifest.entries("train")[row]
    sample = read_sample(manifest, entry, guided)
    if not isinstance(sample, tuple):
        return sample
    volume, following = augment_with_slices(
        *sample, settings.augment, np.random.default_rng((settings.seed, epoch, row))
    )
    return (
        volume,
        following if settings.slices_follow else sample[1],
        torch.tensor(entry["labels"], dtype=torch.float32),
    )
