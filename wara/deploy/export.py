"""From a run to a bundle: the trained model, and everything that is needed to answer for it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save

import wara
from wara.cards import told_of
from wara.data.imageset import ImageSet
from wara.data.sources import check_apart, open_source
from wara.deploy import card, parity
from wara.deploy.bundle import FORMAT, MANIFEST, VERSION, canonical, describe_files, seal
from wara.deploy.graph import export_onnx, plain, quantise
from wara.deploy.operating import operating_point, point_classes
from wara.deploy.places import check_outside
from wara.deploy.predictor import session
from wara.deploy.reliability import Scored, feature_statistics, reliability, temperature_of
from wara.errors import WaraError
from wara.images import DECODING, ImageSpec, load_array, normalise
from wara.runs.load import Run, load_run
from wara.runs.provenance import utc_now
from wara.runs.tables import SplitRow, hashed_cells
from wara.storage import new_folder

# What a bundle is run by, in the folder `wara` of a bundle but for the two that people look for.
SHIPPED = (
    "errors.py", "flags.py", "signals.py", "storage.py", *DECODING, "data/litter.py",
    "data/walk.py", "deploy/bundle.py", "deploy/contents.py", "deploy/inputs.py",
    "deploy/onnx_check.py", "deploy/output.py", "deploy/places.py", "deploy/predictor.py",
    "deploy/sr.py", "deploy/trace.py",
)  # fmt: skip
AT_THE_TOP = ("images.py", "deploy/infer.py")
REQUIREMENTS = ("onnxruntime", "numpy", "pillow", "pydicom")
_BATCH = 16
_INT8_IMAGES = 128
_TURNS = 9


@dataclass(frozen=True)
class Wish:
    """What is asked of an export.

    Args:
        positive: classes that count as positive; none: those that the card names.
        sensitivity: that the operating point must reach on validation images.
        specificity: the same; one of the two, or none.
        int8: whether to quantise.
        weights: where the backbone's weights lie now, if not where the run found them.
    """

    positive: Sequence[str] = ()
    sensitivity: float | None = None
    specificity: float | None = None
    int8: bool = False
    weights: Path | None = None


def export(
    run: str | Path,
    out: str | Path,
    wish: Wish | None = None,
    *,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the bundle of a finished run.

    Args:
        run: its folder.
        out: the new folder; it must not exist.
        wish: what is asked of it.
        say: told what is done.

    Returns:
        `out`.

    Raises:
        WaraError: kind "config" when something asked for cannot be had, "artefact" when run,
            weights or images are not those of the training, or the exported model says something
            else; nothing is left then.
    """
    wish, out = wish or Wish(), Path(out)
    check_outside(out.parent, "--out")
    with new_folder(out) as folder:
        found = load_run(run)
        _check(found, wish)
        _Export(found, folder, wish, say).write()
    return out


def _check(run: Run, wish: Wish) -> None:
    """Refuse at once what minutes of work would not change."""
    if wish.positive:
        _positive(run, wish)
    if run.backbone.statistics == "assumed":
        what = "mean and std of the images were assumed in this run"
        remedy = "train again with backbone.mean and backbone.std, or with the tag of the weights"
        raise WaraError("config", what, "backbone.mean, backbone.std", remedy)


def _positive(run: Run, wish: Wish, finding: Sequence[str] = ()) -> list[str]:
    return point_classes(
        run.classes, run.task, positive=wish.positive, finding=finding,
        sensitivity=wish.sensitivity, specificity=wish.specificity,
    )  # fmt: skip


class _Export:
    """The steps of one export, in order."""

    def __init__(self, run: Run, folder: Path, wish: Wish, say: Callable[[str], None]) -> None:
        self.run, self.folder, self.wish, self.say = run, folder, wish, say
        self.images = _images_of(run)
        check_apart(folder.parent, "--out", self.images)
        self.positive = _positive(run, wish, self.images.card.positive)
        self.splits = _indices(run, self.images)

    def write(self) -> None:
        run = self.run
        served, merged = plain(run.model(self.wish.weights))
        self.say("writing the graph")
        path = self.folder / "model.onnx"
        export_onnx(served, run.spec.size, path)
        size: dict[str, Any] = {"float32_bytes": path.stat().st_size}
        if self.wish.int8:
            self.say("quantising, calibrated on training images")
            exact = session(path.read_bytes(), path.name)
            quantise(path, self._batches(self.splits["train"][:_INT8_IMAGES]))
            size["int8_bytes"] = path.stat().st_size
            size["int8_time_to_float32"] = self._time(session(path.read_bytes(), path.name), exact)
        # Copies: safetensors refuses tensors that layers share.
        tensors = {k: v.clone() for k, v in served.state_dict().items()}
        # Not by `save_file`, which lets nobody but its writer read the file.
        (self.folder / "model.safetensors").write_bytes(save(tensors))
        self.say("scoring training, validation and test images with it")
        scored = {name: self._score(path, indices) for name, indices in self.splits.items()}
        certificate = parity.certify(
            {name: self._compare(name, scored[name]) for name in ("val", "test")},
            int8=self.wish.int8,
        )
        temperature, why = temperature_of(scored["val"])
        statistics = feature_statistics(scored["train"])
        parts = {"validation": scored["val"], "test": scored["test"]}
        trusted = reliability(parts, statistics, temperature, run.task)
        (self.folder / "reliability.npz").write_bytes(statistics)
        (self.folder / "reliability.json").write_bytes(canonical(trusted))
        point = operating_point(
            parts, run.classes, run.task, temperature,
            positive=self.positive, sensitivity=self.wish.sensitivity,
            specificity=self.wish.specificity, bootstrap=run.config.bootstrap,
        )  # fmt: skip
        self._write_code()
        self._write_reference(path)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "wara": wara.__version__,
            "created": utc_now(),
            "name": f"{told_of(self.images.card)[0]}_{run.metrics['method']}",
            "synthetic": run.synthetic,
            "task": run.task,
            "classes": [
                {"name": info.name, "meaning": info.meaning or None}
                for info in self.images.card.classes
            ],
            "input": _input(run),
            "model": {
                "file": "model.onnx",
                "precision": "int8" if self.wish.int8 else "float32",
                "inputs": {"images": ["batch", 3, *run.spec.size]},
                "outputs": {"logits": ["batch", len(run.classes)],
                            "features": ["batch", int(scored["val"].features.shape[1])]},
                "merged": merged,
                **size,
            },
            "temperature": temperature,
            "temperature_reason": why,
            "operating_point": point,
            "reliability": {"file": "reliability.json", "rates": trusted["rates"]},
            "parity": certificate,
            "backbone": run.backbone.model_dump(mode="json"),
            "method": {"name": run.adapter.method, "options": run.adapter.options,
                       "adapter_params": run.metrics["adapter_params"],
                       "head_params": run.metrics["head_params"]},
            "metrics": {name: run.metrics[name] for name in ("val", "test")},
            "data": self._data(),
            "versions": run.provenance["versions"],
            "commit": run.provenance["commit"],
            "intended_use": self.images.card.intended_use or "not given",
            "limits": self.images.card.limits or "not given",
            "licence_of_images": self.images.card.licence or "not given",
            "parent": None,
            "calibration": None,
        }  # fmt: skip
        (self.folder / "MODEL_CARD.md").write_text(card.markdown(manifest), encoding="utf-8")
        manifest["files"] = describe_files(self.folder)
        (self.folder / MANIFEST).write_bytes(canonical(seal(manifest)))
        self.say(
            f"parity: {certificate['images']} images, largest difference of a logit "
            f"{certificate['largest_difference']:.2g}, {certificate['flipped']} decisions changed"
        )

    def _batches(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        spec = self.run.spec
        for start in range(0, len(indices), _BATCH):
            chosen = indices[start : start + _BATCH]
            yield np.stack([normalise(self.images.array(i, spec), spec) for i in chosen])

    def _time(self, one: Any, other: Any) -> dict[str, float]:
        """Return how long a batch takes with one graph, in terms of another, run in turns."""
        batch = next(self._batches(self.splits["train"][:_BATCH]))
        ratios = []
        for _ in range(_TURNS):
            spent = []
            for ready in (one, other):
                start = time.perf_counter()
                ready.run(["logits"], {"images": batch})
                spent.append(time.perf_counter() - start)
            ratios.append(spent[0] / spent[1])
        low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
        return {"median": round(middle, 3), "p10": round(low, 3), "p90": round(high, 3)}

    def _score(self, path: Path, indices: Sequence[int]) -> Scored:
        ready = session(path.read_bytes(), path.name)
        outputs = [ready.run(["logits", "features"], {"images": b}) for b in self._batches(indices)]
        logits, features = (
            np.concatenate([pair[k] for pair in outputs]) if outputs else np.zeros((0, 1))
            for k in (0, 1)
        )
        patients = [self.images.records[i].patient for i in indices]
        return Scored(self.images.labels[list(indices)], logits, features, patients)

    def _compare(self, split: str, scored: Scored) -> dict[str, Any]:
        table = self.run.predictions(split)
        return parity.compare(
            scored.labels, table.predictions.logits, scored.logits, task=self.run.task,
            classes=self.run.classes,
        )  # fmt: skip

    def _data(self) -> dict[str, Any]:
        """What the model learnt from, without a path or a name of a file."""
        data = self.run.provenance["data"]
        card_ = self.images.card
        name, title = told_of(card_)
        return {
            "name": name,
            "title": title,
            "modality": card_.modality,
            "images": {name: len(indices) for name, indices in self.splits.items()},
            "sha256": data["sha256"],
            "substituted_for": data["substituted_for"],
        }

    # -- what travels ---------------------------------------------------------------------------

    def _write_code(self) -> None:
        package = Path(wara.__file__).parent
        for name in SHIPPED:
            target = self.folder / "wara" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package / name, target)
        for name in AT_THE_TOP:
            shutil.copyfile(package / name, self.folder / Path(name).name)
        lines = [f"{name}=={metadata.version(name)}" for name in REQUIREMENTS]
        (self.folder / "requirements.txt").write_text("\n".join(lines) + "\n")
        (self.folder / "Dockerfile").write_text(_DOCKERFILE)

    def _write_reference(self, path: Path) -> None:
        """Inputs drawn by code, and what the model says of them here."""
        folder, spec = self.folder / "reference", self.run.spec
        folder.mkdir()
        names = []
        for number, size in enumerate(((64, 64), (97, 140), (300, 211))):
            names.append(f"{number}.png")
            Image.fromarray(_drawn(number, size)).save(folder / names[-1])
        pixels = np.stack([normalise(load_array(folder / n, spec), spec) for n in names])
        ready = session(path.read_bytes(), path.name)
        (logits,) = ready.run(["logits"], {"images": pixels})
        content = {"images": names, "logits": [[float(x) for x in row] for row in logits]}
        (folder / "reference.json").write_bytes(canonical(content))


_DOCKERFILE = """\
# A program on the processor, for mercure, MONAI Deploy or by hand:
#   docker build -t NAME .
# with DICOM Structured Reports, and decoders for JPEG-LS and lossless JPEG:
#   docker build -t NAME --build-arg EXTRA="highdicom python-gdcm" .
# on images without the network:
#   docker run --rm --network none -v IMAGES:/in:ro -v RESULTS:/out NAME -i /in -o /out
FROM python:3.12-slim
ARG EXTRA=""
COPY . /bundle
RUN pip install --no-cache-dir -r /bundle/requirements.txt $EXTRA && chmod -R a+rX /bundle
ENTRYPOINT ["python", "/bundle/infer.py"]
"""


def _drawn(seed: int, size: tuple[int, int]) -> np.ndarray:
    """Return a picture of smooth and fine structure, uint8 `[h, w, 3]`."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[: size[0], : size[1]] / 40
    waves = [np.sin(a * down + b * across + c) for a, b, c in rng.uniform(0, 3, (3, 3))]
    picture = 128 + 60 * np.dstack(waves) + rng.normal(0, 15, (*size, 3))
    return np.asarray(np.clip(picture, 0, 255), np.uint8)


def _input(run: Run) -> dict[str, Any]:
    spec: ImageSpec = run.spec
    return {
        "size": list(spec.size),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "bits": spec.bits,
        "greys": spec.greys,
        "statistics": run.backbone.statistics,
    }


def _images_of(run: Run) -> ImageSet:
    config = run.config
    images = open_source(
        config.dataset,
        cache=config.data.cache,
        offline=config.offline,
        seed=config.data.split_seed,
        images=config.data.images,
        modality=config.data.modality,
        within=config.data.root,
    )
    images.declare(run.spec.bits, run.spec.greys)
    if images.synthetic != run.synthetic or images.card.class_names != run.classes:
        raise _others("the images found now are not those of the run", config.dataset)
    return images


def _indices(run: Run, images: ImageSet) -> dict[str, list[int]]:
    """Return the records of each split, checked to be the very images of the run."""
    known = {record.file: index for index, record in enumerate(images.records)}
    found: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    images.survey(run.spec)
    for row in run.splits():
        index = known.get(row.file)
        if index is None:
            raise _others(f"the image {row.file} is gone", run.config.dataset)
        record, sha256 = images.records[index], images.sha256(index) or ""
        if sha256 != row.sha256:
            raise _others(f"the image {row.file} was changed", run.config.dataset)
        now = SplitRow(row.file, record.label, record.patient, row.split, sha256)
        if hashed_cells([now]) != hashed_cells([row]):
            what = f"label or patient of the image {row.file} is another than in the run"
            raise _others(what, run.config.dataset)
        found[row.split].append(index)
    return found


def _others(what: str, where: str) -> WaraError:
    remedy = "bring back the images that the run was trained on, or train again"
    return WaraError("artefact", what, where, remedy)
