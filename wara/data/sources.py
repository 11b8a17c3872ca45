"""From the name in `dataset:` to an `ImageSet`: cards, class folders, tables, phantoms."""

from __future__ import annotations

import os
from pathlib import Path

from wara.cards import (
    Card,
    CsvSource,
    FolderSource,
    MedMNISTSource,
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


def open_source(
    dataset: str,
    *,
    cache: str | Path | None,
    offline: str,
    seed: int,
    images: int | None = None,
    phantom_size: int = 112,
) -> ImageSet:
    """Find the images that `dataset` means.

    A name of a shipped card comes first (write `./name` for a folder of that name), then the path
    of a card file, of a table `*.csv`, of a folder with `labels.csv`, of a class-folder tree.

    Without the files of a shipped card and without a way to fetch them, phantoms of the same
    modality stand in when `offline` is "phantom"; `substituted_for` and a note say so. A path of
    the user's own is never replaced.

    Args:
        dataset: name or path.
        cache: folder of fetched data; None for `default_cache()`.
        offline: "phantom" or "error".
        seed: seed of the phantoms.
        images: phantom images drawn in total; None for what the card says.
        phantom_size: side of the phantoms in pixels.

    Raises:
        WaraError: kind "config" for an unknown name or a faulty card, kind "data" for files that
            are missing or not as the card says.
    """
    folder = default_cache() if cache is None else Path(cache).expanduser()
    if dataset in list_cards():
        card = load_card(dataset)
    else:
        path = Path(dataset).expanduser()
        if path.suffix in (".yaml", ".yml"):
            card = load_card(path)
        elif path.suffix == ".csv" and path.is_file():
            return open_table(path)
        elif path.is_dir():
            table = path / "labels.csv"
            return open_table(table) if table.is_file() else open_tree(path)
        else:
            raise WaraError(
                "config", f"no data set '{dataset}'", "dataset", suggest(dataset, list_cards())
            )
    if isinstance(card.source, PhantomSource):
        return open_phantoms(
            card, card.source, seed=seed, images=images, size=phantom_size, cache=folder
        )
    try:
        return _open_card(card, folder)
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


def _open_card(card: Card, cache: Path) -> ImageSet:
    source = card.source
    if isinstance(source, MedMNISTSource):
        return open_medmnist(card, source, cache)
    assert isinstance(source, (FolderSource, CsvSource))
    base = card.base or cache
    default = Path(card.name) / "labels.csv" if isinstance(source, CsvSource) else Path(card.name)
    path = base / (default if source.path is None else Path(source.path).expanduser())
    if isinstance(source, FolderSource) and path.is_dir():
        # A table beside the folders wins: it can name patients, folders cannot.
        if (path / "labels.csv").is_file():
            return open_table(path / "labels.csv", card)
        return open_tree(path, card, source.patient_pattern)
    if isinstance(source, CsvSource) and path.is_file():
        return open_table(path, card)
    raise Unavailable(f"{path} is not there")
