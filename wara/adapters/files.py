"""The adapter folder: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from wara.adapters.inject import (
    RECORD,
    adapt,
    adapter_state_dict,
    base_hash,
    classifiers,
    load_adapter_state,
    record_of,
    unload,
)
from wara.adapters.methods import method_from_options, method_options
from wara.errors import WaraError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT = "wara-adapter"
FORMAT_VERSION = 1


def save_adapter(model: nn.Module, folder: str | Path, extra: dict[str, Any] | None = None) -> Path:
    """Write adapter and head to a folder.

    Args:
        model: an adapted model.
        folder: made if absent; the two files in it are replaced, each in one step.
        extra: what else to record under `extra` in the JSON file, such as class names.

    Returns:
        The folder.

    Raises:
        WaraError: kind `config` when the model is not adapted, `storage` when writing fails.
    """
    folder = Path(folder)
    record = record_of(model)
    state = {name: t.cpu().contiguous().clone() for name, t in adapter_state_dict(model).items()}
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "method": record.method.name,
        "options": method_options(record.method),
        "model": type(model).__name__,
        "num_classes": getattr(model, "num_classes", None),
        "base_sha256": base_hash(model),
        "extra": extra or {},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS_FILE, save(state, metadata={"format": FORMAT}))
        write_whole(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        remedy = "free space or choose another folder"
        raise WaraError(
            "storage", f"cannot write the adapter: {error}", str(folder), remedy
        ) from error
    return folder


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """Read and check the JSON file of an adapter folder.

    Args:
        folder: what `save_adapter` wrote.

    Returns:
        The content; see `save_adapter`.

    Raises:
        WaraError: kind `artefact` when a file is missing or not of this format.
    """
    folder = Path(folder)
    remedy = "give the adapter/ folder of a finished run"
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise WaraError("artefact", f"no {name} in the adapter folder", str(folder), remedy)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WaraError("artefact", "not valid JSON", str(folder / CONFIG_FILE), remedy) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise WaraError("artefact", "not a wara adapter", str(folder / CONFIG_FILE), remedy)
    kinds = {"method": str, "options": dict, "base_sha256": str, "num_classes": int | None}
    wrong = [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]
    if config.get("version") == FORMAT_VERSION and wrong:
        what = f"missing or of the wrong kind: {', '.join(wrong)}"
        raise WaraError("artefact", what, str(folder / CONFIG_FILE), remedy)
    if config.get("version") != FORMAT_VERSION:
        what = f"adapter format {config.get('version')} where {FORMAT_VERSION} is known"
        raise WaraError("artefact", what, str(folder), "install the wara version that wrote it")
    return config


def load_adapter(model: nn.Module, folder: str | Path, *, check_base: bool = True) -> nn.Module:
    """Put a saved adapter and its head onto a timm model, in place.

    An adapter that the model carries is taken off first, so adapters can be switched on one base.

    Args:
        model: the base model the adapter was trained on; its classifier is resized if needed.
        folder: what `save_adapter` wrote.
        check_base: refuse a model whose base weights are not those of training.

    Returns:
        The same model, adapted, with logits bit-identical to those of the saved one.

    Raises:
        WaraError: kind `artefact` when the files are damaged or do not fit the model, which is then
            left as it was.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    try:
        state = load((folder / WEIGHTS_FILE).read_bytes())
    except SafetensorError as error:
        remedy = "copy the adapter folder again; the file is damaged"
        raise WaraError("artefact", str(error), str(folder / WEIGHTS_FILE), remedy) from error
    try:
        method = method_from_options(config["method"], config["options"])
    except WaraError as error:
        remedy = "install the wara version that wrote it"
        raise WaraError("artefact", error.what, str(folder / CONFIG_FILE), remedy) from error
    undo = _remember(model)
    try:
        classes = config["num_classes"]
        if classes is not None and getattr(model, "num_classes", classes) != classes:
            cast(Any, model).reset_classifier(classes)
        adapt(model, method)
        if check_base and base_hash(model) != config["base_sha256"]:
            what = "the base weights are not those the adapter was trained on"
            remedy = "load the backbone weights named in the run's provenance.json"
            raise WaraError("artefact", what, str(folder), remedy)
        load_adapter_state(model, state)
    except BaseException:
        undo()
        raise
    return model


def _remember(model: Any) -> Callable[[], None]:
    """Take the adapter off a model, if it carries one; return what puts all back as it was."""
    before = None
    if hasattr(model, RECORD):
        state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
        before = (record_of(model).method, state)
        unload(model)
    heads = {
        name: module
        for name, module in model.named_modules()
        if any(module is head for head in classifiers(model))
    }
    count = getattr(model, "num_classes", None)

    def undo() -> None:
        if hasattr(model, RECORD):
            unload_quietly(model)
        for name, module in heads.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
        if count is not None:
            model.num_classes = count
        if before is not None:
            load_adapter_state(adapt(model, before[0]), before[1])

    return undo


def unload_quietly(model: nn.Module) -> None:
    """Take a freshly placed adapter off again, also where `unload` would refuse."""
    if record_of(model).removable:
        unload(model)
