"""Images with labels that a model has not seen: opened, matched class by class, and scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wara.cards import Card
from wara.data.imageset import ImageSet, in_threads
from wara.data.sources import open_source
from wara.deploy.models import Model
from wara.deploy.reliability import Scored
from wara.errors import WaraError, WaraErrors, suggest
from wara.images import normalise, resize
from wara.runs.provenance import data_sha256


@dataclass(frozen=True)
class Labelled:
    """Images of known class.

    Args:
        images: the data set.
        indices: records that are asked for.
        labels: of these, in the order of the model's classes: class indices `[n]`, or 0/1
            `[n, c]` for multilabel tasks.
        split: the part that was asked for; None for all of it.
        finding: classes of the model that the card calls positive.
    """

    images: ImageSet
    indices: list[int]
    labels: NDArray[np.int64]
    split: str | None
    finding: list[str]


@dataclass(frozen=True)
class Outcome:
    """What a model gives for images of known class.

    Args:
        scored: logits and features of the images that could be read.
        indices: their records.
        hashes: SHA-256 of their content.
        faults: (name, what is wrong) of every image or row that could not be used.
        sha256: of files, labels, patients and content of all images that were used.
    """

    scored: Scored
    indices: list[int]
    hashes: list[str]
    faults: list[tuple[str, WaraError]]
    sha256: str

    @property
    def patients(self) -> Sequence[str | None] | None:
        """Who the images show; None where no patient is known."""
        people = self.scored.patients
        return people if any(p is not None for p in people) else None


def open_labelled(
    data: str, model: Model, *, split: str | None = None, root: str | Path | None = None
) -> Labelled:
    """Open a card, table or folder of images, and match its classes to a model's by name.

    Args:
        data: see `open_source`; nothing stands in for images that cannot be had.
        model: that they are for.
        split: `train`, `val` or `test`, to take only the images that the set itself puts there.
        root: folder below which images may lie besides that of the data.

    Raises:
        WaraError: as `open_source`; kind "data" when labels are of another form, kind "usage" when
            the set has no such split.
        WaraErrors: kind "data", one line for each class without its counterpart.
    """
    images = open_source(data, cache=None, offline="error", seed=0, within=root)
    several = model.task == "multilabel"
    if (images.card.task == "multilabel") != several:
        forms = ("any number of labels per image", "one class per image")
        model_gives, data_have = forms if several else forms[::-1]
        what = f"the model gives {model_gives}, the data have {data_have}"
        remedy = "name the task in a card, and the data by its card"
        raise WaraError("data", what, data, remedy)
    places = match_classes(images.card, model.classes, data)
    indices = list(range(len(images)))
    if split is not None:
        indices = [i for i, record in enumerate(images.records) if record.split == split]
        if not indices:
            named = sorted({record.split for record in images.records if record.split})
            has = f"it has {', '.join(named)}" if named else "it has no splits"
            raise WaraError("usage", f"no image of the split '{split}'; {has}", data,
                            "leave out --split, or name another one")  # fmt: skip
    labels = images.labels[indices]
    labels = labels[:, places] if several else np.argsort(places)[labels]
    positive = {images.card.class_index[name] for name in images.card.positive}
    finding = [name for name, place in zip(model.classes, places, strict=True) if place in positive]
    images.notes = (*images.notes, *_contradictions(images.card, model, finding))
    return Labelled(images, indices, labels, split, finding)


def _contradictions(card: Card, model: Model, finding: Sequence[str]) -> Iterator[str]:
    """Yield where a card says otherwise than the model, which rules as in `wara predict`."""
    ours, greys = model.spec.bits, model.spec.greys
    if card.bits is not None and ours is None:
        yield (
            f"the card says bits {card.bits}; the model saw no files of 16 bits in training, and "
            "reads those alone that say how many bits they use"
        )
    elif card.bits is not None and card.bits != ours:
        yield f"the card says bits {card.bits}; images are read with {ours}, as in training"
    if "greys" in card.model_fields_set and card.greys != greys:
        yield f"the card says greys {card.greys}; images are read with {greys}, as in training"
    own = [] if model.point is None else model.point["positive"]
    if finding and own and set(finding) != set(own):
        named = " and ".join(finding)
        yield f"the card calls {named} positive, the model's operating point {' and '.join(own)}"


def match_classes(card: Card, classes: Sequence[str], where: str) -> list[int]:
    """Return for each class of a model its place in a card, by name or alias, never by position.

    Raises:
        WaraErrors: kind "data", one line for each class without its counterpart.
    """
    index, names = card.class_index, card.class_names
    places = [index.get(name) for name in classes]
    free = [name for k, name in enumerate(names) if k not in places]
    faults = []
    for name, place in zip(classes, places, strict=True):
        if place is None:
            near = suggest(name, free) if free else ""
            remedy = near if near.startswith("did you mean") else (
                "name all classes of the model in a card; one may be without images"
            )  # fmt: skip
            faults.append(WaraError("data", f"the data lack the class '{name}'", where, remedy))
    for name in free:
        what = f"class '{name}' is none of the model's"
        faults.append(WaraError("data", what, where, suggest(name, classes)))
    found = [place for place in places if place is not None]
    for place in sorted({p for p in found if found.count(p) > 1}):
        both = " and ".join(c for c, p in zip(classes, places, strict=True) if p == place)
        what = f"the class '{names[place]}' is two of the model's: {both}"
        faults.append(WaraError("data", what, where, "take one of its aliases out of the card"))
    if faults:
        raise WaraErrors(faults)
    return found


def score(model: Model, data: Labelled, *, batch_size: int = 16) -> Outcome:
    """Give every image to the model, as `wara predict` does.

    Args:
        model: to ask.
        data: images.
        batch_size: images at a time.

    Raises:
        WaraError: kind "usage" for a batch of none, kind "data" when no image can be read.
    """
    if batch_size < 1:
        raise WaraError("usage", f"--batch-size is {batch_size}", "", "give at least 1")
    records = data.images.records
    faults = [(fault.where, fault) for fault in data.images.faults]
    kept: list[int] = []
    hashes: list[str] = []
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(data.indices), batch_size):
        places = range(start, min(start + batch_size, len(data.indices)))
        read = in_threads(lambda at: _read(model, data.images, data.indices[at]), places)
        sound = []
        for at, found in zip(places, read, strict=True):
            if isinstance(found, WaraError):
                faults.append((records[data.indices[at]].file, found))
            else:
                assert isinstance(found, tuple)
                sound.append(found[0])
                hashes.append(found[1])
                kept.append(at)
        if sound:
            parts.append(model.run(np.stack(sound)))
    if not parts:
        first = f", the first: {faults[0][1].what}" if faults else ""
        what = f"none of {len(data.indices) + len(data.images.faults)} images can be used{first}"
        raise WaraError("data", what, data.images.origin, "check the data")
    logits, features = (np.concatenate([pair[k] for pair in parts]) for k in (0, 1))
    indices = [data.indices[at] for at in kept]
    patients = [records[i].patient for i in indices]
    rows = [(records[i].file, records[i].label, records[i].patient, sha)
            for i, sha in zip(indices, hashes, strict=True)]  # fmt: skip
    scored = Scored(data.labels[kept], logits, features, patients)
    return Outcome(scored, indices, hashes, faults, data_sha256(rows))


def _read(model: Model, images: ImageSet, index: int) -> tuple[np.ndarray, str] | WaraError:
    """Return pixels and hash of an image. The model says how greys are read, not the data set."""
    spec = model.spec
    try:
        loaded = images.reader.load(index, spec)
        array = loaded.array
        if array is None:  # of 16 bits, where the model names none: as its file says, or refused
            whole = images.reader.read(index, spec.bits, spec.greys)
            array = resize(whole, spec.size, spec.interpolation)
    except WaraError as error:
        if error.kind != "data":  # of the machine: no word on the image
            raise
        return error
    return normalise(array, spec), loaded.facts.sha256
