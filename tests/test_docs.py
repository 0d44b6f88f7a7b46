"""What the documents name is there."""

import re
from functools import cache

from conftest import ROOT

DOCUMENTS = (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md")


@cache
def names_of(path) -> set[str]:
    """Functions, classes, methods, and what is assigned, of a module."""
    text = path.read_text()
    defined = re.findall(r"^\s*(?:def|class) (\w+)", text, re.M)
    assigned = re.findall(r"^\s*(\w+(?:, \w+)*)(?::| =)", text, re.M)
    return {*defined, *(name for names in assigned for name in names.split(", "))}


def test_every_module_and_function_that_the_documents_name_exists():
    found = 0
    for document in DOCUMENTS:
        for file, names in re.findall(r"`([\w/]+\.py): ([\w., ]+)`", document.read_text()):
            path = next((p for p in (ROOT / "reaf_hsenet" / file, ROOT / file) if p.is_file()), None)
            assert path, f"{document.name}: {file}"
            for name in re.split(r", ", names):
                assert name.rpartition(".")[2] in names_of(path), f"{document.name}: {file}: {name}"
                found += 1
    assert found > 50


def test_every_equation_of_the_method_is_led_to_a_function():
    text, rows = (ROOT / "docs/method.md").read_text(), 0
    for table in re.findall(r"\| step \| equation \| code \|\n.*\n((?:\|.*\n)+)", text):
        for row in table.splitlines():
            assert re.search(r"`[\w/]+\.py: \w+|\| the same \|$", row), row
            rows += 1
    assert rows > 40
