"""The `wara` command: reads arguments, calls the room that does the work, returns an exit code.

Nothing heavy is imported before a verb needs it, so that `--help` and a slip of the keyboard are
answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wara.check.verb import check_verb
from wara.compare.verbs import compare_verb
from wara.deploy.verbs import VERBS, Verb
from wara.errors import WaraError, as_refusal, suggest
from wara.signals import Stopped, StopSignals

if TYPE_CHECKING:
    from wara.config import RunConfig

TRAIN_EPILOG = """\
examples:
  wara train --cfg fundus_wara.yaml
  wara train --cfg fundus_wara.yaml --set adapter.rank=8 --set seed=1
  wara train --cfg fundus_lora.yaml --set dataset=path/to/class/folders --dry-run

`python train.py` in a checkout is the same as `wara train`.

exit codes:
  0 done, 1 bug, 2 config or usage, 3 data, 4 artefact refused, 5 storage,
  6 non-finite numbers, 7 resources, 8 run folder busy, 130 Ctrl-C, 143 terminated
"""

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """An argument parser that refuses in one line and knows the nearest flag."""

    def __init__(self, **options: Any) -> None:
        options |= {"allow_abbrev": False, "add_help": False}
        options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Raise the refusal of a wrong command line."""
        raise WaraError("usage", message, remedy=f"see {self.prog} --help")

    def parse_or_refuse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse, and name the nearest flag for one that does not exist."""
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            parser = arguments.parser
            flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
            flag = unknown[0].split("=", 1)[0]
            remedy = suggest(flag, flags) if flag.startswith("-") else f"see {parser.prog} --help"
            raise WaraError("usage", f"unknown argument '{unknown[0]}'", remedy=remedy)
        return arguments


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Be the `wara` command: run it, and end the process with its exit code.

    Once the command has ended, no signal disturbs the end of the interpreter.

    Args:
        argv: see `main`.
    """
    stop = StopSignals()
    stop.__enter__()  # for good
    code = main(argv)
    stop.ignore()
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `wara` command and return its exit code.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    arguments: argparse.Namespace | None = None
    try:
        arguments = build_parser().parse_or_refuse(sys.argv[1:] if argv is None else argv)
        with StopSignals() as stop, stop.outranking():
            arguments.verb(arguments)
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:  # of a thread, or of a library that handles Ctrl-C itself
        print("stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    except Stopped as stopped:
        if not stopped.told:
            with contextlib.suppress(OSError):  # the terminal may be what was closed
                print(f"stopped by {stopped.signal_name}", file=sys.stderr)
        return int(stopped.code)
    except Exception as error:
        refusal = as_refusal(error)
        if getattr(arguments, "debug", False):
            traceback.print_exception(error)
        print(refusal, file=sys.stderr)
        return refusal.exit_code


def build_parser() -> _Parser:
    """Return the parser of the `wara` command with all its verbs."""
    parser = _Parser(
        prog="wara",
        description="Fine-tune vision transformers on medical images with wavelet adapters.",
    )
    _add_help(parser)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.set_defaults(verb=_no_verb, parser=parser)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=_Parser)

    train = verbs.add_parser(
        "train",
        help="train from a config",
        description="Fine-tune a backbone as a config says, and evaluate it.",
        epilog=TRAIN_EPILOG,
    )
    _add_train_arguments(train)
    train.set_defaults(verb=_train, parser=train)

    readers = (check_verb(_read_from_here), compare_verb(_read_from_here))
    for word in (*readers, *VERBS, RERUN, DASHBOARD):
        parsed = verbs.add_parser(
            word.name, help=word.help, description=f"{word.help.capitalize()}."
        )
        word.add_arguments(parsed)
        _add_help(parsed)
        parsed.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        parsed.set_defaults(verb=word.call, parser=parsed)

    listings: list[tuple[str, str, Callable[[], Iterable[Sequence[str]]]]] = [
        ("configs", "list the configs that come with wara", _config_rows),
        ("datasets", "list the data sets that wara knows", _dataset_rows),
        ("methods", "list the methods and their options", _method_rows),
        ("backbones", "list pretrained backbones by name, beside those of timm", _backbone_rows),
    ]
    for name, text, rows in listings:
        listing = verbs.add_parser(name, help=text, description=f"{text.capitalize()}.")
        _add_help(listing)
        listing.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        listing.set_defaults(verb=_list, rows=rows, parser=listing)
    return parser


def _add_help(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("-h", "--help", action="help", help="print this text and stop")


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--cfg",
        metavar="NAME|PATH",
        required=True,
        help="config: a file, or the name of a shipped one (see `wara configs`)",
    )
    what.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one key of the config, as in adapter.rank=8; may be repeated",
    )
    folder = parser.add_argument_group("where it goes")
    folder.add_argument(
        "--out", metavar="FOLDER", help="run folder (default: runs/<dataset>_<method>_s<seed>)"
    )
    either = folder.add_mutually_exclusive_group()
    either.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run in that folder"
    )
    either.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in that folder"
    )
    _add_allow(folder)
    look = parser.add_argument_group("look before you train")
    look.add_argument(
        "--dry-run", action="store_true", help="make all checks, print the plan, train nothing"
    )
    look.add_argument(
        "--print-config",
        action="store_true",
        help="print every key with its value and meaning, and stop",
    )
    output = parser.add_argument_group("what you see")
    output.add_argument(
        "--quiet",
        action="store_true",
        help="print only errors, what stands in for data or backbone, and the results",
    )
    output.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    _add_help(output)


def _add_allow(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--allow-change",
        metavar="NAME",
        action="append",
        default=[],
        dest="allow",
        help="accept that this fact (threads, torch, ...) is not what it was; may be repeated",
    )


def read_config(source: str | None, overrides: Sequence[str]) -> RunConfig:
    """Load a config with every check that needs no image: keys, data set, backbone, method.

    Args:
        source: its name or path; None for the defaults.
        overrides: `key=value` strings.

    Raises:
        WaraErrors: kind "config", with all faults at once.
    """
    from wara.config import find_config

    # A misspelt name is told before torch is loaded.
    path = None if source is None else find_config(source)
    from wara.backbones import check_name
    from wara.config import load_config

    return load_config(
        path, overrides, checks={"dataset": _check_dataset, "backbone.name": check_name}
    )


def _look_here() -> None:
    """Let a method of the user's own be found in the folder they are in, however wara was started.

    Last, so that no file that lies there takes the place of a package.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _read_from_here(source: str | None, overrides: Sequence[str]) -> RunConfig:
    _look_here()
    return read_config(source, overrides)


def _train(arguments: argparse.Namespace) -> None:
    _look_here()
    if arguments.allow and not arguments.resume:
        remedy = "add --resume, or leave it out"
        raise WaraError("usage", "it says what may differ on --resume", "--allow-change", remedy)
    overrides = list(arguments.overrides)
    if arguments.out is not None:
        overrides.append(f"out={json.dumps(arguments.out)}")
    config = read_config(arguments.cfg, overrides)
    if arguments.print_config:
        from wara.config import dump_config

        print(dump_config(config.resolved()), end="")
        return
    from wara.training.start import run

    run(
        config,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
        quiet=arguments.quiet,
        allow=arguments.allow,
    )


def _dashboard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--project", metavar="P", help="W&B project (default: as for runs)")
    parser.add_argument("--entity", metavar="E", help="user or team (default: that of the login)")
    parser.add_argument(
        "--out", type=Path, default=Path("dashboard.json"), metavar="FILE",
        help="where its layout is written (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER",
        help="where to look for runs that are not sent yet (default: %(default)s)",
    )  # fmt: skip


def _dashboard(arguments: argparse.Namespace) -> None:
    from wara.config.schema import WandbConfig
    from wara.training.dashboard import make
    from wara.training.tracking import settle

    # A dashboard is there to be seen; only who says so keeps W&B offline.
    mode = None if os.environ.get("WANDB_MODE") else "online"
    section = {"mode": mode, "project": arguments.project, "entity": arguments.entity}
    make(settle(WandbConfig.model_validate(section)), arguments.out, arguments.runs)


DASHBOARD = Verb(
    "dashboard", "make a W&B dashboard of the runs", _dashboard_arguments, _dashboard
)  # fmt: skip


def _rerun_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the new run folder (default: RUN-rerun)"
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with a rerun that was stopped")
    either.add_argument("--overwrite", action="store_true", help="replace an earlier rerun")
    _add_allow(parser)
    parser.add_argument("--quiet", action="store_true", help="print only errors and the outcome")


def _rerun(arguments: argparse.Namespace) -> None:
    _look_here()
    from wara.training.rerun import rerun

    flags = {name: getattr(arguments, name) for name in ("allow", "resume", "overwrite", "quiet")}
    print(rerun(arguments.run, arguments.out, **flags))


RERUN = Verb(
    "rerun", "train a finished run again and compare the weights", _rerun_arguments, _rerun
)


def _no_verb(arguments: argparse.Namespace) -> None:
    if arguments.version:
        from wara import __version__

        print(f"wara {__version__}")
    else:
        arguments.parser.print_help()


def _list(arguments: argparse.Namespace) -> None:
    rows = [tuple(row) for row in arguments.rows()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    try:
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`wara configs | head`). Python would complain once more at
        # exit unless stdout leads somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _config_rows() -> Iterable[Sequence[str]]:
    from wara.config import list_configs

    return list_configs().items()


def _dataset_rows() -> Iterable[Sequence[str]]:
    from wara.cards import list_cards, load_card

    for card in map(load_card, list_cards()):
        yield (
            card.name,
            card.modality or "any",
            card.task,
            f"{len(card.class_names)} classes",
            card.title,
        )


def _method_rows() -> Iterable[Sequence[str]]:
    from wara.adapters import METHODS

    for name, method in METHODS.items():
        rates = ", ".join(f"{group} {rate:g}" for group, rate in method.rates.items())
        options = ", ".join(f"{key}={json.dumps(v)}" for key, v in method().options().items())
        yield name, method.summary
        yield "", f"  lr: {rates}" + (f"; {options}" if options else "")


def _backbone_rows() -> Iterable[Sequence[str]]:
    from wara.backbones import backbone_cards

    for name, card in backbone_cards().items():
        mean, std = (", ".join(f"{x:.4g}" for x in three) for three in (card.mean, card.std))
        yield name, f"{card.title} ({card.modality})"
        yield (
            "",
            f"  {card.architecture}, {card.img_size} px, {card.interpolation}, pool {card.pool}",
        )
        yield "", f"  mean {mean}; std {std}"
        yield "", f"  {card.repo}: {card.how_to_get}"
        yield "", f"  {card.licence}. {card.citation}"


def _check_dataset(name: str) -> None:
    from wara.cards import list_cards

    cards = list_cards()
    if name in cards or Path(name).expanduser().exists():
        return
    if os.sep in name:
        remedy = "a path counts from the folder you are in"
        raise WaraError("config", f"no data set at '{name}'", "dataset", remedy)
    raise WaraError("config", f"unknown data set '{name}'", "dataset", suggest(name, cards))


if __name__ == "__main__":
    program()
