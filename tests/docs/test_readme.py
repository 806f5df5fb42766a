"""What the README prints works as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

import mainstem

README = Path(__file__).parents[2] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_example_runs_as_a_script(tmp_path):
    (tmp_path / "example.py").write_text(blocks()[0])
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resnet-14+connection=rezero" in done.stdout
    assert len(list(tmp_path.glob("runs/*/report.html"))) == 1


def test_the_stream_example_runs():
    names = {"mainstem": mainstem, "x": torch.randn(2, 16, 8, 8)}
    exec(blocks()[2], names)
    assert type(names["net"].stream[0].connection).__name__ == "ReZero"


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
