"""From the name in `dataset:` to an `ImageSet`: cards, class folders, tables, phantoms."""

from __future__ import annotations

import os
from pathlib import Path

from wara.cards import (
    Card,
    CsvSource,
    FolderSource,
    MedMNISTSource,
    Modality,
    PhantomSource,
    list_cards,
    load_card,
)
from wara.data.imageset import ImageSet
from wara.data.medmnist_files import Unavailable, open_medmnist
from wara.data.phantom_sets import open_phantoms
from wara.data.tables import open_table
from wara.data.trees import open_tree
from wara.errors import WaraError, suggest


def default_cache() -> Path:
    """Return the folder of fetched data: `$WARA_CACHE`, else `~/.cache/wara`."""
    return Path(os.environ.get("WARA_CACHE") or Path.home() / ".cache" / "wara").expanduser()


def cache_folder(cache: str | Path | None) -> Path:
    """Return the folder that `data.cache` means; None for `default_cache()`."""
    return default_cache() if cache is None else Path(cache).expanduser()


def open_source(
    dataset: str,
    *,
    cache: str | Path | None,
    offline: str,
    seed: int,
    images: int | None = None,
    phantom_size: int = 112,
    modality: Modality | None = None,
    within: str | Path | None = None,
) -> ImageSet:
    """Find the images that `dataset` means.

    A name of a shipped card comes first (write `./name` for a folder of that name), then the path
    of a card file, of a table (`*.csv`, `*.tsv`), of a folder with `labels.csv` or `labels.tsv`,
    of a class-folder tree.

    Without the files of a shipped card and without a way to fetch them, phantoms of the same
    modality stand in when `offline` is "phantom"; `substituted_for` and a note say so. A path of
    the user's own is never replaced.

    Args:
        dataset: name or path.
        cache: folder of fetched data; None for `default_cache()`.
        offline: "phantom" or "error".
        seed: seed of the phantoms.
        images: phantom images drawn in total; None for what the card says.
        phantom_size: side of the phantoms in pixels; the shipped backbone reads 112.
        modality: what the images show, and with it their augmentation, where no card says so.
        within: folder below which images of a table or of class folders may lie besides their own.

    Raises:
        WaraError: kind "config" for an unknown name or a faulty card, kind "data" for files that
            are missing or not as the card says.
    """
    folder = cache_folder(cache)
    if dataset in list_cards():
        card = load_card(dataset)
    else:
        path = Path(dataset).expanduser()
        if path.suffix in (".yaml", ".yml"):
            card = _shown_by(load_card(path), modality)
        elif path.is_file():
            return open_table(path, modality=modality, within=within)
        elif path.is_dir():
            table = _table_in(path)
            if table is not None:
                return open_table(table, modality=modality, within=within)
            return open_tree(path, modality=modality, within=within)
        else:
            raise WaraError(
                "config", f"no data set '{dataset}'", "dataset", suggest(dataset, list_cards())
            )
    if isinstance(card.source, PhantomSource):
        return open_phantoms(
            card, card.source, seed=seed, images=images, size=phantom_size, cache=folder
        )
    try:
        return _open_card(card, folder, within)
    except Unavailable as reason:
        if offline == "error" or card.phantom is None or card.base is not None:
            raise WaraError("data", str(reason), card.name, card.how_to_get) from reason
        stand_in = load_card(card.phantom)
        assert isinstance(stand_in.source, PhantomSource)
        drawn = open_phantoms(
            stand_in, stand_in.source, seed=seed, images=images, size=phantom_size, cache=folder
        )
        drawn.substituted_for = card.name
        drawn.notes = (
            f"{card.name}: {reason}; synthetic images of {stand_in.name} stand in, nothing below "
            f"is about {card.name}",
            *drawn.notes,
        )
        return drawn


def check_apart(place: Path, option: str, images: ImageSet) -> None:
    """Refuse to write among images: the next look at class folders would find one class more.

    Args:
        place: that gets a new entry, or is one; need not exist.
        option: that names it.
        images: that are read.

    Raises:
        WaraError: kind "usage".
    """
    real = place.expanduser().resolve()
    if any(folder.resolve() in (real, *real.parents) for folder in images.folders):
        what, remedy = f"{option} lies among the images", "choose a folder outside of them"
        raise WaraError("usage", what, str(place), remedy)


def _shown_by(card: Card, modality: Modality | None) -> Card:
    """Return a card with the modality that it leaves open, and the augmentation that goes with it.

    Args:
        card: the user's own.
        modality: as the config says; None when it does not.
    """
    if modality is None or card.modality is not None:
        return card
    augment = card.augment if "augment" in card.model_fields_set else modality
    return card.model_copy(update={"modality": modality, "augment": augment})


def _table_in(folder: Path) -> Path | None:
    """Return the table of a folder, `labels.csv` in any case; None without one.

    A workbook of that name is one too: it is refused with a remedy, and not passed over.
    """
    found = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_file()}
    endings = (".csv", ".tsv", ".xlsx", ".xls", ".ods", ".parquet")
    names = (f"labels{ending}" for ending in endings)
    return next((found[name] for name in names if name in found), None)


def _open_card(card: Card, cache: Path, within: str | Path | None) -> ImageSet:
    source = card.source
    if isinstance(source, MedMNISTSource):
        return open_medmnist(card, source, cache)
    assert isinstance(source, (FolderSource, CsvSource))
    base = card.base or cache
    default = Path(card.name) / "labels.csv" if isinstance(source, CsvSource) else Path(card.name)
    path = base / (default if source.path is None else Path(source.path).expanduser())
    if isinstance(source, FolderSource) and path.is_dir():
        # A table beside the folders wins: it can name patients, folders cannot.
        table = _table_in(path)
        if table is not None:
            return open_table(table, card, within=within)
        return open_tree(path, card, source.patient_pattern, within=within)
    if isinstance(source, CsvSource) and path.is_file():
        return open_table(path, card, within=within)
    raise Unavailable(f"{path} is not there")
