"""Mean and standard deviation of the images that a backbone was trained on."""

from __future__ import annotations

from dataclasses import dataclass

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Statistics:
    """Of images with values in 0..1, per channel.

    Args:
        mean: mean of red, green, blue.
        std: standard deviation of red, green, blue.
    """

    mean: Triple
    std: Triple

    def close_to(self, other: Statistics) -> bool:
        """Whether both are the same, but for how many digits were written."""
        pairs = zip((*self.mean, *self.std), (*other.mean, *other.std), strict=True)
        return all(abs(one - two) < 0.005 for one, two in pairs)


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
