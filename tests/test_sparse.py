"""WaveFT and SHiRA, held against PyWavelets, against PEFT, and against plain autograd."""

import copy

import pytest
import pywt
import torch
from oracles import option_faults
from torch import nn
from torch.nn import functional as F

import wara
from wara.adapters import METHODS, count_parameters, method_from_options
from wara.adapters.base import AdaptedLinear, adapted_layers
from wara.adapters.sparse import GAUSSIAN, SparseLayer, allocate, draw_places
from wara.adapters.sparse_linear import Form, SparseLinear
from wara.adapters.targets import Target
from wara.errors import WaraError, WaraErrors

SHAPES = [(16, 16), (32, 12), (10, 40), (13, 17), (15, 24)]
FAMILIES = ["haar", "db2", "db4", "sym3", "coif1"]
BIORTHOGONAL = ["bior2.2", "rbio1.3"]
WAYS = [(dense, sampled) for dense in (False, True) for sampled in (False, True)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
families = pytest.mark.parametrize("wavelet", FAMILIES)
every_way = pytest.mark.parametrize(
    "way", WAYS, indirect=True, ids=lambda w: f"dense{w[0]:d}-sampled{w[1]:d}"
)


@pytest.fixture
def way(request, monkeypatch):
    """Take one of the four ways of computing, whatever the size of the layer says."""
    dense, sampled = request.param
    monkeypatch.setattr(Form, "dense", property(lambda self: dense and self.bank is not None))
    monkeypatch.setattr(Form, "sampled", lambda self, device, entries, out: sampled)


def layer(shape, wavelet="haar", k=20, groups=1, seed=3, dtype=torch.float32, scale=25.0):
    """Return a linear layer of `groups` matrices of one shape, and its adapter, not at zero."""
    o, d = shape
    torch.manual_seed(seed)
    linear = nn.Linear(d, o * groups).requires_grad_(False)
    rows = tuple((g * o, (g + 1) * o) for g in range(groups))
    places = [draw_places(shape, k, seed + g) for g in range(groups)]
    target = Target("linear", linear, rows, tuple("qkv"[:groups]))
    adapter = SparseLayer(target, places, scale=scale, wavelet=wavelet)
    nn.init.normal_(adapter.coefficients)
    return AdaptedLinear(linear, adapter).to(dtype)


def pywt_delta(adapted):
    """Return `λ ΔW` by PyWavelets: the coefficients in the middle of a larger matrix of them."""
    adapter, d = adapted.adapter, adapted.in_features
    out = torch.zeros(adapted.out_features, d, dtype=torch.float64)
    counts = list(adapter.form.counts)
    parts = zip(
        adapter.rows,
        adapter.places.split(counts, 1),
        adapter.coefficients.detach().double().split(counts),
        strict=True,
    )
    length = pywt.Wavelet(adapter.wavelet).dec_len
    for (start, stop), (row, column), values in parts:
        sides = [n + length - 2 + n % 2 for n in (stop - start, d)]
        c = torch.zeros(sides, dtype=torch.float64)
        c[row.long() + length // 2 - 1, column.long() + length // 2 - 1] = values
        h, w = sides[0] // 2, sides[1] // 2
        bands = (c[:h, :w], (c[:h, w:], c[h:, :w], c[h:, w:]))
        full = pywt.idwt2((bands[0].numpy(), tuple(b.numpy() for b in bands[1])), adapter.wavelet)
        out[start:stop] = torch.from_numpy(full)[: stop - start, :d]
    return adapter.scale * out


@shapes
@pytest.mark.parametrize("wavelet", FAMILIES + BIORTHOGONAL)
@pytest.mark.parametrize("way", WAYS[::2], indirect=True, ids=["sparse", "dense"])
def test_delta_weight_is_the_inverse_transform(shape, wavelet, way):
    adapted = layer(shape, wavelet, groups=2, dtype=torch.float64)
    got = adapted.adapter.delta_weight()
    torch.testing.assert_close(got, pywt_delta(adapted), atol=1e-12, rtol=0)


def test_delta_weight_of_shira_holds_the_numbers_at_their_places():
    adapted = layer((9, 7), None, k=11, groups=2, scale=2.0)
    adapter = adapted.adapter
    delta = adapter.delta_weight()
    assert (delta != 0).sum() == 22
    row, column = adapter.places[:, 11:].long()
    torch.testing.assert_close(delta[9 + row, column], 2 * adapter.coefficients[11:])


@every_way
@pytest.mark.parametrize("wavelet", ["haar", "db3", "bior2.2", None])
@pytest.mark.parametrize("shape", [(12, 16), (13, 11)], ids=["even", "odd"])
def test_forward_and_gradients_are_those_of_plain_autograd(shape, wavelet, way):
    adapted = layer(shape, wavelet, groups=3, dtype=torch.float64)
    x = torch.randn(2, 5, shape[1], dtype=torch.float64, requires_grad=True)
    y = adapted(x)
    # The oracle differentiates through a dense weight, one unit coefficient after the other.
    numbers = adapted.adapter.coefficients
    probe = copy.deepcopy(adapted.adapter)
    units = []
    for i in range(len(numbers)):
        probe.coefficients.data.zero_()[i] = 1
        units.append(probe.delta_weight().detach())
    c = numbers.detach().clone().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    weight = adapted.weight + torch.einsum("k,kod->od", c, torch.stack(units))
    y2 = F.linear(x2, weight, adapted.bias)
    torch.testing.assert_close(y, y2, atol=1e-10, rtol=0)
    g = torch.randn_like(y)
    y.backward(g)
    y2.backward(g)
    torch.testing.assert_close(x.grad, x2.grad, atol=1e-10, rtol=0)
    torch.testing.assert_close(numbers.grad, c.grad, atol=1e-9, rtol=0)
    assert adapted.weight.grad is None and adapted.bias.grad is None


@every_way
@pytest.mark.parametrize("wavelet", ["haar", "db2", None])
def test_gradcheck(wavelet, way):
    adapted = layer((6, 5), wavelet, k=7, dtype=torch.float64, scale=1.5)
    adapter = adapted.adapter
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = adapted.weight.detach().requires_grad_()
    bias = adapted.bias.detach().requires_grad_()
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def f(x, weight, bias, values):
        return SparseLinear.apply(x, weight, bias, values, adapter.form, *adapter._index())

    assert torch.autograd.gradcheck(f, (x, weight, bias, values))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias, values))


def test_the_way_follows_from_the_size():
    cpu = torch.device("cpu")

    def form(side, k, length=2):
        bank = ((0.0,) * length, (0.0,) * length) if length else None
        return Form(((0, side),), (k,), side, bank)

    assert form(384, 768).sampled(cpu, 4 * 768, 384)
    assert not form(128, 256).sampled(cpu, 4 * 256, 128)
    assert not form(384, 768).sampled(torch.device("cuda"), 4 * 768, 384)
    # The dense product takes all rows of a fused layer, adapted or not.
    assert form(192, 384).sampled(cpu, 384, 3 * 192) and not form(192, 384).sampled(cpu, 384, 192)
    assert not form(384, 768).dense and form(384, 768, 20).dense
    assert not form(384, 384 * 384, 0).dense


def sampled_gradient(tokens):
    """Return a layer wide enough for the sampled way, input, output gradient, and its numbers'."""
    adapted = layer((384, 384), "haar", k=40)
    assert adapted.adapter.form.sampled(torch.device("cpu"), 160, 384)
    x, g = torch.randn(tokens, 384), torch.randn(tokens, 384)
    adapted(x).backward(g)
    gradient = adapted.adapter.coefficients.grad.clone()
    adapted.adapter.coefficients.grad = None
    return adapted, x, g, gradient


def test_chunks_of_tokens_add_up():
    adapted, x, g, whole = sampled_gradient(tokens=600)
    for part in (slice(0, 100), slice(100, 600)):
        adapted(x[part]).backward(g[part])
    torch.testing.assert_close(adapted.adapter.coefficients.grad, whole, rtol=1e-4, atol=1e-2)


def test_low_precision_rounds_only_the_product():
    adapted = layer((32, 32), "db2", k=200, scale=1.0)
    weight = adapted.weight + adapted.adapter.delta_weight()
    x = torch.randn(4, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
        expected = F.linear(x, weight, adapted.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    y.float().sum().backward()
    assert x.grad.dtype == adapted.adapter.coefficients.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert adapted.double()(x.double()).dtype == torch.float64


def test_taps_follow_the_precision_of_the_model():
    adapted = layer((32, 32), "db2")
    before = adapted.adapter.taps.clone()
    adapted.bfloat16()
    assert adapted.adapter.taps.dtype == torch.float32
    torch.testing.assert_close(adapted.adapter.taps, before, rtol=0, atol=0)
    assert adapted.double().adapter.taps.dtype == torch.float64
    assert (adapted.adapter.taps.float() - before).abs().max() == 0


def test_gradient_checkpointing():
    adapted = layer((16, 16))
    x = torch.randn(3, 16, requires_grad=True)
    adapted(x).square().sum().backward()
    expected = adapted.adapter.coefficients.grad.clone()
    adapted.adapter.coefficients.grad = None
    again = torch.utils.checkpoint.checkpoint(adapted, x, use_reentrant=False)
    again.square().sum().backward()
    torch.testing.assert_close(adapted.adapter.coefficients.grad, expected, rtol=0, atol=0)


def test_nothing_dense_is_kept_for_backward():
    adapted = layer((64, 64), k=10)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapted(x)
    dense = [t for t in kept if t.numel() >= 64 * 64]
    assert all(t.data_ptr() == adapted.weight.data_ptr() for t in dense)
    names = [name for name, _ in adapted.named_parameters()]
    assert names == ["weight", "bias", "adapter.coefficients"]


# Against PEFT.


def peft_pair(config, shape, k, wavelet, seed, scale):
    peft = pytest.importorskip("peft")
    o, d = shape
    adapted = layer(shape, wavelet, k=k, seed=seed, scale=scale)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(d, o)), config(peft))
    inner = theirs.base_model.model[0]
    inner.base_layer.load_state_dict({"weight": adapted.weight, "bias": adapted.bias})
    return adapted, theirs, inner


def assert_same(adapted, theirs, inner, parameter, delta, scale):
    """Compare update, output and gradients, relative to the scale of the update."""
    with torch.no_grad():
        parameter.copy_(adapted.adapter.coefficients)
    ours = adapted.adapter.delta_weight()
    torch.testing.assert_close(ours / scale, delta() / scale, atol=1e-6, rtol=0)
    x = torch.randn(2, 7, adapted.in_features, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y, y2 = adapted(x), theirs(x2)
    torch.testing.assert_close(y, y2, atol=2e-6 * scale, rtol=1e-5)
    g = torch.randn_like(y)
    y.backward(g)
    y2.backward(g)
    torch.testing.assert_close(x.grad, x2.grad, atol=2e-6 * scale, rtol=1e-5)
    torch.testing.assert_close(
        adapted.adapter.coefficients.grad / scale, parameter.grad / scale, atol=1e-5, rtol=1e-5
    )


@shapes
@families
@every_way
def test_waveft_is_that_of_peft(shape, wavelet, way):
    adapted, theirs, inner = peft_pair(
        lambda peft: peft.WaveFTConfig(
            n_frequency=24,
            wavelet_family="db1" if wavelet == "haar" else wavelet,
            random_loc_seed=5,
            target_modules=["0"],
        ),
        shape,
        24,
        wavelet,
        5,
        25.0,
    )
    assert torch.equal(adapted.adapter.places.long(), inner.waveft_indices["default"])
    parameter = inner.waveft_spectrum["default"]
    assert_same(adapted, theirs, inner, parameter, lambda: inner.get_delta_weight("default"), 25.0)


@shapes
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_shira_is_that_of_peft(shape):
    k = sum(shape)
    adapted, theirs, inner = peft_pair(
        lambda peft: peft.ShiraConfig(r=1, random_seed=5, target_modules=["0"]),
        shape,
        k,
        None,
        5,
        1.0,
    )
    # PEFT sorts the places; the set is the one we draw.
    theirs_flat = inner.shira_indices["default"][0].long() * shape[1]
    theirs_flat = theirs_flat + inner.shira_indices["default"][1]
    drawn = draw_places(shape, k, 5)
    assert torch.equal((drawn[0] * shape[1] + drawn[1]).sort().values, theirs_flat)
    adapted.adapter.places.copy_(inner.shira_indices["default"])
    adapted.adapter.refresh()
    parameter = inner.shira_weight["default"]
    delta = lambda: inner.get_delta_weight("default").to_dense()  # noqa: E731
    assert_same(adapted, theirs, inner, parameter, delta, 1.0)


@shapes
def test_lora_is_that_of_peft(shape):
    peft = pytest.importorskip("peft")
    o, d = shape
    model = wara.adapt(
        nn.ModuleDict({"a": nn.Sequential(nn.Linear(d, o))}),
        wara.LoRA(rank=3, alpha=6.0, targets=("a.0",)),
    )
    adapted = adapted_layers(model)["a.0"]
    nn.init.normal_(adapted.adapter.up)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(d, o)), config)
    inner = theirs.base_model.model[0]
    inner.base_layer.load_state_dict({"weight": adapted.weight, "bias": adapted.bias})
    a, b = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(adapted.adapter.down)
        b.copy_(adapted.adapter.up)
    ours = adapted.adapter.delta_weight()
    torch.testing.assert_close(ours, inner.get_delta_weight("default"), atol=1e-6, rtol=0)
    x = torch.randn(2, 7, d, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y, y2 = adapted(x), theirs(x2)
    torch.testing.assert_close(y, y2, atol=5e-6, rtol=1e-5)
    g = torch.randn_like(y)
    y.backward(g)
    y2.backward(g)
    for ours, other in ((adapted.adapter.down, a), (adapted.adapter.up, b), (x, x2)):
        torch.testing.assert_close(ours.grad, other.grad, atol=1e-5, rtol=1e-5)


# Options.


class Tower(nn.Module):
    """Linear layers of three shapes, as in no timm model."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"q": nn.Linear(12, 12), "k": nn.Linear(30, 10)})
        self.b = nn.ModuleDict({"q": nn.Linear(12, 24)})

    def forward(self, x):
        return self.b["q"](self.a["q"](x))


EVERY = ("a.*", "b.*")


def sizes(**options):
    model = wara.adapt(Tower(), wara.WaveFT(targets=EVERY, **options))
    return [m.adapter.coefficients.numel() for m in adapted_layers(model).values()]


def test_the_default_is_the_budget_of_a_rank_one_lora():
    assert sizes() == [33, 33, 33]  # (24 + 40 + 36) / 3
    assert sizes(allocation="proportional") == [24, 40, 36]
    assert sizes(budget="lora_r1") == [33, 33, 33]
    assert sizes(budget=0.9) == [30, 30, 30]
    assert sizes(budget="0.6*lora_r2") == [40, 40, 40]


def test_k_is_any_whole_number_or_one_per_matrix():
    assert sizes(k=1) == [1, 1, 1]
    assert sizes(k=144) == [144, 144, 144]
    assert sizes(k=(3, 7, 11)) == [3, 7, 11]
    assert sizes(k=40, allocation="proportional") == [29, 48, 43]
    assert sizes(k=40, allocation="area") == [24, 49, 47]


def test_allocation_keeps_the_total():
    many = [(64, 64), (64, 192), (256, 64), (7, 9)]
    for allocation in ("fixed", "proportional", "area"):
        assert abs(sum(allocate(many, 500, allocation)) - 2000) <= 2


def test_a_model_without_weights_can_be_counted():
    with torch.device("meta"):
        model = Tower()
    wara.adapt(model, wara.WaveFT(k=9, targets=EVERY))
    assert count_parameters(model)["adapter"] == 27
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("method", [wara.WaveFT, wara.SHiRA])
def test_any_module_is_adapted_and_merged_by_patterns(method):
    model = wara.adapt(Tower(), method(targets=("*.q",))).double()
    assert list(adapted_layers(model)) == ["a.q", "b.q"]
    for parameter in wara.trainable_parameters(model).values():
        nn.init.normal_(parameter)
    x = torch.randn(4, 12, dtype=torch.float64)
    merged = wara.merge(model)
    assert type(merged.a["q"]) is nn.Linear
    torch.testing.assert_close(merged(x), model(x), rtol=0, atol=1e-10)


def test_deterministic_algorithms_suffice():
    adapted = layer((16, 16), "haar", k=100)
    x = torch.randn(5, 16, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        adapted(x).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_fused_layer_is_three_matrices():
    import timm

    model = wara.adapt(timm.create_model("test_vit"), wara.WaveFT(k=17, targets=("q", "v")))
    layer0 = next(iter(adapted_layers(model).values()))
    assert layer0.adapter.coefficients.shape == (34,)
    layer0.adapter.coefficients.data.fill_(1)
    delta = layer0.adapter.delta_weight()
    third = layer0.out_features // 3
    assert delta[:third].any() and delta[2 * third :].any() and not delta[third : 2 * third].any()
    assert count_parameters(model)["adapter"] == 34 * len(model.blocks)


def test_the_seed_draws_the_places_and_the_file_keeps_them(tmp_path):
    def model(seed):
        torch.manual_seed(0)
        return wara.adapt(Tower(), wara.SHiRA(k=20, seed=seed, targets=EVERY))

    one, other = model(0), model(1)
    place = "a.q.adapter.places"
    assert not torch.equal(one.get_buffer(place), other.get_buffer(place))
    assert torch.equal(one.get_buffer(place), model(0).get_buffer(place))
    with torch.no_grad():
        one.get_parameter("a.q.adapter.coefficients").normal_()
    # As if the way of drawing had changed since: only the file knows these places.
    moved = one.get_buffer(place)
    moved.copy_(moved.roll(3, 1) % 12)
    one.get_submodule("a.q.adapter").refresh()
    wara.save_adapter(one, tmp_path)
    back = wara.load_adapter(wara.unload(other), tmp_path)
    assert torch.equal(back.get_buffer(place), moved)
    x = torch.randn(3, 12)
    assert torch.equal(back(x), one(x))
    state = one.state_dict()
    fresh = model(5)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), one(x))


def test_places_outside_the_matrix_are_refused():
    adapted = layer((9, 7), None, k=5)
    for bad in (-1, 9):
        adapted.adapter.places[0, 2] = bad
        with pytest.raises(WaraError, match="outside the 9x7 matrix") as caught:
            adapted.adapter.refresh()
        assert caught.value.exit_code == 4


def test_a_place_that_occurs_twice_is_refused():
    adapted = layer((9, 7), "haar", k=5)
    adapted.adapter.places[:, 1] = adapted.adapter.places[:, 0]
    with pytest.raises(WaraError, match="occurs twice in the 9x7 matrix") as caught:
        adapted.adapter.refresh()
    assert caught.value.exit_code == 4


def test_compiled_it_takes_the_dense_way_and_agrees():
    adapted, x, g, expected = sampled_gradient(tokens=5)
    torch.compile(adapted, backend="aot_eager", fullgraph=True)(x).backward(g)
    torch.testing.assert_close(adapted.adapter.coefficients.grad, expected, rtol=1e-4, atol=1e-3)


def test_gaussian_start():
    torch.manual_seed(0)
    model = wara.adapt(Tower(), wara.WaveFT(k=144, init="gaussian", targets=EVERY))
    values = model.get_parameter("b.q.adapter.coefficients")
    assert 0.7 * GAUSSIAN < values.std() < 1.3 * GAUSSIAN


@pytest.mark.parametrize("name", ["waveft", "shira"])
def test_options_make_a_method(name):
    options = {"k": 5, "allocation": "proportional", "init": "gaussian", "scale": 3.0, "seed": 9}
    method = method_from_options(name, options)
    assert isinstance(method, METHODS[name]) and method.k == 5 and method.scale == 3.0
    assert not option_faults({"method": name, "k": [1, 2, 3]})
    assert not option_faults({"method": name, "budget": 0.8})


def test_defaults_are_those_of_the_papers():
    method = wara.WaveFT()
    assert (method.scale, method.wavelet, method.init) == (25.0, "haar", "zero")
    assert wara.SHiRA().scale == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": -3}, "k is -3"),
        ({"k": []}, "k is"),
        ({"k": "many"}, 'k should be a whole number or a list, not "many"'),
        ({"k": 4, "budget": "lora_r1"}, "both set"),
        ({"budget": "lora"}, "not understood"),
        ({"budget": 0.0}, "not understood"),
        ({"wavelet": "harr"}, "did you mean 'haar'"),
        ({"wavelet": "morl"}, "unknown wavelet"),
        ({"allocation": "proportionl"}, "did you mean 'proportional'"),
        ({"init": "ones"}, "choose one of: gaussian, zero"),
        ({"scale": 0.0}, "scale is 0"),
        ({"seed": -1}, "seed should be at least 0, not -1"),
        ({"targets": ["kqv"]}, "unknown target"),
    ],
    ids=str,
)
def test_bad_options(options, words):
    with pytest.raises(WaraErrors, match=words) as caught:
        method_from_options("waveft", options)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 145}, "k is 145, the 12x12 matrix has 144 places.*set k to 144 or less"),
        ({"k": (3, 4)}, "lists 2 numbers for 3 matrices"),
        ({"wavelet": "db6"}, "db6 has 12 taps, the matrix is 10x30"),
        ({"budget": "0.01*lora_r1"}, "has at least 3.*set 0.030?\\*lora_r1"),
        ({"targets": ("c.*",)}, "no linear layer matches"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model(options, words):
    model = Tower()
    with pytest.raises(WaraError, match=words) as caught:
        wara.adapt(model, wara.WaveFT(**{"targets": EVERY, **options}))
    assert caught.value.exit_code == 2
    assert not adapted_layers(model)


def test_a_matrix_too_small_for_its_share_is_refused():
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2), nn.Linear(40, 40)])})
    with pytest.raises(WaraError, match="2x2 matrix would get no place.*set a larger k"):
        wara.adapt(model, wara.SHiRA(k=3, allocation="area", targets=("a.*",)))
