"""The fields of a run, what they mean and which values they take.

Words follow timm (`lr`, `batch_size`, `epochs`, `workers`, `amp`) and, for adapters, PEFT (`rank`,
`alpha`, `targets`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from wara.adapters import Method, read_method, section_of
from wara.cards import MOST_PHANTOMS, Augmentation, Bits, Greys, Modality
from wara.schema import Section, fault
from wara.vit import Channels

# Bounds are far above what anybody trains with: a slip of the keyboard must not become an
# allocation or a run without end. What a model or a machine cannot take is refused where it is met.
MOST_RATE = 1e3
MOST_OPTION = 100_000
LARGEST_SIDE = 4096
"""Of an image in pixels, as in `wara.deploy.contents`: what is trained can be served."""

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Option = (
    bool
    | Annotated[int, Field(ge=-MOST_OPTION, le=MOST_OPTION)]
    | Annotated[float, Field(ge=-MOST_OPTION, le=MOST_OPTION)]
    | str
    | list[Annotated[int, Field(ge=-MOST_OPTION, le=MOST_OPTION)]]
)


class BackboneConfig(Section):
    """The frozen network that is adapted."""

    name: str = Field(
        "wara_nano",
        min_length=1,
        description="A timm ViT, hf-hub:owner/name, one of `wara backbones`, or wara_nano.",
    )
    weights: str | None = Field(
        None, description="Path of a local weights file; null fetches or finds the usual ones."
    )
    img_size: int | tuple[int, int] | None = Field(
        None, description="Image side in pixels, or [height, width]; null: the backbone's."
    )
    part: str | None = Field(
        None, description="The network to take where the file of weights holds several."
    )
    pool: Literal["token", "avg"] | None = Field(
        None, description="Class token or mean of the patches; null: as the weights imply."
    )
    options: dict[str, Option] = Field(
        {}, description="More arguments of the architecture, by timm's names."
    )
    mean: Channels | None = Field(
        None,
        description="Of the images of pretraining, in 0..1; null: as is known of the weights.",
    )
    std: Channels | None = Field(None, description="Of the images of pretraining, with `mean`.")
    interpolation: Interpolation | None = Field(
        None, description="How images are resized; null: what is known of the weights."
    )
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="Stochastic depth in the backbone.")
    drop_rate: float = Field(0.0, ge=0, lt=1, description="Dropout before the head.")

    @model_validator(mode="after")
    def _together(self) -> BackboneConfig:
        if (self.mean is None) != (self.std is None):
            raise fault("mean and std belong together", "set both, or neither", "mean")
        if self.std is not None and min(self.std) <= 0:
            raise fault("std must be above 0", "give the standard deviation per channel", "std")
        return self

    def arguments(self) -> dict[str, Any]:
        """Return what `build_backbone` takes, by its names."""
        return self.model_dump(exclude={"name"})

    @field_validator("img_size", mode="before")
    @classmethod
    def _side_or_pair(cls, value: Any) -> Any:
        sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
        fits = all(type(side) is int and 8 <= side <= LARGEST_SIDE for side in sides)
        if value is not None and not fits:
            limit = {"most": LARGEST_SIDE}
            raise PydanticCustomError(
                "size", "a whole number from 8 to {most}, or two of them", limit
            )
        return tuple(value) if isinstance(value, list) else value


AnyMethod = Annotated[
    Method, PlainValidator(read_method), PlainSerializer(section_of, return_type=dict)
]
"""One of the methods, told apart by the key `method`; its options are the other keys."""


_CACHED_VIEWS = 4


class DataConfig(Section):
    """How images are found, split and augmented."""

    cache: str | None = Field(None, description="Folder of downloaded data; null: ~/.cache/wara.")
    root: str | None = Field(
        None,
        min_length=1,
        description="Folder that images may lie below, links followed; null: the data set's own.",
    )
    images: int | None = Field(
        None, ge=1, le=MOST_PHANTOMS,
        description="Phantom images drawn in total; null: what the card says.",
    )
    val_fraction: float = Field(0.15, gt=0, lt=1, description="Share for validation if not split.")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="Share for the test if not split.")
    train_images: int | None = Field(
        None, ge=2, le=10**9, description="Training images kept, about so many; null: all."
    )
    split_seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of the split, apart from the run's seed."
    )
    near_duplicates: Literal["group", "ignore"] = Field(
        "group",
        description="One picture in other formats, sizes or marks: group keeps it in one split.",
    )
    allow_duplicates: bool = Field(
        False, description="Let the same pixels lie in two splits that the data set brings."
    )
    modality: Modality | None = Field(
        None, description="What images without a card show; null: not known, little is augmented."
    )
    bits: Bits | None = Field(
        None, description="Bits of the greys in 16-bit files; null: as the card says, or found."
    )
    greys: Greys | None = Field(
        None, description="DICOM greys: window, stored or range; null: as the card says."
    )
    augment: Literal["auto", *get_args(Augmentation)] = Field(  # type: ignore[valid-type]
        "auto", description="Training images: auto (what the card says), off, or a preset."
    )
    views: int | None = Field(
        None, ge=1, le=10_000,
        description="Augmented views per training image; null: new ones every epoch.",
    )
    trunk: Literal["off", "cache"] = Field(
        "off", description="cache: keep what frozen lower blocks give, for all runs; 4 views."
    )
    cache_limit: float = Field(
        20.0, gt=0, le=1e6, description="Most GB that a run may keep so; above, it is refused."
    )
    workers: int = Field(
        0, ge=0, le=1024, description="Processes that load images; results do not change."
    )

    @property
    def counted_views(self) -> int | None:
        """Augmented views per training image, which a cache needs a number of."""
        return _CACHED_VIEWS if self.views is None and self.trunk == "cache" else self.views

    @field_validator("test_fraction")
    @classmethod
    def _leave_some_for_training(cls, value: float, info: ValidationInfo) -> float:
        if value + info.data.get("val_fraction", 0.0) >= 1:
            raise PydanticCustomError("split", "small enough to leave images to train on")
        return value


Tag = Annotated[str, Field(min_length=1, max_length=64)]


class WandbConfig(Section):
    """Where Weights & Biases shows a run. A null key is W&B's own variable, where it is set."""

    mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="Live, files only, or not at all; null: WANDB_MODE, else offline."
    )
    project: str | None = Field(
        None, min_length=1, description="Project there; null: WANDB_PROJECT, else wara."
    )
    entity: str | None = Field(
        None, min_length=1, description="User or team; null: WANDB_ENTITY, else that of the login."
    )
    group: str | None = Field(
        None, min_length=1, description="Runs that belong together; null: WANDB_RUN_GROUP."
    )
    tags: list[Tag] | None = Field(
        None, description="Words to find the run by; null: WANDB_TAGS, with commas between."
    )
    notes: str | None = Field(None, description="Remark beside the run; null: WANDB_NOTES.")
    images: bool = Field(False, description="Send images and file names too; may name patients.")


class RunConfig(Section):
    """Everything that decides a run. Field order is the order in the resolved file."""

    dataset: str = Field(
        "fundus_phantom",
        min_length=1,
        description="Card name, card file, class-folder tree, or folder with labels.csv.",
    )
    offline: Literal["phantom", "error"] = Field(
        "phantom", description="Without data or weights and network: use phantoms, or refuse."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of everything but the split.")
    out: str | None = Field(
        None, min_length=1, description="Run folder; null: runs/<dataset>_<method>_s<seed>."
    )
    backbone: BackboneConfig = Field(default_factory=BackboneConfig, description="The network.")
    adapter: AnyMethod = Field(
        default_factory=lambda: read_method({}), description="The method and its options."
    )
    data: DataConfig = Field(default_factory=DataConfig, description="The images.")

    loss: Literal["auto", "ce", "weighted_ce", "focal", "bce"] = Field(
        "auto",
        description=(
            "auto: ce, or weighted_ce above a class ratio of 3:1; bce if multilabel, its positives "
            "weighted above 3 negatives to one."
        ),
    )
    focal_gamma: float = Field(
        2.0, ge=0, le=100, description="Focusing exponent of the focal loss."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing of the loss.")
    max_class_weight: float | None = Field(
        100.0, ge=1, le=1e6,
        description="Largest weight of a rare class in the loss; null: no limit.",
    )

    epochs: int = Field(12, ge=1, le=100_000, description="Passes over the training images.")
    batch_size: int = Field(
        32, ge=1, le=100_000, description="Images per batch, over all devices together."
    )
    accumulate: int = Field(1, ge=1, le=100_000, description="Batches per optimiser step.")
    lr: float | None = Field(
        None, ge=0, le=MOST_RATE,
        description="Peak learning rate of what the method trains; null: its own.",
    )
    lr_core: float | None = Field(
        None, ge=0, le=MOST_RATE,
        description="That of the cores, beside an adapter; null: the method's.",
    )
    lr_head: float | None = Field(
        None, ge=0, le=MOST_RATE,
        description="That of the head, beside a method; null: the method's.",
    )
    weight_decay: float = Field(0.01, ge=0, le=MOST_RATE, description="Weight decay of AdamW.")
    warmup_epochs: float = Field(
        1.0, ge=0, le=100_000, description="Linear warm-up before the cosine."
    )
    clip_grad: float | None = Field(
        1.0, gt=0, le=1e9, description="Largest gradient norm; null: any."
    )
    amp: Literal["auto", "off", "bf16"] = Field(
        "auto", description="Mixed precision; auto: bf16 where the hardware has it."
    )
    compile: bool = Field(False, description="Run the model through torch.compile.")
    devices: int = Field(
        1, ge=1, le=1024, description="Processes that train together (DDP above 1)."
    )
    ddp_timeout: float = Field(
        1800.0, gt=0, le=1e7,
        description="Seconds that processes wait for a silent one; then the run ends.",
    )
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="Where to train.")
    deterministic: bool = Field(True, description="Only deterministic kernels.")

    patience: int | None = Field(
        None, ge=1, le=100_000,
        description="Epochs without a better monitor before stopping; null: never.",
    )
    monitor: Literal["auc_macro", "accuracy", "balanced_accuracy", "f1_macro", "qwk"] = Field(
        "auc_macro", description="Validation metric that picks the best checkpoint."
    )
    bootstrap: int = Field(
        1000, ge=0, le=100_000, description="Resamples behind each 95 % interval."
    )

    wandb: WandbConfig = Field(default_factory=WandbConfig, description="Weights & Biases.")
    tensorboard: bool = Field(False, description="Write TensorBoard files too.")

    @field_validator("wandb", mode="before")
    @classmethod
    def _was_a_word(cls, value: Any) -> Any:
        if isinstance(value, str):
            mode = "disabled" if value == "off" else value
            raise fault("wandb is a section", f"write wandb.mode={mode}")
        return value

    @field_validator("warmup_epochs")
    @classmethod
    def _warm_up_ends(cls, value: float, info: ValidationInfo) -> float:
        if value > info.data.get("epochs", value):
            raise PydanticCustomError("warmup", "at most epochs")
        return value

    @field_validator("lr_core", "lr_head")
    @classmethod
    def _rate_of_something(cls, value: float | None, info: ValidationInfo) -> float | None:
        method, group = info.data.get("adapter"), str(info.field_name).removeprefix("lr_")
        if value is None or method is None:
            return value
        rates = method.learning_rates()
        if group not in rates:
            part = "cores" if group == "core" else "head"
            under = " under the options set" if group in method.rates else ""
            what = f"'{method.name}' trains no {part}{under}"
            raise fault(what, f"remove {info.field_name}")
        if group == next(iter(rates)) and info.data.get("lr") not in (None, value):
            what = f"lr and {info.field_name} are the same rate for '{method.name}'"
            raise fault(what, "set one of the two")
        return value

    @property
    def rates(self) -> dict[str, float]:
        """Peak learning rate of each group of parameters that the method trains."""
        given = {"core": self.lr_core, "head": self.lr_head}
        found = {}
        for place, (group, own) in enumerate(self.adapter.learning_rates().items()):
            main = self.lr if place == 0 else None
            chosen = main if main is not None else given.get(group)
            found[group] = own if chosen is None else chosen
        return found

    def resolved(self, method: Method | None = None) -> RunConfig:
        """Return the same run with nothing left to look up: the rates stand in it.

        Args:
            method: the method as it trains, where a budget has been fitted to a model.
        """
        rates = self.rates
        main = next(iter(rates))
        update = {
            "adapter": method or self.adapter,
            "data": self.data.model_copy(update={"views": self.data.counted_views}),
            "lr": rates[main],
            "lr_core": rates["core"] if "core" in rates and main != "core" else None,
            "lr_head": rates["head"] if main != "head" else None,
        }
        return self.model_copy(update=update)

    @property
    def folder(self) -> Path:
        """Run folder: `out`, or one named after data set, method and seed."""
        if self.out is not None:
            return Path(self.out).expanduser()
        name = (
            Path(self.dataset).expanduser().resolve().name
            if _is_path(self.dataset)
            else self.dataset
        )
        stem = re.sub(r"\.ya?ml$", "", name)
        stem = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)
        return Path("runs") / f"{stem}_{self.adapter.name}_s{self.seed}"


def _is_path(text: str) -> bool:
    return os.sep in text or text.startswith((".", "~")) or Path(text).suffix in (".yaml", ".yml")
