"""Refusals: one line each, with a remedy and a public exit code."""

from __future__ import annotations

import difflib
import errno
import mmap
import re
from collections.abc import Iterable, Sequence

EXIT_CODES = {
    "bug": 1,
    "config": 2,
    "usage": 2,
    "data": 3,
    "artefact": 4,
    "storage": 5,
    "nonfinite": 6,
    "resources": 7,
    "busy": 8,
}
LONGEST = 6000
"""Characters of a part of a refusal that are shown; a path has at most 4096."""
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK = (*_FULL, errno.EROFS, errno.EIO)
_CLOSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
# As torch, onnxruntime, C++, NumPy, pydicom and the loader of libraries have it, in small letters.
_NO_MEMORY = (
    "can't allocate memory", "cannot allocate", "failed to allocate memory", "unable to allocate",
    "not enough memory", "out of memory", "failed to map segment", "bad_alloc", "memoryerror",
    "cublas_status_alloc_failed", "could not create a memory object",
)  # fmt: skip
_ROOM = 512 << 20  # bytes; the arenas and stacks of a few threads
PEER_LOST = "contact with another training process was lost"
_PEER = re.compile(
    r"\bgloo/|Connection closed by peer|Connection reset by peer"
    r"|Application timeout caused pair closure|Timed out waiting \d+ms for (recv|send) operation"
)


class WaraError(Exception):
    """A refusal that a user can act on.

    Args:
        kind: one of `EXIT_CODES`; decides the exit code of the command.
        what: what is wrong, in plain words.
        where: the file, key, layer or row it is wrong in; empty when `what` says it.
        remedy: what the user can do about it.
    """

    def __init__(self, kind: str, what: str, where: str = "", remedy: str = "") -> None:
        if kind not in EXIT_CODES:
            raise ValueError(f"unknown error kind {kind!r}; expected one of {sorted(EXIT_CODES)}")
        self.kind, self.what, self.where, self.remedy = kind, what, where, remedy
        super().__init__(kind, what, where, remedy)

    @property
    def exit_code(self) -> int:
        """Exit code of the process that stops with this error."""
        return EXIT_CODES[self.kind]

    def __str__(self) -> str:
        """Return the one line that is printed."""
        parts = [_one_line(part) for part in (self.what, self.where, self.remedy) if part]
        return f"error[{self.kind}]: " + "; ".join(parts)


def _one_line(text: str) -> str:
    """Return a text without line breaks and control characters, which cells and names may hold."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 4 :]}"
    return _CONTROLS.sub(lambda found: ascii(found.group())[1:-1], text)


class WaraErrors(WaraError):
    """Several refusals of one check, reported together, one line each.

    Args:
        errors: at least one error; the first one decides kind and exit code.
    """

    def __init__(self, errors: Sequence[WaraError]) -> None:
        first = errors[0]
        super().__init__(first.kind, first.what, first.where, first.remedy)
        self.errors = tuple(errors)

    def __reduce__(self) -> tuple[type[WaraErrors], tuple[tuple[WaraError, ...]]]:
        # Exceptions cross process borders (data workers, DDP) by their arguments.
        return WaraErrors, (self.errors,)

    def __str__(self) -> str:
        """Return one line per error."""
        return "\n".join(str(error) for error in self.errors)


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return the remedy text that names the nearest valid choice.

    Args:
        word: what the user wrote.
        choices: what is valid there.

    Returns:
        `did you mean 'x'?` when one is near, else the list of choices.
    """
    names = sorted(choices)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else "choose one of: " + ", ".join(names)


def storage_error(error: OSError, path: object) -> WaraError:
    """Return the refusal for an operating-system error on writing `path`."""
    if error.errno in _FULL:
        remedy = "free some space and start again, or choose another disk"
        return WaraError("storage", "no space left to write", str(path), remedy)
    reason = error.strerror or type(error).__name__
    remedy = "check the disk and the permissions"
    return WaraError("storage", f"cannot write: {reason}", str(path), remedy)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had, of the machine or of a GPU.

    PyTorch has a class of its own for CUDA only; its CPU allocator raises a plain `RuntimeError`,
    of which the message tells.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # These may quote a name or a cell that somebody wrote.
    if isinstance(error, ValueError | LookupError | TypeError):
        return False
    said = str(error).lower()
    # oneDNN says no more than this where it cannot allocate; a form that it does not have is
    # "could not create a primitive descriptor".
    return said.endswith("could not create a primitive") or any(t in said for t in _NO_MEMORY)


def _at_the_limit() -> bool:
    """Whether the process may have little more memory than it has (`ulimit -v`).

    Libraries in C that cannot allocate fail in ways of their own, some without any words.
    """
    try:
        import resource
    except ImportError:  # Windows
        return False
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return False
    try:
        mmap.mmap(-1, _ROOM).close()
    except (OSError, MemoryError):
        return True
    return False


def as_refusal(error: BaseException) -> WaraError:
    """Return the one line for any exception.

    Args:
        error: what was raised, here or in a data worker, whose errors arrive as text.

    Returns:
        The error itself when it is a refusal already; that of the resource, disk or option whose
        lack it shows; else one of kind `bug`.
    """
    if isinstance(error, WaraError):
        return error
    message = re.sub(r"\s+", " ", str(error)).strip()
    if out_of_memory(error):
        remedy = "halve batch_size and double accumulate, or choose a smaller backbone or img_size"
        return WaraError("resources", "out of memory", "", remedy)
    if "DataLoader worker" in message and ("killed" in message or "exited" in message):
        remedy = "lower data.workers, or give the machine more (shared) memory"
        return WaraError("resources", "a data worker was killed", "data.workers", remedy)
    if isinstance(error, RuntimeError) and (
        type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
        or _PEER.search(message)
    ):
        remedy = "see what ended it, then go on with --resume"
        return WaraError("resources", PEER_LOST, "devices", remedy)
    if "does not have a deterministic implementation" in message:
        remedy = "set deterministic=false; resuming is then not bit-exact"
        return WaraError("config", message.split(".")[0], "deterministic", remedy)
    inside = re.search(r"error\[(data|artefact|storage|resources)\]: (.*)", str(error))
    if inside:
        parts = [*inside.group(2).split("; "), "", ""][:3]
        return WaraError(inside.group(1), *parts)
    if isinstance(error, OSError) and error.errno in _DISK:
        return storage_error(error, error.filename or "")
    if isinstance(error, OSError) and error.errno in _CLOSED:
        remedy = "check the name, and who may read and write there"
        where = str(error.filename or "")
        return WaraError("storage", f"cannot be used: {error.strerror}", where, remedy)
    if isinstance(error, RuntimeError) and "home directory" in message:
        return WaraError("usage", "no such user, after a ~", "", "write the whole path")
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if _at_the_limit():
        return WaraError("resources", f"no memory left ({text})", "", "raise the limit of memory")
    return WaraError("bug", text, remedy="run again with --debug for the traceback")
