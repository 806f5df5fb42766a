"""The command line as a test calls it."""

from __future__ import annotations

import fake_claims
import pytest

from mainstem.cli import main


@pytest.fixture
def call(capsys):
    """The exit code, standard output and standard error of a command line."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        output = capsys.readouterr()
        return ended.value.code or 0, output.out, output.err

    return run


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    with fake_claims.installed(tmp_path, monkeypatch) as copy:
        yield copy
