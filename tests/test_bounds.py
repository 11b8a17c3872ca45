"""Every number that a user or a file may set has two bounds, checked before memory is taken."""

from __future__ import annotations

import argparse
import errno
import importlib
import math
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel, ValidationError
from timm.models.vision_transformer import VisionTransformer

import wara
from wara import cli, memory
from wara.adapters import METHODS, method_from_options
from wara.backbones import build_backbone
from wara.config import load_config
from wara.errors import WaraError, as_refusal
from wara.flags import real, whole
from wara.schema import _alternatives, fields_of

HUGE = [10**30, -(10**30), 1e300, -1e300, float("1e400"), -math.inf, math.nan]
DIGITS = "9" * 5000
# Model and field -> why its numbers have no bounds of their own.
UNBOUNDED: dict[tuple[str, str], str] = {}


def every_model() -> list[type]:
    """All strict models of files and all methods, wherever in the package they stand."""
    for module in pkgutil.walk_packages(wara.__path__, "wara."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, waiting = [], [BaseModel]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            waiting.append(cls)
            if cls.__module__.startswith("wara."):
                found.append(cls)
    return [*dict.fromkeys(found), *METHODS.values()]


def placed(kind: Any, value: Any) -> Iterator[Any]:
    """Yield the value in every place of a type where a number may stand."""
    for option in _alternatives(kind):
        origin, inner = get_origin(option), get_args(option)
        if option in (int, float):
            if option is float or not isinstance(value, float):
                yield value
        elif origin is list:
            yield from ([each] for each in placed(inner[0], value))
        elif origin is dict:
            yield from ({"key": each} for each in placed(inner[1], value))
        elif origin is tuple:
            several = [inner[0]] * 2 if inner[-1] is Ellipsis else inner
            for each in placed(inner[0], value):
                yield [each, *[8] * (len(several) - 1)]


CASES = [
    pytest.param(model, name, field.annotation, id=f"{model.__name__}-{name}")
    for model in every_model()
    for name, field in fields_of(model).items()
    if any(True for _ in placed(field.annotation, 8))
]


def test_the_walk_finds_what_there_is() -> None:
    found = {f"{case.values[0].__name__}.{case.values[1]}" for case in CASES}
    assert {
        "RunConfig.epochs", "DataConfig.images", "BackboneConfig.img_size",
        "BackboneConfig.options", "BackboneConfig.mean", "PhantomSource.images",
        "BackboneCard.img_size", "Metric.value",
        "WaRA.rank", "WaRA.level", "WaRA.alpha", "WaveFT.k", "WaRA.blocks", "WaRA.budget",
        "AdapterFile.num_classes", "BackboneInfo.grid_size",
    } <= found  # fmt: skip
    assert len(CASES) > 120


@pytest.mark.parametrize(("model", "name", "kind"), CASES)
def test_a_number_beyond_all_bounds_is_refused(model: type, name: str, kind: Any) -> None:
    if (model.__name__, name) in UNBOUNDED:
        return
    # A method is a dataclass, and made past what words its refusals.
    read = (
        model.model_validate if issubclass(model, BaseModel)
        else lambda options: type.__call__(model, **options)
    )  # fmt: skip
    for huge in HUGE:
        for value in placed(kind, huge):
            with pytest.raises(ValidationError) as caught:
                read({name: value})
            about = [error for error in caught.value.errors() if name in map(str, error["loc"])]
            assert about, f"{model.__name__}.{name} takes {value!r}"


@pytest.mark.parametrize("setting", [
    "lr=1e400", "adapter.alpha=1e400", "backbone.options={depth: 100000000}", "bootstrap=100000000",
    "batch_size=100000000", "data.images=100000000", "backbone.img_size=100000000",
    "epochs=100000000", "data.workers=100000000", f"epochs={DIGITS}", f"adapter.blocks={DIGITS}",
    f"adapter.budget=lora_r{DIGITS}", "adapter.budget=1e13", "adapter.budget=9999*lora_r999999999",
    "backbone.img_size=[8, 4097]", "adapter.blocks=[0, 10000]",
])  # fmt: skip
def test_a_config_is_refused_in_one_line(setting: str) -> None:
    with pytest.raises(WaraError) as caught:
        load_config("fundus_wara", [setting])
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert "int_max_str_digits" not in str(caught.value)


def flags() -> Iterator[tuple[str, argparse.Action]]:
    (verbs,) = (
        action for action in cli.build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )  # fmt: skip
    for verb, parser in verbs.choices.items():
        yield from ((verb, action) for action in parser._actions if action.type is not None)


def test_every_flag_that_is_a_number_has_bounds() -> None:
    names = []
    for verb, action in flags():
        reader: Any = action.type
        assert reader not in (int, float), f"{verb} {action.option_strings}"
        if isinstance(reader, type):
            continue
        names.append(f"{verb} {action.option_strings[0]}")
        for word in ("1e400", "nan", "-inf", str(10**30), DIGITS, "-1", "x", ""):
            with pytest.raises(WaraError) as caught:
                reader(word)
            assert caught.value.exit_code == 2 and len(str(caught.value)) < 200
            assert action.option_strings[0] in str(caught.value)
    assert len(names) == 12, names


def test_bounds_of_flags_themselves_are_taken() -> None:
    assert [whole("-n", 1, 9)(word) for word in ("1", "9")] == [1, 9]
    assert [real("-x", 0, 1)(word) for word in ("0", "1", "1e-3")] == [0, 1, 0.001]


@pytest.mark.parametrize("more", [
    ["--seeds", "100000000"], ["--seeds", DIGITS], ["--seeds", f"0,{2**32}"],
    ["--seeds", "1000", "--splits", "11"], ["--sweep-train", DIGITS], ["--tune", "lr=100000001"],
    ["--tune", f"lr={DIGITS}"], ["--splits", "0"], ["--jobs", "100000000"], ["--rope", "nan"],
    ["--budget", "9999*lora_r999999999"], ["--sweep-budget", "1e400"], ["--sweep-budget", DIGITS],
])  # fmt: skip
def test_a_comparison_is_refused_in_one_line(more: list[str], tmp_path, capsys) -> None:
    line = ["compare", "--cfg", "fundus_wara", "--methods", "wara", "--plan",
            "--reference", "none", "--beside", "none"]  # fmt: skip
    assert cli.main([*line, "--out", str(tmp_path / "out"), *more]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.count("\n") == 0 and printed.startswith("error["), printed


def vit() -> VisionTransformer:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    return VisionTransformer(**sizes, num_classes=2)


@pytest.mark.parametrize(("method", "options", "limit"), [
    ("wara", {"rank": 49}, "at most 48"),
    ("wara", {"level": 3}, "1..2"),
    ("lora", {"rank": 4096}, "at most 48"),
    ("tiny_wara", {"rank": 49}, "at most 48"),
    ("tiny_wara", {"coefficients": 2305}, "at most 2304"),
    ("waveft", {"k": 2305}, "2304 or less"),
    ("waveft", {"k": 2**31 - 1}, "2304 or less"),
    ("shira", {"k": [2305] * 8}, "2304 or less"),
    ("lora", {"blocks": [2]}, "0..1"),
])  # fmt: skip
def test_what_a_model_cannot_have_names_its_limit(method: str, options: Any, limit: str) -> None:
    with pytest.raises(WaraError) as caught:
        wara.adapt(vit(), method_from_options(method, options))
    assert caught.value.exit_code == 2 and limit in str(caught.value)


@pytest.mark.parametrize(("method", "options", "limit"), [
    ("dora", {"rank": 49}, "at most 48"),
    ("loha", {"rank": 49}, "at most 48"),
    ("adalora", {"rank": 40}, "48 or less"),
    ("fourierft", {"n_frequency": 2305}, "at most 2304"),
])  # fmt: skip
def test_what_a_model_cannot_have_through_peft(method: str, options: Any, limit: str) -> None:
    pytest.importorskip("peft")
    test_what_a_model_cannot_have_names_its_limit(method, options, limit)


def test_outputs_of_a_head_are_bounded() -> None:
    for count in (-1, 100_000_000):
        with pytest.raises(WaraError, match="0 to 100000 outputs") as caught:
            build_backbone("wara_nano", num_classes=count)
        assert caught.value.exit_code == 2


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_made(monkeypatch) -> None:
    made: list[str] = []

    def counted(**options: Any) -> VisionTransformer:
        made.append(str(torch.get_default_device()))
        return VisionTransformer(**options)

    monkeypatch.setattr("wara.backbones.build.VisionTransformer", counted)
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000)
    with pytest.raises(WaraError) as caught:
        build_backbone("wara_nano", num_classes=3)
    assert caught.value.exit_code == 7 and "0.0 GB are free" in str(caught.value)
    assert set(made) == {"meta"}


def test_fixed_directions_that_memory_cannot_hold_are_refused(monkeypatch) -> None:
    # Queries and outputs of 2 blocks, 8 coefficients, 8 x 8 directions of float32.
    needed = 4 * 8 * 64 * 4
    model, method = vit(), wara.TinyWaRA(coefficients=8, rank=8)
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(memory, "available_memory", lambda free=free: free)
        if fits:
            wara.unload(wara.adapt(model, method))
            continue
        with pytest.raises(WaraError) as caught:
            wara.adapt(model, method)
        assert caught.value.exit_code == 7 and "adapter.coefficients" in str(caught.value)


def test_free_memory_is_the_least_of_what_limits_it(tmp_path, monkeypatch) -> None:
    info, limit, used = (tmp_path / name for name in ("meminfo", "max", "current"))
    monkeypatch.setattr(memory, "_MEMINFO", info)
    monkeypatch.setattr(memory, "_CONTAINERS", [(limit, used)])
    assert memory.available_memory() is None
    info.write_text("MemTotal:  9 kB\nMemAvailable:    500 kB\n")
    assert memory.available_memory() == 512_000
    limit.write_text("100000\n")
    used.write_text("40000\n")
    assert memory.available_memory() == 60_000
    limit.write_text("max\n")
    assert memory.available_memory() == 512_000


@pytest.mark.parametrize("error", [
    MemoryError("Unable to allocate 7.28 TiB for an array"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a memory object"),
])  # fmt: skip
def test_a_failed_allocation_is_a_lack_of_resources(error: Exception) -> None:
    assert as_refusal(error).exit_code == 7


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENAMETOOLONG])
def test_what_may_not_be_used_is_no_bug(number: int) -> None:
    found = as_refusal(OSError(number, os.strerror(number), "/mnt/share/x"))
    assert found.exit_code == 5 and "/mnt/share/x" in str(found) and found.remedy
    with pytest.raises(RuntimeError) as caught:
        Path("~nobody-of-this-name/images").expanduser()
    assert as_refusal(caught.value).exit_code == 2


@pytest.mark.parametrize(("room", "exit_code"), [(100 << 20, 7), (1 << 30, 1)])
def test_whatever_fails_at_the_limit_of_memory_fails_of_that(room: int, exit_code: int) -> None:
    code = (
        "import resource; from pathlib import Path; from wara.errors import as_refusal; "
        "pages = int(Path('/proc/self/statm').read_text().split()[0]); "
        f"limit = pages * resource.getpagesize() + {room}; "
        "resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY)); "
        "print(as_refusal(SystemError('error return without exception set')).exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{exit_code}\n", done.stderr


def test_a_form_that_an_operation_lacks_is_no_lack_of_memory() -> None:
    assert as_refusal(RuntimeError("could not create a primitive descriptor")).exit_code == 1
