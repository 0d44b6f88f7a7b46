"""Configurations of small networks, and what they take."""

import torch

from reaf_hsenet.config import ClipConfig, ReafVisionConfig, TextConfig, VisionConfig
from reaf_hsenet.models.decoder_config import DecoderConfig, RopeConfig

SMALL_REAF = ReafVisionConfig(
    (6, 16, 8),
    (2, 4, 4),
    width=24,
    depth=4,
    heads=2,
    mlp=48,
    scan_layers=(1, 3),
    regions=1,
    region_size=(2, 3, 1),
    drop_path=0.0,
)

TINY = ClipConfig(
    vision=VisionConfig((8, 16, 16), (4, 8, 8), width=32, depth=2, heads=4, mlp=64),
    text=TextConfig(
        vocab=50, width=32, depth=2, heads=4, mlp=64, positions=24, dropout=0.0, attention_dropout=0.0
    ),
    embed=16,
)


SMALL_DECODER = DecoderConfig(
    "phi3",
    96,
    width=48,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=8,
    mlp=64,
    context=128,
    rope=RopeConfig(dims=6),
    tied=True,
    pad_id=0,
)


def batch(size=3):
    torch.manual_seed(0)
    ids = torch.randint(5, 50, (size, 12))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return torch.rand(size, 1, 8, 16, 16), ids, mask
