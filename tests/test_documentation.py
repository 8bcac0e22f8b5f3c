"""README and the docstrings are true: their examples run."""

import doctest
import gc
import importlib
import pkgutil
from pathlib import Path

import pytest

import shlock
from shlock import snapshot

README = Path(__file__).parents[1] / "README.rst"


@pytest.fixture(autouse=True)
def clean_readme_domain():
    yield
    from shlock import _names

    _names._domains.clear()
    gc.collect()  # doctest leaves cycles, in which some of the examples' objects are
    snapshot.clean("readme")


@pytest.mark.filterwarnings("default")
def test_the_examples_of_readme_run_as_shown():
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0


@pytest.mark.parametrize("name", ["shlock", *(f"shlock.{m.name}" for m in pkgutil.iter_modules(shlock.__path__))])
def test_the_examples_of_a_docstring_run_as_shown(name):
    if not name.endswith("__main__"):
        assert doctest.testmod(importlib.import_module(name)).failed == 0
