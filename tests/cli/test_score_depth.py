"""What `score` says of a needle that could not be put where it was asked for, and remembers of its context."""

from __future__ import annotations

import hashlib
import json

from tests.cli.test_cli import arguments, planted, run  # noqa: F401  (planted is a fixture)


def test_a_missed_depth_is_one_line_and_the_true_one_is_kept(capsys, monkeypatch, planted, tmp_path):  # noqa: F811
    context = "rain fell on the hill " * 30
    (tmp_path / "unpunctuated.txt").write_text(context)
    command = arguments(planted, context=str(tmp_path / "unpunctuated.txt"), depth="60")
    code, out, err = run(capsys, monkeypatch, [*command, "--json"])
    meta = json.loads(out)["meta"]
    assert code == 0
    assert "warning: depth: asked for 60 percent, but the last sentence boundary before it is at 0" in err
    assert (meta["depth"], meta["requested_depth"]) == (0.0, 60.0)
    assert meta["context_sha256"] == hashlib.sha256(context.encode()).hexdigest()
