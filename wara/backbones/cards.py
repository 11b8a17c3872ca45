"""Cards of named backbones: what a file of weights does not say of itself."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from wara.backbones.statistics import Statistics
from wara.schema import Section, read_yaml
from wara.vit import Channels

CARDS = Path(__file__).with_name("cards.yaml")


class BackboneCard(Section):
    """A backbone by its own name, as its authors trained and published it."""

    title: str = Field(description="One line for lists.")
    architecture: str = Field(description="timm's name of it.")
    options: dict[str, Any] = Field({}, description="Arguments of its construction.")
    img_size: int = Field(
        ge=8, le=4096, description="Side of the images that it is usually given, in pixels."
    )
    pool: Literal["token", "avg"] = Field(description="How its authors pool its features.")
    mean: Channels = Field(description="Per channel, of images in [0, 1].")
    std: Channels = Field(description="Per channel, of images in [0, 1].")
    interpolation: str = Field(description="How its images were resized.")
    modality: str = Field(description="What images it saw.")
    repo: str | None = Field(description="Repository on the Hugging Face hub.")
    files: list[str] = Field(description="Names of the weights, there or elsewhere.")
    how_to_get: str = Field(description="From nothing to a file.")
    licence: str = Field(description="Terms of the weights.")
    citation: str = Field(description="What to cite.")

    @property
    def statistics(self) -> Statistics:
        """Mean and std that images are normalised by."""
        return Statistics(self.mean, self.std)


@functools.cache
def backbone_cards() -> dict[str, BackboneCard]:
    """Return all cards by name."""
    found, _ = read_yaml(CARDS, "list of backbones", "install wara again")
    return {name: BackboneCard.model_validate(card) for name, card in found.items()}
