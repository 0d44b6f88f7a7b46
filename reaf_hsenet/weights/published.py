"""Published checkpoints, each recognised by the names of its tensors, never by a file's name.

docs/weights.md says where each comes from. A new family is a table in names.py and a row of `FAMILIES`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from reaf_hsenet.errors import InputError
from reaf_hsenet.files import find_folder, read_object
from reaf_hsenet.weights.files import SUFFIXES, State, read_weights_file, summary, weights_file
from reaf_hsenet.weights.names import (
    BERT,
    BIOMEDCLIP,
    CLASSIFIER,
    M3D_CLIP,
    REAF,
    TRUNK,
    VIT2D,
    Table,
    import_state,
    language_table,
)

# What a checkpoint's folder may hold that is of use: weights, settings, vocabularies.
FILES = [f"*{suffix}" for suffix in SUFFIXES]
FILES += ["*.index.json", "*config.json", "tokenizer*", "vocab*", "merges.txt"]
FILES += ["special_tokens_map.json", "added_tokens.json"]


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    name: as a user knows it. kind: dual, language, trunk, text, classifier, slices, decoder, adapter or run.
    signs: patterns, each of which begins a tensor's name. uses: what it is for, with the commands; FILE
    stands for the file, FOLDER for its folder. table: where its names go; decoders and adapters have modules
    of their own. starts: the --model whose dual encoder it can start.
    """

    key: str
    name: str
    kind: str
    signs: tuple[str, ...]
    uses: tuple[str, ...]
    table: Table = ()
    starts: str | None = None

    def fits(self, names: list[str]) -> bool:
        return all(any(re.match(sign, name) for name in names) for sign in self.signs)


WORDS = r"(bert\.|roberta\.|model\.)?embeddings\.word_embeddings\."
CONVERT = "python -m reaf_hsenet.weights convert FILE RUN"
EVALUATE = (
    "evaluate.py --task retrieval or zeroshot --run FILE --data DATA, or infer.py classify SCAN --run FILE; "
    f"or first {CONVERT}"
)
BENEATH = "the two encoders of HSENet's packers: convert PACKERS RUN --decoder DECODER --encoders FILE"
LANGUAGE = (
    "evaluate.py --task mrg --run FILE --decoder DECODER --encoders 2E3-CLIP --data DATA, or infer.py report "
    f"SCAN; or first {CONVERT} --decoder DECODER --encoders 2E3-CLIP"
)
START = "train.py --stage clip1 --init FILE"
INFLATE = (
    f"{START.replace('--init', '--model reaf --init')}: starts REAF's encoder, inflated to three dimensions"
)
TEXT = "train.py --stage clip1 --text-model FOLDER: starts the text encoder"
SLICES = "preprocess.py --slices FILE: encodes the slices that guide HSENet's stage 2"

# The first that fits is taken: what is more particular comes first.
FAMILIES = (
    Family(
        key="run-language",
        name="a language run of this project",
        kind="run",
        signs=(r"projectors\.\d+\.",),
        uses=("evaluate.py --task mrg or vqa --run RUN", "infer.py report SCAN --run RUN"),
    ),
    Family(
        key="run-dual",
        name="a dual-encoder run of this project",
        kind="run",
        signs=(r"vision\.cls_token$", r"text\.word_embed\."),
        uses=("evaluate.py --task retrieval --run RUN", "infer.py embed SCAN --run RUN", START),
    ),
    Family(
        key="hsenet-2e3",
        name="HSENet-2E3-CLIP",
        kind="dual",
        signs=(r"vision_encoder\.slice_guided_attention\.", r"language_encoder\."),
        uses=(EVALUATE, BENEATH),
        table=M3D_CLIP,
        starts="hsenet",
    ),
    Family(
        key="m3d-clip",
        name="M3D-CLIP or HSENet-CLIP",
        kind="dual",
        signs=(r"vision_encoder\.cls_token$", r"language_encoder\."),
        uses=(EVALUATE, START),
        table=M3D_CLIP,
        starts="hsenet",
    ),
    Family(
        key="m3d-trunk",
        name="the vision encoder of M3D-CLIP or HSENet",
        kind="trunk",
        signs=(r"vision_encoder\.",),
        uses=(START,),
        table=M3D_CLIP,
        starts="hsenet",
    ),
    Family(
        key="hsenet-language",
        name="HSENet's packers and adapters (HSENet-Phi-4-4B)",
        kind="language",
        signs=(r"(.*\.)?mm_projector\d*\.",),
        uses=(LANGUAGE,),
        table=language_table("spatial_packer"),
    ),
    Family(
        key="reaf",
        name="REAF",
        kind="dual",
        signs=(r"visual\.trunk\.fusion_layer\.", r"text\.transformer\."),
        uses=(EVALUATE, f"{START} --model reaf"),
        table=REAF,
        starts="reaf",
    ),
    Family(
        key="hlip",
        name="HLIP, single scan",
        kind="dual",
        signs=(r"visual\.trunk\.spatial_posemb$", r"text\.transformer\."),
        uses=(EVALUATE, f"{START} --model reaf"),
        table=REAF,
        starts="reaf",
    ),
    Family(
        key="biomedclip",
        name="BiomedCLIP",
        kind="slices",
        signs=(r"visual\.trunk\.pos_embed$",),
        uses=(SLICES,),
        table=BIOMEDCLIP,
    ),
    Family(
        key="trunk",
        name="the vision trunk of REAF or HLIP",
        kind="trunk",
        signs=(r"visual\.trunk\.|spatial_posemb$",),
        uses=(f"{START} --model reaf",),
        table=(*REAF, *TRUNK),
        starts="reaf",
    ),
    Family(
        key="classifier",
        name="a report classifier (RadBERT; CT-RATE's RadBertClassifier)",
        kind="classifier",
        signs=(WORDS, r"classifier\."),
        uses=("evaluate.py --task mrg --run RUN --classifier FOLDER: finds the 18 findings in reports",),
        table=CLASSIFIER,
    ),
    Family(
        key="cxr-bert",
        name="CXR-BERT",
        kind="text",
        signs=(WORDS, r"cls_projection_head\."),
        uses=(TEXT,),
        table=BERT,
    ),
    Family(
        key="bert",
        name="a BERT or RoBERTa (bert-base-uncased, BiomedBERT, RadBERT, ...)",
        kind="text",
        signs=(WORDS,),
        uses=(TEXT, "evaluate.py --task mrg --run RUN --bertscore FOLDER"),
        table=BERT,
    ),
    Family(
        key="adapter",
        name="a peft adapter",
        kind="adapter",
        signs=(r"base_model\.model\..*\.lora_A\.",),
        uses=("reaf_hsenet.weights.adapters.load_adapter(decoder, FOLDER)",),
    ),
    Family(
        key="mae",
        name="a MAE ViT",
        kind="slices",
        signs=(r"(mask_token$|decoder_)", r"pos_embed$", r"patch_embed\.proj\.weight$"),
        uses=(INFLATE, SLICES),
        table=VIT2D,
        starts="reaf",
    ),
    Family(
        key="vit",
        name="a 2D ViT (timm, MAE's encoder)",
        kind="slices",
        signs=(r"pos_embed$", r"patch_embed\.proj\.weight$"),
        uses=(INFLATE, SLICES),
        table=VIT2D,
        starts="reaf",
    ),
    Family(
        key="slice-encoder",
        name="a slice encoder of this project",
        kind="slices",
        signs=(r"pos_embed$", r"patch_embed\.weight$"),
        uses=(SLICES,),
    ),
    Family(
        key="decoder",
        name="a language decoder (Phi-3, Phi-4, Llama)",
        kind="decoder",
        signs=(r"model\.embed_tokens\.", r"model\.layers\.0\."),
        uses=(
            "train.py --stage mrg --decoder FOLDER",
            "reaf_hsenet.weights.decoder.load_decoder(FOLDER)",
        ),
    ),
)


@dataclass
class Published:
    """A checkpoint that was found.

    name: as it was named. tensors: under the published names, without `module.`. notes: what was assumed on
    the way, a sentence each.
    """

    name: str
    file: Path
    tensors: State
    family: Family
    notes: list[str] = field(default_factory=list)

    @cached_property
    def state(self) -> State:
        """The tensors under our names, still in the published shapes."""
        return import_state(self.family.table, self.tensors)

    @property
    def folder(self) -> Path:
        """Where the checkpoint's settings and vocabulary are."""
        return self.file.parent

    @property
    def settings(self) -> Path:
        return self.folder / "config.json"

    @cached_property
    def beside(self) -> dict:
        """The values of the config.json beside the file; empty without one."""
        return read_object(self.settings) if self.settings.is_file() else {}


def open_published(name: str, file: Path | None = None) -> Published:
    """Read and recognise a file, a folder or a hub id. file: where its weights are, if that is known.

    Raises InputError when nothing can be read, or for an unknown family.
    """
    if file is None:
        file = Path(name) if Path(name).is_file() else weights_file(find_folder(name, FILES))
    tensors = without_module(read_weights_file(file), name)
    family = recognise(tensors)
    if family is None:
        raise InputError(
            f"{name}: is of no known family: its {len(tensors)} tensors are "
            f"{summary(sorted(tensors))[:200] or 'none'}; see docs/weights.md for what is known"
        )
    return Published(name, file, tensors, family)


def recognise(names: Iterable[str]) -> Family | None:
    """Return the family of a checkpoint with tensors of these names; None for an unknown one."""
    names = list(names)
    return next((family for family in FAMILIES if family.fits(names)), None)


def without_module(state: State, source: str) -> State:
    """Return the state without the `module.` that torch's DistributedDataParallel puts before each name."""
    plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if len(plain) < len(state):
        raise InputError(
            f"{source}: has tensors with and without module.: export one model's state_dict alone"
        )
    return plain
