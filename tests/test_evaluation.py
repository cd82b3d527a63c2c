import json
import math

import pytest
import safetensors.torch
import torch

import utils
from conftest import TINY, open_models
from train import RECIPES, USED_BY, make_cfg
from utils import (
    CrossCoder, evaluate, get_ce, get_identity, get_sources, get_stacked_resids, get_stats, iter_rows, source_names)


@pytest.fixture
def held_out(tokens):
    return tokens[-10:]


@pytest.fixture
def crosscoder(cfg, models, held_out):
    """Untrained, but large enough to reconstruct something, and normalised."""
    x = get_stacked_resids(models, held_out, cfg)
    crosscoder = CrossCoder({**cfg, "dec_init_norm": 0.15}, *x.shape[2:])
    crosscoder.norm_factor.copy_(x[:, 1:].norm(dim=-1).mean((0, 1)) / x.shape[-1] ** 0.5)
    return crosscoder


def test_fvu_l0_norm_ratio_and_frequencies_equal_their_definitions(crosscoder, models, held_out, cfg):
    x = get_stacked_resids(models, held_out, cfg)[:, 1:].flatten(0, 1)
    acts = crosscoder.encode(x)
    x_hat = crosscoder.decode(acts).double()
    x = x.double()
    errors, variances = (x - x_hat).pow(2).sum((0, 2)), (x - x.mean(0)).pow(2).sum((0, 2))
    weights = crosscoder.norm_factor.double() ** -2
    stats = get_stats(crosscoder, models, held_out, cfg)
    assert torch.allclose(stats["fvu"], errors / variances, rtol=1e-4)
    assert stats["fvu_all"].item() == pytest.approx(((errors * weights).sum() / (variances * weights).sum()).item(), rel=1e-4)
    assert torch.allclose(stats["norm_ratio"], x_hat.norm(dim=-1).mean(0) / x.norm(dim=-1).mean(0), rtol=1e-4)
    assert torch.allclose(stats["freqs"], (acts > 0).double().mean(0))
    assert stats["l0"].item() == pytest.approx((acts > 0).sum(-1).double().mean().item())
    assert torch.allclose(stats["mean"], x.mean(0), atol=1e-5)


@pytest.mark.parametrize("ratio", [1, 1e2, 1e4, 1e6])
def test_fvu_is_right_however_far_the_mean_is_from_zero(cfg, monkeypatch, ratio):
    """Against float64. In fp32 a sum of squares would have lost the variance at a ratio of 1e4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 2, 6, generator=generator) * torch.linspace(0.1, 3, 6)
    x[:, 0] += ratio * torch.randn(6, generator=generator)
    crosscoder = CrossCoder({**cfg, "dict_size": 20, "dec_init_norm": 0.3}, 2, 6)
    crosscoder.b_dec.data.copy_(x.mean(0) + 0.1)
    monkeypatch.setattr(utils, "iter_rows", lambda *_: iter(x.split(512)))
    stats = get_stats(crosscoder, [], None, cfg)
    x_hat = crosscoder(x).double()
    x = x.double()
    variances = (x - x.mean(0)).pow(2).sum((0, 2))
    assert torch.allclose(stats["fvu"], (x - x_hat).pow(2).sum((0, 2)) / variances, rtol=1e-4)
    assert stats["fvu_all"].item() == pytest.approx(((x - x_hat).pow(2).sum() / variances.sum()).item(), rel=1e-4)
    assert torch.allclose(stats["mean"], x.mean(0), rtol=1e-6, atol=1e-6)


def test_where_there_is_nothing_to_explain_fvu_is_nan_and_over_all_sources_it_is_of_the_others(cfg, monkeypatch):
    x = torch.randn(1000, 3, 6, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 7.1
    x[:, 2] = 0
    crosscoder = CrossCoder({**cfg, "dict_size": 20, "dec_init_norm": 0.3}, 3, 6)
    monkeypatch.setattr(utils, "iter_rows", lambda *_: iter(x.split(300)))
    stats = get_stats(crosscoder, [], None, cfg)
    assert 0 < stats["fvu"][0] and stats["fvu"][1:].isnan().all() and 0 < stats["fvu_all"] < math.inf
    same = x[:1].expand(50, 3, 6)
    losses = crosscoder.get_losses(same)
    assert not losses.fvu < 0
    spread = crosscoder.get_losses(1000 + x[:, :1].expand(1000, 3, 6))
    wanted = spread.l2_loss.double() / (x[:, 0].double().var(0, correction=0).sum() * 3)
    assert spread.fvu.item() == pytest.approx(wanted.item(), rel=1e-3)


def test_the_true_activations_spliced_in_leave_the_ce_as_it_is(models, held_out, cfg):
    batch = held_out.long()
    x = get_stacked_resids(models, batch, cfg)
    sources, clean = get_sources(models, cfg), get_ce(models[0], batch)
    assert clean == pytest.approx(models[0](batch, return_type="loss").item(), rel=1e-5)
    for i, source in enumerate(sources):
        assert get_ce(models[0], batch, [(source.hook, x[:, :, i])]) == pytest.approx(clean, rel=1e-6)
        assert get_ce(models[0], batch, [(source.hook, torch.zeros_like(x[:, :, i]))]) > clean + 1
    assert get_ce(models[0], batch, [(s.hook, x[:, :, i]) for i, s in enumerate(sources)]) == pytest.approx(clean, rel=1e-6)


def test_position_0_keeps_its_own_activations(models, held_out, cfg):
    batch = held_out.long()
    x = get_stacked_resids(models, batch, cfg)[:, :, 1]
    hook = get_sources(models, cfg)[1].hook
    broken = x.clone()
    broken[:, 0] = 1e4
    assert get_ce(models[0], batch, [(hook, broken)]) == get_ce(models[0], batch, [(hook, x)])


def identity(cfg, n_layers, d_model):
    """A crosscoder that reconstructs exactly: a latent for each direction and its opposite."""
    n = n_layers * d_model
    crosscoder = CrossCoder({**cfg, "dict_size": 2 * n}, n_layers, d_model)
    eye = torch.cat([torch.eye(n), -torch.eye(n)])
    crosscoder.W_dec.data = eye.view(2 * n, n_layers, d_model)
    crosscoder.W_enc.data = eye.T.reshape(n_layers, d_model, 2 * n)
    return crosscoder


@pytest.mark.parametrize("overrides", [
    {}, {"center": True}, {"site": "z", "layers": "1,2"}, {"model_name": f"{TINY / 'base'},{TINY / 'tuned'}", "layers": "2"}])
def test_a_perfect_reconstruction_costs_nothing_and_the_mean_costs_much(tokens, cfg, overrides):
    cfg = make_cfg(**{**cfg, **overrides})
    models = open_models(cfg)
    n_layers, d_model = get_stacked_resids(models, tokens[:1], cfg).shape[2:]
    metrics = evaluate(identity(cfg, n_layers, d_model), models, tokens[-10:], cfg)
    assert metrics["fvu/all"] < 1e-6 and metrics["ce/clean"] > 1
    names = [key.removeprefix("ce/delta_") for key in metrics if key.startswith("ce/delta_")]
    assert len(names) == n_layers + 1
    for name in names:
        assert abs(metrics[f"ce/delta_{name}"]) < 1e-4
        assert metrics[f"ce/ablated_{name}"] > 0.01
        assert name == "all" or metrics[f"norm_ratio/{name}"] == pytest.approx(1, abs=1e-4)


def test_what_is_ablated_is_replaced_by_its_mean_without_position_0(crosscoder, models, held_out, cfg):
    metrics = evaluate(crosscoder, models, held_out, cfg)
    batch = held_out.long()
    x = get_stacked_resids(models, batch, cfg)
    mean = x[:, 1:].mean((0, 1)).expand_as(x)
    x_hat = crosscoder(x)
    for new, kind in ((mean, "ablated"), (x_hat, "delta")):
        splices = [(source.hook, new[:, :, i]) for i, source in enumerate(get_sources(models, cfg))]
        clean = get_ce(models[0], batch)
        for i in range(4):
            wanted = get_ce(models[0], batch, [splices[i]]) - clean
            assert metrics[f"ce/{kind}_resid_post.{i}"] == pytest.approx(wanted, rel=1e-3)
        assert metrics[f"ce/{kind}_all"] == pytest.approx(get_ce(models[0], batch, splices) - clean, rel=1e-3)
    assert metrics["ce/clean"] == pytest.approx(clean, rel=1e-5)


def test_a_splice_at_resid_mid_also_changes_what_goes_round_the_mlp(held_out, cfg):
    """The same as attention writing what is missing."""
    models, others = (open_models({**cfg, "site": site}) for site in ("resid_mid", "attn_out"))
    batch = held_out.long()
    mid, pre = (get_stacked_resids(models, batch, {**cfg, "site": f"resid_{site}"})[:, :, 1] for site in ("mid", "pre"))
    new = mid.mean((0, 1)).expand_as(mid)
    as_attention = new - pre
    wanted = get_ce(others[0], batch, [("blocks.1.hook_attn_out", as_attention)])
    assert get_ce(models[0], batch, [("blocks.1.hook_resid_mid", new)]) == pytest.approx(wanted, rel=1e-5)
    assert wanted > get_ce(models[0], batch) + 1


def test_ce_is_each_models_own(tokens, cfg):
    cfg = make_cfg(**{**cfg, "model_name": f"{TINY / 'base'},{TINY / 'tuned'}", "layers": "2"})
    models = open_models(cfg)
    crosscoder = identity(cfg, 2, 128)
    crosscoder.W_dec.data[:, 1] = 0  # nothing is written to the second model
    metrics = evaluate(crosscoder, models, tokens[-10:], cfg)
    assert abs(metrics["ce/delta_base:resid_post.2"]) < 1e-4 < 0.1 < metrics["ce/delta_tuned:resid_post.2"]
    assert metrics["fvu/base:resid_post.2"] < 1e-6 and metrics["fvu/tuned:resid_post.2"] >= 1
    assert metrics["ce/delta_all"] == pytest.approx(metrics["ce/delta_tuned:resid_post.2"] / 2, abs=1e-4)


def test_position_0_is_left_out_of_the_rows(models, held_out, cfg):
    rows = torch.cat([*iter_rows(models, held_out, cfg)])
    assert torch.equal(rows, get_stacked_resids(models, held_out, {**cfg, "model_batch_size": 10})[:, 1:].flatten(0, 1))


def write_as_earlier_versions(folder):
    """Has a checkpoint's cfg.json as they wrote it, and the manifest say so: a list is text, norm a word, what the
    activation does not use is left out, and there are two keys more; and its weights without mean, which was 0."""
    file = folder / "cfg.json"
    cfg = json.loads(file.read_text())
    for key, value in cfg.items():
        if isinstance(value, list):
            cfg[key] = ",".join(map(str, value))
    cfg |= {"layers": cfg["layers"] or "all", "norm": "estimate", "loss_weights": "", "ignore_tokens": "", "outlier_norm": 20.0}
    for key, activations in USED_BY.items():
        if cfg["activation"] not in activations:
            del cfg[key]
    cfg.pop("l0", None)
    if not cfg["n_shared"]:
        cfg.pop("shared_penalty", None)
    file.write_text(json.dumps(cfg, indent=2) + "\n")
    weights = folder / "crosscoder.safetensors"
    state = safetensors.torch.load_file(weights)
    assert not state.pop("mean").any()
    safetensors.torch.save_file(state, weights)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {path.name: get_identity(path) for path in (file, weights)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


@pytest.mark.parametrize("overrides", [
    *({"activation": activation} for activation in RECIPES), {"layers": "3,1"},
    {"model_name": f"{TINY / 'base'},{TINY / 'tuned'}", "layers": "2", "activation": "batchtopk", "n_shared": 20},
    {"model_name": f"{TINY / 'base'},{TINY / 'tuned'}", "layers": "2", "n_shared": 20, "n_exclusive": 30}])
def test_a_checkpoint_of_an_earlier_version_evaluates_the_same(cfg, held_out, tmp_path, overrides):
    cfg = make_cfg(**{**cfg, **overrides})
    models = open_models(cfg)
    x = get_stacked_resids(models, held_out, cfg)[:, 1:].flatten(0, 1)
    crosscoder = CrossCoder(cfg, *x.shape[1:])
    crosscoder.norm_factor.copy_(torch.linspace(0.5, 2, x.shape[1]))
    crosscoder.calibrate(x)
    crosscoder.mean.zero_()
    crosscoder.save(tmp_path / "step_0000001")
    write_as_earlier_versions(tmp_path / "step_0000001")
    loaded = CrossCoder.load(tmp_path)
    assert evaluate(loaded, models, held_out[:4], cfg) == evaluate(crosscoder, models, held_out[:4], cfg)
    assert source_names(loaded.cfg, x.shape[1]) == source_names(cfg, x.shape[1])
    assert make_cfg(**loaded.cfg) == cfg  # which opens the same models and text
