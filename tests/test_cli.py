"""train.py as users call it."""
import re
import subprocess
import sys

import numpy as np
import pytest

import bench
import train
from conftest import ROOT
from utils import CrossCoder, Trainer, default_cfg, load_models, make_cfg


def test_help_lists_every_key_with_default_and_comment(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for key, default in default_cfg.items():
        assert re.search(rf"--{key} VALUE .+? \(default: {re.escape(str(default) if default is not False else 'false')}\)", text), key


def test_the_line_that_the_run_prints_loads_the_result(tiny_run, monkeypatch):
    folder, out = tiny_run
    monkeypatch.chdir(folder)
    line = re.search(r"load it with: (.+)", out)[1]
    names = {"CrossCoder": CrossCoder}
    exec(line, names)
    assert names["crosscoder"].W_dec.shape == (2048, 4, 128)
    for said in ("resid_post.0 to resid_post.3", "2,048 latents", "390 steps", "peak memory", "tokens/s", "clean CE"):
        assert said in out


BAD_INPUT = [
    ["--l1_coef=2"], ["--no-such-thing"], ["2"], ["--l1_coeff"], ["--l1_coeff=much"], ["--dict_size=0"], ["--batch_size=-5"],
    ["--buffer_mult=1"], ["--seq_len=1000"], ["--tokens=missing.npy"], ["--tokens=empty.npy"], ["--tokens=flat.npy"],
    ["--tokens=alien.npy"], ["--tokens=short.npy"], ["--eval_seqs=100000"], ["--layers=9"], ["--site=resid_past"],
    ["--enc_dtype=int4"], ["--device=cuda:42"], ["--model_name=someone/unknown"], ["--tokens=", "--dataset=someone/unknown"],
    ["--save_dir=/proc/nowhere"], ["--save_dir=empty.npy"], ["--wandb_mode=maybe"], ["--preset=huge"],
]

LATE = {"--tokens=short.npy": "buffer_mult", "--eval_seqs=100000": "buffer_mult"}  # what shows in another key


@pytest.mark.parametrize("arguments", BAD_INPUT, ids=" ".join)
def test_bad_input_ends_in_one_line_and_exit_code_2_and_leaves_nothing(arguments, capfd, tmp_path, monkeypatch):
    np.save("empty.npy", np.zeros((0, 128), np.uint16))
    np.save("flat.npy", np.zeros(128, np.uint16))
    np.save("alien.npy", np.full((2000, 128), 5000, np.uint16))
    np.save("short.npy", np.zeros((100, 128), np.uint16))
    before = sorted(tmp_path.rglob("*"))
    assert train.main(["--preset=tiny", *arguments]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    key, _, value = arguments[-1].lstrip("-").partition("=")
    assert error[0].startswith(f"error: {LATE.get(arguments[-1], key)}") or arguments in (["2"], ["--l1_coeff"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("large", [
    {"dict_size": 2**14, "batch_size": 64}, {"batch_size": 2048, "dict_size": 256}, {"model_batch_size": 64, "eval_seqs": 64},
    {"batch_size": 2048, "dict_size": 4096, "activation": "jumprelu"}])
@pytest.mark.parametrize("enc_dtype", ["fp32", "bf16"])
def test_memory_is_what_the_formula_says(cfg, tokens, large, enc_dtype):
    """Whichever needs most: gradients, a step's activations, or the logits of an evaluation."""
    cfg = {**cfg, "buffer_mult": 2, "model_batch_size": 4, "eval_seqs": 4, "enc_dtype": enc_dtype, **large}
    models = load_models(cfg)
    cfg |= {"l0_coeff": 1.0} if cfg["activation"] == "jumprelu" else {}
    trainer = Trainer(cfg, models, tokens[:200])
    wanted = train.get_memory(cfg, models, 4, 128)
    trainer.step()
    held = sum(p.nbytes for p in trainer.crosscoder.parameters()) * 3
    assert wanted["weights and Adam"] == pytest.approx(held)
    assert wanted["buffer"] == sum(t.nbytes for t in (trainer.buffer.buffer, trainer.buffer.order, trainer.buffer.row_numbers))
    peak = max(map(bench.peak_memory, (trainer.buffer.refresh, trainer.step, trainer.evaluate)))
    assert 0.8 < peak / wanted["at work"] < 1.15


@pytest.mark.parametrize("large", ["--dict_size=50_000_000", "--buffer_mult=5_000_000", "--model_batch_size=10_000_000"])
def test_a_run_that_does_not_fit_says_so_at_once_and_what_would(large, capfd):
    assert train.main(["--preset=tiny", "--eval_seqs=1_000_000_000", large]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    key, most = re.search(r"what fits: (\w+)=(\d+)$", error).groups()
    assert error.startswith("error: device='cpu'") and f"--{key}=" == large[: len(key) + 3]
    cfg = make_cfg(preset="tiny", eval_seqs=10**9, device="cpu", **{key: int(most) * 9 // 10})  # others use memory too
    models = load_models(cfg)
    train.check_memory(cfg, models, 4, 128)
    with pytest.raises(ValueError, match="what fits"):
        train.check_memory({**cfg, key: int(most) * 11 // 10}, models, 4, 128)


def test_as_a_process_bad_input_says_one_line_and_no_traceback(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "train.py", "--preset=tiny", "--l1_coef=2"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "error: l1_coef: no such key, did you mean l1_coeff?\n")
