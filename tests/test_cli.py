"""train.py as users call it."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import bench
import train
from conftest import ROOT, open_models
from train import KEYS, make_cfg
from utils import CrossCoder, Trainer


def test_help_lists_every_key_at_once_wherever_it_is_written():
    begin = time.perf_counter()
    run = subprocess.run([sys.executable, ROOT / "train.py", "--l1_coeff=2", "--help"], capture_output=True, text=True)
    assert time.perf_counter() - begin < 2  # torch alone takes longer to import
    assert run.returncode == 0 and run.stderr == ""
    _, full = os.pipe()
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(full, b"x" * 4096)
    assert subprocess.run([sys.executable, ROOT / "train.py", "--help"], stdout=full).returncode == 0
    for closed in (">&-", "2>&-", ">&- 2>&-", "> /dev/full"):
        assert subprocess.run(f"'{sys.executable}' '{ROOT}/train.py' --help {closed}", shell=True).returncode == 0
    notebook = ("import io, runpy, sys; sys.argv = ['train.py', '--help']; sys.stdout = io.StringIO()\n"  # as %run has it
                f"try: runpy.run_path('{ROOT}/train.py', run_name='__main__')\n"
                "except SystemExit: assert '--l1_coeff' in sys.stdout.getvalue()")
    assert subprocess.run([sys.executable, "-c", notebook]).returncode == 0
    text = " ".join(run.stdout.split())
    for key, (default, comment) in KEYS.items():
        shown = ",".join(map(str, default)) if isinstance(default, list) else str(default)
        assert f"--{key} {comment} (default: {shown})" in text, key


def test_the_line_that_the_run_prints_loads_the_result(tiny_run, monkeypatch):
    folder, out = tiny_run
    monkeypatch.chdir(folder)
    line = re.search(r"load it with: (.+)", out)[1]
    names = {"CrossCoder": CrossCoder}
    exec(line, names)
    assert names["crosscoder"].W_dec.shape == (2048, 4, 128)
    for said in (
        "resid_post.0 to resid_post.3", "2,048 latents", "390 steps", "peak memory", "tokens/s", "clean CE"):
        assert said in out


def test_the_folder_says_what_made_it(tiny_run):
    starts = open(tiny_run[0] / "checkpoints" / "version_0" / "starts.jsonl")
    (start,) = (json.loads(line) for line in starts)
    assert start["command"][1:] == [
        str(ROOT / "train.py"), "--preset=tiny", "--num_tokens=200_000", "--save_every=200"]
    assert train.torch.__version__.startswith(start["versions"]["torch"])
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", start["commit"])


BAD_INPUT = [
    ["--l1_coef=2"], ["--no-such-thing"], ["2"], ["--l1_coeff"], ["--l1_coeff=much"], ["--dict_size=0"],
    ["--batch_size=-5"], ["--buffer_mult=1"], ["--seq_len=1000"], ["--tokens=missing.npy"],
    ["--tokens=empty.npy"], ["--tokens=flat.npy"], ["--tokens=alien.npy"], ["--tokens=short.npy"],
    ["--eval_seqs=100000"], ["--layers=9"], ["--site=resid_past"], ["--enc_dtype=int4"], ["--device=cuda:42"],
    ["--model_name=someone/unknown"], ["--tokens=", "--dataset=someone/unknown"],
    ["--save_dir=/proc/nowhere"], ["--save_dir=empty.npy"], ["--wandb_mode=maybe"], ["--preset=huge"],
]
LATE = {"--tokens=short.npy": "buffer_mult", "--eval_seqs=100000": "buffer_mult"}  # shows in another key


@pytest.mark.parametrize("arguments", BAD_INPUT, ids=" ".join)
def test_bad_input_ends_in_one_line_and_exit_code_2_and_leaves_nothing(
        arguments, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_models", open_models)
    np.save("empty.npy", np.zeros((0, 128), np.uint16))
    np.save("flat.npy", np.zeros(128, np.uint16))
    np.save("alien.npy", np.full((2000, 128), 5000, np.uint16))
    np.save("short.npy", np.zeros((100, 128), np.uint16))
    before = sorted(tmp_path.rglob("*"))
    assert train.main(["--preset=tiny", *arguments]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    key, _, _ = arguments[-1].lstrip("-").partition("=")
    if arguments not in (["2"], ["--l1_coeff"]):
        assert error[0].startswith(f"error: {LATE.get(arguments[-1], key)}")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("large", [
    {"dict_size": 2**14, "batch_size": 64},
    {"batch_size": 2048, "dict_size": 256},
    {"model_batch_size": 32, "eval_seqs": 32},
    {"model_batch_size": 32, "batch_size": 1024, "buffer_mult": 5},
    {"batch_size": 2048, "dict_size": 4096, "activation": "jumprelu"},
    {"batch_size": 512, "dict_size": 8192, "activation": "batchtopk", "buffer_mult": 8},
])
@pytest.mark.parametrize("enc_dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(
    make_cfg(device="cpu")["enc_dtype"] != "bf16", reason="minutes each where the CPU has no bf16 arithmetic"))])
def test_memory_is_enough_and_not_much_more(cfg, tokens, large, enc_dtype):
    """Whichever needs most: weights and gradients, a step's activations, the logits of an evaluation, a pass
    of the models, or the fit of batchtopk's threshold."""
    cfg = {**cfg, "buffer_mult": 2, "model_batch_size": 4, "eval_seqs": 4, "enc_dtype": enc_dtype, **large}
    models = open_models(cfg)
    trainer = Trainer(cfg, models, tokens[:200])
    memory = train.check_memory(cfg, 4, 128, models[0].cfg.d_vocab)
    trainer.step()
    buffer = trainer.buffer
    weights = sum(parameter.nbytes for parameter in trainer.crosscoder.parameters())
    moments = 0
    for state in trainer.optimizer.state.values():
        moments += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    in_buffer = buffer.buffer.nbytes + buffer.order.nbytes + buffer.row_numbers.nbytes
    assert memory["weights"] == weights + weights + moments  # one of them is for the gradients
    assert memory["buffer"] == in_buffer

    def fill():
        buffer.pointer = buffer.size
        buffer.refresh()

    peak = max(bench.peak_memory(part) for part in (trainer.step, trainer.evaluate, fill))
    needed = weights + moments + in_buffer + peak
    assert needed <= sum(memory.values()) <= 1.6 * needed


@pytest.mark.parametrize("key, value", [
    ("dict_size", 50_000_000), ("buffer_mult", 5_000_000), ("model_batch_size", 10_000_000)])
def test_a_run_that_does_not_fit_says_so_at_once_and_what_to_lower(key, value, capfd, monkeypatch):
    monkeypatch.setattr(train, "load_models", open_models)
    assert train.main(["--preset=tiny", "--eval_seqs=1_000_000_000", f"--{key}={value}"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    sizes = r"[\d,.]+ GB are needed beyond the models, [\d,.]+ are free; [\d,.]+ are for "
    assert re.match(f"error: device='cpu': {sizes}", error)
    assert re.search(rf"lower (\w+ or )?{key}$", error)
    cfg = make_cfg(preset="tiny", eval_seqs=10**9, device="cpu")
    train.check_memory(cfg, 4, 128, 4096)  # with the preset's it fits


def test_as_a_process_bad_input_says_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--preset=tiny", "--l1_coef=2"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ignored = 0
    while not ignored >> (signal.SIGUSR1 - 1) & 1:  # from its first moments on
        ignored = int(re.search(r"SigIgn:\s*(\w+)", open(f"/proc/{run.pid}/status").read())[1], 16)
        assert run.poll() is None
    run.send_signal(signal.SIGUSR1)  # to save what is not there yet
    out, err = run.communicate()
    assert (run.returncode, out) == (2, "")
    assert err == "error: l1_coef: no such key, did you mean l1_coeff?\n"
