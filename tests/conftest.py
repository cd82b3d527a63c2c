"""Everything runs on the CPU with the models of tests/tiny and no network but loopback."""
import atexit
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that spin on cores that others share: 20 times slower
ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny"
sys.path.insert(0, str(ROOT))

import pytest
import torch
import tqdm

import train
from hub import Hub
from train import load_models, load_tokens, make_cfg


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- A small run, in this process ----------------------------------------------------------------
@pytest.fixture(scope="session")
def cfg():
    """The tiny preset on a small scale, in fp32 for exact comparisons."""
    return make_cfg(
        preset="tiny", enc_dtype="fp32", batch_size=64, buffer_mult=16, dict_size=256, model_batch_size=8,
        eval_seqs=8, num_tokens=64 * 40, device="cpu")


@pytest.fixture(scope="session")
def models(cfg):
    return open_models(cfg)


@pytest.fixture(scope="session")
def tokens(cfg, models):
    return load_tokens(cfg, models)


READ = ["model_name", "layers", "site", "center", "norm", "seq_len", "enc_dtype", "device"]  # by load_models
OPENED = {}  # their values -> the models


def open_models(cfg: dict) -> list:
    """load_models, once a session: for tests that leave the models as they are."""
    key = json.dumps([cfg[name] for name in READ])
    if key not in OPENED:
        OPENED[key] = load_models({**cfg})
    return OPENED[key]


# ---- Processes of their own ----------------------------------------------------------------------
@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A real, shortened `python train.py --preset=tiny`. -> (folder it ran in, its standard output)"""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, ROOT / "train.py", "--preset=tiny", "--num_tokens=200_000", "--save_every=200"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout


IMPORTED = [  # before anything is forked: what a run imports, at once or later
    "train", "conftest", "requests", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.gpt2.tokenization_gpt2", "transformers.models.blip_2", "wandb.sdk.lib.gitlib"]


@functools.cache
def start_parent() -> tuple[Hub, Path]:
    """Starts the process that each Run is a fork of, so that it need not import everything again. All of
    them ask the same hub, which has nothing at first, and keep what they download in the same folder.
    -> the hub, the folder"""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    home = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, home)
    with mock.patch.dict(os.environ):
        # WANDB_SERVICE: a server of wandb's for this process and those that it starts, which ends with it.
        for name in [name for name in os.environ if name.startswith(("HF_", "WANDB_SERVICE"))]:
            del os.environ[name]
        os.environ["HF_ENDPOINT"] = hub.url
        os.environ["HF_HOME"] = str(home)
        os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        multiprocessing.set_forkserver_preload(IMPORTED)
        multiprocessing.forkserver.ensure_running()
    return hub, home


class Run(ForkServerProcess):
    """A process that calls function(argv) and exits with what it returns, as train.py with train.main:
    with signal handlers, output files, environment and threads of its own. It is not started twice."""

    def __init__(self, argv: list, out=os.devnull, err=os.devnull, env={}, threads=None, function=train.main):
        super().__init__(daemon=True)
        self.argv = [str(argument) for argument in argv]
        self.files = [str(out), str(err)]
        self.env = env
        self.threads = threads
        self.function = function
        start_parent()
        for file in self.files:
            open(file, "w").close()
        self.start()

    def run(self):  # in the new process
        os.setpgrp()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
        for number, file in enumerate(self.files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
        tqdm.tqdm.set_lock(threading.RLock())  # its own is shared with all processes, and outlives them
        os.environ.update(self.env)
        if self.threads:
            torch.set_num_threads(self.threads)
        sys.orig_argv = [sys.executable, str(ROOT / "train.py"), *self.argv]
        sys.exit(self.function(self.argv))

    # From here on as subprocess.Popen has it.
    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, within: float = 200) -> int:
        self.join(within)
        assert self.exitcode is not None, f"still at work after {within} s"
        return self.exitcode
