"""Volumes with a question and its answer -> batches for the language model: of reports, or of questions."""

import numpy as np
import torch
from torch import Tensor

from reaf_hsenet.data.feature_cache import FeatureCache
from reaf_hsenet.data.language import (
    IGNORED,
    LanguageExample,
    collate_examples,
    language_example,
    question_text,
)
from reaf_hsenet.data.loader import Sample, VolumeDataset, read_slices
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.questions import question_answer, questions, report_prompt, report_prompts
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.errors import InputError
from reaf_hsenet.tokenizer.tokenizer import Tokenizer


class LanguageDataset(VolumeDataset):
    """task `mrg`: every volume with its report. A kind of questions: every one with its volume.

    image_tokens: visual tokens that the model makes of a volume, which max_text includes.
    prompt: one for all reports, in place of the published ones that are drawn.
    cache: the encoders' features, read in place of volumes.
    templates: of questions, in place of the tables' own.
    truth: findings of each volume, (K,), by its id. cue_dropout: share of rows without a cue.
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
        templates: tuple[str, ...] | None = None,
        truth: dict[str, Tensor] | None = None,
        cue_dropout: float = 0.0,
        **more,
    ):
        super().__init__(manifest, split, tokenizer, max_text, **more)
        every = [(i, None) for i in range(len(self.entries))]
        self.rows = every if task == "mrg" else questions(manifest, split, task)
        self.task, self.image_tokens, self.prompt, self.cache = task, image_tokens, prompt, cache
        self.templates, self.truth, self.cue_dropout = templates, truth, cue_dropout

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

    def text(self, row: int, rng: np.random.Generator) -> tuple[str, str]:
        """Return (question, answer) of a row. As published, a report has no quotes and brackets."""
        entry, asked = self.entry(row), self.rows[row][1]
        if asked is None:
            return self.prompt or report_prompt(rng), clean_report(entry["text"])
        return question_answer(asked, rng, self.templates)

    def with_text(self, sample: Sample, epoch: int, rng: np.random.Generator) -> Sample:
        prompt, answer = self.text(sample.row, rng)
        question = question_text(self.tokenizer, prompt, self.image_tokens)
        example = language_example(self.tokenizer, question, answer, self.max_text)
        sample = self.augmented(sample._replace(text=example), rng)
        if self.truth is None:
            return sample
        # Drawn last, by (seed, epoch, row): the same on any number of ranks, and all else as without cues.
        truth = self.truth[self.name(sample.row)]
        draws = torch.from_numpy(rng.random(len(truth), np.float32))
        if rng.random() < self.cue_dropout:
            draws.fill_(torch.nan)
        return sample._replace(findings=torch.stack((truth, draws)))

    def collate_text(self, texts: tuple[LanguageExample]) -> dict[str, Tensor]:
        return dict(zip(("ids", "mask", "labels"), collate_examples(self.tokenizer, texts), strict=True))

    def empty_text(self) -> LanguageExample:
        question = question_text(self.tokenizer, report_prompts()[0], self.image_tokens)
        ids = self.tokenizer.encode(question, self.max_text, special_tokens=False)
        return LanguageExample(ids, [1] * len(ids), [IGNORED] * len(ids))

    def stand_in(self) -> Sample:
        # Nothing is known of a scan that nobody could read.
        if self.truth is None:
            return super().stand_in()
        unknown = torch.full_like(next(iter(self.truth.values())), torch.nan)
        return super().stand_in()._replace(findings=torch.stack((unknown, unknown)))

    def read(self, entry: dict) -> tuple:
        if self.cache is None:
            return super().read(entry)
        return None, read_slices(self.manifest, entry) if self.slices else None, self.cache.read(entry)

    def empty(self) -> tuple:
        volume, slices = super().empty()
        return (volume, slices) if self.cache is None else (None, slices, self.cache.empty())
