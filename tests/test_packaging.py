from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
# Requirement -> its hashes; a line goes on where the one before ends in a backslash.
HASHED = {
    words[0].strip(): [f"--{word}".strip() for word in words[1:]]
    for line in re.sub(r"\\\n", " ", LOCK).splitlines()
    if line and not line.startswith("#")
    for words in [line.split("--")]
}
LICENCES = (ROOT / "docs" / "licences.md").read_text()
# A library in two packages of one version.
PART_OF = {"pydantic-core": "pydantic"}
EXTRAS = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]


def pins() -> dict[str, str]:
    requirements = [Requirement(line) for line in HASHED]
    assert all(str(one.specifier).startswith("==") for one in requirements)
    return {canonicalize_name(one.name): str(one.specifier)[2:] for one in requirements}


def test_lock_names_versions_and_no_places():
    names = re.sub(r"#.*", "", "\n".join(HASHED))
    assert not re.search(r"://|file:|@|--|^-|[+]cpu|/", names, re.MULTILINE)
    assert pins()


def test_lock_has_a_hash_for_every_package_and_nothing_else():
    for line, hashes in HASHED.items():
        assert hashes, f"{line} has no hash; run make lock"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), line


def test_nothing_is_installed_without_its_hash():
    installs = [
        line.split("pip install", 1)[1].split()
        for line in (ROOT / "Makefile").read_text().splitlines()
        # What is installed into a place of its own is no part of wara.
        if "$(BIN)/python -m pip install" in line
    ]
    assert installs
    for words in installs:
        # The checkout itself, with nothing that it needs.
        assert "--require-hashes" in words or {"--no-deps", "--no-build-isolation"} <= set(words)


def test_lock_holds_every_declared_package_in_an_allowed_version():
    pinned = pins()
    for text in [*PROJECT["dependencies"], *EXTRAS]:
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        assert name in pinned, f"{name} is not pinned; run make lock"
        assert wanted.specifier.contains(pinned[name], prereleases=True), text


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_the_releases_with_malware_are_excluded(version):
    (lightning,) = (
        Requirement(text)
        for text in PROJECT["dependencies"]
        if text.startswith("pytorch-lightning")
    )
    assert version not in lightning.specifier and "2.6.6" in lightning.specifier


# The last release with a known hole, whatever pyproject.toml says beside it.
HOLES = {
    "torch": "2.5.1",  # CVE-2025-32434
    "pytorch-lightning": "2.3.2",  # CVE-2024-5452
    "pillow": "12.1.0",  # CVE-2026-25990
    "pydicom": "3.0.1",  # CVE-2026-32711
    "scikit-learn": "1.4.2",  # CVE-2024-5206
    "opencv-python-headless": "4.8.0.76",  # CVE-2023-4863
    "filelock": "3.20.0",  # CVE-2025-68146
    "onnx": "1.16.2",  # CVE-2024-5187
    "ray": "2.53.0",  # CVE-2026-27482
}


@pytest.mark.parametrize("name", HOLES)
def test_releases_with_known_holes_are_excluded(name):
    declared = [Requirement(text) for text in [*PROJECT["dependencies"], *EXTRAS]]
    (wanted,) = (one for one in declared if canonicalize_name(one.name) == name)
    assert HOLES[name] not in wanted.specifier, f"{name} {HOLES[name]} may be installed"


def test_the_page_of_licences_is_of_this_lock():
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", LICENCES, re.MULTILINE)
    known = {canonicalize_name(name): (version, said) for name, version, said in rows}
    for text in [*PROJECT["dependencies"], *EXTRAS]:
        name = canonicalize_name(Requirement(text).name)
        assert name in known, f"{name} is not on docs/licences.md; run make licences"
        version, said = known[name]
        assert version == pins()[name], f"{name} is of another version; run make licences"
        assert said != "not said", f"nobody knows the licence of {name}"


def test_every_import_is_a_declared_dependency():
    declared = {
        canonicalize_name(Requirement(text).name) for text in [*PROJECT["dependencies"], *EXTRAS]
    }
    owners = packages_distributions()  # of what is installed; another extra goes by its own name
    for path in [*(ROOT / "wara").rglob("*.py"), ROOT / "train.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            for name in {name.split(".")[0] for name in names} - {"wara"}:
                if name not in sys.stdlib_module_names:
                    found = {canonicalize_name(owner) for owner in owners.get(name, [name])}
                    found |= {PART_OF.get(owner, owner) for owner in found}
                    assert found & declared, f"{path}:{node.lineno} imports {name}: {found}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_carries_configs_cards_and_weights(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("configs", "datasets"):
        for path in (ROOT / kind).glob("*.yaml"):
            assert f"wara/_share/{kind}/{path.name}" in names
    for path in (ROOT / "wara").rglob("*"):
        if path.is_file() and path.suffix in (".py", ".safetensors", ".md", ".typed"):
            assert path.relative_to(ROOT).as_posix() in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    outside = {name.split("/")[0] for name in names if "dist-info" not in name}
    assert outside == {"wara"}


@pytest.mark.slow
def test_installed_package_finds_its_configs_from_any_folder(wheel, tmp_path):
    site = tmp_path / "site"
    # A wheel of pure Python unpacked is what pip installs.
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            archive.extract(member, site)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import wara; from wara import config;"
        "print(wara.__file__); print(config.find_config('fundus_wara.yaml'));"
        "print(config.load_config('fundus_wara').adapter.name)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(site)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    package, found, method = done.stdout.split()
    assert Path(package).is_relative_to(site) and Path(found).is_relative_to(site)
    assert method == "wara"


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 8 * 2**20
