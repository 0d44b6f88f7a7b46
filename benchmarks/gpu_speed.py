"""Parts of gpu.py: what the machine can do, an encoder's forward and backward pass, and a decoder that
writes.

Medians of CUDA events after a warm-up, on random data: a product of zeros runs faster than one of numbers.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from types import MethodType

import torch
from torch import Tensor, nn

import decoder as decoders
import sizing
from gpu import Report, Setting, free_memory, reason
from reaf_hsenet.config import ClipConfig
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.layers import Attention
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.train.step_log import peak_flops

PACKAGES = ("numpy", "nibabel", "transformers", "pytest")
COMPILED = (16, 64, 4, 1)  # batches that are compiled, in this order, as far as they fit and there is time


def timed(work: Callable[[], object], device: torch.device, seconds: float = 1.0, least: int = 3) -> float:
    """Median seconds of `work`, repeated for about `seconds` after a warm-up that also wakes the clocks."""

    def once() -> float:
        if device.type != "cuda":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3

    once()
    repeats = max(least, min(300, int(seconds / max(once(), 1e-6))))
    for _ in range(repeats // 4):
        once()
    return statistics.median(once() for _ in range(repeats))


def ceilings(setting: Setting) -> tuple[float, float]:
    """(bytes/s of a large copy, read and written; FLOP/s of a large bf16 product), both measured."""
    device = torch.device(setting.device)
    size, n = (2**25, 1024) if setting.dry else (2**31, 8192)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / timed(lambda: target.copy_(source), device, 0.2 if setting.dry else 1.0)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return copied, 2 * n**3 / timed(lambda: a @ b, device, 0.2 if setting.dry else 1.0)


def machine(report: Report, setting: Setting) -> None:
    """Rows of the software, the card, and its two ceilings."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    report.row("software", ", ".join(f"{name} {number}" for name, number in found.items()), **found)
    if setting.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        report.row(
            "card",
            f"{card.name}, {card.total_memory / 1e9:.1f} GB, CUDA {torch.version.cuda}, compute "
            f"{card.major}.{card.minor}",
        )
    else:
        report.row("card", f"none, {torch.get_num_threads()} threads of a processor")
    copied, products = ceilings(setting)
    report.row("copy, read and written", f"{copied / 1e9:,.0f} GB/s", bytes_per_s=copied)
    report.row("bf16 product", f"{products / 1e12:,.3g} TFLOP/s", flops_per_s=products)


def sab_attention(self: Attention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention without the fused kernel: the whole matrix of scores, as monai's SABlock computes it."""
    q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (torch.einsum("blxd,blyd->blxy", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return self.proj(torch.einsum("bhxy,bhyd->bhxd", scores, v).transpose(1, 2).flatten(2))


def preset(setting: Setting, name: str) -> ClipConfig:
    """A base preset; dry, one of its shape that a processor computes in no time."""
    if not setting.dry:
        return PRESETS[name]
    tiny = PRESETS[name.replace("base", "tiny")]
    text = replace(tiny.text, vocab=500, width=64, heads=2, mlp=128)
    vision = replace(tiny.vision, size=(16, 32, 32), patch=(8, 16, 16))
    return replace(tiny, vision=vision, text=text, max_text=32)


def encoder(report: Report, setting: Setting) -> None:
    """Forward and backward of a dual encoder in bf16: fused and plain attention, checkpointed, compiled."""
    device = torch.device(setting.device)
    config = preset(setting, setting.part)
    case = sizing.contrastive(setting.part, "clip1", config)
    sizes = sizing.count(case)
    peak = peak_flops(device, torch.bfloat16) or ceilings(setting)[1]
    model = case.build().to(device).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0)
    blocks = [*model.vision.blocks, *model.text.blocks]

    def measure(form: str, batch: int) -> float:
        """Seconds of a step, with a row of it. Raises where it does not fit."""
        volume = torch.rand(batch, 1, *config.vision.size, device=device)
        ids = torch.randint(5, config.text.vocab, (batch, config.max_text), device=device)
        wanted = torch.randn(2, batch, config.embed, device=device)

        def step(update: bool = False) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                image, text, _ = model(volume, ids, torch.ones_like(ids))
            # Like the contrastive loss in cost, but with gradients that are not 0 at batch 1.
            (torch.stack((image.float(), text.float())) * wanted).sum().backward()
            if update:  # once: the optimizer's states count in the memory of every later step
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step(update=True)
        reset_peak(device)
        seconds = timed(step, device, 0.1 if setting.dry else 0.5)
        checkpointed = "checkpoint" in form
        numbers = {
            "batch": batch,
            "seconds": seconds,
            "samples_per_s": batch / seconds,
            "mfu": batch * sizes.flops / seconds / peak,
            "bytes": peak_memory(device),
            "predicted_bytes": sizes.memory(batch, "bf16", checkpointed, 1),
        }
        held = f"{numbers['bytes'] / 1e9:.1f} GB" if numbers["bytes"] else "memory not measured"
        text = f"{batch / seconds:,.1f} samples/s, {1e3 * seconds:,.1f} ms, MFU {numbers['mfu']:.1%}, {held}"
        if form in ("eager", "grad-checkpoint"):  # what docs/clusters.md counts
            text += f", predicted {numbers['predicted_bytes'] / 1e9:.{3 if setting.dry else 1}f} GB"
        report.row(f"{form}, batch {batch}", text, form=form, **numbers)
        return seconds

    def doubling(form: str) -> int:
        """Measure batches 1, 2, 4, ... to the largest that fits, or whose step is slow; returns it."""
        fitted, batch = 0, 1
        while report.left() > 5 and not (setting.dry and batch > 2):
            try:
                seconds = measure(form, batch)
            except Exception as error:
                report.row(
                    f"{form}, batch {batch}",
                    reason(error),
                    form=form,
                    batch=batch,
                    failed=reason(error) != "out of memory",
                )
                break
            finally:
                optimizer.zero_grad(set_to_none=True)
            fitted, batch = batch, 2 * batch
            free_memory()
            if seconds > 1.5:
                report.row(
                    f"{form}, batch {batch}",
                    "not tried: a step of half of it takes more than 1.5 s",
                    form=form,
                )
                break
        free_memory()
        return fitted

    largest = doubling("eager")
    case.checkpoint(model, True)
    checkpointed_largest = doubling("grad-checkpoint")
    case.checkpoint(model, False)
    with whole_scores(model.vision.blocks):
        doubling("plain attention")
    for block in blocks:
        block.compile()
    forms = (("compiled", largest), ("compiled, grad-checkpoint", checkpointed_largest))
    for form, most in forms[:1] if setting.dry else forms:
        case.checkpoint(model, "checkpoint" in form)
        for batch in (2,) if setting.dry else COMPILED:
            if batch <= most and report.left() > 15:
                torch._dynamo.reset()  # training has one size: no other may make this one's code general
                with report.guard(f"{form}, batch {batch}"):
                    measure(form, batch)


@contextmanager
def whole_scores(blocks: nn.ModuleList) -> Iterator[None]:
    """Give the blocks sab_attention, for as long as this context lasts."""
    for block in blocks:
        block.attn.forward = MethodType(sab_attention, block.attn)
    try:
        yield
    finally:
        for block in blocks:
            del block.attn.forward


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes at most since reset_peak; 0 without a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def language(report: Report, setting: Setting) -> None:
    """Phi-4-mini's shapes with random bf16 weights: prefill and decoding, eager and compiled, and
    transformers beside it.
    """
    device = torch.device(setting.device)
    prompt, new = (12, 6) if setting.dry else (300, 128)
    config = (
        decoders.phi4mini(512, 64, 2, heads=4, kv_heads=2, mlp=128)
        if setting.dry
        else decoders.PRESETS["phi-4-mini"]
    )
    copied, products = ceilings(setting)
    ours = in_bf16(lambda: Decoder(config), device)
    matrices = sum(
        p.numel() for n, p in ours.named_parameters() if p.dim() == 2 and n != "embed_tokens.weight"
    )
    weights = sum(p.nbytes for p in ours.parameters())
    report.row("weights", f"{weights / 1e6:,.1f} MB in bf16, which every token reads", bytes=weights)

    def rows(
        name: str, batch: int, run: Callable[[Tensor], tuple[float, float, list]], prefilled: bool = True
    ) -> None:
        ids = torch.randint(1, config.vocab, (batch, prompt), device=device)
        began = time.perf_counter()
        run(ids)
        first = time.perf_counter() - began
        found = [run(ids)[:2] for _ in range(3)]
        prefill, decode = (statistics.median(times) for times in zip(*found, strict=True))
        # Prefill: all products of the prompt. A token: all weights, and the keys and values so far.
        cached = 2 * 2 * config.layers * config.kv_heads * config.head_dim * (prompt + new / 2) * batch
        floors = 2 * matrices * batch * prompt / products, new * (weights + cached) / copied
        if prefilled:
            text = (
                f"{1e3 * prefill:,.1f} ms, {batch * prompt / prefill:,.0f} tokens/s, "
                f"{floors[0] / prefill:.1%} of the product's rate"
            )
            report.row(f"{name}, batch {batch}, prefill {prompt}", text, seconds=prefill, floor=floors[0])
        text = (
            f"{batch * new / decode:,.1f} tokens/s, {1e3 * decode / new:,.2f} ms a step, "
            f"{floors[1] / decode:.1%} of the copy's rate"
        )
        if not prefilled:
            skipped = (
                torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] if device.type == "cuda" else 0
            )
            text += f"; compiled in {first - prefill - decode:,.0f} s" + (
                ", CUDA graphs skipped" if skipped else ""
            )
        report.row(f"{name}, batch {batch}, decode {new}", text, seconds=decode, floor=floors[1], first=first)

    batches = (1, 2) if setting.dry else (1, 8)
    for batch in batches:
        with report.guard(f"eager, batch {batch}"):
            rows("eager", batch, lambda ids: decoders.ours(ours, ids, False, new))
    for batch in batches[:1]:
        with report.guard(f"compiled, batch {batch}"):
            rows("compiled", batch, lambda ids: decoders.ours(ours, ids, True, new), prefilled=False)
    with report.guard("transformers"):
        try:
            from transformers import Phi3Config, Phi3ForCausalLM
        except ImportError:
            report.row("transformers", "is not installed")
        else:
            theirs = in_bf16(lambda: Phi3ForCausalLM(Phi3Config(**config.to_json("bfloat16"))), device)
            for batch in batches:
                rows("transformers", batch, lambda ids: decoders.theirs(theirs, ids, new))
    for batch in () if setting.dry else batches[1:]:
        with report.guard(f"compiled, batch {batch}"):
            rows("compiled", batch, lambda ids: decoders.ours(ours, ids, True, new), prefilled=False)


def in_bf16(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Make a module on the device in bf16: one of 3.8 B parameters is never in float32, nor on the host."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return build().eval()
    finally:
        torch.set_default_dtype(usual)
