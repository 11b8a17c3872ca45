"""What a run is about to do: device, precision, and the plan that is printed first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from wara.errors import WaraError

SPLITS = ("train", "val", "test")
PHANTOM_BANNER = (
    "SYNTHETIC DATA: phantoms drawn by code, not patients. Numbers say nothing clinical."
)


def pick_device(accelerator: str, devices: int) -> tuple[str, str]:
    """Choose where to train.

    Args:
        accelerator: `auto | cpu | gpu`.
        devices: processes that train together.

    Returns:
        `cpu` or `gpu` (Lightning's words), and the device's name for the plan.

    Raises:
        WaraError: kind "resources", when there are fewer GPUs than asked for.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "gpu" and available < devices:
        raise WaraError(
            "resources", f"{devices} GPU(s) asked for, {available} available", "accelerator: gpu",
            "set accelerator=cpu or auto, or lower devices",
        )  # fmt: skip
    if accelerator != "cpu" and available >= devices:
        return "gpu", torch.cuda.get_device_name(0)
    threads = torch.get_num_threads()
    return "cpu", f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def pick_precision(amp: str, accelerator: str) -> tuple[str, str]:
    """Choose the arithmetic of training.

    On CPUs `auto` takes bf16 only where the processor multiplies it natively (AVX-512 BF16 or
    AMX): measured on one core, a training step of ViT-Tiny at 224 px takes 0.6 times as long there
    as in float32; emulated it is slower than float32.

    Args:
        amp: `auto | off | bf16`.
        accelerator: `cpu` or `gpu`.

    Returns:
        Lightning's name of the precision, and what the plan says about it.
    """
    if amp == "off":
        return "32-true", "float32 (amp: off)"
    if amp == "bf16":
        return "bf16-mixed", "bfloat16 mixed (amp: bf16)"
    if accelerator == "gpu":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "bfloat16 mixed (the GPU has it)"
        return "32-true", "float32 (the GPU has no bfloat16)"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bf16-mixed", "bfloat16 mixed (the CPU has it)"
    return "32-true", "float32 (the CPU has no native bfloat16)"


@dataclass(frozen=True)
class SplitTable:
    """Images per split and class.

    Args:
        classes: `c` names.
        counts: `[c]` per split; for a multilabel task the images that show the finding.
        images: per split.
        patients: per split; None where there is no patient column.
    """

    classes: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]
    images: Mapping[str, int]
    patients: Mapping[str, int | None]

    @classmethod
    def of(
        cls,
        labels: Sequence[int | tuple[int, ...]],
        patients: Sequence[str | None],
        splits: Sequence[str],
        classes: Sequence[str],
    ) -> SplitTable:
        """Count."""
        counts, images, people = {}, {}, {}
        for split in SPLITS:
            chosen = [i for i, name in enumerate(splits) if name == split]
            values = np.array([labels[i] for i in chosen], dtype=np.int64)
            if values.ndim == 2:
                tally = values.sum(axis=0)
            else:
                tally = np.bincount(values, minlength=len(classes))
            counts[split] = tuple(int(n) for n in tally) or (0,) * len(classes)
            images[split] = len(chosen)
            known = {patients[i] for i in chosen}
            people[split] = None if known <= {None} else len(known - {None})
        return cls(tuple(classes), counts, images, people)

    def lines(self) -> list[str]:
        """The table as text, one line per split."""
        heads = ["", "images", "patients", *self.classes]
        rows = [heads]
        for split in SPLITS:
            people = self.patients[split]
            cells = [self.images[split], "-" if people is None else people, *self.counts[split]]
            rows.append([split, *map(str, cells)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        if sum(widths) + 2 * len(widths) <= 100:
            return [
                "  ".join(
                    cell.ljust(w) if i == 0 else cell.rjust(w)
                    for i, (cell, w) in enumerate(zip(row, widths, strict=True))
                ).rstrip()
                for row in rows
            ]
        # Many classes do not fit side by side.
        lines = []
        for row in rows[1:]:
            tally = ", ".join(f"{n} {c}" for n, c in zip(row[3:], self.classes, strict=True))
            lines.append(f"{row[0]:<5}  {row[1]} images, patients {row[2]}: {tally}")
        return lines


@dataclass(frozen=True)
class Plan:
    """Everything the plan says; see `lines`."""

    dataset: str
    banners: tuple[str, ...]
    table: SplitTable
    backbone: str
    method: str
    counts: Mapping[str, int]
    device: str
    precision: str
    loss: str
    schedule: str
    out: str
    notes: tuple[str, ...] = ()

    def parameters(self) -> str:
        """Trainable parameters as a sentence."""
        adapter, head = self.counts["adapter"], self.counts["head"]
        whole = self.counts["base"] + adapter + head
        share = 100 * (adapter + head) / whole
        return f"adapter {adapter:,}, head {head:,}: {share:.2f} % of {whole:,}"

    def warnings(self) -> list[str]:
        """The banners as text; the first lines of the plan."""
        return ["!" * 8 + " " + text for text in self.banners]

    def lines(self) -> list[str]:
        """The plan as text."""
        pairs = [
            ("data set", self.dataset),
            *(("" if i else "splits", line) for i, line in enumerate(self.table.lines())),
            ("backbone", self.backbone),
            ("method", self.method),
            ("trainable", self.parameters()),
            ("device", self.device),
            ("precision", self.precision),
            ("loss", self.loss),
            ("schedule", self.schedule),
            ("output", self.out),
            *(("note", note) for note in self.notes),
        ]
        return [*self.warnings(), *(f"{name:<10} {text}".rstrip() for name, text in pairs)]
