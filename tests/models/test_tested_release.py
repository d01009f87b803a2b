"""An installed transformers outside the range that was tested is named, once, and nothing else is."""

import subprocess
import sys
import warnings
from importlib import metadata

import pytest

from locos_fast.models.tested_release import warn_if_untested

REQUIREMENTS = ["torch>=2.11", "transformers<5.25,>=5.17.0", 'ruff; extra == "dev"']


@pytest.fixture(autouse=True)
def tested_range(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda package: REQUIREMENTS)


def install(monkeypatch, release):
    monkeypatch.setattr(metadata, "version", {"transformers": release}.__getitem__)


@pytest.mark.parametrize("release", ["5.16.1", "5.25.0", "5.25.2", "6.0.0.dev0", "4.57.6"])
def test_a_release_outside_the_range_is_named_with_the_range(monkeypatch, release):
    install(monkeypatch, release)
    with pytest.warns(UserWarning, match=rf"tested with transformers <5\.25,>=5\.17\.0, but {release} is installed"):
        warn_if_untested()


@pytest.mark.parametrize("release", ["5.17.0", "5.18.0.dev0", "5.24.0", "5.24.7"])
def test_a_release_inside_the_range_is_not_worth_a_word(monkeypatch, release):
    install(monkeypatch, release)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested()


def test_a_package_that_is_not_installed_says_nothing_about_what_was_tested(monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "requires", missing)
    install(monkeypatch, "1.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested()


IMPORTS = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: "1.0" if name == "transformers" else version(name)
import locos_fast.scoring.recording, locos_fast.models.loading, locos_fast
"""


def test_importing_the_package_warns_once():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("but 1.0 is installed") == 1
