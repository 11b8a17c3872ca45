"""`report.md` and `report.html` of a comparison: what can and cannot be concluded, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from wara.compare import curves
from wara.compare.cells import code_version
from wara.compare.checks import Checked
from wara.compare.grid import MAJORITY, Request
from wara.compare.results import Line, Record, Results
from wara.compare.tables import cells_of_table, p_words, score_words, with_interval, write_tables
from wara.deploy.document import (
    Banner,
    Heading,
    Link,
    Part,
    Picture,
    Table,
    Text,
    as_html,
    as_markdown,
)
from wara.storage import write_text

_SCRIPT = """
for (const head of document.querySelectorAll("thead th")) {
  head.style.cursor = "pointer";
  head.title = "sort";
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const down = head.dataset.down = head.dataset.down === "1" ? "0" : "1";
    const value = (row) => {
      const text = row.cells[column].textContent, number = parseFloat(text.replaceAll(",", ""));
      return isNaN(number) ? text : number;
    };
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
      return (x < y ? -1 : x > y ? 1 : 0) * (down === "1" ? -1 : 1);
    });
    body.append(...rows);
  });
}
for (const picture of document.querySelectorAll("figure img")) {
  picture.style.cursor = "zoom-in";
  picture.addEventListener("click", () => {
    const large = picture.style.maxWidth === "none";
    picture.style.maxWidth = large ? "" : "none";
    picture.style.width = large ? "" : "95vw";
    picture.style.cursor = large ? "zoom-in" : "zoom-out";
  });
}
"""


def write(request: Request, checked: Checked, results: Results) -> None:
    """Write the tables, the figures, `report.md` and `report.html` below `request.out`."""
    write_tables(request, results, request.out)
    title = f"{len(request.methods)} methods on {len(results.datasets)} data " + (
        "set" if len(results.datasets) == 1 else "sets"
    )
    parts = list(_parts(request, checked, results))
    write_text(request.out / "report.md", as_markdown(title, parts))
    write_text(request.out / "report.html", as_html(title, parts, request.out, _SCRIPT))


def _parts(request: Request, checked: Checked, results: Results) -> Iterator[Part]:
    for banner in dict.fromkeys(b for g in checked.grounds.values() for b in g.banners):
        yield Banner(banner)
    failed = [record for record in results.records if record["status"] == "failed"]
    if failed:
        yield Banner(f"{len(failed)} of {len(results.records)} cells failed; see the end.")
    for name in results.datasets:
        yield from _of_dataset(request, checked, results, name)
    if len(results.datasets) > 1:
        yield from _over_datasets(request, checked, results)
    yield Heading("How it was made")
    yield from map(Text, _made(request, results))
    if results.trials:
        yield from _trials(results)
    yield Heading("Cells")
    yield Table(
        ["cell", "status", f"test {request.metric}", "best epoch", "lr"],
        [_cell(record) for record in results.records],
    )


def _of_dataset(request: Request, checked: Checked, results: Results, name: str) -> Iterator[Part]:
    ground = next(g for g in checked.grounds.values() if g.name == name)
    lines = results.of(name)
    yield Heading(name if ground.title == name else f"{name}: {ground.title}")
    yield from map(Text, conclusions(request, lines))
    head, *rows = cells_of_table(request, lines)
    rows_: list[Sequence[str | Link]] = []
    for line, row in zip(lines, rows, strict=True):
        costs = [_number(line.median(key), form) for key, form in
                 (("seconds_per_epoch", ".1f"), ("peak_memory_mb", ".0f"))]  # fmt: skip
        # What would decide an undecided one stands in the sentences above.
        last = [line.difference.verdict or "-"] if line.difference is not None else row[-1:]
        rows_.append([_linked(line, row[0]), *row[1:-1], *last, *costs])
    yield Table([*head, "s per epoch", "peak MB"], rows_)
    yield Text(
        "Seconds and memory are medians over the runs of a row, on the machine that ran them.",
        small=True,
    )
    synthetic, where = ground.synthetic, request.out / "figures"
    drawn = {
        f"{name}_means.png": ("Means with 95 % intervals.", curves.means(
            lines, where / f"{name}_means.png", metric=request.metric, synthetic=synthetic)),
        f"{name}_parameters.png": ("Score over trained parameters.", curves.sweep(
            lines, where / f"{name}_parameters.png", over="parameters", metric=request.metric,
            synthetic=synthetic)),
        f"{name}_images.png": ("Score over training images.", curves.sweep(
            lines, where / f"{name}_images.png", over="images", metric=request.metric,
            synthetic=synthetic)),
    }  # fmt: skip
    for file, (caption, path) in drawn.items():
        if path is not None:
            yield Picture(f"figures/{file}", f"{name}: {caption}")


def conclusions(request: Request, lines: Sequence[Line]) -> list[str]:
    """Return what the numbers of a data set say, a sentence for each method."""
    said = []
    for line in lines:
        other = line.difference
        if line.sized.row.method in (MAJORITY, request.reference) or request.reference is None:
            continue
        start = f"{line.label}: {score_words(line)}"
        if line.summary and line.summary.value is not None and line.summary.reason:
            start += f" ({line.summary.reason})"
        if other is None or other.value is None:
            why = line.untested or (other.reason if other else "not tested")
            said.append(f"{start}; not held against {request.reference}: {why}.")
            continue
        gap = with_interval(other.value, other.low, other.high, "+")
        said.append(f"{start}; minus {request.reference} {gap}: {_verdict(request, line)}.")
    if request.reference is None:
        said.append("No tests were asked for: the table ranks nothing.")
    return said


def _verdict(request: Request, line: Line) -> str:
    other = line.difference
    assert other is not None
    rope = f"{request.rope:g}"
    match other.verdict:
        case "the same":
            return f"the same within {rope}"
        case "better" | "worse":
            assert other.p_holm is not None
            p = p_words(other.p_holm)
            return f"{other.verdict}, interval beyond {rope} (p of no difference {p}, Holm)"
        case _:
            return other.words


def _over_datasets(request: Request, checked: Checked, results: Results) -> Iterator[Part]:
    from wara.compare.across import pool_differences, rank_methods
    from wara.compare.figures import critical_difference

    yield Heading("Over all data sets")
    per = {name: {line.label: line for line in results.of(name)} for name in results.datasets}
    # Who looks at no image is last everywhere, which would be read as a difference of methods.
    labels = [label for label, line in next(iter(per.values())).items()
              if line.sized.row.method != MAJORITY
              and all(_has_mean(lines.get(label)) for lines in per.values())]  # fmt: skip
    if len(labels) < 2:
        yield Text("Fewer than two methods have a mean on every data set: nothing is ranked.")
        return
    means = {name: {label: lines[label].summary.value for label in labels}  # type: ignore[union-attr]
             for name, lines in per.items()}  # fmt: skip
    ranking = rank_methods(means, request.metric)  # type: ignore[arg-type]
    synthetic = any(ground.synthetic for ground in checked.grounds.values())
    critical_difference(
        ranking, request.out / "figures/ranks.png", title=f"test {request.metric}",
        synthetic=synthetic,
    )  # fmt: skip
    words = ranking.reason
    if ranking.p is not None:
        words = (
            f"Friedman's test that all are alike: p {p_words(ranking.p)}; mean ranks that differ "
            f"by less than {ranking.critical:.2f} are not told apart."
        )
    yield Text(f"Mean ranks over {ranking.datasets} data sets. {words}")
    rows = []
    for label, rank in ranking.ranks.items():
        found = {name: lines[label].difference for name, lines in per.items()}
        pooled = pool_differences({name: d for name, d in found.items() if d is not None})
        gap = pooled.reason or ""
        if pooled.value is not None:
            gap = with_interval(pooled.value, pooled.low, pooled.high, "+")
            if pooled.datasets < len(per):
                gap += f", of {pooled.datasets} data sets"
        elif not any(found.values()):
            gap = "not tested"
        if any(per[name][label].sized.row.method == request.reference for name in per):
            gap = "reference"
        rows.append([label, f"{rank:.2f}", gap])
    yield Table(["method", "mean rank", f"mean difference to {request.reference}"], rows)
    yield Picture("figures/ranks.png", "Mean ranks; a bar joins methods that are not told apart.")


def _has_mean(line: Line | None) -> bool:
    return line is not None and line.summary is not None and line.summary.value is not None


def _made(request: Request, results: Results) -> Iterator[str]:
    seeds = ", ".join(map(str, request.seeds))
    yield (
        f"{request.splits} split{'s' * (request.splits > 1)}, seeds {seeds}. All rows of a data "
        "set have the same splits, and with as many training images the same order of batches in "
        "a seed, the same augmentation and the same number of updates. The epoch is chosen on the "
        "validation images; the test images are scored once, at the end of a run."
    )
    if request.tuning:
        yield (
            f"Rates: {request.tuning.trials} trials for each row and split, judged on the "
            f"validation images with seed {request.seeds[0]}; the best rate is that of all seeds."
        )
    else:
        yield "Rates were not tuned: each method has its own, or the one that the config sets."
    if request.audit:
        yield _audit(request, results.records)
    if request.reference is not None:
        yield (
            f"Differences are to {request.reference}; those within {request.rope:g} mean nothing "
            "here. p-values are corrected for the number of methods of a data set, size and number "
            "of training images (Holm), not for that of data sets."
        )
    yield f"Code {code_version()[:12]}."


def _audit(request: Request, records: Sequence[Record]) -> str:
    gains = [record["audit_gain"] for record in records if record["audit_gain"] is not None]
    if not gains:
        return "Audit: no cell has the scores of its epochs; it takes runs made with --audit."
    mean = sum(gains) / len(gains)
    return (
        f"Audit: choosing the epoch on the test images instead would have raised test "
        f"{request.metric} by {mean:.3f} on average over {len(gains)} runs, {max(gains):.3f} at "
        "most, and none of that is real."
    )


def _trials(results: Results) -> Iterator[Part]:
    yield Heading("Trials")
    rows = []
    for trial in results.trials:
        value, config = trial.found.get("value"), trial.config
        words = trial.found.get("reason") or "no value"
        if value is not None:
            words = f"{trial.found['monitor']} {value:.4f}"
        own = next(line.records for line in results.lines if line.sized.row is trial.cell.row)
        taken = any(r["split"] == trial.cell.split and r["seed"] == trial.cell.seed
                    and r["lr"] == config.lr and r["weight_decay"] == config.weight_decay
                    for r in own)  # fmt: skip
        rows.append([
            trial.cell.place, f"{config.lr:g}", f"{config.weight_decay:g}", words,
            "taken" if taken else "",
        ])  # fmt: skip
    yield Table(["trial", "lr", "weight decay", "validation", ""], rows)


def _cell(record: Record) -> list[str | Link]:
    place = f"{record['dataset']} {record['row']} split {record['split']} seed {record['seed']}"
    first = Link(place, f"{record['folder']}/report.md") if record["folder"] else place
    state = record["reason"] if record["status"] == "failed" else record["status"]
    test, lr = _number(record["test"], ".3f"), _number(record["lr"], "g")
    return [first, state, test, _number(record["best_epoch"], "d"), lr]


def _linked(line: Line, words: str) -> str | Link:
    folders = [record["folder"] for record in line.finished if record["folder"]]
    return Link(words, f"{folders[0]}/report.md") if folders else words


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
