"""Parts of gpu.py: the tests that need a GPU, and the published implementations' expected numbers
computed on one.
"""

import importlib.util
import json
import math
import re
import statistics
import subprocess
import sys

import torch

from gpu import ROOT, Report, Setting

# Modules of the cases that have nothing to compute on a GPU: hashes, words, tables, files.
ON_THE_HOST = ("fill", "mae_inflation", "tokenizers", "llm_inputs", "preprocess", "metrics", "porter")


def tests(report: Report, setting: Setting) -> None:
    """Run the tests that are marked `gpu`; without a GPU they skip, and say so."""
    if importlib.util.find_spec("pytest") is None:
        report.row("pytest", "is not installed: name a folder of its wheels with --wheels", failed=True)
        return
    files = [
        file for file in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in file.read_text()
    ]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rA", "--tb=short", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (.+)$", done.stdout, re.MULTILINE)
    for outcome, name in outcomes:
        skipped = re.match(r"\[(\d+)\] \S+: (.*)", name)
        what = f"{skipped[1]} tests" if skipped else name.rpartition("::")[2][:80]
        result = f"skipped: {skipped[2]}" if skipped else outcome.lower()
        report.row(what, result, failed=outcome in ("FAILED", "ERROR"))
    if not outcomes:
        report.row("pytest", f"exit code {done.returncode}, no test ran", failed=True)


def parity(report: Report, setting: Setting) -> None:
    """Compute every golden case with its tensors on the device, in float32 without TF32 and with autocast
    to bf16.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    import parity as cases
    import parity_case

    device = torch.device(setting.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # The checks make their tensors with these three; modules are made where torch.device says.
    from_numpy, load_file, numpy = torch.from_numpy, parity_case.load_file, torch.Tensor.numpy
    torch.from_numpy = lambda array: from_numpy(array).to(device)
    parity_case.load_file = cases.load_file = lambda path: load_file(path, device=str(device))
    torch.Tensor.numpy = lambda tensor, **options: numpy(tensor.detach().cpu(), **options)
    folders = [ROOT / "tests/golden", *([setting.parity] if setting.parity else [])]
    for folder in folders:
        values = {path: json.loads(path.read_text()) for path in cases.case_files(folder)}
        chosen = [
            p for p, v in values.items() if v["module"] in cases.CHECKS and v["module"] not in ON_THE_HOST
        ]
        if setting.dry:  # of every module the smallest case, unless it takes a processor long
            sizes = {p: sum(map(math.prod, values[p].get("weights", {}).values())) for p in chosen}
            chosen = list(
                {values[p]["module"]: p for p in sorted(chosen, key=sizes.get, reverse=True)}.values()
            )
            chosen = [p for p in chosen if sizes[p] < 5e6]
        for precision in ("float32", "bf16"):
            checked = {}
            for path in chosen:
                if report.left() < 10:
                    report.row(
                        f"{folder.name}, {precision}",
                        f"the time was over after {len(checked)} of {len(chosen)} cases",
                    )
                    break
                with report.guard(f"{precision}, {path.stem}"), device:
                    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                        case = parity_case.Case(path, folder)
                        checked[path.stem] = list(cases.CHECKS[case.module](case))
            summary(report, f"{folder.name}, {precision}", precision, checked)


def summary(report: Report, what: str, precision: str, checked: dict[str, list]) -> None:
    """Rows of one precision. Ratios: errors in units of what is allowed in float32 on a processor."""
    if precision == "bf16":  # autocast leaves float64 as it is
        checked = {
            case: [c for c in checks if not c.name.endswith("__f64")] for case, checks in checked.items()
        }
    every = [(case, check) for case, checks in checked.items() for check in checks]
    finite = [(case, check) for case, check in every if math.isfinite(check.ratio)]
    if not finite:
        return
    case, worst = max(finite, key=lambda pair: pair[1].ratio)
    passed = sum(all(check.ratio <= 1 for check in checks) for checks in checked.values())
    middle = statistics.median(check.ratio for _, check in finite)
    listed = [
        {"case": c, "check": k.name, "error": k.error, "allowed": k.allowed}
        for c, k in every
        if not k.ratio <= 1
    ]
    listed = [{**row, "error": row["error"] if math.isfinite(row["error"]) else None} for row in listed]
    result = f"{passed} of {len(checked)} cases within float32's tolerance on a processor"
    result += f"; error median {middle:.2g} x, most {worst.ratio:.2g} x of it ({case}, {worst.name})"
    if len(finite) < len(every):
        result += f"; not equal or not finite: {len(every) - len(finite)}"
    report.row(what, result, passed=passed, cases=len(checked), median=middle, most=worst.ratio, above=listed)
