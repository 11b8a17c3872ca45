"""Pretrained timm Vision Transformers, and the image statistics that belong to their weights."""

from wara.backbones.build import build_backbone, rebuild, skeleton
from wara.backbones.cards import BackboneCard, backbone_cards
from wara.backbones.names import NANO, check_name

__all__ = ["NANO", "BackboneCard", "backbone_cards", "build_backbone", "check_name", "rebuild",
           "skeleton"]  # fmt: skip
