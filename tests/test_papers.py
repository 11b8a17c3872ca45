"""The scripts behind the papers' results, each against an oracle of its own, and what is stored."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import importlib
import itertools
import json
import math
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import pywt
import scipy.linalg
import scipy.optimize
import scipy.special
import torch
from training_helpers import CLASSES, tiny_config

import wara
from wara.adapters import SHiRA, WaveFT, method_from_options
from wara.backbones import build_backbone
from wara.config import dump_config
from wara.errors import WaraError
from wara.images import load_tensor
from wara.runs import load_run

PAPERS = Path(__file__).resolve().parents[1] / "benchmarks" / "papers"
RESULTS = PAPERS / "results"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    sys.path.insert(0, str(PAPERS))
    yield
    sys.path.remove(str(PAPERS))


def script(name: str):
    return importlib.import_module(name)


def stored(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())["result"]


def documented() -> str:
    return (PAPERS.parents[1] / "docs" / "papers.md").read_text()


def adam(gradient, start: np.ndarray, rates) -> np.ndarray:
    """Adam as its paper writes it, a step per rate, for a function of step and values."""
    values, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, rate in enumerate(rates, 1):
        g = gradient(t - 1, values)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        root = np.sqrt(second / (1 - 0.999**t)) + 1e-8
        values = values - rate * first / (1 - 0.9**t) / root
    return values


# -- rank ----------------------------------------------------------------------------------


def test_structural_rank_is_the_best_matching_by_trying_all():
    rank = script("waveft_rank")
    rng = np.random.default_rng(0)
    for _ in range(30):
        places = np.array(np.unravel_index(rng.choice(20, rng.integers(1, 9), False), (4, 5)))
        chosen = set(zip(*places.tolist(), strict=True))
        best = max(
            sum((row, column) in chosen for row, column in enumerate(columns))
            for columns in itertools.permutations(range(5), 4)
        )
        assert rank.matching(places, (4, 5)) == best


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_ranks_of_shira_and_waveft_are_the_structural_rank(shape):
    rank = script("waveft_rank")
    for name in ("shira", "waveft"):
        for k in (5, sum(shape) // 2, sum(shape), 3 * sum(shape)):
            want = rank.matching(rank.places_of(name, shape, k, 1), shape)
            assert rank.measured_rank(name, shape, k, 1) == want


def test_rank_is_as_numpy_counts_it_on_a_dense_matrix():
    rank = script("waveft_rank")
    method = WaveFT(k=60, seed=3, init="gaussian", targets=("*",))
    torch.manual_seed(3)
    update = script("paper_tools").update_of(
        script("paper_tools").zero_layer(method, (20, 30), torch.float64)
    )
    assert update.dtype == torch.float64
    assert rank.numerical_rank(update) == np.linalg.matrix_rank(update.numpy())


def test_bounds_hold_on_average_and_empty_rows_are_counted_right():
    rank = script("waveft_rank")
    shape, rng = (30, 50), np.random.default_rng(0)
    for k in (20, 60, 150):
        flat = [rng.choice(1500, k, replace=False) for _ in range(400)]
        empty = np.mean([30 - len(set((f // 50).tolist())) for f in flat])
        assert rank.empty_lines(30, 50, k) == pytest.approx(empty, abs=0.4)
        found = np.mean([rank.matching(np.stack([f // 50, f % 50]), shape) for f in flat])
        below, above = rank.bounds(shape, k)
        assert below - 0.2 <= found <= above + 0.2
    assert rank.empty_lines(3, 4, 9) == 0  # 12 places, 3 left: no row of 4 can be empty


def test_asymptotic_rank_is_the_matching_number_of_random_bipartite_graphs():
    # Karp and Sipser's formula for a square matrix with c places per row on average.
    rank, n = script("waveft_rank"), 1000
    for c in (0.5, 2.0, 5.0):
        low = scipy.optimize.brentq(lambda x, c=c: x - c * math.exp(-c * math.exp(-x)), 0, c) \
            if c <= math.e else fixed_point(c)  # fmt: skip
        high = c * math.exp(-low)
        want = n * (2 - (low + high + low * high) / c)
        assert rank.asymptotic_rank((n, n), round(c * n)) == pytest.approx(want, abs=0.05)
    # And the rectangular case against a large draw.
    shape, k = (600, 1500), 1800
    found = rank.matching(rank.draw_places(shape, k, 0).numpy(), shape)
    assert rank.asymptotic_rank(shape, k) == pytest.approx(found, abs=8)


def fixed_point(c: float) -> float:
    x = 0.0
    for _ in range(10_000):  # from 0 it climbs to the smallest solution
        x = c * math.exp(-c * math.exp(-x))
    return x


def test_lemma_1_is_the_share_of_matrices_without_an_empty_line():
    rank, rng, n = script("waveft_rank"), np.random.default_rng(0), 400
    for c in (-0.5, 0.5, 1.5):
        k = round(n * (math.log(n) + c))
        assert rank.lemma1((n, n), k) == pytest.approx(math.exp(-2 * math.exp(-c)), abs=2e-3)
        full = {(n, n): 0, (n, 3 * n): 0}
        for shape in full:
            for _ in range(400):
                flat = rng.choice(n * shape[1], k, replace=False)
                rows, columns = len(set(flat // shape[1])), len(set(flat % shape[1]))
                full[shape] += rows == n and (columns == n or shape[1] > n)
        for shape, count in full.items():
            assert rank.no_empty_line(shape, k) == pytest.approx(count / 400, abs=0.08)
        assert rank.lemma1((n, n), k) == pytest.approx(rank.no_empty_line((n, n), k), abs=0.03)
        # Of other shapes more have full rank than the lemma says, as the paper remarks.
        assert rank.lemma1((n, 3 * n), k) < rank.no_empty_line((n, 3 * n), k)


def test_lemma_2_holds_of_lora_and_of_no_sparse_update():
    rank, tools = script("waveft_rank"), script("paper_tools")
    for r in (1, 3):
        found = rank.bottleneck((20, 30), r)
        assert found["rank"] == found["found"] == r
        assert found["outside_span_of_b"] < 1e-12 and found["left_in_kernel_of_a"] < 1e-12
    # By SciPy's bases: nothing of LoRA's update is left, much of a sparse one.
    torch.manual_seed(0)
    model = tools.zero_layer(wara.LoRA(rank=3, targets=("*",)), (20, 30), torch.float64)
    up, down = (model[0].adapter.up.detach(), model[0].adapter.down.detach())
    torch.nn.init.normal_(model[0].adapter.up)
    sparse = SHiRA(k=150, init="gaussian", targets=("*",))
    for update, left in (
        (tools.update_of(model).numpy(), 0.0),
        (tools.update_of(tools.zero_layer(sparse, (20, 30), torch.float64)).numpy(), 0.5),
    ):
        kernel = np.linalg.norm(update @ scipy.linalg.null_space(down.numpy()))
        image = np.linalg.norm(scipy.linalg.null_space(up.numpy().T).T @ update)
        whole = np.linalg.norm(update)
        assert (kernel < 1e-10 and image < 1e-10) if not left else min(kernel, image) > left * whole


def test_ranks_by_wavelet_are_those_of_pywavelets():
    rank = script("waveft_rank")
    found = rank.families((24, 24), 1)
    places = rank.draw_places((24, 24), 48, 0).numpy()
    torch.manual_seed(0)
    values = script("paper_tools").trained(
        script("paper_tools").zero_layer(
            WaveFT(k=48, init="gaussian", targets=("*",)), (24, 24), torch.float64
        )
    )[0]
    grid = np.zeros((24, 24))
    grid[tuple(places)] = values.detach().numpy()
    ll, lh, hl, hh = grid[:12, :12], grid[:12, 12:], grid[12:, :12], grid[12:, 12:]
    update = pywt.idwt2((ll, (lh, hl, hh)), "haar", mode="zero")
    assert found["update"]["haar"] == np.linalg.matrix_rank(update)
    assert found["coefficients"] == np.linalg.matrix_rank(grid)
    assert found["update"]["db2"] == found["update"]["sym2"]  # one wavelet with two names
    assert set(found["update"]) == {"haar", "db2", "db3", "coif1", "coif2", "sym2", "sym3", "sym4"}


def test_rank_script_finds_where_full_rank_begins(tmp_path):
    rank = script("waveft_rank")
    arguments = ["--shapes", "24x24", "16x40", "--seeds", "3", "--draws", "60"]
    result = rank.main([*arguments, "--out", str(tmp_path)])
    for one in result["shapes"]:
        most, full = min(one["shape"]), one["full_rank"]
        for name in ("shira", "waveft"):
            at = full[name]
            assert (at["seed0_by_svd"], at["seed0_one_less_by_svd"]) == (most, most - 1)
            assert at["q05_lora_r1"] < at["median_lora_r1"] < at["q95_lora_r1"]
            means = [row[name]["mean"] for row in one["rows"]]
            assert means == sorted(means)  # the places of a smaller k are among a larger's
            shape = tuple(one["shape"])
            for row in full["shares"][::5]:  # draw by draw, without the bisection
                places = [rank.places_of(name, shape, row["k"], seed) for seed in range(60)]
                assert row[name] == np.mean([rank.matching(p, shape) == most for p in places])
    assert (tmp_path / "waveft_rank.png").stat().st_size > 5000
    setting = json.loads((tmp_path / "waveft_rank.json").read_text())["setting"]
    assert (setting["seeds"], setting["draws"]) == (3, 60)


def test_stored_ranks_say_what_the_docs_say():
    result, text = stored("waveft_rank"), documented()
    shapes = {tuple(one["shape"]): one for one in result["shapes"]}
    assert set(shapes) == {(640, 640), (1280, 1280), (640, 2048), (1280, 2048)}
    for shape, one in shapes.items():
        most, full = min(one["shape"]), one["full_rank"]
        for row in one["rows"]:
            for name in ("shira", "waveft"):
                found = row[name]
                assert found["seed0_by_svd"] in (None, found["seed0"])
                assert row["bound_below"] - 2 <= found["mean"] <= row["bound_above"] + 2
                # The theorem is about infinitely many rows; a thousand are near.
                assert abs(row["asymptotic"] - found["mean"]) < 0.01 * most
                if row["lora_r1"] == 3:
                    assert found["seed0_by_svd"] is not None and found["mean"] > 0.995 * most
        shares = {row["at"]: row for row in full["shares"]}
        names = " x ".join(map(str, shape))
        for name in ("shira", "waveft"):
            at = full[name]
            assert (at["seed0_by_svd"], at["seed0_one_less_by_svd"]) == (most, most - 1)
            percent = {row["lora_r1"]: 100 * row[name]["mean"] / most for row in one["rows"]}
            cells = " | ".join(f"{percent[b]:.1f}" for b in (0.1, 0.5, 1, 2, 3, 4))
            quantiles = "{median_lora_r1:.1f} ({q05_lora_r1:.1f} to {q95_lora_r1:.1f})".format(**at)
            assert f"| {names} | {name} | {cells} | {quantiles} |" in text
        for row in full["shares"]:
            for name in ("shira", "waveft"):
                error = 4 * math.sqrt(max(row["no_empty_line"] * (1 - row["no_empty_line"]), 1e-3)
                                      / full["draws"])  # fmt: skip
                assert abs(row[name] - row["no_empty_line"]) < error + 0.02
                if shape[0] < shape[1]:
                    assert row[name] > row["lemma1"] - error
        for at in ("c = -1", "c = 0", "c = 1", "c = 2", "rank 3", "rank 4"):
            row = shares[at]
            keys = ("lemma1", "no_empty_line", "shira", "waveft")
            cells = [f"{100 * row[key]:.1f}" for key in keys]
            budget = f"{row['lora_r1']:.2f}"
            assert f"| {names} | {at} | {budget} | {' | '.join(cells)} |" in text
        for row in one["lora"]:
            assert row["found"] == row["rank"]
            assert max(row["outside_span_of_b"], row["left_in_kernel_of_a"]) < 1e-14
    # Fig. 3: full rank at the size of rank 3 is what Lemma 1 itself excludes for square matrices.
    for shape in ((640, 640), (1280, 1280)):
        (row,) = [r for r in shapes[shape]["full_rank"]["shares"] if r["at"] == "rank 3"]
        assert max(row["lemma1"], row["shira"], row["waveft"]) < 0.05
        for name in ("shira", "waveft"):  # and the lemma holds of them
            rows = shapes[shape]["full_rank"]["shares"]
            assert max(abs(row[name] - row["lemma1"]) for row in rows) < 0.03
    for one in result["families"]:
        found = one["update"].values()
        words = f"`C` has rank {one['coefficients']}, the update {min(found)} to {max(found)}"
        assert f"rank {one['lora_r1']:g}'s size {words}" in text
        assert max(abs(r - one["coefficients"]) for r in one["update"].values()) <= 8


# -- interpolation -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shira", "waveft"])
def test_least_loss_of_a_sparse_update_is_that_of_dense_least_squares(name):
    tools, fit = script("paper_tools"), script("waveft_interpolation")
    side, k = 12, 40
    x, y = fit.pairs(side, 5, 0)
    method = (
        SHiRA(k=k, seed=2, targets=("*",))
        if name == "shira"
        else WaveFT(k=k, seed=2, scale=1.0, targets=("*",))
    )
    model = tools.zero_layer(method, (side, side), torch.float64)
    (values,) = tools.trained(model)
    columns = []
    for i in range(k):  # the model is linear in its k numbers: one column each
        with torch.no_grad():
            values.zero_()[i] = 1
            columns.append(model(x).flatten())
    design = torch.stack(columns, 1).numpy()
    left = y.flatten().numpy()
    left = left - design @ np.linalg.lstsq(design, left, rcond=None)[0]
    want = (left**2).sum() / float(y.square().sum())
    places = fit.draw_places((side, side), k, 2)
    arguments = (places, x, y) if name == "shira" else fit.in_coefficients(places, x, y)
    assert fit.least_sparse(*arguments) == pytest.approx(want, abs=1e-10)
    # With λ = 25 also small steps reach what a nearly singular row needs; the least is the same.
    fast = dataclasses.replace(method, scale=25.0)
    assert fit.train(fast, x, y, 0) == pytest.approx(want, abs=1e-4)
    assert want - 1e-7 <= fit.train(method, x, y, 0) <= want + 1e-3


def test_interpolation_trains_as_the_paper_says():
    # A.3: MSE, Adam at 0.01, times 0.75 every 500 epochs, by an Adam and a gradient written here.
    fit, side, k, epochs = script("waveft_interpolation"), 10, 60, 1200
    # Targets so far off that no rate or schedule but these ends where these do.
    inputs, outputs = fit.pairs(side, 5, 3)
    outputs = 50 * outputs
    x, y = inputs.numpy(), outputs.numpy()
    row, column = fit.draw_places((side, side), k, 4).numpy()

    def gradient(_, values):
        weight = np.zeros((side, side))
        weight[row, column] = values
        return (2 / y.size * (x @ weight.T - y).T @ x)[row, column]

    rates = [0.01 * 0.75 ** (t // 500) for t in range(epochs)]
    weight = np.zeros((side, side))
    weight[row, column] = adam(gradient, np.zeros(k), rates)
    want = ((x @ weight.T - y) ** 2).sum() / (y**2).sum()
    method = SHiRA(k=k, seed=4, targets=("*",))
    assert 0.2 < want < 0.8
    assert fit.train(method, inputs, outputs, 0, epochs) == pytest.approx(want, rel=1e-4)
    assert (fit.EPOCHS, fit.SIDE, fit.PAIRS, fit.SPARSE[-1]) == (5000, 784, 5, 15680)


def test_expected_least_loss_is_the_mean_over_draws():
    fit = script("waveft_interpolation")
    side, k, rng = 30, 120, np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(size=(2, 5, side)))
    found = [
        fit.least_sparse(
            torch.from_numpy(np.stack(np.unravel_index(rng.choice(900, k, False), (30, 30)))), x, y
        )
        for _ in range(60)
    ]
    assert fit.expected(k, side, 5) == pytest.approx(np.mean(found), abs=0.02)


def test_chance_of_too_few_places_is_the_papers_sum_and_what_draws_give():
    fit = script("waveft_interpolation")
    found = fit.too_few(784, 5, 15680, 200)
    total = sum(math.comb(15680, j) * 783 ** (15680 - j) for j in range(5))
    want = float(Fraction(784 * total, 784**15680))
    assert found["union_bound_independent"] == pytest.approx(want, rel=1e-9)
    assert want > 0.013  # the paper says 0.01 or less
    # Different places, on a small matrix, against draws of the places themselves.
    small, rng = fit.too_few(20, 3, 160, 4000), np.random.default_rng(1)
    draws = [rng.choice(400, 160, replace=False) // 20 for _ in range(4000)]
    share = np.mean([np.bincount(rows, minlength=20).min() < 3 for rows in draws])
    assert small["counted"] == pytest.approx(share, abs=0.03)
    assert small["union_bound_different"] >= share - 0.02
    assert small["union_bound_independent"] >= small["union_bound_different"]


def test_columns_that_all_rows_share_are_counted():
    fit = script("waveft_interpolation")
    for k in (36, 34, 20):
        places = set(zip(*fit.draw_places((6, 6), k, 1).tolist(), strict=True))
        rows = [sum((i, j) in places for i in range(6)) for j in range(6)]
        want = {"in_all_rows": rows.count(6), "most_rows": max(rows)}
        assert fit.shared_columns(6, k, 1) == want


def test_update_of_lemma_3_reaches_its_targets():
    fit = script("waveft_interpolation")
    for rank in (1, 3, 4):
        found = fit.lemma3(16, 4, rank, 5)
        assert found["parameters"] == 8 * 4
        assert found["rank_wanted"] == found["rank_update"] == rank
        assert found["error"] < 1e-10 and found["outside"] == 0
    # Not needed: columns that all rows share. Columns of its own serve each row as well.
    x, y = fit.pairs(16, 4, 0)
    own = [(i, (i + j) % 16) for i in range(16) for j in range(4)]
    places = torch.tensor(own).T
    assert places[1].bincount().max() == 4
    assert fit.least_sparse(places, x, y) < 1e-20


@pytest.mark.slow
def test_interpolation_script(tmp_path):
    fit = script("waveft_interpolation")
    arguments = "--side 32 --sparse 32 160 800 --ranks 1 5 --seeds 2 --draws 100".split()
    result = fit.main([*arguments, "--epochs", "1500", "--out", str(tmp_path)])
    rows = {(row["method"], row["size"], row["scale"]): row for row in result["rows"]}
    for row in rows.values():  # nothing is below the least, and training comes near it
        assert row["loss"]["mean"] >= row["least"]["mean"] - 1e-7
        assert row["loss"]["mean"] <= row["least"]["mean"] + 0.02
    assert rows["lora", 1, 1.0]["least"]["mean"] > 0.3
    assert rows["lora", 5, 1.0]["least"]["mean"] < 1e-20
    assert {key[2] for key in rows if key[:2] == ("waveft", 800)} == {1.0, 25.0}
    for (name, _, _), row in rows.items():  # a row with too few places is what leaves a loss
        if name != "lora":
            for short, least in zip(row["rows_with_too_few"], row["leasts"], strict=True):
                assert (short > 0) == (least > 1e-12)
    assert (tmp_path / "waveft_interpolation.png").is_file()


def test_stored_interpolation_reaches_zero_where_the_paper_says():
    result, text = stored("waveft_interpolation"), documented()
    rows = {(row["method"], row["size"], row["scale"]): row for row in result["rows"]}
    assert result["zero_is_below"] == 1e-6
    for name in ("shira", "waveft"):
        for scale in (1.0, 25.0):
            last = rows[name, 15680, scale]
            assert last["lora_r1"] == 10
            draws = zip(last["losses"], last["leasts"], last["rows_with_too_few"], strict=True)
            for loss, least, short in draws:
                assert (short > 0) == (least > 1e-12)
                assert loss < 1e-6 or short
        assert min(rows[name, 1568, 1.0]["leasts"]) > 0.5
        last = rows[name, 15680, 1.0]
        assert max(last["losses"]) < 1e-4
        complete = last["rows_with_too_few"].count(0)
        assert complete == sum(loss < 1e-6 for loss in last["losses"]) >= 7
        label = {"shira": "SHiRA", "waveft": "WaveFT"}[name]
        assert f"{complete} of {len(last['losses'])} draws of {label}" in text
        for row in rows.values():  # training in the paper's way comes near the least at all sizes
            assert row["loss"]["mean"] - row["least"]["mean"] < 0.004
    assert result["zero_from"] == {"lora": 5 * 2 * 784, "shira": 15680, "waveft": None}
    few = {row["parameters"]: row for row in result["too_few"]}
    assert few[15680]["union_bound_independent"] > few[15680]["union_bound_different"] > 0.01
    assert abs(few[15680]["counted"] - few[15680]["union_bound_different"]) < 0.003
    assert all(draw["in_all_rows"] == 0 for draw in result["shared_columns"])
    most = [draw["most_rows"] for draw in result["shared_columns"]]
    # The share of places at which a column is in all rows 5 times out of 784.
    filled = result["filled_for_shared_columns"]
    assert 784 * filled**784 == pytest.approx(5, rel=0.01)
    for words in (
        f"is {few[15680]['union_bound_independent']:.4f}, for places",
        f"it is {few[15680]['union_bound_different']:.4f}, and in",
        f" in {100 * few[15680]['counted']:.2f} % of",
        f"{min(most)} to {max(most)} of 784 rows",
        f"{100 * filled:.1f} % of the matrix filled",
    ):
        assert words in text
    assert [row["rank_update"] for row in result["lemma3"]] == [1, 2, 3, 4, 5]
    assert max(row["error"] for row in result["lemma3"]) < 1e-12
    sizes = sorted({row["parameters"] for row in result["rows"]})
    for size in sizes:
        cells = []
        for name, each in (("lora", size / 1568), ("shira", size), ("waveft", size)):
            row = rows.get((name, each, 1.0))
            cells.append(f"{shown(row['loss'])} ({shown(row['least'])})" if row else "")
        assert f"| {size:,} | {' | '.join(cells)} |" in text


def shown(loss: dict) -> str:
    """A loss as the docs write it: three places, small ones by a power of ten, none below 1e-6."""
    mean = loss["mean"]
    if mean < 1e-6:
        return "0"
    return f"{mean:.3f}" if mean >= 5e-4 else f"{mean:.0e}".replace("e-0", "e-")


# -- classifier ----------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    """The IDX form of bytes, written apart from the reader."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def mnist_like(folder: Path, packed: bool) -> dict[str, np.ndarray]:
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 240), ("t10k", 60)):
        labels = np.arange(n) % 10
        images = rng.integers(0, 60, (n, 28, 28))
        images[np.arange(n), 2 * labels] += 150  # a bright row that tells the class
        for what, array in (("images", images), ("labels", labels)):
            name = f"{part}-{what}-idx{array.ndim}-ubyte"
            data = idx(array)
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(data) if packed else data)
            arrays[f"{part} {what}"] = array
    return arrays


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_files_are_read_as_written(tmp_path, packed):
    classifier = script("waveft_classifier")
    arrays = mnist_like(tmp_path, packed)
    (x, y), (x_test, y_test) = classifier.read_mnist(tmp_path)
    assert x.shape == (240, 784) and x_test.shape == (60, 784)
    assert np.array_equal((x.numpy() * 255).round().reshape(-1, 28, 28), arrays["train images"])
    assert np.array_equal(y, arrays["train labels"])
    assert np.array_equal(y_test, arrays["t10k labels"])
    # The header is that of the real files.
    magic = struct.unpack(">4I", idx(np.zeros((60, 28, 28)))[:16])
    assert magic == (2051, 60, 28, 28)
    assert struct.unpack(">2I", idx(np.zeros(60))[:8]) == (2049, 60)


def test_damaged_mnist_files_are_refused(tmp_path):
    classifier = script("waveft_classifier")
    mnist_like(tmp_path, packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"\0", b"", b"\0\0\x0d" + whole[3:], whole[:9]):
        path.write_bytes(content)
        with pytest.raises(WaraError) as caught:
            classifier.read_mnist(tmp_path)
        assert caught.value.kind == "data"
    path.write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(WaraError, match="cannot read"):
        classifier.read_mnist(tmp_path)
    path.unlink()
    with pytest.raises(WaraError, match="no train images"):
        classifier.read_mnist(tmp_path)


def test_classifier_script_on_mnist_files(tmp_path, monkeypatch):
    classifier = script("waveft_classifier")
    mnist_like(tmp_path, packed=True)
    monkeypatch.setattr(classifier, "RANKS", (1,))
    monkeypatch.setattr(classifier, "BELOW", (0.1,))
    arguments = ["--mnist", str(tmp_path), "--seeds", "2"]
    result = classifier.main([*arguments, "--out", str(tmp_path / "out")])
    rows = {(row["method"], row["lora_r1"], row["scale"]): row for row in result["rows"]}
    sparse = itertools.product(("shira", "waveft"), (0.1, 1.0), (1.0, 25.0))
    assert {key: row["parameters"] for key, row in rows.items()} == {
        ("lora", 1.0, 1.0): 794,
        **{key: {0.1: 79, 1.0: 794}[key[1]] for key in sparse},
    }
    assert rows["shira", 1.0, 1.0]["accuracy"]["mean"] > 0.6
    for scale in ("1", "25"):
        assert set(result["by_scale"][scale]["minus_lora"]["shira"]) == {"1.0"}
    written = json.loads((tmp_path / "out" / "waveft_classifier_mnist.json").read_text())
    assert written["setting"]["mnist"] is True and str(tmp_path) not in json.dumps(written)


@pytest.mark.parametrize("scale", [1.0, 25.0])
def test_classifier_trains_as_the_paper_says(scale):
    # A.2: cross-entropy, batches of 64, Adam at 0.01, halved every 5 epochs, by a softmax
    # regression written here whose entries are zero but at the places.
    classifier, tools, epochs = script("waveft_classifier"), script("paper_tools"), 12
    (x, y), test = classifier.splits(None, 0)
    x, y = x[:200], y[:200]
    inputs, targets = x.double().numpy(), np.eye(10)[y.numpy()]
    row, column = wara.adapters.sparse.draw_places((10, 64), 74, 3).numpy()
    order = torch.Generator().manual_seed(5)
    batches = [
        batch.numpy()
        for _ in range(epochs)
        for batch in torch.randperm(200, generator=order).split(64)
    ]
    assert [len(batch) for batch in batches[:4]] == [64, 64, 64, 8]

    def weight(values):
        full = np.zeros((10, 64))
        full[row, column] = scale * values
        return full

    def gradient(step, values):
        batch = batches[step]
        chances = scipy.special.softmax(inputs[batch] @ weight(values).T, 1)
        slope = (chances - targets[batch]).T @ inputs[batch] / len(batch)
        return scale * slope[row, column]

    rates = [0.01 * 0.5 ** (t // 4 // 5) for t in range(len(batches))]
    want = weight(adam(gradient, np.zeros(74), rates))
    method = SHiRA(k=74, seed=3, scale=scale, targets=("*",))
    model = classifier.train(method, (10, 64), (x, y), 5, epochs)
    np.testing.assert_allclose(tools.update_of(model), want, atol=2e-3 * abs(want).max())
    assert (classifier.EPOCHS, classifier.RANKS) == (50, (1, 2, 3, 4, 5, 6))
    hits = (test[0].numpy() @ want.T).argmax(1) == test[1].numpy()
    assert classifier.accuracy(model, test) == pytest.approx(hits.mean(), abs=0.005)


def test_digits_are_split_by_the_seed_alone():
    classifier = script("waveft_classifier")
    (x, y), (x_test, y_test) = classifier.splits(None, 1)
    assert (len(x), len(x_test)) == (1257, 540) and x.min() == 0 and x.max() == 1
    assert (y.bincount() / 1257 - y_test.bincount() / 540).abs().max() < 0.002
    assert torch.equal(classifier.splits(None, 1)[0][1], y)
    assert not torch.equal(classifier.splits(None, 2)[0][1], y)


def test_verdict_follows_the_interval():
    verdict = script("waveft_classifier").verdict

    def words(shira, waveft, scale=1.0):
        rows = [
            {"method": name, "lora_r1": 1.0, "scale": s, "accuracies": values}
            for name, values, s in (
                ("shira", shira, scale),
                ("waveft", waveft, scale),
                ("lora", [0.5, 0.6, 0.7], 1.0),
            )
        ]
        return verdict(rows)["by_scale"][f"{scale:g}"]

    assert words([0.9, 0.91, 0.92], [0.8, 0.8, 0.81])["observation"] == "SHiRA is ahead"
    found = words([0.8, 0.8, 0.81], [0.9, 0.91, 0.9], 25.0)
    assert found["observation"] == "WaveFT is ahead"
    assert found["minus_lora"]["waveft"]["1.0"]["mean"] == pytest.approx((0.4 + 0.31 + 0.2) / 3)
    assert "not decided" in words([0.8, 0.9, 0.85], [0.9, 0.8, 0.86])["observation"]
    # By hand: differences 0.1, 0.2 have mean 0.15, sd 0.0707, t(0.975, 1) = 12.706.
    interval = script("paper_tools").interval([0.1, 0.2])
    assert interval["low"] == pytest.approx(0.15 - 12.706 * 0.05, abs=1e-4)


def percent(found: dict) -> str:
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def test_stored_classifier_result_is_consistent():
    classifier, result = script("waveft_classifier"), stored("waveft_classifier_digits")
    again = script("paper_tools").rounded(classifier.verdict(result["rows"]))
    for scale, found in result["by_scale"].items():
        assert again["by_scale"][scale]["observation"] == found["observation"]
        for size, difference in found["shira_minus_waveft"].items():
            mean = again["by_scale"][scale]["shira_minus_waveft"][size]["mean"]
            assert difference["mean"] == pytest.approx(mean, abs=1e-5)
    rows = {(row["method"], row["lora_r1"], row["scale"]): row for row in result["rows"]}
    for row in rows.values():
        wanted = row["lora_r1"] * 74
        assert abs(row["parameters"] - wanted) <= 0.5 and 0 < row["accuracy"]["mean"] < 1
    text = documented()
    for scale in (1.0, 25.0):
        found = result["by_scale"][f"{scale:g}"]
        assert percent(found["shira_minus_waveft_mean_over_sizes"]) in text
        for name in ("shira", "waveft"):
            last = found["minus_lora"][name]["6.0"]
            ahead = last if scale == 25 else {"mean": -last["mean"], "low": -last["high"],
                                              "high": -last["low"]}  # fmt: skip
            assert ahead["low"] > 0 and percent(ahead) in text
            first = found["minus_lora"][name]
            assert all(
                first[f"{r}.0"]["low"] > 0 for r in ((1, 2, 3, 4, 5) if scale == 25 else (1, 2, 3))
            )
        fits = [rows[name, 6.0, scale]["training_accuracy"]["mean"] for name in ("shira", "waveft")]
        assert f"{100 * min(fits):.1f} to {100 * max(fits):.1f} %" in text
        for size in (*classifier.BELOW, *map(float, classifier.RANKS)):
            shira, waveft = rows["shira", size, scale], rows["waveft", size, scale]
            lora = rows.get(("lora", size, 1.0))
            cells = [
                f"{size:g}",
                str(shira["parameters"]),
                percent(shira["accuracy"]),
                percent(waveft["accuracy"]),
                percent(found["shira_minus_waveft"][str(size)]),
                percent(lora["accuracy"]) if lora else "",
            ]
            assert f"| {' | '.join(cells)} |" in text


# -- SDXL ----------------------------------------------------------------------------------


def test_sdxl_formula_by_hand():
    sdxl = script("sdxl_budget")
    # 10 blocks of width 640 and 60 of width 1280, text of width 2048.
    assert sdxl.by_formula(sdxl.SDXL) == 10 * (14 * 640 + 4096) + 60 * (14 * 1280 + 4096)


@pytest.mark.slow
def test_sdxl_budget_is_the_papers(tmp_path):
    pytest.importorskip("diffusers")
    result = script("sdxl_budget").main(["--out", str(tmp_path)])
    assert result["formula"] == 1_451_520 and result["agrees"]
    for method in result["methods"].values():
        assert method["wanted"] == method["fitted"] == method["adapted"] == 1_451_520
    assert result["methods"]["waveft"]["per_matrix"] == 2592
    assert result["unet_parameters"] == 2_567_463_684  # what diffusers loads for SDXL
    assert stored("sdxl_budget") == json.loads(json.dumps(result))
    text = documented()
    for row in result["budgets"]:
        assert row["wanted"] == round(row["lora_r1"] * 1_451_520)
        for name in ("shira", "waveft"):  # one number more or less for each of 560 matrices
            assert abs(row[name] - row["wanted"]) <= 280 and row[name] % 560 == 0
        # LoRA has whole ranks only; more than a tenth too large is refused.
        whole = row["lora_r1"] == int(row["lora_r1"])
        assert (row["lora"] == row["wanted"]) if whole else (row["lora"] in (None, 1_451_520))
        cells = [f"{row[key]:,}" if row[key] else "none" for key in ("lora", "shira", "waveft")]
        assert f"| {row['lora_r1']:g} | {row['wanted']:,} | {' | '.join(cells)} |" in text


# -- subbands of trained runs --------------------------------------------------------------


def make_run(folder: Path, name: str, **options) -> Path:
    """A run folder with an adapter that moves every subband, as training would leave it."""
    config = tiny_config(folder, out=str(folder / name))
    method = {"method": "wara", "rank": 2, "level": 1, **options}
    config = tiny_config(folder, out=str(folder / name), adapter=method)
    run = folder / name
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    model, info = build_backbone(
        "test_vit", num_classes=3, img_size=32, weights=config.backbone.weights
    )
    wara.adapt(model, method_from_options(method.pop("method"), method))
    torch.manual_seed(len(name))
    for key, parameter in wara.trainable_parameters(model).items():
        if key.endswith("adapter.up"):
            torch.nn.init.normal_(parameter, std=0.1)
    wara.save_adapter(
        model, run / "adapter", backbone=info, task="multiclass", classes=list(CLASSES)
    )
    metrics = {
        "synthetic": False, "dataset": "data", "backbone": info.name, "method": config.adapter.name,
        "seed": 0, "adapter_params": 1, "head_params": 1, "epochs": 1, "best_epoch": 1,
        "monitor": "auc_macro", "seconds": 1.0, "peak_memory_mb": 1.0, "val": {}, "test": {},
    }  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(metrics))
    provenance = {
        "status": "finished",
        "synthetic": False,
        "seed": 0,
        "data": {"name": "data"},
        "backbone": {"name": info.name, "requested": "test_vit"},
        "versions": {},
    }
    (run / "provenance.json").write_text(json.dumps(provenance))
    with (run / "splits.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "label_index", "patient", "split", "sha256",
                        "synthetic"])  # fmt: skip
        for i in range(6):
            path = f"images/{CLASSES[0]}_{i:03d}.png"
            content = (folder / "data" / path).read_bytes()
            split = "test" if i % 2 else "train"
            digest = hashlib.sha256(content).hexdigest()
            table.writerow([path, CLASSES[0], 0, "", split, digest, "false"])
    return run


@pytest.mark.slow
def test_subbands_over_several_runs(tmp_path):
    subbands = script("wara_subbands")
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "three", core="full")]
    out = tmp_path / "out"
    result = subbands.main([*map(str, runs), "--out", str(out)])
    one, three = result["runs"]
    assert one["images"] == 3  # the test images, not those of training
    for run in (one, three):
        assert math.fsum(run["share"].values()) == pytest.approx(1)
        assert set(run["share"]) == {"LL_1", "LH_1", "HL_1", "HH_1"}
    # The update of an identity core is that of LoRA, so its spectrum is that of B A.
    layer, spectra = next(iter(one["singular_values"].items()))
    loaded = load_run(runs[0])
    adapter = loaded.model().get_submodule(layer.split("[")[0]).adapter
    group = "qkv".find(layer[-2]) if "[" in layer else 0
    up = adapter.up.split(adapter.sizes)[group]
    product = adapter.scale * up @ adapter.down.reshape(adapter.groups, 2, -1)[group]
    want = np.linalg.svd(product.detach().numpy(), compute_uv=False)[:2]
    np.testing.assert_allclose(spectra["LL_1"], want, rtol=1e-4)
    # The images are those that evaluation reads, in the order of the table.
    path = tmp_path / "data" / "images" / f"{CLASSES[0]}_001.png"
    torch.testing.assert_close(subbands.run_images(loaded, 1)[0], load_tensor(path, loaded.spec))
    names = {path.name for path in out.iterdir()}
    assert {"wara_subbands.json", "wara_subbands.png"} < names and len(names) == 6


def test_subbands_refuse_what_is_not_of_the_run(tmp_path):
    subbands = script("wara_subbands")
    with pytest.raises(WaraError, match="not the folder of a run"):
        subbands.main([str(tmp_path), "--out", str(tmp_path)])
    lora = make_run(tmp_path, "lora")
    changed = tmp_path / "data" / "images" / f"{CLASSES[0]}_001.png"
    before = changed.read_bytes()
    changed.write_bytes((changed.parent / f"{CLASSES[0]}_002.png").read_bytes())
    with pytest.raises(WaraError, match="is not the one of the run"):
        subbands.main([str(lora), "--out", str(tmp_path)])
    changed.write_bytes(before)
    subbands.main([str(lora), "--out", str(tmp_path / "again")])


def test_stored_subbands_are_those_of_the_docs():
    text = documented()
    for run in stored("wara_subbands")["runs"]:
        assert not run["synthetic"] and len(run["energy"]) == 48
        shares = " | ".join(f"{share:.2f}" for share in run["share"].values())
        spectra = [v for layer in run["singular_values"].values() for v in layer.values() if v[0]]
        curve = np.mean([np.divide(values, values[0]) for values in spectra], 0)
        decay = ", ".join(f"{value:.2f}" for value in curve[1:])
        row = f"| `{run['method']}`, rank {len(curve)} | {shares} | 1, {decay} |"
        assert row in text
