"""The rooms of docs/architecture.md: who may import whom."""

import ast
import re

from conftest import ROOT

SCRIPTS = (
    "train.py",
    "evaluate.py",
    "infer.py",
    "preprocess.py",
    "reaf_hsenet/__init__.py",
    "reaf_hsenet/weights/__main__.py",
)
FILES = sorted(
    p.relative_to(ROOT)
    for p in (ROOT / "reaf_hsenet").rglob("*.py")
    if str(p.relative_to(ROOT)) not in SCRIPTS
)


def module(path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports() -> dict[str, set[str]]:
    """The modules of the package that each of them imports, anywhere in its text."""
    known, found = set(map(module, FILES)), {}
    for path in FILES:
        names = set()
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[module(path)] = names & known - {module(path)}
    return found


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if (ROOT / "reaf_hsenet" / parts[1]).is_dir() else "root"


def test_a_room_imports_only_from_rooms_above_it_in_the_table():
    text = (ROOT / "docs/architecture.md").read_text()
    table = re.findall(r"^\| (the package's root|`\w+/`(?:, `\w+/`)*) \|", text, re.M)
    floors = {
        name.strip("`/ ").replace("the package's root", "root"): i
        for i, row in enumerate(table)
        for name in row.split(",")
    }
    assert set(floors) == {room(name) for name in imports()} and len(table) == 8
    for name, used in imports().items():
        for other in used:
            a, b = room(name), room(other)
            assert a == b or floors[b] < floors[a], f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle():
    left = imports()
    while ready := {name for name, used in left.items() if not used & left.keys()}:
        left = {name: used for name, used in left.items() if name not in ready}
    assert not left


def test_the_root_holds_what_every_room_needs():
    assert len(list((ROOT / "reaf_hsenet").glob("*.py"))) <= 10
