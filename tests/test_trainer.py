import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import utils
from conftest import ROOT
from utils import CrossCoder, Trainer, make_cfg


@pytest.fixture
def trainer(cfg, models, tokens):
    return Trainer(cfg, models, tokens[:60])


def test_the_schedule_warms_up_stays_and_decays(trainer):
    trainer.total_steps = 1000
    lr, l1 = trainer.cfg["lr"], trainer.cfg["l1_coeff"]
    wanted = {0: (lr / 50, 0), 24: (lr / 2, l1 * 24 / 50), 50: (lr, l1), 799: (lr, l1), 900: (lr / 2, l1), 999: (lr / 200, l1)}
    for trainer.step_counter, (wanted_lr, wanted_l1) in wanted.items():
        assert trainer.get_lr() == pytest.approx(wanted_lr)
        assert trainer.get_l1_coeff() == pytest.approx(wanted_l1)


def test_held_out_sequences_are_never_trained_on(trainer, tokens):
    assert torch.equal(trainer.eval_tokens.int(), tokens[52:60].int())
    assert torch.equal(trainer.buffer.all_tokens.int(), tokens[:52].int())


def test_norm_factor_makes_the_mean_norm_sqrt_d_model(trainer):
    x = trainer.buffer.buffer / trainer.crosscoder.norm_factor[:, None]
    assert torch.allclose(x.norm(dim=-1).mean(0), torch.tensor(128**0.5), rtol=1e-4)


def test_published_norms_are_taken_for_the_layers_in_use(trainer, monkeypatch):
    trainer.cfg = {**trainer.cfg, "norm": "published", "layers": "0,2"}
    assert trainer.get_norm_factor().tolist() == pytest.approx([1.8281, 2.2031])


def test_a_step_is_adam_on_gradients_clipped_to_a_norm_of_one(trainer):
    plain = copy.deepcopy(trainer.crosscoder)
    optimizer, norms = torch.optim.Adam(plain.parameters(), fused=False, foreach=False), []
    batches = [trainer.buffer.next() for _ in range(6)]
    trainer.buffer.next = iter(batches).__next__
    for x in batches:
        optimizer.param_groups[0]["lr"] = trainer.get_lr()
        losses = plain.get_losses(x)
        (losses.l2_loss + trainer.get_l1_coeff() * losses.l1_loss).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        assert trainer.step()["loss/grad_norm"].item() == pytest.approx(norms[-1], rel=1e-4)
    assert max(norms) > 1
    for mine, wanted in zip(trainer.crosscoder.parameters(), plain.parameters()):
        assert torch.allclose(mine, wanted, rtol=1e-4, atol=1e-6)


def test_a_step_reads_nothing_back_from_the_device(trainer):
    """On the meta device tensors have no values: reading one would raise."""
    buffer, trainer.crosscoder = trainer.buffer, trainer.crosscoder.to("meta")
    buffer.cfg = {**buffer.cfg, "device": "meta"}
    trainer.skipped_in_a_row = trainer.skipped_in_a_row.to("meta")
    for name in ("buffer", "order", "row_numbers"):
        setattr(buffer, name, getattr(buffer, name).to("meta"))
    trainer.tokens_since_fired = trainer.tokens_since_fired.to("meta")
    trainer.optimizer = torch.optim.Adam(trainer.crosscoder.parameters())  # the fused one has no meta, this no scale
    trainer.optimizer.register_step_pre_hook(lambda adam, *_: vars(adam).update(grad_scale=None, found_inf=None))
    for _ in range(3):
        metrics = trainer.step()
    for key in ("loss/total", "loss/grad_norm", "fvu/batch", "sparsity/l0_batch", "data/rows_replayed"):
        assert metrics[key].is_meta


def test_the_same_seed_trains_to_the_same_numbers(cfg, models, tokens):
    runs = [Trainer(cfg, models, tokens[:60]) for _ in range(2)]
    losses = [[trainer.step()["loss/total"].item() for _ in range(20)] for trainer in runs]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert torch.equal(runs[0].crosscoder.W_enc, runs[1].crosscoder.W_enc)


def test_latents_that_do_not_fire_are_counted_in_tokens(trainer):
    trainer.crosscoder.b_enc.data[:10] = -1e6
    trainer.cfg = {**trainer.cfg, "dead_after": 3 * 64}
    for _ in range(3):
        trainer.step()
    assert (trainer.tokens_since_fired[:10] == 3 * 64).all() and (trainer.tokens_since_fired[10:] == 0).any()
    assert trainer.evaluate()["sparsity/dead"] >= 10 / 256


def test_metrics_go_to_history_and_to_metrics_jsonl(cfg, models, tokens):
    trainer = Trainer({**cfg, "log_every": 10, "eval_every": 20}, models, tokens[:60])
    final = trainer.train()
    rows = [json.loads(line) for line in open(trainer.run_dir / "metrics.jsonl")]
    assert rows == trainer.history
    assert [row["step"] for row in rows] == [0, 10, 20, 20, 30, 40, 40]  # evaluated at 0, 20 and the end
    assert rows[0]["fvu/all"] == pytest.approx(1, abs=0.3)  # a bad initialisation would show as far above 1
    assert {key.split("/")[0] for row in rows for key in row} == {
        "step", "loss", "fvu", "sparsity", "ce", "data", "perf", "norm_ratio"}
    assert rows[-1]["fvu/all"] == final["fvu/all"] < rows[0]["fvu/all"]
    assert rows[-2]["data/unique_tokens"] == 40 * 64 and rows[-2]["data/rows_replayed"] == 0


def test_every_run_gets_a_folder_of_its_own(cfg, models, tokens):
    runs = [Trainer(cfg, models, tokens[:60]) for _ in range(2)]
    assert [trainer.save().parts[-2:] for trainer in runs] == [(f"version_{n}", "step_0000000") for n in range(2)]


def test_wandb_that_cannot_start_is_mentioned_once_and_the_run_goes_on(cfg, models, tokens, capfd, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setenv("NETRC", os.devnull)
    trainer = Trainer({**cfg, "wandb_mode": "online", "log_every": 10}, models, tokens[:60])
    trainer.train()
    assert trainer.step_counter == 40
    assert capfd.readouterr().err.count("the run goes on without it") == 1


def test_wandb_offline_writes_a_run(cfg, models, tokens):
    trainer = Trainer({**cfg, "wandb_mode": "offline"}, models, tokens[:60])
    trainer.train()
    assert list(trainer.run_dir.glob("wandb/offline-run-*/*.wandb"))


def test_the_tiny_run_learns(tiny_run):
    folder, out = tiny_run
    rows = [json.loads(line) for line in open(folder / "checkpoints" / "version_0" / "metrics.jsonl")]
    final = rows[-1]
    assert final["fvu/all"] < 0.25 and final["sparsity/l0"] < 100
    for layer in range(4):
        assert 0 < final[f"ce/delta_resid_post.{layer}"] < 0.2 * final[f"ce/ablated_resid_post.{layer}"]
    assert sorted(p.name for p in (folder / "checkpoints" / "version_0").glob("step_*")) == ["step_0000200", "step_0000390"]


def test_the_tiny_run_ends_in_fp32_where_it_ends_in_bf16(tiny_run):
    cfg = make_cfg(preset="tiny", num_tokens=200_000, enc_dtype="fp32", device="cpu", eval_every=10**6)
    models = utils.load_models(cfg)
    trainer = Trainer(cfg, models, utils.load_tokens(cfg, models[0].tokenizer))
    final, bf16 = trainer.train(), json.loads(open(tiny_run[0] / "checkpoints" / "version_0" / "metrics.jsonl").readlines()[-1])
    for key in ("fvu/all", "sparsity/l0"):
        assert bf16[key] == pytest.approx(final[key], rel=0.01)
