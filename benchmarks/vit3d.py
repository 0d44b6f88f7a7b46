"""ViT3D at base size against monai's ViT: time of forward + backward, and peak memory.

    pip install -r requirements-bench.txt && python benchmarks/vit3d.py [--pairs 3] [--threads 2]

Batch 1, 1 x 32 x 256 x 256, float32. Each run is a process of its own; the weights are the same kind of
random.
"""

import argparse
import inspect

from measure import compare


def _work(model, threads: int):
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    volume = torch.rand(1, 1, 32, 256, 256)
    model.train()

    def step():
        for _ in range(2):
            out = model(volume)
            (out[0] if isinstance(out, tuple) else out).square().mean().backward()
            model.zero_grad()

    return step


def ours(threads: int):
    from reaf_hsenet.config import VisionConfig
    from reaf_hsenet.models.vit3d import ViT3D

    c = VisionConfig()
    return _work(ViT3D(c.size, c.patch, width=c.width, depth=c.depth, heads=c.heads, mlp=c.mlp), threads)


def monais(threads: int):
    from monai.networks.nets import ViT
    from torch import nn

    # classification=True adds the class token; newer versions call the patch embedding proj_type.
    embedding = "proj_type" if "proj_type" in inspect.signature(ViT).parameters else "pos_embed"
    model = ViT(
        in_channels=1,
        img_size=(32, 256, 256),
        patch_size=(4, 16, 16),
        hidden_size=768,
        mlp_dim=3072,
        num_layers=12,
        num_heads=12,
        classification=True,
        qkv_bias=False,
        **{embedding: "perceptron"},
    )
    # The published encoder keeps all tokens and has no head.
    model.classification_head = nn.Identity()
    return _work(model, threads)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(f"two steps of forward + backward, batch 1, float32, {args.threads} threads")
    compare(("reaf_hsenet", "monai"), (ours, monais), (args.threads,), args.pairs)


if __name__ == "__main__":
    main()
