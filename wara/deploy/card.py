"""The model card of a bundle, in the form of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wara.deploy.operating import PARTS

_SHOWN = ("auc_macro", "balanced_accuracy", "accuracy", "f1_macro", "qwk", "ece", "brier")


def markdown(manifest: Mapping[str, Any]) -> str:
    """Return `MODEL_CARD.md`.

    Args:
        manifest: of the bundle, without its files.
    """
    backbone, data, said = manifest["backbone"], manifest["data"], manifest["input"]
    banner = "> **SYNTHETIC: trained on drawn images. Not for any use on patients.**\n\n"
    banner = banner if manifest["synthetic"] else ""
    classes = "\n".join(
        f"* `{item['name']}`: {item['meaning'] or 'meaning not given'}"
        for item in manifest["classes"]
    )
    images = ", ".join(f"{n} {name}" for name, n in data["images"].items())
    mean, std = (", ".join(f"{x:g}" for x in said[key]) for key in ("mean", "std"))
    return f"""\
---
library_name: onnxruntime
pipeline_tag: image-classification
tags: [medical, image-classification, wara, {manifest["method"]["name"]}]
license: other
---

# {manifest["name"]}

{banner}{_sentence(manifest)}

## Uses

* Intended use: {manifest["intended_use"]}
* Limits: {manifest["limits"]}
* It is no medical device. Whoever uses it on patients answers for it.

## Classes ({manifest["task"]})

{classes}

## Training data

{data["title"]} ({data["modality"] or "modality not given"}); {images} images. Terms of the images:
{manifest["licence_of_images"]}.

## Evaluation

| metric | validation | test |
|---|---|---|
{_metrics(manifest["metrics"])}

95 % intervals in brackets, resampled by patient where patients are known.
{_point(manifest["operating_point"])}{_calibration(manifest)}
## How to use it

```
pip install -r requirements.txt
python infer.py images/ --out predictions.csv
```

It needs Python 3.11 or newer.

`manifest.json` describes every part of this folder. Images are resized to {said["size"][0]} x \
{said["size"][1]} pixels ({said["interpolation"]}) and normalised by mean {mean} and std {std} \
(source: {said["statistics"]}).

## Technical

* Backbone: `{backbone["architecture"]}` ({backbone["name"]}), weights {backbone["weights_sha256"]}
* Method: `{manifest["method"]["name"]}`, {manifest["method"]["adapter_params"]:,} numbers trained \
beside a head of {manifest["method"]["head_params"]:,}
* Precision: {manifest["model"]["precision"]}; exported with wara {manifest["wara"]}
"""


def _sentence(manifest: Mapping[str, Any]) -> str:
    names = ", ".join(item["name"] for item in manifest["classes"])
    return f"A classifier of images of {manifest['data']['name']}: {names}."


def _metrics(metrics: Mapping[str, Any]) -> str:
    names = [n for n in _SHOWN if n in metrics["val"]]
    names += [n for n in metrics["val"] if n.startswith(("auc_", "sensitivity_", "specificity_"))]
    rows = [
        f"| {name} | {cell(metrics['val'].get(name))} | {cell(metrics['test'].get(name))} |"
        for name in dict.fromkeys(names)
    ]
    return "\n".join(rows)


def cell(entry: Mapping[str, Any] | None) -> str:
    """Return a measure as it stands in a table: value, interval, or why there is none."""
    if entry is None or entry["value"] is None:
        return "not defined" + (f" ({entry['reason']})" if entry and entry["reason"] else "")
    if entry["low"] is None:
        return f"{entry['value']:.3f} (n {entry['n']})"
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}] (n {entry['n']})"


def _point(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return (
            "\nNo operating point was chosen: `decision` is empty, `prediction` is the top class.\n"
        )
    asked = ", ".join(f"{k} of {v:g}" for k, v in point["asked"].items() if v is not None)
    parts = [name for name in PARTS if name in point]
    rows = _rows([point[part] for part in parts])
    return f"""
Operating point: positive is {" or ".join(point["positive"])}, from a score of \
{point["threshold"]:.4f} on; asked for was a {asked} on {parts[0]} images.

| measure | {" | ".join(parts)} |
|---|{"---|" * len(parts)}
{rows}
"""


def _rows(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return a line of a table for each measure, with a cell for each part."""
    return "\n".join(
        f"| {name} | {' | '.join(cell(part.get(name)) for part in parts)} |" for name in parts[0]
    )


def _calibration(manifest: Mapping[str, Any]) -> str:
    done = manifest["calibration"]
    if done is None:
        return ""
    who = "patients not known" if done["patients"] is None else f"of {done['patients']} patients"
    drawn = "drawn images" if done["synthetic"] else "cases"
    temperature = done["temperature"]
    return f"""
## Calibration

Temperature and thresholds were fitted to {done["cases"]} local {drawn} ({who}); the model is that \
of the bundle {manifest["parent"]["sha256"]}. Temperature {temperature["before"]:.3f} before, \
{temperature["after"]:.3f} after. The table above, of validation and test images, is older. The \
old limit would have turned away {cell(done["beyond_old_limit"])} of these cases as unlike the \
training images.

| on the local cases | before | after, on the cases of the fit | after, cross-fitted |
|---|---|---|---|
{_rows([done["before"], done["after"], done["cross_fitted"]])}

Cross-fitted: each fifth of the cases is judged by numbers fitted to the others. That column tells
what to expect of the next cases.
{f"> **Warning:** {done['warning']}." if done["warning"] else ""}
"""
