"""Everything that only a GPU can tell, in one table: what is right, how fast, how large, whether a run
resumes exactly.

    python benchmarks/gpu.py [--out DIR] [--parts a,b] [--minutes 8] [--wheels DIR] [--parity DIR]
    python benchmarks/gpu.py --dry          # tiny sizes on a processor, the same code

Every part runs in a process of its own with a limit of seconds; what a part leaves of its time is the next
one's. A part that fails, hangs or dies is a line of the table, and the others go on. Rows are in DIR/gpu.json
as soon as they are measured, what the parts print is in DIR/gpu.log. docs/speed.md says what every line
means.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

ROOT = Path(__file__).parent.parent
ENDING = 4  # seconds that a part has to end after SIGTERM
DRY = 4  # a processor's limits are so many times as long


@dataclass(frozen=True)
class Part:
    """function: `module:name`, called with a Report and the Setting. seconds: its limit, longer where
    others left time.
    """

    name: str
    function: str
    seconds: int


PARTS = (  # by worth
    Part("machine", "gpu_speed:machine", 15),
    Part("tests", "gpu_correctness:tests", 25),
    Part("parity", "gpu_correctness:parity", 40),
    Part("hsenet-base", "gpu_speed:encoder", 70),
    Part("reaf-base", "gpu_speed:encoder", 70),
    Part("phi-4-mini", "gpu_speed:language", 100),
    Part("train-bf16", "gpu_training:train_and_resume", 45),
    Part("train-fp16", "gpu_training:train_and_resume", 40),
    Part("grad-cache", "gpu_training:grad_cache", 15),
    Part("ddp", "gpu_training:ddp", 20),
    Part("waits", "gpu_training:waits", 20),
)


@dataclass(frozen=True)
class Setting:
    """part: the running part's name. device: cuda or cpu. dry: tiny sizes. work: a folder of files that parts
    share.
    parity: one of more cases, or nothing."""

    part: str
    device: str
    dry: bool
    work: Path
    parity: Path | None

    def __post_init__(self):  # from JSON the folders come as text
        object.__setattr__(self, "work", Path(self.work))
        object.__setattr__(self, "parity", Path(self.parity) if self.parity else None)


class Report:
    """Rows of a part, each a line of a file as soon as it is measured. until: when the part is stopped
    (time.time).
    """

    def __init__(self, part: str, file: Path, until: float):
        self.part, self.file, self.until = part, file, until

    def row(self, what: str, result: str, **numbers) -> None:
        """Note what was measured: `what` and `result` stand in the table, numbers beside them in gpu.json."""
        print(f"{self.part}: {what}: {result}", flush=True)
        with open(self.file, "a") as file:
            file.write(json.dumps({"part": self.part, "what": what, "result": result, **numbers}) + "\n")

    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.until - time.time()

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Make a row of an error, so that what comes after it is measured all the same."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.row(what, reason(error), failed=True)
        free_memory()


def reason(error: BaseException) -> str:
    """An error in a few words."""
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory"
    line = next(iter(str(error).strip().splitlines()), "")
    return f"failed: {type(error).__name__}: {line}"[:150]


def free_memory() -> None:
    """Give back what an error, or what was measured before, has left on the GPU."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def inside_command(part: Part, setting: Setting, rows: Path, until: float) -> list[str]:
    """Arguments of this script with which it runs one part in a process of its own."""
    values = {"function": part.function, "rows": str(rows), "until": until, "setting": vars(setting)}
    return [str(Path(__file__)), "--inside", json.dumps(values, default=str)]


def inside(text: str) -> int:
    """Run one part in this process, as inside_command says."""
    if importlib.util.find_spec("nibabel") is None:  # all but the phantoms need no more of it than its names
        sys.modules["nibabel"] = sys.modules["nibabel.orientations"] = MagicMock()
    values = json.loads(text)
    setting = Setting(**values["setting"])
    report = Report(setting.part, Path(values["rows"]), values["until"])
    signal.alarm(round(report.left() + 2 * ENDING))  # where whoever should stop this part has ended first
    module, name = values["function"].split(":")
    with report.guard(setting.part):
        getattr(importlib.import_module(module), name)(report, setting)
    return 0


def run_part(part: Part, setting: Setting, log: Path, seconds: float, seen) -> tuple[str, list[dict]]:
    """(how it ended, its rows) of a part in a process of its own. seen: called with the rows while it
    runs.
    """
    rows = setting.work / f"{part.name}.jsonl"
    command = [
        sys.executable,
        *inside_command(part, replace(setting, part=part.name), rows, time.time() + seconds),
    ]
    end = time.monotonic() + seconds
    with open(log, "ab") as output:
        output.write(f"\n=== {part.name}\n".encode())
        output.flush()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        while child.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
            seen(rows=read_rows(rows))
        ended = "done"
        if child.poll() is None:
            ended = f"stopped at its limit of {seconds:.0f} s"
        elif child.returncode:
            ended = f"died with exit code {child.returncode}"
        stop(child)
    return ended, read_rows(rows)


def stop(child: subprocess.Popen) -> None:
    """End a process and what it has started, of which some may be left; torchrun ends its ranks when it
    is asked to.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(child.pid, number)
            child.wait(ENDING)


def read_rows(file: Path) -> list[dict]:
    """The whole lines of a part's file; the last may be half written."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def run_parts(parts: tuple[Part, ...], setting: Setting, out: Path, seconds: float, head: dict) -> list[dict]:
    """Run the parts in turn within `seconds`; write gpu.json after every row. Returns a record a part."""
    deadline, records = time.monotonic() + seconds, []

    def save(**record) -> None:
        results = {**head, "parts": [*records, *([record] if record else [])]}
        temporary = out / "gpu.json.tmp"
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(out / "gpu.json")

    for i, part in enumerate(parts):
        later = sum(other.seconds for other in parts[i + 1 :])
        began = time.monotonic()
        # Late already: of what is left each has its share.
        limit = max(deadline - began - later, (deadline - began) * part.seconds / (part.seconds + later))
        record = {"part": part.name, "ended": "not reached: the time was used up", "seconds": 0.0, "rows": []}
        if limit > 3:
            seen = partial(save, part=part.name, ended="running", seconds=limit)
            record["ended"], record["rows"] = run_part(part, setting, out / "gpu.log", limit, seen)
            record["seconds"] = time.monotonic() - began
        records.append(record)
        save()
        print(
            f"{part.name}: {record['ended']}, {record['seconds']:.0f} s, {len(record['rows'])} rows",
            flush=True,
        )
    return records


def table(records: list[dict]) -> str:
    """The rows of all parts, aligned."""
    lines = [("part", "what", "result")]
    for record in records:
        name = record["part"]
        for row in record["rows"]:
            lines.append((name, row["what"], row["result"]))
            name = ""
        lines.append((name, f"({record['seconds']:.0f} s)", record["ended"]))
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in lines)


def unpack_wheels(folder: Path, target: Path) -> list[str]:
    """Unpack those pure wheels of `folder` whose package is not installed. Returns their names."""
    used = [
        w
        for w in sorted(folder.glob("*.whl"))
        if importlib.util.find_spec(w.name.split("-")[0].lower()) is None
    ]
    for wheel in used:
        zipfile.ZipFile(wheel).extractall(target)
    return [wheel.name for wheel in used]


def chosen(text: str) -> tuple[Part, ...]:
    """The parts of --parts, in the order of PARTS."""
    names, known = text.split(","), [part.name for part in PARTS]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return tuple(part for part in PARTS if part.name in names)


def main(argv: list[str]) -> int:
    if argv[:1] == ["--inside"]:
        return inside(argv[1])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT", "gpu")),
        help="folder of gpu.json and gpu.log (default: $OUT, or gpu)",
    )
    add(
        "--parts",
        type=chosen,
        default=PARTS,
        metavar="A,B",
        help=f"of {', '.join(part.name for part in PARTS)} (default: all)",
    )
    add("--minutes", type=float, help=f"for everything (default: 8, dry {8 * DRY})")
    add(
        "--wheels",
        type=Path,
        help="folder of pure wheels, used for what is not installed here (nibabel, pytest)",
    )
    add("--parity", type=Path, help="folder of more cases for the part parity")
    add("--dry", action="store_true", help="tiny sizes on a processor")
    args = parser.parse_args(argv)
    started = time.monotonic()
    if args.wheels and not args.wheels.is_dir():
        parser.error(f"--wheels {args.wheels}: no such folder")
    if not args.dry:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no GPU here; --dry runs everything at tiny sizes on a processor")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.log").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheels = unpack_wheels(args.wheels, work / "wheels") if args.wheels else []
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(
                None,
                [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH"), str(work / "wheels")],
            )
        )
        commit = subprocess.getoutput(f"git -C '{ROOT}' rev-parse --short HEAD")
        head = {
            "dry": args.dry,
            "commit": commit,
            "began": time.strftime("%Y-%m-%d %H:%M:%S"),
            "wheels": wheels,
        }
        setting = Setting(
            "", "cpu" if args.dry else "cuda", args.dry, work, args.parity and args.parity.resolve()
        )
        seconds = 60 * (args.minutes or 8 * (DRY if args.dry else 1)) - (time.monotonic() - started)
        parts = (
            tuple(replace(part, seconds=DRY * part.seconds) for part in args.parts)
            if args.dry
            else args.parts
        )
        records = run_parts(parts, setting, args.out, seconds, head)
    print(
        f"\n{table(records)}\n\n{args.out / 'gpu.json'}"
        + (", dry: tiny sizes on a processor" if args.dry else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
