"""The page of a comparison over two data sets, sizes and numbers of images, as a browser has it."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from compare_helpers import make_config
from PIL import Image
from training_helpers import make_images

from wara import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    config, out = make_config(folder, adapter={"method": "lora"}), folder / "out"
    second = make_images(folder / "second", per_class=(20, 20, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wara.runs.results._figures", lambda *_: None)
        code = cli.main([
            "compare", "--cfg", str(config), "--datasets", f"{folder / 'data'},{second}",
            "--methods", "lora,waveft", "--seeds", "2", "--sweep-budget", "1,2",
            "--sweep-train", "12,all", "--beside", "majority", "--tune", "lr=3",
            "--out", str(out),
        ])  # fmt: skip
    assert code == 0
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_every_data_set_size_and_number_of_images_has_its_row(out: Path) -> None:
    adapters = [row for row in rows(out) if row["method"] != "majority"]
    found = {(r["dataset"], r["method"], r["budget"], r["train_images"]) for r in adapters}
    assert found == {
        (data, method, f"{size}*lora_r1", images)
        for data in ("data", "second") for method in ("lora", "waveft")
        for size in ("1", "2") for images in ("12", "")
    }  # fmt: skip
    assert all(row["runs"] == "2" for row in adapters)
    # A cell of fewer images trained on fewer, and on the same test images.
    records = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    tested: dict[str, set[str]] = {}
    for record in filter(lambda r: r["folder"], records):
        with (out / record["folder"] / "splits.csv").open() as stream:
            lines = list(csv.DictReader(stream))
        trained = sum(line["split"] == "train" for line in lines)
        assert (trained < 16) == (record["train_images"] == 12)
        test = "\n".join(sorted(line["file"] for line in lines if line["split"] == "test"))
        tested.setdefault(record["dataset"], set()).add(test)
    assert all(len(found) == 1 for found in tested.values())


def test_one_trial_of_each_row_of_each_data_set_is_taken(out: Path) -> None:
    text = (out / "report.md").read_text()
    trials = text[text.index("## Trials") : text.index("## Cells")].splitlines()
    places = [line.split(" | ")[0] for line in trials if line.endswith("| taken |")]
    assert len(places) == len(set(places)) == 16


def test_figures_are_drawn_for_both_sweeps_and_for_the_ranks(out: Path) -> None:
    wanted = {f"{data}_{what}" for data in ("data", "second")
              for what in ("means", "parameters", "images")} | {"ranks"}  # fmt: skip
    assert {path.stem for path in (out / "figures").iterdir()} == wanted
    for path in (out / "figures").iterdir():
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5, f"{path.name} is blank"


PROBE = """
<script>
addEventListener("load", () => {
  const table = document.querySelector("table"), column = %d;
  const read = () => [...table.tBodies[0].rows].map((row) => row.cells[column].textContent);
  const head = table.tHead.rows[0].cells[column], found = {before: read()};
  head.click(); found.down = read();
  head.click(); found.up = read();
  const picture = document.querySelector("figure img");
  picture.click(); found.large = picture.style.width;
  picture.click(); found.small = picture.style.width;
  found.pictures = [...document.images].map((image) => image.naturalWidth);
  found.links = [...document.links].map((link) => link.getAttribute("href"));
  document.title = JSON.stringify(found);
});
</script>
"""


def test_a_browser_sorts_enlarges_and_links_without_a_network(out: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium")
    page = (out / "report.html").read_text()
    heads = re.findall(r"<th[^>]*>(.*?)</th>", page[: page.index("</thead>")])
    column = heads.index("adapter parameters")
    copy = out / "probed.html"
    copy.write_text(page + PROBE % column)
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", "--dump-dom",
         copy.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    copy.unlink()
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    found = json.loads(html.unescape(title[1]))
    numbers = sorted(float(text.replace(",", "")) for text in found["before"])
    assert [float(text.replace(",", "")) for text in found["down"]] == numbers[::-1]
    assert [float(text.replace(",", "")) for text in found["up"]] == numbers
    assert found["large"] == "95vw" and found["small"] == ""
    assert len(found["pictures"]) == 7 and min(found["pictures"]) > 300
    assert len([link for link in found["links"] if link.endswith("report.md")]) >= 32
    assert all((out / link).is_file() for link in found["links"])
