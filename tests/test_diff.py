"""Two models: what is mixed, tied and held at zero, and what tells whose a latent is."""
import copy
import json
import pickle
import re

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import train
from conftest import ROOT, TINY, open_models
from planted import functions_of_scratch, run
from train import get_tokenizer, load_models, load_tokens, make_cfg
from utils import CrossCoder, Trainer, get_stats

SCRATCH = functions_of_scratch()
SMALL = dict(preset="diff-tiny", enc_dtype="fp32", batch_size=64, buffer_mult=16, dict_size=256, model_batch_size=8, eval_seqs=8,
             num_tokens=64 * 40, device="cpu", k=12, n_exclusive=0)


@pytest.fixture(scope="module")
def two():
    return open_models(make_cfg(**SMALL))


def data(rows, n_layers=4, d_model=6):
    return torch.randn(rows, n_layers, d_model, generator=torch.Generator().manual_seed(3))


def small(activation, **overrides):
    """SMALL for any activation."""
    return {**{key: value for key, value in SMALL.items() if key != "k" or "topk" in activation}, "activation": activation, **overrides}


def crosscoder_for(n_layers=4, d_model=6, **overrides):
    overrides = {"activation": "relu", "n_exclusive": 0, **overrides}
    cfg = make_cfg(preset="diff-tiny", enc_dtype="fp32", device="cpu", dict_size=12, **overrides)
    return CrossCoder(cfg, n_layers, d_model)


def test_a_mix_has_its_shares_throughout(two, tmp_path):
    kjv, wordnet = np.load(TINY / "kjv.npy"), np.load(TINY / "wordnet.npy")
    np.save(tmp_path / "short.npy", wordnet[:300])
    tokens = load_tokens(make_cfg(**SMALL, tokens=f"{TINY / 'kjv.npy'}:3,{tmp_path / 'short.npy'}:1"), two)
    assert tokens.shape == (1200, 128)  # until one is used up
    is_kjv = [row in {r.tobytes() for r in kjv[:900]} for row in (row.numpy().tobytes() for row in tokens)]
    assert sum(is_kjv) == 900
    for start in range(0, 1200, 40):
        assert sum(is_kjv[start : start + 40]) in (29, 30, 31)
    for shares in (("", ""), (":1", ":-1"), (":nan", ":1"), (":0", ":1"), (":a", ":b")):
        mix = ",".join(f"{TINY / name}{share}" for name, share in zip(("kjv.npy", "wordnet.npy"), shares))
        with pytest.raises(ValueError, match="^tokens=.*its share"):
            load_tokens(make_cfg(**SMALL, tokens=mix), two)


def test_more_of_a_mix_begins_with_the_same_rows_and_ids_of_two_types_go_together(two, tmp_path):
    wordnet = np.load(TINY / "wordnet.npy")
    np.save(tmp_path / "short.npy", wordnet[:101].astype(np.int64))
    np.save(tmp_path / "long.npy", wordnet[:307].astype(np.int64))
    short, long = (load_tokens(make_cfg(**SMALL, tokens=f"{TINY / 'kjv.npy'}:0.3,{tmp_path / name}:0.7"), two)
                   for name in ("short.npy", "long.npy"))
    assert 140 < len(short) < len(long) and torch.equal(short[:-6], long[: len(short) - 6])


def test_a_mix_of_text_and_chat_keeps_the_control_tokens_for_both_models(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HF_HOME", str(tmp_path / "hf_home"))
    for name in ("text", "chat", "tuned"):
        (tmp_path / name).mkdir()
    text = "In the beginning God created the heaven and the earth. "
    (tmp_path / "text" / "0.txt").write_text(text * 2000)
    tuned = AutoTokenizer.from_pretrained(TINY / "tuned")
    tuned.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "tuned" / file).write_bytes((TINY / "tuned" / file).read_bytes())
    tuned.save_pretrained(tmp_path / "tuned")
    cfg = make_cfg(**{**SMALL, "tokens": "", "dataset": f"{tmp_path / 'text'}:0.5,{tmp_path / 'chat'}:0.5",
                      "model_name": f"{TINY / 'base'},{tmp_path / 'tuned'}"})
    models = load_models(cfg)
    tokenizer = get_tokenizer(models)
    assert not models[0].tokenizer.chat_template  # the first has none of its own, and is left as it is
    chat = [{"role": "user", "content": "Who made it?"}, {"role": "assistant", "content": "And God said, " * 40}]
    for column in ("conversation", "messages"):
        (tmp_path / "chat" / "all.jsonl").write_text(json.dumps({column: chat}) + "\n" + json.dumps({column: chat}) + "\n")
        tokens = load_tokens(cfg, models)
        first, second = (tuned.decode(row[1:].long()) for row in tokens[:2])
        assert first.startswith("In the beginning") and second.startswith("<user>Who made it?<assistant>And God said,")
        assert (tokens[:, 0] == tuned.bos_token_id).all()


def load_anew(crosscoder):
    other = CrossCoder({**crosscoder.cfg, "seed": 1}, *crosscoder.b_dec.shape)
    other.load_state_dict(crosscoder.state_dict(), assign=True)
    return other


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda crosscoder: pickle.loads(pickle.dumps(crosscoder)), load_anew])
def test_a_copy_is_held_to_shared_and_exclusive_latents_as_the_original_is(two, copied):
    cfg = make_cfg(**small("relu", n_shared=40, n_exclusive=30))
    trainer = Trainer(cfg, two, load_tokens(cfg, two)[:60])
    trainer.step()
    before = trainer.crosscoder.W_dec.detach().clone()
    trainer.crosscoder = copied(trainer.crosscoder)
    trainer.optimizer = torch.optim.Adam(trainer.crosscoder.parameters(), 1e-3, fused=True)
    for _ in range(3):
        trainer.step()
    W_dec = trainer.crosscoder.W_dec.detach()
    assert ((W_dec - before).flatten(1).norm(dim=1) > 0).all()
    assert torch.equal(W_dec[:40, 0], W_dec[:40, 1]) and not W_dec[40:70, 1].any() and not W_dec[70:100, 0].any()


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_decoders_begin_alike_and_shared_and_exclusive_latents_stay_so(two, activation):
    tokens = load_tokens(make_cfg(**SMALL), two)[:60]
    cfg = make_cfg(**small(activation, layers="1,3", n_shared=40, n_exclusive=30, aux_coeff=0.1))
    trainer = Trainer(cfg, two, tokens)
    _, cosines = SCRATCH["get_relative_norms"](trainer.crosscoder)
    assert torch.allclose(cosines[:40], torch.ones(40)) and torch.allclose(cosines[100:], torch.ones(156))
    start = trainer.crosscoder.W_dec.detach().clone()
    trainer.dead = torch.arange(0, 256, 5)  # of all kinds, for AuxK
    for _ in range(30):
        trainer.step()
    W_dec, W_enc = trainer.crosscoder.W_dec.detach(), trainer.crosscoder.W_enc.detach().movedim(2, 0)
    assert ((W_dec - start).flatten(1).norm(dim=1) > 0).all()
    assert torch.equal(W_dec[:40, :2], W_dec[:40, 2:]) and not torch.equal(W_enc[:40, :2], W_enc[:40, 2:])
    for W in (W_dec, W_enc):
        assert not W[40:70, 2:].any() and W[40:70, :2].all() and not W[70:100, :2].any() and W[70:100, 2:].all()
        assert (W[100:, :2] != W[100:, 2:]).any(2).all()
    path = trainer.save()
    trainer.lock.release()
    resumed = Trainer({**cfg, "resume": str(path)}, two, tokens)
    assert trainer.step()["loss/total"] == resumed.step()["loss/total"]
    assert torch.equal(resumed.crosscoder.W_dec, trainer.crosscoder.W_dec)


def test_a_tied_gradient_is_the_mean_of_both_also_when_gradients_are_added_up():
    free, tied = crosscoder_for(), crosscoder_for(n_shared=5, shared_penalty=1)
    for crosscoder in (free, tied):
        for x in data(20).split(10):
            losses = crosscoder.get_losses(x)
            (losses.l2_loss + losses.l1_loss).backward()
        crosscoder.constrain(crosscoder.W_enc.grad, crosscoder.W_dec.grad)  # as Trainer.step does
    wanted = free.W_dec.grad.unflatten(1, (2, 2)).mean(1).repeat(1, 2, 1)
    assert torch.allclose(tied.W_dec.grad[:5], wanted[:5], atol=1e-6)
    assert torch.allclose(tied.W_dec.grad[5:], free.W_dec.grad[5:]) and torch.allclose(tied.W_enc.grad, free.W_enc.grad)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_shared_latents_pay_their_share_of_the_penalty(activation):
    crosscoder, x = crosscoder_for(activation=activation, n_shared=5, shared_penalty=0.2), 20 * data(20)
    acts, norms = crosscoder.encode(x), crosscoder.W_dec.norm(dim=-1).sum(-1)
    each = acts * norms if activation == "relu" else torch.tanh(4 * acts * norms)
    assert acts[:, :5].any()
    wanted = (0.2 * each[:, :5].sum() + each[:, 5:].sum()) / 20
    assert crosscoder.get_losses(x).l1_loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_what_does_not_go_together_is_refused():
    for overrides, said in ((dict(preset="tiny", n_shared=5), "^n_shared=5: takes several models"),
                            (dict(preset="tiny", n_exclusive=5), "^n_exclusive=5: takes several models"),
                            (dict(preset="diff-tiny", n_shared=2000, n_exclusive=25), "dict_size=2048"),
                            (dict(preset="diff-tiny", shared_penalty=0.2), "^shared_penalty=0.2: activation=batchtopk does not")):
        with pytest.raises(ValueError, match=said):
            make_cfg(device="cpu", **overrides)


@pytest.mark.parametrize("narrow_first", [False, True])
def test_a_narrower_model_is_refused_by_name(tmp_path, narrow_first):
    shape = dict(vocab_size=4096, bos_token_id=0, eos_token_id=0, n_layer=4, n_embd=48, n_head=2, n_positions=128)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(tmp_path / "narrow")
    names = [str(tmp_path / "narrow"), str(TINY / "base")][:: 1 if narrow_first else -1]
    cfg = make_cfg(**{**SMALL, "model_name": names})
    with pytest.raises(ValueError, match=re.escape(f"model_name={names}: {names[0]} and {names[1]} differ in width")):
        load_models(cfg)


def test_relative_norms_cosines_and_counts_by_hand(two):
    crosscoder = crosscoder_for(n_layers=2, d_model=128)
    e, f = torch.eye(128)[:2]
    pairs = [(3 * e, 4 * e), (e, 0 * e), (0 * e, 2 * f), (e, -e), (0.8 * e + 0.6 * f, 10 * e), (0 * e, 0 * e)]
    crosscoder.W_dec.data[:6] = torch.stack([torch.stack(pair) for pair in pairs])
    norms, cosines = SCRATCH["get_relative_norms"](crosscoder)
    assert norms[:6].tolist() == pytest.approx([4 / 7, 0, 1, 0.5, 10 / 11, 0])
    assert cosines[:6].tolist() == pytest.approx([1, 0, 0, -1, 0.8, 0])
    crosscoder.W_enc.data.zero_()
    crosscoder.b_enc.data[:] = torch.tensor([1.0] * 4 + [-1] * 8)  # the first four are always active
    cfg = {**crosscoder.cfg, "model_batch_size": 2}
    freqs = get_stats(crosscoder, two, load_tokens(cfg, two)[:2], cfg)["freqs"]
    counts = SCRATCH["get_diff_counts"](crosscoder, freqs)
    assert [counts[key] for key in ("shared", "only_0", "only_1", "cosine")] == [2, 1, 1, 0]
    crosscoder.W_dec.data[:, 1] = 0
    counts = SCRATCH["get_diff_counts"](crosscoder, freqs)
    assert [counts[key] for key in ("shared", "only_0", "cosine")] == [0, 4, 0]


def test_latent_scaling_equals_the_formula_token_by_token():
    crosscoder, x = crosscoder_for(), 3 * data(30)
    generator = torch.Generator().manual_seed(4)
    for parameter in crosscoder.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    crosscoder.norm_factor.copy_(torch.linspace(0.5, 2, 4))
    own = torch.arange(12) % 2
    with torch.no_grad():
        nu_eps, nu_r = SCRATCH["get_latent_scaling"](crosscoder, x.split(8), own)
        y = (x / crosscoder.norm_factor[:, None]).unflatten(1, (2, -1)).flatten(2)  # [row, model, d]
        f = crosscoder.encode(x)
        x_hat = (crosscoder(x) / crosscoder.norm_factor[:, None]).unflatten(1, (2, -1)).flatten(2)
        W = crosscoder.W_dec.unflatten(1, (2, -1)).flatten(2)
    for i in range(12):
        d, betas = W[i, own[i]], {}
        for m in (0, 1):
            for kind in ("eps", "r"):
                targets = [y[t, m] - (x_hat[t, m] - f[t, i] * W[i, m]) if kind == "eps" else x_hat[t, m] for t in range(30)]
                betas[kind, m] = sum(f[t, i] * (targets[t] @ d) for t in range(30)) / (d @ d * sum(f[:, i] ** 2))
        for kind, nu in (("eps", nu_eps), ("r", nu_r)):
            wanted = betas[kind, 1 - int(own[i])] / betas[kind, int(own[i])]
            assert nu[i].item() == pytest.approx(wanted.item(), rel=1e-3, abs=1e-4)


def test_latent_scaling_finds_the_planted_truth_where_relative_norms_do_not():
    relu = run("relu", 0, SCRATCH["get_exclusive"], num_tokens=140_000)
    batchtopk = run("batchtopk", 0, SCRATCH["get_exclusive"], num_tokens=200_000)
    (before, found), (after, still_found) = relu["scores"]
    assert before < 0.8 and after > 0.95 and found == still_found == 1
    assert min(min(each) for each in batchtopk["scores"]) > 0.95


@pytest.fixture
def gradients_back_on():
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
def test_the_cells_on_model_diffing_run_on_two_models(two, activation, capsys, gradients_back_on):
    cfg = make_cfg(**small(activation, num_tokens=64 * 200, n_exclusive=20))
    Trainer(cfg, two, load_tokens(cfg, two)[:80]).train()
    first, *others = re.split(r"^(?=# %%)", (ROOT / "scratch.py").read_text(), flags=re.MULTILINE)[1:]
    cells = [cell for cell in others if cell.startswith("# %% Model diff")]
    assert len(cells) == 6
    (scaling,) = (cell for cell in cells if "latent scaling" in cell.split("\n")[0])
    loaded: dict = {}
    exec(first, loaded)
    exec(scaling, loaded)
    exec(next(cell for cell in others if cell.startswith("# %% Latent pages")).rpartition("\n\n")[0].rpartition("\nchosen")[0], loaded)
    assert loaded["table"]["active"].any()
    for cell in cells:
        names = dict(loaded)
        if cell != scaling:
            exec(cell, names)
        for name in re.findall(r"^(fig_\w+)$", cell, flags=re.MULTILINE):
            assert isinstance(names[name], go.Figure) and names[name].data and names[name].layout.title.text
    out = capsys.readouterr().out
    assert re.search(r"diff.html: \d+ latents are exclusive", out) and re.search(r"the first and itself +\d+ +\d+ +\d+\n", out)
    assert re.search(r"the second's activations +[\d.]+ +[\d.]+\n", out)
