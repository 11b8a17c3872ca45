"""Names of what machines leave in folders of images: never images of the set, wherever they lie.

Thumbnails are the reason: a network drive keeps a small copy of each image in a folder beside it,
and a copy in the training split of an image in the test split makes every number a lie.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

# A pattern that ends in "/" is a folder's name, another one a file's; case does not matter.
MADE_BY: dict[str, tuple[str, ...]] = {
    "macOS": (
        ".DS_Store", "._*", "._*/", "__MACOSX/", ".AppleDouble/", ".AppleDB/", ".AppleDesktop/",
        ".Spotlight-V100/", ".Trashes", ".Trashes/", ".Trash/", ".fseventsd/", ".TemporaryItems/",
        ".DocumentRevisions-V100/", ".VolumeIcon.icns", ".apdisk", ".localized", "Icon\r",
        "Network Trash Folder/", "Temporary Items/",
    ),
    "Windows": (
        "Thumbs.db", "Thumbs.db:*", "ehthumbs*.db", "desktop.ini", "$RECYCLE.BIN/", "RECYCLER/",
        "RECYCLED/", "System Volume Information/", "FOUND.[0-9][0-9][0-9]/", "~$*",
        "*:Zone.Identifier",
    ),
    "Linux": ("lost+found/", ".Trash-*/", ".thumbnails/", ".directory", ".fuse_hidden*", ".nfs*"),
    "Synology": (
        "@eaDir/", "#recycle/", "#snapshot/", "@tmp/", "@SynoResource", "SYNOPHOTO_*",
        "SYNOINDEX_*", ".SynologyWorkingDirectory/",
    ),
    "QNAP": (".@__thumb/", "@__thumb/", "@Recycle/", "@Recently-Snapshot/", ".streams/"),
    "a network drive": (".zfs/", ".snapshot/", "~snapshot/", ".recycle/", ".picasaoriginals/"),
    "a PACS export": (
        "DICOMDIR", "DICOMDIR.*", "LOCKFILE", "VERSION", "autorun.inf", "autorun.ico",
    ),
    "Jupyter and Python": (".ipynb_checkpoints/", "__pycache__/"),
    "version control": (
        ".git", ".git/", ".gitignore", ".gitkeep", ".gitattributes", ".svn/", ".hg/", "CVS/",
        ".dvc/", ".bzr/",
    ),
    "a synchronised folder": (
        ".dropbox*", ".dropbox.cache/", ".stfolder/", ".stversions/", ".stignore", ".sync_*.db*",
        ".owncloudsync.log*", ".nextcloudsync.log*", ".tmp.drivedownload/", ".tmp.driveupload/",
    ),
    "an editor": ("*~", "*.bak", "*.orig", "*.tmp", "*.swp"),
}  # fmt: skip
# Programs that come with the images of a PACS export; what is DICOM in there is an image still.
VIEWERS = (
    "viewer", "viewers", "dicomviewer", "cdviewer", "pacsviewer", "ihe_pdi", "weasis*", "radiant*",
    "efilm*", "jivex*", "syngo*", "jre",
)  # fmt: skip
HIDDEN = "hidden (names that start with a dot)"


def _matcher(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns), re.IGNORECASE)


_VIEWER = _matcher(VIEWERS)
_KNOWN = [
    (f"of {maker} ({pattern.rstrip('/').strip()})", pattern.endswith("/"), _matcher([name]))
    for maker, patterns in MADE_BY.items()
    for pattern in patterns
    for name in [pattern.removesuffix("/")]
]
_ANY = {
    folder: _matcher(
        pattern.removesuffix("/")
        for patterns in MADE_BY.values()
        for pattern in patterns
        if pattern.endswith("/") == folder
    )
    for folder in (False, True)
}


def made_by(name: str, *, folder: bool) -> str | None:
    """Return who leaves files or folders of that name, as `of macOS (.DS_Store)`; else None.

    Args:
        name: without the path.
        folder: whether a folder is called so.
    """
    if _ANY[folder].match(name):
        return next(
            label for label, of_folder, known in _KNOWN if of_folder == folder and known.match(name)
        )
    return HIDDEN if name.startswith(".") else None


def is_viewer(name: str) -> bool:
    """Whether a folder of that name holds a viewer that came with images."""
    return _VIEWER.match(name) is not None
