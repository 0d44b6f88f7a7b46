"""The contrastive loss over processes: two gloo processes have the gradients of one."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import train
from networks import TINY, batch
from reaf_hsenet import distributed
from reaf_hsenet.data.loader import Batch
from reaf_hsenet.models.clip import build_dual_encoder
from reaf_hsenet.train.contrastive import Contrastive, encode
from reaf_hsenet.train.losses import (
    LOSSES,
    contrastive_logits,
    contrastive_loss,
    gather_with_grad,
    sigmoid_loss,
)
from tiny import config_of, losses, tiny, wrong


def loss_of(model, volume, ids, mask, name="softmax"):
    image, text, scale = model(volume, ids, mask)
    return LOSSES[name](contrastive_logits(gather_with_grad(image), gather_with_grad(text), scale))


def one_rank(rank: int, world: int, path: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = DistributedDataParallel(build_dual_encoder(TINY).double().eval())
    volume, ids, mask = batch(6)
    mine = slice(3 * rank, 3 * rank + 3)
    loss = loss_of(model, volume[mine].double(), ids[mine], mask[mine], name)
    loss.backward()
    gradients = {n: p.grad for n, p in model.module.named_parameters()}
    torch.save({"loss": loss.detach(), "gradients": gradients}, f"{path}/rank{rank}.pt")
    del model  # before its group, see distributed.stop
    distributed.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_have_the_gradients_of_one_with_the_concatenated_batch(tmp_path, name):
    mp.start_processes(one_rank, (2, str(tmp_path), name), nprocs=2, start_method="forkserver")
    torch.manual_seed(0)
    model = build_dual_encoder(TINY).double().eval()
    volume, ids, mask = batch(6)
    loss = loss_of(model, volume.double(), ids, mask, name)
    loss.backward()
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    for found in ranks:
        assert abs(found["loss"] - loss) < 1e-12
        for name, parameter in model.named_parameters():
            error = (found["gradients"][name] - parameter.grad).abs().max()
            assert error <= 1e-12 + 1e-10 * parameter.grad.abs().max(), name


def test_gathering_is_needed():
    """Without the other half's negatives the gradient differs, so the test above can fail."""
    torch.manual_seed(0)
    model = build_dual_encoder(TINY).double().eval()
    volume, ids, mask = batch(6)
    volume = volume.double()
    whole = torch.autograd.grad(loss_of(model, volume, ids, mask), model.vision.cls_token)[0]
    halves = [loss_of(model, volume[h], ids[h], mask[h]) for h in (slice(0, 3), slice(3, 6))]
    half = torch.autograd.grad(sum(halves) / 2, model.vision.cls_token)[0]
    assert (whole - half).abs().max() > 1e-2 * whole.abs().max()


def test_loss_is_symmetric_and_lowest_on_the_diagonal():
    features = torch.eye(4)
    scale = torch.tensor(10.0)
    matched = contrastive_loss(contrastive_logits(features, features, scale))
    shuffled = contrastive_loss(contrastive_logits(features, features.roll(1, 0), scale))
    assert matched < 0.01 < 5 < shuffled
    a, b = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1)
    assert torch.isclose(
        contrastive_loss(contrastive_logits(a, b, scale)), contrastive_loss(contrastive_logits(b, a, scale))
    )


def test_the_sigmoid_loss_judges_every_pair_by_itself():
    logits = 3 * torch.randn(5, 5, dtype=torch.float64)
    by_hand = 0.0
    for i in range(5):
        for j in range(5):
            p = 1 / (1 + math.exp(-(logits[i, j].item() - math.log(4))))
            by_hand -= math.log(p if i == j else 1 - p) / 5
    assert sigmoid_loss(logits).item() == pytest.approx(by_hand, rel=1e-12)
    assert sigmoid_loss(torch.zeros(5, 5)) < sigmoid_loss(-10 * torch.eye(5))  # the prior is no bad start


def test_a_run_keeps_the_loss_it_was_started_with(prepared, tmp_path):
    runs = {name: tmp_path / name for name in LOSSES}
    for name, out in runs.items():
        assert train.main(tiny(prepared, out, "--max-steps", 2, "--loss", name)) == 0
        assert config_of(out)["train"]["loss"] == name
    assert losses(runs["softmax"]) != losses(runs["siglip"])
    wrong(
        ["--stage", "clip1", "--out", runs["siglip"], "--resume", "--loss", "softmax"],
        "--loss: with --resume",
    )


def unequal_rank(rank: int, path: str, counts: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=len(counts))
    torch.manual_seed(0)
    model = DistributedDataParallel(build_dual_encoder(TINY).double().eval())
    volume, ids, mask = batch(6)
    mine = list(range(sum(counts[:rank]), sum(counts[: rank + 1])))
    rows = mine or [0]
    if not mine:  # a stand-in
        volume, ids, mask = torch.zeros_like(volume), torch.full_like(ids, 3), torch.ones_like(mask)
    given = Batch(volume[rows].double(), ids[rows], mask[rows], mine, counts=counts)
    loss, _ = Contrastive().loss(encode(model, given), given, 0)
    loss.backward()
    gradients = {n: p.grad for n, p in model.module.named_parameters()}
    torch.save({"loss": loss.detach(), "gradients": gradients}, f"{path}/rank{rank}.pt")
    del model  # before its group, see distributed.stop
    distributed.stop()


@pytest.mark.slow
@pytest.mark.parametrize("counts", [[1, 3], [4, 0]])
def test_ranks_with_unequal_or_no_rows_have_the_gradients_of_one_process_with_all(tmp_path, counts):
    mp.start_processes(unequal_rank, (str(tmp_path), counts), nprocs=2, start_method="forkserver")
    torch.manual_seed(0)
    model = build_dual_encoder(TINY).double().eval()
    volume, ids, mask = (t[:4] for t in batch(6))
    loss = loss_of(model, volume.double(), ids, mask)
    loss.backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert abs(found["loss"] - loss) < 1e-5  # features are compared in float32
        for name, parameter in model.named_parameters():
            error = (found["gradients"][name] - parameter.grad).abs().max()
            assert error <= 1e-5 * parameter.grad.abs().max() + 1e-12, name
