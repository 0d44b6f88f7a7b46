"""Volumes with a question and its answer -> batches for the language model: of reports, or of questions."""

import numpy as np
from torch import Tensor

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
from reaf_hsenet.data.loader import Sample, VolumeDataset, read_slices
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.questions import LIST_QUESTION, label_list, question_answer, questions, report_prompt
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.errors import InputError
from reaf_hsenet.tokenizer.tokenizer import Tokenizer


class LanguageDataset(VolumeDataset):
    """task `mrg`: every volume with its report. A kind of questions: every one with its volume.

    image_tokens: visual tokens that the model makes of a volume, which max_text includes.
    prompt: one for all reports, in place of the published ones that are drawn.
    cache: the encoders' features, read in place of volumes.
    templates: of questions, in place of the tables' own.
    list_epochs: in these first epochs every row asks for the list of its scan's labels. Where the tokenizer
        has tokens for labels, a report to be learned begins with that list.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        task: str,
        tokenizer: Tokenizer,
        image_tokens: int,
        max_text: int,
        prompt: str | None = None,
        cache: FeatureCache | None = None,
        list_epochs: int = 0,
        templates: tuple[str, ...] | None = None,
        **more,
    ):
        super().__init__(manifest, split, tokenizer, max_text, **more)
        every = [(i, None) for i in range(len(self.entries))]
        self.rows = every if task == "mrg" else questions(manifest, split, task)
        self.task, self.image_tokens, self.prompt, self.cache = task, image_tokens, prompt, cache
        self.list_epochs, self.templates, self.listed = list_epochs, templates, LIST_END in tokenizer.ids

    def __len__(self) -> int:
        return len(self.rows)

    def entry(self, row: int) -> dict:
        return self.entries[self.rows[row][0]]

    def check_questions(self) -> None:
        """Raise InputError for a question of the tables that leaves no room for an answer."""
        if self.templates is not None:
            return
        own = {
            asked["question"]: i for i, (_, asked) in enumerate(self.rows) if asked and asked.get("question")
        }
        for question, row in own.items():
            try:
                text = question_text(self.tokenizer, question, self.image_tokens)
                language_example(self.tokenizer, text, "", self.max_text)
            except InputError as error:
                raise InputError(f"{self.manifest.name}: {self.name(row)}: {error}") from error

    def text(self, row: int, rng: np.random.Generator, epoch: int | None = None) -> tuple[str, str]:
        """Return (question, answer) of a row. As published, a report has no quotes and brackets."""
        entry, asked = self.entry(row), self.rows[row][1]
        if epoch is not None and epoch < self.list_epochs:
            listed = self.label_tokens(entry) if self.listed else label_list(self.manifest, entry)
            return LIST_QUESTION, listed
        if asked is None:
            named = self.label_tokens(entry) if self.listed and epoch is not None else ""
            return self.prompt or report_prompt(rng), named + clean_report(entry["text"])
        return question_answer(asked, rng, self.templates)

    def label_tokens(self, entry: dict) -> str:
        present = zip(self.manifest.labels, entry["labels"], strict=True)
        return "".join(label_token(name) for name, value in present if value) + LIST_END

    def with_text(self, sample: Sample, epoch: int, rng: np.random.Generator) -> Sample:
        prompt, answer = self.text(sample.row, rng, epoch)
        question = question_text(self.tokenizer, prompt, self.image_tokens)
        example = language_example(self.tokenizer, question, answer, self.max_text)
        return self.augmented(sample._replace(text=example), rng)

    def collate_text(self, texts: tuple[LanguageExample]) -> dict[str, Tensor]:
        return dict(zip(("ids", "mask", "labels"), collate_examples(self.tokenizer, texts), strict=True))

    def empty_text(self) -> LanguageExample:
        question = question_text(self.tokenizer, LIST_QUESTION, self.image_tokens)
        ids = self.tokenizer.encode(question, self.max_text, special_tokens=False)
        return LanguageExample(ids, [1] * len(ids), [IGNORED] * len(ids))

    def read(self, entry: dict) -> tuple:
        if self.cache is None:
            return super().read(entry)
        return None, read_slices(self.manifest, entry) if self.slices else None, self.cache.read(entry)

    def empty(self) -> tuple:
        volume, slices = super().empty()
        return (volume, slices) if self.cache is None else (None, slices, self.cache.empty())
