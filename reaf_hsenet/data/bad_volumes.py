"""Volumes that cannot be read while a run trains: named, counted, left out, the same on every rank.

A data set gives an Unreadable in place of such an item, and its batch is smaller: the order of samples and
what is drawn for the others stay as they are. A rank that is left with nothing computes one stand-in row,
whose outputs count for nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from reaf_hsenet import distributed
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError, first_six
from reaf_hsenet.progress import say


@dataclass(frozen=True)
class Unreadable:
    """A volume's id in the manifest, and why it cannot be read; the reason names the file."""

    id: str
    reason: str


class BadVolumes:
    """The distinct volumes that a run could not read, of which it tolerates `limit` (--max-bad).

    found: {id: reason}, the same on every rank. new: those of them that are not in the run's log yet.
    """

    def __init__(self, limit: int, ranks: Ranks):
        self.limit, self.ranks = limit, ranks
        self.found: dict[str, str] = {}
        self.new: list[Unreadable] = []

    def agree(self, met: Iterable[Unreadable]) -> None:
        """Share what each rank met. Raises InputError on all beyond the limit. All ranks call it together."""
        for one in (one for part in distributed.gather_objects(list(met)) for one in part):
            if one.id in self.found:
                continue
            self.found[one.id] = one.reason
            if len(self.found) > self.limit:
                count = f" (bad volume {len(self.found)}, with --max-bad {self.limit})" if self.limit else ""
                raise InputError(one.reason + count)
            self.new.append(one)
            if self.ranks.main:
                say(f"left out, {len(self.found)} of --max-bad {self.limit}: {one.id}: {one.reason}")

    def check(self, manifest: Manifest, splits: list[str], slices: bool) -> None:
        """Call Manifest.check, shared by the ranks: absent or cut volumes and slice features are bad."""
        met = []
        for split in splits:
            manifest.check_reports(split)
            for entry in self.ranks.share(manifest.entries(split)):
                try:
                    manifest.check_files(entry, slices)
                except InputError as error:
                    met.append(Unreadable(entry["id"], str(error)))
        self.agree(met)

    def exchange(self, batches: list, expected: int) -> None:
        """Exchange how many rows each rank could read of each batch (batch.counts).

        Where any is short, the unreadable volumes are shared. All ranks call it together, with a step's
        batches of `expected` rows each.
        """
        # One process alone has nothing to send: on its GPU, the rows would be waited for at every step.
        device = self.ranks.device if self.ranks.world > 1 else "cpu"
        rows = torch.tensor([len(batch.index) for batch in batches], device=device)
        by_rank = distributed.gather_equal(rows).tolist()
        for i, batch in enumerate(batches):
            batch.counts = [counts[i] for counts in by_rank]
        if any(count < expected for counts in by_rank for count in counts):
            self.agree(one for batch in batches for one in batch.bad)

    def restore(self, found: dict[str, str]) -> None:
        """Take up what a resumed run had found. Raises InputError when that is more than the limit."""
        self.new = [one for one in self.new if one.id not in found]
        self.found = {**found, **self.found}
        if len(self.found) > self.limit:
            raise InputError(
                f"--max-bad {self.limit}: this run has left out {len(self.found)} volumes already "
                f"({first_six(list(self.found))}); allow as many, or start another"
            )
