"""Rows of float16 numbers in a memory-mapped file, each with a checksum."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from wara.errors import storage_error


class RowFile:
    """A file of rows that are written one by one, in any order, and counted by their checksums.

    A row is there when its checksum agrees. One that was never written, that a killed process left
    half-written, or that was damaged since, does not count; so nothing else needs to be atomic.
    Rows that were never written take no room on the disk.

    Args:
        path: of the file.
        count: number of rows.
        shape: of the float16 numbers of a row.
    """

    def __init__(self, path: Path, count: int, shape: Sequence[int]) -> None:
        self.path, self.count = path, count
        self._type = np.dtype([("sum", "<u4"), ("numbers", "<f2", tuple(shape))])
        self._rows: np.ndarray | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on the disk."""
        return self._type.itemsize

    def make(self) -> None:
        """Make the file anew where it is missing or of another size.

        Raises:
            WaraError: kind "storage", when the file system refuses.
        """
        size = self.count * self.row_bytes
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as handle:
                if handle.tell() != size:
                    handle.truncate(0)
                    handle.truncate(size)
        except OSError as error:
            raise storage_error(error, self.path) from error

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Return those of some rows that are not there; all of them are read for it."""
        rows = self._open()
        return [
            number
            for number in numbers
            if int(rows[number]["sum"]) != zlib.crc32(rows[number]["numbers"].tobytes())
        ]

    def write(self, rows: Sequence[tuple[int, np.ndarray]]) -> None:
        """Write rows by their number.

        By way of the file and not of its map: a disk that is full then says so, and does not kill
        the process.

        Raises:
            WaraError: kind "storage", when the file system refuses.
        """
        try:
            with open(self.path, "r+b") as handle:
                for number, values in rows:
                    content = np.ascontiguousarray(values, "<f2").tobytes()
                    handle.seek(number * self.row_bytes)
                    handle.write(zlib.crc32(content).to_bytes(4, "little") + content)
        except OSError as error:
            raise storage_error(error, self.path) from error

    def read(self, number: int) -> np.ndarray:
        """Return a copy of a row, float16."""
        return np.array(self._open()[number]["numbers"])

    def _open(self) -> np.ndarray:
        if self._rows is None:
            self._rows = np.memmap(self.path, self._type, "r", shape=(self.count,))
        return self._rows
