"""Decoder against transformers' Phi3ForCausalLM: prefill of 300 tokens, decoding of 64, in one process, in
turn.

    pip install -r requirements-bench.txt && python benchmarks/decoder.py [--device cuda] [--compile]
    [--preset ...]

About 100M random parameters in Phi-4-mini's shape (--preset phi-4-mini: its real sizes, in bf16 on a GPU).
Both have the same weights and must choose the same tokens in float32. Beside the times stands what the
hardware allows, measured in the same run: decoding cannot be faster than reading all weights once a token,
prefill not faster than its products.
"""

import argparse
import statistics
import tempfile
import time

import torch
from torch import nn

from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import DecoderConfig, RopeConfig
from reaf_hsenet.models.int8 import quantise_decoder
from reaf_hsenet.models.packed import PackedLinear, pack
from reaf_hsenet.runs.generation import steps
from reaf_hsenet.weights.decoder import save_decoder

PROMPT, NEW = 300, 64


def phi4mini(vocab: int, width: int, layers: int, heads: int, kv_heads: int, mlp: int) -> DecoderConfig:
    half = int(width // heads * 0.75) // 2
    rope = RopeConfig(
        dims=2 * half,
        kind="longrope",
        original=4096,
        context=131072,
        short_factor=(1.0,) * half,
        long_factor=tuple(1.0 + i for i in range(half)),
    )
    return DecoderConfig(
        "phi3",
        vocab,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        mlp=mlp,
        context=131072,
        rope=rope,
        tied=True,
        pad_id=0,
    )


PRESETS = {
    "small": phi4mini(32064, 768, 12, heads=12, kv_heads=4, mlp=2048),
    "phi-4-mini": phi4mini(200064, 3072, 32, heads=24, kv_heads=8, mlp=8192),
}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work, device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def ours(decoder: Decoder, ids: torch.Tensor, compiled: bool, new: int = NEW) -> tuple[float, float, list]:
    """(seconds of the prefill, of the `new` later tokens, the tokens)."""
    made = steps(decoder, ids=ids, new_tokens=new + 1, compiled=compiled)
    tokens = []
    prefill = seconds(lambda: tokens.append(next(made)[0]), ids.device)
    return (
        prefill,
        seconds(lambda: tokens.extend(t for t, _ in made), ids.device),
        torch.stack(tokens, 1).tolist(),
    )


@torch.inference_mode()
def theirs(model, ids: torch.Tensor, new: int = NEW) -> tuple[float, float, list]:
    """The same with transformers' model and its cache, in a bare loop, which is faster than its
    generate().
    """
    from transformers import DynamicCache

    cache, tokens = DynamicCache(config=model.config), []

    def step(x):
        logits = model(input_ids=x, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens.append(logits[:, -1].argmax(-1))

    prefill = seconds(lambda: step(ids), ids.device)
    decode = seconds(lambda: [step(tokens[-1][:, None]) for _ in range(new)], ids.device)
    return prefill, decode, torch.stack(tokens, 1).tolist()


@torch.inference_mode()
def bandwidth(device: torch.device) -> float:
    """Bytes a second at which a product with one row reads a matrix far larger than any cache: the best
    of several.
    """
    matrix = nn.Linear(8192, 16384, bias=False, device=device, dtype=torch.bfloat16)
    row, size = torch.ones(1, 8192, dtype=torch.bfloat16, device=device), matrix.weight.nbytes
    product = PackedLinear(matrix.weight) if device.type == "cpu" else matrix
    return size / min(seconds(lambda: product(row), device) for _ in range(8))


def products(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product: the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(6))


def compare(
    config: DecoderConfig, dtype: torch.dtype, batch: int, args, device: torch.device, int8: bool
) -> None:
    torch.manual_seed(0)
    decoder = Decoder(config).to(device, dtype).eval()
    ids = torch.randint(1, config.vocab, (batch, PROMPT), device=device)
    reference = None
    if not args.alone and not int8:
        from transformers import Phi3ForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            save_decoder(decoder, folder)
            reference = Phi3ForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    size = sum(p.nbytes for p in decoder.parameters())
    if int8:
        quantise_decoder(decoder)
        size = sum(t.nbytes for t in (*decoder.parameters(), *decoder.buffers()))
    used = sum(
        p.numel() for n, p in decoder.named_parameters() if p.dim() == 2 and n != "embed_tokens.weight"
    )
    if device.type == "cpu":
        pack(decoder)
    runs = []
    for _ in range(args.pairs + 1):  # the first is a warm-up
        own = ours(decoder, ids, args.compile)
        other = theirs(reference, ids) if reference else None
        runs.append((own, other))
        if reference and dtype == torch.float32 and own[2] != other[2]:
            raise SystemExit("the two chose different tokens")
    runs = runs[1:]
    speed, peak = bandwidth(device), products(device, dtype)
    name = f"{'int8, ' if int8 else ''}{str(dtype).split('.')[1]}, batch {batch}"
    limits = (2 * used * batch * PROMPT / peak, NEW * size / speed)
    for part, label, limit in ((0, f"prefill {PROMPT}", limits[0]), (1, f"decode {NEW}", limits[1])):
        own = [a[part] for a, _ in runs]
        line = (
            f"{name}, {label}: {1e3 * statistics.median(own):.0f} ms, {limit / statistics.median(own):.0%} "
            "of the limit"
        )
        if reference:
            other, ratios = [b[part] for _, b in runs], [b[part] / a[part] for a, b in runs]
            line += (
                f"; transformers {1e3 * statistics.median(other):.0f} ms; "
                f"{statistics.median(ratios):.2f}x as fast"
            )
            line += f" ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line, flush=True)
    print(
        f"    limits: {limits[0] * 1e3:.0f} ms at {peak / 1e12:.2f} TFLOP/s, {limits[1] * 1e3:.0f} ms for "
        f"{size / 1e6:.0f} MB a token at {speed / 1e9:.1f} GB/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--compile", action="store_true", help="ours with compiled steps (CUDA graphs on a GPU)"
    )
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--int8", action="store_true", help="also ours with int8 weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for dtype in args.dtype:
        for batch in args.batch:
            for int8 in (False, True) if args.int8 else (False,):
                compare(
                    PRESETS[args.preset],
                    getattr(torch, dtype),
                    batch,
                    args=args,
                    device=torch.device(args.device),
                    int8=int8,
                )


if __name__ == "__main__":
    main()
