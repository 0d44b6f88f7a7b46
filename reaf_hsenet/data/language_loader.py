"""Prepared volumes with a question and its answer -> batches for the language model: of reports, or of
questions.

As in loader.py an item is asked for as (epoch, row), and its randomness (prompt, augmentation) depends on
seed and both.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reaf_hsenet.config import Augmentation
from reaf_hsenet.data.augment import augment_with_slices
from reaf_hsenet.data.bad_volumes import Unreadable
from reaf_hsenet.data.feature_cache import FeatureCache
from reaf_hsenet.data.language import (
    IGNORED,
    LIST_END,
    LanguageExample,
    collate_examples,
    label_token,
    language_example,
    question_text,
)
from reaf_hsenet.data.loader import empty_sample, part_unreadable, read_sample, read_slices, with_tensors
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.questions import LIST_QUESTION, label_list, question_answer, questions, report_prompt
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.errors import InputError
from reaf_hsenet.tokenizer.tokenizer import Tokenizer


@dataclass
class LanguageBatch:
    """ids, mask, labels: (B, T), labels -100 where nothing is learned. volume: (B, 1, D, H, W), or in its
    place
    features: (B, N, C) of every encoder. slices: (B, S, C) or None. index: rows of the data set; empty when
    the one row is a stand-in, of whose tokens none is learned. bad: what could not be read. counts: rows of
    every rank's batch.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    volume: Tensor | None
    slices: Tensor | None
    index: list[int]
    features: list[Tensor] | None = None
    bad: list[Unreadable] = field(default_factory=list)
    counts: list[int] | None = None

    def to(self, device: torch.device) -> "LanguageBatch":
        return with_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "LanguageBatch":
        return with_tensors(self, Tensor.pin_memory)


class LanguageDataset(Dataset):
    """task `mrg`: every volume with its report. Otherwise a kind of questions: every question with its
    volume.

    image_tokens: visual tokens that the model makes of a volume. max_text: tokens, image tokens included.
    prompt: one for all reports, in place of the published ones that are drawn. cache: of the encoders'
    features, read in place of volumes.
    templates: of questions, in place of the tables' own. list_epochs: in these first epochs every row asks
    for the list of its scan's labels. Where the tokenizer has tokens for labels, a report to be learned
    begins with that list.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        task: str,
        tokenizer: Tokenizer,
        image_tokens: int,
        max_text: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        slices: bool = False,
        slices_follow: bool = True,
        prompt: str | None = None,
        cache: FeatureCache | None = None,
        list_epochs: int = 0,
        templates: tuple[str, ...] | None = None,
    ):
        self.manifest, self.entries, self.task = manifest, manifest.entries(split), task
        self.rows = (
            [(i, None) for i in range(len(self.entries))]
            if task == "mrg"
            else questions(manifest, split, task)
        )
        self.tokenizer, self.image_tokens, self.max_text = tokenizer, image_tokens, max_text
        self.augmentation, self.seed, self.prompt, self.cache = augmentation, seed, prompt, cache
        self.slices, self.slices_follow, self.list_epochs = slices, slices_follow, list_epochs
        self.templates = templates
        self.listed = LIST_END in tokenizer.ids

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, row: int) -> str:
        return self.entries[self.rows[row][0]]["id"]

    def check_questions(self) -> None:
        """Raises InputError for a question of the tables that leaves no room for an answer: now, not when
        its row is reached.
        """
        rows = enumerate(self.rows) if self.templates is None else ()
        own = {
            asked["question"]: self.name(row) for row, (_, asked) in rows if asked and asked.get("question")
        }
        for question, name in own.items():
            try:
                text = question_text(self.tokenizer, question, self.image_tokens)
                language_example(self.tokenizer, text, "", self.max_text)
            except InputError as error:
                raise InputError(f"{self.manifest.name}: {name}: {error}") from error

    def text(self, row: int, rng: np.random.Generator, epoch: int | None = None) -> tuple[str, str]:
        """(question, answer) of a row, in an epoch of training; a report without quotes and brackets, as
        published.
        """
        entry, asked = self.entries[self.rows[row][0]], self.rows[row][1]
        if epoch is not None and epoch < self.list_epochs:
            return LIST_QUESTION, self.label_tokens(entry) if self.listed else label_list(
                self.manifest, entry
            )
        if asked is None:
            named = self.label_tokens(entry) if self.listed and epoch is not None else ""
            return self.prompt or report_prompt(rng), named + clean_report(entry["text"])
        return question_answer(asked, rng, self.templates)

    def label_tokens(self, entry: dict) -> str:
        present = zip(self.manifest.labels, entry["labels"], strict=True)
        return "".join(label_token(name) for name, value in present if value) + LIST_END

    def __getitem__(self, key: tuple[int, int]):
        epoch, row = key
        rng = np.random.default_rng((self.seed, epoch, row))
        entry = self.entries[self.rows[row][0]]
        sample = self.read(entry)
        if isinstance(sample, Unreadable):
            return sample
        volume, slices, features = sample
        try:
            prompt, answer = self.text(row, rng, epoch)
            question = question_text(self.tokenizer, prompt, self.image_tokens)
            example = language_example(self.tokenizer, question, answer, self.max_text)
        except InputError as error:
            return error  # raised by the main process: a worker's exception would carry its traceback
        if self.augmentation is not None and volume is not None:
            volume, following = augment_with_slices(volume, slices, self.augmentation, rng)
            slices = following if self.slices_follow else slices
        return example, volume, slices, row, features

    def read(self, entry: dict) -> tuple[Tensor | None, Tensor | None, list[Tensor] | None] | Unreadable:
        """(volume, slices, features) of an entry, as far as this data set has them."""
        if self.cache is None:
            sample = read_sample(self.manifest, entry, self.slices)
            return sample if isinstance(sample, Unreadable) else (*sample, None)
        try:
            return None, read_slices(self.manifest, entry) if self.slices else None, self.cache.read(entry)
        except InputError as error:
            return Unreadable(entry["id"], str(error))

    def collate(self, items: list) -> LanguageBatch | InputError:
        for item in items:
            if isinstance(item, InputError):
                return item
        good, bad = part_unreadable(items)
        examples, volumes, slices, index, features = zip(*(good or [self.stand_in()]), strict=True)
        text = collate_examples(self.tokenizer, [LanguageExample(*e) for e in examples])
        return LanguageBatch(
            *text,
            None if self.cache else torch.stack(volumes),
            torch.stack(slices) if self.slices else None,
            list(index) if good else [],
            [torch.stack(encoder) for encoder in zip(*features, strict=True)] if self.cache else None,
            bad,
        )

    def stand_in(self) -> tuple:
        volume, slices = empty_sample(self.manifest, self.slices)
        question = question_text(self.tokenizer, LIST_QUESTION, self.image_tokens)
        ids = self.tokenizer.encode(question, self.max_text, special_tokens=False)
        example = LanguageExample(ids, [1] * len(ids), [IGNORED] * len(ids))
        return example, None if self.cache else volume, slices, -1, self.cache and self.cache.empty()
