"""The whole inputs that faults are made in."""

from pathlib import Path

import pytest

from faults.scene import write_originals


@pytest.fixture(scope="session")
def originals(stages, decoder_folder, mrg, tmp_path_factory) -> Path:
    return write_originals(tmp_path_factory.mktemp("originals"), stages, mrg)
