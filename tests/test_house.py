"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_helpers import tiny_config

from wara.training.start import run

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "wara"

# From the ground up: a room may import those before it. A hospital installs the light ones.
LIGHT = (
    "errors flags memory signals storage net schema bounds codestreams dicom_file dicom pictures "
    "images wavelets vit cards adapters backbones config phantoms data evaluation runs deploy"
).split()
ROOMS = [*LIGHT, *"training check compare cli".split()]
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
    rooms = {room_of(path) for path in FILES}
    assert rooms <= {*ROOMS, "__init__"}
    assert rooms >= set(ROOMS)


def test_no_circles_inside_rooms():
    modules = {module_name(path): path for path in FILES if path.name != "__init__.py"}
    needs: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = {imported for imported, _ in imports(path)}
        own = {parent for imported in found for parent in (imported, imported.rpartition(".")[0])}
        needs[name] = (own & set(modules)) - {name}
    while needs:
        free = {name for name, wanted in needs.items() if not wanted & set(needs)}
        assert free, f"these import each other: {sorted(needs)}"
        needs = {name: wanted for name, wanted in needs.items() if name not in free}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


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


WITHOUT_HEAVY = """
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_light_rooms_work_without_the_heavy_libraries():
    # Not a look at sys.modules: timm imports wandb by itself where it is installed.
    code = (
        WITHOUT_HEAVY
        + """
for room in sys.argv[2:]:
    importlib.import_module(f"wara.{room}")
"""
    )
    names = [module_name(path).removeprefix("wara.") for path in FILES if room_of(path) in LIGHT]
    names += [f"compare.{name}" for name in ("statistics", "across", "figures")]
    python(code, ",".join(sorted(HEAVY)), *names)


@pytest.mark.slow
def test_a_run_is_read_and_its_model_used_without_the_heavy_libraries(tmp_path):
    config = tiny_config(tmp_path, epochs=1)
    run(config, quiet=True)
    code = (
        WITHOUT_HEAVY
        + """
import numpy as np
import wara
from wara.data import eval_batches, open_source
from wara.evaluation.predict import predict
from wara.runs import load_run
run = load_run(sys.argv[2])
images = open_source(run.config.dataset, cache=None, offline="error", seed=0)
table = run.predictions("test")
places = [[record.file for record in images.records].index(file) for file in table.files]
batches = eval_batches(images, places, run.spec, batch_size=8)
found = predict(run.model(), batches, task=run.task, classes=len(run.classes))
assert np.array_equal(found.logits, table.predictions.logits)
plain, _ = wara.build_backbone("test_vit", num_classes=3, img_size=32, weights=sys.argv[3])
wara.load_adapter(plain, run.folder.adapter)
"""
    )
    python(code, ",".join(sorted(HEAVY)), config.out, config.backbone.weights)


@pytest.mark.slow
def test_a_plan_loads_no_trainer(tmp_path):
    config = tiny_config(tmp_path)
    code = """
import sys
from wara.config import RunConfig
from wara.training.start import run
run(RunConfig.model_validate_json(sys.argv[1]), dry_run=True)
print(*sys.modules)
"""
    loaded = python(code, config.model_dump_json()).split()
    assert "wara.training.plan" in loaded
    assert not set(loaded) & {"pytorch_lightning", "lightning", "albumentations"}


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
    if room_of(path) in ("config", "runs", "training", "check", "compare", "cli"):
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


DANGEROUS = """\
import pickle
import subprocess
import tempfile


def run(text, data):
    eval(text)
    exec(text)
    pickle.loads(data)
    subprocess.run(text, shell=True)
    return tempfile.mktemp()
"""


@pytest.mark.parametrize("place", ["wara/x.py", "train.py"])
def test_the_linter_bans_dangerous_calls(place):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "concise",
         "--stdin-filename", place, "-"],
        cwd=ROOT, input=DANGEROUS, capture_output=True, text=True,
    )  # fmt: skip
    for code in ("S307", "S102", "S301", "S602", "S306"):
        assert f" {code} " in done.stdout, done.stdout + done.stderr


def test_what_the_linter_lets_pass_says_why():
    """Of dangerous calls; the second of two lines may lean on the first."""
    found = [
        (path, line)
        for path in FILES
        for line in path.read_text(encoding="utf-8").splitlines()
        if "noqa: S" in line
    ]
    assert 0 < len(found) < 10
    unsaid = [path for path, line in found if not re.search(r"noqa: S\d+  \(.+\)", line)]
    assert all(any(p == path and "  (" in line for p, line in found) for path in unsaid)
