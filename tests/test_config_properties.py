"""Configs of any valid values read back as written; a key that nobody knows is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wara.config import RunConfig, dump_config, load_config
from wara.errors import WaraError
from wara.schema import fields_of

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20)
RATE = st.none() | st.floats(0, 1000)
SEEDS = st.integers(0, 2**32 - 1)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return any subset of fields."""
    return st.fixed_dictionaries({}, optional=fields)


DATA = some(
    cache=st.none() | TEXT, images=st.none() | st.integers(1, 10**6),
    val_fraction=st.floats(0.01, 0.45), test_fraction=st.floats(0.01, 0.45),
    train_images=st.none() | st.integers(2, 10**9), split_seed=SEEDS,
    modality=st.sampled_from([None, "fundus", "ultrasound"]),
    bits=st.sampled_from([None, 8, 10, 16]), greys=st.sampled_from([None, "window", "range"]),
    augment=st.sampled_from(["auto", "off", "general"]), views=st.none() | st.integers(1, 10**4),
    cache_limit=st.floats(0.001, 1e6), workers=st.integers(0, 1024),
)  # fmt: skip
BACKBONE = some(
    name=st.sampled_from(["wara_nano", "vit_tiny_patch16_224", "hf-hub:a/b"]), weights=TEXT,
    img_size=st.none() | st.integers(8, 4096), part=st.none() | TEXT,
    pool=st.sampled_from([None, "token", "avg"]), drop_rate=st.floats(0, 0.99),
    options=st.dictionaries(
        st.from_regex(r"[a-z_]{1,12}", fullmatch=True),
        st.booleans() | st.integers(-(10**5), 10**5) | st.floats(-1e5, 1e5) | TEXT
        | st.lists(st.integers(0, 9), max_size=3),
        max_size=3,
    ),
)  # fmt: skip
ADAPTERS = st.one_of(
    some(rank=st.integers(1, 4096), alpha=st.none() | st.floats(1e-6, 1e6),
         level=st.integers(1, 16), wavelet=st.sampled_from(["haar", "db2", "bior2.2"]),
         blocks=st.sampled_from(["all", "last_2", 3, [0, 2]]), dropout=st.floats(0, 0.99),
         core=st.sampled_from(["scalar", "diag", "full"]),
         targets=st.sampled_from([["q", "v"], ["qkv", "fc1"], ["*.query"]])),
    st.fixed_dictionaries({"method": st.just("wara"), "budget": st.floats(0.1, 1e6)}),
    st.fixed_dictionaries({"method": st.just("waveft"),
                           "k": st.none() | st.integers(1, 2**31 - 1)
                           | st.lists(st.integers(1, 99), min_size=1, max_size=4)}),
    st.fixed_dictionaries({"method": st.just("tiny_wara"), "seed": st.integers(0, 2**63 - 1),
                           "coefficients": st.integers(1, 10**6)}),
    st.fixed_dictionaries({"method": st.sampled_from(["linear_probe", "full", "bitfit"])}),
)  # fmt: skip
RUNS = some(
    dataset=TEXT, offline=st.sampled_from(["phantom", "error"]), seed=SEEDS,
    out=st.none() | TEXT, backbone=BACKBONE, adapter=ADAPTERS, data=DATA,
    loss=st.sampled_from(["auto", "ce", "focal"]), focal_gamma=st.floats(0, 100),
    label_smoothing=st.floats(0, 0.99), max_class_weight=st.none() | st.floats(1, 1e6),
    epochs=st.integers(1, 10**5), batch_size=st.integers(1, 10**5), lr=RATE,
    accumulate=st.integers(1, 10**5), weight_decay=st.floats(0, 1000),
    warmup_epochs=st.floats(0, 1), clip_grad=st.none() | st.floats(1e-9, 1e9),
    amp=st.sampled_from(["auto", "off", "bf16"]), compile=st.booleans(),
    devices=st.integers(1, 1024), patience=st.none() | st.integers(1, 10**5),
    bootstrap=st.integers(0, 10**5), tensorboard=st.booleans(),
    wandb=some(mode=st.sampled_from([None, "offline", "disabled"]), notes=st.none() | TEXT,
               tags=st.none() | st.lists(TEXT, max_size=3), images=st.booleans()),
)  # fmt: skip


def load(text: str) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "given.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(RUNS)
def test_what_is_written_reads_back_as_it_was(tree: dict[str, Any]) -> None:
    config = RunConfig.model_validate(tree)
    text = dump_config(config)
    again = load(text)
    assert again == config
    assert dump_config(again) == text


SECTIONS = ["", "backbone", "adapter", "data", "wandb"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(SECTIONS), TEXT, st.sampled_from(["1", "null", "[]", "{a: 1}", "x"]))
def test_a_key_that_nobody_knows_is_refused(section: str, key: str, value: str) -> None:
    model = RunConfig.model_fields[section].annotation if section else RunConfig
    example = RunConfig()
    known = {*fields_of(model), *fields_of(type(example.adapter)), "method", "r", "lora_alpha",
             "target_modules", "<<"}  # fmt: skip
    if key in known:
        return
    quoted = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    text = f"{section}:\n  {quoted}: {value}\n" if section else f"{quoted}: {value}\n"
    with pytest.raises(WaraError) as caught:
        load(text)
    assert caught.value.exit_code == 2
    assert all("\n" not in str(error) for error in getattr(caught.value, "errors", [caught.value]))
