"""The house: imports run downward without a circle, and transformers stays upstairs; functions' bodies are read too."""

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

import dotmoe_kernels as dk

ROOT = Path(dk.__file__).parent
PACKAGE = "dotmoe_kernels"

# From the ground up. A module imports from its own floor and from those below it; within a floor only circles are forbidden.
FLOORS = (
    ("_checks", "_tiles", "_backend", "_autograd", "_files", "_lazy", "reference"),
    ("transport",),
    ("rounding",),
    ("permutation",),
    ("soft_topk",),
    ("routing",),
    ("dispatch",),
    ("experts",),
    ("partitions", "evaluation"),
    ("alignment",),
    ("models",),
    ("exports",),
    ("conversion",),
    ("",),  # the public face
    ("cli",),
    ("__main__",),
)
WITH_TRANSFORMERS = ("models", "conversion")


def name_of(path, root):
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(root):
    return {name_of(path, root): path for path in sorted(root.rglob("*.py"))}


def imports_of(name, path, modules):
    """What the file imports, wherever in it: modules by name, and a name out of a module as that module."""
    base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            found |= {child if (child := f"{source}.{alias.name}") in modules else source for alias in node.names}
    return found


@lru_cache
def graph(root):
    modules = modules_of(root)
    return {name: imports_of(name, path, modules) - {name} for name, path in modules.items()}


def circles(edges):
    """A circle as a list of modules, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done or name not in edges:
            return None
        path.append(name)
        for target in sorted(edges[name]):
            if found := visit(target):
                return found
        path.pop()
        done.add(name)
        return None

    for name in sorted(edges):
        if found := visit(name):
            return found
    return None


def floor_of(name):
    room = name.removeprefix(PACKAGE).lstrip(".").split(".")[0]
    floors = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"{name} is on no floor: add {room!r} to FLOORS"
    return floors[0]


def upward(edges):
    return [
        f"{name} -> {target}"
        for name, targets in edges.items()
        for target in sorted(targets)
        if target.split(".")[0] == PACKAGE and floor_of(target) > floor_of(name)
    ]


def test_every_room_is_on_a_floor():
    rooms = {name.removeprefix(PACKAGE).lstrip(".").split(".")[0] for name in graph(ROOT)}
    assert rooms == {room for floor in FLOORS for room in floor}


def test_no_circle():
    assert circles(graph(ROOT)) is None


def test_imports_run_downward():
    assert upward(graph(ROOT)) == []


def test_transformers_is_imported_by_models_and_conversion_alone():
    found = {
        name
        for name, targets in graph(ROOT).items()
        if any(target.split(".")[0] == "transformers" for target in targets)
        and name.removeprefix(PACKAGE + ".").split(".")[0] not in WITH_TRANSFORMERS
    }
    assert found == set()


def test_the_same_doors():
    """A step or a path has __init__, operators, cpu, gpu, and nothing else."""
    doors = {"__init__", "operators", "cpu", "gpu"}
    more = {"routing": {"budgets"}, "experts": {"activations", "decode", "grouped", "masked", "training"}}
    for room in (
        "transport",
        "rounding",
        "soft_topk",
        "routing",
        "dispatch",
        "experts",
        *(f"experts/{p}" for p in more["experts"]),
    ):
        found = {p.stem for p in (ROOT / room).iterdir() if p.name != "__pycache__"}
        assert found <= doors | more.get(room, set()), room
        assert "__init__" in found, room


def test_no_long_function():
    """90 lines at most, docstring included, but for kernels."""
    long = []
    for path in modules_of(ROOT).values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.endswith("_kernel"):
                lines = node.end_lineno - node.lineno + 1
                if lines > 90:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines}")
    assert long == []


def table(file, head):
    """The first cells of the table under that line of a text at the top of the project."""
    lines = (ROOT.parent / file).read_text().splitlines()
    start = lines.index(head)
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(line.split("|")[1])
    return rows


@pytest.mark.skipif(not (ROOT.parent / "CONTRIBUTING.md").exists(), reason="an installed package has no CONTRIBUTING.md")
def test_contributing_shows_every_room_in_the_order_of_the_floors():
    shown = [room for cell in table("CONTRIBUTING.md", "| room | what |") for room in re.findall(r"`(\w+)(?:/|\.py)`", cell)]
    built = [room for floor in FLOORS for room in floor if room not in ("", "__main__")]
    assert sorted(shown) == sorted(built)
    upstairs = [room for room in shown if not room.startswith("_") and room != "reference"]
    assert upstairs == [room for room in built if room in upstairs]


@pytest.mark.skipif(not (ROOT.parent / "README.md").exists(), reason="an installed package has no README.md")
def test_readme_shows_every_op():
    lines = (ROOT.parent / "README.md").read_text().splitlines()
    start = lines.index("| step | op |")
    rows = [line for line in lines[start + 2 : start + 12] if line.startswith("|")]
    steps = [row.split("|")[1].strip() for row in rows]
    assert all((ROOT / step).exists() or (ROOT / f"{step}.py").exists() for step in steps)
    shown = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    classes = {"AlignmentConfig", "DotMoeConfig", "DotMoeForCausalLM", "FinetuneConfig", "Routing", "SinkhornInfo", "Slots"}
    assert shown == set(dk.__all__) - classes - {"convert", "export", "finetune", "load", "save"}


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"a": "from . import b", "b": "def f():\n    from .a import x"}, ["p.a", "p.b", "p.a"]),
        ({"a": "from .b import x", "b": "import p.a"}, ["p.a", "p.b", "p.a"]),
        ({"a": "from .b import x", "b": "import os"}, None),
    ],
)
def test_a_planted_circle_is_seen(tmp_path, files, circle):
    root = tmp_path / "p"
    root.mkdir()
    (root / "__init__.py").write_text("")
    for name, text in files.items():
        (root / f"{name}.py").write_text(text)
    assert circles(graph(root)) == circle


def test_a_planted_upward_arrow_is_seen():
    assert upward({f"{PACKAGE}.experts.grouped": {f"{PACKAGE}.models.block"}}) == [
        "dotmoe_kernels.experts.grouped -> dotmoe_kernels.models.block"
    ]
