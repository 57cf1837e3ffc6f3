"""A file is whole or not there."""

import pytest

from sista_pl.atomic import writing


def test_a_path_changes_when_all_is_written(tmp_path):
    path = tmp_path / "figures.csv"
    path.write_text("old")
    with writing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_failure_leaves_what_was_there_and_nothing_beside_it(tmp_path):
    path = tmp_path / "figures.csv"
    path.write_text("old")

    def fail():
        with writing(path) as partial:
            partial.write_text("ne")
            raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_two_writers_of_a_path_do_not_meet(tmp_path):
    path = tmp_path / "figures.csv"
    with writing(path) as one, writing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one", "the last to end"
