"""--shard: two processes that hold half of the weights each train as one that holds all, and their
checkpoints are the same.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

import train
from networks import SMALL_DECODER
from reaf_hsenet.config import VisionConfig
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.build import build_mllm
from reaf_hsenet.models.decoder_config import RopeConfig
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.trained import load_trained
from reaf_hsenet.train.sharding import require_shardable, shard, whole
from reaf_hsenet.train.stability import clip_gradients, not_finite
from tiny import (
    bad_ids,
    language,
    losses,
    numbers,
    resume,
    spoil,
    torchrun,
    volume,
    weights,
    wrong,
)

pytestmark = pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="needs torch 2.6")


def small(tied: bool = True):
    """A model of a frozen encoder, a projector without dropout, and a decoder of two blocks."""
    torch.manual_seed(0)
    encoder = VisionConfig((8, 16, 16), (4, 8, 8), width=32, depth=1, heads=2, mlp=64)
    sizes = {"vocab": 61, "width": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "rope": RopeConfig(dims=16)}
    ends = {"tied": tied, "eos_ids": (1,), "bos_id": 2, "pad_id": None}
    decoder = replace(SMALL_DECODER, family="llama", **sizes, **ends)
    config = MllmConfig("stage1", (encoder,), decoder, projector="average_pool", kernel=(2, 2, 2), full=True)
    return build_mllm(config).train()


def batch() -> tuple:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (4, 10), generator=generator)
    labels = ids.clone()
    labels[:, :5] = -100
    labels[0, :8] = -100  # the ranks' shares of the answer tokens differ
    return ids, torch.ones_like(ids), labels, torch.rand(4, 1, 8, 16, 16, generator=generator)


def gradients(model, given: tuple, tokens: float) -> dict[str, torch.Tensor]:
    (model(*given)[0] / tokens).backward()
    return {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def one_rank(rank: int, path: str, tied: bool, checkpointing: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    model = small(tied)
    model.decoder.grad_checkpoint = checkpointing
    shard(model, Ranks(rank, 2, torch.device("cpu")), None)
    found = {"gradients": gradients(model, tuple(t[2 * rank : 2 * rank + 2] for t in batch()), 17 / 2)}
    found["norm"] = clip_gradients(model, 0.5)
    found["clipped"] = clip_gradients(model, None)
    found["held"] = sum(p.to_local().numel() for p in model.parameters())
    if rank == 1:
        model.decoder.norm.weight.grad.to_local()[0] = torch.nan
    found["bad"] = not_finite(model)
    torch.save(found, f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "checkpointing"), [(True, False), (False, True)])
def test_sharded_gradients_are_those_of_one_process(tmp_path, tied, checkpointing):
    mp.start_processes(one_rank, (str(tmp_path), tied, checkpointing), nprocs=2, start_method="forkserver")
    model = small(tied)
    expected = gradients(model, batch(), 17)
    norm = clip_gradients(model, 0.5)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for found in ranks:
        assert found["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found["gradients"][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
        assert found["norm"] == pytest.approx(norm.item(), rel=1e-5) and norm > 0.5
        assert found["clipped"] == pytest.approx(0.5, rel=1e-4)
        assert found["bad"] == ["decoder.norm.weight"]  # known on both ranks, whichever holds it
    total = sum(p.numel() for p in model.parameters())
    assert ranks[0]["held"] + ranks[1]["held"] == total and ranks[0]["held"] < 0.6 * total


def sharded(root: Path, out: Path, folder: Path, *more) -> list[str]:
    """A full fine-tuning of a published decoder without dropout, with a batch of 4 on two processes."""
    flags = ("--decoder", folder, "--full", "--vision", "stage1", "--projector", "average_pool")
    flags += ("--keep", 9, "--no-augment", "--batch-size", 2)
    return language(root, out, *flags, *more, start="clip1")


@pytest.fixture(scope="module")
def pair(stages, decoder_folder, tmp_path_factory):
    """The same run of 4 steps by one process, and by two sharded ones."""
    root = tmp_path_factory.mktemp("pair")
    one, two = (
        sharded(stages, root / name, decoder_folder, "--max-steps", 4, "--save-every", 2)
        for name in ("one", "two")
    )
    assert train.main([*one, "--batch-size", "4"]) == 0
    torchrun(2, [*two, "--shard", "--grad-checkpoint"], cwd=root)
    return root


def assert_alike(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    for a, b in zip(numbers(one, "lr"), numbers(two, "lr"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    saved, other = weights(one), weights(two)
    assert saved.keys() == other.keys()
    for name, tensor in saved.items():
        assert torch.allclose(tensor, other[name], atol=tolerance), name


@pytest.mark.slow
def test_two_sharded_processes_reach_the_weights_of_one(pair):
    assert_alike(pair / "one", pair / "two")
    one, two = (
        [r["validation"]["loss"] for r in numbers(pair / run, "validation")] for run in ("one", "two")
    )
    assert one == pytest.approx(two, rel=1e-5) and len(one) > 1
    # As evaluate.py and infer.py load them.
    one, two = (load_trained(pair / name, "last").model.decoder.norm.weight for name in ("one", "two"))
    assert torch.allclose(one, two, atol=1e-5)


def test_full_training_starts_from_the_decoders_weights(stages, decoder_folder, tmp_path):
    flags = ("--decoder", decoder_folder, "--full", "--vision", "stage1", "--max-steps", 1, "--lr", 1e-12)
    assert train.main(language(stages, tmp_path / "run", *flags, start="clip1")) == 0
    base, own = load_file(decoder_folder / "model.safetensors"), weights(tmp_path / "run")
    for name in ("norm.weight", "layers.1.mlp.down_proj.weight"):
        assert torch.allclose(own[f"decoder.{name}"], base[f"model.{name}"], atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["one", "two"])
def test_checkpoints_go_from_sharded_to_unsharded_runs_and_back(pair, tmp_path, start):
    """The half-way checkpoint of either run, continued by the other kind, reaches the same weights."""
    out = shutil.copytree(pair / start, tmp_path / "run")
    Run(out).point("last", 2)
    again = resume(out, stage="mrg")
    if start == "two":
        wrong(again, "--shard: one process has nobody to share with; .*--no-shard")
        assert train.main([*again, "--no-shard"]) == 0
    else:
        torchrun(2, [*again, "--shard"], cwd=tmp_path)
    assert_alike(pair / "one", out)


@pytest.mark.slow
def test_sharded_ranks_compute_in_bf16_accumulate_and_go_on_when_one_is_left_without_samples(
    pair, stages, decoder_folder, tmp_path
):
    data = shutil.copytree(stages / "data", tmp_path / "data")
    bad = {spoil(volume(data, row)) for row in (1, 5, 6)} | {spoil(volume(data, 0, "validation"))}
    flags = ("--max-steps", 4, "--accumulate", 2, "--max-bad", 4, "--data", data)
    half = sharded(stages, tmp_path / "half", decoder_folder, *flags, "--batch-size", 1)
    torchrun(2, [*half, "--shard", "--precision", "bf16"], cwd=tmp_path)
    assert set(bad_ids(tmp_path / "half")) == bad
    assert train.main(sharded(stages, tmp_path / "whole", decoder_folder, *flags)) == 0
    half, one = losses(tmp_path / "half"), losses(tmp_path / "whole")
    assert half == pytest.approx(one, rel=0.02) and half != one
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "half").values())


def test_where_sharding_makes_no_sense_it_is_refused_in_one_line(
    stages, decoder_folder, tmp_path, monkeypatch
):
    out, adapters = tmp_path / "r", ("--decoder", decoder_folder, "--vision", "stage1", "--shard")
    wrong(sharded(stages, out, decoder_folder, "--shard"), "--shard: one process has nobody to share with")
    words = "--shard: adapters and their states are small.*add --full"
    wrong(language(stages, out, *adapters, start="clip1"), words)
    two = Ranks(0, 2, torch.device("cpu"))
    for arguments, words in (
        ((True, "fp16", False), "say --precision bf16"),
        ((True, "bf16", True), "--compile: has not"),
    ):
        with pytest.raises(InputError, match=words):
            require_shardable(two, *arguments)
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard")
    with pytest.raises(InputError, match="--shard: needs torch 2.6 or newer, this is"):
        require_shardable(two, True, "bf16", False)
