"""The two contrastive stages: what a dual encoder computes for a batch, and the loss of it.

Stage 2 (HSENet section 3.2) has a frozen stage-1 dual encoder as teacher: contrastive + lambda(t) * relation, over the
gathered batch.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from reaf_hsenet.data.loader import Batch
from reaf_hsenet.models.clip import DualEncoder
from reaf_hsenet.train.losses import (
    contrastive_logits,
    contrastive_loss,
    gather_with_grad,
    relation_loss,
    relation_weight,
)

Outputs = tuple[Tensor, Tensor, Tensor]


def at_least_float32(features: Tensor) -> Tensor:
    """Half precision becomes float32, in which logits and losses are computed; float64 stays."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def encode(model: DualEncoder, batch: Batch) -> Outputs:
    """Unit vectors of the volumes and of the reports, (B, C) each, and the scale."""
    image, text, scale = model(batch.volume, batch.ids, batch.mask, batch.slices)
    rows = len(batch.index)  # none of a stand-in, whose gradients are 0
    return image[:rows], text[:rows], scale


class Contrastive:
    """Stage 1: symmetric cross-entropy of the gathered batch."""

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> tuple[Tensor, dict]:
        return self.of_logits(self.logits(*outputs, batch), outputs[2])

    def logits(self, image: Tensor, text: Tensor, scale: Tensor, batch: Batch) -> Tensor:
        image, text = (gather_with_grad(at_least_float32(features), batch.counts) for features in (image, text))
        return contrastive_logits(image, text, scale)

    def of_logits(self, logits: Tensor, scale: Tensor) -> tuple[Tensor, dict]:
        return contrastive_loss(logits), {"logit_scale": scale.detach()}


class Teacher:
    """A frozen dual encoder in evaluation mode, whose features are computed once where they cannot change.

    Reports: once per distinct sequence of tokens, of which the last `kept_reports` are kept: a report that is shortened
    at random is another one every epoch. Volumes: once, when `images_change` (augmentation) is off. What is
    kept is computed alone: in a batch its last digits would depend on the others, and a resumed run would differ.
    """

    def __init__(
        self,
        model: DualEncoder,
        device: torch.device,
        dtype: torch.dtype | None,
        chunk: int,
        images_change: bool,
        kept_reports: int = 2**16,
    ):
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.dtype, self.chunk, self.images_change = device, dtype, chunk, images_change
        self.kept_reports = kept_reports
        self.texts: dict[bytes, Tensor] = {}
        self.images: dict[int, Tensor] = {}

    @torch.no_grad()
    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, C) of the volumes and of the reports; only a chunk of the batch is on the device at a time."""
        text = []
        for ids, mask in zip(batch.ids.cpu(), batch.mask.cpu(), strict=True):
            ids = ids[mask.bool()]
            key = hashlib.sha256(ids.numpy().tobytes()).digest()
            found = self.texts.pop(key, None)
            if found is None:
                found = self._encode(self.model.encode_text, ids[None], torch.ones_like(ids)[None])[0]
            self.texts[key] = found  # the last used is the last
            if len(self.texts) > self.kept_reports:
                del self.texts[next(iter(self.texts))]
            text.append(found)
        if self.images_change:
            image = [self._encode(self.model.encode_image, part) for part in batch.volume.split(self.chunk)]
            return torch.cat(image), torch.stack(text)
        for row, volume in zip(batch.index, batch.volume, strict=True):
            if row not in self.images:
                self.images[row] = self._encode(self.model.encode_image, volume[None])[0]
        return torch.stack([self.images[row] for row in batch.index]), torch.stack(text)

    def _encode(self, encode: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return at_least_float32(encode(*(t.to(self.device) for t in inputs)))


class Guided(Contrastive):
    """Stage 2. The teacher's logits are scaled by the student's scale, as published, and carry no gradient."""

    def __init__(self, teacher: Teacher, weight: float, steps: int):
        self.teacher, self.weight, self.steps = teacher, weight, steps

    def loss(self, outputs: Outputs, batch: Batch, step: int) -> tuple[Tensor, dict]:
        logits, scale = self.logits(*outputs, batch), outputs[2]
        loss, numbers = self.of_logits(logits, scale)
        weight = relation_weight(step, self.weight, self.steps)
        if weight == 0:  # the teacher has nothing more to say
            return loss, numbers | {"relation": 0.0}
        features = self.teacher.features(batch) if batch.index else (x.detach() for x in outputs[:2])
        relation = relation_loss(logits, self.logits(*features, scale.detach(), batch))
        return loss + weight * relation, numbers | {"relation": relation.detach()}
