"""Provenance names code, machine and data, and nothing that tells whose computer it was."""

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import nextn
from nextn import provenance


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


def checkout(folder: Path, package: str) -> Path:
    """A git repository with one commit that holds a package folder; returns that folder."""
    package_folder = folder / package
    package_folder.mkdir(parents=True)
    (package_folder / "__init__.py").write_text("")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return package_folder


def test_provenance_names_versions_machine_seed_and_corpus():
    table = provenance.collect(seed=7, corpus={"name": "python-stdlib", "sha256": "ab" * 32})
    assert table["seed"] == 7
    assert table["corpus"] == {"name": "python-stdlib", "sha256": "ab" * 32}
    assert table["libraries"]["python"] == platform.python_version()
    assert all(table["libraries"][name] for name in provenance.LIBRARIES)
    assert table["nextn"]["version"]
    assert table["machine"]["device"] == "cpu"
    assert table["machine"]["cpu"]
    assert table["machine"]["num_cores"] >= 1
    assert table["machine"]["memory_bytes"] > 2**28
    assert table["time_utc"].endswith("+00:00")


def test_provenance_is_json():
    table = provenance.collect(seed=0)
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_provenance_holds_no_host_name_user_name_or_absolute_path(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", [str(tmp_path / "bin" / "nextn"), "train", f"--set=data.corpus={tmp_path}/text.txt"]
    )
    table = provenance.collect(seed=0)
    assert table["command"] == ["nextn", "train", "--set=data.corpus=…/text.txt"]
    text = json.dumps(table)
    assert platform.node() not in text
    assert str(Path.home()) + "/" not in text
    assert str(tmp_path) not in text
    if len(getpass.getuser()) > 4:  # a short name may well occur in some other word
        assert getpass.getuser() not in text


def test_a_module_run_is_recorded_under_the_packages_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(Path(nextn.__file__).parent / "__main__.py"), "demo"])
    assert provenance.collect(seed=0)["command"] == ["nextn", "demo"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/home/ada/novels/emma.txt", "…/emma.txt"),
        ("--out=/home/ada/run/", "--out=…/run"),
        ("/home/ada lovelace/run", "…/run"),
        ("cpu:/home/ada/x,b", "cpu:…/x,b"),
        ("~/x/y", "…/y"),
        (r"data.corpus=C:\Users\ada\emma.txt", "data.corpus=…/emma.txt"),
        ("recipes/demo.toml", "recipes/demo.toml"),
        ("../data/austen", "../data/austen"),
        ("hf:org/name:train", "hf:org/name:train"),
        ("objective.values=[0.3,0.1]", "objective.values=[0.3,0.1]"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_part(text, wanted):
    assert provenance.without_absolute_paths(text) == wanted


def test_git_state_names_the_commit_and_tells_a_changed_checkout_from_a_clean_one(tmp_path):
    package_folder = checkout(tmp_path, "src/nextn")
    clean = provenance.git_state(package_folder)
    assert len(clean["commit"]) == 40
    assert clean["has_changes"] is False
    (package_folder / "__init__.py").write_text("changed = True\n")
    assert provenance.git_state(package_folder) == {"commit": clean["commit"], "has_changes": True}


def test_git_state_does_not_take_the_commit_of_a_project_that_nextn_is_installed_into(tmp_path):
    package_folder = checkout(tmp_path, ".venv/lib/python3/site-packages/nextn")
    assert provenance.git_state(package_folder) == {"commit": None, "has_changes": None}


def test_git_state_outside_a_checkout_and_without_git_is_unknown(tmp_path, monkeypatch):
    unknown = {"commit": None, "has_changes": None}
    assert provenance.git_state(tmp_path) == unknown
    package_folder = checkout(tmp_path, "src/nextn")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing-here"))
    assert provenance.git_state(package_folder) == unknown


def test_cpu_model_is_read_where_linux_keeps_it_and_never_empty_elsewhere(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Example CPU @ 2.0GHz\n")
    assert provenance.cpu_model(cpuinfo) == "Example CPU @ 2.0GHz"
    assert provenance.cpu_model(tmp_path / "absent")
