"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "wara"

LIGHT = (
    "errors config cards images wavelets adapters backbones evaluation deploy".split()
)  # inference needs no more than these
ROOMS = [*LIGHT, *"phantoms data training compare cli".split()]
HEAVY = {"pytorch_lightning", "lightning", "albumentations", "wandb"}

FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the full name of everything a file imports, at the top or inside a function."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno


def test_every_module_is_in_a_known_room():
    assert {room_of(path) for path in FILES} <= {*ROOMS, "__init__"}


@each_file
def test_imports_go_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return  # re-exports on first use; see the test of what `import wara` loads
    for name, line in imports(path):
        head, *rest = name.split(".")
        if head != "wara" or rest in ([], ["__version__"]):
            continue
        assert rest[0] in ROOMS, f"{path}:{line} goes round by the package: {name}"
        allowed = ROOMS[: ROOMS.index(room) + 1]
        assert rest[0] in allowed, f"{path}:{line}: {room} may not import {rest[0]}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "wara":
            where = f"{path}:{node.lineno}: wara.{node.attr}"
            assert node.attr in ("__file__", "__version__"), where


@each_file
def test_light_rooms_name_no_heavy_library(path):
    if room_of(path) in LIGHT:
        heavy = [(name, line) for name, line in imports(path) if name.split(".")[0] in HEAVY]
        assert not heavy, f"{path}: {heavy}"


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_light_rooms_work_without_the_heavy_libraries():
    # Not a look at sys.modules: timm imports wandb by itself where it is installed.
    code = """
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
for room in sys.argv[2:]:
    importlib.import_module(f"wara.{room}")
"""
    rooms = [room for room in LIGHT if any(room_of(path) == room for path in FILES)]
    python(code, ",".join(sorted(HEAVY)), *rooms)


def test_the_command_line_itself_loads_nothing_heavy():
    loaded = python("import sys, wara, wara.cli; print(*sys.modules)").split()
    assert "wara.cli" in loaded
    assert not set(loaded) & {*HEAVY, "torch", "timm", "numpy", "pydantic", "ruamel.yaml"}


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yield what a module offers: its functions, classes and their methods without underscore."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            yield node
            for child in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                    yield child


@each_file
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} says nothing of itself"
    bare = [f"{path.name}:{node.lineno} {node.name}" for node in public(tree) if not doc(node)]
    assert not bare


def doc(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    # A method that overrides one of Lightning's or torch's is described by theirs.
    marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
    return bool(ast.get_docstring(node)) or bool(marks & {"override", "overload", "setter"})


@each_file
def test_only_the_run_sees_the_config(path):
    if room_of(path) in ("config", "training", "compare", "cli"):
        return
    names = {name for name, _ in imports(path)}
    assert not {name for name in names if name.startswith("wara.config") and "Config" in name}


FORBIDDEN = {
    "unpickling": r"weights_only\s*=\s*False|\bpickle\.loads?\b|allow_pickle\s*=\s*True",
    "code in data": r"\byaml\.load\(|(?<![.\w])eval\(|(?<![.\w])exec\(|extractall\(",
    "a second image path": r"cv2\.imread",
    "silence": r"except\s*:|except (?:Base)?Exception:\s*(?:\n\s*)?(?:pass|\.\.\.|continue)\b",
    "an unfinished place": r"\bTODO\b|\bFIXME\b|raise NotImplementedError",
}


@each_file
def test_nothing_forbidden(path):
    text = path.read_text(encoding="utf-8")
    for why, pattern in FORBIDDEN.items():
        found = re.search(pattern, text)
        line = text.count("\n", 0, found.start()) + 1 if found else 0
        assert not found, f"{path}:{line}: {why}: {found.group()!r}"


@each_file
def test_weights_are_never_loaded_in_part(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) != "zip":
            assert "strict=False" not in map(ast.unparse, node.keywords), f"{path}:{node.lineno}"


@each_file
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_train_py_only_parses_and_calls():
    assert len((ROOT / "train.py").read_text().splitlines()) < 60


def test_datasets_folder_holds_descriptions_only():
    # A Python package called `datasets` would hide Hugging Face's; images have licences.
    kinds = {path.suffix for path in (ROOT / "datasets").rglob("*") if path.is_file()}
    assert kinds <= {".yaml", ".md"}
