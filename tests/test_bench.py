import json
import math
import sys
from pathlib import Path

import pytest
import torch

import bench
import gpu
from conftest import TINY
from train import make_cfg
from utils import Trainer, get_stacked_resids


def test_the_reference_computes_what_training_does(cfg, models, tokens):
    trainer, reference = Trainer(cfg, models, tokens[:60]), bench.Reference(cfg, models[0], tokens[:60].long())
    trainer.crosscoder.norm_factor.fill_(1)  # as in the published code, which scales the activations before
    trainer.get_l1_coeff, trainer.get_lr = (lambda: cfg["l1_coeff"]), (lambda: cfg["lr"])
    for _ in range(5):
        x = trainer.buffer.next()
        trainer.buffer.next = lambda: x
        metrics = trainer.step()
        del trainer.buffer.next
        mine = [metrics[key].item() for key in ("loss/l2", "loss/l1", "sparsity/l0_batch")]
        assert reference.step(x) == pytest.approx(mine, rel=1e-3)
    close = (reference.harvest(tokens[:2].long()) - get_stacked_resids(models, tokens[:2], cfg)).norm(dim=-1).mean()
    assert close < 0.05 * get_stacked_resids(models, tokens[:2], cfg).norm(dim=-1).mean()  # bf16 autocast


def test_bench_measures_every_row():
    cfg = make_cfg(preset="tiny", device="cpu", dict_size=512, batch_size=128, buffer_mult=128,
                   model_batch_size=4, eval_seqs=1)
    rows = bench.bench(cfg, str(TINY / "base"), flops=1e15, bandwidth=1e15, rounds=1)
    assert [row["what"] for row in rows] == ["train step", "harvest", "refill", "end to end"]
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["times_reference"] > 0 and 0 < row["share_of_limit"] < 1
    assert 0 < rows[-1]["refill_memory_share_of_buffer"] < 0.2 and rows[-1]["bytes_a_parameter"] > 12
    json.dumps(rows)


def test_bench_measures_every_activation(capsys):
    bench.bench_activations("cpu", [128, 256], (2, 16), 32, 2, rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["128", "256"] and all(len(line.split()) == 6 for line in lines[2:])


def test_what_is_for_a_gpu_says_so_where_there_is_none_and_its_parts_run_here(monkeypatch, capsys):
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["gpu.py"])
        assert gpu.main() == 0
        assert capsys.readouterr().out == "skipped: no GPU here; --rehearse runs every part small, on the CPU\n"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "correctness", "harvest", "switch"])
    assert gpu.main() == 0
    assert len(json.loads(Path("gpu_results/correctness.json").read_text())) == 24
    assert all(row["sparse_ms"] > 0 for row in json.loads(Path("gpu_results/switch.json").read_text()))
    for value in (1.1, math.nan):
        part = gpu.Part("correctness", Path("gpu_results"))
        part.at_most(1.0, decode="dense", error=value)
        assert part.wrong == [f"dense: error {value:.3g}, not at most 1"]
