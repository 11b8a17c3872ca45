"""Read the images of a folder in one process; say of each what came, the memory and the time.

Started by tests/faults/test_image_faults.py as a process of its own, since a peak of memory is
known of a process only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import time
import warnings
from pathlib import Path

from wara.errors import WaraError
from wara.images import read_image


def peak() -> int:
    """Largest memory of this process, MiB; `getrusage` would tell that of its parent as well."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) >> 10


def outcome(path: Path) -> dict[str, object]:
    """What reading gives: a shape and a hash, or a kind and a line; any other error is a fault."""
    start = time.process_time()
    try:
        pixels = read_image(path, 16)
        said = {"shape": pixels.shape, "hash": hashlib.sha256(pixels.tobytes()).hexdigest()}
    except WaraError as error:
        said = {"kind": error.kind, "line": str(error)}
    except Exception as error:
        said = {"kind": "unexpected", "line": repr(error)}
    return said | {"peak": peak(), "seconds": time.process_time() - start}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    print(json.dumps({path: outcome(Path(path)) for path in sys.argv[1:]}))
