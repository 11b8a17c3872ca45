"""Adapters to and from the format of Hugging Face PEFT, checked by PEFT itself."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import wara
from wara.adapters import adaptation_of, count_parameters
from wara.adapters.base import adapted_layers
from wara.errors import WaraError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Net(nn.Module):
    """Linear layers of several shapes, one of them at the root, and no timm head."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 9))
        self.out = nn.Linear(9, 15)

    def forward(self, x):
        return self.out(self.inner(x))


def vit(classes=4):
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=classes).eval()


def net():
    torch.manual_seed(0)
    return Net().eval()


def shake(model):
    """Give every number that trains another value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


IMAGE = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
ROW = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
NET = ["inner.0", "inner.2", "out"]
VIT = ["attn.qkv", "attn.proj"]

CONFIGS = {
    "waveft": lambda t: peft.WaveFTConfig(n_frequency=40, random_loc_seed=7, target_modules=t),
    "waveft db2": lambda t: peft.WaveFTConfig(
        n_frequency=30, wavelet_family="db2", scaling=3.0, target_modules=t
    ),
    "waveft proportional": lambda t: peft.WaveFTConfig(
        n_frequency=20, proportional_parameters=True, target_modules=t
    ),
    "waveft pattern": lambda t: peft.WaveFTConfig(
        n_frequency=20, n_frequency_pattern={t[0]: 13}, target_modules=t
    ),
    "waveft without transform": lambda t: peft.WaveFTConfig(
        n_frequency=20, use_idwt=False, target_modules=t
    ),
    "shira": lambda t: peft.ShiraConfig(r=1, random_seed=3, target_modules=t),
    "shira unseeded": lambda t: peft.ShiraConfig(r=1, target_modules=t),
    "lora": lambda t: peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=t),
    "lora rs": lambda t: peft.LoraConfig(r=4, use_rslora=True, target_modules=t),
    "lora ranks": lambda t: peft.LoraConfig(
        r=2, rank_pattern={t[0]: 5}, alpha_pattern={t[1]: 3}, target_modules=t
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("base", ["net", "vit"])
def test_what_peft_saves_is_imported(base, kind, tmp_path):
    make, x, targets = (net, ROW, NET) if base == "net" else (vit, IMAGE, VIT)
    config = CONFIGS[kind](targets)
    if base == "vit":
        config.modules_to_save = ["head"]
    theirs = shake(peft.get_peft_model(make(), config))
    theirs.save_pretrained(tmp_path)
    ours = wara.import_peft(make(), tmp_path).eval()
    assert len(adapted_layers(ours)) == (3 if base == "net" else 2 * len(ours.blocks))
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    if kind != "lora ranks":
        assert count_parameters(ours)["trainable"] == sum(p.numel() for p in trained.values())
    # It is an adapter like any other: it trains, saves and loads.
    assert all(p.requires_grad for p in wara.trainable_parameters(ours).values())
    wara.save_adapter(ours, tmp_path / "own")
    again = wara.load_adapter(make(), tmp_path / "own").eval()
    assert torch.equal(again(x), ours(x))


METHODS = {
    "waveft": lambda t: wara.WaveFT(k=40, seed=7, targets=t),
    "waveft sym3": lambda t: wara.WaveFT(k=25, wavelet="sym3", scale=2.0, targets=t),
    "waveft shares": lambda t: wara.WaveFT(k=30, allocation="proportional", targets=t),
    "shira": lambda t: wara.SHiRA(k=31, scale=2.0, targets=t),
    "lora": lambda t: wara.LoRA(rank=3, alpha=7.0, targets=t),
}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("base", ["net", "vit"])
def test_what_is_exported_loads_in_peft(base, kind, tmp_path):
    make, x = (net, ROW) if base == "net" else (vit, IMAGE)
    targets = ("inner.*", "[o]ut") if base == "net" else ("qkv", "o")
    ours = shake(wara.adapt(make(), METHODS[kind](targets)))
    wara.export_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(theirs(x), ours(x), atol=1e-5, rtol=1e-5)
    back = wara.import_peft(make(), tmp_path).eval()
    torch.testing.assert_close(back(x), ours(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", [wara.LoRA(rank=2, targets=("q", "v", "o")), wara.SHiRA(k=50)])
def test_parts_of_a_fused_layer_are_exported_as_a_whole(method, tmp_path):
    ours = shake(wara.adapt(vit(), method))
    wara.export_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(vit(), tmp_path).eval()
    torch.testing.assert_close(theirs(IMAGE), ours(IMAGE), atol=1e-5, rtol=1e-5)
    back = wara.import_peft(vit(), tmp_path).eval()
    torch.testing.assert_close(back(IMAGE), ours(IMAGE), atol=1e-5, rtol=1e-5)


def test_waveft_on_parts_of_a_fused_layer_is_refused(tmp_path):
    ours = wara.adapt(vit(), wara.WaveFT(k=10))
    refuses_export(ours, tmp_path, "train with targets: \\[qkv, o\\]")


def test_a_wavelet_that_peft_lacks_is_refused(tmp_path):
    ours = wara.adapt(net(), wara.WaveFT(k=10, wavelet="bior2.2", targets=("inner.*",)))
    refuses_export(ours, tmp_path, "does not know the wavelet bior2.2")


def test_places_of_another_origin_are_refused(tmp_path):
    ours = wara.adapt(net(), wara.WaveFT(k=10, targets=("inner.*",)))
    adapter = ours.get_submodule("inner.0").adapter
    adapter.places[0, 0] = (adapter.places[0, 0] + 1) % 30
    adapter.refresh()
    refuses_export(ours, tmp_path, "draws the places from the seed")


@pytest.mark.parametrize("method", [wara.WaRA(), wara.TinyWaRA(), wara.Full(), wara.LinearProbe()])
def test_methods_without_a_form_in_peft_are_refused(method, tmp_path):
    refuses_export(wara.adapt(vit(), method), tmp_path, f"no form for a '{method.name}' adapter")


def refuses_export(model, folder, words):
    with pytest.raises(WaraError, match=words) as caught:
        wara.export_peft(model, folder / "out")
    assert caught.value.exit_code == 4
    assert not (folder / "out").exists()


def test_short_names_come_back(tmp_path):
    config = CONFIGS["waveft"](["blocks.1.attn.qkv", "blocks.1.mlp.fc1"])
    theirs = peft.get_peft_model(vit(), config)
    theirs.save_pretrained(tmp_path)
    method = adaptation_of(wara.import_peft(vit(), tmp_path)).method
    assert method.targets == ("qkv", "fc1") and method.blocks == (1,)


def test_a_classifier_of_another_size_is_made(tmp_path):
    config = CONFIGS["lora"](VIT)
    config.modules_to_save = ["head"]
    theirs = shake(peft.get_peft_model(vit(classes=7), config))
    theirs.save_pretrained(tmp_path)
    model = vit(classes=7)
    model.reset_classifier(2)
    ours = wara.import_peft(model, tmp_path).eval()
    torch.testing.assert_close(ours(IMAGE), theirs(IMAGE), atol=1e-5, rtol=1e-5)


def test_an_adapter_on_the_model_gives_way(tmp_path):
    theirs = shake(peft.get_peft_model(vit(), CONFIGS["waveft"](VIT)))
    theirs.save_pretrained(tmp_path)
    ours = wara.import_peft(wara.adapt(vit(), wara.WaRA()), tmp_path).eval()
    torch.testing.assert_close(ours(IMAGE), theirs(IMAGE), atol=1e-5, rtol=1e-5)


# Files that cannot be read rightly.


@pytest.fixture
def saved(tmp_path):
    theirs = peft.get_peft_model(net(), CONFIGS["shira"](NET))
    theirs.save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def refuses_import(folder, words, model=None):
    model = net() if model is None else model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WaraError, match=words) as caught:
        wara.import_peft(model, folder)
    assert caught.value.exit_code == 4
    assert not adapted_layers(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_missing_files(saved):
    (saved / "adapter_model.safetensors").unlink()
    refuses_import(saved, "no adapter_model.safetensors")


def test_a_damaged_file(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    refuses_import(saved, "damaged")


def test_json_that_is_none(saved):
    (saved / "adapter_config.json").write_text("{")
    refuses_import(saved, "not valid JSON")


def test_other_methods(saved):
    edit_config(saved, peft_type="BONE")
    refuses_import(saved, "PEFT type 'BONE' cannot be imported.*LORA, SHIRA, WAVEFT")


@pytest.mark.parametrize(
    "changes",
    [{"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"}, {"newest_trick": 1}],
    ids=str,
)
def test_options_that_change_what_is_computed(changes, tmp_path):
    peft.get_peft_model(net(), CONFIGS["lora"](NET)).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    refuses_import(tmp_path, f"made with {next(iter(changes))}")


def test_a_layer_that_the_model_lacks(saved):
    refuses_import(saved, "no linear layer", vit())


def test_tensors_that_do_not_fit(saved):
    def change(state):
        state["base_model.model.out.shira_indices"][0, 0] = 15

    edit_tensors(saved, change)
    refuses_import(saved, "do not fit the 15x9 layer out")


def test_missing_tensors(saved):
    edit_tensors(saved, lambda state: state.pop("base_model.model.out.shira_indices"))
    refuses_import(saved, "tensors of out are missing")


def test_tensors_of_something_else(saved):
    def change(state):
        state["base_model.model.out.bias"] = torch.zeros(15)

    edit_tensors(saved, change)
    refuses_import(saved, "out.bias, which is no part of the classifier")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["whole", "block"])
@pytest.mark.parametrize(
    "method",
    [
        wara.LoRA(rank=2, targets=("qkv", "o")),
        wara.WaveFT(k=20, targets=("qkv", "o")),
        wara.SHiRA(k=30),
    ],
)
def test_compiled_models_exchange_like_plain_ones(method, part, tmp_path):
    def compiled(model):
        torch._dynamo.reset()
        if part == "whole":
            return torch.compile(model, backend="eager")
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
        return model

    ours = shake(wara.adapt(vit(), method))
    expected = ours(IMAGE)
    wara.export_peft(compiled(ours), tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("_orig_mod" in name for name in names)
    torch.testing.assert_close(wara.import_peft(vit(), tmp_path).eval()(IMAGE), expected)
    base = compiled(vit())
    back = wara.import_peft(base, tmp_path)
    assert back is base
    torch.testing.assert_close(back.eval()(IMAGE), expected)
    assert not adapted_layers(wara.unload(back))
