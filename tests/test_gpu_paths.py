"""What only runs on a GPU, as far as it shows without one: pinned batches, counted and compiled blocks,
no needless wait.
"""

from functools import partialmethod

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data._utils.pin_memory import pin_memory

import train
from reaf_hsenet.data.bad_volumes import BadVolumes
from reaf_hsenet.data.loader import Batch
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.train import training
from tiny import numbers, tiny


@pytest.fixture
def pinned(monkeypatch) -> list[Tensor]:
    """The tensors that were pinned; without a GPU there is no such memory."""
    found = []

    def pin(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    return found


@pytest.mark.parametrize("kind", ("contrastive", "language", "cached features"))
def test_the_loader_pins_every_tensor_of_a_batch(pinned, kind):
    ids, mask, slices = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), torch.rand(2, 4, 5)
    volume, features = torch.rand(2, 1, 4, 4, 4), [torch.rand(2, 8, 6), torch.rand(2, 8, 6)]
    if kind == "contrastive":
        batch, tensors = Batch(volume, ids, mask, [3, 4], slices, counts=[2]), (volume, ids, mask, slices)
    elif kind == "language":
        batch = Batch(volume, ids, mask, [3, 4], slices, labels=ids.clone())
        tensors = ids, mask, batch.labels, volume, slices
    else:
        batch = Batch(None, ids, mask, [3, 4], labels=ids.clone(), features=features)
        tensors = ids, mask, batch.labels, *features
    made = pin_memory(batch)
    assert {id(t) for t in pinned} == {id(t) for t in tensors}
    assert made.ids is not batch.ids and made.index == [3, 4] and made.counts == batch.counts
    assert torch.equal(made.ids, ids) and type(made) is type(batch)


@pytest.mark.slow
def test_blocks_are_compiled_although_a_gpus_first_step_counts_their_flops(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "peak_flops", lambda device, dtype: 1e12)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    assert train.main(tiny(prepared, tmp_path / "run", "--max-steps", 2, "--compile")) == 0
    assert counters["frames"]["ok"] >= 2  # the vision blocks' code, and the text blocks'
    logged = numbers(tmp_path / "run", "loss")
    assert len(logged) == 2 and all(record["mfu"] > 0 for record in logged)


def test_one_process_counts_its_rows_on_the_host():
    # Nothing can be read from a meta tensor, as nothing can be from a GPU without a wait.
    batch = Batch(torch.rand(2, 1, 2, 2, 2), torch.ones(2, 3), torch.ones(2, 3), [0, 1])
    BadVolumes(0, Ranks(0, 1, torch.device("meta"))).exchange([batch], expected=2)
    assert batch.counts == [2]
