"""The two contrastive stages: what a dual encoder computes for a batch, and the loss of it.

Stage 2 (HSENet section 3.2) has a frozen stage-1 dual encoder as teacher: contrastive + lambda(t) * relation, over the
gathered batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from reaf_hsenet.data.loader import Batch
from reaf_hsenet.losses import (
    contrastive_logits,
    contrastive_loss,
    gather_with_grad,
    relation_loss,
    relation_weight,
)
from reaf_hsenet.models.clip import DualEncoder

Outputs = tuple[Tensor, Tensor, Tensor]


def encode(model: DualEncoder, batch: Batch) -> Outputs:
    """Unit vectors of the volumes and of the reports, (B, C) each, and the scale."""
    return model(batch.volume, batch.ids, batch.mask, batch.slices)


class Contrastive:
    """Stage 1: symmetric cross-entropy of the gathered batch."""

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> tuple[Tensor, dict]:
        return self.of_logits(self.logits(*outputs), outputs[2])

    def logits(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return contrastive_logits(gather_with_grad(image.float()), gather_with_grad(text.float()), scale)

    def of_logits(self, logits: Tensor, scale: Tensor) -> tuple[Tensor, dict]:
        return contrastive_loss(logits), {"logit_scale": scale.detach()}


class Teacher:
    """A frozen dual encoder in evaluation mode, whose features are computed once where they cannot change.

    Reports: once per distinct sequence of tokens. Volumes: once, when `images_change` (augmentation) is off.
    """

    def __init__(
        self, model: DualEncoder, device: torch.device, dtype: torch.dtype | None, chunk: int, images_change: bool
    ):
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.dtype, self.chunk, self.images_change = device, dtype, chunk, images_change
        self.texts: dict[bytes, Tensor] = {}
        self.images: dict[int, Tensor] = {}

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, C) of the volumes and of the reports; only a chunk of the batch is on the device at a time."""
        ids, mask = batch.ids.cpu(), batch.mask.cpu()
        reports = [row[real.bool()].numpy().tobytes() for row, real in zip(ids, mask, strict=True)]
        text = self._each_once(self.texts, reports, self.model.encode_text, (ids, mask))
        images = {} if self.images_change else self.images
        return self._each_once(images, batch.index, self.model.encode_image, (batch.volume,)), text

    @torch.no_grad()
    def _each_once(self, known: dict, keys: list, encode: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """The features of every key; encode(*rows of inputs) for those that are not known yet, which are then."""
        new = list({key: i for i, key in enumerate(keys) if key not in known}.items())
        for start in range(0, len(new), self.chunk):
            part = new[start : start + self.chunk]
            rows = [i for _, i in part]
            with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
                features = encode(*(t[rows].to(self.device) for t in inputs)).float()
            known.update((key, row) for (key, _), row in zip(part, features, strict=True))
        return torch.stack([known[key] for key in keys])


class Guided(Contrastive):
    """Stage 2. The teacher's logits are scaled by the student's scale, as published, and carry no gradient."""

    def __init__(self, teacher: Teacher, weight: float, steps: int):
        self.teacher, self.weight, self.steps = teacher, weight, steps

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> tuple[Tensor, dict]:
        logits, scale = self.logits(*outputs), outputs[2]
        loss, numbers = self.of_logits(logits, scale)
        weight = relation_weight(step, self.weight, self.steps)
        if weight == 0:  # the teacher has nothing more to say
            return loss, numbers | {"relation": 0.0}
        relation = relation_loss(logits, self.logits(*self.teacher.features(batch), scale.detach()))
        return loss + weight * relation, numbers | {"relation": relation.detach()}
