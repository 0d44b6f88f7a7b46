"""Loading a decoder: peak host memory and time, of a made checkpoint with random bf16 weights in shards.

    python benchmarks/decoder_loading.py [--gigabytes 4] [--real-size] [--tokens 8] [--int8]

--real-size makes Phi-4-mini's own shapes (7.7 GB) and generates a few tokens with them. The checkpoint is
written below the system's temporary folder and removed.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from decoder import PRESETS
from measure import peak_mb
from reaf_hsenet.files import write_json
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import DecoderConfig
from reaf_hsenet.runs.generation import generate
from reaf_hsenet.weights.decoder import INDEX, load_decoder, published_names

SHARD = 2 * 10**9


def make(config: DecoderConfig, folder: Path, dtype: torch.dtype = torch.bfloat16) -> int:
    """Random weights, a shard at a time; returns their bytes."""
    with torch.device("meta"):
        decoder = Decoder(config)
    parameters, generator = dict(decoder.named_parameters()), torch.Generator().manual_seed(0)
    places, shard, size, total = {}, {}, 0, 0

    def flush():
        name = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, (ours, start, end) in published_names(decoder).items():
        shape = (end - start, *parameters[ours].shape[1:])
        tensor = torch.empty(shape, dtype=dtype)
        shard[name] = tensor.fill_(1) if tensor.dim() == 1 else tensor.normal_(0, 0.02, generator=generator)
        size, total = size + tensor.nbytes, total + tensor.nbytes
        if size > SHARD:
            flush()
            size = 0
    flush()
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    write_json(folder / "config.json", config.to_json(str(dtype).removeprefix("torch.")))
    return total


def work(folder: str, tokens: int, int8: bool):
    before = peak_mb()
    started = time.perf_counter()
    decoder = load_decoder(folder, int8=int8)
    print(
        f"loaded in {time.perf_counter() - started:.1f} s, peak {peak_mb():.0f} MB, {before:.0f} before; "
        f"weights are {next(decoder.parameters()).dtype}"
    )
    loaded = peak_mb() - before
    if tokens:
        started = time.perf_counter()
        ids = generate(decoder, ids=torch.tensor([[1, 2, 3, 4]]), new_tokens=tokens)
        print(
            f"{tokens} tokens in {time.perf_counter() - started:.1f} s: {ids[0].tolist()}, peak "
            f"{peak_mb():.0f} MB"
        )
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--real-size", action="store_true")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--int8", action="store_true")
    args = parser.parse_args()
    config = PRESETS["phi-4-mini"]
    if not args.real_size:
        layer = 2 * (3072 * (3072 + 2 * 1024) + 3072 * 3072 + 3 * 3072 * 8192)
        config = replace(config, vocab=32064, layers=round(args.gigabytes * 1e9 / layer))
    with tempfile.TemporaryDirectory() as folder:
        total = make(config, Path(folder))
        print(f"made {total / 1e9:.2f} GB in {len(list(Path(folder).glob('*.safetensors')))} shards")
        import multiprocessing

        with multiprocessing.get_context("spawn").Pool(
            1
        ) as pool:  # a process that has not held the weights before
            loaded = pool.apply(work, (folder, args.tokens, args.int8))
        print(f"peak host memory of loading: {loaded * 2**20 / total:.2f}x the checkpoint's size")


if __name__ == "__main__":
    main()
