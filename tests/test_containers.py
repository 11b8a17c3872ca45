"""Jobs of container platforms, as mercure and MONAI Deploy start them: a process, two folders."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pydicom
import pytest
from test_predict import predict, program
from test_sr import image


class Job:
    """A folder of images and a folder for what is said, in which a bundle is started."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle, self.incoming, self.outgoing = bundle, folder / "in", folder / "out"
        self.incoming.mkdir()
        self.outgoing.mkdir()
        # mercure writes the series before the object, and a table of the header beside it.
        for number in (1, 2):
            image(self.incoming / f"1.2.3.4.5#1.2.{number}.dcm", number)
            (self.incoming / f"1.2.3.4.5#1.2.{number}.tags").write_text("{}")

    def task(self, settings: Any) -> None:
        process = {"module_name": "wara", "settings": settings, "retain_input_images": False}
        content = {"info": {"action": "process"}, "id": "1", "process": process}
        (self.incoming / "task.json").write_text(json.dumps(content))

    def start(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return program(self.bundle, *words, **env)

    def by_mercure(self, **changes: str) -> subprocess.CompletedProcess[str]:
        places = {"IN": str(self.incoming), "OUT": str(self.outgoing)}
        env = {
            "MERCURE_IN_DIR": places["IN"], "MERCURE_OUT_DIR": places["OUT"],
            "MONAI_INPUTPATH": places["IN"], "MONAI_OUTPUTPATH": places["OUT"],
            "HOLOSCAN_INPUT_PATH": places["IN"], "HOLOSCAN_OUTPUT_PATH": places["OUT"],
        }  # fmt: skip
        return self.start(**(env | changes))

    def said(self, name: str) -> Any:
        return json.loads((self.outgoing / name).read_text())

    def rows(self, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
        """What `wara predict` says of the same images."""
        out = tmp_path / "rows.json"
        assert predict(self.bundle, self.incoming, "--out", out, *options, "--allow-partial") == 0
        return timeless(json.loads(out.read_text()))


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "milliseconds"} for row in rows]


@pytest.fixture
def job(bundle: Path, tmp_path: Path) -> Job:
    return Job(bundle, tmp_path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- mercure --------------------------------------------------------------------------------------


def test_mercure_finds_a_result_and_reports(job: Job, tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    job.task({"dicom_sr": True, "abstain_on": ["ambiguous"]})
    done = job.by_mercure()
    assert done.returncode == 0, done.stderr
    result = job.said("result.json")
    assert set(result) == {"images", "__mercure_notification"}
    assert timeless(result["images"]) == job.rows(tmp_path, "--abstain-on", "ambiguous")
    text = result["__mercure_notification"]["text"]
    assert text.startswith("2 images: 0 could not be read") and "operating point" in text
    reports = [pydicom.dcmread(path) for path in job.outgoing.glob("*.dcm")]
    assert len(reports) == 2 and {report.StudyInstanceUID for report in reports} == {"1.2.3.4"}
    files = [f"{report.SOPInstanceUID}.dcm" for report in reports]
    assert names(job.outgoing) == sorted([*files, "result.json"])


@pytest.mark.parametrize("settings", [None, {}, {"dicom_sr": False, "abstain_on": []}])
def test_mercure_without_wishes(settings: Any, job: Job, tmp_path: Path) -> None:
    job.task(settings)
    assert job.by_mercure().returncode == 0
    assert names(job.outgoing) == ["result.json"]
    options = ("--abstain-on", "none") if settings else ()
    assert timeless(job.said("result.json")["images"]) == job.rows(tmp_path, *options)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dicom_srs": True}, "no setting 'dicom_srs' of this module; process.settings; did you"),
        ({"dicom_sr": "yes"}, "dicom_sr is 'yes'"),
        ({"abstain_on": "ood"}, "abstain_on is 'ood'"),
        ({"abstain_on": ["fog"]}, "no reason 'fog' to abstain"),
        (["dicom_sr"], "no task of mercure"),
    ],
)
def test_wrong_settings_of_mercure(settings: Any, words: str, job: Job) -> None:
    job.task(settings)
    done = job.by_mercure()
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert names(job.outgoing) == []


def test_a_task_of_mercure_that_is_none(job: Job) -> None:
    (job.incoming / "task.json").write_text("{")
    done = job.by_mercure()
    assert done.returncode == 2 and "no task of mercure" in done.stderr


def test_mercure_without_a_place_for_the_result(job: Job) -> None:
    done = job.by_mercure(MERCURE_OUT_DIR="")
    assert done.returncode == 2 and "give MERCURE_IN_DIR and MERCURE_OUT_DIR" in done.stderr


def test_one_damaged_image_is_a_row_and_only_damaged_ones_are_a_failure(job: Job) -> None:
    first, second = sorted(job.incoming.glob("*.dcm"))
    first.write_bytes(first.read_bytes()[:-900])
    assert job.by_mercure().returncode == 0
    assert [row["error"] is None for row in job.said("result.json")["images"]] == [False, True]
    second.write_bytes(first.read_bytes())
    done = job.by_mercure()
    assert done.returncode == 3 and "none of 2 images could be read" in done.stderr
    assert len(job.said("result.json")["images"]) == 2


# -- MONAI Application Packages -------------------------------------------------------------------


@pytest.mark.parametrize("way", ["flags", "HOLOSCAN_INPUT_PATH", "MONAI_INPUTPATH"])
def test_monai_finds_predictions(way: str, job: Job, tmp_path: Path) -> None:
    if way == "flags":
        done = job.start("-i", str(job.incoming), "-o", str(job.outgoing))
    else:
        env = {way: str(job.incoming), way.replace("INPUT", "OUTPUT"): str(job.outgoing)}
        done = job.start(**env)
    assert done.returncode == 0, done.stderr
    assert names(job.outgoing) == ["predictions.json"]
    assert timeless(job.said("predictions.json")) == job.rows(tmp_path)


def test_flags_go_before_the_environment_and_options_hold(job: Job, tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    words = ["-i", str(next(job.incoming.glob("*1.dcm"))), "-o", str(job.outgoing)]
    words += ["--dicom-sr", str(job.outgoing / "sr"), "--format", "jsonl"]
    done = job.start(*words, MERCURE_IN_DIR="/nowhere", MONAI_INPUTPATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert names(job.outgoing) == ["predictions.jsonl", "sr"]
    assert len((job.outgoing / "predictions.jsonl").read_text().splitlines()) == 1
    assert len(names(job.outgoing / "sr")) == 1


@pytest.mark.parametrize("words", [["-i", "in"], ["-o", "out"], ["-i", "in", "-o", "out", "more"],
                                   ["-i", "in", "-o", "out", "--out", "x.csv"]])  # fmt: skip
def test_half_a_job_is_a_usage_fault(words: list[str], bundle: Path) -> None:
    done = program(bundle, *words)
    assert done.returncode == 2 and "give -i and -o, or PATHS and --out" in done.stderr


# -- the image of the container -------------------------------------------------------------------


def test_the_dockerfile_installs_what_the_bundle_says_and_starts_it(bundle: Path) -> None:
    lines = [
        line for line in (bundle / "Dockerfile").read_text().splitlines() if line[:1] not in "#"
    ]
    assert [line.split()[0] for line in lines] == ["FROM", "ARG", "COPY", "RUN", "ENTRYPOINT"]
    base, extra, copy, install, start = lines
    assert base == "FROM python:3.12-slim" and extra == 'ARG EXTRA=""' and copy == "COPY . /bundle"
    assert "-r /bundle/requirements.txt $EXTRA" in install
    assert json.loads(start.removeprefix("ENTRYPOINT ")) == ["python", "/bundle/infer.py"]
    packages = (bundle / "requirements.txt").read_text().splitlines()
    assert len(packages) < 5 and all(re.fullmatch(r"[a-z]+==[\d.]+", line) for line in packages)
