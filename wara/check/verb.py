"""What `wara check` takes, and what it does with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wara.deploy.verbs import Verb
from wara.errors import WaraError, suggest
from wara.flags import whole

if TYPE_CHECKING:
    from wara.config import RunConfig

ReadConfig = Callable[[str | None, Sequence[str]], "RunConfig"]


def check_verb(read_config: ReadConfig) -> Verb:
    """Return the verb.

    Args:
        read_config: loads a config by name, or the defaults, with its `--set`.
    """
    return Verb(
        "check",
        "check a data set and report on it, without a model",
        _arguments,
        partial(_check, read_config),
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", metavar="CFG|PATH", help="a config, or what its key `dataset` takes: the name or "
        "path of a card, a table, a folder of classes")  # fmt: skip
    add("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="change one key of the config; may be repeated")  # fmt: skip
    add("--report", type=Path, metavar="DIR", help="folder for the page, the tables and the sheets")
    add("--overwrite", action="store_true", help="replace an earlier report in that folder")
    add("--images", type=whole("--images", 1, 10_000), default=12, metavar="N",
        help="images of each class on its contact sheet (default: %(default)s)")  # fmt: skip


def _check(read_config: ReadConfig, arguments: argparse.Namespace) -> None:
    if arguments.overwrite and arguments.report is None:
        remedy = "name the folder with --report"
        raise WaraError("usage", "--overwrite without a report", "", remedy)
    overrides = list(arguments.overrides)
    source: str | None = arguments.target
    if not names_config(arguments.target):
        source, overrides = None, [f"dataset={json.dumps(arguments.target)}", *overrides]
    config = read_config(source, overrides)

    from wara.check import report
    from wara.check.content import content_of
    from wara.check.inspection import inspect

    if arguments.report is not None:
        report.check_place(arguments.report, overwrite=arguments.overwrite)
    found = inspect(config, report=arguments.report)
    content = content_of(found)
    for line in report.lines(content):
        print(line)
    rest = "`--report DIR` lists them all"
    if arguments.report is not None:
        report.write(arguments.report, found, content, per_class=arguments.images)
        print(f"report     {arguments.report / report.PAGE}", flush=True)
        rest = f"all are listed in {arguments.report / report.PAGE}"
    found.refuse(rest)


def names_config(target: str) -> bool:
    """Whether a word means a config, and not a data set.

    Raises:
        WaraError: kind "config" when it is neither.
    """
    from wara.cards import list_cards
    from wara.config import find_config, list_configs
    from wara.schema import read_yaml

    path = Path(target).expanduser()
    if target in list_cards():
        return False
    if path.exists() and path.suffix not in (".yaml", ".yml"):
        return False
    if path.is_file():
        tree, _ = read_yaml(path, "config", "see `wara configs`")
        return not {"classes", "source"} & set(tree)  # which a card has, and no config
    try:
        find_config(target)
    except WaraError:
        known = [*list_cards(), *(f"{name}.yaml" for name in list_configs())]
        what = f"no config and no data set '{target}'"
        raise WaraError("config", what, "", suggest(target, known)) from None
    return True
