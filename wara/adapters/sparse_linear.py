"""Arithmetic of a linear layer whose weight changes by few entries or few wavelet coefficients.

`y = x (W0 + ΔW)ᵀ + b`, where `ΔW` holds `k` numbers at fixed places (SHiRA), or is the inverse
wavelet transform of such a matrix (WaveFT). One product forward; backward gives the input's
gradient and the `k` numbers' own, never a dense gradient that is kept.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
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
    def features(self) -> int:
        """Transformed output features of all matrices; output features without a transform."""
        if self.bank is None:
            return max(stop for _, stop in self.rows)
        return sum(padded_side(side, self.length) for side in self.sides)

    @property
    def length(self) -> int:
        """Taps `L` of a filter; 1 without a transform."""
        return len(self.bank[0]) if self.bank else 1

    @property
    def dense(self) -> bool:
        """Whether `ΔW` is cheaper to have by a transform of a whole matrix than place by place."""
        reached = sum(self.counts) * self.length**2
        return self.bank is not None and reached > sum(self.sides) * self.in_features

    def sampled(self, device: torch.device, out_features: int) -> bool:
        """Whether to take `k` dot products over the tokens and not a product of all with all.

        On a CPU one of the dot products costs as much per token as about 8 multiply-adds of a
        dense product, laying out a feature 90, transforming it 40 and 17 per tap (found by timing
        both ways, 128 to 768 wide, one thread and two). Where matrix products have hardware of
        their own, nothing sparse comes near them.
        """
        if device.type != "cpu":
            return False
        feature = 90 + (40 + 17 * self.length if self.bank else 0)
        sparse = 8 * sum(self.counts) + feature * (self.features + self.in_features)
        return sparse < out_features * self.in_features


@dataclass(frozen=True)
class Index:
    """Where the numbers of a layer act; see `index_places`.

    Args:
        left: `[k]`, the transformed output feature that a number belongs to.
        right: `[k]`, the transformed input feature.
        crow: `[features + 1]`, with `column` the pairs `(left, right)` as a sparse matrix, row by
            row: where each row begins.
        column: `[k]`, `right` in that order.
        back: `[k]`, where in that order each number is.
        touched: `[u]`, flat places of the weight that some number changes, each once.
        slot: `[e]`, for each pair of a number and a place it changes: which of `touched`.
        source: `[e]`, which number.
        taps: `[e]`, by how much.
    """

    left: Tensor
    right: Tensor
    crow: Tensor
    column: Tensor
    back: Tensor
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
        The index, on the CPU; `touched` and what follows are empty where `form.dense`.
    """
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
    left, right = torch.cat(lefts), torch.cat(rights)
    order = (left * int(right.max() + 1) + right).argsort()
    ends = left.bincount(minlength=form.features).cumsum(0)
    index = Index(
        left,
        right,
        torch.cat([ends.new_zeros(1), ends]),
        right[order],
        order.argsort(),
        touched,
        slot,
        torch.cat(sources or nothing),
        torch.cat(taps or nothing).to(dtype),
    )
    with warnings.catch_warnings():
        # Once per process torch remarks that its sparse tensors are in beta: here, unheard.
        warnings.simplefilter("ignore")
        _csr(
            index,
            torch.zeros(len(left), dtype=dtype),
            (form.features, int(right.max()) + 1),
            check=True,
        )
    return index


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

    For input `x` `[n, d]` and output gradient `dy` `[n, o]`, with `X̃`, `Ỹ` their transforms along
    the features, the gradient of the number at `(left, right)` is `Σ_n Ỹ[n, left] X̃[n, right]`.
    """
    # A compiler has no sparse products, and autograd no second derivative of them.
    plain = not (torch.compiler.is_compiling() or torch.is_grad_enabled())
    if plain and form.sampled(x.device, dy.shape[1]):
        return _sampled(x, dy, values, index, form)
    dense = dy.t() @ x
    if form.dense:
        assert form.bank is not None
        parts = []
        for (start, stop), (_, place, _) in zip(
            form.rows, _by_matrix(form, index, values), strict=True
        ):
            grid = synthesis_adjoint(dense[start:stop].to(values.dtype), form.bank, 0)
            grid = synthesis_adjoint(grid, form.bank, 1)
            parts.append(grid.reshape(-1).index_select(0, place))
        return torch.cat(parts)
    entries = dense.reshape(-1).index_select(0, index.touched).to(values.dtype)
    pulled = entries.index_select(0, index.slot) * index.taps
    return torch.zeros_like(values).index_add(0, index.source, pulled)


def _sampled(x: Tensor, dy: Tensor, values: Tensor, index: Index, form: Form) -> Tensor:
    total = torch.zeros_like(values)
    for begin in range(0, x.shape[0], CHUNK):
        # Features first: the dot products then run along memory.
        right = x[begin : begin + CHUNK].t().to(values.dtype).contiguous()
        left = dy[begin : begin + CHUNK, : dy.shape[1] if form.bank else form.features]
        left = left.t().to(values.dtype).contiguous()
        if form.bank is not None:
            right = synthesis_adjoint(right, form.bank, 0)
            left = torch.cat([synthesis_adjoint(left[a:b], form.bank, 0) for a, b in form.rows])
        held = _csr(index, total, (left.shape[0], right.shape[0]))
        total = torch.sparse.sampled_addmm(held, left, right.t()).values()
    return total.index_select(0, index.back)


def _csr(index: Index, values: Tensor, shape: tuple[int, int], check: bool = False) -> Tensor:
    return torch.sparse_csr_tensor(index.crow, index.column, values, shape, check_invariants=check)


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
