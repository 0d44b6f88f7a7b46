"""A data-dependent start for a dual encoder, or for a decoder that sees, that is trained from scratch.

With the usual initialisation the class tokens of all volumes (and of all reports) point the same way: their
mean is several times larger than what tells them apart. The contrastive loss then first shrinks what little
differs, and a small run spends its whole time on the plateau at log B. Here the first layer and the last norm
are set from a sample, so that the network starts from what differs between patients. Nothing about the model
or the loss changes. Likewise a new decoder learns to do without visual tokens whose common part outweighs
what tells patients apart.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reaf_hsenet.models.clip import DualEncoder
from reaf_hsenet.models.reaf import REAF
from reaf_hsenet.models.vit3d import ViT3D

POSITION_STD = 0.7
LEAST_STD = 1e-3  # of what differs; copies of one scan do not, and keep the usual start


@torch.no_grad()
def calibrate_vision(vision: ViT3D | REAF, volumes: Tensor) -> None:
    """Patch tokens become (deviation from the mean patch of their place) / std + a code of the place.

    volumes: (n, 1, D, H, W). The mean patch goes into the position table, as its negative.
    """
    # Token = (W x + b - mean) / std + code: W and b are divided by the std, the rest goes into the table.
    tokens = vision.patch_embed(volumes)  # (n, N, C)
    mean = tokens.mean(0, keepdim=True)
    deviation = (tokens - mean).std()
    factor = 1 / deviation if deviation > LEAST_STD else 1.0
    vision.patch_embed.proj.weight.mul_(factor)
    vision.patch_embed.proj.bias.mul_(factor)
    if isinstance(vision.pos_embed, nn.Parameter):  # REAF's sines and cosines are such a code already
        nn.init.normal_(vision.pos_embed, std=POSITION_STD)
    vision.pos_embed.sub_(factor * mean)


@torch.no_grad()
def standardise(norm: nn.LayerNorm, features: Tensor) -> None:
    """Set the affine part of `norm` so that features have mean 0 and std 1 a channel.

    features: (n, C) or (n, N, C), outputs of `norm`. The std is taken about the mean of each of the N places.
    """
    # The spread between patients at a place; the spread between places would hide it.
    std = (features - features.mean(0)).flatten(0, -2).std(0)
    # Copies of one scan: dividing by next to nothing would blow rounding up to features.
    if std.max() < LEAST_STD:
        return
    std = std.clamp(min=LEAST_STD)
    # y = g n + b becomes (y - mean) / std = (g / std) n + (b - mean) / std.
    norm.bias.copy_((norm.bias - features.flatten(0, -2).mean(0)) / std)
    norm.weight.div_(std)


@torch.no_grad()
def calibrate(
    model: DualEncoder, volumes: Tensor, ids: Tensor | None, mask: Tensor | None, chunk: int = 32
) -> None:
    """Calibrate the vision encoder on volumes (n, 1, D, H, W), the text encoder on reports (n, T)."""
    # Dropout would count as a difference between patients.
    model.eval()
    calibrate_vision(model.vision, volumes)
    # Class tokens with the new first layer: the last norm is set for what it will see.
    image = torch.cat([model.vision(part)[:, 0] for part in volumes.split(chunk)])
    standardise(model.vision.norm, image)
    if ids is not None:
        # A post-norm encoder ends in its last block's second norm.
        pairs = zip(ids.split(chunk), mask.split(chunk), strict=True)
        standardise(model.text.blocks[-1].norm2, torch.cat([model.text(i, m)[:, 0] for i, m in pairs]))


@torch.no_grad()
def token_chunks(
    model: nn.Module, volumes: Tensor, slices: Tensor | None, chunk: int = 32
) -> Iterator[list[Tensor]]:
    """Yield the patch tokens of every encoder of an Mllm, of `chunk` volumes at a time, on its device.

    volumes: (n, 1, D, H, W). slices: (n, S, C) or None.
    """
    model.eval()
    device = next(model.encoders.parameters()).device
    parts = volumes.split(chunk)
    guides = [None] * len(parts) if slices is None else slices.split(chunk)
    for part, guide in zip(parts, guides, strict=True):
        yield model.features(part.to(device), None if guide is None else guide.to(device))


@torch.no_grad()
def calibrate_tokens(model: nn.Module, volumes: Tensor, slices: Tensor | None, chunk: int = 32) -> None:
    """Standardise the patch tokens that the projectors of an Mllm see. Inputs: as of token_chunks."""
    found = list(token_chunks(model, volumes, slices, chunk))
    for encoder, tokens in zip(model.encoders, zip(*found, strict=True), strict=True):
        standardise(encoder.norm, torch.cat(tokens))
