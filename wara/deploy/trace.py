"""A record of what a model said when: one line of JSON each, chained by hashes.

A line holds the hash of the line before it, so that a changed, removed or moved line is found and
named. Each call opens with its versions and closes with its number of lines. No patient name,
number, birth date or path is in it: images are named by the hash of their file and, for DICOM, by
the SOP Instance UID.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from wara.deploy.places import open_locked
from wara.deploy.predictor import Prediction, Predictor
from wara.errors import WaraError, storage_error
from wara.storage import read_regular, sync_folder

_START = "0" * 64
_OPEN = b'{"kind": "open"'  # how every trace begins
_UNREADABLE = "the image could not be read"
_PACKAGES = ("onnxruntime", "numpy", "pillow", "pydicom")
_SAID = ("prediction", "decision", "conformal_set", "ood_score", "ood_percentile", "abstain",
         "abstain_reason")  # fmt: skip


# What a reader relies on, by kind of line.
_OF_EACH = (("previous", str), ("time", str))
_OF_A_LINE = {
    "open": (*_OF_EACH, ("model", str)),
    "prediction": (*_OF_EACH, ("abstain", bool | None)),
    "close": (*_OF_EACH, ("lines", int)),
}


class Trace:
    """A trace that is written; lines are durable before the next image is judged.

    Args:
        path: a new file, or a trace that goes on.
        predictor: whose sayings are recorded.

    Raises:
        WaraError: kind "artefact" when the file is no whole trace, "busy" when another call writes
            it, "storage" when it cannot be written. A last line that was torn while it was written
            is no fault: it is moved to `torn_of` the file, and the line that opens the call holds
            its hash.
    """

    def __init__(self, path: Path, predictor: Predictor) -> None:
        self.path, self.lines = path, 0
        self._stream = open_locked(path)
        try:
            self._begin(predictor)
        except OSError as error:
            self._stream.close()
            raise storage_error(error, path) from error
        except WaraError:
            self._stream.close()
            raise

    def _begin(self, predictor: Predictor) -> None:
        self._stream.seek(0)
        data = self._stream.read()
        whole, torn = _cut(data)
        if not whole and torn[: len(_OPEN)] != _OPEN[: len(torn)]:
            raise _broken(self.path, "line 1 is no line of a trace")
        self.last = _verified(whole, self.path)
        said = self._set_aside(torn, len(whole)) if torn else None
        if whole and not whole.endswith(b"\n"):
            self._stream.write(b"\n")
        manifest = predictor.bundle.manifest
        self._add("open", {
            "model": predictor.bundle.model_hash,
            "synthetic": manifest["synthetic"],
            "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in _PACKAGES},
            "transforms": manifest["input"],
            "temperature": manifest["temperature"],
            "operating_point": manifest["operating_point"],
            "abstain_on": list(predictor.abstain_on),
            "torn": said,
        })  # fmt: skip

    def _set_aside(self, torn: bytes, end: int) -> dict[str, Any]:
        """Move the torn end of a trace to the file beside it; return what names it."""
        beside = torn_of(self.path)
        with beside.open("ab") as stream:
            stream.write(torn + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(beside.parent)
        self._stream.truncate(end)
        return {"sha256": hashlib.sha256(torn).hexdigest(), "bytes": len(torn)}

    def add(self, prediction: Prediction) -> None:
        """Record what was said of one image."""
        reading, row = prediction.reading, prediction.row
        error = reading.error
        self._add("prediction", {
            "sha256": reading.sha256,
            "sop_instance_uid": reading.uid,
            "probabilities": {
                key.removeprefix("prob_"): value
                for key, value in row.items() if key.startswith("prob_")
            },
            **{key: row[key] for key in _SAID},
            # No words of the refusal: they may quote a path or a header.
            "error": None if error is None else f"{error.kind}: {_UNREADABLE}",
        })  # fmt: skip

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Say how many lines the call has written, if it came to its end.

        One that was stopped may have stood within `_add`, so that it knows neither how many lines
        there are nor how the last one ends; the next call reads that from the file.
        """
        try:
            if kind is None:
                self._add("close", {"lines": self.lines})
        finally:
            self._stream.close()

    def _add(self, kind: str, content: dict[str, Any]) -> None:
        body = {
            "kind": kind,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **content,
            "previous": self.last,
        }
        self.last = _hash(body)
        try:
            self._stream.write((_line(body, self.last) + "\n").encode())
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise storage_error(error, self.path) from error
        self.lines += 1


def _hash(body: dict[str, Any]) -> str:
    text = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _line(body: dict[str, Any], said: str) -> str:
    return json.dumps({**body, "hash": said}, ensure_ascii=False)


def torn_of(path: Path) -> Path:
    """Return where the last line of a trace goes when a power cut tore it."""
    return path.with_name(f"{path.name}.torn")


def _cut(data: bytes) -> tuple[bytes, bytes]:
    """Return the lines of a trace, and the beginning of one that never came to its end."""
    end = data.rfind(b"\n") + 1
    try:
        json.loads(data[end:].decode())
    except (ValueError, RecursionError):
        return data[:end], data[end:]
    return data, b""  # only the end of the line is lacking


def verify_trace(path: Path) -> str:
    """Check every line of a trace.

    Returns:
        The hash of its last line.

    Raises:
        WaraError: kind "artefact", naming the first line that was changed, removed or moved.
    """
    return _verified(_bytes(path), path)


def _verified(data: bytes, path: Path) -> str:
    last, open_lines = _START, 0
    for number, text, body, said in _lines(data, path):
        # The line as well as its content: a blank or a key that stands twice is a change, too.
        if _hash(body) != said or _line(body, said) != text:
            raise _broken(path, f"line {number} was changed")
        if body["previous"] != last:
            raise _broken(path, f"before line {number} a line was removed, added or moved")
        if body["kind"] == "open":
            open_lines = 0
        if body["kind"] == "close" and body["lines"] != open_lines:
            raise _broken(path, f"line {number} closes {body['lines']} lines, not {open_lines}")
        open_lines += 1
        last = said
    return last


def unclosed(path: Path) -> list[int]:
    """Return the lines that open a call which did not come to its end."""
    found: list[int] = []
    for number, _, body, _ in _lines(_bytes(path), path):
        if body["kind"] == "open":
            found.append(number)
        elif body["kind"] == "close" and found:
            found.pop()
    return found


def _bytes(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise _broken(path, f"cannot be read: {error.strerror}") from error


def _lines(data: bytes, path: Path) -> Iterator[tuple[int, str, dict[str, Any], str]]:
    """Yield number, text, content and hash of each line."""
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise _broken(path, f"line {number} is no text") from error
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
        try:
            body = json.loads(line)
            said = body.pop("hash")
            if any(not isinstance(body[key], kind) for key, kind in _OF_A_LINE[body["kind"]]):
                raise ValueError("a value of another type")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _broken(path, f"line {number} is no line of a trace") from None
        yield number, line, body, said


def _broken(path: Path, what: str) -> WaraError:
    remedy = "keep it as it is, and go on in a new file"
    return WaraError("artefact", f"the trace is not whole: {what}", str(path), remedy)
