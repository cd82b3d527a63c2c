"""The activations: which latents are active, their gradients and penalties, the dead, and how they start."""
import json

import numpy as np
import pytest
import safetensors.torch
import torch

import utils
from conftest import TINY, open_models
from planted import functions_of_scratch
from train import make_cfg
from utils import CrossCoder, Trainer, get_stats, iter_rows

ALL = ("relu", "topk", "batchtopk", "jumprelu")


def crosscoder_for(activation, n_layers=3, d_model=5, dict_size=12, **overrides):
    """Small, in fp32, with every parameter and the normalisation away from its initial value."""
    if activation in ("topk", "batchtopk"):
        overrides = {"k": 3, **overrides}
    cfg = make_cfg(activation=activation, dict_size=dict_size, enc_dtype="fp32", device="cpu", **overrides)
    crosscoder = CrossCoder(cfg, n_layers, d_model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in crosscoder.named_parameters():
        parameter.data += (0.1 if name == "log_threshold" else 0.4) * torch.randn(parameter.shape, generator=generator)
    crosscoder.norm_factor.copy_(torch.linspace(0.5, 3, n_layers))
    crosscoder.mean.copy_(0.3 * torch.randn(n_layers, d_model, generator=generator))
    return crosscoder


def data(rows, n_layers=3, d_model=5, seed=2):
    return 2 * torch.randn(rows, n_layers, d_model, generator=torch.Generator().manual_seed(seed))


def slow_losses(activation, weights, norm_factor, mean, x, k):
    """The formulas latent by latent. -> l2, l1, aux as float64, and the active (row, latent)"""
    W_enc, W_dec, b_enc, b_dec = weights[:4]
    n_layers, d_model, d_sae = W_enc.shape
    y = x / norm_factor[:, None]
    h = [[b_enc[i] + sum((y - mean)[row, l] @ W_enc[l, :, i] for l in range(n_layers)) for i in range(d_sae)] for row in range(len(x))]
    norms = [sum(W_dec[i, l].pow(2).sum().sqrt() for l in range(n_layers)) for i in range(d_sae)]
    scores = {(row, i): max(0.0, (h[row][i] * norms[i]).item()) for row in range(len(x)) for i in range(d_sae)}
    if activation == "topk":
        kept = {place for row in range(len(x)) for place in sorted(
            [(row, i) for i in range(d_sae)], key=scores.get, reverse=True)[:k]}
    elif activation == "batchtopk":
        kept = set(sorted(scores, key=scores.get, reverse=True)[: k * len(x)])
    elif activation == "jumprelu":
        kept = {(row, i) for row, i in scores if h[row][i] > weights[4][i].exp()}
    else:
        kept = set(scores)
    kept = {place for place in kept if scores[place] > 0}
    l2 = l1 = aux = torch.zeros((), dtype=torch.float64)
    for row in range(len(x)):
        y_hat = b_dec
        for i in range(d_sae):
            act = h[row][i] if (row, i) in kept else 0 * h[row][i]
            if activation == "jumprelu":
                theta = weights[4][i].exp()
                if abs((h[row][i] - theta).item()) < 1:  # d acts / d log_threshold = -theta / 2 there, and 0 elsewhere
                    act = act - theta.item() / 2 * (weights[4][i] - weights[4][i].detach())
                aux = aux + 3e-6 * (theta - h[row][i]).clamp(min=0) * norms[i]
                l1 = l1 + torch.tanh(4 * act * norms[i])
            else:
                l1 = l1 + act * norms[i]
            y_hat = y_hat + act * W_dec[i]
        l2 = l2 + (y[row] - y_hat).pow(2).sum()
    return l2 / len(x), l1 / len(x), aux / len(x), kept


@pytest.mark.parametrize("activation, overrides", [
    *((activation, {}) for activation in ALL),
    ("topk", {"dict_size": 64, "k": 1}), ("batchtopk", {"dict_size": 64, "k": 1})])  # whose decoding is sparse
def test_losses_and_gradients_equal_a_slow_loop_in_float64(activation, overrides):
    crosscoder, x = crosscoder_for(activation, **overrides), data(9)
    slow = [parameter.detach().double().requires_grad_() for parameter in crosscoder.parameters()]
    factor, mean = crosscoder.norm_factor.double(), crosscoder.mean.double()
    *wanted, kept = slow_losses(activation, slow, factor, mean, x.double(), crosscoder.cfg["k"])
    penalty = 0 if "topk" in activation else 3  # which has no gradient there
    (wanted[0] + penalty * wanted[1] + 1e5 * wanted[2]).backward()
    losses = crosscoder.get_losses(x)
    (losses.l2_loss + penalty * losses.l1_loss + 1e5 * losses.aux_loss).backward()
    assert [each.item() for each in losses[:3]] == pytest.approx([each.item() for each in wanted], rel=1e-5)
    assert losses.fired.tolist() == [sum((row, i) in kept for row in range(9)) for i in range(len(losses.fired))]
    for (name, parameter), reference in zip(crosscoder.named_parameters(), slow):
        assert reference.grad.any(), name
        assert (parameter.grad - reference.grad).norm() / reference.grad.norm() < 1e-5, name


@pytest.mark.parametrize("activation", ALL)
def test_aux_k_and_its_gradients_equal_a_slow_loop_in_float64(activation):
    crosscoder, x = crosscoder_for(activation, aux_coeff=0.3), data(9)
    slow = [parameter.detach().double().requires_grad_() for parameter in crosscoder.parameters()]
    W_enc, W_dec, b_enc, b_dec = slow[:4]
    factor, mean, dead = crosscoder.norm_factor.double(), crosscoder.mean.double(), [1, 4, 5, 7, 10]
    _, _, wanted, kept = slow_losses(activation, slow, factor, mean, x.double(), crosscoder.cfg["k"])
    y = x.double() / factor[:, None]
    h = torch.einsum("bld,lds->bs", y - mean, W_enc) + b_enc
    is_kept = torch.zeros(9, 12, dtype=torch.float64)
    for place in kept:
        is_kept[place] = 1
    error = (y - b_dec - torch.einsum("bs,sld->bld", h * is_kept, W_dec)).detach()
    norms = W_dec.detach().norm(dim=-1).sum(1)
    left = 0
    for row in range(9):
        best = sorted(dead, key=lambda i: (h[row, i] * norms[i]).item(), reverse=True)[:2]  # d_model is 5
        left = left + (error[row] - sum(h[row, i] * W_dec[i] for i in best)).pow(2).sum()
    spread = (y - y.mean(0)).pow(2).sum() / 9
    wanted = wanted + 0.3 * spread * left / (error - error.mean(0)).pow(2).sum()
    wanted.backward()
    losses = crosscoder.get_losses(x, dead=torch.tensor(dead))
    losses.aux_loss.backward()
    assert losses.aux_loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for (name, parameter), reference in zip(crosscoder.named_parameters(), slow):
        if reference.grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert (parameter.grad - reference.grad).norm() / reference.grad.norm() < 1e-5, name


def test_calibrate_scales_by_least_squares_and_leaves_no_mean_error():
    crosscoder, x = crosscoder_for("topk", dict_size=40), data(200)
    crosscoder.b_enc.data.zero_()  # as at the start
    before = crosscoder.W_enc.detach().clone()
    y = crosscoder.normalise(x)
    h = torch.einsum("bld,lds->bs", y, before)
    h = h - h.mean(0)
    scores = torch.relu(h) * crosscoder.get_decoder_norms()
    acts = torch.relu(h) * (scores >= scores.topk(3).values[:, -1:])
    y_hat = torch.einsum("bs,sld->bld", acts, crosscoder.W_dec)
    y_hat = y_hat - y_hat.mean(0)
    scale = ((y - y.mean(0)) * y_hat).sum() / y_hat.pow(2).sum()
    crosscoder.calibrate(x)
    assert torch.allclose(crosscoder.W_enc, scale * before, rtol=1e-3)
    assert torch.equal(crosscoder.mean, y.mean(0)) and not crosscoder.b_enc.any()
    assert torch.allclose(crosscoder.get_pre_acts(y).mean(0), torch.zeros(40), atol=1e-4)
    assert torch.allclose(crosscoder(x).mean(0), x.mean(0), atol=1e-4)


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_calibrate_puts_what_each_latent_is_compared_with_at_its_threshold(activation):
    crosscoder, x = crosscoder_for(activation, dict_size=40), data(200)
    crosscoder.b_enc.data.zero_()  # as at the start
    crosscoder.calibrate(x)
    h = crosscoder.get_pre_acts(crosscoder.normalise(x))
    if activation == "jumprelu":  # a tenth of the rows exceed it
        assert ((h > crosscoder.get_thresholds()).sum(0) - 20).abs().max() <= 1
    else:
        assert torch.allclose(h.mean(0), torch.zeros(40), atol=1e-4)
        assert (crosscoder.encode(x) > 0).sum().item() == pytest.approx(200 * 3, rel=0.1)
    assert torch.allclose(crosscoder(x).mean(0), x.mean(0), atol=1e-3)


@pytest.mark.parametrize("dict_size", [12, 256])  # decoded densely and, by topk and batchtopk, sparsely
@pytest.mark.parametrize("activation", ALL)
def test_get_losses_changes_nothing(activation, dict_size):
    crosscoder, x = crosscoder_for(activation, dict_size=dict_size, aux_coeff=0.1), data(40)
    crosscoder.fit_threshold(data(100, seed=3))
    before = {name: tensor.clone() for name, tensor in crosscoder.state_dict().items()}
    state, dead = torch.get_rng_state(), torch.arange(5)
    first, second = (crosscoder.get_losses(x, k=2, dead=dead) for _ in range(2))
    (first.l2_loss + first.l1_loss + first.aux_loss).backward()
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(tensor, before[name]) for name, tensor in crosscoder.state_dict().items())
    assert torch.equal(x, data(40)) and torch.equal(dead, torch.arange(5)) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_sparse_and_dense_decoding_are_the_same(activation, monkeypatch):
    one, other = (crosscoder_for(activation, dict_size=256, k=4) for _ in range(2))
    x, calls = data(50), []
    embedding_bag = utils.F.embedding_bag
    monkeypatch.setattr(utils.F, "embedding_bag", lambda *args, **kwargs: calls.append(1) or embedding_bag(*args, **kwargs))
    sparse = one.get_losses(x)
    assert calls
    (sparse.l2_loss).backward()
    y = other.normalise(x)
    h = other.get_pre_acts(y)
    dense = other.keep(h, *other.choose(h, 4, 4 * 50))
    (other.normalise(other.decode(dense)) - y).pow(2).sum().div(50).backward()
    for (name, a), b in zip(one.named_parameters(), other.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4), name


def test_topk_keeps_k_a_row_and_batchtopk_k_a_row_on_average():
    x = data(200)
    for activation in ("topk", "batchtopk"):
        crosscoder = crosscoder_for(activation, dict_size=64, k=4)
        crosscoder.b_enc.data += 3  # so that enough are positive
        h = crosscoder.get_pre_acts(x)
        places, scores = crosscoder.choose(h, 4, 4 * 200)
        acts = crosscoder.keep(h, places, scores)
        assert torch.equal(scores.sort().values, (acts * crosscoder.get_decoder_norms()).flatten()[places].sort().values)
        assert (acts > 0).sum() == 4 * 200 == len(places.unique())
        assert torch.equal(places.sort().values, (acts.flatten() > 0).nonzero().flatten())
        assert torch.equal(places // 64, (places // 64).sort().values)  # row by row
        assert ((acts > 0).sum(1) == 4).all() == (activation == "topk")


@pytest.mark.parametrize("activation", ALL)
def test_a_row_does_not_depend_on_the_batch_it_is_in(activation):
    crosscoder, x = crosscoder_for(activation), data(40)
    crosscoder.fit_threshold(data(100, seed=3))
    acts = crosscoder.encode(x)
    assert acts.any() and torch.allclose(torch.cat([crosscoder.encode(row[None]) for row in x]), acts, atol=1e-6)
    assert torch.equal(crosscoder.encode(x.view(4, 10, 3, 5)), acts.view(4, 10, -1))


def test_of_a_row_batchtopk_keeps_no_more_in_use_than_in_training():
    crosscoder, x = crosscoder_for("batchtopk", dict_size=256), data(40)
    crosscoder.fit_threshold(data(100, seed=3))
    before = crosscoder.encode(x)
    x[7] *= 1000
    h = crosscoder.get_pre_acts(crosscoder.normalise(x))
    acts, passing = crosscoder.encode(x), h > crosscoder.get_thresholds()
    assert (acts[7] > 0).sum() == 8 * 3 < 50 < passing[7].sum()
    scores = h[7] * crosscoder.get_decoder_norms()
    assert torch.equal((acts[7] > 0).nonzero().flatten(), scores.topk(24).indices.sort().values)
    others = torch.arange(40) != 7
    assert torch.equal(acts[others], before[others]) and torch.equal(acts[others] > 0, passing[others])


@pytest.mark.parametrize("activation", ALL)
def test_scaling_an_encoder_up_and_its_decoder_down_changes_no_score(activation):
    crosscoder, x = crosscoder_for(activation), data(40)
    crosscoder.fit_threshold(data(100, seed=3))
    losses = crosscoder.get_losses(x)
    scores, x_hat = crosscoder.encode(x) * crosscoder.get_decoder_norms(), crosscoder(x)
    c = torch.linspace(0.2, 5, 12)
    with torch.no_grad():
        crosscoder.W_enc *= c
        crosscoder.b_enc *= c
        crosscoder.W_dec /= c[:, None, None]
        if activation == "jumprelu":
            crosscoder.log_threshold += c.log()
    assert torch.allclose(crosscoder.encode(x) * crosscoder.get_decoder_norms(), scores, rtol=1e-4, atol=1e-5)
    assert torch.allclose(crosscoder(x), x_hat, rtol=1e-4, atol=1e-4)
    again = crosscoder.get_losses(x)
    assert again.l1_loss.item() == pytest.approx(losses.l1_loss.item(), rel=1e-4)
    assert torch.equal(again.fired, losses.fired)


@pytest.mark.parametrize("activation", ALL)
def test_fold_and_checkpoints_give_the_same_latents(activation, tmp_path):
    crosscoder, x = crosscoder_for(activation), data(40)
    crosscoder.fit_threshold(data(100, seed=3))
    crosscoder.save(tmp_path / "saved")
    loaded = CrossCoder.load(tmp_path / "saved")
    assert torch.equal(loaded.encode(x), crosscoder.encode(x)) and torch.equal(loaded(x), crosscoder(x))
    w = functions_of_scratch()["fold"](crosscoder)
    h = torch.einsum("bld,lds->bs", x, w["W_enc"]) + w["b_enc"]
    acts = h * (h > w["thresholds"])
    if activation == "topk":
        scores = acts * w["decoder_norms"]
        acts = acts * (scores >= scores.topk(3).values[:, -1:])
    assert torch.allclose(acts, crosscoder.encode(x), atol=1e-4)
    assert torch.allclose(torch.einsum("bs,sld->bld", acts, w["W_dec"]) + w["b_dec"], crosscoder(x), atol=1e-3)


OWN = {"relu": {}, "topk": {"k": 12}, "batchtopk": {"k": 12}, "jumprelu": {"l0_coeff": 0.3}}


@pytest.fixture(scope="module")
def small():
    """What conftest's cfg is made of, for any activation."""
    return dict(preset="tiny", enc_dtype="fp32", batch_size=64, buffer_mult=16, dict_size=256, model_batch_size=8, eval_seqs=8,
                num_tokens=64 * 40, device="cpu")


def cfg_for(small, activation, **overrides):
    return make_cfg(**{**small, "activation": activation, **OWN[activation], **overrides})


@pytest.mark.parametrize("sources", [{"layers": "2"}, {}, {"model_name": f"{TINY / 'base'},{TINY / 'tuned'}"}])
@pytest.mark.parametrize("activation", ALL)
def test_fvu_is_not_above_one_at_the_start(small, tokens, activation, sources):
    cfg = cfg_for(small, activation, dict_size=1024, **sources)
    loaded = open_models(cfg)
    trainer = Trainer(cfg, loaded, tokens[:60])
    assert get_stats(trainer.crosscoder, loaded, tokens[60:68], cfg)["fvu_all"] < (1.2 if activation == "relu" else 1)


@pytest.mark.parametrize("activation", ALL)
def test_every_kind_trains_and_resumes_to_the_last_bit(small, models, tokens, tmp_path, activation):
    cfg = cfg_for(small, activation, num_tokens=64 * 160, dead_after=200, aux_coeff=0.1, save_dir=str(tmp_path))
    one, other = (Trainer(cfg, models, tokens[:60]) for _ in range(2))
    for trainer in (one, other):
        trainer.crosscoder.b_enc.data[:5] -= 100  # dead
    wanted = [one.step() for _ in range(130)]
    assert wanted[-1]["fvu/batch"] < wanted[0]["fvu/batch"] and len(one.dead) and wanted[-1]["loss/aux"] > 0
    for _ in range(115):
        other.step()
    path = str(other.save())
    other.lock.release()
    resumed = Trainer({**cfg, "resume": path}, models, tokens[:60])
    for _ in range(15):
        metrics = resumed.step()
    assert all(metrics[key] == wanted[-1][key] for key in metrics)
    # A threshold is fitted where it is saved.
    states = [safetensors.torch.load_file(trainer.save() / "crosscoder.safetensors") for trainer in (one, resumed)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.fixture(scope="module")
def trained(small, models, tokens, tmp_path_factory):
    """A batchtopk crosscoder, trained but not yet evaluated or saved. For tests that do not train it further."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = cfg_for(small, "batchtopk", batch_size=256, num_tokens=256 * 100, eval_seqs=24, save_dir=str(folder))
    trainer = Trainer(cfg, models, tokens[:600])
    for _ in range(trainer.total_steps):
        trainer.step()
    return trainer


def test_the_threshold_of_batchtopk_gives_k_on_text_it_was_not_fitted_on(trained, models, tokens):
    assert trained.evaluate()["sparsity/l0"] == pytest.approx(12, rel=0.05)
    assert get_stats(trained.crosscoder, models, tokens[600:700], trained.cfg)["l0"].item() == pytest.approx(12, rel=0.05)
    threshold = trained.crosscoder.threshold.clone()
    trained.crosscoder.fit_threshold(torch.cat([*iter_rows(models, tokens[600:700], trained.cfg)]))
    assert 0 < abs(trained.crosscoder.threshold - threshold) < 0.1 * threshold


def test_the_threshold_is_fitted_to_rows_of_the_buffer_and_not_to_held_out_text(trained, models, tmp_path, monkeypatch):
    crosscoder = trained.crosscoder
    crosscoder.fit_threshold(trained.buffer.peek())
    wanted = crosscoder.threshold.clone()
    crosscoder.fit_threshold(torch.cat([*iter_rows(models, trained.eval_tokens, trained.cfg)]))
    assert crosscoder.threshold != wanted
    other_text = torch.from_numpy(np.load(TINY / "wordnet.npy")[:8])
    for text in (trained.eval_tokens[:8], other_text):
        monkeypatch.setattr(trained, "eval_tokens", text)
        crosscoder.threshold.fill_(0)
        trained.evaluate()
        assert crosscoder.threshold == wanted
    crosscoder.threshold.fill_(0)
    monkeypatch.setattr(trained, "run_dir", tmp_path)
    assert CrossCoder.load(trained.save()).threshold == crosscoder.threshold == wanted


def test_to_evaluate_and_to_save_serves_no_rows(trained, tmp_path, monkeypatch):
    before = trained.buffer.peek()
    monkeypatch.setattr(trained, "run_dir", tmp_path)
    monkeypatch.setattr(trained, "eval_tokens", trained.eval_tokens[:1])
    trained.evaluate()
    assert trained.save()
    assert torch.equal(trained.buffer.peek(), before) and trained.buffer.rows_served == trained.step_counter * 256


def test_the_threshold_is_the_lowest_score_that_is_kept():
    crosscoder, x = crosscoder_for("batchtopk"), data(40)
    crosscoder.b_enc.data += 3  # so that enough are positive
    crosscoder.fit_threshold(x)
    scores = torch.relu(crosscoder.get_pre_acts(crosscoder.normalise(x))) * crosscoder.get_decoder_norms()
    assert crosscoder.threshold == scores.flatten().sort(descending=True).values[3 * 40 - 1] > 0
    assert abs(int((crosscoder.encode(x) > 0).sum()) - 3 * 40) <= 1  # itself, by rounding


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
def test_other_kinds_have_no_threshold_to_fit(activation):
    crosscoder = crosscoder_for(activation)
    crosscoder.fit_threshold(data(40))
    assert crosscoder.threshold == 0


@pytest.mark.parametrize("activation, steps", [("relu", 200), ("topk", 400), ("batchtopk", 400), ("jumprelu", 200)])
def test_aux_k_revives_latents_killed_on_purpose(small, models, tokens, activation, steps):
    cfg = cfg_for(small, activation, num_tokens=64 * 400, dead_after=64 * 20)
    alive = {}
    for aux_coeff in (0, 1 / 32):
        trainer = Trainer({**cfg, "aux_coeff": aux_coeff}, models, tokens[:60])
        h = trainer.crosscoder.get_pre_acts(trainer.crosscoder.normalise(trainer.buffer.buffer))
        trainer.crosscoder.b_enc.data[:100] -= h.amax(0)[:100] + 0.1  # nowhere positive
        for _ in range(steps):
            trainer.step()
        alive[aux_coeff] = (trainer.tokens_since_fired[:100] < cfg["dead_after"]).sum().item()
    assert alive[1 / 32] > alive[0] + 15, alive


def test_k_falls_and_the_penalty_of_jumprelu_rises(small, models, tokens):
    trainer = Trainer(cfg_for(small, "batchtopk"), models, tokens[:60])
    trainer.total_steps = 1000
    for trainer.step_counter, k in {0: 96, 25: 54, 50: 12, 900: 12}.items():
        assert trainer.get_k() == k and trainer.get_l1_coeff() == 0
    trainer = Trainer(cfg_for(small, "jumprelu"), models, tokens[:60])
    trainer.total_steps = 1000
    for trainer.step_counter, share in {0: 0, 500: 0.5, 1000: 1}.items():
        assert trainer.get_l1_coeff() == pytest.approx(0.3 * share)


def test_a_key_that_the_activation_does_not_use_is_refused():
    for overrides, said in (({"k": 65}, "^k=65: activation=relu does not use it.*topk or batchtopk"),
                            ({"activation": "topk", "l1_coeff": 3}, "^l1_coeff=3.0: .*it is for activation=relu"),
                            ({"activation": "jumprelu", "dec_init_norm": 0.1}, "^dec_init_norm"),
                            ({"activation": "batchtopk", "l0_coeff": 1}, "^l0_coeff"),
                            ({"activation": "topk", "shared_penalty": 1}, "^shared_penalty"),
                            ({"activation": "topk", "l0": 30}, "^l0=30.0: .*relu or jumprelu"),
                            ({"l0": 300, "dict_size": 50}, "^l0=300.0: more than dict_size=50"),
                            ({"activation": "topk", "k": 100, "dict_size": 50}, "^k=100: more than dict_size=50"),
                            ({"activation": "gelu"}, "^activation='gelu'")):
        with pytest.raises(ValueError, match=said):
            make_cfg(device="cpu", **overrides)


def test_a_key_that_the_activation_does_not_use_is_there_at_its_default():
    for activation in ALL:
        cfg = make_cfg(activation=activation, device="cpu")
        assert (cfg["k"], cfg["l1_coeff"], cfg["l0_coeff"], cfg["dec_init_norm"], cfg["shared_penalty"]) == (64, 2, 5, 0.005, 0.1)
        assert json.loads(json.dumps(cfg)) == cfg == make_cfg(**cfg)
