"""--shard: two processes that hold half of the weights each train as one that holds all, and their
checkpoints are the same.
"""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

import train
from reaf_hsenet.config import VisionConfig
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.build import build_mllm
from reaf_hsenet.models.decoder_config import DecoderConfig, RopeConfig
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.runs.trained import load_trained
from reaf_hsenet.train.sharding import require_shardable, shard, whole
from reaf_hsenet.train.stability import clip_gradients, not_finite
from test_bad_volumes import bad_records, spoil, volume
from test_language_runs import decoder_folder, language, stages, wrong  # noqa: F401  (fixtures)
from test_train import keep_signal_handlers, numbers, torchrun, weights  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="needs torch 2.6")


def small(tied: bool = True):
    """A model of a frozen encoder, a projector without dropout, and a decoder of two blocks."""
    torch.manual_seed(0)
    encoder = VisionConfig((8, 16, 16), (4, 8, 8), 32, 1, 2, 64)
    decoder = DecoderConfig(
        "llama", 61, 32, 2, 2, 1, 16, 64, 128, RopeConfig(dims=16), tied=tied, eos_ids=(1,), bos_id=2
    )
    config = MllmConfig("stage1", (encoder,), decoder, projector="average_pool", kernel=(2, 2, 2), full=True)
    return build_mllm(config).train()


def batch() -> tuple:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (4, 10), generator=generator)
    labels = ids.clone()
    labels[:, :5] = -100
    labels[0, :8] = -100  # the ranks' shares of the answer tokens differ
    return ids, torch.ones_like(ids), labels, torch.rand(4, 1, 8, 16, 16, generator=generator)


def gradients(model, given: tuple, tokens: float) -> dict[str, torch.Tensor]:
    (model(*given)[0] / tokens).backward()
    return {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def one_rank(rank: int, path: str, tied: bool, checkpointing: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    model = small(tied)
    model.decoder.grad_checkpoint = checkpointing
    shard(model, Ranks(rank, 2, torch.device("cpu")), None)
    found = {"gradients": gradients(model, tuple(t[2 * rank : 2 * rank + 2] for t in batch()), 17 / 2)}
    found["norm"] = clip_gradients(model, 0.5)
    found["clipped"] = clip_gradients(model, None)
    found["held"] = sum(p.to_local().numel() for p in model.parameters())
    if rank == 1:
        model.decoder.norm.weight.grad.to_local()[0] = torch.nan
    found["bad"] = not_finite(model)
    torch.save(found, f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "checkpointing"), [(True, False), (False, True)])
def test_sharded_gradients_are_those_of_one_process(tmp_path, tied, checkpointing):
    mp.start_processes(one_rank, (str(tmp_path), tied, checkpointing), nprocs=2, start_method="forkserver")
    model = small(tied)
    expected = gradients(model, batch(), 17)
    norm = clip_gradients(model, 0.5)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for found in ranks:
        assert found["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found["gradients"][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
        assert found["norm"] == pytest.approx(norm.item(), rel=1e-5) and norm > 0.5
        assert found["clipped"] == pytest.approx(0.5, rel=1e-4)
        assert found["bad"] == ["decoder.norm.weight"]  # known on both ranks, whichever holds it
    total = sum(p.numel() for p in model.parameters())
    assert ranks[0]["held"] + ranks[1]["held"] == total and ranks[0]["held"] < 0.6 * total


def sharded(root: Path, out: Path, folder: Path, *more) -> list[str]:
    """A full fine-tuning of a published decoder without dropout, with a batch of 4 on two processes."""
    flags = (
        "--decoder",
        folder,
        "--full",
        "--vision",
        "stage1",
        "--projector",
        "average_pool",
        "--keep",
        9,
        "--no-augment",
    )
    arguments = language(root, out, *flags, *more, start="clip1")
    arguments[arguments.index("--batch-size") + 1] = "2"
    return arguments


@pytest.fixture(scope="module")
def pair(stages, decoder_folder, tmp_path_factory):
    """The same run of 4 steps by one process, and by two sharded ones."""
    root = tmp_path_factory.mktemp("pair")
    one, two = (
        sharded(stages, root / name, decoder_folder, "--max-steps", 4, "--save-every", 2)
        for name in ("one", "two")
    )
    one[one.index("--batch-size") + 1] = "4"
    assert train.main(one) == 0
    done = torchrun(2, *two, "--shard", "--grad-checkpoint", cwd=root)
    assert done.returncode == 0, done.stderr
    return root


def assert_alike(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    first, second = ([r for r in numbers(run) if "lr" in r] for run in (one, two))
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    saved, other = weights(one), weights(two)
    assert saved.keys() == other.keys()
    for name, tensor in saved.items():
        assert torch.allclose(tensor, other[name], atol=tolerance), name


@pytest.mark.slow
def test_two_sharded_processes_reach_the_weights_of_one(pair):
    assert_alike(pair / "one", pair / "two")
    values = [
        r["validation"]["loss"] for run in ("one", "two") for r in numbers(pair / run) if "validation" in r
    ]
    half = len(values) // 2
    assert values[:half] == pytest.approx(values[half:], rel=1e-5) and half > 1
    one, two = (
        load_trained(pair / name, "last") for name in ("one", "two")
    )  # as evaluate.py and infer.py do
    assert torch.allclose(one.model.decoder.norm.weight, two.model.decoder.norm.weight, atol=1e-5)


def test_full_training_starts_from_the_decoders_weights(stages, decoder_folder, tmp_path):
    flags = ("--decoder", decoder_folder, "--full", "--vision", "stage1", "--max-steps", 1, "--lr", 1e-12)
    assert train.main(language(stages, tmp_path / "run", *flags, start="clip1")) == 0
    base, own = load_file(decoder_folder / "model.safetensors"), weights(tmp_path / "run")
    assert torch.allclose(own["decoder.norm.weight"], base["model.norm.weight"], atol=1e-9)
    assert torch.allclose(
        own["decoder.layers.1.mlp.down_proj.weight"], base["model.layers.1.mlp.down_proj.weight"], atol=1e-9
    )


@pytest.mark.slow
@pytest.mark.parametrize("start", ["one", "two"])
def test_checkpoints_go_from_sharded_to_unsharded_runs_and_back(pair, tmp_path, start):
    """The half-way checkpoint of either run, continued by the other kind, reaches the same weights."""
    out = shutil.copytree(pair / start, tmp_path / "run")
    (out / "checkpoints/last").write_text("step-000002\n")
    again = ["--stage", "mrg", "--out", str(out), "--resume", "--log-every", "1", "--device", "cpu"]
    if start == "two":
        wrong(again, "--shard: one process has nobody to share with; .*--no-shard")
        assert train.main([*again, "--no-shard"]) == 0
    else:
        done = torchrun(2, *again, "--shard", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert_alike(pair / "one", out)


@pytest.mark.slow
def test_sharded_ranks_compute_in_bf16_accumulate_and_go_on_when_one_is_left_without_samples(
    pair, stages, decoder_folder, tmp_path
):
    root = shutil.copytree(stages, tmp_path / "stages")
    bad = {spoil(volume(root / "data", row)) for row in (1, 5, 6)}
    bad.add(spoil(volume(root / "data", 0, "validation")))
    arguments = sharded(
        root, tmp_path / "half", decoder_folder, "--max-steps", 4, "--accumulate", 2, "--max-bad", 4
    )
    arguments[arguments.index("--batch-size") + 1] = "1"
    done = torchrun(
        2, *arguments, "--shard", "--precision", "bf16", "--data", str(root / "data"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert {name for _, name in bad_records(tmp_path / "half")} == bad
    arguments[arguments.index("--batch-size") + 1] = "2"
    arguments[arguments.index(str(tmp_path / "half"))] = str(tmp_path / "whole")
    assert train.main([*arguments, "--data", str(root / "data")]) == 0
    half, one = ([r["loss"] for r in numbers(tmp_path / name) if "lr" in r] for name in ("half", "whole"))
    assert half == pytest.approx(one, rel=0.02) and half != one
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "half").values())


def test_where_sharding_makes_no_sense_it_is_refused_in_one_line(
    stages, decoder_folder, tmp_path, monkeypatch
):
    wrong(["--stage", "clip1", "--shard"], "--shard: is an option of --stage mrg and vqa; leave it out")
    wrong(["--stage", "clip2", "--shard"], "--shard: is an option of --stage mrg and vqa; leave it out")
    wrong(
        sharded(stages, tmp_path / "r", decoder_folder, "--shard"),
        "--shard: one process has nobody to share with",
    )
    adapters = language(
        stages, tmp_path / "r", "--decoder", decoder_folder, "--vision", "stage1", "--shard", start="clip1"
    )
    wrong(adapters, "--shard: adapters and their states are small.*add --full")
    two = Ranks(0, 2, torch.device("cpu"))
    for arguments, words in (
        ((True, "fp16", False), "say --precision bf16"),
        ((True, "bf16", True), "--compile: has not"),
    ):
        with pytest.raises(InputError, match=words):
            require_shardable(two, *arguments)
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard")
    with pytest.raises(InputError, match="--shard: needs torch 2.6 or newer, this is"):
        require_shardable(two, True, "bf16", False)
