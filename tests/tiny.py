"""Tiny runs on the prepared phantoms: their commands, what is read off them, and how they are disturbed.
Runs that many tests share are fixtures of conftest.py.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.questions import report_prompts
from reaf_hsenet.data.slice_features import add_slice_features
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import read_json, write_json
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import DecoderConfig, RopeConfig
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.tokenizer.tokenizer import train_words
from reaf_hsenet.weights.decoder import save_decoder
from reaf_hsenet.weights.slice_encoder import describe, save_slice_encoder

# Commands. A flag that is given again counts the last time, so a test adds what it wants to be different.

TINY = "--stage clip1 --preset hsenet-tiny --size 16 32 32 --patch 8 16 16".split()
SHORT = "--batch-size 4 --log-every 1 --device cpu".split()
EIGHT = ("--max-steps", 8, "--save-every", 3, "--keep", 9)  # the steps of the fixture `finished`
AUTO = ("--resume", "auto")


def tiny(data: Path, out: Path, *more) -> list[str]:
    return [*TINY, *SHORT, "--data", str(data), "--out", str(out), *map(str, more)]


def stage2(teacher: Path, out: Path, *more) -> list[str]:
    return ["--stage", "clip2", *SHORT, "--init", str(teacher), "--out", str(out), *map(str, more)]


def language(stages: Path, out: Path, *more, stage: str = "mrg", start: str = "clip2") -> list[str]:
    """A language stage on the run `start` of the folder `stages`."""
    return ["--stage", stage, *SHORT, "--init", str(stages / start), "--out", str(out), *map(str, more)]


def resume(run: Path, *more, stage: str = "clip1") -> list[str]:
    flags = ["--stage", stage, "--resume", "--log-every", "1", "--device", "cpu"]
    return [*flags, "--out", str(run), *map(str, more)]


def retrieval(run: Path, *more) -> list[str]:
    return ["--task", "retrieval", "--run", str(run), "--device", "cpu", *map(str, more)]


def wrong(argv: list, words: str, main: Callable[[list[str]], int] = train.main) -> str:
    """The script must refuse the command in one line that matches `words`. Returns the line."""
    with pytest.raises(InputError, match=words) as caught:
        main(list(map(str, argv)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def torchrun(processes: int, argv: list, cwd: Path) -> None:
    """Train with several processes, which must succeed."""
    done = run_torchrun(processes, argv, cwd)
    assert done.returncode == 0, done.stderr


def run_torchrun(processes: int, argv: list, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), str(ROOT / "train.py"), *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


# Processes that are forked from one that has imported all and computed nothing: a start costs no import. The
# fixture `forks` starts that one.

FORKS = multiprocessing.get_context("forkserver")


def one_rank(rank: int, world: int, port: int, argv: list[str]) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.exit(train.main(argv))


def start(argv: list[str], world: int = 1, target: Callable = one_rank) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORKS.Process(target=target, args=(rank, world, port, argv)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def finish(argv: list[str], world: int = 1, target: Callable = one_rank) -> None:
    ranks = start(argv, world, target)
    for rank in ranks:
        rank.join(240)
        assert rank.exitcode == 0


# What is read off a run.


def config_of(run: Path) -> dict:
    return read_json(run / "config.json")


@contextmanager
def edited(path: Path) -> Iterator[dict]:
    """The values of a JSON file, written back with what the block changes."""
    values = read_json(path)
    yield values
    write_json(path, values)


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(Run(run).pointer(name) / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def assert_same(a: Path, b: Path) -> None:
    """The last weights of two runs and their logs are equal, bit for bit."""
    assert same_weights(a, b) and numbers(a) == numbers(b)


def assert_close_weights(a: Path, b: Path) -> None:
    """The last weights of two runs agree but for rounding.

    A bias of keys moves all scores of a row alike: its gradient is rounding, which Adam makes steps of, so it
    is left out.
    """
    one, two = weights(a), weights(b)
    for name, tensor in one.items():
        keys = name.endswith("qkv.bias")
        parts = [0, 2] if keys else [0]
        for i in parts:
            x, y = (t.tensor_split(3)[i] if keys else t for t in (tensor, two[name]))
            assert torch.allclose(x, y, atol=2e-4), name


def assert_close_logs(a: Path, b: Path) -> None:
    """The steps of two runs have the same losses and gradients but for rounding."""
    for one, two in zip(numbers(a, "lr"), numbers(b, "lr"), strict=True):
        assert one["step"] == two["step"] and two["loss"] == pytest.approx(one["loss"], abs=2e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3, abs=1e-6)


def log_of(run: Path) -> list[dict]:
    """The records of the log, in which NaN is no JSON."""
    refuse = lambda name: pytest.fail(f"{name} is not JSON")
    return [json.loads(line, parse_constant=refuse) for line in (run / "log.jsonl").read_text().splitlines()]


def numbers(run: Path, *names: str) -> list[dict]:
    """The records with all of these entries, without what depends on the clock."""
    clock = ("samples_per_s", "memory_gb", "waiting")
    kept = [{k: v for k, v in record.items() if k not in clock} for record in log_of(run)]
    return [record for record in kept if record.keys() >= set(names)]


def bad_ids(run: Path) -> list[str]:
    """The volumes that the log says were left out."""
    return [record["bad"] for record in numbers(run, "bad")]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in numbers(run, "loss")]


# Disturbances.


def at_step(monkeypatch, step: int, then: Callable[[], object]) -> None:
    """Call `then` at the beginning of a step of train.main in this process."""
    rate = train.learning_rate

    def and_then(done, *rest):
        if done == step - 1:
            then()
        return rate(done, *rest)

    monkeypatch.setattr(train, "learning_rate", and_then)


def stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of a step."""
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))


def volume(data: Path, row: int, split: str = "train") -> Path:
    return data / load_manifest(data).entries(split)[row]["volume"]


def spoil(path: Path, how: str = "NaN") -> str:
    """Make a volume bad; returns its id."""
    if how == "NaN":
        voxels = np.load(path)
        voxels[3] = np.nan
        np.save(path, voxels)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.unlink()
    return path.stem


def flip_last_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


# Weights that others would have published.


def slice_encoder(seed: int = 0) -> SliceEncoder:
    torch.manual_seed(seed)
    return SliceEncoder(size=32, patch=16, width=24, depth=1, heads=2, mlp=48)


def with_slices(prepared: Path, out: Path, seed: int = 0) -> Path:
    """A copy of a prepared folder with slice features, and the encoder that made them beside them."""
    shutil.copytree(prepared, out)
    encoder = slice_encoder(seed)
    add_slice_features(out, encoder, describe(encoder, "phantoms", recipe="phantom"), progress=False)
    save_slice_encoder(out / "slice_encoder", encoder)
    return out


def write_decoder(folder: Path, data: Path) -> Path:
    """A decoder as a published one comes: config.json, safetensors, a tokenizer without image tokens."""
    torch.manual_seed(1)
    texts = [entry["text"] for entry in load_manifest(data).entries("train")]
    tokenizer = train_words([*texts, *report_prompts()], 300)
    rope, ends = RopeConfig(dims=16), {"bos_id": tokenizer.bos_id, "eos_ids": (tokenizer.eos_id,)}
    sizes = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 48, "context": 1024}
    config = DecoderConfig("llama", len(tokenizer) + 3, **sizes, rope=rope, **ends)
    save_decoder(Decoder(config), folder)
    tokenizer.save(folder)
    return folder


def published_stage2(student, teacher) -> dict[str, torch.Tensor]:
    """Both models under the names of HSENet's published stage-2 checkpoint."""
    vision = {
        "pos_embed": "patch_embedding.position_embeddings",
        "patch_embed.proj.weight": "patch_embedding.patch_embeddings.1.weight",
        "patch_embed.proj.bias": "patch_embedding.patch_embeddings.1.bias",
    }
    parts = (
        ("mlp.fc1.", "mlp.linear1."),
        ("mlp.fc2.", "mlp.linear2."),
        ("attn.proj.", "attn.out_proj."),
        ("guidance.query.", "slice_guided_attention.Wq."),
        ("guidance.key.", "slice_guided_attention.Wk."),
        ("guidance.value.", "slice_guided_attention.Wv."),
        ("guidance.proj.", "slice_guided_attention.output_linear."),
        ("guidance.norm.", "slice_guided_attention.norm."),
        ("score.", "patch_score_proj."),
    )
    text = (
        ("word_embed.", "embeddings.word_embeddings."),
        ("pos_embed.", "embeddings.position_embeddings."),
        ("type_embed.", "embeddings.token_type_embeddings."),
        ("blocks.", "encoder.layer."),
        (".attn.proj.", ".attention.output.dense."),
        (".norm1.", ".attention.output.LayerNorm."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
        (".norm2.", ".output.LayerNorm."),
    )
    made = {}
    for prefix, model in (("", student), ("stage1_pretrained_CLIP.", teacher)):
        for name, tensor in model.state_dict().items():
            tower, _, rest = name.partition(".")
            if tower == "vision":
                rest = vision.get(rest, rest)
                for ours, theirs in parts:
                    rest = rest.replace(ours, theirs)
                made[f"{prefix}vision_encoder.{rest}"] = tensor.clone()
            elif tower == "text" and ".qkv." in rest:
                for kind, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    layer = rest.replace("blocks.", "encoder.layer.").replace(
                        "attn.qkv.", f"attention.self.{kind}."
                    )
                    made[f"{prefix}language_encoder.{layer}"] = third.clone()
            elif tower == "text":
                rest = "embeddings.LayerNorm." + rest[5:] if rest.startswith("norm.") else rest
                for ours, theirs in text:
                    rest = rest.replace(ours, theirs)
                made[f"{prefix}language_encoder.{rest}"] = tensor.clone()
            else:
                name = name.replace("vision_proj", "mm_vision_proj").replace("text_proj", "mm_language_proj")
                made[prefix + name] = tensor.clone()
    return made
