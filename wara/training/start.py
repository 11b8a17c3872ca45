"""Where a run starts: in this process, or in several that train together."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wara.config import RunConfig
from wara.errors import WaraError, WaraErrors
from wara.runs.folder import RunFolder
from wara.runs.provenance import amend, starts
from wara.signals import Stopped
from wara.training import processes
from wara.training.run import run_here


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    allow: Sequence[str] = (),
) -> Path:
    """Fine-tune a backbone as `config` says and evaluate it.

    Args:
        config: the run.
        resume: go on from the last checkpoint in the run folder; a run that was stopped before
            its first checkpoint, or before it had a folder, starts from the first epoch.
        overwrite: delete an earlier run in the run folder first.
        dry_run: make all checks, print the plan, write nothing.
        quiet: print only what stands in for data or backbone, and the result.
        allow: facts that may differ from those of the run to resume, by their names in
            `wara.runs.exact`; each that does is recorded.

    Returns:
        The run folder.

    Raises:
        WaraError: every refusal; kind and exit code say which.
        Stopped: after SIGTERM, SIGINT or SIGHUP, with exit code 143 or 130.
    """
    if config.devices > 1 and not dry_run:
        RunFolder(config.folder).check(resume=resume, overwrite=overwrite)
        payload = {
            "config": json.loads(config.model_dump_json()),
            "flags": {
                "resume": resume,
                "overwrite": overwrite,
                "quiet": quiet,
                "allow": list(allow),
            },
            "argv": sys.argv,
        }
        _together(config, payload)
        return config.folder
    return run_here(
        config, resume=resume, overwrite=overwrite, dry_run=dry_run, quiet=quiet, allow=allow
    )


def _together(config: RunConfig, payload: dict[str, Any]) -> None:
    folder = RunFolder(config.folder)
    before = starts(folder.provenance)
    try:
        processes.launch("from wara.training.start import child; child()", payload, config.devices)
    except BaseException as error:
        # The process that keeps the record may have been killed, or have waited for one that was.
        # What another run than this one wrote there is left as it is.
        if starts(folder.provenance) > before and not folder.holder():
            if isinstance(error, Stopped):
                error.told = not amend(folder.provenance, "interrupted")
            else:
                amend(folder.provenance, "failed")
        raise


def child() -> None:
    """Be one of several processes, and end with its exit code.

    Interpreter shutdown is skipped: the watching thread still blocks on stdin, and a process group
    whose peers are gone may hang in its destructor.
    """
    code = 1
    try:
        code = _child()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _child() -> int:
    rank, payload = processes.receive()
    sys.argv = payload["argv"]
    try:
        config = RunConfig.model_validate_json(json.dumps(payload["config"]))
        run_here(config, rank=rank, **payload["flags"])
    except WaraError as error:
        processes.report(rank, payload, error.errors if isinstance(error, WaraErrors) else [error])
        return error.exit_code
    except Exception as error:
        processes.report_bug(rank, payload, "".join(traceback.format_exception(error)))
        return 1
    return 0
