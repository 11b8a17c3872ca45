"""Every command and Python line of the README and the docs runs, or is parsed by its script."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from medmnist_helpers import BAR, write_medmnist
from training_helpers import make_images, make_weights

import wara
from wara import cli
from wara.adapters import METHODS
from wara.adapters.sparse import GAUSSIAN
from wara.cards import load_card
from wara.config import RunConfig, load_config
from wara.data.imageset import DEPTHS
from wara.deploy.verbs import VERBS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "datasets" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FORMULA = re.compile(r"(z|mix\(z\)|Δ)\s+=|exp\(|P\(")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def blocks() -> Iterator[Block]:
    """Yield fenced and indented blocks; an indented one is a shell's or Python's by its look."""
    for page in PAGES:
        fence, kept, start = None, [], 0
        lines = [*page.read_text(encoding="utf-8").splitlines(), ""]
        for number, line in enumerate(lines, start=1):
            name = str(page.relative_to(ROOT))
            if line.startswith("```"):
                if fence is None:
                    fence, kept, start = line[3:].strip() or "text", [], number
                else:
                    yield Block(name, start, fence, "\n".join(kept))
                    fence, kept = None, []
            elif fence is not None:
                kept.append(line)
            elif line.startswith("    ") and (kept or not lines[number - 2].strip()):
                start = start if kept else number
                kept.append(line[4:])
            elif kept:
                text = "\n".join(kept)
                python = re.match(r"(from|import) \w|\w+ = wara\.", text)
                yield Block(name, start, "python" if python else "shell", text)
                kept = []


ALL = list(blocks())


def ids(block: Block) -> str:
    return f"{block.page}:{block.line}"


def commands() -> Iterator[tuple[str, list[str]]]:
    for block in ALL:
        if block.language in ("shell", "bash"):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if not FORMULA.match(line) else []
                if words:
                    yield ids(block), words


COMMANDS = list(commands())


def test_every_block_is_understood() -> None:
    assert {block.language for block in ALL} <= {"shell", "bash", "python", "yaml", "text"}
    programs = {words[0] for _, words in COMMANDS}
    assert programs <= {"make", "python", "wara", "pip"}, programs
    assert {"make", "python"} <= programs


CONFIG_OF_ONES_OWN = """
dataset: {images}
offline: error
backbone: {{name: test_vit, weights: FILE.safetensors, img_size: 32}}
adapter: {{method: wara, level: 1, rank: 2}}
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the placeholders of the docs stand for."""
    monkeypatch.setenv("WARA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WARA_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    make_images(tmp_path / "path/to/images")
    make_weights(tmp_path / "FILE.safetensors")
    (tmp_path / "my_methods.py").write_text(custom_method())
    for name in ("busi", "chest_xray"):
        images = make_images(tmp_path / name, per_class=(20, 20, 20 if name == "busi" else 22))
        (tmp_path / f"{name}.yaml").write_text(CONFIG_OF_ONES_OWN.format(images=images.name))
    yield tmp_path
    sys.modules.pop("my_methods", None)


def custom_method() -> str:
    (block,) = [block for block in ALL if block.text.startswith("# my_methods.py")]
    return block.text


def trains(words: list[str]) -> bool:
    return words[:2] in (["python", "train.py"], ["wara", "train"])


def arguments(words: list[str]) -> list[str]:
    """Return the arguments of a training command on images and weights that are there."""
    named = {
        "dataset=DIR": "dataset=path/to/images",
        "backbone.weights=FILE.safetensors": "backbone.weights=FILE.safetensors",
        "backbone.name=vit_tiny_patch16_224.augreg_in21k_ft_in1k": "backbone.name=test_vit",
    }
    return [named.get(word, word) for word in words[2:]] + ["--set", "data.images=60"]


@pytest.mark.parametrize(("where", "words"), [c for c in COMMANDS if trains(c[1])])
def test_training_commands_pass_every_check(where: str, words: list[str], workplace: Path) -> None:
    assert cli.main(["train", *arguments(words), "--dry-run"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("where", "words"), [c for c in COMMANDS if trains(c[1])])
def test_training_commands_run(where: str, words: list[str], workplace: Path) -> None:
    short = ["--set", "epochs=1", "--set", "bootstrap=9", "--set", "amp=off", "--out", "runs/x"]
    assert cli.main(["train", *arguments(words), *short]) == 0
    assert (workplace / "runs/x/metrics.json").is_file()


def deploys(words: list[str]) -> bool:
    return words[:1] == ["wara"] and words[1] in [verb.name for verb in VERBS]


def shown_places(words: list[str], page: str) -> list[str]:
    """Return words with a class that the images here have, and an output that is not there yet."""
    named = {"--positive": "rough", "--out": f"made_by_{page}"}
    after = ["", *words]
    return [
        named[before] if before == "--positive" or (w == "bundle" and before == "--out") else w
        for before, w in zip(after, words, strict=False)
    ]


@pytest.fixture
def hospital(workplace: Path, bundle: Path) -> Path:
    """The same, with a finished run, its bundle, images and a trace."""
    shutil.copytree(bundle, workplace / "bundle")
    shutil.copytree(bundle.parent / "run", workplace / "runs/retinamnist_wara_s0")
    images = sorted((bundle.parent / "data/images").glob("*.png"))[:3]
    (workplace / "images").mkdir()
    for image in images:
        shutil.copy(image, workplace / "images")
    words = ["bundle", "images/", "--out", "first.csv", "--trace", "trace.jsonl", "--quiet"]
    assert cli.main(["predict", *words]) == 0
    return workplace


@pytest.mark.parametrize(("where", "words"), [c for c in COMMANDS if deploys(c[1])])
def test_commands_of_bundles_run(where: str, words: list[str], hospital: Path) -> None:
    if "--explain" in words:
        pytest.importorskip("captum")
    if "--dicom-sr" in words:
        pytest.importorskip("highdicom")
    words = shown_places(words[1:], where.replace("/", "_").replace(":", "_"))
    assert cli.main(words) == 0
    if "--out" in words:
        assert (hospital / words[words.index("--out") + 1]).exists()


def test_every_field_of_a_manifest_is_explained(bundle: Path) -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    manifest = json.loads((bundle / "manifest.json").read_text())
    names = {*manifest, *manifest["input"], *manifest["parity"], *manifest["data"]}
    names |= {key for key in manifest["operating_point"] if key != "validation"}
    lacking = {name for name in names if f"`{name}`" not in page}
    assert not lacking


BARS = [f"{name}.yaml" for name in BAR]


def on_small_files(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a command of the published bar with a small network, and make small files for it."""
    pytest.importorskip("peft")
    for flag in BAR.values():
        write_medmnist(place / "cache", flag, monkeypatch)
    dino = "backbone.name=vit_base_patch16_224.dino"
    keys = ["backbone.name=test_vit", "backbone.weights=FILE.safetensors", "accelerator=cpu"]
    return [word if word != dino else keys[0] for word in words] + [
        word for key in keys for word in ("--set", key)
    ]


class Parsed(Exception):
    """A script has taken its arguments."""


OTHERS = [
    # Plans of comparisons measure a step of every row.
    pytest.param(*c, marks=pytest.mark.slow if "compare" in c[1] else ())
    for c in COMMANDS if not (trains(c[1]) or deploys(c[1]))
]  # fmt: skip


@pytest.mark.parametrize(("where", "words"), OTHERS)
def test_other_commands(
    where: str, words: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "pip":
        (extra,) = re.findall(r"wara\[(\w+)\]", words[-1]) or [None]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        files = (["-e", "."], ["-r", "bundle/requirements.txt"])
        assert words[1] == "install"
        assert words[2:] in files or extra in project["optional-dependencies"]
    elif words[:2] == ["wara", "compare"]:
        if set(BARS) <= set(words):
            words = on_small_files(words, workplace, monkeypatch)
        elif "bands/bands.yaml" in words:  # what the command above it has made
            script = [sys.executable, str(ROOT / "benchmarks/bands.py"), "--out", "bands"]
            subprocess.run([*script, "--images", "60"], check=True)
        if "--sweep-train" in words:  # of the images that there are here
            words = [*words, "--sweep-train", "8,16,30"]
        if any("level=2" in word for word in words):  # a grid that has two levels
            words = [*words, "--set", "backbone.img_size=64"]
        assert cli.main([*words[1:], "--plan", "--set", "data.images=60"]) == 0
    elif words[0] == "wara":
        assert cli.main(words[1:]) == 0
    elif words[1] == "bundle/infer.py":  # what it does is the subject of tests of its own
        assert not (ROOT / words[1]).exists()
    elif words[1] == "-m":
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__")
        assert (workplace / words[words.index("--out") + 1]).is_file()
    else:
        # These take from minutes to hours; that they run is tested in the small elsewhere.
        script, original = ROOT / words[1], argparse.ArgumentParser.parse_args

        def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
            original(self, args, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        monkeypatch.setattr(sys, "argv", [str(script), *words[2:]])
        monkeypatch.syspath_prepend(script.parent)
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")


PYTHON = [b for b in ALL if b.language == "python" and not b.text.startswith("# my_methods.py")]


@pytest.mark.parametrize("block", PYTHON, ids=ids)
def test_python_lines_run(block: Block, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def untrained(name: str, pretrained: bool = False, **options: Any) -> Any:
        torch.manual_seed(0)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", untrained)
    model = untrained("test_vit", num_classes=3)
    adapted = wara.adapt(untrained("test_vit", num_classes=3), wara.LoRA())
    wara.export_peft(adapted, workplace / "peft")
    names = {"model": model, "timm_model": copy.deepcopy(model), "wara": wara, "torch": torch}
    names["folder"] = workplace / "peft"
    exec(compile(block.text, ids(block), "exec"), names)


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "yaml"], ids=ids)
def test_yaml_is_a_card_or_a_config(block: Block, tmp_path: Path) -> None:
    name = re.search(r"^name: (\w+)", block.text, re.M)
    path = tmp_path / f"{name[1] if name else 'config'}.yaml"
    path.write_text(block.text)
    if name:
        assert load_card(path).name == name[1]
    else:
        load_config(path)


def test_a_method_from_outside_does_all_that_ours_do(workplace: Path) -> None:
    module: Any = importlib.import_module("my_methods")
    model = timm.create_model("test_vit", num_classes=3).eval()
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 160, 160)
    wara.adapt(model, module.ScaleShift())
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        for parameter in wara.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    names = set(wara.trainable_parameters(model))
    assert {n.rsplit(".", 1)[-1] for n in names if "adapter" in n} == {"gamma", "beta"}
    assert {"blocks.0.norm1.weight", "blocks.0.norm1.bias"} <= set(model.state_dict())
    wara.save_adapter(model, "own")
    again = wara.load_adapter(copy.deepcopy(plain), "own")
    merged = wara.merge(model)
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and not torch.equal(model(x), plain(x))
        torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-4)
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert merged.state_dict().keys() == plain.state_dict().keys()
    wara.unload(again)
    assert [type(m) for m in again.modules()] == [type(m) for m in plain.modules()]
    features = (model.forward_features(x) for model in (again, plain))
    with torch.no_grad():
        assert torch.equal(*features)
    config = {"method": "my_methods:ScaleShift", "start": 2}
    assert RunConfig(adapter=config).adapter == module.ScaleShift(start=2.0)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("my_methods:ScaleShfit", "does not import"),
        ("no_such_package:Method", "does not import"),
        ("my_methods:ScaleShiftLayer", "is not a method"),
        ("pathlib:Path", "is not a method"),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(
    method: str, words: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--cfg", "fundus_wara.yaml", "--set", f"adapter.method={method}"]
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and f"--set adapter.method={method}" in line


def number(page: str, pattern: str) -> float:
    """The one number that a page states in these words, whatever lines they are broken into."""
    text = " ".join((ROOT / page).read_text().split())
    (found,) = re.findall(pattern, text)
    return float(found)


def test_defaults_and_rates_in_words_are_those_of_the_code() -> None:
    wara_, lora, tiny = wara.WaRA(), wara.LoRA(), wara.TinyWaRA()
    page = "docs/wara.md"
    words = f"So the defaults are `core: {wara_.core}`, `level: {wara_.level}` and `prefix: "
    assert f"{words}{wara_.prefix}`. `lr_core: null`" in (ROOT / page).read_text()
    assert RunConfig().lr_core is None and tiny.prefix == wara_.prefix
    core, factors = wara_.rates["core"], number(page, r"of the factors, which is ([\d.]+) here")
    assert number(page, r"own rate of the cores, (\S+):") == core
    assert number(page, r"5e-2: (\d+) times the factors' rate") == core / factors
    assert number(page, r"Its `lr` is (\S+), as LoRA's") == wara_.rates["adapter"]
    assert wara_.rates["adapter"] == lora.rates["adapter"]
    page = "docs/methods.md"
    assert number(page, r"paper takes (\d+) for WaveFT and SHiRA. So does") == wara.WaveFT().scale
    assert number(page, r"`shira` has (\d+), as in PEFT") == wara.SHiRA().scale
    assert number(page, r"a rate (\d+) times as high, which") == pytest.approx(
        wara.SHiRA().rates["adapter"] / wara.WaveFT().rates["adapter"]
    )
    assert number(page, r"the deviation, which is ([\d.]+) here") == GAUSSIAN
    heads = {method.rates["head"] for method in METHODS.values()}
    assert heads == {number(page, r"no augmentation, the head at (\S+), macro")}
    bits = r"`bits` \(([\d, ]+) or (\d+);"
    text = " ".join((ROOT / "docs/images.md").read_text().split())
    (found,) = re.findall(bits, text)
    assert tuple(int(n) for n in ", ".join(found).split(",")) == DEPTHS
