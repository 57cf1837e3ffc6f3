"""Registry: names, arguments, and the one line that tells what is wrong."""

import pytest

from sista_pl.errors import SistaError
from sista_pl.registry import Registry


@pytest.fixture
def registry() -> Registry:
    registry = Registry("shape")

    @registry.register("circle")
    def circle(radius: float, color: str = "red"):
        return ("circle", radius, color)

    return registry


def test_builds_from_a_mapping_and_context(registry):
    assert registry.build({"name": "circle", "radius": 2}) == ("circle", 2, "red")
    assert registry.build("circle", radius=3, unrelated=1) == ("circle", 3, "red")
    assert registry.build({"name": "circle", "radius": 2}, radius=3) == ("circle", 2, "red"), "the spec wins"


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("circel", "unknown shape 'circel'; did you mean circle?"),
        ({"name": "circle", "radius": 1, "colour": "blue"}, "has no argument 'colour'; did you mean color?"),
        ("circle", "missing a required argument: 'radius'"),
        ({"radius": 1}, "shape without a name"),
    ],
)
def test_errors_are_one_line(registry, spec, line):
    with pytest.raises(SistaError, match=None) as error:
        registry.build(spec)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_same_name_twice_is_an_error(registry):
    with pytest.raises(SistaError, match="already registered"):
        registry.register("circle")(lambda: None)


def test_fallback_takes_unknown_names():
    registry = Registry("model", fallback=lambda name, depth=1: (name, depth))
    assert registry.build({"name": "anything", "depth": 4}) == ("anything", 4)
    with pytest.raises(SistaError, match="did you mean depth"):
        registry.build({"name": "anything", "dept": 4})


def test_iterates_sorted(registry):
    registry.register("arc")(lambda: None)
    assert list(registry) == ["arc", "circle"]
    assert "arc" in registry
    assert len(registry) == 2
    with pytest.raises(SistaError, match="unknown shape"):
        registry["square"]
