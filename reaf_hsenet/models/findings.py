"""A head that predicts findings from the encoders' tokens, before the decoder writes. Ours, not HSENet's.

patch tokens (B, N, C) of every encoder -> their means, standardised -> one linear layer -> logits (B, K). The
predictions become words of the decoder's prompt, its cues (train/cues.py; docs/method.md has the equations).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_WEIGHT = 10.0  # of a rare finding's presence in the loss
LEAST_STD = 1e-6  # of pooled tokens
SCALE = 10.0  # of the logits: the layer learns as much faster, and weights move little in a short run


class FindingsHead(nn.Module):
    """Logits of K findings, the thresholds that decide between them, and their error rates.

    widths: C of each encoder. findings: (label, place), a place under its label. dropout: share of training
    rows without any cue; with 1 the decoder has never seen one, and gets none.

    A checkpoint holds its buffers, too. mean, std: of the pooled tokens, (sum of C,). The others are (K,).
    prior: share of training volumes with each finding. thresholds: of probabilities. missed, invented: P(not
    predicted | there) and P(predicted | not there), on the volumes that the run is validated on; places count
    where their label is predicted.
    """

    def __init__(self, widths: list[int], findings: tuple[tuple[str, str], ...], dropout: float):
        super().__init__()
        self.dropout, count = dropout, len(findings)
        labels = {label: i for i, (label, place) in enumerate(findings) if not place}
        self.linear = nn.Linear(sum(widths), count)
        nn.init.normal_(self.linear.weight, std=0.02 / SCALE)
        nn.init.zeros_(self.linear.bias)
        for name, value in ("mean", 0.0), ("std", 1.0):
            self.register_buffer(name, torch.full((sum(widths),), value))
        for name, value in ("prior", 0.5), ("thresholds", 0.5), ("missed", 0.2), ("invented", 0.1):
            self.register_buffer(name, torch.full((count,), value))
        # The label of each finding: a place is told only with it.
        self.register_buffer("label", torch.tensor([labels[label] for label, _ in findings]), False)

    def pool(self, features: list[Tensor]) -> Tensor:
        """Return (B, sum of C): the mean token of every encoder."""
        return torch.cat([tokens.float().mean(1) for tokens in features], dim=1)

    @torch.no_grad()
    def start(self, pooled: Tensor, truth: Tensor) -> None:
        """Set what does not learn, from `pool` of some training volumes and the findings of all, (N, K).

        A mean token differs little between patients: without this scale the head learns for epochs to enlarge
        the difference.
        """
        self.mean.copy_(pooled.mean(0))
        std = pooled.std(0, correction=0)
        self.std.copy_(torch.where(std > LEAST_STD, std, 1.0))  # copies of one scan differ by nothing
        known = truth.isfinite()
        self.prior.copy_((truth.nan_to_num().sum(0) + 1) / (known.sum(0) + 2))
        self.linear.bias.copy_((self.prior.logit() + self._weight().log()) / SCALE)

    def _weight(self) -> Tensor:
        """Return the weight of a finding's presence: as if half of the volumes had it, up to MOST_WEIGHT."""
        return (1 / self.prior - 1).clamp(1 / MOST_WEIGHT, MOST_WEIGHT)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return logits (B, K) float32, of weighted findings: see `probabilities`."""
        x = (self.pool(features) - self.mean) / self.std
        # In float32 wherever it is called, so that what is shown is what is told.
        with torch.autocast(x.device.type, enabled=False):
            return SCALE * F.linear(x, self.linear.weight.float(), self.linear.bias.float())

    def loss(self, logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of weighted cross-entropies of what is known, and its number, both scalars.

        truth: (B, K); NaN is unknown.
        """
        known = truth.isfinite()
        losses = F.binary_cross_entropy_with_logits(
            logits, truth.nan_to_num(), pos_weight=self._weight(), reduction="none"
        )
        return (losses * known).sum(), known.sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return (B, K) probabilities. A weight w in the loss has added log w to the logits."""
        return (logits - self._weight().log()).sigmoid()

    def predicted(self, logits: Tensor) -> Tensor:
        """Return (B, K) bool: what is above its threshold, and its label too."""
        return self.under_labels(self.probabilities(logits) > self.thresholds)

    def under_labels(self, told: Tensor) -> Tensor:
        return told & told[:, self.label]

    def noisy(self, truth: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cues of training rows, (B, K) bool, and which rows have any, (B,).

        Each finding is wrong as often as the head's prediction of it is: where its draw is below that rate.
        draws: (B, K), uniform in [0, 1), and NaN in rows without a cue.
        """
        there = truth.nan_to_num() > 0.5
        wrong = draws < torch.where(there, self.missed, self.invented)
        # A row whose labels are not known has no cue.
        labels = self.label == torch.arange(len(self.label), device=truth.device)
        kept = truth[:, labels].isfinite().all(1) & draws.isfinite().all(1)
        return self.under_labels(there ^ (wrong & truth.isfinite())), kept

    @torch.no_grad()
    def measure(self, probabilities: Tensor, truth: Tensor, thresholds: Tensor) -> None:
        """Take thresholds, and measure the error rates that training then imitates. Both inputs: (N, K)."""
        self.thresholds.copy_(thresholds)
        told, label = probabilities > thresholds, self.label.to(truth.device)
        there, known = truth.nan_to_num() > 0.5, truth.isfinite()
        places = label != torch.arange(len(label), device=truth.device)
        known &= told[:, label] | ~places

        # As if two more had been seen at the rate so far, which stays where none is seen.
        def update(rate: Tensor, wrong: Tensor, of: Tensor) -> None:
            rate.copy_(((wrong & of).sum(0) + 2 * rate.cpu()) / (of.sum(0) + 2))

        update(self.missed, ~told, there & known)
        update(self.invented, told, ~there & known)
