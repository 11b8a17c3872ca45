"""Arithmetic of a linear layer whose weight changes by few entries or few wavelet coefficients.

`y = x (W0 + ΔW)ᵀ + b`, where `ΔW` holds `k` numbers at fixed places (SHiRA), or is the inverse
wavelet transform of such a matrix (WaveFT). One product forward; backward gives the input's
gradient and the `k` numbers' own, never a dense gradient that is kept.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wara.adapters.base import Rows
from wara.wavelets import Bank, padded_side, synthesis, synthesis_adjoint

CHUNK = 512
"""Tokens whose features are laid out at a time, so that they stay in the cache."""


@dataclass(frozen=True)
class Form:
    """What is fixed about the update of a layer.

    Args:
        rows: row ranges of the `g` matrices that are updated.
        counts: `k` of each.
        in_features: `d`.
        bank: filters of the transform; none for entries of the weight itself.
    """

    rows: tuple[Rows, ...]
    counts: tuple[int, ...]
    in_features: int
    bank: Bank | None

    @property
    def sides(self) -> tuple[int, ...]:
        """Height of each matrix."""
        return tuple(stop - start for start, stop in self.rows)

    @property
    def length(self) -> int:
        """Taps `L` of a filter; 1 without a transform."""
        return len(self.bank[0]) if self.bank else 1

    @property
    def dense(self) -> bool:
        """Whether `ΔW` is cheaper to have by a transform of a whole matrix than place by place."""
        reached = sum(self.counts) * self.length**2
        return self.bank is not None and reached > sum(self.sides) * self.in_features

    def sampled(self, device: torch.device, entries: int, out_features: int) -> bool:
        """Whether to take a dot product over the tokens for each entry of the weight that changes.

        The other way is a product of all output with all input features. On a CPU one of the dot
        products costs as much per token as about 8 multiply-adds of it, laying out a feature 90
        (found by timing both, 128 to 768 wide, one thread and two). Where matrix products have
        hardware of their own, nothing sparse comes near them.
        """
        if device.type != "cpu" or self.dense:
            return False
        sparse = 8 * entries + 90 * (out_features + self.in_features)
        return sparse < out_features * self.in_features


@dataclass(frozen=True)
class Index:
    """Where the numbers of a layer act; see `index_places`.

    Args:
        left: `[k]`, the transformed output feature that a number belongs to.
        right: `[k]`, the transformed input feature.
        touched: `[u]`, flat places of the weight that some number changes, each once.
        slot: `[e]`, for each pair of a number and a place it changes: which of `touched`.
        source: `[e]`, which number.
        taps: `[e]`, by how much.
    """

    left: Tensor
    right: Tensor
    touched: Tensor
    slot: Tensor
    source: Tensor
    taps: Tensor


def index_places(places: Tensor, form: Form, dtype: torch.dtype) -> Index:
    """Work out once what each number of a layer changes.

    A coefficient at `(i, j)` of the quadrants `[[LL, LH], [HL, HH]]` adds the outer product of two
    filters to `ΔW`, so `L²` entries, fewer at the border.

    Args:
        places: `[2, Σk]`, row within its matrix, and column, of each number, matrix after matrix.
            With a longer wavelet than Haar there are more coefficients than entries; places then
            count from the middle of them.
        form: see `Form`.
        dtype: of the taps.

    Returns:
        The index, on the CPU; the last four are empty where `form.dense`.
    """
    _hear_torch_out()
    places = places.detach().cpu().long()
    lefts, rights, flats, taps, sources = [], [], [], [], []
    before = offset = 0
    for (start, stop), place in zip(form.rows, places.split(list(form.counts), 1), strict=True):
        numbers = torch.arange(before, before + place.shape[1])
        before += place.shape[1]
        if form.bank is None:
            lefts.append(place[0] + start)
            rights.append(place[1])
            flats.append((place[0] + start) * form.in_features + place[1])
            taps.append(torch.ones(place.shape[1], dtype=torch.float64))
            sources.append(numbers)
            continue
        height, width = stop - start, form.in_features
        half_rows, half_columns = (padded_side(n, form.length) // 2 for n in (height, width))
        middle = form.length // 2 - 1
        row, column = place[0] + middle, place[1] + middle
        # LH, high-pass across rows, is the quadrant on the right; HL the one below.
        high_row, high_column = column >= half_columns, row >= half_rows
        row, column = row % half_rows, column % half_columns
        lefts.append(offset + row + half_rows * high_row)
        rights.append(column + half_columns * high_column)
        offset += 2 * half_rows
        if form.dense:
            continue
        t, row_taps = _reach(row, high_row, form.bank)
        u, column_taps = _reach(column, high_column, form.bank)
        inside = ((t >= 0) & (t < height))[:, :, None] & ((u >= 0) & (u < width))[:, None, :]
        weights = row_taps[:, :, None] * column_taps[:, None, :]
        inside &= weights != 0
        flats.append(((t[:, :, None] + start) * width + u[:, None, :])[inside])
        taps.append(weights[inside])
        sources.append(numbers[:, None, None].expand_as(inside)[inside])
    nothing = [torch.zeros(0, dtype=torch.int64)]
    touched, slot = torch.unique(torch.cat(flats or nothing), return_inverse=True)
    return Index(
        torch.cat(lefts),
        torch.cat(rights),
        touched,
        slot,
        torch.cat(sources or nothing),
        torch.cat(taps or nothing).to(dtype),
    )


@lru_cache(maxsize=1)
def _hear_torch_out() -> None:
    """Let torch say, once per process and to nobody, that its sparse tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), device="cpu", check_invariants=False)


def _reach(place: Tensor, high: Tensor, bank: Bank) -> tuple[Tensor, Tensor]:
    """Return the entries that a coefficient along one axis reaches, and by which tap, `[k, L]`."""
    low_taps, high_taps = (torch.tensor(f, dtype=torch.float64) for f in bank)
    steps = torch.arange(len(low_taps))
    reached = 2 * place[:, None] + steps - (len(low_taps) - 2)
    return reached, torch.where(high[:, None], high_taps, low_taps)


def changed_weight(
    weight: Tensor, values: Tensor, index: Index, form: Form, dtype: torch.dtype
) -> Tensor:
    """Return `W0 + ΔW`, summed in the precision of `values`.

    Args:
        weight: `W0`, `[o, d]`.
        values: `λ` times the `k` numbers, float32 or float64.
        index: where they act.
        form: see `Form`.
        dtype: of the result.

    Returns:
        `[o, d]`, a tensor of its own.
    """
    if form.dense:
        total = weight.to(values.dtype, copy=True)
        for (start, stop), change in zip(form.rows, _transformed(values, index, form), strict=True):
            total[start:stop] += change
        return total.to(dtype)
    change = values.new_zeros(index.touched.shape[0])
    change = change.index_add(0, index.slot, values.index_select(0, index.source) * index.taps)
    # Few entries change, so the weight is copied in the precision of the product, and only the
    # changed entries are summed in full precision and rounded once.
    held = weight.reshape(-1).index_select(0, index.touched).to(values.dtype)
    copy = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
    copy.view(-1).index_copy_(0, index.touched, (held + change).to(dtype))
    return copy


def _transformed(values: Tensor, index: Index, form: Form) -> list[Tensor]:
    """Return `ΔW` of each matrix by the inverse transform of all its coefficients."""
    assert form.bank is not None
    columns = padded_side(form.in_features, form.length)
    changes = []
    for side, place, part in _by_matrix(form, index, values):
        grid = values.new_zeros(padded_side(side, form.length) * columns)
        grid = grid.index_add(0, place, part).reshape(-1, columns)
        matrix = synthesis(synthesis(grid, form.bank, 0), form.bank, 1)
        changes.append(matrix[:side, : form.in_features])
    return changes


def _by_matrix(form: Form, index: Index, values: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Return height, flat places among the sorted coefficients, and numbers of each matrix."""
    columns = padded_side(form.in_features, form.length)
    counts, offset, found = list(form.counts), 0, []
    parts = zip(
        form.sides,
        index.left.split(counts),
        index.right.split(counts),
        values.split(counts),
        strict=True,
    )
    for side, left, right, part in parts:
        found.append((side, (left - offset) * columns + right, part))
        offset += padded_side(side, form.length)
    return found


def values_gradient(x: Tensor, dy: Tensor, values: Tensor, index: Index, form: Form) -> Tensor:
    """Return the gradient of the `k` numbers, `[k]`.

    For input `x` `[n, d]` and output gradient `dy` `[n, o]` the gradient of the weight is `dyᵀ x`.
    A number's is the sum over the entries it changes, each times its tap; or, where nearly all
    entries change, what the transposed transform makes of the whole.
    """
    if form.dense:
        assert form.bank is not None
        dense, parts = dy.t() @ x, []
        for (start, stop), (_, place, _) in zip(
            form.rows, _by_matrix(form, index, values), strict=True
        ):
            grid = synthesis_adjoint(dense[start:stop].to(values.dtype), form.bank, 0)
            grid = synthesis_adjoint(grid, form.bank, 1)
            parts.append(grid.reshape(-1).index_select(0, place))
        return torch.cat(parts)
    # A compiler has no sparse products, and autograd no second derivative of them.
    plain = not (torch.compiler.is_compiling() or torch.is_grad_enabled())
    if plain and form.sampled(x.device, index.touched.shape[0], dy.shape[1]):
        entries = _sampled(x, dy, index.touched, values.dtype)
    else:
        entries = (dy.t() @ x).reshape(-1).index_select(0, index.touched).to(values.dtype)
    pulled = entries.index_select(0, index.slot) * index.taps
    return torch.zeros_like(values).index_add(0, index.source, pulled)


def _sampled(x: Tensor, dy: Tensor, touched: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the entries of `dyᵀ x` at the sorted flat places `touched`."""
    shape = (dy.shape[1], x.shape[1])
    row, column = touched // shape[1], touched % shape[1]
    crow = torch.zeros(shape[0] + 1, dtype=torch.int64)
    crow[1:] = row.bincount(minlength=shape[0]).cumsum(0)
    total = torch.zeros(len(touched), dtype=dtype)
    held = torch.sparse_csr_tensor(crow, column, total, shape, check_invariants=False)
    for begin in range(0, x.shape[0], CHUNK):
        # Features first: the dot products then run along memory.
        left = dy[begin : begin + CHUNK].t().to(dtype).contiguous()
        right = x[begin : begin + CHUNK].t().to(dtype).contiguous()
        held = torch.sparse.sampled_addmm(held, left, right.t())
    return held.values()


class SparseLinear(torch.autograd.Function):
    """`y = x (W0 + ΔW)ᵀ + b` with `k` numbers behind `ΔW`.

    Saved for backward are `x`, and no weight but the frozen one: the changed weight is made anew,
    for making it costs a copy of `W0`, and keeping it would cost one per layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        form: Form,
        *index: Tensor,
    ) -> Tensor:
        """Return `[n, o]` for `[n, d]`; `index` are the fields of `Index`."""
        ctx.form = form
        ctx.save_for_backward(x, weight, values, *index)
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, changed_weight(weight, values, Index(*index), form, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of input, `k` numbers and, where they train, weight and bias."""
        (dy,) = gradients
        x, weight, values, *tensors = ctx.saved_tensors
        index, form = Index(*tensors), ctx.form
        wants_x, wants_weight, wants_bias, wants_values = ctx.needs_input_grad[:4]
        dx = dw = db = dv = None
        if wants_x:
            dx = dy @ changed_weight(weight, values, index, form, dy.dtype)
        if wants_weight:
            dw = (dy.t() @ x).to(weight.dtype)
        if wants_bias:
            db = dy.sum(0)
        if wants_values:
            dv = values_gradient(x, dy, values, index, form)
        return dx, dw, db, dv, None, *(None for _ in tensors)
