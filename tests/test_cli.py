from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

import wara
from wara import cli
from wara.config import RunConfig, load_config
from wara.errors import WaraError
from wara.schema import fields_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ran(monkeypatch):
    """Put a recorder in the place of the training run; set `ran.error` to make it fail."""
    import wara.training.start  # noqa: F401  (patched below)

    class Recorder(list):
        error: BaseException | None = None

    calls = Recorder()

    def run(config, **flags):
        calls.append((config, flags))
        if calls.error is not None:
            raise calls.error
        return Path("runs/x")

    monkeypatch.setattr(sys.modules["wara.training.start"], "run", run)
    return calls


def refused(capsys, *argv: str) -> tuple[int, list[str]]:
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.err.rstrip("\n").split("\n")


def test_train_hands_config_and_flags_to_the_run(ran):
    code = cli.main(
        ["train", "--cfg", "fundus_wara.yaml", "--set", "adapter.rank=8", "--set", "seed=3"]
        + ["--out", "some: 'folder'", "--overwrite", "--quiet"]
    )
    assert code == 0
    ((config, flags),) = ran
    assert (config.dataset, config.seed, config.adapter) == ("retinamnist", 3, wara.WaRA(rank=8))
    assert config.folder == Path("some: 'folder'")
    flags_given = {"resume": False, "overwrite": True, "dry_run": False, "quiet": True}
    assert flags == {**flags_given, "allow": []}


def test_dry_run_and_resume_reach_the_run(ran):
    command = ["train", "--cfg", "fundus_lora", "--resume", "--dry-run", "--allow-change", "torch"]
    assert cli.main(command) == 0
    flags = {"resume": True, "overwrite": False, "dry_run": True, "quiet": False}
    assert ran[0][1] == {**flags, "allow": ["torch"]}
    assert cli.main(["train", "--cfg", "fundus_lora", "--allow-change", "torch"]) == 2


def test_print_config_prints_what_would_run_and_runs_nothing(ran, capsys, tmp_path):
    argv = ["train", "--cfg", "chest_xray_tiny_wara", "--set", "lr=1e-4", "--print-config"]
    assert cli.main(argv) == 0 and not ran
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    printed = load_config(path)
    assert printed == load_config("chest_xray_tiny_wara", ["lr=1e-4"]).resolved()
    text = path.read_text()
    for name, field in fields_of(wara.TinyWaRA).items():
        lines = [line for line in text.splitlines() if line.startswith(f"  {name}:")]
        assert len(lines) == 1 and lines[0].endswith(f"# {field.description}")


def test_all_faults_of_a_config_are_told_at_once(ran, capsys):
    sets = ["lr=-1", "batchsize=3", "dataset=retinamnits", "adapter.method=lroa"]
    sets += ["backbone.name=vit_tinny_patch16_224", "data.augment=fundsu"]
    argv = [part for text in sets for part in ("--set", text)]
    code, lines = refused(capsys, "train", "--cfg", "fundus_wara.yaml", *argv)
    assert code == 2 and not ran
    for meant in ("batch_size", "retinamnist", "lora", "vit_tiny_patch16_224", "fundus"):
        assert sum(f"did you mean '{meant}'?" in line for line in lines) == 1, lines
    assert len(lines) == 6 and all(line.startswith("error[config]: ") for line in lines)
    assert all("--set" in line for line in lines)


@pytest.mark.parametrize("value", ["no/such/folder", "../no_such_card.yaml"])
def test_data_set_that_is_not_there_is_a_fault_of_the_config(ran, capsys, value):
    code, lines = refused(capsys, "train", "--cfg", "fundus_wara", "--set", f"dataset={value}")
    assert code == 2 and len(lines) == 1 and f"no data set at '{value}'" in lines[0]


def test_option_of_another_method_names_key_and_place(ran, capsys):
    code, (line,) = refused(capsys, "train", "--cfg", "fundus_lora", "--set", "adapter.core=full")
    assert code == 2
    assert "no option 'core'" in line and "--set adapter.core=full" in line


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["train"], "the following arguments are required: --cfg; see wara train --help"),
        (
            ["train", "--cfg", "x", "--sett", "a=1"],
            "unknown argument '--sett'; did you mean '--set'?",
        ),
        (["train", "--cfg", "x", "--over"], "unknown argument '--over'"),
        (["train", "--cfg", "x", "y"], "unknown argument 'y'; see wara train --help"),
        (["train", "--cfg", "x", "--resume", "--overwrite"], "not allowed with"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--cfg", "fundus_waar"], "did you mean 'fundus_wara.yaml'?"),
    ],
)
def test_wrong_command_line_is_one_line_and_exit_code_2(ran, capsys, argv, part):
    code, lines = refused(capsys, *argv)
    assert code == 2 and not ran
    assert len(lines) == 1 and part in lines[0]


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (WaraError("data", "3 labels outside the card", "x.csv", "mend them"), 3, "error[data]: 3"),
        (WaraError("busy", "a run holds the folder"), 8, "error[busy]: "),
        (WaraError("nonfinite", "the loss is NaN"), 6, "error[nonfinite]: "),
        (
            ZeroDivisionError("division\nby zero"),
            1,
            "error[bug]: ZeroDivisionError: division by zero;",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "f.ckpt"), 5, "error[storage]: no space"),
        (MemoryError(), 7, "error[resources]: out of memory; halve batch_size"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_exit_codes_are_the_public_ones(ran, capsys, error, code, start):
    ran.error = error
    found, lines = refused(capsys, "train", "--cfg", "fundus_wara")
    assert found == code and len(lines) == 1 and lines[0].startswith(start)


def test_termination_passes_through(ran):
    ran.error = SystemExit(143)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--cfg", "fundus_wara"])
    assert stopped.value.code == 143


def test_traceback_only_with_debug(ran, capsys):
    ran.error = ZeroDivisionError("x")
    code, lines = refused(capsys, "train", "--cfg", "fundus_wara", "--debug")
    assert code == 1
    assert lines[0].startswith("Traceback") and lines[-1].startswith("error[bug]")


def test_help_is_grouped_and_complete(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    flags = "--cfg --set --out --resume --overwrite --dry-run --print-config --quiet --debug --help"
    assert all(flag in text for flag in flags.split())
    for group in ("what to run:", "where it goes:", "look before you train:", "what you see:"):
        assert group in text
    assert "options:" not in text and "exit codes:" in text


def test_no_verb_shows_the_verbs_and_version_is_the_package_s(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("train", "configs", "datasets", "methods"))
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"wara {wara.__version__}\n"


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("configs", ["fundus_wara", "chest_xray_linear_probe", "fundus_full"]),
        ("datasets", ["retinamnist", "fundus_phantom", "chestmnist"]),
        ("methods", ["wara", "tiny_wara", "lora", "linear_probe", "full", "rank="]),
    ],
)
def test_listings_name_what_there_is(capsys, verb, names):
    assert cli.main([verb]) == 0
    words = capsys.readouterr().out
    assert all(name in words for name in names)


def test_listing_into_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m wara.cli configs | head -0; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_train_py_is_the_same_command(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--cfg", "fundus_waar"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "did you mean 'fundus_wara.yaml'?" in done.stderr


@pytest.mark.parametrize("modality", ["fundus", "dermoscopy", "ultrasound", "chest_xray"])
def test_shipped_configs_pass_every_check_that_needs_no_image(modality):
    for method in ("wara", "tiny_wara", "lora", "linear_probe"):
        config = cli.read_config(f"{modality}_{method}.yaml", [])
        assert isinstance(config, RunConfig) and config.adapter.name == method
