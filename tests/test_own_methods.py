"""A method of the user's own: found where they are, and refused in one line where it cannot run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
from training_helpers import environment, tiny_config

import wara
from wara import cli
from wara.adapters import find_method
from wara.config import RunConfig
from wara.errors import WaraError

HEAD = """
from typing import ClassVar
from torch import nn
from wara.adapters import AdapterLayer, Method, options

class Scale(AdapterLayer):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(nn.init.ones_(nn.Linear(1, 64).bias))
    def forward(self, base, x):
        return base(x) * self.gamma
"""
GOOD = """
@options
class Own(Method):
    name: ClassVar[str] = "own-scale_1.0"
    summary: ClassVar[str] = "a scale"
    start: float = 1.0
    def layers(self, model):
        return {"blocks.0.norm1": Scale()}
"""
# What a slip changes in GOOD, and what is said of it.
SLIPS = {
    "no_name": ('    name: ClassVar[str] = "own-scale_1.0"\n', "", "the class has no name"),
    "bad_name": ("own-scale_1.0", "a/b c", "the name 'a/b c' is not made of"),
    "taken_name": ("own-scale_1.0", "lora", "that of a method of wara"),
    "no_summary": ('    summary: ClassVar[str] = "a scale"\n', "", "the class has no summary"),
    "no_head": ("    start", "    rates = {'adapter': 1e-2}\n    start", "lacks the head"),
    "rate_word": ("    start", "    rates = {'adapters': 1, 'head': 1}\n    start", "'adapters'"),
    "rate_sign": ("    start", "    rates = {'adapter': -1, 'head': 1}\n    start", "at least 0"),
    "rate_list": ("    start", "    rates = ['adapter', 'head']\n    start", "no mapping"),
    "bare": ("@options\nclass Own", "class Own", "put @options above it"),
    "knob": ("    start", "    knob = ('width',)\n    start", "knob names 'width'"),
    "syntax": ("class Own(", "class Own((", "does not import"),
    "raises": ("@options\nclass Own", "1 / 0\n@options\nclass Own", "does not import"),
    # Seen by the model:
    "path": ("blocks.0.norm1", "blocks.99.norm1", "the model has no module 'blocks.99.norm1'"),
    "layer": (": Scale()", ": nn.Linear(3, 3)", "is no adapter layer"),
    "list": ('{"blocks.0.norm1": Scale()}', "[Scale()]", "it returns no mapping"),
    "idle": ('{"blocks.0.norm1": Scale()}', "{}", "of which 'own-scale_1.0' trains nothing"),
    "cores": ("    start", "    rates = {'core': 1e-2, 'head': 1e-3}\n    start", "has no rate"),
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Name of a module in the current folder, with GOOD in it unless a test writes another."""
    name = "own_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / f"{name}.py").write_text(HEAD + GOOD)
    return name


def slip(name: str, old: str, new: str) -> None:
    assert GOOD.count(old) == 1
    Path(f"{name}.py").write_text(HEAD + GOOD.replace(old, new))


LATE = [*SLIPS][-5:]


@pytest.mark.parametrize("case", [case for case in SLIPS if case not in LATE])
def test_a_slip_in_a_declaration_is_refused_in_one_line(
    own: str, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, words = SLIPS[case]
    slip(own, old, new)
    argv = ["--cfg", "fundus_wara.yaml", "--set", f"adapter.method={own}:Own", "--print-config"]
    assert cli.main(["train", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and f"--set adapter.method={own}:Own" in line and line.count("; ") == 2


@pytest.mark.parametrize("case", LATE)
def test_what_does_not_fit_the_model_is_refused(own: str, case: str, tmp_path: Path) -> None:
    old, new, words = SLIPS[case]
    slip(own, old, new)
    sys.path.append(str(tmp_path))
    from wara.training.start import run

    with pytest.raises(WaraError) as caught:
        run(tiny_config(tmp_path, adapter={"method": f"{own}:Own"}), dry_run=True)
    assert caught.value.exit_code == 2 and caught.value.remedy
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_refused_layer_leaves_the_model_plain(own: str, tmp_path: Path) -> None:
    slip(own, *SLIPS["path"][:2])
    sys.path.append(str(tmp_path))
    model = timm.create_model("test_vit", num_classes=3)
    with pytest.raises(WaraError, match="no module"):
        wara.adapt(model, find_method(f"{own}:Own")())
    wara.adapt(model, wara.LoRA())


def test_an_option_without_a_sentence_is_printed(
    own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--cfg", "fundus_wara.yaml", "--set", f"adapter.method={own}:Own", "--print-config"]
    assert cli.main(["train", *argv]) == 0
    assert "  start: 1.0\n" in capsys.readouterr().out


@pytest.mark.slow
def test_the_installed_command_looks_where_the_user_is(own: str, tmp_path: Path) -> None:
    """As the script that pip writes: `sys.path` begins with the folder of the script."""
    script = tmp_path / "bin" / "wara"
    script.parent.mkdir()
    script.write_text("import sys\nfrom wara.cli import main\nsys.exit(main())\n")
    command = [sys.executable, str(script), "train", "--cfg", "fundus_wara.yaml", "--print-config"]
    command += ["--set", f"adapter.method={own}:Own"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"method: {own}:Own" in done.stdout


def test_a_rate_of_cores_that_do_not_train_is_refused() -> None:
    given = {"adapter": {"method": "wara", "core": "identity"}}
    assert "core" not in RunConfig.model_validate(given).rates
    assert RunConfig.model_validate(given).resolved().lr_core is None
    with pytest.raises(ValueError, match="trains no cores under the options set"):
        RunConfig.model_validate(given | {"lr_core": 0.1})
    with pytest.raises(ValueError, match="'lora' trains no cores"):
        RunConfig.model_validate({"adapter": {"method": "lora"}, "lr_core": 0.1})
