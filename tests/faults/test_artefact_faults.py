"""Damaged artefacts: each is refused in one line, or says exactly what it said before."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from oracles import reseal as reseal_adapter  # noqa: E402
from test_bundle import reseal as reseal_bundle  # noqa: E402
from training_helpers import environment, tiny_config  # noqa: E402

import wara  # noqa: E402
from wara.config import dump_config, load_config  # noqa: E402
from wara.deploy.predictor import Predictor  # noqa: E402
from wara.errors import WaraErrors, as_refusal  # noqa: E402
from wara.runs import load_run  # noqa: E402

Read = Callable[[Path], Any]
Reseal = Callable[[Path], None]
NOTHING = object()
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1e308, 0.5, "", "x", "../../etc/passwd", [], [[]], {}, {"a": 1},
    [1, 2, 3], "1e400", "NaN", "\u0000", "a|b", "9" * 400,
)  # fmt: skip


# -- what is done to a file ------------------------------------------------------------------------


def flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    start, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return draw.choice((data[:start], data[start:], data[:start] + data[end:]))


def insert(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    more = draw.choice((
        draw.randbytes(draw.randint(1, 40)), b"\n", b" ", b"{", b"[" * 5000, b"\x00",
        data[: draw.randint(1, len(data))][:2000], b"\xef\xbb\xbf", b"null", b"NaN", b"1e999",
    ))  # fmt: skip
    return data[:place] + more + data[place:]


def lines(data: bytes, draw: random.Random) -> bytes:
    """A line twice, two in each other's place, one gone; of a table, a cell of another row."""
    rows = data.split(b"\n")
    one, other = (draw.randrange(len(rows)) for _ in range(2))
    way = draw.randrange(4)
    if way == 0:
        rows.insert(other, rows[one])
    elif way == 1:
        rows[one], rows[other] = rows[other], rows[one]
    elif way == 2:
        del rows[one]
    else:
        cells, more = rows[one].split(b","), rows[other].split(b",")
        place = draw.randrange(min(len(cells), len(more)))
        cells[place], more[place] = more[place], cells[place]
        rows[one] = b",".join(cells)
        rows[other] = b",".join(more) if other != one else rows[one]
    return b"\n".join(rows)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Return every container of a tree with every key of it."""
    if isinstance(tree, dict):
        found = [(tree, key) for key in tree]
    elif isinstance(tree, list):
        found = [(tree, index) for index in range(len(tree))]
    else:
        return []
    return found + [pair for holder, key in found for pair in places(holder[key])]


def values(tree: Any, draw: random.Random) -> Any:
    """Change one value of a tree, swap two, take one away or add one."""
    every = places(tree)
    if not every:
        return tree
    holder, key = draw.choice(every)
    way = draw.randrange(5)
    if way == 0:
        other, name = draw.choice(every)
        holder[key], other[name] = other[name], holder[key]
    elif way == 1:
        del holder[key]
    elif way == 2 and isinstance(holder, dict):
        holder[f"{key}x"] = holder[key]
    elif way == 3:
        inside = holder[key]
        for _ in range(draw.choice((1, 50))):
            inside = draw.choice(([inside], {"a": inside}))
        holder[key] = inside
    else:
        holder[key] = draw.choice(ODD)
    return tree


def json_values(data: bytes, draw: random.Random) -> bytes:
    try:
        return json.dumps(values(json.loads(data), draw), indent=1).encode()
    except (ValueError, RecursionError):  # a swap may put a tree into itself
        return lines(data, draw)


def mutate(folder: Path, draw: random.Random) -> str:
    """Damage a folder, and return in words how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draw.choice(files)
    name, data = path.relative_to(folder).as_posix(), path.read_bytes()
    ways: list[Any] = [flip, cut, insert, "gone", "extra", "another", "folder"]
    if path.suffix in (".json", ".csv", ".yaml", ".md", ".txt", ".py"):
        ways += [lines] * 3
    if path.suffix == ".json":
        ways += [json_values] * 4
    way = draw.choice(ways)
    if way == "gone":
        path.unlink()
    elif way == "extra":
        other = draw.choice(("notes.txt", ".DS_Store", f"{path.name}.bak"))
        (path.parent / other).write_bytes(data)
    elif way == "another":
        path.write_bytes(draw.choice(files).read_bytes())
    elif way == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(way(data, draw) if data else b"x")
    return f"{name}: {way if isinstance(way, str) else way.__name__}"


# -- what is made of it ----------------------------------------------------------------------------


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return VisionTransformer(**sizes, num_classes=3).eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = wara.adapt(vit(), wara.WaRA(rank=2))
    with torch.no_grad():
        for parameter in wara.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return wara.save_adapter(
        model, tmp_path_factory.mktemp("adapter") / "adapter", classes=["a", "b", "c"],
        task="multiclass",
    )  # fmt: skip


def read_adapter(folder: Path) -> Any:
    model = wara.load_adapter(vit(), folder)
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).numpy().tobytes()


def read_bundle(folder: Path) -> Any:
    predictor = Predictor(folder, abstain_on=())
    size = predictor.spec.size
    images = np.linspace(-1, 1, 3 * size[0] * size[1], dtype=np.float32).reshape(1, 3, *size)
    logits, features = predictor.run(images)
    return logits.tobytes(), features.tobytes(), predictor.classes


def read_run(folder: Path) -> Any:
    run = load_run(folder)
    tables = [run.predictions(split) for split in ("val", "test")]
    return (
        run.config.model_dump_json(), json.dumps(run.metrics), run.classes, run.task,
        json.dumps({key: run.provenance[key] for key in ("seed", "data", "backbone")}),
        [(t.files, t.patients, t.predictions.probs.tobytes(), t.predictions.labels.tobytes(),
          t.predictions.logits.tobytes()) for t in tables],
        run.splits(), run.curves(),
    )  # fmt: skip


def judge(read: Read, folder: Path, wanted: Any, codes: set[int]) -> str:
    """Return what is wrong with the answer to a damaged folder; empty when nothing is."""
    try:
        found = read(folder)
    except Exception as error:
        said = as_refusal(error)
        several = len(said.errors) if isinstance(said, WaraErrors) else 1
        if said.exit_code not in codes:
            return f"exit {said.exit_code}: {said}"
        return "" if str(said).count("\n") < several else f"several lines: {said}"
    if wanted is NOTHING or found == wanted:
        return ""
    return "loads and says something else"


def try_all(
    source: Path, read: Read, count: int, scratch: Path, *, sealed: Reseal | None = None
) -> list[str]:
    """Damage copies of a folder and return those that were not told."""
    wanted, lost = read(source), []
    for seed in range(count):
        copy, draw = scratch / "copy", random.Random(seed)
        shutil.copytree(source, copy)
        words = mutate(copy, draw)
        if sealed is not None:
            sealed(copy)
        # What somebody sealed anew may say something else, and must not crash.
        fault = judge(read, copy, wanted if sealed is None else NOTHING, {2, 4, 5})
        if fault:
            lost.append(f"seed {seed}, {words}: {fault}")
        shutil.rmtree(copy)
    return lost


def test_adapter_folders(adapter: Path, tmp_path: Path, amount: Any, tally: Any) -> None:
    count = amount(8, 130)
    tally("damaged adapter folders", count, try_all(adapter, read_adapter, count, tmp_path))


def reseal_changed_adapter(folder: Path) -> None:
    try:
        reseal_adapter(folder, lambda config: values(config, random.Random(len(str(config)))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # what is no description any more cannot be sealed


def test_adapter_folders_sealed_anew(
    adapter: Path, tmp_path: Path, amount: Any, tally: Any
) -> None:
    count = amount(4, 60)
    lost = try_all(adapter, read_adapter, count, tmp_path, sealed=reseal_changed_adapter)
    tally("damaged adapter folders, sealed anew", count, lost)


def test_bundles(bundle: Path, tmp_path: Path, amount: Any, tally: Any) -> None:
    count = amount(6, 110)
    tally("damaged bundles", count, try_all(bundle, read_bundle, count, tmp_path))


def reseal_changed_bundle(folder: Path) -> None:
    try:
        reseal_bundle(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # what is no manifest any more cannot be sealed


def test_bundles_sealed_anew(bundle: Path, tmp_path: Path, amount: Any, tally: Any) -> None:
    count = amount(3, 50)
    lost = try_all(bundle, read_bundle, count, tmp_path, sealed=reseal_changed_bundle)
    tally("damaged bundles, sealed anew", count, lost)


@pytest.fixture(scope="module")
def finished(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the run of the bundle that are read back; no figures, no checkpoints."""
    small = tmp_path_factory.mktemp("run") / "run"
    kept = ("*.ckpt", "plots", "train.log", "report.md", "*.lock", ".*")
    shutil.copytree(bundle.parent / "run", small, ignore=shutil.ignore_patterns(*kept))
    return small


def test_run_folders(finished: Path, tmp_path: Path, amount: Any, tally: Any) -> None:
    count = amount(6, 120)
    tally("damaged run folders", count, try_all(finished, read_run, count, tmp_path))


def read_config(folder: Path) -> Any:
    config = load_config(folder / "given.yaml")
    again = folder / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    return config


def test_configs(tmp_path: Path, amount: Any, tally: Any) -> None:
    """A config is the user's own: what loads is valid, and reads back as what it is."""
    count, lost = amount(6, 100), []
    source = tmp_path / "source"
    source.mkdir()
    (source / "given.yaml").write_text(dump_config(tiny_config(tmp_path)))
    for seed in range(count):
        copy, draw = tmp_path / "copy", random.Random(seed)
        shutil.copytree(source, copy)
        path = copy / "given.yaml"
        path.write_bytes(draw.choice((flip, cut, insert, lines, lines))(path.read_bytes(), draw))
        fault = judge(read_config, copy, NOTHING, {2})
        if fault:
            lost.append(f"seed {seed}: {fault}")
        shutil.rmtree(copy)
    tally("damaged configs", count, lost)


@pytest.mark.slow
def test_by_command(
    bundle: Path, finished: Path, tmp_path: Path, amount: Any, tally: Any
) -> None:
    count, lost = amount(2, 20), []
    for seed in range(count):
        copy, draw = tmp_path / "copy", random.Random(1000 + seed)
        shutil.copytree((bundle, finished)[seed % 2], copy)
        words = mutate(copy, draw)
        done = subprocess.run(
            [sys.executable, "-m", "wara.cli", "verify", str(copy)],
            env=environment(), capture_output=True, text=True,
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if line.startswith("error[")]
        told = done.returncode in (4, 5) and len(said) == 1
        if "Traceback" in done.stderr or not (told or done.returncode == 0):
            lost.append(f"seed {seed}, {words}: exit {done.returncode}: {done.stderr[-300:]}")
        shutil.rmtree(copy)
    tally("damaged bundles and run folders, by command", count, lost)
