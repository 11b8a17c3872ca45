"""What a bundle must say to be used: types, ranges and shapes, and that its parts fit each other.

Hashes only tell that a bundle is as somebody sealed it. These checks tell that it can be used, when
it is opened and not in the middle of a job, and that no threshold in it can fail open. A table
holds a line for each value: where it stands, what it must be.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from wara.dicom import GREYS
from wara.errors import WaraError
from wara.images import INTERPOLATIONS

TASKS = ("binary", "multiclass", "multilabel", "ordinal")
BITS = (8, 10, 12, 14, 16)
LARGEST_SIDE = 4096  # pixels of a side; 200 MB an image as the network gets it
_HUGE = 1e300  # finite, and so are sums of a few
_REMEDY = "export the run again, and use no bundle whose origin is not known"
_ABSENT = object()
Rule = tuple[str, Callable[[Any], bool], str]


def check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Check what a manifest says of its model, so that nothing later needs to ask.

    Args:
        manifest: whole by its own hash.
        where: its path, for refusals.

    Raises:
        WaraError: kind "artefact", naming the first value that is not what it must be.
    """
    _check(manifest, _MANIFEST, where)
    names = [item["name"] for item in manifest["classes"]]
    if manifest["task"] == "binary" and len(names) != 2:
        raise _refusal(f"a binary task of {len(names)} classes", where)
    point = manifest["operating_point"]
    if point is None:
        return
    _check(manifest, _POINT, where)
    positive = point["positive"]
    every = len(positive) == len(names) and manifest["task"] != "multilabel"
    if every or len(set(positive)) < len(positive) or not set(positive) <= set(names):
        what = f"operating_point.positive is {_short(positive)}, not some of {_short(names)}"
        raise _refusal(what, where)
    for part in sorted(point.keys() - {"positive", "asked", "threshold"}):
        _check(manifest, ((f"operating_point.{part}", _measures, "measures"),), where)


def check_reliability(trusted: Mapping[str, Any], temperature: float, where: str) -> None:
    """Check the content of `reliability.json`.

    Args:
        trusted: the content.
        temperature: that of the manifest.
        where: its path, for refusals.

    Raises:
        WaraError: kind "artefact".
    """
    _check(trusted, _RELIABILITY, where)
    if trusted["temperature"] != temperature:
        what = f"temperature is {trusted['temperature']}, and {temperature} in the manifest"
        raise _refusal(what, where)
    for name in ("conformal", "ood"):
        part = trusted[name]
        if part["threshold"] is None and not part["reason"]:
            raise _refusal(f"{name} has neither a threshold nor a reason why", where)
    if trusted["ood"]["threshold"] is not None and not trusted["ood"]["validation_scores"]:
        raise _refusal("ood.validation_scores is empty, yet there is a threshold", where)


def check_reference(
    reference: Mapping[str, Any], files: Mapping[str, Any], classes: int, where: str
) -> None:
    """Check the content of `reference/reference.json`.

    Args:
        reference: the content.
        files: names of the files of the bundle.
        classes: outputs of the model.
        where: its path, for refusals.

    Raises:
        WaraError: kind "artefact".
    """
    known = {name.removeprefix("reference/") for name in files if name.startswith("reference/")}

    def images(value: Any) -> bool:
        return _some(value, lambda name: isinstance(name, str) and name in known)

    def logits(value: Any) -> bool:
        return _some(value, lambda row: _numbers(row) and len(row) == classes)

    words = f"a list of {classes} numbers for each image"
    rules: Sequence[Rule] = (
        ("images", images, "names of files in reference/"),
        ("logits", logits, words),
    )
    _check(reference, rules, where)
    if len(reference["images"]) != len(reference["logits"]):
        raise _refusal(f"logits is not {words}", where)


def check_graph(ready: Any, manifest: Mapping[str, Any], width: int, where: str) -> None:
    """Check that a graph takes and gives what manifest and statistics say.

    Args:
        ready: a session of onnxruntime.
        manifest: see `check_manifest`.
        width: of the features that the statistics are of.
        where: its path, for refusals.

    Raises:
        WaraError: kind "artefact".
    """
    size, classes = manifest["input"]["size"], len(manifest["classes"])
    taken = {item.name: item for item in ready.get_inputs()}
    given = {item.name: item for item in ready.get_outputs()}
    if list(taken) != ["images"] or not _shaped(taken["images"], [3, *size]):
        raise _refusal(f"the graph does not take images of {size[0]} x {size[1]} pixels", where)
    if not {"logits", "features"} <= given.keys():
        raise _refusal(f"the graph gives {_short(sorted(given))}, not logits and features", where)
    for name, number, of in (("logits", classes, "classes"), ("features", width, "statistics")):
        if not _shaped(given[name], [number]):
            what = f"{name} of the graph are {given[name].type} {_short(given[name].shape)}"
            raise _refusal(f"{what}, where the {of} want {number} an image", where)


def _shaped(item: Any, rest: Sequence[int]) -> bool:
    """Whether a tensor is float32, of any number of images, and of that shape for each."""
    first, *others = item.shape or [0]
    return item.type == "tensor(float)" and not isinstance(first, int) and others == list(rest)


def read_statistics(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return `means` `[k, d]` and `whitening` `[d, d]`, float32, of an `.npz`.

    Sizes are those of headers before an array is made: compressed members, which may grow to any
    size, are refused, and so is an array whose header asks for more than there is.

    Raises:
        WaraError: kind "artefact" for anything but two such arrays of finite numbers.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {member.filename: member for member in archive.infolist()}
            if set(members) != {"means.npy", "whitening.npy"}:
                raise ValueError(f"holds {_short(sorted(members))}")
            for name, member in members.items():
                stored = member.compress_type == zipfile.ZIP_STORED
                if not stored or member.file_size != member.compress_size:
                    raise ValueError(f"{name} is compressed")
            means, whitening = (
                _matrix(archive.read(f"{name}.npy")) for name in ("means", "whitening")
            )
    # Parsers of hostile bytes raise what they like: of zip, of tokens, of struct, of memory.
    except Exception as error:
        what = f"no statistics of features: {' '.join(str(error).split())[:100]}"
        raise _refusal(what, where) from error
    width = means.shape[1]
    if whitening.shape != (width, width):
        shapes = f"means {means.shape}, whitening {whitening.shape}"
        raise _refusal(f"statistics of features do not fit each other: {shapes}", where)
    if not (np.isfinite(means).all() and np.isfinite(whitening).all()):
        raise _refusal("statistics of features are not finite", where)
    return means, whitening


def _matrix(raw: bytes) -> np.ndarray:
    """Return the matrix of an `.npy` without asking NumPy for more than `raw` holds."""
    stream = io.BytesIO(raw)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("an array of an unknown form")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    fits = len(shape) == 2 and min(shape) > 0
    if dtype != np.dtype("<f4") or not fits:
        raise ValueError(f"an array {shape} of {dtype}, not a matrix of float32")
    if 4 * shape[0] * shape[1] != len(raw) - stream.tell():
        raise ValueError(f"an array {shape} in {len(raw)} bytes")
    flat = np.frombuffer(raw, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if by_columns else "C")


# -- tests of one value ----------------------------------------------------------------------------


def _check(content: Mapping[str, Any], rules: Sequence[Rule], where: str) -> None:
    for at, holds, wanted in rules:
        value: Any = content
        for key in at.split("."):
            value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
        if value is _ABSENT or not holds(value):
            said = "missing" if value is _ABSENT else _short(value)
            raise _refusal(f"{at} is {said}, not {wanted}", where)


def _refusal(what: str, where: str) -> WaraError:
    return WaraError("artefact", what, where, _REMEDY)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(value: Any, low: float = -_HUGE, high: float = _HUGE) -> bool:
    # NaN and infinity fail the comparison; a bool is an int to Python.
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(value: Any, low: int = 0, high: float = _HUGE) -> bool:
    return isinstance(value, int) and _number(value, low, high)


def _word(value: Any) -> bool:
    # Names are joined by "|" in rows, and stand in refusals of one line; cards ask the same.
    return isinstance(value, str) and bool(value) and not any(c < " " or c == "|" for c in value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _some(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(holds, value))


def _numbers(value: Any, low: float = -_HUGE) -> bool:
    return _some(value, lambda each: _number(each, low))


def _or_null(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _one_of(choices: Sequence[Any]) -> tuple[Callable[[Any], bool], str]:
    # The type, too: True is 1, and 8.0 is 8, to Python.
    kinds = {type(choice) for choice in choices}
    return (
        lambda value: type(value) in kinds and value in choices,
        f"one of {', '.join('null' if c is None else str(c) for c in choices)}",
    )


def _share(value: Any) -> bool:
    return _number(value, 0, 1)


def _probability(value: Any) -> bool:
    return _number(value, 0, 1 + 1e-9)  # sums of probabilities may round to more than 1


def _classes(value: Any) -> bool:
    if not _some(value, lambda item: isinstance(item, dict) and _word(item.get("name"))):
        return False
    meant = all("meaning" in item and _or_null(_text)(item["meaning"]) for item in value)
    return meant and len({item["name"] for item in value}) == len(value) > 1


def _size(value: Any) -> bool:
    return _some(value, lambda side: _whole(side, 1, LARGEST_SIDE)) and len(value) == 2


def _measure(value: Any) -> bool:
    if not isinstance(value, dict) or not {"value", "low", "high", "n", "reason"} <= value.keys():
        return False
    low, high = value["low"], value["high"]
    return (
        _or_null(_number)(value["value"]) and _or_null(_number)(low) and _or_null(_number)(high)
        and (low is None) == (high is None) and _whole(value["n"])
        and _or_null(_text)(value["reason"])
    )  # fmt: skip


def _measures(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_measure, value.values()))


def _asked(value: Any) -> bool:
    """Whether it asks for one of the two, as `operating_point` does."""
    if not isinstance(value, dict) or set(value) != {"sensitivity", "specificity"}:
        return False
    return [_share(v) for v in value.values() if v is not None] == [True]


def _ascending(value: Any) -> bool:
    return value == [] or (_numbers(value, 0) and value == sorted(value))


_COUNTS = ("method.adapter_params", "method.head_params")
_TEXTS = ("created", "intended_use", "limits", "licence_of_images", "data.title")
_WORDS = (
    "name", "wara", "input.statistics", "data.name", "backbone.architecture", "backbone.name",
    "method.name",
)  # fmt: skip
# 1e-12: a logit of float32 divided by it is still finite.
_TEMPERATURE: Rule = ("temperature", lambda v: _number(v, 1e-12, 1e12), "a positive number")
_MANIFEST: tuple[Rule, ...] = (
    ("task", *_one_of(TASKS)),
    ("classes", _classes, "two or more different names with a meaning or null"),
    ("input.size", _size, f"two whole numbers from 1 to {LARGEST_SIDE}"),
    ("input.mean", lambda v: _numbers(v) and len(v) == 3, "three numbers"),
    ("input.std", lambda v: _numbers(v, 1e-12) and len(v) == 3, "three positive numbers"),
    ("input.interpolation", *_one_of(INTERPOLATIONS)),
    ("input.bits", *_one_of((None, *BITS))),
    ("input.greys", *_one_of(GREYS)),
    ("model.file", *_one_of(("model.onnx",))),
    ("model.precision", *_one_of(("float32", "int8"))),
    ("reliability.file", *_one_of(("reliability.json",))),
    _TEMPERATURE,
    ("metrics.val", _measures, "measures"),
    ("metrics.test", _measures, "measures"),
    ("data.modality", _or_null(_text), "text or null"),
    ("data.images", lambda v: isinstance(v, dict) and all(map(_whole, v.values())), "numbers"),
    *((at, _whole, "a whole number") for at in _COUNTS),
    *((at, _text, "text") for at in _TEXTS),
    *((at, _word, "a name") for at in _WORDS),
)
_POINT: tuple[Rule, ...] = (
    ("operating_point.positive", lambda v: _some(v, _word), "names of classes"),
    ("operating_point.asked", _asked, "a sensitivity or a specificity from 0 to 1"),
    ("operating_point.threshold", _probability, "a number from 0 to 1"),
)
_RELIABILITY: tuple[Rule, ...] = (
    _TEMPERATURE,
    ("conformal.coverage", _share, "a number from 0 to 1"),
    ("conformal.threshold", _or_null(_share), "a number from 0 to 1, or null"),
    ("conformal.reason", _or_null(_text), "text or null"),
    ("ood.threshold", _or_null(lambda v: _number(v, 0)), "a number from 0 on, or null"),
    ("ood.reason", _or_null(_text), "text or null"),
    ("ood.validation_scores", _ascending, "a list of numbers from 0 on that ascend"),
    ("rates", lambda v: isinstance(v, dict), "an object"),
)
