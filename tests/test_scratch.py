"""scratch.py on a real run of one model; the cells on two models are in test_diff.py."""
import json
import re
import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest
import safetensors.torch
import torch

from conftest import ROOT
from planted import functions_of_scratch
from utils import CrossCoder, Trainer, get_identity

TEXT = (ROOT / "scratch.py").read_text().split("# %% Model diffing")[0]
FIRST, *CELLS = re.split(r"^(?=# %%)", TEXT, flags=re.MULTILINE)[1:]


@pytest.fixture(autouse=True)
def gradients_back_on():
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def folder(cfg, models, tokens, tmp_path_factory):
    """The folder of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("small_run")
    Trainer({**cfg, "save_dir": str(folder / "checkpoints"), "save_every": 20}, models, tokens).train()
    return folder


def test_every_cell_needs_only_the_first_and_every_figure_shows_something(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    loaded: dict = {}
    exec(FIRST, loaded)
    capsys.readouterr()
    assert len(CELLS) > 10
    for cell in CELLS:
        names = dict(loaded)
        exec(cell, names)
        out = capsys.readouterr().out
        shown = re.findall(r"^(fig_\w+|overview)$", cell, flags=re.MULTILINE)
        figures = {name: value for name, value in names.items() if isinstance(value, go.Figure)}
        assert sorted(figures) == sorted(set(shown))
        for name, figure in figures.items():
            assert figure.data and figure.layout.title.text, name
            for trace in figure.data:
                values = trace[{"heatmap": "z", "histogram": "x"}.get(trace.type, "y")]
                assert np.size(values) and np.isfinite(np.asarray(values, float)).all(), name
        assert figures or out or "def convert_checkpoint" in cell, cell


def test_scratch_runs_from_top_to_bottom_and_ends_where_model_diffing_begins(folder):
    run = subprocess.run([sys.executable, ROOT / "scratch.py"], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("python train.py --preset=diff-tiny\n")
    for said in ("'resid_post.3']", "at L0", r"latents.html, to open in a browser: 256 latents", "resid_post.2 x 1.0", "without it", "folded_step_",
                 r"\| resid_post.3 \| 0\.\d{4} \|"):
        assert re.search(said, run.stdout), said
    checkpoints = sorted(folder.glob("checkpoints/version_0/step_*"))
    assert len(checkpoints) == 2
    folded = safetensors.torch.load_file(checkpoints[-1].with_name(f"folded_{checkpoints[-1].name}.safetensors"))
    fold = functions_of_scratch()["fold"]
    assert torch.equal(folded["W_dec"], fold(CrossCoder.load(checkpoints[-1]))["W_dec"])


@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
def test_the_first_cell_opens_a_checkpoint_of_an_earlier_version(cfg, tmp_path, activation):
    """Whose cfg has text in place of lists, only the keys that the activation uses, and keys that are gone."""
    crosscoder = CrossCoder({**cfg, "activation": activation}, 4, 128)
    folder = tmp_path / "checkpoints" / "version_0" / "step_0000001"
    crosscoder.save(folder)
    own = {"relu": ["dec_init_norm", "l1_coeff", "shared_penalty"], "batchtopk": ["k"]}
    used = set(sum(own.values(), ["l0_coeff"])) - set(own[activation])
    old = {key: value for key, value in crosscoder.cfg.items() if key not in used}
    old |= {key: ",".join(old[key]) for key in ("model_name", "tokens", "dataset")}
    old |= {"layers": "all", "norm": "estimate", "loss_weights": "", "ignore_tokens": ""}
    (folder / "cfg.json").write_text(json.dumps(old))
    manifest = {file.name: get_identity(file) for file in folder.glob("c*")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    loaded: dict = {}
    exec(FIRST, loaded)
    assert loaded["names"] == [f"resid_post.{layer}" for layer in range(4)]
    assert loaded["cfg"]["tokens"] == cfg["tokens"] and len(loaded["freqs"]) == 256


def test_without_a_checkpoint_the_first_cell_says_how_to_make_one():
    with pytest.raises(ValueError, match="no checkpoint in checkpoints; python train.py --preset=tiny"):
        exec(FIRST, {})
