"""scratch.py on a real run."""
import re
import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest
import safetensors.torch
import torch

from conftest import ROOT
from utils import CrossCoder

TEXT = (ROOT / "scratch.py").read_text().split("# %% Model diffing")[0]  # the rest is in test_diff.py


@pytest.fixture(autouse=True)
def gradients_back_on():
    yield
    torch.set_grad_enabled(True)


def test_scratch_runs_from_top_to_bottom_and_every_figure_shows_something(tiny_run, monkeypatch, capsys):
    folder, _ = tiny_run
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(TEXT, names)
    figures = {name: value for name, value in names.items() if isinstance(value, go.Figure)}
    assert sorted(figures) == sorted(set(re.findall(r"^(fig_\w+|overview)$", TEXT, flags=re.MULTILINE)))
    for name, figure in figures.items():
        assert figure.data and figure.layout.title.text, name
        for trace in figure.data:
            values = np.asarray(trace.z if trace.type == "heatmap" else trace.x if trace.type == "histogram" else trace.y)
            assert values.size and np.isfinite(values.astype(float)).all(), name
    out = capsys.readouterr().out
    for said in ("4 sources", "at L0", "[", "resid_post.2 x 1.0", "without it", "the plain formula"):
        assert said in out
    folded = safetensors.torch.load_file(names["CHECKPOINTS"][-1] / "folded.safetensors")
    assert torch.equal(folded["W_dec"], CrossCoder.load(names["CHECKPOINTS"][-1]).fold()["W_dec"])


def test_every_cell_needs_only_the_first(tiny_run, monkeypatch):
    folder, _ = tiny_run
    monkeypatch.chdir(folder)
    first, *others = re.split(r"^(?=# %%)", TEXT, flags=re.MULTILINE)[1:]
    assert len(others) > 10
    loaded: dict = {}
    exec(first, loaded)
    for cell in others:
        exec(cell, dict(loaded))


def test_with_one_model_it_ends_where_model_diffing_begins(tiny_run):
    folder, _ = tiny_run
    run = subprocess.run([sys.executable, ROOT / "scratch.py"], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.endswith("python train.py --preset=diff-tiny\n")
