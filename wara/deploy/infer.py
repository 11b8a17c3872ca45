"""Predict with a bundle: `python infer.py PATHS… --out predictions.csv`.

The same file is the program of a bundle and the verb `wara predict`. It also speaks the contracts
of two container platforms: mercure (environment) and MONAI Deploy (`-i`, `-o`, or environment).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wara.deploy.inputs import Sources
    from wara.deploy.predictor import Prediction, Predictor
    from wara.deploy.sr import Reports

    Listeners = Callable[[Predictor, int], Iterable[Callable[[Prediction], None]]]

_HERE = Path(__file__).resolve().parent
_OLDEST = (3, 11)  # of Python, for all files of a bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `infer.py` and `wara predict` have in common."""
    from wara.flags import MOST_BATCH, MOST_WORKERS, whole

    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="PATH",
        help="images, folders, patterns (*.dcm), or @list.txt with one path a line",
    )
    add("--out", type=Path, metavar="FILE", help="where the rows go")
    add(
        "--format",
        choices=("csv", "jsonl", "json"),
        help="form of the rows (default: by the ending of --out, else csv)",
    )
    batch, workers = whole("--batch-size", 1, MOST_BATCH), whole("--workers", 1, MOST_WORKERS)
    add("--batch-size", type=batch, default=8, metavar="N", help="images at a time (default: 8)")
    add("--workers", type=workers, metavar="N", help="threads that read images (default: all)")
    add(
        "--abstain-on",
        action="append",
        metavar="REASON",
        help="ood (the default), ambiguous, or none; may be given twice",
    )
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="record what was said, chained by hashes, without names or paths",
    )
    add(
        "--dicom-sr",
        type=Path,
        metavar="DIR",
        help="write a Structured Report per DICOM image (needs highdicom)",
    )
    add("--allow-partial", action="store_true", help="unreadable images are no failure")
    add("--resume", action="store_true", help="go on with the rows of a call that was stopped")
    add("--quiet", action="store_true", help="print only errors")


def predict(
    folder: Path,
    arguments: argparse.Namespace,
    listeners: Listeners = lambda *_: (),
) -> list[dict[str, Any]]:
    """Predict as the arguments say.

    Args:
        folder: the bundle.
        arguments: of `add_arguments`.
        listeners: given the predictor and the number of rows that an earlier call left, returns
            what is to be called with each prediction. So `wara predict --explain` hooks in, which
            needs torch; a bundle does without and does not offer it.

    Returns:
        The rows.

    Raises:
        WaraError: kind "usage" for what cannot be asked, before anything is written; "busy" when
            another call writes the same files; "data" when images could not be read or reports not
            be made, after all rows were written.
    """
    from wara.deploy.inputs import expand
    from wara.deploy.output import finished

    _check(arguments)
    sources = expand(arguments.paths)
    _check_places(arguments, [*sources.paths, *sources.named])
    with _silent():
        rows, reports = _rows(folder, arguments, sources, listeners)
    said = [*finished(rows), *(reports.lines() if reports else ())]
    if not arguments.quiet:
        for line in (*said, f"written: {arguments.out}"):
            print(line, file=sys.stderr)
    refused = reports.refused if reports else []
    for error in refused:
        print(error, file=sys.stderr)
    _judge(rows, len(refused), arguments)
    return rows


def _rows(
    folder: Path, arguments: argparse.Namespace, sources: Sources, listeners: Listeners
) -> tuple[list[dict[str, Any]], Reports | None]:
    """Write what is asked for; return the rows, and the reports if they are."""
    from wara.deploy.output import Output
    from wara.deploy.predictor import Predictor

    reasons = [r for r in (arguments.abstain_on or ["ood"]) if r != "none"]
    predictor = Predictor(folder, abstain_on=reasons)
    if predictor.bundle.manifest["synthetic"]:
        print("SYNTHETIC: this model was trained on drawn images, not on patients.",
              file=sys.stderr)  # fmt: skip
    for line in sources.notes:
        print(f"note: {line}", file=sys.stderr)
    key = {
        "model": predictor.bundle.model_hash,
        "abstain_on": reasons,
        "reports": arguments.dicom_sr is not None,
        "images": hashlib.sha256(b"\n".join(map(os.fsencode, sources.paths))).hexdigest(),
    }
    form = arguments.format or _form_of(arguments.out)
    reports = None
    if arguments.dicom_sr is not None:
        from wara.deploy.sr import Reports

        reports = Reports(arguments.dicom_sr, predictor.bundle)
    files = [str(path) for path in sources.paths]
    with contextlib.ExitStack() as ends:
        output = Output(
            arguments.out, form, predictor.columns, key, files, resume=arguments.resume
        )
        ends.callback(output.close)
        if reports is not None:
            for outcome in output.reports:
                reports.recall(outcome)
        hooks = list(listeners(predictor, len(output.rows)))
        if arguments.trace is not None:
            from wara.deploy.trace import Trace

            hooks.append(ends.enter_context(Trace(arguments.trace, predictor)).add)
        for prediction in predictor.predict(
            sources.paths[len(output.rows) :],
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        ):
            for hook in hooks:
                hook(prediction)
            output.add(prediction.row, reports.add(prediction) if reports else None)
            _show(len(output.rows), len(files), arguments.quiet)
        output.finish()
    return output.rows, reports


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Let no value of a header out: pydicom warns of those that are not of their kind.

    Here and not where images are read, since threads share the filters of warnings.
    """
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _judge(rows: Sequence[dict[str, Any]], refused: int, arguments: argparse.Namespace) -> None:
    """Fail, after all was written, when images or reports are lacking."""
    from wara.errors import WaraError

    faults = sum(row["error"] is not None for row in rows)
    if arguments.allow_partial or not (faults or refused):
        return
    what = f"{faults} of {len(rows)} images could not be read"
    remedy = "see the column `error`; --allow-partial makes that no failure"
    if not faults:
        what, remedy = f"{refused} images have no report", "--allow-partial makes that no failure"
    raise WaraError("data", what, str(arguments.out), remedy)


def _check(arguments: argparse.Namespace) -> None:
    from wara.errors import WaraError

    if arguments.out is None:
        raise WaraError("usage", "no place for the rows", "", "give --out predictions.csv")
    reasons = arguments.abstain_on or []
    if "none" in reasons and set(reasons) != {"none"}:
        what = f"none and {', '.join(r for r in dict.fromkeys(reasons) if r != 'none')}"
        raise WaraError("usage", what, "--abstain-on", "give none alone, or leave it out")


def _check_places(arguments: argparse.Namespace, inputs: Iterable[Path]) -> None:
    from wara.deploy.output import part_of
    from wara.deploy.places import check_places
    from wara.deploy.trace import torn_of

    files = {"--out": arguments.out, "the unfinished file of --out": part_of(arguments.out)}
    if arguments.trace is not None:
        files |= {"--trace": arguments.trace, "the torn end of --trace": torn_of(arguments.trace)}
    folders = {"--dicom-sr": arguments.dicom_sr, "--explain": getattr(arguments, "explain", None)}
    check_places(files, {name: path for name, path in folders.items() if path}, inputs)


def _form_of(path: Path) -> str:
    ending = path.suffix.lower().removeprefix(".")
    return ending if ending in ("csv", "jsonl", "json") else "csv"


def _show(done: int, total: int, quiet: bool) -> None:
    if not quiet and sys.stderr.isatty():
        print(f"\r{done} of {total} images", end="\n" if done == total else "", file=sys.stderr)


# -- containers --------------------------------------------------------------------------------


_MERCURE = ("MERCURE_IN_DIR", "MERCURE_OUT_DIR")
# MONAI Application Packages of version 1, and those before.
_MAP = (("HOLOSCAN_INPUT_PATH", "HOLOSCAN_OUTPUT_PATH"), ("MONAI_INPUTPATH", "MONAI_OUTPUTPATH"))


def serve(folder: Path, arguments: argparse.Namespace) -> bool:
    """Serve one job of a container platform, if that is what the program was started for.

    mercure names its folders in the environment, and those of MONAI as well; MONAI names them by
    `-i` and `-o` or in the environment. Options of the call hold for both. A job fails when none of
    its images could be read; a single one that could not is a row with its error.

    Returns:
        Whether it was a job.

    Raises:
        WaraError: kind "usage" when folders or settings are wrong, and as `predict`.
    """
    from wara.errors import WaraError

    names = next((pair for pair in (_MERCURE, *_MAP) if pair[0] in os.environ), None)
    if arguments.incoming or arguments.outgoing:
        incoming, outgoing, names = arguments.incoming, arguments.outgoing, None
    elif names is None or arguments.paths:
        return False
    else:
        incoming, outgoing = (Path(os.environ[n]) if os.environ.get(n) else None for n in names)
    if incoming is None or outgoing is None or arguments.paths or arguments.out:
        what = "a job has a folder of images and a folder for what is said, and nothing else"
        remedy = f"give {' and '.join(names or ('-i', '-o'))}, or PATHS and --out"
        raise WaraError("usage", what, "", remedy)
    form = arguments.format or "json"
    name = f"predictions.{form}"
    if names == _MERCURE:
        _settle(arguments, incoming / "task.json", outgoing)
        form, name = "mercure", "result.json"
    arguments.paths, arguments.out, arguments.format = [str(incoming)], outgoing / name, form
    arguments.allow_partial = arguments.quiet = True
    rows = predict(folder, arguments)
    if all(row["error"] is not None for row in rows):
        what = f"none of {len(rows)} images could be read"
        raise WaraError("data", what, str(arguments.out), "see `error` there")
    return True


def _settle(arguments: argparse.Namespace, task: Path, outgoing: Path) -> None:
    """Take the settings of the module from mercure's task, where they are `process.settings`."""
    from wara.errors import WaraError, suggest
    from wara.storage import read_json

    if not task.is_file():  # a trial without mercure
        return
    known = {"abstain_on": list, "dicom_sr": bool}
    try:
        settings = (read_json(task).get("process") or {}).get("settings") or {}
        for key, value in settings.items():
            if key not in known:
                what = f"no setting '{key}' of this module"
                raise WaraError("usage", what, "process.settings", suggest(key, known))
            if not isinstance(value, known[key]):
                remedy = 'for example {"abstain_on": ["ood"], "dicom_sr": true}'
                raise WaraError("usage", f"{key} is {value!r}", "process.settings", remedy)
    except (OSError, ValueError, AttributeError):
        what, remedy = "no task of mercure", "it is a JSON object with process.settings"
        raise WaraError("usage", what, str(task), remedy) from None
    if "abstain_on" in settings:
        arguments.abstain_on = [*map(str, settings["abstain_on"])] or ["none"]
    if settings.get("dicom_sr"):
        arguments.dicom_sr = outgoing


# -- the program -------------------------------------------------------------------------------


def _own_package() -> None:
    """Let `wara` be the files of this bundle, whatever is installed beside it."""
    sys.dont_write_bytecode = True  # a bundle holds what was exported and nothing else
    for name in ("wara", "wara.data", "wara.deploy"):
        module = types.ModuleType(name)
        folder = _HERE.joinpath(*name.split("."))
        module.__path__ = [str(folder), str(_HERE)] if name == "wara" else [str(folder)]
        sys.modules[name] = module
        if name != "wara":
            setattr(sys.modules["wara"], name.removeprefix("wara."), module)


def main(words: Sequence[str] | None = None) -> int:
    """Run the program of the bundle in whose folder this file lies; return the exit code."""
    if sys.version_info[:2] < _OLDEST:
        found, wanted = (".".join(map(str, v[:2])) for v in (sys.version_info, _OLDEST))
        what = f"Python {found} is too old for this program"
        print(f"error[usage]: {what}; start it with Python {wanted} or newer", file=sys.stderr)
        return 2
    from wara.errors import as_refusal
    from wara.signals import Stopped, StopSignals

    parser = argparse.ArgumentParser(prog="infer.py", description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    for flag, name in (("-i", "incoming"), ("-o", "outgoing")):
        text = f"folder of {name} files, as a MONAI Application Package is called"
        parser.add_argument(flag, dest=name, type=Path, metavar="DIR", help=text)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    arguments: argparse.Namespace | None = None
    try:
        arguments = parser.parse_args(words)
        # Heeded for its exit code and the locks; as the first process of a container it would be
        # ignored otherwise.
        with StopSignals():
            if not serve(_HERE, arguments):
                predict(_HERE, arguments)
    except Stopped as stopped:
        print(f"stopped by {stopped.signal_name}", file=sys.stderr)
        return stopped.code
    except Exception as error:
        if getattr(arguments, "debug", False):
            traceback.print_exception(error)
        refusal = as_refusal(error)
        print(refusal, file=sys.stderr)
        return refusal.exit_code
    return 0


if __name__ == "__main__":
    _own_package()
    sys.exit(main())
