"""Everything runs on the CPU with the models of tests/tiny and no network."""
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest

import utils


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def cfg():
    """The tiny preset on a small scale, in fp32 for exact comparisons."""
    return utils.make_cfg(preset="tiny", enc_dtype="fp32", batch_size=64, buffer_mult=16, dict_size=256,
                          model_batch_size=8, eval_seqs=8, num_tokens=64 * 40, device="cpu")


@pytest.fixture(scope="session")
def models(cfg):
    return utils.load_models(cfg)


@pytest.fixture(scope="session")
def tokens(cfg, models):
    return utils.load_tokens(cfg, models[0].tokenizer)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A real, shortened `python train.py --preset=tiny`. -> (folder it ran in, its standard output)"""
    folder = tmp_path_factory.mktemp("run")
    run = subprocess.run([sys.executable, ROOT / "train.py", "--preset=tiny", "--num_tokens=200_000", "--save_every=200"],
                         cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout
