"""Parts of gpu.py that train: runs that are stopped and resumed, gradient caching, DDP with one rank,
waits for the GPU.
"""

import collections
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

import train
from gpu import ROOT, Part, Report, Setting, inside_command
from gpu_speed import peak_memory, preset, reset_peak
from reaf_hsenet import distributed
from reaf_hsenet.config import RECIPES
from reaf_hsenet.data.bad_volumes import BadVolumes
from reaf_hsenet.data.loader import Batch
from reaf_hsenet.data.phantom.dataset import write_phantom_dataset
from reaf_hsenet.data.prepare import Options, prepare
from reaf_hsenet.data.slice_features import add_slice_features
from reaf_hsenet.data.sources.ct_rate import read_ct_rate
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.models.clip import DualEncoder, build_dual_encoder
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.presets import stage_config
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.train.contrastive import Contrastive, encode
from reaf_hsenet.train.job import Job
from reaf_hsenet.train.losses import _Gather
from reaf_hsenet.train.training_state import TrainingState
from reaf_hsenet.weights.slice_encoder import describe

STAGES = ("clip1", "clip2", "mrg")


def phantoms(setting: Setting) -> Path:
    """Prepared phantoms with slice features of an untrained encoder; made by the first part that asks."""
    if isinstance(sys.modules["nibabel"], MagicMock):
        raise ModuleNotFoundError("nibabel is not installed: name a folder of its wheel with --wheels")
    data = setting.work / "phantoms"
    if (data / "complete").exists():
        return data
    shutil.rmtree(data, ignore_errors=True)
    patients, size = ((12, 6), (16, 32, 32)) if setting.dry else ((64, 16), (32, 64, 64))
    workers = 1 if setting.dry else os.cpu_count()
    write_phantom_dataset(data / "raw", *patients, seed=3, shape=(24, 48, 48), workers=workers)
    recipe = replace(RECIPES["hsenet"], size=size)
    prepare(read_ct_rate(data / "raw"), data, Options(recipe), workers=workers, progress=False)
    slices = SliceEncoder(size=32, patch=16, width=24, depth=1, heads=2, mlp=48)
    add_slice_features(
        data, slices, describe(slices, "untrained", recipe="phantom"), workers=workers, progress=False
    )
    (data / "complete").touch()
    return data


def arguments(setting: Setting, stage: str, out: Path, steps: int, *more: str) -> list[str]:
    """A command line of train.py: a stage at the tiny preset, which starts from the stage before in the
    same folder.
    """
    before = {"clip2": ["--init", str(out.parent / "clip1")], "mrg": ["--init", str(out.parent / "clip2")]}
    smaller = ["--size", "16", "32", "32", "--patch", "8", "16", "16"] if setting.dry else []
    first = ["--preset", "hsenet-tiny", *smaller, "--data", str(phantoms(setting))]
    return [
        *("--stage", stage, *before.get(stage, first), "--out", str(out), "--device", setting.device),
        *("--batch-size", "4" if setting.dry else "16", "--max-steps", str(steps)),
        *("--log-every", "1", "--validate-every", "1"),
        *more,
    ]


def trained(argv: list[str], expected: int = 0) -> Path:
    """Run train.py's main in this process. Returns the run's folder."""
    code = train.main(argv)
    if code == 128 + signal.SIGTERM:
        raise SystemExit(code)  # the part's time is over
    if code != expected:
        raise RuntimeError(f"train.py ended with {code}, expected {expected}: {' '.join(argv)}")
    return Path(argv[argv.index("--out") + 1])


@contextlib.contextmanager
def stopping_at(step: int) -> Iterator[None]:
    """Send this process SIGUSR1 in the middle of a step, as a scheduler does before its end of time."""
    rate = train.learning_rate

    def and_signal(done, *rest):
        if done == step - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return rate(done, *rest)

    train.learning_rate = and_signal
    try:
        yield
    finally:
        train.learning_rate = rate


def difference(one: Path, two: Path) -> tuple[float, str]:
    """The largest absolute difference of the last weights of two runs, and in which tensor; 0 only bit
    for bit.
    """
    a, b = (load_file(Run(folder).pointer("last") / "model.safetensors") for folder in (one, two))
    if a.keys() != b.keys():
        raise RuntimeError(f"{one} and {two} have other tensors")
    gaps = {n: (a[n].double() - b[n].double()).abs().nan_to_num(torch.inf).max().item() for n in a}
    worst = max(gaps, key=gaps.get)
    return gaps[worst], worst


def train_and_resume(report: Report, setting: Setting) -> None:
    """Every stage whole, and stopped in the middle and resumed; of what differs, how much two whole runs
    do.
    """
    precision, steps = setting.part.removeprefix("train-"), 6 if setting.dry else 30
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic algorithms
    folder, inexact = setting.work / setting.part, []

    def run(stage: str, name: str = "") -> Path:
        out = folder / f"{stage}{name}"
        return trained(arguments(setting, stage, out, steps, "--precision", precision))

    def stopped_and_resumed(stage: str, name: str) -> Path:
        with stopping_at(steps // 2):
            out = folder / f"{stage}{name}"
            trained(
                arguments(setting, stage, out, steps, "--precision", precision), expected=128 + signal.SIGUSR1
            )
        return trained(
            ["--stage", stage, "--out", str(out), "--resume", "--log-every", "1", "--device", setting.device]
        )

    for stage in STAGES:
        with report.guard(f"{stage}, {precision}"):
            began = time.perf_counter()
            whole = run(stage)
            seconds = time.perf_counter() - began
            gap, where = difference(whole, stopped_and_resumed(stage, "-resumed"))
            losses = [record["loss"] for record in Run(whole).read_log() if "loss" in record]
            text = (
                f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {seconds:.0f} s; stopped at {steps // 2} "
                f"and resumed: "
            )
            text += "bit for bit" if gap == 0 else f"weights differ by up to {gap:.1e} ({where})"
            report.row(f"{stage}, {precision}, {steps} steps", text, losses=losses, gap=gap, seconds=seconds)
            if gap:
                inexact.append(stage)
    for stage in inexact:
        if report.left() > 15:
            with report.guard(f"{stage}, {precision}, two whole runs"):
                gap, where = difference(folder / stage, run(stage, "-again"))
                report.row(
                    f"{stage}, {precision}, two whole runs", f"differ by up to {gap:.1e} ({where})", gap=gap
                )
        if report.left() > 15:
            with report.guard(f"{stage}, {precision}, deterministic algorithms"), deterministic():
                one, two = run(stage, "-deterministic"), stopped_and_resumed(stage, "-deterministic-resumed")
                gap, where = difference(one, two)
                text = (
                    "resumed bit for bit"
                    if gap == 0
                    else f"resumed, weights differ by up to {gap:.1e} ({where})"
                )
                report.row(f"{stage}, {precision}, deterministic algorithms", text, gap=gap)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic algorithms, which raise where there is none."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def plain_model(setting: Setting) -> tuple[DualEncoder, Callable[[int], Batch]]:
    """hsenet-base without dropout (in two passes it would be drawn anew), and random batches of its
    inputs on the host.
    """
    config = preset(setting, "hsenet-base")
    config = replace(config, text=replace(config.text, dropout=0.0, attention_dropout=0.0))
    torch.manual_seed(0)
    model = build_dual_encoder(config)

    def batch(rows: int) -> Batch:
        torch.manual_seed(1)
        ids = torch.randint(5, config.text.vocab, (rows, config.max_text))
        return Batch(
            torch.rand(rows, 1, *config.vision.size),
            ids,
            torch.ones_like(ids),
            list(range(rows)),
            counts=[rows],
        )

    return model, batch


def a_step(
    setting: Setting, model: DualEncoder, ranks: Ranks, precision: str, grad_cache: int | None = None
) -> TrainingState:
    """The training loop's own step of stage 1, without its data set."""
    config = replace(
        stage_config("clip1", "hsenet", "hsenet-base"),
        precision=precision,
        grad_cache=grad_cache,
        clip_norm=None,
    )
    blocks = [*model.vision.blocks, *model.text.blocks]
    return TrainingState(
        Job(
            model,
            [],
            encode=encode,
            loss=Contrastive().loss,
            validate=None,
            blocks=blocks,
            bad=BadVolumes(0, ranks),
        ),
        config,
        ranks,
    )


def gradients(
    state: TrainingState, batch: Batch, device: torch.device
) -> tuple[dict[str, Tensor], int, float]:
    """(a step's gradients, peak bytes before them, median seconds) at a learning rate of 0, which changes
    no weight.
    """
    found, peaks, seconds = {}, [], []

    def keep(*_) -> None:
        peaks.append(peak_memory(device))
        found.update(
            {n: p.grad.detach().clone() for n, p in state.model.named_parameters() if p.grad is not None}
        )

    for i in range(4):
        hook = (
            state.optimizer.register_step_pre_hook(keep) if i == 1 else None
        )  # the first makes the optimizer's states
        reset_peak(device)
        began = time.perf_counter()
        train.train_step(state, [batch if state.config.grad_cache else batch.to(device)], i, 0.0, lambda: 0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        if hook:
            hook.remove()
    return found, peaks[0], median(seconds[2:])


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """The largest ||a - b|| / ||a|| of two sets of gradients, and whose."""
    gaps = {n: ((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-30)).item() for n in a}
    worst = max(gaps, key=gaps.get)
    return gaps[worst], worst


def grad_cache(report: Report, setting: Setting) -> None:
    """A step in one pass and in chunks: the same gradients, other memory."""
    device, ranks = torch.device(setting.device), Ranks(0, 1, torch.device(setting.device))
    model, batch = plain_model(setting)
    rows, chunk = (4, 2) if setting.dry else (16, 4)
    for precision in ("fp32", "bf16"):
        with report.guard(precision):
            whole, peak, seconds = gradients(a_step(setting, model, ranks, precision), batch(rows), device)
            cached, low, longer = gradients(
                a_step(setting, model, ranks, precision, chunk), batch(rows), device
            )
            gap, name = apart(whole, cached)
            text = f"gradients {gap:.1e} apart at most ({name}), {longer / seconds:.2f} x the time"
            text += f", {low / 1e9:.1f} GB for {peak / 1e9:.1f}" if peak else ""
            numbers = {
                "gap": gap,
                "bytes": low,
                "whole_bytes": peak,
                "seconds": longer,
                "whole_seconds": seconds,
            }
            report.row(f"{precision}, batch {rows} in chunks of {chunk}", text, **numbers)


def ddp(report: Report, setting: Setting) -> None:
    """Start ddp_rank through torchrun, as one rank of nccl (gloo without a GPU)."""
    inner = inside_command(Part("ddp", "gpu_training:ddp_rank", 0), setting, report.file, report.until)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", *inner]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        report.row("torchrun", f"failed: exit code {code}", failed=True)


def ddp_rank(report: Report, setting: Setting) -> None:
    """A step under DDP beside one without it, and every collective that training uses."""
    device = torch.device(setting.device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    model, batch = plain_model(setting)
    rows = 4 if setting.dry else 16
    plain, _, alone = gradients(a_step(setting, model, Ranks(0, 1, device), "bf16"), batch(rows), device)
    # Two ranks by name, since TrainingState wraps no model of one; the group has one all the same.
    state = a_step(setting, model, Ranks(0, 2, device), "bf16")
    reduced, _, together = gradients(state, batch(rows), device)
    gap, name = apart(plain, reduced)
    text = (
        f"{type(state.ddp).__name__}: gradients "
        f"{'the same bits' if gap == 0 else f'{gap:.1e} apart ({name})'}"
    )
    report.row(
        f"{backend}, 1 rank, bf16, batch {rows}",
        f"{text}, {together / alone:.2f} x the time of a step without",
        gap=gap,
    )
    with report.guard("collectives"):
        x = torch.randn(3, 4, device=device, requires_grad=True)
        same = [
            torch.equal(_Gather.apply(x, [3]), x),
            torch.equal(distributed.gather_equal(x)[0], x),
            torch.equal(distributed.mean_over_ranks(x.detach()), x),
            distributed.gather_objects({"a": 1}) == [{"a": 1}],
            distributed.on_main(lambda: 5) == 5,
        ]
        distributed.barrier()
        report.row("collectives", f"{sum(same)} of {len(same)} give back what went in", failed=not all(same))
    distributed.stop()


class HostReads(TorchFunctionMode):
    """Without a GPU: calls `seen` at every function that would wait for one, since its result is a number
    or a size.
    """

    NAMES = (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "nonzero",
        "masked_select",
        "equal",
        "unique",
    )

    def __init__(self, seen: Callable[[], None]):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        masked = (
            function is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
        )
        if masked or getattr(function, "__name__", "") in self.NAMES:
            self.seen()
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_waits(device: torch.device, places: collections.Counter) -> Iterator[None]:
    """Count the places of the package that wait for the GPU; without one, those that would."""

    def seen(message="", *_, **__) -> None:
        if message and "synchroniz" not in str(message):
            return  # another warning
        frames = traceback.extract_stack()
        own = [f for f in frames if "/reaf_hsenet/" in f.filename]
        # The optimizer counts its steps, and a loader its workers, in tensors of the host.
        if device.type == "cuda" or not any(
            "/torch/optim/" in f.filename or "/torch/utils/data/" in f.filename for f in frames
        ):
            places[f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "elsewhere"] += 1

    if device.type != "cuda":
        with HostReads(seen):
            yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = seen
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits(report: Report, setting: Setting) -> None:
    """Where the training loop waits for the GPU, from one step to a later one. Once a step it is meant
    to: the loss and the gradients' norm decide what is done next.
    """
    device, first, steps = torch.device(setting.device), 2, 6
    call = train.train_step
    for stage in STAGES:
        places = collections.Counter()
        with contextlib.ExitStack() as watching, report.guard(stage):

            def watched(state, group, step, *rest, places=places, watching=watching):
                if step == first:  # before, kernels are chosen and states made
                    watching.enter_context(host_waits(device, places))
                done = call(state, group, step, *rest)
                if step == steps - 1:
                    watching.close()
                return done

            train.train_step = watched
            precision = "fp32" if setting.dry else "bf16"
            more = ("--precision", precision, "--log-every", "100")
            trained(arguments(setting, stage, setting.work / "waits" / stage, steps, *more))
            mean = {place: n / (steps - first) for place, n in sorted(places.items())}
            listed = ", ".join(f"{place} ({n:g})" for place, n in mean.items())
            what = "waits" if device.type == "cuda" else "values read"  # the host's own too
            report.row(f"{stage}, {what} a step", f"{sum(mean.values()):g}: {listed}", places=mean)
        train.train_step = call
