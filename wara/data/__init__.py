"""The data room: from a data set's name to checked, split and counted batches.

`open_source` finds the images, `assign_splits` divides them, `check` refuses what would make a
number a lie, `eval_batches` hands out batches.
"""

from wara.data.gate import assign_splits, check
from wara.data.imageset import ImageSet, Record
from wara.data.loader import eval_batches
from wara.data.sources import open_source

__all__ = ["ImageSet", "Record", "assign_splits", "check", "eval_batches", "open_source"]
