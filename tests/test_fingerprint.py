"""The fingerprint of a base: what it sees, what it must not see, the same everywhere."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from oracles import reseal
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import wara
from wara.adapters import base_hash, files
from wara.errors import WaraError

ROOT = Path(__file__).resolve().parents[1]


def eva(**given: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return Eva(**{**sizes, "num_classes": 3, "use_rot_pos_emb": True, **given}).eval()


def vit(**given: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**sizes, "num_classes": 3, **given}).eval()


def stirred(model: Any, method: Any) -> Any:
    torch.manual_seed(1)
    wara.adapt(model, method)
    with torch.no_grad():
        for parameter in wara.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def scale(model: Any, name: str, factor: float) -> None:
    buffer = dict(model.named_buffers())[name]
    assert name not in model.state_dict()
    buffer.mul_(factor)


class Switched(nn.Module):
    """A module of a user's own, with a setting that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.window = (4, 4)
        self.mode = "reflect"
        self.temperature = 1.5
        self.flag: bool | None = None


def switched() -> Any:
    model = vit()
    model.pos_drop = Switched()
    return model


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "rope buffer": (eva, lambda m: scale(m, "rope.pos_embed", 1.01)),
    "rope temperature": (eva, lambda m: setattr(m.rope, "temperature", 100.0)),
    "rope grid": (eva, lambda m: setattr(m.rope, "ref_feat_shape", [16, 16])),
    "heads": (vit, lambda m: setattr(m.blocks[1].attn, "num_heads", 4)),
    "pooling": (vit, lambda m: setattr(m, "global_pool", "avg")),
    "epsilon": (vit, lambda m: setattr(m.blocks[0].norm1, "eps", 1e-3)),
    "window": (switched, lambda m: setattr(m.pos_drop, "window", (4, 8))),
    "mode": (switched, lambda m: setattr(m.pos_drop, "mode", "constant")),
    "number": (switched, lambda m: setattr(m.pos_drop, "temperature", 1.6)),
    "flag": (switched, lambda m: setattr(m.pos_drop, "flag", True)),
    "value": (vit, lambda m: m.blocks[1].mlp.fc1.bias.data[3].add_(1e-6)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_base_computes_is_in_it(name: str, tmp_path: Path) -> None:
    make, change = CHANGES[name]
    model = make()
    wara.save_adapter(stirred(make(), wara.LoRA()), tmp_path)
    before = base_hash(model)
    assert before == base_hash(make())
    change(model)
    assert base_hash(model) != before
    with pytest.raises(WaraError, match="are not those the adapter was trained on"):
        wara.load_adapter(model, tmp_path)


@pytest.mark.parametrize("make", [vit, eva])
def test_what_training_changes_is_not_in_it(make: Callable[..., Any]) -> None:
    model = make()
    wanted = base_hash(model)
    other = make(drop_rate=0.3, proj_drop_rate=0.2, drop_path_rate=0.2, num_classes=7)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    other.load_state_dict({**other.state_dict(), **own})
    assert base_hash(other) == wanted
    wara.adapt(model, wara.WaRA())
    assert base_hash(model) == wanted
    model.set_grad_checkpointing(True)
    model.train()(torch.randn(2, 3, 48, 48)).sum().backward()
    torch.optim.SGD(list(wara.trainable_parameters(model).values()), lr=0.1).step()
    assert base_hash(model) == base_hash(copy.deepcopy(model)) == wanted
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    assert base_hash(torch.compile(model, backend="eager")) == wanted
    wara.unload(model)
    assert base_hash(model) == wanted


PRINT = """
import sys, timm, torch
sys.path.insert(0, "tests")
from test_fingerprint import eva, vit
from wara.adapters import base_hash
torch.set_num_threads(int(sys.argv[1]))
print(base_hash(eva(img_size=224)), base_hash(vit()))
"""


@pytest.mark.slow
def test_every_process_and_thread_count_agrees() -> None:
    outputs = set()
    for threads in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": threads, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", PRINT, threads]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert outputs == {f"{base_hash(eva(img_size=224))} {base_hash(vit())}\n"}


def test_a_table_computed_on_another_processor_is_the_same() -> None:
    """The last bit of a sine is not the same everywhere, and no reason to refuse an adapter."""
    model = eva()
    wanted = base_hash(model)
    table: Tensor = model.rope.pos_embed
    noise = torch.randint(-1, 2, table.shape, generator=torch.Generator().manual_seed(0))
    table.mul_(1 + noise * torch.finfo(table.dtype).eps)
    assert base_hash(model) == wanted


def test_an_older_fingerprint_is_told_as_such(tmp_path: Path) -> None:
    model = stirred(vit(), wara.LoRA())
    wara.save_adapter(model, tmp_path)

    def older(config: dict[str, Any]) -> None:
        del config["fingerprint"], config["base_low"]
        config["base_sha256"] = "0" * 64

    reseal(tmp_path, older)
    with pytest.raises(WaraError, match="fingerprint of version 1, known is 2") as caught:
        wara.load_adapter(vit(), tmp_path)
    assert caught.value.kind == "artefact" and "check_base=False" in caught.value.remedy
    x = torch.randn(1, 3, 48, 48)
    assert torch.equal(wara.load_adapter(vit(), tmp_path, check_base=False)(x), model(x))


@pytest.mark.parametrize("make", [vit, eva])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [wara.LoRA(), wara.WaRA(), wara.TinyWaRA(), wara.WaveFT()])
def test_an_adapter_goes_onto_its_base_in_lower_precision(
    method: Any, dtype: torch.dtype, make: Callable[..., Any], tmp_path: Path
) -> None:
    model = stirred(make(), method)
    wara.save_adapter(model, tmp_path)
    loaded = wara.load_adapter(make().to(dtype), tmp_path)
    floats = {p.dtype for p in wara.trainable_parameters(loaded).values()}
    assert floats == {dtype}
    x = torch.randn(2, 3, 48, 48, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.to(dtype)(x))
    other = make().to(dtype)
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight[0, 0] += 0.5
    with pytest.raises(WaraError, match="are not those"):
        wara.load_adapter(other, tmp_path)
    # And one that was trained in low precision stays so.
    wara.save_adapter(loaded, tmp_path / "low")
    again = wara.load_adapter(make().to(dtype), tmp_path / "low")
    with torch.no_grad():
        assert torch.equal(again(x), loaded(x))


def test_the_base_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wara.save_adapter(stirred(vit(), wara.WaRA()), tmp_path)
    calls: list[Any] = []
    real = files.base_hash
    monkeypatch.setattr(files, "base_hash", lambda *given: calls.append(given) or real(*given))
    wara.load_adapter(vit(), tmp_path)
    assert len(calls) == 1


def test_windows_and_tables_of_timm_models_are_seen() -> None:
    model = timm.create_model("swinv2_cr_tiny_ns_224", img_size=64, window_size=2, num_classes=3)
    wanted = base_hash(model)
    block: Any = next(m for m in model.modules() if hasattr(m, "shift_size"))
    block.shift_size = (1, 1) if block.shift_size != (1, 1) else (0, 0)
    assert base_hash(model) != wanted
