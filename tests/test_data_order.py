"""Which samples a step sees, and how they look, depends on seed, epoch and step: not on ranks, workers or
interruptions.
"""

import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import train
from reaf_hsenet.config import Augmentation
from reaf_hsenet.data.language import add_image_tokens
from reaf_hsenet.data.language_loader import LanguageDataset
from reaf_hsenet.data.loader import CTReportDataset
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.questions import report_prompts
from reaf_hsenet.data.samplers import GlobalBatches
from reaf_hsenet.data.workers import batches, make_loader
from reaf_hsenet.tokenizer.tokenizer import train_wordpiece, train_words
from tiny import tiny

GLOBAL = 8
AUGMENT = Augmentation()


def contrastive(manifest):
    tokenizer = train_wordpiece([e["text"] for e in manifest.entries("train")], 400)
    return CTReportDataset(manifest, "train", tokenizer, 24, AUGMENT, seed=3)  # short: sentences are drawn


def language(manifest):
    tokenizer = train_words([*(e["text"] for e in manifest.entries("train")), *report_prompts()], 400)
    add_image_tokens(tokenizer)
    return LanguageDataset(
        manifest,
        "train",
        task="mrg",
        tokenizer=tokenizer,
        image_tokens=6,
        max_text=600,
        augmentation=AUGMENT,
        seed=3,
    )


def items(dataset, world: int, workers: int) -> list[tuple]:
    """(row, volume, ids and labels without padding) of two epochs, in the order of the global batches."""
    found = []
    ranks = [GlobalBatches(len(dataset), GLOBAL // world, rank, world, seed=5) for rank in range(world)]
    loaders = [make_loader(dataset, sampler, workers) for sampler in ranks]
    for epoch in (0, 1):
        for sampler in ranks:
            sampler.start_at(epoch, 0)
        for parts in zip(*(batches(loader, torch.device("cpu")) for loader in loaders), strict=True):
            for batch in parts:
                labels = batch.mask if batch.labels is None else batch.labels
                for i, row in enumerate(batch.index):
                    length = 1 + int((batch.mask[i] + (labels[i] > 0)).nonzero().max())
                    found.append((row, batch.volume[i], batch.ids[i, :length], labels[i, :length]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("make", [contrastive, language])
def test_items_are_bitwise_equal_for_any_number_of_ranks_and_workers(prepared, make):
    dataset = make(load_manifest(prepared))
    expected = items(dataset, 1, 0)
    assert len(expected) == 2 * (len(dataset) // GLOBAL) * GLOBAL
    for world in (1, 2, 4):
        for workers in (0, 1, 3):
            for one, two in zip(expected, items(dataset, world, workers), strict=True):
                assert one[0] == two[0] and all(
                    torch.equal(a, b) for a, b in zip(one[1:], two[1:], strict=True)
                )


def train_and_note(rank: int, world: int, port: int, argv: list[str], log: Path, stop: int | None) -> None:
    """train.main as one of torchrun's processes, noting the training rows that are read; SIGTERM in step
    `stop`.
    """
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    read, rate = CTReportDataset.__getitem__, train.learning_rate

    def noted(self, key):
        if self.augmentation is not None:  # the training set
            with open(log / f"{world}-{rank}.txt", "a") as file:
                file.write(f"{key[0]} {key[1]}\n")
        return read(self, key)

    def interrupted(done, *rest):
        if stop is not None and done == stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(done, *rest)

    CTReportDataset.__getitem__, train.learning_rate = noted, interrupted
    assert train.main(argv) == (0 if stop is None else 143)


def run_ranks(world: int, *rest) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(train_and_note, (world, port, *rest), nprocs=world, start_method="forkserver")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_resumed_epoch_reads_no_sample_twice_and_skips_none_for_any_number_of_ranks(
    prepared, tmp_path, before, after
):
    out = tmp_path / "run"
    argv = tiny(prepared, out, "--max-steps", 6, "--preset", "hsenet-tiny", "--seed", 1)
    argv[argv.index("--batch-size") + 1] = str(4 // before)
    run_ranks(before, argv, tmp_path, 2)
    first = sum((path.read_text().splitlines() for path in tmp_path.glob("*.txt")), [])
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    run_ranks(after, ["--stage", "clip1", "--out", str(out), "--resume", "--device", "cpu"], tmp_path, None)
    rest = sum((path.read_text().splitlines() for path in tmp_path.glob("*.txt")), [])
    rows = len(load_manifest(prepared).entries("train"))
    order = [np.random.default_rng((1, epoch)).permutation(rows)[: rows // 4 * 4] for epoch in (0, 1)]
    expected = [f"{epoch} {row}" for epoch in (0, 1) for row in order[epoch]]
    assert sorted(first) == sorted(expected[:8]) and sorted(rest) == sorted(expected[8:24])
