"""How large a run is: memory of a GPU, bytes sent a step, storage, and the step time that stated assumptions
give.

    PYTHONPATH=. python benchmarks/sizing.py [--share 0.35] [--peak 989e12] [--node 300e9] [--network 40e9]

Writes the tables of docs/clusters.md, between its marks; two minutes, no GPU. Counted, from the modules
themselves without any data: parameters, FLOPs, and the tensors that autograd keeps for the backward pass. By
formula: all else (`Sizes`, `Traffic`, `step_seconds`). Assumed: what the flags say. tests/test_sizing.py
compares Traffic with what two ranks send.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # tensors with shapes and without values
from torch.utils.flop_counter import FlopCounterMode

from decoder import phi4mini
from reaf_hsenet.config import RECIPES, TEXT_LENGTH, ClipConfig, GuidedVisionConfig
from reaf_hsenet.models.build import build_mllm
from reaf_hsenet.models.clip import build_dual_encoder, freeze_text, set_grad_checkpoint
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.presets import PRESETS, stage_config

DOCUMENT = Path(__file__).parent.parent / "docs/clusters.md"
START, END = "<!-- sizing -->", "<!-- end of sizing -->"
GB, VOLUMES, NODE = 1e9, 50_000, 8  # bytes; of the example; GPUs a node
BATCHES, WORLDS = (1, 4, 16, 64), (8, 64, 512)
PROMPT = 32  # tokens of a language input that are not learned, beside the visual ones


@dataclass(frozen=True)
class Case:
    """A stage with its preset. forward(model, rows): a scalar to go backward from. frozen: parameters beside
    the model, of a teacher; teacher: its FLOPs a sample. text: columns of what a rank gathers, for the
    contrastive stages.
    """

    name: str
    batch: int
    build: Callable[[], nn.Module]
    forward: Callable[[nn.Module, int], Tensor]
    checkpoint: Callable[[nn.Module, bool], None]
    embed: int = 0
    frozen: int = 0
    teacher: float = 0.0
    sharded: bool = False
    checkpointed: bool = False  # by the recipe


@dataclass(frozen=True)
class Sizes:
    """Counts of a case. weights: bytes by precision. gathered: bytes that FSDP gathers at a time, by
    precision.

    kept: bytes that autograd keeps, {(precision, checkpointed): (of any batch, of a sample)}. blocks: over
    which a checkpointed pass spreads what it computes again. flops, again: of a sample, forward and backward;
    of the forward pass that --grad-checkpoint repeats.
    """

    case: Case
    parameters: int
    trained: int
    weights: dict[str, int]
    gathered: dict[str, int]
    blocks: int
    kept: dict[tuple[str, bool], tuple[int, int]]
    flops: float
    again: float

    def fixed(self, world: int, precision: str = "bf16") -> dict[str, float]:
        """Bytes that no batch changes. float32: 4 a parameter, 4 a gradient, 8 of AdamW; DDP's buckets
        repeat the gradients.
        """
        parts = world if self.case.sharded else 1
        held = {
            "weights": self.weights[precision] / parts + self.gathered[precision] + 4 * self.case.frozen,
            "gradients": 4 * self.trained / parts,
            "AdamW": 8 * self.trained / parts,
        }
        return held | {"buckets": 0 if self.case.sharded or world == 1 else 4 * self.trained}

    def activations(self, batch: int, precision: str, checkpointed: bool) -> float:
        """Bytes at the end of the forward pass; checkpointed, with one block computed again."""
        common, each = self.kept[precision, checkpointed]
        again = (self.kept[precision, False][1] - each) / self.blocks if checkpointed else 0
        return common + batch * (each + again)

    def memory(self, batch: int, precision: str, checkpointed: bool, world: int) -> float:
        """Bytes of a GPU, without the allocator's slack and the libraries' own (1 to 2 GB)."""
        logits = (
            4 * 4 * (world * batch) ** 2 if self.case.embed else 0
        )  # of the gathered batch, in four copies
        return (
            sum(self.fixed(world, precision).values())
            + self.activations(batch, precision, checkpointed)
            + logits
        )


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank hands to collectives in a step: their payload, of `accumulate` batches.

    gradients: DDP's all-reduce, once a step. embeddings: image and text, all-gathered. numbers: row counts
    (int64) and answer tokens of each batch, and once loss, norm and signal. parameters: its parts of the
    weights, all-gathered by FSDP before the forward and the backward pass. reduced: gradients,
    reduce-scattered by FSDP after each batch.
    """

    gradients: int = 0
    embeddings: int = 0
    numbers: int = 0
    parameters: int = 0
    reduced: int = 0

    def sent(self, world: int) -> float:
        """Bytes that leave a rank when every collective goes around a ring."""
        others = world - 1
        return (
            2 * others / world * self.gradients
            + others * (self.embeddings + self.numbers + self.parameters)
            + (others / world * self.reduced)
        )


def traffic(trained: int, batch: int, embed: int, accumulate: int = 1) -> Traffic:
    """Of a stage under DDP; embed 0: a language stage."""
    gathered = 2 * 4 * batch * embed * accumulate
    return Traffic(4 * trained, gathered, (8 + (0 if embed else 4)) * accumulate + 12)


def sharded_traffic(model: Mllm, world: int, half: bool, accumulate: int = 1) -> Traffic:
    """Of --shard. Blocks and encoders are gathered twice, frozen ones too, which FSDP fetches ahead of
    the backward pass; embeddings, projectors and norms stay gathered.
    """

    def part(
        parameters,
    ) -> int:  # a rank's rows, in FSDP's layout: the first axis is padded to the number of ranks
        return sum(-(-len(p) // world) * p[0].numel() if p.ndim else 1 for p in parameters)

    blocks, encoders = list(model.decoder.layers.parameters()), list(model.encoders.parameters())
    apart = {id(p) for p in (*blocks, *encoders)}
    root = [p for p in model.parameters() if id(p) not in apart]
    in_type = 2 if half else 4
    gathered = in_type * (2 * part(blocks) + part(root)) + 2 * 4 * part(encoders)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Traffic(0, 0, 12 * accumulate + 12, gathered * accumulate, 4 * world * part(trained) * accumulate)


def step_seconds(sizes: Sizes, world: int, sent: float, given: argparse.Namespace) -> float:
    """Computing, and what of the sending the backward pass does not hide.

    FLOPs / (share * peak); the slowest link carries all that a rank sends: NVLink within a node, the network
    beyond.
    """
    rate = given.share * given.peak
    flops = sizes.flops + sizes.case.checkpointed * sizes.again + sizes.case.teacher
    computing = sizes.case.batch * flops / rate
    sending = sent / (given.node if world <= NODE else given.network)
    return computing + max(0.0, sending - computing / 2)  # half of a step, at least, is backward


def count(case: Case) -> Sizes:
    """Run a case without data: under FakeTensorMode tensors have a shape and a type, and no memory."""
    weights, gathered, kept = {}, {}, {}
    for precision in ("fp32", "bf16"):
        with torch.device("meta"):
            model = case.build().train()
        weights[precision], gathered[precision] = as_held(case, model, precision)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = model.to_empty(device="cpu")
            for checkpointed in (False, True):
                case.checkpoint(model, checkpointed)
                one, two = (
                    kept_bytes(model, lambda n=n, m=model: case.forward(m, n), precision) for n in (1, 2)
                )
                kept[precision, checkpointed] = 2 * one - two, two - one
            if precision == "fp32":
                case.checkpoint(model, False)
                with FlopCounterMode(display=False) as counter:
                    loss = case.forward(model, 1)
                    forward = counter.get_total_flops()
                    loss.backward()
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    blocks = len(model.decoder.layers) if isinstance(model, Mllm) else len(model.vision.blocks)
    return Sizes(
        case,
        parameters,
        trained=trained,
        weights=weights,
        gathered=gathered,
        blocks=blocks,
        kept=kept,
        flops=counter.get_total_flops(),
        again=forward,
    )


def as_held(case: Case, model: nn.Module, precision: str) -> tuple[int, int]:
    """Give parameters the type they are computed from; (bytes of the weights, all ranks' together; gathered
    at a time).

    A frozen decoder is held in bf16. FSDP gathers the decoder and the projectors in bf16, two blocks beside
    the rest.
    """
    held = 4 * sum(p.numel() for p in model.parameters())
    if not isinstance(model, Mllm):
        return held, 0
    if precision == "bf16":
        parts = (model.decoder, model.projectors) if case.sharded else (model.decoder,)
        for parameter in (p for part in parts for p in part.parameters()):
            if case.sharded or not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    held = held if case.sharded else sum(p.nbytes for p in model.parameters())
    blocks = [sum(p.nbytes for p in block.parameters()) for block in model.decoder.layers]
    rest = sum(p.nbytes for part in (model.decoder, model.projectors) for p in part.parameters()) - sum(
        blocks
    )
    return held, rest + 2 * max(blocks) if case.sharded else 0


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor], precision: str) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass, the parameters themselves
    left out.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other gets its number
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        loss = forward()
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def contrastive(name: str, stage: str, config: ClipConfig, **more) -> Case:
    def build() -> nn.Module:
        model = build_dual_encoder(config)
        if settings.text_blocks is not None:
            freeze_text(model, settings.text_blocks)
        return model

    def forward(model: nn.Module, rows: int) -> Tensor:
        ids = torch.zeros(rows, config.max_text, dtype=torch.long)
        slices = (
            torch.empty(rows, config.vision.slices, config.vision.slice_width) if stage == "clip2" else None
        )
        image, text, scale = model(
            torch.empty(rows, 1, *config.vision.size), ids, torch.ones_like(ids), slices
        )
        return (image.float().sum() + text.float().sum()) * scale

    settings = stage_config(stage, config.model, "base")
    return Case(
        name,
        settings.batch_size,
        build=build,
        forward=forward,
        checkpoint=set_grad_checkpoint,
        embed=config.embed,
        checkpointed=settings.grad_checkpoint,
        **more,
    )


def language(name: str, stage: str, config: MllmConfig, sharded: bool = False) -> Case:
    encoder = config.encoders[0]

    def forward(model: Mllm, rows: int) -> Tensor:
        ids = torch.zeros(rows, config.max_text, dtype=torch.long)
        slices = [e for e in config.encoders if isinstance(e, GuidedVisionConfig)]
        guide = torch.empty(rows, slices[0].slices, slices[0].slice_width) if slices else None
        features = model.features(torch.empty(rows, 1, *encoder.size), guide)
        x = model.decoder.hidden(
            model.embed(ids, features, guide, torch.ones_like(ids)), torch.ones_like(ids)
        )
        logits = model.decoder.logits(x[:, model.visual_tokens + PROMPT :])
        labels = torch.zeros(logits.shape[:2], dtype=torch.long)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")

    def checkpoint(model: Mllm, on: bool) -> None:
        model.decoder.grad_checkpoint = on

    batch = stage_config(stage, "hsenet", "base").batch_size
    return Case(name, batch, lambda: build_mllm(config), forward, checkpoint, sharded=sharded)


def cases() -> list[tuple[Case, str]]:
    """The stages at published sizes, each with the recipe whose volumes it reads."""
    base, reaf = PRESETS["hsenet-base"], PRESETS["reaf-base"]
    first = contrastive("clip1, hsenet-base", "clip1", base)
    guided = GuidedVisionConfig(**vars(base.vision))
    student = ClipConfig(**{**vars(base), "vision": guided})
    with torch.device("meta"):
        teacher = build_dual_encoder(base)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        teacher = teacher.to_empty(device="cpu")
        teacher.encode_image(torch.empty(1, 1, *base.vision.size))
    known = {"frozen": sum(p.numel() for p in teacher.parameters()), "teacher": counter.get_total_flops()}
    decoder = phi4mini(200064, 3072, 32, heads=24, kv_heads=8, mlp=8192)
    adapters = MllmConfig("dual", (base.vision, guided), decoder, max_text=TEXT_LENGTH["mrg"])
    whole = MllmConfig("dual", (base.vision, guided), decoder, full=True, max_text=TEXT_LENGTH["mrg"])
    short = MllmConfig("dual", (base.vision, guided), decoder, max_text=TEXT_LENGTH["vqa"])
    return [
        (first, "hsenet"),
        (contrastive("clip2, hsenet-base", "clip2", student, **known), "hsenet"),
        (contrastive("clip1, reaf-base", "clip1", reaf), "reaf"),
        (language("mrg, Phi-4-mini, adapters", "mrg", adapters), "hsenet"),
        (language("vqa, Phi-4-mini, adapters", "vqa", short), "hsenet"),
        (language("mrg, Phi-4-mini, --full", "mrg", whole), "hsenet"),
        (language("mrg, Phi-4-mini, --full --shard", "mrg", whole, sharded=True), "hsenet"),
    ]


def volume_bytes(recipe: str) -> int:
    """Of a prepared float16 volume, numpy's header included."""
    return 128 + 2 * math.prod(RECIPES[recipe].size)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def tables(given: argparse.Namespace) -> str:
    counted = [(count(case), recipe) for case, recipe in cases()]
    fixed, moving, sending, times = [], [], [], []
    for sizes, recipe in counted:
        case = sizes.case
        held = sizes.fixed(8)
        fixed.append(
            [
                case.name,
                f"{sizes.parameters / 1e6:,.0f} M",
                f"{sizes.trained / 1e6:,.0f} M",
                *(f"{held[part] / GB:.1f}" for part in ("weights", "gradients", "AdamW", "buckets")),
                f"{sum(held.values()) / GB:.1f}",
                f"{sizes.flops / 1e12:.2f}",
            ]
        )
        for precision in ("fp32", "bf16"):
            for checkpointed in (False, True):
                gb = [f"{sizes.memory(b, precision, checkpointed, 8) / GB:.0f}" for b in BATCHES]
                name = (
                    precision if precision == "fp32" or case.sharded else "bf16, fp16"
                )  # which keep as many bytes
                moving.append(
                    [
                        case.name,
                        name,
                        "yes" if checkpointed else "no",
                        f"{sizes.activations(1, precision, checkpointed) / GB:.2f}",
                        *gb,
                    ]
                )
        row = [case.name, str(case.batch)]
        line = [case.name, str(case.batch), "yes" if case.checkpointed else "no"]
        for world in WORLDS:
            if case.sharded:
                with torch.device("meta"):
                    moved = sharded_traffic(case.build(), world, half=True)
            else:
                moved = traffic(sizes.trained, case.batch, case.embed)
            row.append(f"{moved.sent(world) / 1e6:,.1f}")
            seconds = step_seconds(sizes, world, moved.sent(world), given)
            rate = world * case.batch / seconds
            line += [f"{seconds * 1e3:,.0f} ms", f"{rate:,.0f}", f"{rate * volume_bytes(recipe) / GB:,.1f}"]
        payload = 2 * 4 * case.batch * case.embed
        row.insert(2, f"{payload / 1e3:,.0f}" if payload else "")
        sending.append(row)
        times.append(line)
    storage = [
        [
            name,
            "x".join(map(str, RECIPES[name].size)),
            f"{volume_bytes(name) / 1e6:.1f} MB",
            f"{VOLUMES * volume_bytes(name) / 1e12:.2f} TB",
        ]
        for name in RECIPES
    ]
    features = 128 + 2 * 32 * 768
    storage.append(
        ["slice features", "32x768", f"{features / 1e6:.2f} MB", f"{VOLUMES * features / 1e12:.4f} TB"]
    )
    ends = [f"{w} GPUs: {what}" for w in WORLDS for what in ("step", "samples/s", "GB/s read")]
    return "\n\n".join(
        (
            "What no batch changes, in GB a GPU (8 GPUs, bf16). Parameters and FLOPs are counted, bytes "
            "are by formula.",
            table(
                [
                    "",
                    "parameters",
                    "trained",
                    "weights",
                    "gradients",
                    "AdamW",
                    "DDP's buckets",
                    "sum",
                    "TFLOPs a sample",
                ],
                fixed,
            ),
            "With the activations, in GB a GPU (8 GPUs): counted for a batch of 1, by formula for others.",
            table(
                [
                    "",
                    "precision",
                    "`--grad-checkpoint`",
                    "activations of 1",
                    *(f"batch {b}" for b in BATCHES),
                ],
                moving,
            ),
            "A step at the recipe's batch, in MB that leave a GPU on a ring (formula), and kB of "
            "embeddings that a rank gives.",
            table(["", "batch", "embeddings, kB", *(f"{w} GPUs" for w in WORLDS)], sending),
            f"Storage of {VOLUMES:,} volumes in float16 (formula).",
            table(["recipe", "size", "a volume", "all"], storage),
            f"Predicted, not measured: {given.share:.0%} of {given.peak / 1e12:.0f} TFLOP/s, "
            f"{given.node / GB:.0f} GB/s a GPU within a node of {NODE}, {given.network / GB:.0f} GB/s "
            "beyond, and reading that keeps up.",
            table(["", "batch", "`--grad-checkpoint`", *ends], times),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=0.35, help="of the peak that a step reaches")
    parser.add_argument(
        "--peak", type=float, default=989e12, help="FLOP/s of a GPU in bf16, without sparsity"
    )
    parser.add_argument("--node", type=float, default=300e9, help="bytes/s that leave a GPU within a node")
    parser.add_argument("--network", type=float, default=40e9, help="bytes/s that leave a GPU to other nodes")
    given = parser.parse_args()
    before, rest = DOCUMENT.read_text().split(START)
    DOCUMENT.write_text(f"{before}{START}\n{tables(given)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
