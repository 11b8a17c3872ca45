"""What `wara compare` takes, and whom it calls."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wara.deploy.verbs import Verb
from wara.errors import WaraError, suggest
from wara.flags import MOST_WORKERS, real, whole

if TYPE_CHECKING:
    from wara.compare.grid import Request, Tuning
    from wara.compare.launch import Launcher
    from wara.compare.worker import Shelf
    from wara.config import RunConfig

ReadConfig = Callable[[str, Sequence[str]], "RunConfig"]
_TUNED = ("lr", "weight_decay")
_MOST_TRIED = 15
_MOST = 1000
_MOST_REPEATS = 10_000


def compare_verb(read_config: ReadConfig) -> Verb:
    """Return the verb.

    Args:
        read_config: loads a config by name with its `--set`.
    """
    return Verb(
        "compare",
        "compare methods over data sets, splits and seeds",
        _arguments,
        partial(_compare, read_config),
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cfg", nargs="+", required=True, metavar="NAME|PATH", help="configs, one per data set")
    add("--methods", required=True, metavar="A,B,…",
        help="methods (see `wara methods`); options as in wara:wavelet=db2:level=2")  # fmt: skip
    add("--datasets", metavar="A,B,…", help="data sets in place of the config's")
    add("--seeds", default="3", metavar="N|A,B,…", help="number of seeds, or seeds (default: 3)")
    splits, jobs = whole("--splits", 1, _MOST), whole("--jobs", 1, MOST_WORKERS)
    add("--splits", type=splits, default=1, metavar="K", help="number of splits (default: 1)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder; the same one goes on")
    add("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="change one key of the configs; may be repeated")  # fmt: skip
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--budget", metavar="lora_r4", help="one size for all adapters")
    budget.add_argument(
        "--sweep-budget", metavar="0.5,1,2", help="several sizes, as multiples of lora_r1"
    )
    add("--sweep-train", metavar="25,50,all", help="several numbers of training images")
    add("--tune", metavar="lr=3[,weight_decay=3]", help="rates to try on the validation images")
    add("--beside", default="majority,linear_probe,full", metavar="A,B,…|none",
        help="reference rows (default: majority,linear_probe,full)")  # fmt: skip
    add("--reference", default="lora", metavar="METHOD|none",
        help="what differences are tested against (default: lora)")  # fmt: skip
    add("--rope", type=real("--rope", 0, 1e6), default=0.01, metavar="X",
        help="smallest difference that means something (default: 0.01)")  # fmt: skip
    add("--metric", default="auc_macro", metavar="NAME", help="what is compared")
    add("--plan", action="store_true", help="print the grid, the runs and the time, and stop")
    add("--audit", action="store_true",
        help="say what choosing the epoch on the test images would have gained")  # fmt: skip
    add("--jobs", type=jobs, default=1, metavar="N",
        help="cells at a time, which share the cores (default: 1)")  # fmt: skip
    add("--launcher", choices=("local", "ray"), default="local", help="who runs the cells")
    add("--ray-address", metavar="ADDRESS", help="of a Ray cluster (default: one is started here)")
    add("--ray-gpus", type=real("--ray-gpus", 0, 1024), default=0.0, metavar="X",
        help="GPUs of each cell, for Ray")  # fmt: skip


def _compare(read_config: ReadConfig, arguments: argparse.Namespace) -> None:
    request = request_of(arguments, read_config)
    from wara.compare.start import compare
    from wara.compare.worker import Shelf

    shelf = Shelf()
    launcher = _launcher(arguments, shelf)
    compare(request, launcher, shelf, at_once=arguments.jobs, plan=arguments.plan)


def request_of(arguments: argparse.Namespace, read_config: ReadConfig) -> Request:
    """Return what was asked for.

    Raises:
        WaraError: kind "usage" for words that are none of those known, kind "config" for configs.
    """
    seeds = _seeds(arguments.seeds)
    if len(seeds) * arguments.splits > _MOST_REPEATS:
        what = f"{len(seeds)} seeds on each of {arguments.splits} splits"
        remedy = f"at most {_MOST_REPEATS} runs of a method are compared"
        raise WaraError("usage", what, "--seeds, --splits", remedy)
    beside = [] if arguments.beside == "none" else _words(arguments.beside, "--beside")
    budgets: tuple[str | None, ...] = (arguments.budget,)
    if arguments.sweep_budget:
        budgets = tuple(f"{w}*lora_r1" for w in _words(arguments.sweep_budget, "--sweep-budget"))
    train = tuple(_sizes(arguments.sweep_train)) if arguments.sweep_train else (None,)
    tuning = _tuning(arguments.tune) if arguments.tune else None
    sets = _words(arguments.datasets, "--datasets") if arguments.datasets else [None]

    from wara.compare.grid import Request, spelled

    configs = [
        read_config(cfg, [*arguments.overrides, *([f"dataset={json.dumps(name)}"] if name else [])])
        for cfg in arguments.cfg
        for name in sets
    ]
    return Request(
        configs=tuple(configs),
        methods=tuple(spelled(word) for word in _words(arguments.methods, "--methods")),
        seeds=seeds,
        splits=arguments.splits,
        out=arguments.out.expanduser(),
        budgets=budgets,
        train=train,
        beside=tuple(spelled(word) for word in beside),
        tuning=tuning,
        reference=None if arguments.reference == "none" else spelled(arguments.reference),
        rope=arguments.rope,
        metric=arguments.metric,
        audit=arguments.audit,
    )


def _launcher(arguments: argparse.Namespace, shelf: Shelf) -> Launcher:
    from wara.compare.launch import Here, Processes

    if arguments.launcher == "ray":
        from wara.compare.cluster import Ray

        return Ray(arguments.ray_address, jobs=arguments.jobs, gpus=arguments.ray_gpus)
    return Here(shelf) if arguments.jobs == 1 else Processes(arguments.jobs)


def _words(text: str, flag: str) -> list[str]:
    words = [word.strip() for word in re.split(r",(?![^\[]*\])", text)]  # not within a list
    if not all(words):
        raise WaraError("usage", f"an empty name in '{text}'", flag, "write names, commas between")
    return words


def _seeds(text: str) -> tuple[int, ...]:
    words = _words(text, "--seeds")
    most = _MOST if len(words) == 1 else 2**32 - 1
    if not all(_is_whole(word, most) for word in words) or words == ["0"]:
        remedy = f"write how many (5, at most {_MOST}), or which (0,1,7, below 2**32)"
        raise WaraError("usage", f"seeds '{text}' are not understood", "--seeds", remedy)
    return tuple(range(int(words[0]))) if len(words) == 1 else tuple(map(int, words))


def _is_whole(word: str, most: int) -> bool:
    # By digits first: Python refuses to read thousands of them.
    return word.isdecimal() and len(word) <= len(str(most)) and int(word) <= most


def _sizes(text: str) -> list[int | None]:
    words = _words(text, "--sweep-train")
    if not all(word == "all" or (_is_whole(word, 10**9) and int(word) > 1) for word in words):
        remedy = "write numbers of images above 1, and all: 25,50,all"
        raise WaraError("usage", f"sizes '{text}' are not understood", "--sweep-train", remedy)
    return [None if word == "all" else int(word) for word in words]


def _tuning(text: str) -> Tuning:
    found: dict[str, int] = {}
    for part in _words(text, "--tune"):
        name, _, count = part.partition("=")
        if name not in _TUNED:
            raise WaraError("usage", f"'{name}' is not tuned", "--tune", suggest(name, _TUNED))
        if not _is_whole(count, _MOST_TRIED) or int(count) % 2 == 0 or name in found:
            what = f"'{part}' is not understood"
            remedy = f"write an odd number up to {_MOST_TRIED}, as in lr=3"
            raise WaraError("usage", what, "--tune", remedy)
        found[name] = int(count)
    from wara.compare.grid import Tuning

    return Tuning(**found)
