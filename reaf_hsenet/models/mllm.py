"""A language model that sees a CT: frozen 3D encoders, a projector each, and a decoder.

volume (B, 1, D, H, W) -> patch tokens (B, N, C) of every encoder -> visual tokens (B, K, W), which take the
places after bos in the decoder's input. Source: HSENet (c7198f3), whose two encoders are those of stage 1 and
stage 2. With cues, which are ours, what a head finds in these patch tokens stands as words between image and
prompt.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.findings import FindingsHead
from reaf_hsenet.models.packer import Projector
from reaf_hsenet.models.slice_guidance import ViT2E3


class Mllm(nn.Module):
    """Encoders, projectors and decoder.

    encoders: in the order of their visual tokens. projectors: one for each, or one that all share. findings:
    predicts what the cues say. cue_ids: set by who knows the vocabulary: (K,) of bool -> token ids of a cue.
    """

    cue_ids: Callable[[Sequence[bool]], list[int]]

    def __init__(
        self,
        encoders: list[nn.Module],
        projectors: list[Projector],
        decoder: Decoder,
        findings: FindingsHead | None = None,
    ):
        super().__init__()
        if len(projectors) not in (1, len(encoders)):
            raise ValueError(
                f"{len(projectors)} projectors for {len(encoders)} encoders: expected one, or one for each"
            )
        self.encoders = nn.ModuleList(encoders).requires_grad_(False)
        self.projectors, self.decoder, self.findings = nn.ModuleList(projectors), decoder, findings
        self.frozen_dropout = False
        # A shared projector serves every encoder.
        self.visual_tokens = sum(self.projector(i).visual_tokens for i in range(len(encoders)))

    def projector(self, i: int) -> Projector:
        return self.projectors[i % len(self.projectors)]

    def train(self, mode: bool = True) -> "Mllm":
        """Switch to training. Frozen encoders stay in evaluation mode, unless `frozen_dropout`."""
        super().train(mode)
        for encoder in self.encoders:
            encoder.train(
                mode and (self.frozen_dropout or any(p.requires_grad for p in encoder.parameters()))
            )
        return self

    def features(self, volume: Tensor, slices: Tensor | None = None) -> list[Tensor]:
        """Return patch tokens (B, N, C) of every encoder, without class token. slices: (B, S, C_2d)."""
        found = []
        for encoder in self.encoders:
            with torch.set_grad_enabled(
                torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
            ):
                tokens = encoder(volume, slices) if isinstance(encoder, ViT2E3) else encoder(volume)
            found.append(tokens[:, 1:])
        return found

    def visual(
        self,
        features: list[Tensor],
        slices: Tensor | None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Return visual tokens (B, K, W): the packed tokens of one encoder after the other."""
        packed = [self.projector(i)(x, slices, text, text_mask) for i, x in enumerate(features)]
        return torch.cat(packed, dim=1)

    def embed(
        self, ids: Tensor, features: list[Tensor], slices: Tensor | None = None, asked: Tensor | None = None
    ) -> Tensor:
        """Return embeddings (B, T, W) of ids (B, T), with visual tokens in the places of the K image tokens.

        asked: (B, T), nonzero at the question's tokens, for a projector that is guided by them.
        """
        x, end = self.decoder.embed_tokens(ids), 1 + self.visual_tokens
        if ids.shape[1] < end:
            raise ValueError(
                f"{ids.shape[1]} tokens, expected bos and {self.visual_tokens} image tokens at least"
            )
        text_mask = None if asked is None else asked[:, end:]
        visual = self.visual(features, slices, x[:, end:].to(features[0].dtype), text_mask)
        return torch.cat((x[:, :1], visual.to(x.dtype), x[:, end:]), dim=1)

    def predicted_cues(self, logits: Tensor) -> list[list[int]]:
        """Return the token ids of each row's cue, by the head's logits (B, K).

        A decoder that was trained without any cue (dropout 1) gets none.
        """
        if self.findings.dropout == 1:
            return [[]] * len(logits)
        return [self.cue_ids(row) for row in self.findings.predicted(logits).tolist()]

    def training_cues(self, findings: Tensor) -> list[list[int]]:
        """Return the token ids of each row's cue: the truth with the head's errors, or none at all."""
        told, kept = self.findings.noisy(*findings.unbind(1))
        pairs = zip(told.tolist(), kept.tolist(), strict=True)
        return [self.cue_ids(row) if with_cue else [] for row, with_cue in pairs]

    def with_cues(
        self, cues: list[list[int]], ids: Tensor, mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, mask and labels, (B, T), with a cue after each row's image tokens, padded on the right.

        All of a cue is attended to, nothing of it is learned.
        """
        at, longest = 1 + self.visual_tokens, max(map(len, cues))

        def inserted(rows: Tensor, added: list[list[int]], pad: int) -> Tensor:
            parts = [
                torch.cat((row[:at], row.new_tensor(new), row[at:], row.new_full((longest - len(new),), pad)))
                for row, new in zip(rows, added, strict=True)
            ]
            return torch.stack(parts)

        seen, unlearned = [[1] * len(cue) for cue in cues], [[-100] * len(cue) for cue in cues]
        return inserted(ids, cues, 0), inserted(mask, seen, 0), inserted(labels, unlearned, -100)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        volume: Tensor | None = None,
        slices: Tensor | None = None,
        features: list[Tensor] | None = None,
        findings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of the answers' cross-entropies, the number of target tokens, and the head's logits.

        labels: (B, T), -100 where nothing is learned. features: as `features` returns them, if known already.
        findings: (B, 2, K), the truth, where NaN is unknown, and the draws of FindingsHead.noisy. In training
        the cues are of these, else of what the head predicts. Logits of tokens are computed at the targets
        only: a vocabulary of 200,000 at all of them would be the largest tensor by far. Without a head its
        logits are (B, 0).
        """
        features = self.features(volume, slices) if features is None else features
        found = features[0].new_zeros(len(ids), 0)
        if self.findings is not None:
            found = self.findings(features)
            cues = self.training_cues(findings) if self.training else self.predicted_cues(found)
            if any(cues):
                ids, mask, labels = self.with_cues(cues, ids, mask, labels)
        x = self.decoder.hidden(self.embed(ids, features, slices, mask.bool() & (labels == -100)), mask)
        learned = labels[:, 1:] != -100
        logits = self.decoder.logits(x[:, :-1][learned])
        loss = F.cross_entropy(logits.float(), labels[:, 1:][learned], reduction="sum")
        return loss, learned.sum(), found
