"""Gradient caching gives the gradients of the whole batch: with drop path and dropout, one process and
two.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from networks import SMALL_REAF
from reaf_hsenet import distributed
from reaf_hsenet.config import ClipConfig, TextConfig
from reaf_hsenet.models.clip import build_dual_encoder, set_grad_checkpoint
from reaf_hsenet.train.grad_cache import GradCache
from reaf_hsenet.train.losses import contrastive_logits, contrastive_loss, gather_with_grad

ROWS, CHUNK = 6, 2
TEXT = TextConfig(
    vocab=50, width=32, depth=2, heads=4, mlp=64, positions=24, dropout=0.3, attention_dropout=0.3
)
REAF = ClipConfig(
    "reaf", replace(SMALL_REAF, drop_path=0.5), TEXT, embed=16, projection_bias=False, logit_scale="exp"
)


def model_and_batch(config=REAF, rows=ROWS, train=True):
    torch.manual_seed(0)
    model = build_dual_encoder(config).train(train)
    generator = torch.Generator().manual_seed(1)
    volume = torch.rand(rows, 1, *config.vision.size, generator=generator)
    ids = torch.randint(5, 50, (rows, 12), generator=generator)
    return model, (volume, ids, torch.ones_like(ids))


def loss_of(image, text, scale):
    return contrastive_loss(contrastive_logits(gather_with_grad(image), gather_with_grad(text), scale))


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def cached(model, batch, chunk=CHUNK, ddp=None):
    """Gradients by caching, after torch.manual_seed(2)."""
    torch.manual_seed(2)
    parts = list(zip(*(t.split(chunk) for t in batch), strict=True))

    def encode(i):
        if ddp is None or not torch.is_grad_enabled():
            return model(*parts[i])
        with nullcontext() if i == len(parts) - 1 else ddp.no_sync():
            return ddp(*parts[i])

    cache = GradCache(encode, len(parts), torch.device("cpu"))
    loss_of(*cache.features).backward()
    cache.backward()
    return gradients(model)


def whole(model, batch, chunk=CHUNK, module=None):
    """Gradients of one loss of one graph, whose random numbers are drawn in the same order; after the
    same seed.
    """
    torch.manual_seed(2)
    parts = zip(*(t.split(chunk) for t in batch), strict=True)
    image, text, scale = zip(*(model(*part) for part in parts), strict=True)
    loss_of(torch.cat(image), torch.cat(text), scale[0]).backward()
    return gradients(module or model)


def assert_same(found, expected, tolerance=1e-5):
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= tolerance * max(1, gradient.abs().max()), name


def test_cached_gradients_are_those_of_one_pass_without_randomness():
    model, batch = model_and_batch(train=False)
    expected = whole(model, batch, chunk=ROWS)
    for chunk in (1, 2, 4, 6):
        model.zero_grad()
        assert_same(cached(model, batch, chunk), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cached_gradients_are_those_of_the_whole_batch_with_drop_path_and_dropout(checkpointing):
    model, batch = model_and_batch()
    set_grad_checkpoint(model, checkpointing)
    expected = whole(model, batch)
    model.zero_grad()
    assert_same(cached(model, batch), expected)


def test_the_random_state_must_be_replayed(monkeypatch):
    """Otherwise the gradients differ, so the test above can fail."""
    model, batch = model_and_batch()
    expected = whole(model, batch)
    model.zero_grad()
    monkeypatch.setattr("reaf_hsenet.train.grad_cache.set_random_state", lambda state, device: None)
    with pytest.raises(AssertionError):
        assert_same(cached(model, batch), expected)


def test_a_chunks_own_loss_is_not_enough():
    model, batch = model_and_batch(train=False)
    expected = whole(model, batch, chunk=ROWS)
    model.zero_grad()
    for part in zip(*(t.split(CHUNK) for t in batch), strict=True):
        loss_of(*model(*part)).backward()
    with pytest.raises(AssertionError):
        assert_same(gradients(model), expected)


def test_no_pass_holds_more_than_a_chunk():
    model, batch = model_and_batch()
    rows = []
    model.vision.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    cached(model, batch)
    assert rows == [CHUNK] * (2 * ROWS // CHUNK)


def one_rank(rank: int, world: int, path: str, train: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world)
    model, batch = model_and_batch(rows=2 * ROWS, train=train)
    mine = tuple(t[rank * ROWS : (rank + 1) * ROWS] for t in batch)
    found = {"cached": cached(model, mine, ddp=DistributedDataParallel(model))}
    model.zero_grad()
    if train:
        # The same draws in one graph; averaged over ranks by hand, as DDP cannot follow several passes in one
        # graph.
        expected = whole(model, mine)
        for gradient in expected.values():
            dist.all_reduce(gradient)
            gradient /= world
        found["whole"] = expected
    torch.save(found, f"{path}/rank{rank}.pt")
    distributed.stop()


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_two_processes_cache_the_gradients_of_the_global_batch(tmp_path, train):
    mp.start_processes(one_rank, (2, str(tmp_path), train), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    if train:
        expected = ranks[0]["whole"]
    else:
        model, batch = model_and_batch(rows=2 * ROWS, train=False)
        expected = whole(model, batch, chunk=2 * ROWS)
    for found in ranks:
        assert_same(found["cached"], expected)
