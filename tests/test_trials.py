"""That tests/trials.py changes what it says, and nothing else."""
import pytest
import torch

import trials
from conftest import open_models
from train import load_tokens, make_cfg
from utils import Trainer

SMALL = {
    "dict_size": 256, "num_tokens": 64 * 60, "batch_size": 64, "buffer_mult": 16, "eval_seqs": 4, "model_batch_size": 8,
    "enc_dtype": "fp32", "device": "cpu", "dead_after": 640}


def make_trainer(folder, **keys):
    cfg = make_cfg(preset="tiny", save_dir=str(folder), **SMALL, **keys)
    models = open_models(cfg)
    return Trainer(cfg, models, load_tokens(cfg, models)[:60])


def test_rows_are_trained_on_the_same_batches_and_a_mask_is_for_training_alone(monkeypatch):
    rows = [("plain", trials.K, None)]
    for share in (0, 0.5):
        rows.append((f"{share:.0%} masked", trials.K, lambda trainer, share=share: trials.mask_sources(trainer, share)))
    monkeypatch.setitem(trials.TRIALS, "masks", rows)
    results = []
    for seed in (0, 1):
        results += trials.run("masks", seed, SMALL)
    keys = [key for key in results[0] if key not in ("row", "folder")]
    assert [results[1][key] for key in keys] == [results[0][key] for key in keys]
    assert results[2]["fvu/all"] > 1.02 * results[0]["fvu/all"]
    head, line, *lines, _, _, plain, _, _ = trials.table(results).split("\n")
    assert len(lines) == 3 and line.count("|") == head.count("|") == 9
    assert all(len(result["growth"]) == 10 for result in results)
    dead = (results[0]["growth"][-1] + results[3]["growth"][-1]) / 2
    assert plain.startswith("plain: ") and plain.endswith(f" {dead:.1%}") and 0 <= results[0]["rare"] < 1
    for text, row in zip(lines, ("plain", "0% masked", "50% masked")):
        fvus = [result["fvu/all"] for result in results if result["row"] == row]
        assert text.startswith(f"| {row} |") and f"| {sum(fvus) / 2:.4f} ± {abs(fvus[0] - fvus[1]) / 2:.4f} |" in text


def test_the_mask_takes_its_share_of_sources(tmp_path):
    trainer = make_trainer(tmp_path, **trials.K)
    seen = []
    trainer.crosscoder.get_pre_acts = lambda y: seen.append((y == trainer.crosscoder.mean).all(-1))
    trials.mask_sources(trainer, 0.25)
    y = torch.ones(2000, 4, 128)
    trainer.crosscoder.get_pre_acts(y)
    with torch.no_grad():
        trainer.crosscoder.get_pre_acts(y)
    assert seen[0].float().mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.04) and not seen[1].any()


def test_the_quadratic_loss_is_that_of_l0(tmp_path):
    trainer = make_trainer(tmp_path, activation="jumprelu", l0=8)
    trials.aim_by_loss(trainer, 30)
    x = trainer.buffer.next()
    losses = trainer.crosscoder.get_losses(x)
    assert losses.l1_loss.item() == pytest.approx((losses.l0_loss.item() / 8 - 1) ** 2, rel=1e-4)
    losses.l1_loss.backward()
    grad = trainer.crosscoder.log_threshold.grad
    assert losses.l0_loss > 8 and grad.min() < 0 and grad.max() <= 0  # higher thresholds, fewer latents
    trainer.step_counter = trainer.total_steps
    assert trainer.get_l1_coeff() == 30


def test_without_the_mean_taken_out_a_crosscoder_starts_the_same_and_learns_otherwise(tmp_path):
    one, other = (make_trainer(tmp_path, **trials.JUMP) for _ in range(2))
    trials.see_mean(other)
    x = one.buffer.next()
    h, wanted = (trainer.crosscoder.get_pre_acts(trainer.crosscoder.normalise(x)) for trainer in (other, one))
    assert not other.crosscoder.mean.any() and torch.allclose(h, wanted, rtol=1e-4, atol=1e-4)
    before = one.crosscoder.b_enc.detach().clone()
    other.crosscoder.b_enc.data.copy_(before)
    for trainer in (one, other):
        trainer.step_counter = 10
        trainer.step(x)
    steps = [(trainer.crosscoder.b_enc.detach() - before).abs().median() for trainer in (one, other)]
    assert steps[0] / steps[1] == pytest.approx(20, rel=0.01)


def test_half_batches_are_twice_as_many_steps_on_the_same_rows(monkeypatch):
    trainers = []

    def halve(trainer):
        trials.split_batches(trainer, 2)
        trainers.append(trainer)

    monkeypatch.setitem(trials.TRIALS, "batches", [("whole", trials.K, None), ("half", trials.K, halve)])
    whole, half = trials.run("batches", 0, SMALL, rare_tokens=127 * 8)
    assert trainers[0].step_counter == trainers[0].total_steps == 120
    assert half["fvu/all"] < 0.95 * whole["fvu/all"]


@pytest.mark.parametrize("share", [0.05, 0.02, 0])
def test_the_warm_up_takes_its_share_of_the_steps(tmp_path, share):
    trainer = make_trainer(tmp_path)
    own = []
    for step in range(60):
        trainer.step_counter = step
        own.append(trainer.get_lr())
    trials.warm_up(trainer, share)
    changed = []
    for step in range(60):
        trainer.step_counter = step
        changed.append(trainer.get_lr())
    assert changed[10:] == pytest.approx(own[10:]) and max(changed) == trainer.cfg["lr"]
    assert (changed == pytest.approx(own)) == (share == 0.05) and (changed[0] == trainer.cfg["lr"]) == (share == 0)
