"""What `wara export`, `predict`, `evaluate`, `calibrate` and `verify` take, and whom they call."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from wara.deploy import infer
from wara.flags import MOST_BATCH, real, whole


class Verb(NamedTuple):
    """A verb of the command line."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    call: Callable[[argparse.Namespace], None]


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="the new folder")
    parser.add_argument("--onnx", action="store_true", help="write ONNX (always done)")
    parser.add_argument("--int8", action="store_true", help="quantise the matrix products")
    _point_arguments(parser, "the card's")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="where the backbone's weights lie now"
    )


def _point_arguments(parser: argparse.ArgumentParser, positive: str) -> None:
    parser.add_argument(
        "--positive",
        metavar="CLASS[,CLASS]",
        help=f"classes that count as positive (default: {positive})",
    )
    either = parser.add_mutually_exclusive_group()
    for name in ("sensitivity", "specificity"):
        either.add_argument(
            f"--{name}",
            type=real(f"--{name}", 0, 1),
            metavar="S",
            help=f"operating point: the threshold that reaches this {name}",
        )


def _export(arguments: argparse.Namespace) -> None:
    from wara.deploy.export import Wish, export

    wish = Wish(
        positive=_names(arguments.positive),
        sensitivity=arguments.sensitivity,
        specificity=arguments.specificity,
        int8=arguments.int8,
        weights=arguments.weights,
    )
    print(f"bundle   {export(arguments.run, arguments.out, wish)}")


def _names(words: str | None) -> list[str]:
    return [word.strip() for word in words.split(",")] if words else []


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of a bundle")
    infer.add_arguments(parser)
    parser.add_argument(
        "--explain",
        type=Path,
        metavar="DIR",
        help="draw what each answer rests on over its image (needs captum; not in infer.py)",
    )


def _predict(arguments: argparse.Namespace) -> None:
    if arguments.explain is None:
        infer.predict(arguments.bundle, arguments)
        return
    from wara.deploy.explain import Overlays

    infer.predict(arguments.bundle, arguments, Overlays(arguments.explain).of)


def _root_argument(parser: argparse.ArgumentParser) -> None:
    what = "folder that images may lie below besides that of the data, as data.root of a run"
    parser.add_argument("--root", type=Path, metavar="DIR", help=what)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="BUNDLE|RUN", help="folder of a bundle or a finished run")
    add("--data", required=True, help="labelled images: a card, a table, or a folder of classes")
    add("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    _root_argument(parser)
    add(
        "--by",
        nargs="+",
        action="extend",
        default=[],
        metavar="COLUMN",
        help="compare groups: a column of the table, numbers in bands as age:40,60",
    )
    add("--split", choices=("train", "val", "test"), help="take only this part of the set")
    add(
        "--positive",
        metavar="CLASS[,CLASS]",
        help="classes of the decision curve, where the model has no operating point "
        "(default: the card's)",
    )
    batch = whole("--batch-size", 1, MOST_BATCH)
    add("--batch-size", type=batch, default=16, metavar="N", help="images at a time (default: 16)")
    add("--allow-partial", action="store_true", help="images that cannot be used are no failure")


def _evaluate(arguments: argparse.Namespace) -> None:
    from wara.deploy.evaluate import Request, evaluate

    request = Request(
        by=arguments.by,
        split=arguments.split,
        positive=_names(arguments.positive),
        batch_size=arguments.batch_size,
        allow_partial=arguments.allow_partial,
        root=arguments.root,
    )
    out = evaluate(arguments.model, arguments.data, arguments.out, request)
    print(f"report   {out / 'report.html'}")


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the parent")
    parser.add_argument(
        "--data", required=True, help="local cases: a card, a table, or a folder of classes"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="the new folder")
    _root_argument(parser)
    _point_arguments(parser, "the bundle's, else the card's")


def _calibrate(arguments: argparse.Namespace) -> None:
    from wara.deploy.calibrate import Wanted, calibrate

    wanted = Wanted(
        positive=_names(arguments.positive),
        sensitivity=arguments.sensitivity,
        specificity=arguments.specificity,
        root=arguments.root,
    )
    made = calibrate(arguments.bundle, arguments.data, arguments.out, wanted)
    print(f"bundle   {made}")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a bundle, a run folder or a trace")


def _verify(arguments: argparse.Namespace) -> None:
    from wara.deploy.verify import verify

    for line in verify(arguments.path):
        print(line)
    sys.stdout.flush()


VERBS = (
    Verb("export", "make a bundle of a finished run", _export_arguments, _export),
    Verb("predict", "predict images with a bundle", _predict_arguments, _predict),
    Verb("evaluate", "evaluate a bundle or a run on labelled images", _evaluate_arguments,
         _evaluate),
    Verb("calibrate", "fit a bundle to local cases", _calibrate_arguments, _calibrate),
    Verb("verify", "check a bundle, a run or a trace", _verify_arguments, _verify),
)  # fmt: skip
