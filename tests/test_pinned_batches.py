"""Batches are pinned by torch's loader, so that their copy to a GPU does not wait. No GPU is needed to see it."""

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from reaf_hsenet.data.language_loader import LanguageBatch
from reaf_hsenet.data.loader import Batch


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
        batch = LanguageBatch(ids, mask, ids.clone(), volume, slices, [3, 4])
        tensors = ids, mask, batch.labels, volume, slices
    else:
        batch = LanguageBatch(ids, mask, ids.clone(), None, None, [3, 4], features)
        tensors = ids, mask, batch.labels, *features
    made = pin_memory(batch)
    assert {id(t) for t in pinned} == {id(t) for t in tensors}
    assert made.ids is not batch.ids and made.index == [3, 4] and made.counts == batch.counts
    assert torch.equal(made.ids, ids) and type(made) is type(batch)
