"""The floors of the project: imports only point down, in no circle, and each seam has one file."""

import ast
import functools
import itertools
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "florence_jax"
# From the roof to the ground; rooms of one line do not know each other. CONTRIBUTING.md shows the same picture.
FLOORS = (
    ("main", "predict", "tools"),
    ("train", "inference", "curation"),
    ("tasks",),
    ("evaluators",),
    ("data", "models", "losses", "params", "jobs"),
    ("command_line", "page"),
    ("config_files", "config_help", "files"),
    ("pictures", "boxes"),
    ("errors",),
)
LEVEL = {room: -floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SEAMS = {  # module -> the only places that import it
    "flax": "models/",
    "orbax": "params/checkpoint.py",
    "grain": "data/pipeline.py",
}
FILES = sorted(ROOT.rglob("*.py"))


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


@functools.cache
def imported_modules(path):
    """Dotted names of all that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def project_files(path):
    """The project's files that a file imports."""
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] != "florence_jax":
            continue
        for length in (len(parts), len(parts) - 1):
            place = ROOT.joinpath(*parts[1:length])
            found = place.with_suffix(".py") if place != ROOT else ROOT / "__init__.py"
            if found.exists() or (found := place / "__init__.py").exists():
                yield found
                break


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_room_is_on_a_floor():
    assert {room(path) for path in FILES} - {"__init__"} <= LEVEL.keys()


def test_imports_only_point_down():
    up = [
        f"{path.relative_to(ROOT)} -> {other.relative_to(ROOT)}"
        for path in FILES
        for other in set(project_files(path))
        if room(path) != "__init__" and room(other) != "__init__" and room(path) != room(other)
        if LEVEL[room(path)] <= LEVEL[room(other)]
    ]
    assert not up


def test_no_circle_of_files():
    below = {path: set(project_files(path)) - {path} for path in FILES}
    while free := [path for path, others in below.items() if not others & below.keys()]:
        for path in free:
            del below[path]
    assert not [str(path.relative_to(ROOT)) for path in below]


@pytest.mark.parametrize("module", SEAMS)
def test_each_seam_has_one_place(module):
    users = [
        str(path.relative_to(ROOT)) for path in FILES if module in {n.split(".")[0] for n in imported_modules(path)}
    ]
    assert users and all(user.startswith(SEAMS[module]) for user in users)


def test_nothing_imports_private_jax_or_the_configs():
    names = [(path, name) for path in FILES for name in imported_modules(path)]
    assert not [(path, name) for path, name in names if name.startswith(("jax._", "jax.experimental.shard_map"))]
    assert not [path for path, name in names if name.split(".")[0] == "configs"]


def test_a_name_is_defined_once():
    """A public name has one home; what every command has (main, run, ...) is no name."""
    homes = defaultdict(set)
    for path in FILES:
        for node in tree(path).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [n.id for target in targets if target for n in ast.walk(target) if isinstance(n, ast.Name)]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            for name in names:
                if not name.startswith("_"):
                    homes[name].add(str(path.relative_to(ROOT)))
    common = {"main", "run", "add_arguments", "available"}
    assert not {name: sorted(files) for name, files in homes.items() if len(files) > 1 and name not in common}


def test_files_and_functions_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    assert not {str(path): length for path, length in lengths.items() if length > 500}
    configs = ROOT.parent.joinpath("configs").glob("*.py")
    nodes = itertools.chain.from_iterable(ast.walk(tree(path)) for path in (*FILES, *configs))
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= 60]
