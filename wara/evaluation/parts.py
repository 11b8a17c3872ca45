"""A batch in as many parts as memory allows."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from wara.errors import WaraError, out_of_memory

ONE_IMAGE = "choose a smaller backbone or img_size, or a machine with more memory"


class Parts:
    """Runs a model on batches without gradients; halves them for good when memory runs out.

    Every image is computed for itself, so parts change the logits by rounding only.

    Args:
        model: maps images `[b, …]` to outputs `[b, …]`.
    """

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        # In a tuple, so that a module that keeps this object does not register the model again.
        self._model = (model,)
        self._size: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the outputs of a batch.

        Raises:
            WaraError: kind "resources" when memory does not suffice for one image.
        """
        size = min(self._size or len(images), len(images))
        while (found := self._run(images, size)) is None:
            free_memory()
            if size <= 1:
                raise WaraError(
                    "resources", "out of memory with one image at a time", "", ONE_IMAGE
                )
            self._size = size = (size + 1) // 2
        return found

    def _run(self, images: Tensor, size: int) -> Tensor | None:
        """Return the outputs; None when memory ran out."""
        try:
            if size >= len(images):
                return self._model[0](images)
            return torch.cat([self._model[0](part) for part in images.split(size)])
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None


def free_memory() -> None:
    """Give back what a failed pass left, once its frames are gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
