"""Predict with a bundle: `python infer.py PATHS… --out predictions.csv`.

The same file is the program of a bundle and the verb `wara predict`. It also speaks the contracts
of two container platforms: mercure (environment) and MONAI Deploy (`-i`, `-o`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wara.deploy.predictor import Prediction, Predictor

_HERE = Path(__file__).resolve().parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `infer.py` and `wara predict` have in common."""
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
    add("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    add("--workers", type=int, metavar="N", help="threads that read images (default: all)")
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
    listeners: Callable[[Predictor, int], Iterable[Callable[[Prediction], None]]] = lambda *_: (),
) -> None:
    """Predict as the arguments say.

    Args:
        folder: the bundle.
        arguments: of `add_arguments`.
        listeners: given the predictor and the number of rows that an earlier call left, returns
            what is to be called with each prediction. So `wara predict --explain` hooks in, which
            needs torch; a bundle does without and does not offer it.

    Raises:
        WaraError: kind "data" when images could not be read, after all rows were written.
    """
    from wara.deploy.inputs import expand
    from wara.deploy.output import Output, finished
    from wara.deploy.predictor import Predictor
    from wara.errors import WaraError

    _check(arguments, folder)
    sources = expand(arguments.paths)
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
        "images": hashlib.sha256("\n".join(map(str, sources.paths)).encode()).hexdigest(),
    }
    form = arguments.format or _form_of(arguments.out)
    output = Output(arguments.out, form, predictor.columns, key, resume=arguments.resume)
    hooks = list(listeners(predictor, len(output.rows)))
    trace = None
    if arguments.trace is not None:
        from wara.deploy.trace import Trace

        trace = Trace(arguments.trace, predictor)
        hooks.append(trace.add)
    if arguments.dicom_sr is not None:
        from wara.deploy.sr import Reports

        hooks.append(Reports(arguments.dicom_sr, predictor.bundle).add)
    try:
        rest = sources.paths[len(output.rows) :]
        for prediction in predictor.predict(
            rest, batch_size=arguments.batch_size, workers=arguments.workers
        ):
            for hook in hooks:
                hook(prediction)
            output.add(prediction.row)
            _show(len(output.rows), len(sources.paths), arguments.quiet)
    finally:
        output.close()
        if trace is not None:
            trace.close()
    output.finish()
    if not arguments.quiet:
        for line in finished(output.rows):
            print(line, file=sys.stderr)
        print(f"written: {arguments.out}", file=sys.stderr)
    faults = [row for row in output.rows if row["error"] is not None]
    if faults and not arguments.allow_partial:
        what = f"{len(faults)} of {len(output.rows)} images could not be read"
        remedy = "see the column `error`; --allow-partial makes that no failure"
        raise WaraError("data", what, str(arguments.out), remedy)


def _check(arguments: argparse.Namespace, folder: Path) -> None:
    from wara.errors import WaraError

    if arguments.out is None:
        raise WaraError("usage", "no place for the rows", "", "give --out predictions.csv")
    inside = folder.resolve()
    for name in ("out", "trace", "dicom_sr", "explain"):
        path = getattr(arguments, name, None)
        if path is not None and path.resolve().is_relative_to(inside):
            option = f"--{name.replace('_', '-')}"
            what = f"{option} lies inside the bundle, which would change it"
            raise WaraError("usage", what, str(path), "choose a place outside of it")
    for name, value in (("--batch-size", arguments.batch_size), ("--workers", arguments.workers)):
        if value is not None and value < 1:
            raise WaraError("usage", f"{name} is {value}", "", "give at least 1")


def _form_of(path: Path) -> str:
    ending = path.suffix.lower().removeprefix(".")
    return ending if ending in ("csv", "jsonl", "json") else "csv"


def _show(done: int, total: int, quiet: bool) -> None:
    if not quiet and sys.stderr.isatty():
        print(f"\r{done} of {total} images", end="\n" if done == total else "", file=sys.stderr)


# -- containers --------------------------------------------------------------------------------


def mercure(folder: Path) -> None:
    """Serve one job of mercure: `MERCURE_IN_DIR` in, `result.json` in `MERCURE_OUT_DIR` out.

    The settings of the module in `task.json` may hold `abstain_on` (a list) and `dicom_sr`.
    """
    incoming, outgoing = (Path(os.environ[f"MERCURE_{name}_DIR"]) for name in ("IN", "OUT"))
    path = incoming / "task.json"
    task = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    process = task.get("process") or {}
    if isinstance(process, list):  # a chain of modules; this one is the first that is left
        process = process[0]
    images = sorted(str(p) for p in incoming.rglob("*.dcm"))
    _contract(folder, images, outgoing, "result.json", process.get("settings") or {})


def map_application(folder: Path, incoming: Path, outgoing: Path) -> None:
    """Serve one job of a MONAI Application Package: folder in, folder out."""
    _contract(folder, [str(incoming)], outgoing, "predictions.json", {})


def _contract(
    folder: Path, images: Sequence[str], outgoing: Path, name: str, settings: dict[str, Any]
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [*images, "--out", str(outgoing / name), "--format", "json", "--allow-partial",
             "--quiet"]  # fmt: skip
    for reason in settings.get("abstain_on", []):
        words += ["--abstain-on", str(reason)]
    if settings.get("dicom_sr"):
        words += ["--dicom-sr", str(outgoing)]
    predict(folder, parser.parse_args(words))


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
    from wara.errors import WaraError, as_refusal

    parser = argparse.ArgumentParser(prog="infer.py", description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("-i", dest="incoming", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", dest="outgoing", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    try:
        if arguments.incoming is not None and arguments.outgoing is not None:
            map_application(_HERE, arguments.incoming, arguments.outgoing)
        elif not arguments.paths and "MERCURE_IN_DIR" in os.environ:
            mercure(_HERE)
        else:
            predict(_HERE, arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        refusal = error if isinstance(error, WaraError) else as_refusal(error)
        print(refusal, file=sys.stderr)
        return refusal.exit_code
    return 0


if __name__ == "__main__":
    _own_package()
    sys.exit(main())
