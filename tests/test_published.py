"""Checkpoints of other codes: files written here from random weights by those codes' formulas, opened, outputs compared."""
import pytest
import torch

from planted import functions_of_scratch
from conftest import TINY
from train import PRESETS, load_models, load_tokens, make_cfg
from utils import CrossCoder, Trainer

PUBLISHED_NORMS = PRESETS["gpt2-published"]["norm"]


@pytest.fixture(scope="module")
def convert():
    return functions_of_scratch()["convert_checkpoint"]


def rand(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def acausal(n_layers=12, d_model=768, d_sae=40):
    """Weights for normalised activations, encoder and decoder as far apart as after training."""
    return {"W_enc": rand(n_layers, d_model, d_sae, seed=1, scale=0.02), "W_dec": rand(d_sae, n_layers, d_model, seed=2, scale=0.03),
            "b_enc": rand(d_sae, seed=3), "b_dec": rand(n_layers, d_model, seed=4)}


def acausal_output(weights, x):
    acts = torch.relu(torch.einsum("bld,lds->bs", x, weights["W_enc"]) + weights["b_enc"])
    return acts, torch.einsum("bs,sld->bld", acts, weights["W_dec"]) + weights["b_dec"]


@torch.no_grad()
def compare(crosscoder, x, acts, x_hat):
    assert (acts > 0).any() and (acts == 0).any()
    assert torch.equal(crosscoder.encode(x) > 0, acts > 0)
    for mine, theirs in ((crosscoder.encode(x), acts), (crosscoder(x), x_hat)):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("folded", [False, True])
def test_gpt2_crosscoders_folded_or_not_is_told_from_the_norms(convert, tmp_path, folded):
    factor, weights = torch.tensor(PUBLISHED_NORMS)[:, None], acausal()
    x = rand(20, 12, 768, seed=5) * factor
    acts, x_hat = acausal_output(weights, x / factor)
    if folded:
        weights |= {"W_enc": weights["W_enc"] / factor[..., None], "W_dec": weights["W_dec"] * factor, "b_dec": weights["b_dec"] * factor}
    torch.save(weights, tmp_path / "0.pt")
    crosscoder = convert(tmp_path / "0.pt", model_name="gpt2", center=True)
    compare(crosscoder, x, acts, x_hat * factor)
    crosscoder.save(tmp_path / "mine")
    assert torch.equal(CrossCoder.load(tmp_path / "mine")(x), crosscoder(x))


def test_where_the_norms_do_not_tell_it_asks(convert, tmp_path):
    half = torch.tensor(PUBLISHED_NORMS)[:, None] ** 0.5
    weights = acausal()
    torch.save({**weights, "W_enc": weights["W_enc"] / half[..., None], "W_dec": weights["W_dec"] * half}, tmp_path / "0.pt")
    torch.save(acausal(2, 24), tmp_path / "cc_weights.pt")
    for name in ("0.pt", "cc_weights.pt"):
        with pytest.raises(ValueError, match="^norm_factor: .*give"):
            convert(tmp_path / name)


def test_the_gemma_model_diff_with_its_scaling_factors(convert, tmp_path):
    weights, scaling = acausal(2, 24), torch.tensor([0.276, 0.244])[:, None]  # activations were multiplied by these
    torch.save(weights, tmp_path / "cc_weights.pt")
    x = rand(50, 2, 24, seed=5) / scaling
    acts, x_hat = acausal_output(weights, x * scaling)
    crosscoder = convert(tmp_path / "cc_weights.pt", norm_factor=1 / scaling[:, 0], layers="13",
                         model_name="google/gemma-2-2b,google/gemma-2-2b-it")
    compare(crosscoder, x, acts, x_hat / scaling)


@pytest.mark.parametrize("kind", [None, 0, 1, 2, 3, 4])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_dictionary_learnings_crosscoders_with_every_code_normalisation(convert, tmp_path, kind, prefix):
    weights = {"encoder.weight": rand(2, 24, 40, seed=1, scale=0.2), "encoder.bias": rand(40, seed=2),
               "decoder.weight": rand(2, 40, 24, seed=3), "decoder.bias": rand(2, 24, seed=4)}
    x = rand(50, 2, 24, seed=5)
    acts = torch.relu(torch.einsum("bld,ldf->bf", x, weights["encoder.weight"]) + weights["encoder.bias"])
    if kind is not None:
        W = weights["decoder.weight"]
        sums, whole = W.norm(dim=2).sum(0), W.norm(dim=(0, 2))
        scores = acts * {0: sums, 1: sums, 2: whole, 3: 1.0 * whole + 0.1 * sums, 4: torch.ones(40)}[kind]
        weights |= {"k": torch.tensor(8), "threshold": scores.flatten().topk(8 * 50).values[-1] - 1e-4}
        if kind:  # older files do not have it
            weights["code_normalization_id"] = torch.tensor(kind)
        acts = acts * (scores > weights["threshold"])
    x_hat = torch.einsum("bf,lfd->bld", acts, weights["decoder.weight"]) + weights["decoder.bias"]
    torch.save({prefix + key: value for key, value in weights.items()}, tmp_path / "model.pt")
    compare(convert(tmp_path / "model.pt", model_name="a,b", layers="13"), x, acts, x_hat)


def test_what_cannot_be_converted_is_said(convert, tmp_path):
    weights = {"encoder.weight": rand(2, 24, 40), "encoder.bias": rand(40), "decoder.weight": rand(2, 40, 24), "decoder.bias": rand(2, 24)}
    for more, said in (({"threshold": torch.ones(2), "code_normalization_id": torch.tensor(5)}, "a threshold for each layer"),
                       ({"activation_mean": torch.ones(2, 24)}, "activation_mean is used")):
        torch.save(weights | more, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=said):
            convert(tmp_path / "model.pt", model_name="a,b", layers="13")


def test_one_layer_autoencoders_that_take_b_dec_from_the_input(convert, tmp_path):
    weights = {"W_enc": rand(64, 90, seed=1, scale=0.2), "W_dec": rand(90, 64, seed=2), "b_enc": rand(90, seed=3), "b_dec": rand(64, seed=4)}
    torch.save(weights, tmp_path / "25.pt")
    x = rand(50, 64, seed=5)
    acts = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    crosscoder = convert(tmp_path / "25.pt", preset="gelu-1l")
    compare(crosscoder, x[:, None], acts, (acts @ weights["W_dec"] + weights["b_dec"])[:, None])


def test_gelu_1l_trains_on_the_mlp_of_a_one_layer_model(tmp_path, tokens):
    """Its model is on the hub only; in its place one of one layer: the embeddings, first block and head of tests/tiny's."""
    from transformers import AutoTokenizer, GPT2LMHeadModel
    whole = GPT2LMHeadModel.from_pretrained(TINY / "base")
    whole.transformer.h = whole.transformer.h[:1]
    whole.config.n_layer = 1
    whole.save_pretrained(tmp_path / "one")
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(tmp_path / "one")
    cfg = make_cfg(preset="gelu-1l", model_name=str(tmp_path / "one"), tokens=str(TINY / "kjv.npy"), seq_len=128, batch_size=256,
                   buffer_mult=32, dict_size=1024, num_tokens=100_000, lr=1e-3, eval_seqs=8, model_batch_size=16, device="cpu",
                   l1_coeff=1, wandb_mode="disabled")
    models = load_models(cfg)
    trainer = Trainer(cfg, models, load_tokens(cfg, models))
    assert trainer.crosscoder.W_enc.shape == (1, 512, 1024)
    metrics = trainer.train()
    assert metrics["fvu/post.0"] < 0.2 and metrics["sparsity/l0"] < 150
