"""A training step of stage 2 against one of stage 1, at base size: the teacher's forward pass and the
guidance included.

    python benchmarks/clip2.py [--pairs 2] [--threads 2] [--batch 2]

Forward, loss, backward and AdamW's step, float32, reports of 128 tokens. The teacher encodes every volume, as
it must with augmentation; without it, its features are computed once.
"""

import argparse

from measure import compare


def _step(threads: int, batch: int, stage: int):
    from dataclasses import replace

    import torch

    from reaf_hsenet.config import ClipConfig, GuidedVisionConfig
    from reaf_hsenet.data.loader import Batch
    from reaf_hsenet.models.clip import build_dual_encoder
    from reaf_hsenet.train.contrastive import Contrastive, Guided, Teacher, encode

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    first = ClipConfig()
    config = first if stage == 1 else replace(first, vision=GuidedVisionConfig())
    model, kind = build_dual_encoder(config).train(), Contrastive()
    if stage == 2:
        kind = Guided(
            Teacher(build_dual_encoder(first), torch.device("cpu"), None, batch, images_change=True),
            0.1,
            5000,
        )
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(5, 30000, (batch, 128))
    slices = torch.randn(batch, 32, 768) if stage == 2 else None
    data = Batch(torch.rand(batch, 1, 32, 256, 256), ids, torch.ones_like(ids), list(range(batch)), slices)

    def step():
        loss, _ = kind.loss(encode(model, data), data, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the teacher's text features are then known, as they are after the first epoch
    return step


def second(threads: int, batch: int):
    return _step(threads, batch, 2)


def first(threads: int, batch: int):
    return _step(threads, batch, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    print(f"one training step, batch {args.batch}, 32 x 256 x 256, float32, {args.threads} threads")
    compare(("stage 1", "stage 2"), (first, second), (args.threads, args.batch), args.pairs)


if __name__ == "__main__":
    main()
