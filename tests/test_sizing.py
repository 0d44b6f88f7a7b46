"""benchmarks/sizing.py: the bytes that it predicts are those that two ranks send, and the tensors those
that are kept.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import train
from conftest import ROOT
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.runs.trained import load_trained
from reaf_hsenet.train.training_state import TrainingState
from tiny import language, tiny, weights

sys.path.insert(0, str(ROOT / "benchmarks"))
import sizing  # noqa: E402

# A collective's argument that this rank hands over, by its place.
GIVEN = {
    "all_reduce": 0,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "all_gather_single": 1,
    "reduce_scatter_tensor": 1,
    "reduce_scatter_single": 1,
}


def counting_rank(rank: int, port: int, argv: list[str], path: Path) -> None:
    """train.main as one of two ranks; what it hands to collectives between the second step's end and the
    third's.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sums, after = dict.fromkeys(GIVEN, 0), []

    def counted(name: str):
        collective = getattr(dist, name)

        def call(*args, **kwargs):
            given = (
                args[GIVEN[name]]
                if len(args) > GIVEN[name]
                else kwargs.get("input", kwargs.get("input_tensor"))
            )
            sums[name] += given.nbytes
            return collective(*args, **kwargs)

        return call

    for name in GIVEN:
        if hasattr(dist, name):
            setattr(dist, name, counted(name))
    begin, step = TrainingState.__init__, train.train_step

    def hooked(self, *args):
        begin(self, *args)
        if isinstance(self.ddp, DistributedDataParallel):
            self.ddp.register_comm_hook(
                None, allreduce_hook
            )  # DDP's own reducer, which calls dist.all_reduce in Python

    def noted(*args):
        done = step(*args)
        after.append(dict(sums))
        return done

    TrainingState.__init__, train.train_step = hooked, noted
    assert train.main(argv) == 0
    torch.save({name: after[2][name] - after[1][name] for name in GIVEN}, path / f"rank{rank}.pt")


def sent(argv: list[str], path: Path) -> dict[str, int]:
    """Bytes by collective, of the third step; the same on both ranks."""
    path.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [*argv, "--max-steps", "4", "--validate-every", "1"]
    mp.start_processes(counting_rank, (port, argv, path), nprocs=2, start_method="forkserver")
    one, two = (torch.load(path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one == two
    gathered = one["all_gather_into_tensor"] + one["all_gather_single"]
    scattered = one["reduce_scatter_tensor"] + one["reduce_scatter_single"]
    return {
        "all_reduce": one["all_reduce"],
        "all_gather": one["all_gather"],
        "gathered": gathered,
        "scattered": scattered,
    }


@pytest.mark.slow
def test_a_contrastive_step_sends_the_predicted_bytes(prepared, tmp_path):
    argv = tiny(prepared, tmp_path / "run", "--accumulate", 2)
    argv[argv.index("--batch-size") + 1] = "2"
    found = sent(argv, tmp_path / "sent")
    trained = sum(t.numel() for t in weights(tmp_path / "run").values())
    expected = sizing.traffic(trained, 2, PRESETS["hsenet-tiny"].embed, accumulate=2)
    assert found["all_reduce"] == expected.gradients == 4 * trained
    assert found["all_gather"] == expected.embeddings + expected.numbers
    assert found["gathered"] == found["scattered"] == expected.parameters == expected.reduced == 0
    assert expected.sent(2) == expected.gradients + expected.embeddings + expected.numbers


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_step_of_a_language_stage_sends_the_predicted_bytes(stages, decoder_folder, tmp_path, shard):
    flags = ("--decoder", decoder_folder, "--full", "--vision", "stage1", "--no-augment", "--accumulate", 2)
    argv = language(stages, tmp_path / "run", *flags, *(["--shard"] if shard else []), start="clip1")
    argv[argv.index("--batch-size") + 1] = "2"
    found = sent(argv, tmp_path / "sent")
    model = load_trained(tmp_path / "run", "last").model
    model.encoders.requires_grad_(False)
    if shard:
        expected = sizing.sharded_traffic(model, 2, half=False, accumulate=2)
    else:
        expected = sizing.traffic(
            sum(p.numel() for p in model.parameters() if p.requires_grad), 2, 0, accumulate=2
        )
    assert found["gathered"] == expected.parameters and found["scattered"] == expected.reduced
    assert (expected.parameters > 0) == (expected.reduced > 0) == (expected.gradients == 0) == shard
    assert found["all_reduce"] + found["all_gather"] == expected.gradients + expected.numbers


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_tensors_that_autograd_keeps_are_counted_without_data(precision):
    for name, stage in (("hsenet-tiny", "clip1"), ("reaf-tiny", "clip1")):
        case = sizing.contrastive(name, stage, PRESETS[name])
        counted = sizing.count(case)
        model = case.build().train()
        for checkpointed in (False, True):
            case.checkpoint(model, checkpointed)
            kept = sizing.kept_bytes(model, lambda m=model, c=case: c.forward(m, 3), precision)
            common, each = counted.kept[precision, checkpointed]
            assert kept == pytest.approx(common + 3 * each, rel=0.01), (name, checkpointed)
        assert (
            counted.parameters == sum(p.numel() for p in model.parameters())
            and 2 < counted.flops / counted.again < 3
        )


def test_adamw_and_gradients_take_what_the_formula_says():
    case = sizing.contrastive("hsenet-tiny", "clip1", PRESETS["hsenet-tiny"])
    model = case.build()
    optimizer = torch.optim.AdamW(model.parameters())
    case.forward(model, 2).backward()
    optimizer.step()
    fixed = sizing.count(case).fixed(world=1)
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert fixed["AdamW"] == sum(t.nbytes for t in states) and fixed["buckets"] == 0
    assert (
        fixed["gradients"]
        == fixed["weights"]
        == sum(p.grad.nbytes for p in model.parameters() if p.requires_grad)
    )


def test_the_step_time_follows_from_counts_and_assumptions_and_the_document_has_the_tables():
    case = sizing.contrastive("hsenet-tiny", "clip1", PRESETS["hsenet-tiny"])
    sizes = sizing.count(case)
    given = argparse.Namespace(share=0.5, peak=1e12, node=1e9, network=1e8)
    computing = case.batch * sizes.flops / 0.5e12
    assert sizing.step_seconds(sizes, 8, 0, given) == computing
    assert sizing.step_seconds(sizes, 8, 1e9, given) == pytest.approx(computing / 2 + 1)
    assert sizing.step_seconds(sizes, 64, 1e9, given) == pytest.approx(computing / 2 + 10)
    text = sizing.DOCUMENT.read_text().split(sizing.START)[1].split(sizing.END)[0]
    assert "| clip1, hsenet-base |" in text and f"| {sizing.volume_bytes('reaf') / 1e6:.1f} MB |" in text
