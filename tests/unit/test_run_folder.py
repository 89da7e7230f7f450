"""A run's folder belongs to its user too: what nextn removes there, what it refuses, and what it says of damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.color import ColorSystem
from rich.style import Style

from nextn.cli.generate_output import DEPTH_STYLES
from nextn.config import ModelConfig, Recipe, TrainingConfig
from nextn.errors import CheckpointError, ConfigError
from nextn.files import list_checkpoints, write_json
from nextn.tables import to_table
from nextn.training.checkpoint import check_run_folder, remove_old_checkpoints, remove_run

LEFTOVERS = (".step-00000004.x1", ".removed-step-00000000")
USERS = ("notes.txt", "best/weights.txt", ".hidden/x", "step-1/x", "step-00000002-copy/x", "my-step-00000001/x")
"""Below `checkpoints/`: files a user may have put there, some with names that resemble nextn's own."""


def write_run(folder: Path, recipe: Recipe | None = None) -> Path:
    """A folder as a run leaves it, with three checkpoints, leftovers of a kill, and files of the user's."""
    names = [f"step-{step:08d}/config.json" for step in (1, 2, 3)] + [f"{name}/x" for name in LEFTOVERS]
    for name in [f"checkpoints/{name}" for name in (*names, *USERS)] + ["tensorboard/events.out.tfevents.1.2", "mine"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    for name in ("metrics.jsonl", "provenance.json"):
        (folder / name).write_text("{}\n")
    write_json(folder / "recipe.json", to_table(recipe or Recipe()))
    return folder


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def users_files_left(folder: Path) -> bool:
    return {f"checkpoints/{name}" for name in USERS} | {"mine"} <= files_below(folder)


def test_retention_removes_old_checkpoints_and_leftovers_and_nothing_of_the_users(tmp_path):
    before = files_below(write_run(tmp_path))
    remove_old_checkpoints(tmp_path, keep=2)
    gone = {path.split("/")[1] for path in before - files_below(tmp_path)}
    assert gone == {"step-00000001", *LEFTOVERS}
    assert users_files_left(tmp_path)


def test_the_law_above_catches_a_retention_that_goes_by_the_beginning_of_a_name(tmp_path):
    write_run(tmp_path)
    for path in sorted((tmp_path / "checkpoints").glob("step-*"))[:-2]:
        for file in path.iterdir():
            file.unlink()
    assert not users_files_left(tmp_path)


@pytest.mark.parametrize("linked", [False, True])
def test_removing_a_run_leaves_exactly_what_the_user_put_there(tmp_path, linked):
    folder = write_run(tmp_path / "run")
    if linked:
        (tmp_path / "link").symlink_to(folder)
    remove_run(tmp_path / "link" if linked else folder)
    assert files_below(folder) == {f"checkpoints/{name}" for name in USERS} | {"mine"}
    assert not (folder / "tensorboard").exists()
    check_run_folder(folder, Recipe(), resume=False)  # the folder is free again


def test_checkpoints_are_in_the_order_of_their_steps_whatever_their_number_of_digits(tmp_path):
    for step in (99_999_999, 100_000_000, 7):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000007", "step-99999999", "step-100000000"]


def test_a_run_or_the_checkpoints_of_one_are_not_overwritten(tmp_path):
    write_run(tmp_path)
    with pytest.raises(ConfigError, match="already holds a run"):
        check_run_folder(tmp_path, Recipe(), resume=False)
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(ConfigError, match="already holds a run"):
        check_run_folder(tmp_path, Recipe(), resume=False)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        check_run_folder(tmp_path, Recipe(), resume=True)


def test_before_the_tokenizer_is_known_a_vocabulary_left_open_differs_from_none(tmp_path):
    write_run(tmp_path, Recipe(model=ModelConfig(vocab_size=257)))
    check_run_folder(tmp_path, Recipe(), resume=True)
    with pytest.raises(ConfigError, match=r"model\.vocab_size: the run has 257, the recipe now has 300"):
        check_run_folder(tmp_path, Recipe(model=ModelConfig(vocab_size=300)), resume=True)
    with pytest.raises(ConfigError, match=r"training\.seed: the run has 0"):
        check_run_folder(tmp_path, Recipe(training=TrainingConfig(seed=1)), resume=True)


def test_the_colours_of_depths_stay_apart_on_every_terminal_that_has_colours():
    for system in (ColorSystem.TRUECOLOR, ColorSystem.EIGHT_BIT, ColorSystem.STANDARD):
        colours = [Style.parse(style).bgcolor.downgrade(system) for style in DEPTH_STYLES[1:]]
        assert len(set(colours)) == len(colours), system
        assert all(colour.downgrade(ColorSystem.STANDARD).number not in (0, 8) for colour in colours)  # text is black
