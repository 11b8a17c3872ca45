"""A bundle: a folder with a model and all that is needed to use it, checked byte by byte.

This file travels in every bundle and needs nothing but Python and `wara.errors`. It runs no code of
a bundle, follows no name out of the folder, and reads nothing before its size is known.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from wara.errors import WaraError

FORMAT, VERSION = "wara-bundle", 1
MANIFEST = "manifest.json"
LARGEST_JSON = 16 << 20  # bytes
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
            WaraError: kind "artefact" when it is not what the manifest says.
        """
        path, said = self.folder / name, self.manifest["files"].get(name)
        if said is None:
            raise WaraError("artefact", f"no file {name} in the bundle", str(self.folder), _AGAIN)
        data = _read(path, said["bytes"])
        if hashlib.sha256(data).hexdigest() != said["sha256"]:
            raise WaraError("artefact", "the file was changed", str(path), _AGAIN)
        return data


def open_bundle(folder: str | Path) -> Bundle:
    """Check every file of a bundle against its manifest.

    Raises:
        WaraError: kind "artefact" for a changed, missing or additional file, or a manifest that is
            none; one that a newer version wrote says so.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        remedy = "give the folder that `wara export` wrote"
        raise WaraError("artefact", f"no {MANIFEST}: this is no bundle", str(folder), remedy)
    manifest = _manifest(path)
    bundle = Bundle(folder, manifest)
    _check_names(folder, manifest["files"])
    for name in manifest["files"]:
        _check_file(folder / name, manifest["files"][name])
    return bundle


def _manifest(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise WaraError("artefact", f"a manifest of {size:,} bytes", str(path), _AGAIN)
    raw = path.read_bytes()
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise WaraError("artefact", "the manifest is no JSON", str(path), _AGAIN) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
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
    there = set()
    for path in folder.rglob("*"):
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


def _check_file(path: Path, said: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    if path.stat().st_size == said["bytes"]:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    if digest.hexdigest() != said["sha256"]:
        raise WaraError("artefact", "the file was changed", str(path), _AGAIN)


def _read(path: Path, size: int) -> bytes:
    if path.stat().st_size != size:
        raise WaraError("artefact", "the file was changed", str(path), _AGAIN)
    return path.read_bytes()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return name, SHA-256 and size of every file below a folder but the manifest, sorted."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            data = path.read_bytes()
            found[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    return found
