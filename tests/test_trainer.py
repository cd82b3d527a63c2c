import copy
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import Run
from train import make_cfg
from utils import Trainer, list_checkpoints


@pytest.fixture
def trainer(cfg, models, tokens):
    return Trainer(cfg, models, tokens[:60])


def test_the_schedule_warms_up_stays_and_decays(trainer):
    trainer.total_steps = 1000
    lr = trainer.cfg["lr"]
    l1 = trainer.cfg["l1_coeff"]
    wanted = {
        0: (lr / 50, 0), 24: (lr / 2, l1 * 24 / 50), 50: (lr, l1), 799: (lr, l1), 900: (lr / 2, l1),
        999: (lr / 200, l1)}
    for step, (wanted_lr, wanted_l1) in wanted.items():
        trainer.step_counter = step
        assert trainer.get_lr() == pytest.approx(wanted_lr)
        assert trainer.get_l1_coeff() == pytest.approx(wanted_l1)


def test_held_out_sequences_are_never_trained_on(trainer, tokens):
    assert torch.equal(trainer.eval_tokens.int(), tokens[52:60].int())
    assert torch.equal(trainer.buffer.all_tokens.int(), tokens[:52].int())


def test_norm_factor_makes_the_mean_norm_sqrt_d_model(trainer):
    x = trainer.buffer.buffer / trainer.crosscoder.norm_factor[:, None]
    assert torch.allclose(x.norm(dim=-1).mean(0), torch.tensor(128**0.5), rtol=1e-4)


@pytest.mark.parametrize("rows, factor", [(slice(None), 0.0), (slice(0, 1), 1e30)])
def test_activations_without_a_mean_norm_are_refused(trainer, rows, factor):
    trainer.buffer.buffer[rows, 1] *= factor
    with pytest.raises(ValueError, match="^site='resid_post': its activations are all 0, or not finite"):
        trainer.get_norm_factor()


def test_norms_that_are_given_are_taken(cfg, models, tokens):
    trainer = Trainer({**cfg, "norm": [1.5, 2.0, 2.5, 3.0]}, models, tokens[:60])
    trainer.step()
    assert trainer.crosscoder.norm_factor.tolist() == [1.5, 2.0, 2.5, 3.0]


# ---- A sparsity that is asked for ----------------------------------------------------------------
NO = torch.tensor(False)


MOVES = [  # step, L0 then, whether it is skipped; what the logarithm of the thresholds moves by, over 0.05
    (40, 40.0, NO, math.log(2)), (40, 10.0, NO, -math.log(2)), (40, 40.0, ~NO, 0),
    (40, 0.0, NO, -math.log(10)), (40, math.inf, NO, math.log(10)),
    (11.2, 25.0, NO, 0), (11.2, 50.0, NO, 0.8 * math.log(2)),  # of 40: 0.8 of the coefficient is reached
    (0, 25.6, NO, 0)]  # a tenth of 256, which is what calibrate leaves


def test_relus_biases_move_by_one_factor_and_its_coefficient_falls_while_l0_is_held_up(cfg, models, tokens):
    trainer = Trainer({**cfg, "activation": "relu", "l0": 20.0}, models, tokens[:60])
    before = trainer.crosscoder.b_enc.data.uniform_(-2, 1).clone()
    for step, l0, skip, moved in [*MOVES, (20, 19.0, NO, math.log(0.95)), (36, 19.0, NO, math.log(0.95))]:
        trainer.step_counter = step
        trainer.log_scale.fill_(-0.5)
        trainer.crosscoder.b_enc.data.copy_(before)
        trainer.steer(torch.tensor(l0), skip)
        assert torch.allclose(trainer.crosscoder.b_enc - before, -0.05 * moved * before.abs(), atol=1e-6), (step, l0)
        wanted = -0.5 + 1000 * trainer.get_lr() * moved
        assert trainer.log_scale.item() == pytest.approx(min(max(wanted, -5), 0), abs=1e-5), (step, l0)
        full = cfg["l1_coeff"] * trainer.get_rise()
        assert float(trainer.get_l1_coeff()) == pytest.approx(full * trainer.log_scale.exp().item())


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_without_an_l0_the_coefficient_is_as_published(cfg, models, tokens, activation):
    trainer = Trainer({**cfg, "activation": activation}, models, tokens[:60])
    trainer.step_counter = 20  # of 40
    trainer.log_scale += 1
    assert trainer.get_l1_coeff() == {"relu": cfg["l1_coeff"], "jumprelu": cfg["l0_coeff"] / 2}[activation]


def test_jumprelus_thresholds_rise_by_one_factor_while_l0_is_above_its_aim(cfg, models, tokens):
    trainer = Trainer({**cfg, "activation": "jumprelu", "l0": 20.0}, models, tokens[:60])
    trainer.crosscoder.log_threshold.data.uniform_(-1, 1)
    before = trainer.crosscoder.log_threshold.detach().clone()
    for step, l0, skip, moved in MOVES:
        trainer.step_counter = step
        trainer.crosscoder.log_threshold.data.copy_(before)
        trainer.steer(torch.tensor(l0), skip)
        assert torch.allclose(trainer.crosscoder.log_threshold - before, torch.tensor(0.05 * moved), atol=1e-6), (step, l0)
    trainer.step_counter = 40
    assert float(trainer.get_l1_coeff()) == pytest.approx(cfg["l0_coeff"])


@pytest.mark.parametrize("key, coeff", [
    *[("l0_coeff", coeff) for coeff in (0.015, 0.15, 1.5)], *[("l1_coeff", coeff) for coeff in (0.2, 2.0, 20.0)]])
def test_an_l0_is_met_in_a_short_run(cfg, models, tokens, key, coeff):
    """In 200 steps of 1e-3 Adam moves log_threshold by 0.2 at most: with jumprelu's coefficient steered in place of the
    thresholds, L0 ended at 63, 65 and 69."""
    cfg = {**cfg, "activation": "relu" if key == "l1_coeff" else "jumprelu", key: coeff, "l0": 12.0, "lr": 1e-3}
    cfg |= {"num_tokens": 256 * 200, "batch_size": 256}
    trainer = Trainer(cfg, models, tokens[:600])
    for _ in range(trainer.total_steps):
        trainer.step()
    metrics = trainer.evaluate()
    assert metrics["sparsity/l0"] == pytest.approx(12, rel=0.05)


def test_relu_starts_calibrated_only_where_an_l0_is_given(cfg, models, tokens):
    fvus = []
    for l0 in (0.0, 20.0):
        trainer = Trainer({**cfg, "activation": "relu", "l0": l0}, models, tokens[:60])
        assert (trainer.crosscoder.mean == 0).all() == (l0 == 0)
        losses = trainer.crosscoder.get_losses(trainer.buffer.peek())
        fvus.append(losses.fvu.item())
        norm = 3**-0.5 / 4 if l0 else cfg["dec_init_norm"]
        assert torch.allclose(trainer.crosscoder.W_dec.norm(dim=-1), torch.tensor(norm))
        assert all(group["scale"] == 1 for group in trainer.optimizer.param_groups)
    assert fvus[1] < 0.9 < 1 < fvus[0] and losses.l0_loss.item() == pytest.approx(25.6, rel=0.01)  # a tenth of 256


@pytest.mark.parametrize("activation, name", [("relu", "b_enc"), ("jumprelu", "log_threshold")])
def test_what_steering_has_come_to_is_resumed(cfg, models, tokens, activation, name):
    cfg = {**cfg, "activation": activation, "l0": 20.0}
    one, other = Trainer(cfg, models, tokens[:60]), Trainer(cfg, models, tokens[:60])
    wanted = [one.step() for _ in range(12)][-1]
    for _ in range(9):
        other.step()
    path = str(other.save())
    other.lock.release()
    resumed = Trainer({**cfg, "resume": path}, models, tokens[:60])
    assert resumed.log_scale == other.log_scale
    assert (other.log_scale != 0) == (activation == "relu")
    metrics = [resumed.step() for _ in range(3)][-1]
    assert metrics["loss/l1_coeff"] == wanted["loss/l1_coeff"] and torch.equal(one.crosscoder.W_enc, resumed.crosscoder.W_enc)
    assert torch.equal(getattr(one.crosscoder, name), getattr(resumed.crosscoder, name))


# ---- From old weights ----------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_a_run_begins_where_another_has_ended(cfg, models, tokens, tmp_path, activation):
    cfg = {**cfg, "activation": activation, "k": 8}
    parent = Trainer(cfg, models, tokens[:60])
    for _ in range(10):
        parent.step()
    path = str(parent.save())
    child = Trainer({**cfg, "init_from": path, "seed": 7}, models, tokens[:60])
    runs = len(list(parent.run_dir.parent.glob("version_*")))
    assert child.step_counter == 0 and child.history == [] and not child.optimizer.state
    x = child.buffer.peek()
    assert torch.equal(child.crosscoder(x), parent.crosscoder(x))
    assert child.crosscoder.mean.any() == (activation != "relu")  # W_enc of relu as published reads y as it is
    assert child.crosscoder.cfg["init_from"] == path
    child.step()
    if activation in ("relu", "jumprelu"):
        assert child.get_rise() < 0.6
        child.cfg = {**child.cfg, "l0": 8.0}  # which may be its L0 already
        assert child.get_rise() == 1
    for overrides, said in (({"dict_size": 128}, "dict_size is 256, not 128"), ({"layers": [1, 2]}, r"layers is \[\], not \[1, 2\]"),
                            ({"activation": "topk" if activation == "relu" else "relu"}, "activation is "), ({"center": True}, "center is False")):
        with pytest.raises(ValueError, match=f"^init_from='{path}': its {said}"):
            Trainer({**cfg, "init_from": path, **overrides}, models, tokens[:60])
    assert len(list(parent.run_dir.parent.glob("version_*"))) == runs  # refused before there is a folder


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
@torch.no_grad()
def test_a_diff_begins_with_a_one_model_crosscoder_for_both(cfg, models, tokens, activation):
    cfg = {**cfg, "layers": [1, 3], "activation": activation, "k": 8}
    parent = Trainer(cfg, models, tokens[:60])
    path = str(parent.save())
    two = {**cfg, "model_name": cfg["model_name"] * 2, "init_from": path}
    child = Trainer(two, models * 2, tokens[:60])
    x = [parent.buffer.next() for _ in range(5)][-1]  # the first four have fitted the thresholds
    same = torch.isclose(child.crosscoder.encode(x.repeat(1, 2, 1)), parent.crosscoder.encode(x), rtol=1e-4, atol=1e-5).all(1)
    assert same.float().mean() > 0.9  # but for rows where a latent is as near to its threshold as rounding
    x = x[same]
    assert torch.equal(child.crosscoder(x.repeat(1, 2, 1))[:, :2], child.crosscoder(x.repeat(1, 2, 1))[:, 2:])
    assert torch.allclose(child.crosscoder(x.repeat(1, 2, 1))[:, :2], parent.crosscoder(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="its n_models is 2, not 1"):
        Trainer({**cfg, "init_from": str(child.save())}, models, tokens[:60])


def test_a_step_is_adam_on_gradients_clipped_to_a_norm_of_one(trainer):
    plain = copy.deepcopy(trainer.crosscoder)
    optimizer = torch.optim.Adam(plain.parameters(), fused=False, foreach=False)
    norms = []
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
    for parameter, wanted in zip(trainer.crosscoder.parameters(), plain.parameters()):
        assert torch.allclose(parameter, wanted, rtol=1e-4, atol=1e-6)


def test_a_gradient_shorter_than_one_is_left_as_it_is(trainer):
    """And not stretched to a norm of 1. Adam, on its own, hides a constant scale; not so its epsilon."""
    trainer.optimizer = torch.optim.Adam(trainer.crosscoder.parameters(), 1e-3, eps=1.0, fused=True)
    x = trainer.buffer.next()
    trainer.buffer.next = lambda: 1e-3 * x + trainer.crosscoder.b_dec.detach()
    plain = copy.deepcopy(trainer.crosscoder)
    losses = plain.get_losses(trainer.buffer.next())
    (losses.l2_loss + trainer.get_l1_coeff() * losses.l1_loss).backward()
    lr = trainer.get_lr()
    metrics = trainer.step()
    assert metrics["loss/grad_norm"] < 0.9
    for parameter, before in zip(trainer.crosscoder.parameters(), plain.parameters()):
        wanted = before - lr * before.grad / (before.grad.abs() + 1)
        assert torch.allclose(parameter, wanted, rtol=1e-5, atol=1e-9)


class Waits(TorchDispatchMode):
    """Raises where, with tensors on a GPU, the host would have to wait for it: for a value, for a shape
    that depends on values, for a copy."""
    VALUES = ["_local_scalar_dense", "is_nonzero", "equal"]
    SHAPES = ["nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = []
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
        if name in self.VALUES + self.SHAPES or masks:
            raise AssertionError(f"{name} waits")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dict_size", [256, 1024])  # topk and batchtopk decode densely, and sparsely
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_a_step_waits_for_nothing(activation, dict_size, cfg, models, tokens, monkeypatch):
    l0 = 20.0 if activation in ("relu", "jumprelu") else 0.0
    cfg = cfg | {"activation": activation, "dict_size": dict_size, "k": 8, "aux_coeff": 1 / 32, "l0": l0}
    trainer = Trainer(cfg, models, tokens[:60])
    trainer.step()  # looks which latents are dead, as each hundredth does
    trainer.dead = torch.arange(20)
    with Waits(), monkeypatch.context() as patch:
        for name in ("cpu", "numpy", "tolist"):
            patch.setattr(torch.Tensor, name, lambda *args: pytest.fail("waits"))
        for _ in range(5):
            metrics = trainer.step()
        with pytest.raises(AssertionError, match="_local_scalar_dense waits"):
            metrics["loss/total"].item()
        with pytest.raises(AssertionError, match="index waits"):
            trainer.dead[trainer.dead > 3]
        trainer.step_counter = 100
        with pytest.raises(AssertionError, match=" waits"):
            trainer.step()
    assert metrics["loss/total"].isfinite() and metrics["loss/aux"] > 0


def test_the_same_seed_trains_to_the_same_numbers(cfg, models, tokens):
    runs = [Trainer(cfg, models, tokens[:60]) for _ in range(2)]
    losses = [[trainer.step()["loss/total"].item() for _ in range(20)] for trainer in runs]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert torch.equal(runs[0].crosscoder.W_enc, runs[1].crosscoder.W_enc)


def test_gradients_that_a_stopped_train_has_left_are_not_used(cfg, models, tokens):
    cfg = {**cfg, "num_tokens": 3 * 64}
    fresh, stopped = Trainer(cfg, models, tokens[:60]), Trainer(cfg, models, tokens[:60])
    for parameter in stopped.crosscoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    fresh.train(), stopped.train()
    assert torch.equal(fresh.crosscoder.W_enc, stopped.crosscoder.W_enc)


def test_latents_that_do_not_fire_are_counted_in_tokens(trainer):
    trainer.crosscoder.b_enc.data[:10] = -1e6
    trainer.cfg = {**trainer.cfg, "dead_after": 3 * 64}
    for _ in range(3):
        trainer.step()
    assert (trainer.tokens_since_fired[:10] == 3 * 64).all() and (trainer.tokens_since_fired[10:] == 0).any()
    assert trainer.evaluate()["sparsity/dead"] >= 10 / 256


def test_which_latents_auxk_revives_is_looked_up_every_hundred_steps(cfg, models, tokens):
    trainer = Trainer({**cfg, "aux_coeff": 0.1, "dead_after": 64}, models, tokens[:60])
    trainer.tokens_since_fired[3:5] = 10**6
    trainer.crosscoder.b_enc.data[3:5] = -1e6
    for step, wanted in ((99, []), (100, [3, 4]), (101, [3, 4])):
        trainer.step_counter = step
        trainer.step()
        assert [latent for latent in (trainer.dead if trainer.dead is not None else []) if latent in (3, 4)] == wanted


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
    assert rows[-2]["data/epochs"] == 40 * 64 / (52 * 127)


def test_when_a_run_evaluates_logs_and_saves_and_what_wandb_is_told(cfg, models, tokens, monkeypatch):
    told = []
    monkeypatch.setattr("utils.wandb", SimpleNamespace(
        init=lambda **_: told.append("init"), log=lambda row, step: told.append(row),
        finish=lambda: told.append("finish")))
    cfg = {**cfg, "num_tokens": 4 * 64, "log_every": 1, "eval_every": 1, "save_every": 2}
    trainer = Trainer(cfg, models, tokens[:60])
    trainer.train()
    assert [row["step"] for row in trainer.history] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert ["ce/clean" in row for row in trainer.history] == [True, False] * 4 + [True]
    assert told == ["init", *trainer.history, "finish"]
    before, last = list_checkpoints(trainer.run_dir)
    assert [before.name, last.name] == ["step_0000002", "step_0000004"]
    shutil.rmtree(last)
    Trainer({**cfg, "resume": str(before)}, models, tokens[:60])
    rows = [json.loads(line) for line in open(trainer.run_dir / "metrics.jsonl")]
    assert rows == trainer.history[:4]  # without what was logged after that checkpoint


def test_a_checkpoint_that_cannot_be_written_is_mentioned(trainer, monkeypatch, capfd):
    def fail(path, state):
        raise OSError("a disk on fire")

    monkeypatch.setattr(trainer.crosscoder, "save", fail)
    assert trainer.save() is None
    assert re.fullmatch(r"cannot save .*step_0000000 \(a disk on fire\)\n", capfd.readouterr().err)


def test_a_log_that_cannot_be_written_beside_a_checkpoint_is_tried_again(trainer, monkeypatch):
    trainer.log({"loss/total": 1.0})
    (trainer.run_dir / "metrics.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_history", lambda: open("/dev/full", "w").write("x" * 10**6))
        assert trainer.save() is None
    assert trainer.save() == list_checkpoints(trainer.run_dir)[0]
    assert [json.loads(line) for line in open(trainer.run_dir / "metrics.jsonl")] == trainer.history


def test_every_run_gets_a_folder_of_its_own(cfg, models, tokens):
    runs = [Trainer(cfg, models, tokens[:60]) for _ in range(2)]
    folders = [trainer.save().parts[-2:] for trainer in runs]
    assert folders == [("version_0", "step_0000000"), ("version_1", "step_0000000")]


def test_wandb_that_cannot_start_is_mentioned_once_and_the_run_goes_on(
        cfg, models, tokens, capfd, monkeypatch):
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
    folder = tiny_run[0] / "checkpoints" / "version_0"
    final = json.loads(open(folder / "metrics.jsonl").readlines()[-1])
    assert final["fvu/all"] < 0.25 and final["sparsity/l0"] < 100
    for layer in range(4):
        assert 0 < final[f"ce/delta_resid_post.{layer}"] < 0.2 * final[f"ce/ablated_resid_post.{layer}"]
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_0000200", "step_0000390"]


@pytest.mark.skipif(make_cfg(device="cpu")["enc_dtype"] != "bf16", reason="both would be in fp32 on this CPU")
def test_the_tiny_run_ends_in_fp32_where_it_ends_in_bf16(tiny_run):
    run = Run(["--preset=tiny", "--num_tokens=200_000", "--eval_every=1_000_000", "--enc_dtype=fp32"])
    assert run.wait(600) == 0
    bf16, fp32 = (
        json.loads(open(folder / "checkpoints" / "version_0" / "metrics.jsonl").readlines()[-1])
        for folder in (tiny_run[0], Path()))
    for key in ("fvu/all", "sparsity/l0"):
        assert bf16[key] == pytest.approx(fp32[key], rel=0.01)
