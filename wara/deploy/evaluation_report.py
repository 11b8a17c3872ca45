"""The report of an evaluation, from the content of its `metrics.json`, for people who decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wara.deploy.document import (
    Banner,
    Heading,
    Part,
    Picture,
    Table,
    Text,
    Tiles,
    as_html,
    as_markdown,
)
from wara.evaluation.groups import SMALLEST
from wara.runs.report import HEADLINE, cell
from wara.storage import write_text

Content = Mapping[str, Any]
_NAMES = {
    "auc_macro": "AUROC, mean of classes",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "f1_macro": "F1, mean of classes",
    "qwk": "Quadratic kappa",
    "ece": "Calibration error (ECE)",
    "brier": "Brier score",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "ppv": "Positive predictive value",
    "npv": "Negative predictive value",
}
_PER_CLASS = {"auc_": "AUROC", "sensitivity_": "Sensitivity", "specificity_": "Specificity"}
# These depend on the temperature, which the model's own metrics were computed without.
_NOT_COMPARED = ("ece", "brier")


def write(folder: Path, content: Content) -> None:
    """Write `report.md` and `report.html` into the folder of an evaluation."""
    title = f"{content['model']['name']} on {content['data']['title']}"
    parts = list(_parts(content, folder))
    write_text(folder / "report.md", as_markdown(title, parts))
    write_text(folder / "report.html", as_html(title, parts, folder))


def label(metric: str) -> str:
    """Return the name of a metric in words."""
    for start, words in _PER_CLASS.items():
        if metric.startswith(start) and metric not in _NAMES:
            return f"{words}: {metric.removeprefix(start)}"
    return _NAMES[metric]


def _parts(content: Content, folder: Path) -> Iterator[Part]:
    yield Text(
        f"Evaluation of {content['created'][:10]} by wara {content['wara']}. Brackets hold 95 % "
        "intervals.",
        small=True,
    )
    yield from map(Banner, _banners(content))
    yield Tiles(list(_tiles(content)))
    yield Heading("What was evaluated")
    yield Table(("", ""), list(_facts(content)))
    yield Heading("Discrimination and calibration")
    yield from _metrics(content)
    yield from _operating_point(content)
    yield from _decision_curve(content)
    yield from _restraint(content)
    for number, (name, table) in enumerate(content["by"].items(), 1):
        yield from _groups(name, table, f"figures/groups_{number}.png")
    yield Heading("Figures")
    yield from _figures(folder)
    yield Heading("How to read this")
    yield from map(Text, _reading(content))


def _banners(content: Content) -> Iterator[str]:
    model, data = content["model"], content["data"]
    if model["synthetic"]:
        yield "SYNTHETIC: the model learnt from drawn images. Not for any use on patients."
    if data["synthetic"]:
        yield "SYNTHETIC: these images were drawn by code. Nothing here is about patients."
    if data["learnt_from"]:
        yield (
            f"{data['learnt_from']} of {data['images']} images are among those that the model "
            "learnt from: the figures below are too good."
        )
    learnt = data["splits"].get("train", 0)
    if data["split"] is None and learnt:
        yield (
            f"The set calls {learnt} of its images training images, and all were taken; "
            "--split test takes those for testing only."
        )
    if data["unusable"]:
        whole = data["unusable"] + data["images"]
        yield f"{data['unusable']} of {whole} images could not be used and are in no figure below."


def _tiles(content: Content) -> Iterator[tuple[str, str, str]]:
    yield _tile("AUROC, mean of classes", content["metrics"]["auc_macro"])
    point = content["operating_point"]
    if point["reason"] is None:
        yield _tile("Sensitivity", point["sensitivity"])
        yield _tile("Specificity", point["specificity"])
    else:
        yield _tile("Balanced accuracy", content["metrics"]["balanced_accuracy"])
    data = content["data"]
    who = "patients not known" if data["patients"] is None else f"of {data['patients']} patients"
    yield "Images", f"{data['images']:,}", who


def _tile(name: str, entry: Content) -> tuple[str, str, str]:
    if entry["value"] is None:
        return name, "–", str(entry["reason"])
    value, between, rest = cell(entry).partition(" [")
    return name, value, f"[{rest}" if between else str(entry["reason"] or "")


def _facts(content: Content) -> Iterator[tuple[str, str]]:
    model, data = content["model"], content["data"]
    yield "Model", f"{model['name']} ({model['kind']}, SHA-256 {model['sha256'][:16]}…)"
    yield "Task", str(model["task"])
    meanings = {item["name"]: item["meaning"] for item in model["classes"]}
    for name, count in data["classes"].items():
        meaning = f" ({meanings[name]})" if meanings[name] else ""
        yield f"Class {name}{meaning}", f"{count} images"
    part = f", split {data['split']}" if data["split"] else ""
    yield "Images", f"{data['title']}{part}; content SHA-256 {data['sha256'][:16]}…"
    patients = "not known; each image counts by itself"
    if data["patients"] is not None:
        rest = data["without_patient"]
        alone = f"; {rest} images name none and count by themselves" if rest else ""
        patients = f"{data['patients']}{alone}"
    yield "Patients", patients
    if data["copies"]:
        yield "Copies", f"{data['copies']} images have the content of another one, counted again"
    learnt = data["learnt_from"]
    known = "not known: a bundle does not list them; evaluate the run to have it checked"
    yield "Images the model learnt from", known if learnt is None else f"{learnt} of these"
    for what, count in data["faults"].items():
        yield f"Could not be used: {count}", what
    yield "Temperature of the probabilities", f"{model['temperature']:.3f}"
    unit = "images" if data["patients"] is None else "patients"
    drawn = f"{content['bootstrap']} bootstrap resamples of {unit}"
    yield "Intervals", drawn if content["bootstrap"] else "none (bootstrap 0)"


def _metrics(content: Content) -> Iterator[Part]:
    found, own = content["metrics"], content["reference"]
    names = [n for n in HEADLINE if n in found] + [n for n in found if n not in HEADLINE]
    yield Table(
        ("Metric", "These images", "Number of images", "The model's own test images"),
        [
            (label(n), cell(found[n]), str(found[n]["n"]),
             "–" if n in _NOT_COMPARED else cell(own.get(n)))
            for n in names
        ],
    )  # fmt: skip
    yield Text(
        "The model's own test images come from where it was trained; a drop from there to here is "
        "what the change of place costs. Their figures were computed without the temperature: "
        "calibration is not compared, and AUROC of several classes may move a little by it.",
        small=True,
    )


def _operating_point(content: Content) -> Iterator[Part]:
    point = content["operating_point"]
    yield Heading("Operating point")
    if point["reason"] is not None:
        yield Text(f"None: {point['reason']}.")
        return
    asked = " and ".join(f"{k} of {v:g}" for k, v in point["asked"].items() if v is not None)
    counts, words = point["counts"], " or ".join(point["positive"])
    yield Text(
        f"Positive is {words}, from a score of {point['threshold']:.4f} on; it was chosen for a "
        f"{asked}. Of {counts['true_positive'] + counts['false_negative']} positive images "
        f"{counts['true_positive']} were found and {counts['false_negative']} missed; of "
        f"{counts['false_positive'] + counts['true_negative']} others {counts['false_positive']} "
        "raised a false alarm."
    )
    names = ("sensitivity", "specificity", "ppv", "npv")
    before = point["reference"]
    rows = [
        (label(n), *(cell(said[n]) for said in (point, *before.values())), str(point[n]["n"]))
        for n in names
    ]
    earlier = [f"{part.capitalize()} images" for part in before]
    yield Table(("Measure", "These images", *earlier, "Number of images here"), rows)
    yield Text(
        "Predictive values hold for the share of positives in these images; where the disease is "
        "rarer, the positive predictive value is lower.",
        small=True,
    )


def _decision_curve(content: Content) -> Iterator[Part]:
    curve = content["decision_curve"]
    yield Heading("Decision curve")
    if curve["reason"] is not None:
        yield Text(f"None: {curve['reason']}.")
        return
    yield Picture("figures/decision_curve.png", "Net benefit over threshold probabilities")
    better = [
        t for t, model, everyone in zip(
            curve["threshold"], curve["model"], curve["all"], strict=True
        ) if model > max(everyone, 0.0)
    ]  # fmt: skip
    yield Text(_better(better))
    yield Text(
        "The threshold probability says how sure one wants to be before acting: at 0.2, missing "
        "one positive is as bad as four false alarms. The model is of use where its curve lies "
        "above both others.",
        small=True,
    )


def _better(at: Sequence[float]) -> str:
    runs: list[list[float]] = []
    for t in at:
        if runs and t - runs[-1][-1] < 0.015:
            runs[-1].append(t)
        else:
            runs.append([t])
    spans = [f"{run[0]:.2f} to {run[-1]:.2f}" for run in runs if run[-1] - run[0] > 0.045]
    if not spans:
        return (
            "Over no span of 0.05 of threshold probability is deciding by the model better than "
            "both treating all and treating none."
        )
    return (
        "Deciding by the model is better than both treating all and treating none at threshold "
        f"probabilities of {', and of '.join(spans)} (spans of at least 0.05 are named)."
    )


def _restraint(content: Content) -> Iterator[Part]:
    yield Heading("Abstention and sets of classes")
    abstention, conformal = content["abstention"], content["conformal"]
    if abstention["reason"] is not None:
        yield Text(f"Abstention: not known; {abstention['reason']}.")
    else:
        yield Text(
            f"The model abstains on {cell(abstention['share'])} of the images, because they are "
            "unlike those it learnt from. The tables above count every image; without these:"
        )
        every = {**content["metrics"], **content["operating_point"]}
        rows = [
            (label(n), cell(entry), cell(every[n])) for n, entry in abstention["kept"].items()
        ]
        if rows:
            yield Table(("Metric", "Without abstentions", "All images"), rows)
    if conformal["reason"] is not None:
        yield Text(f"Sets of classes: none; {conformal['reason']}.")
        return
    yield Text(
        f"Conformal sets should hold the true class in {100 * conformal['wanted']:g} % of images, "
        "where images are like those they were made on."
    )
    shares = [
        ("Sets that hold the true class", cell(conformal["coverage"])),
        ("Classes per set, mean", cell(conformal["set_size"])),
        ("Sets of one class", cell(conformal["one_class"])),
        ("Sets of no class", cell(conformal["no_class"])),
    ]
    yield Table(("Conformal sets", "Value"), shares)


def _groups(name: str, table: Content, picture: str) -> Iterator[Part]:
    yield Heading(f"By {name}")
    yield Picture(picture, f"{_NAMES['auc_macro']}, by {name}")
    large = {g: said for g, said in table["groups"].items() if said["n"] >= SMALLEST}
    small = [f"{g} ({said['n']})" for g, said in table["groups"].items() if g not in large]
    if small:
        few = f"groups of fewer than {SMALLEST} images have no figures"
        yield Text(f"Not computed: {', '.join(small)}; {few}.")
    if not large:
        return
    yield Table(
        ("Metric", "Group", "Images", "Value", "Difference to the others"),
        [row for m in table["gap"] for row in _block(m, large, table["gap"][m])],
    )


def _block(metric: str, groups: Mapping[str, Content], gap: Content) -> Iterator[Sequence[str]]:
    name = label(metric)
    for g, said in groups.items():
        entry = said["metrics"][metric]
        yield name, g, str(entry["n"]), cell(entry), _signed(said["difference"][metric])
        name = ""
    if gap["value"] is not None and len(groups) > 2:
        yield "", "largest gap", "", cell(gap), f"{gap['highest']} – {gap['lowest']}"


def _signed(entry: Content) -> str:
    if entry["value"] is None:
        return "–"
    text = f"{entry['value']:+.3f}"
    return text if entry["low"] is None else f"{text} [{entry['low']:+.3f}, {entry['high']:+.3f}]"


def _figures(folder: Path) -> Iterator[Part]:
    captions = {
        "roc": "ROC: each class against the rest",
        "pr": "Precision and recall: each class against the rest",
        "confusion": "Confusion: what images are, and what they were taken for",
        "reliability": "Reliability: how often the model is right when it says how sure it is",
    }
    for name, caption in captions.items():
        if (folder / "figures" / f"{name}.png").is_file():
            yield Picture(f"figures/{name}.png", caption)


def _reading(content: Content) -> Iterator[str]:
    yield (
        "AUROC is the chance that the model ranks an image of a class above one of another; 0.5 is "
        "guessing. Sensitivity and specificity per class are those of the top class. A dash stands "
        "where a figure is not known; metrics.json holds every figure with its reason where it has "
        "none, and predictions.csv every image."
    )
    if content["by"]:
        yield (
            "Of groups, read the differences: an interval that holds 0 shows no difference, but "
            "with few images it cannot rule one out either, and among many groups one in twenty "
            "lies apart by chance. The largest gap is above 0 by chance alone. Images without a "
            "value in the column are compared with none."
        )
    yield (
        "This is a measurement on the images named above, not an approval. It says nothing of "
        "other scanners, other patients or later times."
    )
