"""What each part of a method is worth: tiny runs on phantoms with the part and without it, over several
seeds.

    python benchmarks/ablation.py reaf|hsenet|mrg [--seeds 3] [--jobs 2]  # 1 h; mrg: 2 h, after hsenet

Trains on the built-in phantoms and evaluates on 512 patients of another seed. Writes the table into
docs/results.md, between the method's marks. Finished runs (runs/ablation/) are not repeated. Seeds change
initialisation and order; the phantoms stay.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results.md"
TEST_SEED, TEST_SIZE = 99, 512
# Per variant the stage and its flags; stage 2 starts from the same seed's run of the first variant. Of mrg
# the encoders start from hsenet's ablation with the same seed and are trained, as in the tiny default.
VARIANTS = {
    "reaf": {
        "REAF, as published": ("clip1", []),
        "without hierarchy (every block sees the scan)": ("clip1", ["--scan-layers", "0", "1", "2"]),
        "without layer-wise fusion (last layer only)": ("clip1", ["--fusion", "last"]),
        "without regional saliency": ("clip1", ["--regions", "0"]),
        "without fusion and saliency (HLIP)": ("clip1", ["--fusion", "none"]),
    },
    "hsenet": {
        "stage 1": ("clip1", []),
        "stage 1, raw logit scale as published": ("clip1", ["--logit-scale", "raw"]),
        "stage 2": ("clip2", []),
        "stage 2 without relation loss": ("clip2", ["--relation", "0"]),
        "stage 2 without slice guidance": ("clip2", ["--no-guidance"]),
        "stage 1, trained on as long as stage 2": ("clip1", ["--init"]),
    },
    "mrg": {
        "both encoders, spatial packer, cues of places": ("mrg", []),
        "cues of labels": ("mrg", ["--cues", "labels"]),
        "no cues": ("mrg", ["--cues", "none"]),
        "both encoders, average pooling": ("mrg", ["--projector", "average_pool"]),
        "both encoders, sequence pooling": ("mrg", ["--projector", "sequence_pool"]),
        "stage-1 encoder alone, spatial packer": ("mrg", ["--vision", "stage1"]),
        "2E3 encoder alone, spatial packer": ("mrg", ["--vision", "2e3"]),
    },
}
NOTES = {
    "reaf": "The tiny encoder has two slice blocks and one scan block, so that fusion over layers acts on "
    "the slices alone.",
    "hsenet": "Slice features come from a small encoder that is not trained; the "
    "attention over slices has no positions, so that whether features follow a depth flip changes nothing "
    "here.",
    "mrg": "Encoders are trained on, projectors and a small decoder start from nothing. Two encoders give "
    "32 visual tokens, one 16.",
}
CHANCE = dict.fromkeys(("reaf", "hsenet"), f"By chance R@5 is {5 / TEST_SIZE:.3f} and AUROC 0.5.")
# Of a method the evaluations, with their flags, and the measures taken from their results.
EVALUATIONS = {
    **dict.fromkeys(("reaf", "hsenet"), {"retrieval": [], "zeroshot": ["--bootstrap", "0"]}),
    "mrg": {"mrg": []},
}
RETRIEVAL = {
    "R@5, report to volume": lambda r, z: r["report_to_volume"]["R@5"],
    "R@5, volume to report": lambda r, z: r["volume_to_report"]["R@5"],
    "R@50, mean of both": lambda r, z: (r["report_to_volume"]["R@50"] + r["volume_to_report"]["R@50"]) / 2,
    "zero-shot AUROC, mean of 18": lambda r, z: z["means"]["mean"]["auroc"],
}
REPORTS = {
    "findings, micro-F1": lambda m: m["clinical"]["micro"]["f1"],
    "findings, macro-F1": lambda m: m["clinical"]["macro"]["f1"],
    "BLEU-4, as published": lambda m: m["text"]["ngram_precision_4"],
    "ROUGE-L": lambda m: m["text"]["rougeL"],
    "sides agree": lambda m: m["places"]["side"]["agreement"],
    "lobes agree": lambda m: m["places"]["lobe"]["agreement"],
}
MEASURES = {"reaf": RETRIEVAL, "hsenet": RETRIEVAL, "mrg": REPORTS}


def run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def test_data(method: str) -> Path:
    """Patients that no choice was made on, in the recipe of the method's encoders for phantoms."""
    recipe = "hsenet" if method == "mrg" else method
    out = ROOT / f"data/ablation-{recipe}"
    if not (out / "manifest.json").is_file():
        # A training split is asked of the generator; its smallest is enough.
        run(
            "preprocess.py",
            "--dataset",
            "phantom",
            "--out",
            str(out),
            "--recipe",
            recipe,
            "--seed",
            str(TEST_SEED),
            "--train-size",
            "1",
            "--valid-size",
            str(TEST_SIZE),
            "--workers",
            "2",
        )
    return out


def make_slices(teacher: Path, data: Path) -> None:
    """Slice features of the phantoms, by the encoder that a first run of stage 2 trains, and of the test
    patients.
    """
    run(
        "train.py",
        "--stage",
        "clip2",
        "--init",
        str(teacher / "checkpoints/best"),
        "--out",
        str(teacher) + "-slices",
        "--max-steps",
        "1",
    )
    encoder = next(ROOT.glob("data/phantom/*/slice_encoder"))
    run(
        "preprocess.py",
        "--slices",
        str(encoder),
        "--slice-recipe",
        "phantom",
        "--out",
        str(data),
        "--workers",
        "2",
    )


def folder_of(method: str, name: str, seed: int) -> Path:
    return ROOT / f"runs/ablation/{method}" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{seed}"


def one(method: str, name: str, seed: int, data: Path) -> dict[str, float]:
    """Train and evaluate one variant with one seed; the measures by name."""
    folder, (stage, flags) = folder_of(method, name, seed), VARIANTS[method][name]
    family = "hsenet" if method == "mrg" else method
    stage_1, stage_2 = (folder_of(family, list(VARIANTS[family])[i], seed) for i in (0, 2))
    results = [folder / f"eval/{task}.json" for task in EVALUATIONS[method]]
    if not all(path.is_file() for path in results):
        # `best` is chosen on the validation split, of which nothing is reported here.
        stage_1, stage_2 = (folder / "checkpoints/best" for folder in (stage_1, stage_2))
        flags = [*flags, str(stage_1)] if flags[-1:] == ["--init"] else flags
        flags = [*flags, "--init", str(stage_1)] if stage == "clip2" or "stage1" in flags else flags
        flags = [*flags, "--init", str(stage_2)] if stage == "mrg" and "stage1" not in flags else flags
        again = ["--resume"] if (folder / "checkpoints/last").is_file() else []
        run(
            "train.py",
            "--stage",
            stage,
            "--model",
            family,
            "--seed",
            str(seed),
            "--out",
            str(folder),
            *flags,
            *again,
        )
        for task, more in EVALUATIONS[method].items():
            run(
                "evaluate.py",
                "--task",
                task,
                "--run",
                str(folder),
                "--checkpoint",
                "best",
                "--data",
                str(data),
                *more,
            )
    print(f"{name}, seed {seed}: done", flush=True)
    found = [json.loads(path.read_text()) for path in results]
    return {measure: read(*found) for measure, read in MEASURES[method].items()}


def table(method: str, found: dict[str, list[dict[str, float]]]) -> str:
    measures = MEASURES[method]
    lines = [f"| | {' | '.join(measures)} |", "| --- |" + " --- |" * len(measures)]
    for name, runs in found.items():
        cells = []
        for measure in measures:
            values = [r[measure] for r in runs]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def without_looking() -> str:
    """What findings score that are told without looking at the volume."""
    first = folder_of("mrg", next(iter(VARIANTS["mrg"])), 0)
    rows = json.loads((first / "eval/mrg.json").read_text())["baselines"]
    return (
        f"All findings for everyone have micro-F1 {rows['all_findings']['micro_f1']:.3f}, drawn ones "
        f"{rows['chance']['micro_f1']:.3f}."
    )


def write(method: str, text: str) -> None:
    """Put the text between the method's marks."""
    start, end = f"<!-- {method} ablation -->", f"<!-- end of {method} ablation -->"
    document = RESULTS.read_text() if RESULTS.is_file() else "# Results on phantoms\n"
    if start not in document:
        document += f"\n{start}\n{end}\n"
    before, rest = document.split(start)
    RESULTS.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=tuple(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    data = test_data(args.method)
    found = {name: [] for name in VARIANTS[args.method]}
    # Seed by seed, so that an interrupted run has every variant. The first variant of a seed starts the
    # others.
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in range(args.seeds):
            first, *others = found
            found[first].append(one(args.method, first, seed, data))
            if args.method == "hsenet" and seed == 0:
                make_slices(folder_of(args.method, first, seed), data)
            for name, measures in zip(
                others, pool.map(lambda n, s=seed: one(args.method, n, s, data), others), strict=True
            ):
                found[name].append(measures)
    seeds, spread = (
        (f"{args.seeds} seeds", ": mean (smallest to largest)") if args.seeds > 1 else ("One seed", "")
    )
    note = (
        f"{seeds} each, the default recipe on the built-in phantoms, evaluated on {TEST_SIZE} patients of "
        f"another seed{spread}. {CHANCE.get(args.method) or without_looking()} {NOTES[args.method]}\n"
    )
    text = f"{note}\n{table(args.method, found)}"
    write(args.method, text)
    print(text)


if __name__ == "__main__":
    main()
