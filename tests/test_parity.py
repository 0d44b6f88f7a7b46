"""The expected numbers of the published implementations, tests/golden, hold."""

from pathlib import Path

import pytest

from parity import CHECKS, Case, Check, case_files, run_case

GOLDEN = Path(__file__).parent / "golden"


SLOW = {"reaf_base", "slice_encoder_vit_b16"}  # at base size
CASES = [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in SLOW)) for p in case_files(GOLDEN)]


@pytest.mark.parametrize("path", CASES)
def test_golden_case_passes(path):
    status, line = run_case(path, GOLDEN)
    assert status == "PASS", line


def test_every_module_of_the_golden_cases_is_checked():
    assert {Case(p, GOLDEN).module for p in case_files(GOLDEN)} == set(CHECKS) - {"preprocess"}


def test_an_error_above_the_tolerance_fails(monkeypatch):
    monkeypatch.setitem(CHECKS, "fill", lambda case: iter([Check("value", 1.01e-5, 1e-5)]))
    status, line = run_case(GOLDEN / "fill_check.json", GOLDEN)
    assert status == "FAIL" and "1 failed" in line and "value" in line


def test_a_nan_fails(monkeypatch):
    monkeypatch.setitem(CHECKS, "fill", lambda case: iter([Check("value", float("nan"), 1e-5)]))
    assert run_case(GOLDEN / "fill_check.json", GOLDEN)[0] == "FAIL"
