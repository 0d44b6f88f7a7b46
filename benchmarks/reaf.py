"""REAF's encoder at base size: time of forward + backward at batch 1, float32, and peak memory.

    pip install -r requirements-bench.txt && pip install --no-deps timm torchvision
    python benchmarks/reaf.py [--pairs 2] [--threads 2]

Against the same network with timm's blocks, and with attention over the whole scan in every layer; then the
share of fusion and saliency in a step, and the memory of a step with gradient checkpointing. Each run is a
process of its own.
"""

import argparse
import statistics
import time
from functools import partial

from measure import compare, measure


def _model(threads: int, **changes):
    from dataclasses import replace

    import torch

    from reaf_hsenet.models.clip import build_vision
    from reaf_hsenet.presets import PRESETS

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return build_vision(replace(PRESETS["reaf-base"].vision, drop_path=0.0, **changes)).train()


def _step(model):
    import torch

    volume = torch.rand(1, 1, *model.size)

    def step():
        model(volume)[:, 0].square().mean().backward()
        model.zero_grad()

    return step


def ours(threads: int):
    return _step(_model(threads))


def checkpointed(threads: int):
    model = _model(threads)
    model.grad_checkpoint = True
    return _step(model)


def scan_attention(threads: int):
    return _step(_model(threads, scan_layers=tuple(range(12))))


def timms(threads: int):
    """The same hierarchy, fusion and saliency around timm's blocks."""
    import torch

    # timm imports torchvision, whose own operators need a build for this very torch. None is used here.
    operators = torch.library.Library("torchvision", "DEF")  # they last as long as this name
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    from timm.models.vision_transformer import Block

    model = _model(threads)
    for i, block in enumerate(model.blocks):
        theirs = Block(768, 12, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
        theirs.load_state_dict(block.state_dict())
        model.blocks[i] = theirs
    del operators
    return _step(model)


def pooling_share(threads: int, repeats: int = 5) -> None:
    """Fusion, saliency, pooling and their Linear, forward and backward, as a share of the whole step."""
    import torch

    model = _model(threads)
    step = _step(model)
    slices, scan = (14, 1 + 14 * 14, 768), (1, 1 + 14**3, 768)
    outputs = {
        "scan": [torch.rand(scan, requires_grad=True) for _ in range(4)],
        "slice": [torch.rand(slices, requires_grad=True) for _ in range(8)],
    }

    def pooling():
        pooled = [model.pool(name, outputs[name]).pooled for name in model.fusion]
        (outputs["scan"][-1] + model.fusion_layer(torch.cat(pooled, -1))[:, None])[
            :, 0
        ].square().mean().backward()

    seconds = {}
    for name, work in (("step", step), ("pooling", pooling)):
        work()
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        seconds[name] = statistics.median(times)
    share = 100 * seconds["pooling"] / seconds["step"]
    print(
        f"fusion + saliency: {1000 * seconds['pooling']:.0f} ms of a step of {seconds['step']:.2f} s, "
        f"{share:.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(f"one step of forward + backward, batch 1, 112 x 336 x 336, float32, {args.threads} threads")
    compare(("reaf_hsenet", "timm's blocks"), (ours, timms), (args.threads,), args.pairs)
    compare(("reaf_hsenet", "scan attention everywhere"), (ours, scan_attention), (args.threads,), args.pairs)
    pooling_share(args.threads)
    _, before, peak = measure(checkpointed, args.threads)
    print(f"with gradient checkpointing: {peak:.0f} MB peak, of which {before:.0f} before the step")


if __name__ == "__main__":
    main()
