"""A bundle: a folder with a model and all that is needed to use it, checked byte by byte.

This file travels in every bundle. It runs no code of a bundle, follows no name out of the folder,
and reads nothing before its size is known.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from wara.deploy.contents import check_manifest
from wara.errors import WaraError
from wara.storage import NotRegular, file_sha256, parse_json, read_regular

FORMAT, VERSION = "wara-bundle", 1
MANIFEST = "manifest.json"
LARGEST_JSON = 16 << 20  # bytes
# Of what is read as a whole; 2 GiB is where protocol buffers end.
_LARGEST = {".json": LARGEST_JSON, ".npz": 256 << 20, ".onnx": (2 << 30) - 1}
_AGAIN = "copy the whole bundle again from where it was exported"
_KEYS: dict[str, tuple[type, ...]] = {
    "format": (str,), "version": (int,), "name": (str,), "task": (str,), "classes": (list,),
    "synthetic": (bool,), "input": (dict,), "model": (dict,), "temperature": (float, int),
    "operating_point": (dict, type(None)), "reliability": (dict,), "files": (dict,),
    "sha256": (str,),
}  # fmt: skip


def canonical(content: Any) -> bytes:
    """Return JSON in the one form in which it is written and hashed."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, sort_keys=False)
    return (text + "\n").encode()


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with the SHA-256 of its content as last key."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**body, "sha256": hashlib.sha256(canonical(body)).hexdigest()}


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every byte has been checked.

    Args:
        folder: where it lies.
        manifest: what it says of itself.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """Names of the outputs, in order."""
        return [item["name"] for item in self.manifest["classes"]]

    @property
    def model_hash(self) -> str:
        """SHA-256 of the manifest, which binds every file: the identity of what is used."""
        return str(self.manifest["sha256"])

    def read(self, name: str) -> bytes:
        """Return a file of the bundle, hashed as it is read.

        Raises:
            WaraError: kind "artefact" when it is not what the manifest says, "storage" when it may
                not be read.
        """
        path, said = self.folder / name, self.manifest["files"].get(name)
        if said is None:
            raise WaraError("artefact", f"no file {name} in the bundle", str(self.folder), _AGAIN)
        with readable(self.folder):
            same = path.stat().st_size == said["bytes"]
            data = read_regular(path) if same else b""
        if not same or hashlib.sha256(data).hexdigest() != said["sha256"]:
            raise _changed(path)
        return data

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file of the bundle.

        Raises:
            WaraError: as `read`, and kind "artefact" when it is no JSON object of finite numbers.
        """
        try:
            return parse_json(self.read(name))
        except ValueError as error:
            what, where = f"cannot be read as JSON: {error}", str(self.folder / name)
            raise WaraError("artefact", what, where, _AGAIN) from None


def open_bundle(folder: str | Path) -> Bundle:
    """Check every file of a bundle against its manifest, and the manifest itself.

    Raises:
        WaraError: kind "artefact" for a changed, missing or additional file, or a manifest that is
            none or says what cannot be; one that a newer version wrote says so. Kind "storage" for
            a file that may not be read.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    with readable(folder):
        if not path.is_file():
            remedy = "give the folder that `wara export` wrote"
            raise WaraError("artefact", f"no {MANIFEST}: this is no bundle", str(folder), remedy)
        manifest = _manifest(path)
        _check_names(folder, manifest["files"])
        check_manifest(manifest, str(path))
        for name in manifest["files"]:
            _check_file(folder / name, manifest["files"][name])
    return Bundle(folder, manifest)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Refuse what the system does not let us read, such as the files of another user.

    Raises:
        WaraError: kind "storage", naming the file.
    """
    try:
        yield
    except NotRegular as error:
        raise WaraError("artefact", "no regular file", str(error.filename), _AGAIN) from error
    except OSError as error:
        what = f"cannot be read: {error.strerror or type(error).__name__}"
        remedy = f"let it be read: chmod -R a+rX '{folder}'"
        raise WaraError("storage", what, str(error.filename or folder), remedy) from error


def _changed(path: Path) -> WaraError:
    return WaraError("artefact", "the file was changed", str(path), _AGAIN)


def _manifest(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise WaraError("artefact", f"a manifest of {size:,} bytes", str(path), _AGAIN)
    raw = read_regular(path)
    try:
        found = parse_json(raw)
    except ValueError as error:
        what = f"the manifest is no JSON: {error}"
        raise WaraError("artefact", what, str(path), _AGAIN) from None
    if found.get("format") != FORMAT:
        raise WaraError("artefact", "no manifest of a bundle", str(path), _AGAIN)
    if found.get("version") != VERSION:
        what = f"a bundle of form {found.get('version')!r}, this reads form {VERSION}"
        raise WaraError("artefact", what, str(path), "install the version of wara that wrote it")
    for key, kinds in _KEYS.items():
        value = found.get(key)
        if key not in found or not isinstance(value, kinds) or (
            isinstance(value, bool) and bool not in kinds
        ):  # fmt: skip
            raise WaraError("artefact", f"the manifest lacks {key}", str(path), _AGAIN)
    # Compared as bytes, so that not even a blank can change unseen.
    try:
        whole = canonical(seal(found)) == raw
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise WaraError("artefact", "the manifest was changed", str(path), _AGAIN)
    return found


def _check_names(folder: Path, files: dict[str, Any]) -> None:
    for name, said in files.items():
        parts = PurePosixPath(name).parts
        plain = bool(parts) and "\\" not in name and ":" not in name and "\0" not in name
        if not plain or name.startswith("/") or ".." in parts or str(PurePosixPath(name)) != name:
            raise WaraError("artefact", f"a file name that leaves the folder: {name!r}",
                            str(folder), _AGAIN)  # fmt: skip
        if not isinstance(said, dict) or set(said) != {"sha256", "bytes"}:
            raise WaraError("artefact", f"no hash of {name}", str(folder), _AGAIN)
        if type(said["bytes"]) is not int or not isinstance(said["sha256"], str):
            raise WaraError("artefact", f"no size and hash of {name}", str(folder), _AGAIN)
        most = _LARGEST.get(PurePosixPath(name).suffix)
        if most is not None and said["bytes"] > most:
            what = f"{said['bytes']:,} bytes, where {most:,} are the most that is read"
            raise WaraError("artefact", what, str(folder / name), "export the run again")
    there = set()
    for root, folders, names in os.walk(folder, onerror=_raise):
        for path in (Path(root, name) for name in (*folders, *names)):
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise WaraError("artefact", "a link or device in the bundle", str(path), _AGAIN)
            if path.is_file():
                there.add(path.relative_to(folder).as_posix())
    for name in sorted({*files, MANIFEST} - there):
        raise WaraError("artefact", f"the bundle lacks {name}", str(folder), _AGAIN)
    for name in sorted(there - {*files, MANIFEST}):
        remedy = "move it elsewhere; a bundle holds what was exported and nothing else"
        raise WaraError("artefact", f"a file that is not of the bundle: {name}",
                        str(folder), remedy)  # fmt: skip


def _raise(error: OSError) -> NoReturn:
    raise error


def _check_file(path: Path, said: dict[str, Any]) -> None:
    if path.stat().st_size != said["bytes"] or file_sha256(path) != said["sha256"]:
        raise _changed(path)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return name, SHA-256 and size of every file below a folder but the manifest, sorted."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            data = path.read_bytes()
            found[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    return found
