"""A new run of a language stage reads and hashes each file of weights once, by one rank for all where it
only compares.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from reaf_hsenet import files
from reaf_hsenet.runs import checkpoint
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.trained import load_trained
from tiny import finish, language, one_rank

pytestmark = pytest.mark.usefixtures("forks")


def counted(folder: Path, rank: int) -> None:
    """From now on every hash of a whole file and every reading of weights of this process is a line of a
    file.
    """
    hash_whole, read = files._sha256, checkpoint.read_weights_file

    def note(kind: str, path: str | Path) -> None:
        with open(folder / f"rank-{rank}.jsonl", "a") as file:
            file.write(json.dumps([kind, str(Path(path).resolve())]) + "\n")

    def hashed(path, *unchanged):
        before = hash_whole.cache_info().misses
        found = hash_whole(path, *unchanged)
        if hash_whole.cache_info().misses > before:
            note("hashed", path)
        return found

    files._sha256 = hashed
    checkpoint.read_weights_file = lambda path: (note("read", path), read(path))[1]


def counting_rank(rank: int, world: int, port: int, argv: list[str]) -> None:
    counted(Path(argv[-1]).parent, rank)
    one_rank(rank, world, port, argv)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_new_run_reads_and_hashes_every_file_once(stages, decoder_folder, tmp_path, world):
    flags = ("--decoder", decoder_folder, "--max-steps", 1, "--batch-size", 2, "--out", tmp_path / "run")
    finish(language(stages, tmp_path / "run", *flags), world, counting_rank)
    last = [Run(stages / name).pointer("last") for name in ("clip1", "clip2")]
    encoders = {str((folder / "model.safetensors").resolve()) for folder in last}
    bases = {str(path.resolve()) for path in decoder_folder.glob("*.safetensors")}
    for rank in range(world):
        lines = map(json.loads, (tmp_path / f"rank-{rank}.jsonl").read_text().splitlines())
        count = Counter(tuple(line) for line in lines if str(tmp_path / "run") not in line[1])
        assert {path for kind, path in count if kind == "read"} == encoders
        hashed = encoders | bases if rank == 0 else set()
        assert {path for kind, path in count if kind == "hashed"} == hashed
        assert set(count.values()) == {1}


@pytest.mark.slow
def test_a_run_that_is_read_again_hashes_its_own_checkpoint_and_no_decoder(
    stages, decoder_folder, tmp_path, monkeypatch
):
    finish(language(stages, tmp_path / "run", "--decoder", decoder_folder, "--max-steps", 1))
    files._sha256.cache_clear()
    hashed, whole = [], files._sha256
    noted = lambda path, *unchanged: (hashed.append(path), whole(path, *unchanged))[1]
    monkeypatch.setattr(files, "_sha256", noted)
    run = load_trained(tmp_path / "run")
    run.sha256(), run.base_sha256()
    assert not any("decoder" in path for path in hashed)
    assert sum(path.startswith(str(tmp_path / "run")) for path in hashed) == 1
