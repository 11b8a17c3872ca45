"""The adapter folder: `adapter_config.json` and `adapter_model.safetensors`, one artefact.

The JSON file says what the tensors are and what they fit, and holds their SHA-256 and one of its
own content; both files are replaced in one step. What does not agree is refused before the model is
touched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from wara import __version__
from wara.adapters.base import Method
from wara.adapters.fingerprint import FINGERPRINT, base_hash
from wara.adapters.inject import adapt, has_unsaved, replacing_adapter, take_off
from wara.adapters.methods import class_key, known_method, method_from_options
from wara.adapters.state import (
    adaptation_of,
    adapter_state_dict,
    check_finite,
    check_state,
    load_adapter_state,
)
from wara.errors import WaraError
from wara.schema import Section, faults_of
from wara.storage import (
    canonical_sha256,
    open_regular,
    parse_json,
    read_regular,
    replacing_folder,
)
from wara.vit import BackboneInfo, classifiers, unwrap

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT = "wara-adapter"
FORMAT_VERSION = 2
LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
AS_WRITTEN = "give the adapter/ folder of a finished run, as it was written"
MOST_JSON = 1 << 22
"""A description above this many bytes is none; a list of `k` for each matrix takes a thousandth."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class AdapterFile(Section):
    """What `adapter_config.json` says; tensors and model are held against it."""

    format: Literal["wara-adapter"] = Field(description="What the folder is.")
    version: Literal[2] = Field(description="Version of this form.")
    wara: str = Field(max_length=100, description="Version of the package that wrote it.")
    method: str = Field(min_length=1, max_length=500, description="Name of the method.")
    options: dict[str, Any] = Field(description="Its options; a budget is fitted already.")
    model: str = Field(max_length=500, description="Class of the base model.")
    base_sha256: Sha256 = Field(description="Fingerprint of the base, see `base_hash`.")
    base_low: dict[Literal["bfloat16", "float16"], Sha256] = Field(
        default_factory=dict, description="Fingerprints of the base in lower precision."
    )
    fingerprint: int = Field(1, ge=1, le=10_000, description="Version of the fingerprints.")
    num_classes: int | None = Field(ge=0, le=1_000_000, description="Outputs of the head.")
    backbone: BackboneInfo | None = Field(description="The backbone and what its images must be.")
    bits: int | None = Field(ge=1, le=16, description="Bits of the greys of 16-bit files.")
    greys: Literal["window", "stored", "range"] = Field(description="How DICOM greys are shown.")
    task: Literal["binary", "multiclass", "multilabel", "ordinal"] | None = Field(
        description="What is predicted."
    )
    classes: list[str] | None = Field(description="Names of the outputs, in order.")
    extra: dict[str, Any] = Field(description="Whatever else the writer noted.")
    tensors_sha256: Sha256 = Field(description="SHA-256 of the file of tensors.")
    sha256: Sha256 = Field(description="SHA-256 of all above, as canonical JSON.")


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    backbone: BackboneInfo | None = None,
    task: str | None = None,
    classes: Sequence[str] | None = None,
    bits: int | None = None,
    greys: str = "window",
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write adapter and head to a folder.

    Args:
        model: an adapted model, compiled or not.
        folder: made if absent; the two files in it are replaced in one step.
        backbone: what the model was built from and what its images must be, where known.
        task: what is predicted.
        classes: names of the outputs, in order.
        bits: see `wara.images.ImageSpec`.
        greys: see there.
        extra: what else to record, such as the epoch; plain values.

    Returns:
        The folder.

    Raises:
        WaraError: kind `config` when the model is not adapted or the classes do not match its head,
            `storage` when writing fails.
    """
    folder, inner = Path(folder), unwrap(model)
    adaptation = adaptation_of(inner)
    count = getattr(inner, "num_classes", None)
    if classes is not None and count is not None and len(classes) != count:
        what = f"{len(classes)} class names for a head with {count} outputs"
        raise WaraError("config", what, "classes", "name every output, in order")
    state = {name: t.cpu().contiguous().clone() for name, t in adapter_state_dict(inner).items()}
    check_finite(state, "nonfinite")
    tensors = save(state, metadata={"format": FORMAT})
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "wara": __version__,
        "method": class_key(type(adaptation.method)),
        "options": adaptation.method.options(),
        "model": type(inner).__name__,
        "base_sha256": base_hash(inner),
        "base_low": {name: base_hash(inner, dtype) for name, dtype in LOW.items()},
        "fingerprint": FINGERPRINT,
        "num_classes": count,
        "backbone": None if backbone is None else backbone.model_dump(mode="json"),
        "bits": bits,
        "greys": greys,
        "task": task,
        "classes": None if classes is None else list(classes),
        "extra": extra or {},
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
    }
    description = _described(content, adaptation.method)
    with replacing_folder(folder) as fresh:
        (fresh / WEIGHTS_FILE).write_bytes(tensors)
        (fresh / CONFIG_FILE).write_bytes(description)
    return folder


def _described(content: dict[str, Any], method: Method) -> bytes:
    """Return the JSON file, read back as a reader will.

    Raises:
        WaraError: kind `config` when what was given to be written could not be read again.
    """
    try:
        whole = content | {"sha256": canonical_sha256(content)}
        text = json.dumps(whole, indent=2, allow_nan=False).encode() + b"\n"
        found = _parse(text, "")
    except (TypeError, ValueError, RecursionError) as error:
        what = f"the adapter's description is no JSON: {error}"
        remedy = "give plain values: text, finite numbers, lists, mappings with text as keys"
        raise WaraError("config", what, "", remedy) from error
    except WaraError as error:
        what = f"the adapter's description could not be read again: {error.what}"
        remedy = "correct what save_adapter is given, or the options of the method"
        raise WaraError("config", what, "", remedy) from error
    if found.options != method.options():
        what = f"the options of {found.method} read back from JSON are others"
        remedy = "give its options types that JSON can hold; see docs/add_a_method.md"
        raise WaraError("config", what, "adapter", remedy)
    return text


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read and check the JSON file of an adapter folder.

    Args:
        folder: what `save_adapter` wrote.

    Returns:
        The content.

    Raises:
        WaraError: kind `artefact` when a file is missing, damaged, or not of this form.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise WaraError("artefact", f"no {name} in the adapter folder", str(folder), AS_WRITTEN)
    path = folder / CONFIG_FILE
    try:
        with open_regular(path) as stream:
            data = stream.read(MOST_JSON + 1)
    except OSError as error:
        what = f"cannot read: {error.strerror}"
        raise WaraError("artefact", what, str(path), AS_WRITTEN) from error
    return _parse(data, str(path))


def _parse(data: bytes, path: str) -> AdapterFile:
    try:
        if len(data) > MOST_JSON:
            raise ValueError(f"above {MOST_JSON:,} bytes")
        content = parse_json(data)
    except ValueError as error:
        raise WaraError("artefact", f"not valid JSON: {error}", path, AS_WRITTEN) from error
    if content.get("format") != FORMAT:
        raise WaraError("artefact", "not a wara adapter", path, AS_WRITTEN)
    if content.get("version") != FORMAT_VERSION:
        what = f"adapter format {content.get('version')!r} where {FORMAT_VERSION} is known"
        raise WaraError("artefact", what, path, "install the wara version that wrote it")
    try:
        found = AdapterFile.model_validate(content)
    except ValidationError as error:
        first = next(iter(faults_of(error, AdapterFile).values()))
        raise WaraError("artefact", first.what, path, AS_WRITTEN) from error
    own = {key: value for key, value in content.items() if key != "sha256"}
    try:
        agrees = canonical_sha256(own) == found.sha256
    except (ValueError, RecursionError):
        agrees = False
    if not agrees:
        what = "the description was changed since it was written: its checksum does not agree"
        raise WaraError("artefact", what, path, AS_WRITTEN)
    return found


def _read_tensors(folder: Path, wanted: str) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    remedy = "copy the adapter folder again; the file is damaged"
    try:
        data = read_regular(path)
    except OSError as error:
        raise WaraError("artefact", f"cannot read: {error.strerror}", str(path), remedy) from error
    if hashlib.sha256(data).hexdigest() != wanted:
        what = "the tensors are not those of the description: their checksum does not agree"
        raise WaraError("artefact", what, str(path), remedy)
    try:
        return load(data)
    except (SafetensorError, ValueError, OverflowError) as error:
        raise WaraError("artefact", str(error), str(path), remedy) from error


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    check_base: bool = True,
    classes: Sequence[str] | None = None,
    methods: Sequence[type[Method]] = (),
) -> nn.Module:
    """Put a saved adapter and its head onto a timm model, in place.

    An adapter that the model carries is taken off first, so adapters can be switched on one base.

    Args:
        model: the base model the adapter was trained on; its classifier is resized if needed.
        folder: what `save_adapter` wrote.
        check_base: refuse a model that is not the one of training: other weights, heads, grid or
            pooling.
        classes: refuse an adapter whose outputs are others, or in another order.
        methods: classes that the adapter's method may be, beside those of wara, of entry points and
            of modules that are imported already. A file never decides what is imported.

    Returns:
        The same model, adapted, with logits bit-identical to those of the saved one. On a base of
        another precision the adapter takes that of the base, as `adapt` and `model.to(dtype)` do.

    Raises:
        WaraError: kind `artefact` when the files are damaged or do not fit the model, which is then
            left as it was.
    """
    folder = Path(folder)
    found = read_adapter(folder)
    if classes is not None and found.classes != list(classes):
        what = f"the adapter's classes are {found.classes}, not {list(classes)}"
        raise WaraError("artefact", what, str(folder), "map its outputs by its own names")
    state = _read_tensors(folder, found.tensors_sha256)
    cls = known_method(found.method, methods)
    try:
        method = method_from_options(cls, found.options)
    except WaraError as error:
        remedy = "install the version of wara, or of the package of the method, that wrote it"
        raise WaraError("artefact", error.what, str(folder / CONFIG_FILE), remedy) from error
    with replacing_adapter(model) as inner:
        _resize_head(inner, found.num_classes)
        _adapt_as_saved(inner, method, folder)
        if check_base:
            _check_base(inner, found, folder)
        check_state(inner, state)
        if has_unsaved(inner):
            # What follows from the options alone is made as it was made in training; only for
            # methods whose layers hold any, and once it is known that the file fits.
            with torch.random.fork_rng(devices=[]):
                adapt(take_off(inner), method)
        load_adapter_state(inner, state)
    return model


def _check_base(model: nn.Module, found: AdapterFile, folder: Path) -> None:
    """Refuse a base that is not the one of training, at its precision or at a lower one."""
    if found.fingerprint != FINGERPRINT:
        what = f"its base has a fingerprint of version {found.fingerprint}, known is {FINGERPRINT}"
        remedy = "load it with check_base=False if the base is surely that of training"
        raise WaraError("artefact", what, str(folder), f"{remedy}, or with the wara that wrote it")
    if base_hash(model) in (found.base_sha256, *found.base_low.values()):
        return
    what = "the base weights are not those the adapter was trained on"
    if type(model).__name__ != found.model:
        what = f"the base is a {type(model).__name__}, the adapter's was a {found.model}"
    remedy = "build the backbone with the weights, heads, grid and pooling of training"
    raise WaraError("artefact", what, str(folder), remedy)


def _resize_head(model: Any, count: int | None) -> None:
    """Give the model a head with so many outputs; its numbers come with the adapter's."""
    if count in (None, getattr(model, "num_classes", count)):
        return
    like = next(model.parameters())
    with torch.device("meta"):
        model.reset_classifier(count)
    for head in classifiers(model):
        head.to(like.dtype).train(model.training)


def _adapt_as_saved(model: nn.Module, method: Method, folder: Path) -> None:
    try:
        adapt(model, method, empty=True)
    except WaraError as error:
        # Options that no model of this kind can have: the fault is the file's.
        remedy = "use the backbone that the adapter was trained on"
        raise WaraError("artefact", error.what, str(folder), remedy) from error
