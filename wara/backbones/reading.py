"""Reads a file of weights without running anything that lies in it.

Training scripts save more than tensors: the arguments of the script, NumPy numbers, a config. Such
objects are read as inert mappings, so that no class or function of the file is ever called; a file
that names any other class or function is refused, with all their names.
"""

from __future__ import annotations

import errno
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from wara.errors import WaraError
from wara.storage import NotRegular, open_regular

_ORIGINAL = "copy the file again from its origin"
_STATE = "ask its maker for the state dict alone, as .safetensors"
# The system does not give the file; what is in it may well be sound.
_WITHHELD = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE,
             errno.ENFILE)  # fmt: skip
# Words of torch where it tells how to switch its safety off.
_ADVICE = ("weights_only", "safe_globals", "trust")
# How files begin that are no weights, or not of a kind that is read here.
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` there"),
    (b"<", "a web page, not the weights", "log in where they lie and download the file again"),
    (b"\x89HDF", "an HDF5 file of Keras", "convert it to the names of timm first"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"{", "a JSON file, not the weights", "give the .safetensors file that lies beside it"),
)


class Inert(dict[str, Any]):
    """Stands for an object of a class that is not called: a mapping of its attributes."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        """Take any arguments, for those of the class that it stands for are not known."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Keep attributes by name; any other state is thrown away."""
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.update({key: value for key, value in part.items() if isinstance(key, str)})


class _Dict:
    """Stands for a kind of dictionary whose items are written one by one."""

    def __new__(cls, *_: object) -> dict[str, Any]:  # type: ignore[misc]
        """Return a plain one, the only kind to which items are added."""
        return {}


class _List:
    """Stands for a kind of list whose items are written one by one."""

    def __new__(cls, *_: object) -> list[Any]:  # type: ignore[misc]
        """Return a plain one, the only kind to which items are added."""
        return []


def _names(modules: str, names: str) -> list[str]:
    return [f"{module}.{name}" for module in modules.split() for name in names.split()]


# Written by argparse, NumPy, pathlib, Lightning and the usual libraries of configs.
_HARMLESS = [
    "argparse.Namespace",
    "types.SimpleNamespace",
    *_names("numpy.core.multiarray numpy._core.multiarray", "scalar _reconstruct"),
    *_names("numpy", "dtype ndarray"),
    *_names("numpy.dtypes", "Float32DType Float64DType Int32DType Int64DType BoolDType StrDType"),
    *_names("pathlib pathlib._local", "Path PosixPath PurePosixPath WindowsPath PureWindowsPath"),
    *_names("builtins __builtin__", "int float str bool bytes list dict tuple set frozenset slice"),
    *_names("builtins __builtin__", "range complex object"),
    *_names("datetime", "datetime date timedelta timezone"),
    *_names("omegaconf.dictconfig", "DictConfig"),
    *_names("omegaconf.listconfig", "ListConfig"),
    *_names("omegaconf.base", "ContainerMetadata Metadata"),
    *_names("omegaconf.nodes", "AnyNode IntegerNode FloatNode StringNode BooleanNode"),
    *_names("typing", "Any"),
]
_HARMLESS_DICTS = [
    "collections.defaultdict",
    *_names("pytorch_lightning.utilities.parsing", "AttributeDict"),
    *_names("lightning_fabric.utilities.data", "AttributeDict"),
    *_names("lightning.pytorch.utilities.parsing lightning.fabric.utilities.data", "AttributeDict"),
]
_INERT: list[Any] = [
    *((Inert, name) for name in _HARMLESS),
    *((_Dict, name) for name in _HARMLESS_DICTS),
    (_List, "collections.deque"),
]


def read_checkpoint(path: Path) -> Any:
    """Return what a file of weights holds: nested mappings of tensors and other things.

    Args:
        path: safetensors, or what `torch.save` writes; the content decides, not the name.

    Raises:
        WaraError: kind `artefact` for a file that is damaged, of another kind, or names code;
            `storage` where the system does not let it be read.
    """
    try:
        with open_regular(path) as file:
            start = file.read(32)
    except NotRegular as error:
        what = "the weights are no regular file"
        raise WaraError("artefact", what, str(path), _ORIGINAL) from error
    except OSError as error:
        raise _unreadable(error, path) from error
    # A safetensors file starts with the length of its JSON header, in 8 bytes.
    safetensors = start[8:9] == b"{"
    if not safetensors:
        _refuse_others(path, start)
    try:
        if safetensors:
            return load_file(path)
        with torch.serialization.safe_globals(_INERT):
            return torch.load(path, map_location="cpu", weights_only=True)
    # What the parsers of damaged files raise is no contract of theirs.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _WITHHELD:
            raise _unreadable(error, path) from error
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        foreign = _foreign(path, error)
        if foreign:
            what = f"the file names code that is not run here: {', '.join(foreign)}"
            raise WaraError("artefact", what, str(path), _STATE) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not any(word in reason for word in _ADVICE):
            what = f"cannot read the weights: {reason}"
            raise WaraError("artefact", what, str(path), _ORIGINAL) from error
        # What follows in torch's message is advice on how to switch its safety off.
        if "Can only" in str(error):
            what = "the file holds objects beside the weights that are not read here"
            raise WaraError("artefact", what, str(path), _STATE) from error
        what = "cannot read the weights: not a whole file of torch.save"
        raise WaraError("artefact", what, str(path), _ORIGINAL) from error


def _unreadable(error: OSError, path: Path) -> WaraError:
    what = f"cannot read the weights: {error.strerror or type(error).__name__}"
    return WaraError("storage", what, str(path), "check the disk and the permissions")


def _refuse_others(path: Path, start: bytes) -> None:
    if not start:
        raise WaraError("artefact", "an empty file", str(path), _ORIGINAL)
    for beginning, what, remedy in _BEGINNINGS:
        if start.lstrip().startswith(beginning):
            raise WaraError("artefact", f"{what}", str(path), remedy)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith(".npy") for name in names):
            remedy = "load it with timm's load_pretrained and save the state dict"
            raise WaraError("artefact", "a NumPy archive of Big Vision", str(path), remedy)
        if any("/code/" in name for name in names):
            remedy = "load it with torch.jit.load and save its state_dict()"
            raise WaraError("artefact", "a TorchScript program", str(path), remedy)


def _foreign(path: Path, error: Exception) -> list[str]:
    """Return the classes and functions that a file names beyond tensors and `_INERT`."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file, or one of the form before zip archives
        words = str(error).split()
        found = [words[words.index("GLOBAL") + 1]] if "GLOBAL" in words[:-1] else []
    return sorted(set(found) - {name for _, name in _INERT})
