"""Names of backbones: of timm, of the hub, of a card, and the shipped one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm

from wara.backbones.cards import BackboneCard, backbone_cards
from wara.errors import WaraError, suggest

NANO = "wara_nano"
HUB = "hf-hub:"
_HUB_FILES = (
    "model.safetensors", "pytorch_model.bin",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip


@dataclass(frozen=True)
class Named:
    """What a name stands for.

    Args:
        name: as it is recorded.
        architecture: timm's name, with a tag where one was given; None: the hub's files say it.
        repo: where the weights lie on the hub, if anywhere.
        files: their names there, the best first.
        card: of a named backbone.
    """

    name: str
    architecture: str | None
    repo: str | None = None
    files: tuple[str, ...] = _HUB_FILES
    card: BackboneCard | None = None

    @property
    def tag(self) -> str | None:
        """The pretraining tag, where the name has one."""
        return (self.architecture or "").partition(".")[2] or None


def resolve(name: str) -> Named:
    """Return what a name stands for.

    Args:
        name: a timm model (`vit_base_patch16_224`, `vit_base_patch16_224.mae`, `timm/…`), a
            repository (`hf-hub:owner/name`), a card of `wara backbones`, or `wara_nano`.

    Raises:
        WaraError: kind "config" for a name that nobody knows.
    """
    if name == NANO:
        return Named(NANO, NANO)
    if name.startswith(HUB):
        repo = name.removeprefix(HUB)
        if repo.count("/") != 1 or not all(repo.split("/")):
            raise _unknown(name, "write hf-hub:owner/name")
        return Named(name, None, repo)
    cards = backbone_cards()
    if name in cards:
        card = cards[name]
        return Named(name, card.architecture, card.repo, tuple(card.files), card)
    name = name.removeprefix("timm/")
    if not timm.is_model(name):
        raise _unknown(name, _nearest(name, cards))
    arch, _, tag = name.partition(".")
    tags = [other.partition(".")[2] for other in timm.list_pretrained(f"{arch}*")
            if other.partition(".")[0] == arch]  # fmt: skip
    if tag and tag not in tags:
        what = f"backbone '{arch}' has no weights '{tag}'"
        remedy = suggest(tag, tags) if tags else f"write {arch}"
        raise WaraError("config", what, "backbone.name", remedy)
    known: Any = timm.get_pretrained_cfg(name)
    return Named(name, name, (known.hf_hub_id or None) if known is not None else None)


def check_name(name: str) -> None:
    """Refuse a backbone that nobody knows; raises as `resolve`."""
    resolve(name)


def _nearest(name: str, cards: dict[str, BackboneCard]) -> str:
    vits = [n for n in timm.list_models() if "vit" in n or "deit" in n or "eva" in n]
    remedy = suggest(name.split(".")[0], [*vits, *cards, NANO])
    if remedy.startswith("choose"):
        remedy = f"choose {NANO}, vit_tiny_patch16_224, another timm ViT or one of `wara backbones`"
    return remedy


def _unknown(name: str, remedy: str) -> WaraError:
    return WaraError("config", f"unknown backbone '{name}'", "backbone.name", remedy)
