"""What each form of a file of weights gives: one list of inputs, tested and printed in the docs.

`python tests/test_backbone_forms.py --write` writes the tables of docs/backbones.md anew.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pages
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from wara.backbones import backbone_cards, build_backbone
from wara.errors import WaraError

NAME = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 24, "num_heads": 2}
State = dict[str, Tensor]


def vit(**options: Any) -> State:
    """Weights of a small ViT, all of them drawn, so that none is what it would be without them."""
    generator = torch.Generator().manual_seed(3)
    model = timm.create_model(NAME, **{**SMALL, "num_classes": 0, "img_size": 64, **options})
    return {k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}


STATE = vit()


def under(prefix: str, state: State = STATE) -> State:
    return {prefix + key: value for key, value in state.items()}


def apart(state: State, name: str, names: tuple[str, str, str]) -> State:
    """Take `qkv` apart."""
    result = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for part, third in zip(names, value.chunk(3), strict=True):
                result[key.replace(name, part)] = third
        else:
            result[key] = value
    return result


def zeros(*names: str) -> State:
    return {name: torch.zeros(2, 2) for name in names}


DECODER = zeros("mask_token", "decoder_pos_embed", "decoder_embed.weight",
                "decoder_blocks.0.norm1.weight")  # fmt: skip
POOLED = {("fc_" + k if k.startswith("norm.") else k): v for k, v in STATE.items()}
SCALED = vit(init_values=1e-5)
CHUNKED = {k.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.0.1.")
           .replace("blocks.2.", "blocks.1.2.").replace("blocks.3.", "blocks.1.3."): v
           for k, v in SCALED.items()}  # fmt: skip


def named(state: State, *pairs: tuple[str, str]) -> State:
    """Give tensors other names, part by part."""
    result = {}
    for key, value in state.items():
        for ours, theirs in pairs:
            key = key.replace(ours, theirs)
        result[key] = value
    return result


CLIP = vit(pre_norm=True)
OPENAI = named(
    CLIP, ("patch_embed.proj", "conv1"), ("cls_token", "class_embedding"),
    ("pos_embed", "positional_embedding"), ("norm_pre", "ln_pre"),
    ("blocks.", "transformer.resblocks."), (".norm", ".ln_"), ("attn.qkv.", "attn.in_proj_"),
    ("attn.proj", "attn.out_proj"), ("fc1", "c_fc"), ("fc2", "c_proj"), ("norm.", "ln_post."),
)  # fmt: skip
OPENAI |= {"class_embedding": OPENAI["class_embedding"][0, 0],
           "positional_embedding": OPENAI["positional_embedding"][0]}  # fmt: skip
OPENMMLAB = named(
    STATE, ("patch_embed.proj.", "patch_embed.projection."), ("blocks.", "layers."),
    (".norm", ".ln"), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"),
    ("norm.", "ln1."),
)  # fmt: skip
MONAI = named(
    STATE, ("patch_embed.proj", "patch_embedding.patch_embeddings"),
    ("pos_embed", "patch_embedding.position_embeddings"), ("attn.proj", "attn.out_proj"),
    ("mlp.fc", "mlp.linear"),
)  # fmt: skip
OTHER = {key: value + 1 for key, value in STATE.items()}


class Form(NamedTuple):
    """A file that loads.

    Args:
        name: what it is.
        content: what is saved.
        layout: whose names it has.
        said: who says mean and std.
        mean: the first of the mean.
        left_out: what is left out.
        state: what must be loaded.
        options: what the weights imply.
    """

    name: str
    content: Any
    layout: str = "timm"
    said: str = "assumed"
    mean: float = 0.5
    left_out: tuple[str, ...] = ()
    state: State = STATE
    options: dict[str, Any] = {}
    part: str | None = None


FORMS = [
    Form("state dict", STATE),
    Form("DeiT, timm's train.py: `model` + `args`",
         {"model": STATE, "args": argparse.Namespace(lr=1.0, out=Path("x"), n=np.float64(1))}),
    Form("`state_dict` of DataParallel: `module.`", {"state_dict": under("module.")}),
    Form("torch.compile: `_orig_mod.`", under("_orig_mod.")),
    Form("compiled and parallel: `module._orig_mod.`", under("module._orig_mod.")),
    Form("Lightning: `state_dict` with `model.`, a criterion and hyperparameters",
         {"state_dict": {**under("model."), **zeros("criterion.weight")},
          "pytorch-lightning_version": "2.6", "hyper_parameters": {"lr": np.float32(0.1)},
          "callbacks": {"x": collections.deque([1])}, "optimizer_states": [{"state": {}}]},
         left_out=("state_dict.criterion (1)",)),
    Form("timm with a moving average: `state_dict_ema` goes before `state_dict`",
         {"state_dict": OTHER, "state_dict_ema": STATE}, left_out=("state_dict (54)",)),
    Form("AveragedModel: `n_averaged` + `module.`",
         {"n_averaged": torch.tensor(3), **under("module.")}, left_out=("n_averaged (1)",)),
    Form("ema-pytorch: `ema_model.` goes before `online_model.`",
         {"initted": torch.tensor(True), **under("ema_model."), **under("online_model.", OTHER)},
         left_out=("initted (1)", "online_model (54)")),
    Form("classifier of another task", {**STATE, **zeros("head.weight", "head.bias")},
         left_out=("head (2)",)),
    Form("MAE, pretraining: `model` with a decoder", {"model": {**STATE, **DECODER}},
         "MAE", "layout", 0.485,
         ("decoder_blocks (1)", "decoder_embed (1)", "decoder_pos_embed (1)", "mask_token (1)")),
    Form("MAE, RETFound: the same with `args`, optimiser and scaler",
         {"model": {**STATE, **DECODER}, "args": argparse.Namespace(lr=1.0),
          "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "scaler": {"scale": 65536.0}},
         "MAE", "layout", 0.485,
         ("decoder_blocks (1)", "decoder_embed (1)", "decoder_pos_embed (1)", "mask_token (1)",
          "optimizer (1)")),
    Form("MAE, RETFound, fine-tuned: `fc_norm` in place of `norm`",
         {"model": {**POOLED, **zeros("head.weight", "head.bias")}},
         left_out=("head (2)",), state=POOLED),
    Form("LayerScale (`ls1.gamma`), as UNI", SCALED, state=SCALED,
         options={"init_values": 1e-5}),
    Form("DINO: `teacher` with `backbone.`, and a student",
         {"teacher": {**under("backbone."), **zeros("dino_head.mlp.0.weight")},
          "student": {**under("module.backbone.", OTHER)}},
         "DINO", "layout", 0.485, ("student (54)", "teacher.dino_head (1)")),
    Form("DINOv2: LayerScale and `mask_token`", {**SCALED, **zeros("mask_token")},
         "DINO", "layout", 0.485, ("mask_token (1)",), SCALED, {"init_values": 1e-5}),
    Form("DINOv2, training: `teacher`, blocks in chunks",
         {"teacher": {**under("backbone.", CHUNKED), **zeros("dino_head.last.weight")}},
         "DINO", "layout", 0.485, ("teacher.dino_head (1)",), SCALED, {"init_values": 1e-5}),
    Form("OpenCLIP, BiomedCLIP: `visual.trunk.` and a text tower",
         {**under("visual.trunk."), **zeros("visual.head.proj.weight", "text.transformer.x"),
          "logit_scale": torch.tensor(1.0)},
         "OpenCLIP", "layout", 0.48145466,
         ("logit_scale (1)", "text (1)", "visual.head (1)")),
    Form("OpenCLIP, SigLIP: the same with `logit_bias`",
         {**under("visual.trunk."), "logit_bias": torch.tensor(1.0)},
         "OpenCLIP", "layout", 0.5, ("logit_bias (1)",)),
    Form("queries, keys and values apart (`q_proj`, `k_proj`, `v_proj`)",
         apart(STATE, "qkv", ("q_proj", "k_proj", "v_proj"))),
    Form("no bias of queries, keys and values",
         {k: v for k, v in STATE.items() if not k.endswith("qkv.bias")},
         state={k: v for k, v in STATE.items() if not k.endswith("qkv.bias")},
         options={"qkv_bias": False}),
    Form("half precision", {k: v.bfloat16() for k, v in STATE.items()},
         state={k: v.bfloat16().float() for k, v in STATE.items()}),
    Form("OpenAI CLIP: `visual.` and a text tower, for an architecture of CLIP",
         {**under("visual.", OPENAI), **zeros("visual.proj", "transformer.x")}, "OpenAI CLIP",
         "layout", 0.48145466, ("proj (1)", "transformer (1)"), CLIP, {"pre_norm": True}),
    Form("OpenMMLab: `backbone.` and a head",
         {"state_dict": {**under("backbone.", OPENMMLAB), **zeros("head.layers.head.weight")}},
         "OpenMMLab", left_out=("state_dict.head (1)",)),
    Form("MONAI", MONAI, "MONAI"),
    Form("two networks, and `backbone.part: encoder_q`",
         {**under("encoder_q."), **under("encoder_k.", OTHER)},
         left_out=("encoder_k (54)",), part="encoder_q"),
]  # fmt: skip


def save(content: Any, folder: Path, name: str = "weights.pth") -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


def load(path: Path, **more: Any) -> Any:
    options = {**SMALL, **more.pop("options", {})}
    settings = {"num_classes": 3, "img_size": 64, "weights": path, "options": options, **more}
    return build_backbone(settings.pop("name", NAME), **settings)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_form(form: Form, tmp_path: Path) -> None:
    """Every tensor arrives to the bit; what was left out and who says the statistics is told."""
    given = {"pre_norm": True} if form.state is CLIP else {}
    model, info = load(save(form.content, tmp_path), part=form.part, options=given)
    loaded = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    assert loaded.keys() == form.state.keys()
    assert all(torch.equal(loaded[key], form.state[key]) for key in loaded)
    assert (info.layout, info.statistics, info.mean[0]) == (form.layout, form.said, form.mean)
    assert sorted(info.left_out) == sorted(form.left_out)
    assert info.options == {**SMALL, **form.options}
    assert info.pool == ("avg" if "fc_norm.weight" in form.state else "token")


def test_names_of_safetensors_are_the_same(tmp_path: Path) -> None:
    save_file(under("module."), tmp_path / "weights.bin")  # the content decides, not the name
    model, _ = load(tmp_path / "weights.bin")
    assert torch.equal(model.pos_embed, STATE["pos_embed"])


class Refused(NamedTuple):
    """A file that is refused: what it is, its content, what is said, and the remedy."""

    name: str
    content: Any
    said: str
    remedy: str
    settings: dict[str, Any] = {}
    beside: dict[str, Any] = {}
    """Content of a config.json beside it."""


class Foreign:
    """A class that only the training code knows."""


def changed(name: str, value: Tensor, state: State = STATE) -> State:
    return {**state, name: value}


def poisoned() -> State:
    value = STATE["blocks.1.mlp.fc1.weight"].clone()
    value[3, 2] = float("nan")
    return changed("blocks.1.mlp.fc1.weight", value)


REFUSED = [
    Refused("patches of another size", vit(patch_size=8, img_size=32),
            "the weights have patches of 8 pixels, vit_tiny_patch16_224 of 16",
            "set backbone.options: {patch_size: 8}, or choose such a backbone"),
    Refused("another width or depth", timm.create_model("vit_small_patch16_224").state_dict(),
            "the weights have width 384 and 12 blocks, vit_tiny_patch16_224 has width 24 and 4 "
            "blocks", "choose backbone.name vit_small_patch16_224"),
    Refused("another number of heads, by config.json", STATE,
            "the weights were trained with 4 attention heads, vit_tiny_patch16_224 has 2",
            "set backbone.options: {num_heads: 4}", beside={"num_attention_heads": 4}),
    Refused("another activation, by config.json", STATE,
            "config.json says quick_gelu: True, vit_tiny_patch16_224 has another",
            "choose the backbone with or without `quickgelu` in its name",
            beside={"hidden_act": "quick_gelu"}),
    Refused("values that are not finite", poisoned(),
            "blocks.1.mlp.fc1.weight holds values that are not finite",
            "give another checkpoint of that training"),
    Refused("whole numbers", changed("blocks.0.attn.proj.weight",
                                     torch.zeros(24, 24, dtype=torch.int8)),
            "blocks.0.attn.proj.weight holds int8, not weights",
            "give the weights as they were before quantisation"),
    Refused("greyscale images", vit(in_chans=1), "the weights are of images with 1 channels",
            "give weights of colour images"),
    Refused("tensors that the architecture lacks: norms of queries and keys", vit(qk_norm=True),
            "the weights do not fit backbone vit_tiny_patch16_224",
            "set backbone.options: {qk_norm: true}"),
    Refused("LoRA that was not merged",
            {**STATE, **zeros("blocks.0.attn.qkv.lora_A.weight")},
            "the weights do not fit backbone vit_tiny_patch16_224",
            "merge the adapter into the weights first (PEFT: merge_and_unload)"),
    Refused("a part that nobody knows", {**STATE, **zeros("temporal_embed")},
            "the weights do not fit backbone vit_tiny_patch16_224",
            "name in backbone.name (and backbone.options) the architecture of these very weights"),
    Refused("position embeddings of no square grid",
            changed("pos_embed", torch.zeros(1, 13, 24)),
            "position embeddings of 13 tokens: with 1 before them, the other 12 are no square grid",
            "choose the architecture with as many class and register tokens as the weights"),
    Refused("`norm` and `fc_norm`", {**STATE, **POOLED},
            "the weights have two last norms, norm and fc_norm",
            "set backbone.pool to token (norm) or avg (fc_norm)"),
    Refused("`fc_norm`, and `backbone.pool: token`", POOLED,
            "the weights have the last norm of average pooling only (fc_norm)",
            "leave backbone.pool out, or set it to avg", {"pool": "token"}),
    Refused("a decoder of MAE under a name that goes with other statistics",
            {**STATE, **DECODER},
            "vit_tiny_patch16_224.augreg_in21k goes with mean (0.5, 0.5, 0.5), a file of MAE with "
            "(0.485, 0.456, 0.406)",
            "set backbone.mean and backbone.std to what these weights were trained with",
            {"name": "vit_tiny_patch16_224.augreg_in21k"}),
    Refused("two networks of which neither is known to be the one",
            {**under("encoder_q."), **under("encoder_k.", OTHER)},
            "the file holds 2 networks: 'encoder_q', 'encoder_k'",
            "set backbone.part to one of them"),
    Refused("a part that is not there", under("module."), "the file has no part 'teacher'",
            "choose one of: module", {"part": "teacher"}),
    Refused("no ViT", zeros("conv1.weight", "layer1.0.bn1.weight"),
            "no ViT in the file: conv1.weight, layer1.0.bn1.weight",
            "give the weights of a ViT by the names of timm or Hugging Face"),
    Refused("a pickled model", torch.nn.Linear(2, 2),
            "the file names code that is not run here: torch.nn.modules.linear.Linear",
            "ask its maker for the state dict alone, as .safetensors"),
    Refused("an object of a class that is not known", {"model": STATE, "best": Foreign()},
            "the file names code that is not run here: *",
            "ask its maker for the state dict alone, as .safetensors"),
    Refused("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a Git LFS pointer, not the weights", "run `git lfs pull` there"),
    Refused("a web page", b"<!DOCTYPE html><html>log in</html>", "a web page, not the weights",
            "log in where they lie and download the file again"),
    Refused("a file that was cut short", b"PK\x03\x04 and no more",
            "cannot read the weights: *", "copy the file again from its origin"),
    Refused("an empty file", b"", "an empty file", "copy the file again from its origin"),
]  # fmt: skip


def refusal(case: Refused, folder: Path) -> WaraError:
    if case.beside:
        (folder / "config.json").write_text(json.dumps(case.beside))
    with pytest.raises(WaraError) as caught:
        load(save(case.content, folder), **case.settings)
    return caught.value


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused(case: Refused, tmp_path: Path) -> None:
    error = refusal(case, tmp_path)
    assert error.kind == "artefact" and "\n" not in str(error)
    assert "weights_only" not in str(error)
    if case.said.endswith("*"):
        assert error.what.startswith(case.said[:-1])
    else:
        assert error.what == case.said
    assert error.remedy == case.remedy


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("patches of another size", {"options": {"patch_size": 8}, "img_size": 32}),
        ("tensors that the architecture lacks: norms of queries and keys",
         {"options": {"qk_norm": True}}),
        ("`norm` and `fc_norm`", {"pool": "token"}),
        ("`norm` and `fc_norm`", {"pool": "avg"}),
        ("a decoder of MAE under a name that goes with other statistics",
         {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}),
        ("two networks of which neither is known to be the one", {"part": "encoder_k"}),
        ("a part that is not there", {"part": "module"}),
    ],
)  # fmt: skip
def test_the_remedy_works(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    case = next(case for case in REFUSED if case.name == name)
    load(save(case.content, tmp_path), **{**case.settings, **settings})


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_that_the_arguments_of_training_tell(heads: int, tmp_path: Path) -> None:
    path = save({"model": STATE, "args": argparse.Namespace(num_heads=heads)}, tmp_path)
    if heads == 2:
        load(path)
    else:
        with pytest.raises(WaraError, match="4 attention heads"):
            load(path)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "run",))

    for zipped in (True, False):
        path = tmp_path / "weights.pth"
        content = {"model": STATE, "args": argparse.Namespace(a=Evil())}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(WaraError, match="names code that is not run here: .*getattr"):
            load(path)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "thing",
    [
        argparse.Namespace(a=1), types.SimpleNamespace(a=1), np.float32(1), np.arange(3),
        np.random.get_state(), Path("x"), collections.defaultdict(int, a=1),
        collections.deque([1]), slice(1), range(3), frozenset([1]),
    ],
    ids=lambda thing: type(thing).__name__,
)  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_things_that_training_scripts_save(thing: Any, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": STATE, "x": thing}, path, _use_new_zipfile_serialization=zipped)
    model, _ = load(path)
    assert torch.equal(model.pos_embed, STATE["pos_embed"])


# -- statistics --------------------------------------------------------------------------------

BESIDE = [
    ("`config.json` of timm", "config.json",
     {"architecture": NAME, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
                                               "interpolation": "bilinear"}}),
    ("`config.json` of timm, before 2023", "config.json",
     {"architecture": NAME, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
      "interpolation": "bilinear"}),
    ("`preprocessor_config.json` of Hugging Face", "preprocessor_config.json",
     {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}),
    ("`open_clip_config.json`", "open_clip_config.json",
     {"preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
                         "interpolation": "bilinear"}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "content"), BESIDE)
def test_files_beside_the_weights(name: str, file: str, content: Any, tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    _, info = load(save(STATE, tmp_path))
    assert (info.statistics, info.mean, info.std) == ("config", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert info.interpolation == "bilinear"
    # What the user says goes before.
    _, info = load(tmp_path / "weights.pth", mean=(0, 0, 0), std=(1, 1, 1), interpolation="lanczos")
    assert (info.statistics, info.mean, info.std) == ("user", (0, 0, 0), (1, 1, 1))
    assert info.interpolation == "lanczos"


def test_a_processor_that_does_not_normalise(tmp_path: Path) -> None:
    said = {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    _, info = load(save(STATE, tmp_path))
    assert (info.statistics, info.mean, info.std) == ("config", (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("text", ["{", "[]", '{"mean": [1], "std": [1, 2, 3]}'])
def test_a_config_that_cannot_be_understood_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WaraError, match="config.json") as caught:
        load(save(STATE, tmp_path))
    assert caught.value.kind == "artefact"


def test_the_tag_of_a_name_says_them(tmp_path: Path) -> None:
    path = save(STATE, tmp_path)
    _, info = load(path, name=f"{NAME}.augreg_in21k_ft_in1k")
    assert (info.statistics, info.mean) == ("tag", (0.5, 0.5, 0.5))
    _, info = load(path, name="timm/vit_base_patch16_224.mae")
    assert (info.statistics, info.mean) == ("tag", (0.485, 0.456, 0.406))
    assert info.name == "vit_base_patch16_224.mae"


def test_a_typo_in_a_tag_is_a_fault_of_the_config() -> None:
    with pytest.raises(
        WaraError, match="has no weights 'augreg_in21'; .*did you mean 'augreg_in21k"
    ):
        build_backbone(f"{NAME}.augreg_in21", num_classes=2)


@pytest.mark.parametrize("name", ["hf-hub:x", "hf-hub:/y", "hf-hub:a/b/c", "timm/nothing", "mea"])
def test_names_that_nobody_knows(name: str) -> None:
    with pytest.raises(WaraError, match="unknown backbone") as caught:
        build_backbone(name, num_classes=2)
    assert caught.value.exit_code == 2


def test_a_hub_name_with_a_local_file(tmp_path: Path) -> None:
    path = save(STATE, tmp_path)
    with pytest.raises(WaraError, match="no config.json beside the weights tells the architecture"):
        load(path, name="hf-hub:someone/model")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": NAME, "model_args": SMALL, "pretrained_cfg": {}})
    )
    model, info = load(path, name="hf-hub:someone/model", options={})
    assert (info.name, info.architecture) == ("hf-hub:someone/model", NAME)
    assert torch.equal(model.pos_embed, STATE["pos_embed"])


@pytest.mark.parametrize("key", ["num_classes", "in_chans", "checkpoint_path", "global_pool"])
def test_options_that_have_their_own_key_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(WaraError, match=f"no option '{key}'") as caught:
        load(save(STATE, tmp_path), options={key: "x"})
    assert caught.value.exit_code == 2


def test_an_option_that_timm_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(WaraError, match="timm cannot build it: .*'wings'") as caught:
        load(save(STATE, tmp_path), options={"wings": 2})
    assert caught.value.exit_code == 2


def test_average_pooling_keeps_the_norm_that_was_trained(tmp_path: Path) -> None:
    model, info = load(save(STATE, tmp_path), pool="avg")
    assert info.pool == "avg" and info.options["fc_norm"] is False
    x = torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(x)
    assert torch.equal(model.norm.weight, STATE["norm.weight"])
    assert torch.allclose(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))


# -- cards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", backbone_cards())
def test_cards_name_what_timm_can_build(name: str) -> None:
    card = backbone_cards()[name]
    with torch.device("meta"):
        model = timm.create_model(
            card.architecture, img_size=card.img_size, global_pool=card.pool, **card.options
        )
    assert model.patch_embed.grid_size[0] * model.patch_embed.patch_size[0] == card.img_size
    known = model.pretrained_cfg
    if "." in card.architecture:
        assert (tuple(known["mean"]), tuple(known["std"])) == (card.mean, card.std)


def test_a_card_says_what_the_file_does_not(tmp_path: Path) -> None:
    state = timm.create_model("vit_base_patch16_224", num_classes=0, depth=2).state_dict()
    path = save(under("visual.trunk.", state), tmp_path)
    _, info = build_backbone("biomedclip", num_classes=2, weights=path, options={"depth": 2})
    assert (info.name, info.architecture) == ("biomedclip", "vit_base_patch16_224")
    assert (info.statistics, info.mean[0], info.img_size) == ("card", 0.48145466, (224, 224))


# -- the page ------------------------------------------------------------------------------------


def rendered() -> str:
    said = {"assumed": "assumed: set `backbone.mean` and `backbone.std`", "layout": "by layout"}
    lines = ["### Files that load", "",
             "| file | names | mean and std | left out |", "|---|---|---|---|"]  # fmt: skip
    for form in FORMS:
        statistics = said[form.said]
        if form.said == "layout":
            statistics = f"{form.mean:.3g} … (by layout)"
        rest = ", ".join(f"`{place.rpartition(' ')[0]}`" for place in form.left_out)
        lines.append(f"| {form.name} | {form.layout} | {statistics} | {rest} |")
    for name, _, _ in BESIDE:
        lines.append(f"| any, with {name} beside it | | as that file says | |")
    lines += ["", "### Files that are refused", "", "| file | refusal | remedy |", "|---|---|---|"]
    for case in REFUSED:
        gives = case.said.removesuffix("*").rstrip(": ")
        lines.append(f"| {case.name} | {gives} | {case.remedy} |")
    return "\n".join(lines)


MADE = ("backbones.md", Path(__file__).name, {"forms": rendered()})


def test_the_page_shows_what_is_tested() -> None:
    pages.check(*MADE)


if __name__ == "__main__" and "--write" in sys.argv:
    pages.write(*MADE)
