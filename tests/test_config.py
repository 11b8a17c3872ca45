from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medmnist_helpers import BAR

from wara.adapters import METHODS, LoRA, WaRA
from wara.config import RunConfig, dump_config, find_config, list_configs, load_config
from wara.errors import WaraError, WaraErrors
from wara.schema import fields_of
from wara.storage import shipped


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def faults(*arguments, **keywords) -> list[str]:
    with pytest.raises(WaraError) as caught:
        load_config(*arguments, **keywords)
    assert caught.value.exit_code == 2
    return str(caught.value).split("\n")


def test_empty_file_is_the_defaults(write):
    assert load_config(write("# nothing\n")) == RunConfig()


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("5E2", 500.0), (".5", 0.5), ("2", 2.0), ("+1.5e+1", 15.0)],
)
def test_numbers_are_those_of_yaml_1_2(write, text, value):
    assert load_config(write(f"lr: {text}\n")).lr == value
    assert load_config(write(""), [f"lr={text}"]).lr == value


def test_words_of_yaml_1_1_stay_words(write):
    config = load_config(write("wandb: {notes: on}\namp: off\ndataset: no\n"))
    assert (config.wandb.notes, config.amp, config.dataset) == ("on", "off", "no")


def test_override_wins_and_the_last_one_of_two(write):
    path = write("lr: 1.0\nadapter: {method: lora, rank: 2}\n")
    config = load_config(path, ["lr=2.0", "lr=3.0", "adapter.rank=8", "data.images=60"])
    assert (config.lr, config.data.images) == (3.0, 60)
    assert config.adapter == LoRA(rank=8)


def test_override_takes_lists_null_and_quoted_text(write):
    config = load_config(
        write("clip_grad: 1.0\n"),
        ["clip_grad=null", "adapter.blocks=[4, 5]", 'wandb.project="12"', "adapter.targets=[q, v]"],
    )
    assert config.clip_grad is None
    assert config.adapter == WaRA(blocks=(4, 5), targets=("q", "v"))
    assert config.wandb.project == "12"


def test_override_of_a_section_replaces_it(write):
    path = write("adapter: {method: wara, core: full}\n")
    config = load_config(path, ["adapter={method: lora, r: 8}"])
    assert config.adapter == LoRA(rank=8)


def test_words_of_peft_mean_ours(write):
    path = write("adapter: {method: lora, r: 4, lora_alpha: 8, target_modules: [q, v]}\n")
    assert load_config(path).adapter == LoRA(rank=4, alpha=8, targets=("q", "v"))
    changed = load_config(path, ["adapter.r=16"])
    assert changed.adapter == LoRA(rank=16, alpha=8, targets=("q", "v"))
    both = faults(write("adapter: {r: 4, rank: 8}\n"))
    assert len(both) == 1 and "adapter.r and adapter.rank are the same option" in both[0]


def test_every_fault_is_told_at_once_with_place_and_remedy(write):
    path = write(
        "lr: -1\n"
        "epochs: '12'\n"
        "batchsize: 4\n"
        "rank: 4\n"
        "learning_rate: 1\n"
        "loss: foc\n"
        "backbone: {img_size: [1, x], nam: a}\n"
        "data: 3\n"
        "compile: 1\n"
        "warmup_epochs: .nan\n"
    )
    sets = ["patience=0", "data.workers=1", "seed=[1", "xx", "wandb.mode=of_line", "out.y=3"]
    lines = faults(path, sets)
    expected = [
        r"data has no keys below it; --set data\.workers=1;",
        r"not YAML: .*; --set seed=\[1; put quotes",
        r"not of the form key=value; --set xx; as in --set lr=1e-3",
        r"out has no keys below it; --set out\.y=3;",
        r"lr should be at least 0, not -1; .*run\.yaml line 1; lr: Peak learning rate",
        r'epochs should be a whole number, not "12"; .*line 2;',
        r"unknown key 'batchsize'; .*line 3; did you mean 'batch_size'\?",
        r"unknown key 'rank'; .*line 4; did you mean 'adapter\.rank'\?",
        r"unknown key 'learning_rate'; .*line 5; did you mean 'lr'\?",
        r"loss should be one of auto, .*; .*line 6; did you mean 'focal'\?",
        r"backbone\.img_size should be a whole number from 8 to 4096, or two of them, .*line 7",
        r"unknown key 'backbone\.nam'; .*line 7; did you mean 'backbone\.name'\?",
        r"data should be a section with keys of its own, not 3; .*line 8",
        r"compile should be true or false, not 1; .*line 9",
        r"warmup_epochs should be a finite number, not \.nan; .*line 10",
        r"patience should be at least 1, not 0; --set patience=0",
        r'wandb\.mode should be one of online, offline, disabled, not "of_line"; --set .*; did you',
    ]
    for pattern in expected:
        assert sum(bool(re.search(pattern, line)) for line in lines) == 1, (pattern, lines)
    assert len(lines) == len(expected)
    assert all(line.startswith("error[config]: ") for line in lines)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("img_size", "backbone.img_size"),
        ("method", "adapter.method"),
        ("lora_alpha", "adapter.alpha"),
        ("num_workers", "data.workers"),
        ("val_fracton", "data.val_fraction"),
        ("weight_deca", "weight_decay"),
        ("data.wokers", "data.workers"),
    ],
)
def test_unknown_key_names_the_one_that_was_meant(write, key, meant):
    assert faults(write(""), [f"{key}=1"]) == [
        f"error[config]: unknown key '{key}'; --set {key}=1; did you mean '{meant}'?"
    ]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lr: 1\nlr: 2\n", 'duplicate key "lr"'),
        ("lr: [1\n", "not YAML"),
        ("- 1\n- 2\n", "list of `key: value` lines"),
        ("lr: !!python/object:os.system x\n", "not YAML"),
        ("lr: 1\n---\nlr: 2\n", "not YAML"),
        ("lr: 2024-13-45\n", "not YAML"),
        ("adapter: [wara]\n", "adapter should be a section"),
        ("data: {val_fraction: 0.5, test_fraction: 0.5}\n", "leave images to train on"),
        ("epochs: 3\nwarmup_epochs: 4\n", "warmup_epochs should be at most epochs"),
        ("1: 2\n", "unknown key '1'"),
    ],
)
def test_bad_files_are_refused_in_one_line(write, text, part):
    lines = faults(write(text))
    assert len(lines) == 1 and part in lines[0] and "run.yaml" in lines[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("wandb: off", "wandb.mode=disabled"),
        ("wandb: online", "wandb.mode=online"),
        ("wandb_project: mine", "'wandb.project'"),
        ("wandb_images: true", "'wandb.images'"),
    ],
)
def test_former_keys_of_wandb_name_the_new_ones(write, old, new):
    for (line,) in (faults(write(old + "\n")), faults(write(""), [old.replace(": ", "=")])):
        assert new in line.rsplit("; ", 1)[-1], line


def test_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00lr")
    assert "not UTF-8" in faults(path)[0]


def test_checks_see_valid_values_and_their_faults_join_the_others(write):
    seen = []

    def check(value):
        seen.append(value)
        raise WaraError("config", f"{value} is too much", "", "take 4")

    path = write("lr: -1\nbackbone:\n  name: vit9\n")
    lines = faults(path, ["seed=7"], checks={"backbone.name": check, "seed": check, "lr": check})
    assert len(lines) == 3 and "lr should be" in lines[0]
    assert re.search(r"vit9 is too much; backbone\.name in .*run\.yaml line 3; take 4", lines[1])
    assert "7 is too much; seed in --set seed=7" in lines[2]
    assert seen == ["vit9", 7]  # A faulty value is not shown to further checks.


def test_checks_are_silent_on_a_good_config(write):
    seen = []
    assert load_config(write(""), checks={"backbone.name": seen.append}) == RunConfig()
    assert seen == [RunConfig().backbone.name]


@settings(max_examples=60, deadline=None)
@given(
    dataset=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
    lr=st.floats(0, 1e3),
    size=st.none() | st.integers(8, 999) | st.tuples(st.integers(8, 99), st.integers(8, 99)),
    blocks=st.just("all") | st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1),
    targets=st.lists(st.text("ab:#'\"-1e ~").map("*.{}".format), min_size=1),
    alpha=st.none() | st.floats(1e-9, 1e6),
)
def test_dump_loads_to_an_equal_config(tmp_path_factory, dataset, lr, size, blocks, targets, alpha):
    adapter = {"method": "lora", "blocks": blocks, "targets": targets, "alpha": alpha}
    config = RunConfig(dataset=dataset, lr=lr, backbone={"img_size": size}, adapter=adapter)
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_every_field_has_one_sentence():
    sections = [RunConfig, *(type(part) for part in vars(RunConfig()).values()), *METHODS.values()]
    for section in sections:
        for name, field in fields_of(section).items():
            assert field.description and field.description.endswith("."), name
            assert "\n" not in field.description, name


def test_names_are_found_here_first_then_among_the_shipped(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped_file = shipped("configs") / "fundus_wara.yaml"
    for name in ("fundus_wara", "fundus_wara.yaml", "configs/fundus_wara.yaml"):
        assert find_config(name) == shipped_file
    write("lr: 7.0\n", "fundus_wara.yaml")
    assert load_config("fundus_wara.yaml").lr == load_config("fundus_wara").lr == 7.0


def test_unknown_config_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'fundus_wara.yaml'?" in faults("fundus_waar.yaml")[0]
    assert "did you mean 'fundus_wara.yaml'?" in faults("fundus_waar")[0]
    assert "is a folder" in faults(tmp_path)[0]
    assert "no config" in faults(tmp_path / "nowhere" / "x.yaml")[0]


def test_run_folder_is_named_after_the_run():
    assert RunConfig().folder == Path("runs/fundus_phantom_wara_s0")
    config = RunConfig(dataset="a b/../busi/", adapter={"method": "lora"}, seed=3)
    assert config.folder == Path("runs/busi_lora_s3")
    assert RunConfig(dataset="cards/my.yaml").folder == Path("runs/my_wara_s0")
    assert RunConfig(out="x/y").folder == Path("x/y")


def test_errors_of_a_config_survive_a_process_border(write):
    import pickle

    with pytest.raises(WaraErrors) as caught:
        load_config(write("lr: -1\nx: 1\n"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("name", sorted(list_configs()))
def test_shipped_config_is_valid_described_and_says_its_own_command(name):
    path = shipped("configs") / f"{name}.yaml"
    text = path.read_text()
    config = load_config(path)
    offline = "error" if name in BAR else "phantom"
    assert config.offline == offline and f"\noffline: {offline}\n" in text
    assert f"python train.py --cfg {name}.yaml\n" in text
    method = config.adapter.name
    assert name in BAR or name == f"{name.removesuffix('_' + method)}_{method}"
    assert list_configs()[name].endswith(".")
    # Only what differs from the defaults, but for the two lines that are there to be seen.
    plain = RunConfig().model_dump()
    for key, value in config.model_dump(exclude_unset=True).items():
        assert key in ("offline", "adapter") or value != plain[key], key


def test_four_modalities_and_four_methods_are_shipped():
    wanted = {
        f"{modality}_{method}"
        for modality in ("fundus", "dermoscopy", "ultrasound", "chest_xray")
        for method in ("wara", "tiny_wara", "lora", "linear_probe")
    }
    assert wanted | {"fundus_full"} <= set(list_configs())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr=.nan", "not .nan"),
        ("lr=-.inf", "not -.inf"),
        ("seed=99999999999", "below 4294967296, not 99999999999"),
        ("backbone.mean=[1]", "backbone.mean has too few entries"),
        ("backbone.options={a: {b: 1}}", "backbone.options.a should be"),
        ("adapter.targets=[null]", "targets must be a list of names"),
        ("adapter={method: waveft, k: [0]}", "k is [0]"),
        ("adapter.method=:Own", "not of the form package.module:Class"),
        ("adapter.method=.own:Own", "not of the form package.module:Class"),
        ("adapter.method=wara:Own", "there is no 'Own' in wara"),
        ("adapter.method=[wara]", "the method is not named by a text"),
    ],
)
def test_faults_are_told_in_the_words_of_yaml(write, text, words):
    with pytest.raises(WaraError) as caught:
        load_config(write(""), [text])
    (line,) = str(caught.value).splitlines()
    assert words in line and f"--set {text}" in line
    assert not re.search(r"\bNone\b|\(0,\)|NaN|attribute|e\+09", line)
