"""What a run is about to do, in sentences: the plan that is printed before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wara.adapters import Method, section_of
from wara.backbones import NANO
from wara.data.balance import few, table_lines
from wara.training.cache import gigabytes
from wara.training.setup import Prepared
from wara.vit import BackboneInfo

PHANTOM_BANNER = (
    "SYNTHETIC DATA: phantoms drawn by code, not patients. Numbers say nothing clinical."
)
_SAID = {
    "user": "as set",
    "card": "its card",
    "config": "a file beside the weights",
    "tag": "the tag of its name",
    "layout": "the training code whose names the file has",
    "package": "those of the package",
    "assumed": "ASSUMED",
}


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Args:
        banners: what a reader must not miss.
        pairs: subject and sentence, line by line.
    """

    banners: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    def warnings(self) -> list[str]:
        """The banners as text; the first lines of the plan."""
        return ["!" * 8 + " " + text for text in self.banners]

    def lines(self) -> list[str]:
        """The plan as text."""
        return [*self.warnings(), *(f"{name:<10} {text}".rstrip() for name, text in self.pairs)]


def describe(run: Prepared) -> Plan:
    """Return the plan of a prepared run."""
    config, card, backbone = run.config, run.images.card, run.backbone
    banners = _banners(run)
    height, width = backbone.img_size
    return Plan(
        banners,
        (
            ("data set", f"{card.name}: {card.title} ({card.task}, {run.images.origin})"),
            *(("" if i else "splits", line) for i, line in enumerate(table_lines(run.table))),
            (
                "backbone",
                f"{backbone.name}, {height} x {width} px, grid {backbone.grid_size[0]} x "
                f"{backbone.grid_size[1]}, weights: {_weights(run)}",
            ),
            *(("", line) for line in _of_weights(backbone)),
            ("method", _method(config.adapter, run.budget)),
            ("trainable", _parameters(run.counts)),
            *(("trunk", text) for text in _trunk(run)),
            ("device", run.device.name),
            ("precision", run.device.arithmetic),
            ("loss", f"{run.loss.name}{run.loss.weighted} ({run.loss.why})"),
            ("schedule", _schedule(run)),
            ("output", str(config.folder)),
            *(("note", text) for text in few(run.table)),
            *(("note", note) for note in run.notes if note not in banners),
        ),
    )


def _of_weights(backbone: BackboneInfo) -> list[str]:
    """Return what belongs to the weights: statistics of images, pooling, what was left out."""
    mean, std = (", ".join(f"{x:.4g}" for x in three) for three in (backbone.mean, backbone.std))
    options = "".join(f", {key} {value}" for key, value in backbone.options.items())
    lines = [
        f"images: mean {mean}, std {std} ({_SAID[backbone.statistics]}), {backbone.interpolation}",
        f"tensors by the names of {backbone.layout}, pool {backbone.pool}{options}",
    ]
    if backbone.left_out:
        lines.append(f"left out of the file: {', '.join(backbone.left_out)}")
    return lines


def _weights(run: Prepared) -> str:
    path = run.config.backbone.weights
    return f"file {path}" if path else run.backbone.weights_source


def _banners(run: Prepared) -> tuple[str, ...]:
    banners = list(run.images.notes[:1]) if run.images.substituted_for is not None else []
    if run.images.synthetic:
        banners.append(PHANTOM_BANNER)
    asked = run.config.backbone.name
    if run.backbone.name == NANO != asked:
        banners.append(
            f"backbone '{asked}' is replaced by '{run.backbone.name}', which is shipped with the "
            "package (offline: phantom)."
        )
    if run.backbone.statistics == "assumed":
        banners.append(
            "mean and std of the images are ASSUMED: nothing says what the weights were trained "
            "with. Set backbone.mean and backbone.std, or name their tag "
            f"(backbone.name: {run.backbone.architecture.split('.')[0]}.<tag>)."
        )
    return tuple(banners)


def _method(method: Method, budget: tuple[str | float, int, int] | None) -> str:
    section = {key: value for key, value in section_of(method).items() if value is not None}
    name = section.pop("method")
    options = ", ".join(f"{key}={_plain(value)}" for key, value in section.items())
    text = name + (f" ({options})" if options else "")
    if budget is not None:
        asked, wanted, got = budget
        text += f"; budget {asked}: {wanted:,} parameters wanted, {got:,} got"
    return text


def _plain(value: Any) -> str:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return " ".join(map(str, value)) if listed else str(value)


def _parameters(counts: dict[str, int]) -> str:
    adapter, head = counts["adapter"], counts["head"]
    whole = counts["base"] + adapter + head
    share = 100 * (adapter + head) / whole
    return f"adapter {adapter:,}, head {head:,}: {share:.2f} % of {whole:,}"


def _trunk(run: Prepared) -> list[str]:
    """Return what is said of views and cache, where either was asked for."""
    data, trunk = run.config.data, run.trunk
    views = f"views of each training image: {data.views}"
    if trunk is not None:
        return [
            f"cache of {gigabytes(trunk.size)}: {trunk.rows:,} outputs of the lower {trunk.depth} "
            f"blocks in float16; views of each training image: {len(trunk.seen)}"
        ]
    if data.trunk == "cache":
        return [
            "nothing to gain from a cache: the first block changes too, and only what comes before "
            f"it is frozen; {views}"
        ]
    return [views] if data.views is not None else []


def _schedule(run: Prepared) -> str:
    config = run.config
    words = {"adapter": "adapter", "core": "cores", "head": "head"}
    rates = ", ".join(f"{words[group]} {rate:g}" for group, rate in config.rates.items())
    times = f" x {config.accumulate}" if config.accumulate > 1 else ""
    return f"{config.epochs} epochs, batch {config.batch_size}{times}, lr: {rates}"
