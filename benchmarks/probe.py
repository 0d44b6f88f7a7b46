"""How long a probe takes on embeddings of CT-RATE's size, and what of it.

    PYTHONPATH=. python benchmarks/probe.py       # 47,000 training volumes, 3,039 scored, 768 numbers each

Embeddings are drawn, with 18 classes of CT-RATE's range of frequencies that a linear function of them tells.
"""

import argparse
import time

import torch

from reaf_hsenet.data.patients import held_rows
from reaf_hsenet.evaluate.probe import few_shot
from reaf_hsenet.metrics.probe import fit_probe, nearest_votes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--training", type=int, default=47000)
    parser.add_argument("--scored", type=int, default=3039)
    parser.add_argument("--width", type=int, default=768)
    args = parser.parse_args()
    torch.manual_seed(0)

    # Unit vectors whose dimensions differ in size, as those of trained encoders do.
    rows = args.training + args.scored
    image = torch.randn(rows, args.width) * torch.linspace(3, 0.05, args.width)
    image = torch.nn.functional.normalize(image, dim=1)
    logits = image / image.std(0) @ torch.randn(args.width, 18) * 0.1 - torch.linspace(0.5, 3, 18)
    labels = (torch.rand(rows, 18) < logits.sigmoid()).numpy()
    train, scored = image[: args.training], image[args.training :]
    truth, answers = labels[: args.training], labels[args.training :]
    names = [f"train_{i // 2}_a_{i % 2}" for i in range(args.training)]
    held = held_rows([{"id": name, "scan": name} for name in names])

    seconds = {}
    for part, work in {
        "logistic regression, six penalties, calibration, thresholds": lambda: fit_probe(train, truth, held),
        "votes of the nearest": lambda: nearest_votes(train, truth, scored),
        "1, 5, 10 and 50 volumes a class, five draws": lambda: few_shot(train, truth, scored, answers, 0),
    }.items():
        began = time.perf_counter()
        work()
        seconds[part] = time.perf_counter() - began
    for part, taken in (*seconds.items(), ("all", sum(seconds.values()))):
        print(f"{part:<62}{taken:8.1f} s")
    print(f"{args.training} x {args.width}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
