"""Cells to copy into a notebook: looking at a trained crosscoder. Also runs from top to bottom: python scratch.py

Every cell needs only the first one, those on model diffing also the one on latent scaling, and ends in a figure or a
small table. In a script the figures go unseen: there write fig.write_html("fig.html"), or fig.write_image("fig.png")
with the packages kaleido and a Chrome at hand.
"""
# %% Load a crosscoder, its models and its held-out text
import math
import tempfile
from functools import partial
from pathlib import Path

import einops
import numpy as np
import plotly.express as px
import plotly.graph_objects as go
import safetensors.torch
import torch
import tqdm
from plotly.subplots import make_subplots

from utils import (
    PUBLISHED_NORMS, CrossCoder, Trainer, evaluate, get_ce, get_relative_norms, get_sources, get_stacked_resids,
    get_stats, iter_rows, load_models, load_tokens, make_cfg, source_names)

torch.set_grad_enabled(False)
CHECKPOINTS = sorted(Path("checkpoints").glob("version_*/step_*"), key=lambda path: path.stat().st_mtime)
assert CHECKPOINTS, "no checkpoint here yet: python train.py --preset=tiny makes one in a minute"
crosscoder = CrossCoder.load(CHECKPOINTS[-1])
here = {"device": "auto", "buffer_device": "auto", "enc_dtype": "auto"}  # not the machine it was trained on
cfg = make_cfg(**{**crosscoder.cfg, **here})
crosscoder.to(cfg["device"])
models = load_models(cfg)
tokenizer = models[0].tokenizer
held_out = load_tokens(cfg, tokenizer)[-cfg["eval_seqs"] :]
sources = get_sources(models, cfg)
names = source_names(cfg, len(sources))
dec_norms = crosscoder.W_dec.norm(dim=-1).cpu()  # [d_sae, n_layers]
print(f"{CHECKPOINTS[-1]}: {len(dec_norms):,} latents, {len(names)} sources of width {crosscoder.b_dec.shape[1]}")

# %% Norms per source: how large the activations are, and what they are divided by
x = get_stacked_resids(models, held_out[:16], cfg)[:, 1:].flatten(0, 1).float()  # [rows, n_layers, d_model]
fig_norms = px.bar(
    x=names, y=x.norm(dim=-1).mean(0).cpu(), labels={"x": "source", "y": "mean norm, position 0 left out"},
    title="Activation norm per source").add_scatter(
    x=names, y=crosscoder.norm_factor.cpu() * math.sqrt(x.shape[-1]), name="norm_factor x sqrt(d_model)")
fig_norms

# %% FVU per source
stats = get_stats(crosscoder, models, held_out, cfg)
fig_fvu = px.bar(x=names, y=stats["fvu"], labels={"x": "source", "y": "FVU"},
                 title=f"FVU per source, {stats['fvu_all']:.3f} over all")
fig_fvu

# %% Cross-entropy per source: what the reconstruction costs, beside what the mean costs
# Each source by itself. An acausal reconstruction has seen later layers, which can flatter it.
metrics = evaluate(crosscoder, models, held_out, cfg)
fig_ce = make_subplots(cols=2, subplot_titles=("reconstruction", "mean-ablated"))
for column, kind in enumerate(("delta", "ablated"), start=1):
    fig_ce.add_bar(x=names, y=[metrics[f"ce/{kind}_{name}"] for name in names], name=kind, row=1, col=column)
fig_ce.update_layout(title=f"Rise of cross-entropy in nats, clean {metrics['ce/clean']:.3f}", showlegend=False)
fig_ce

# %% L0 and how often each latent fires
stats = get_stats(crosscoder, models, held_out, cfg)
alive = stats["freqs"] > 0
fig_freqs = px.histogram(
    x=np.log10(stats["freqs"][alive].numpy()), nbins=60, labels={"x": "log10 of the share of tokens it is active on"},
    title=f"L0 {stats['l0']:.1f}; of {len(alive):,} latents {(~alive).sum()} never fire on "
          f"{held_out.numel():,} tokens, {(stats['freqs'] > 0.1).sum()} on more than a tenth")
fig_freqs

# %% Decoder norm of the latents over the sources
# Each row is a latent, scaled to its largest source, sorted by where its norms have their centre.
shape = dec_norms / dec_norms.max(dim=1, keepdim=True).values  # [d_sae, n_layers]
centre = (shape * torch.arange(len(names))).sum(1) / shape.sum(1)
fig_heat = px.imshow(
    shape[centre.argsort()][:: max(1, len(shape) // 1000)], x=names, aspect="auto", color_continuous_scale="Viridis",
    labels={"x": "source", "y": "latents, sorted", "color": "norm / largest"}, title="Decoder norm per source")
fig_heat

# %% How many sources each latent spans: those with at least a tenth of its largest norm
spans = (dec_norms >= 0.1 * dec_norms.max(dim=1, keepdim=True).values).sum(1)
fig_spans = px.histogram(x=spans, labels={"x": "sources spanned", "y": "latents"},
                         title=f"A latent spans {spans.float().mean():.2f} of {len(names)} sources on average")
fig_spans

# %% Decoder cosine between sources: does a latent keep its direction?
# Weighted by the norms, so that a source where the latent is absent does not count.
directions = torch.nn.functional.normalize(crosscoder.W_dec.cpu(), dim=-1)
cosines = einops.einsum(directions, directions, "d_sae l d_model, d_sae k d_model -> d_sae l k")
weights = einops.einsum(dec_norms, dec_norms, "d_sae l, d_sae k -> d_sae l k")
fig_cosine = px.imshow((cosines * weights).sum(0) / weights.sum(0), x=names, y=names, zmin=-1, zmax=1, text_auto=".2f",
                       color_continuous_scale="RdBu", title="Mean decoder cosine between sources")
fig_cosine

# %% Compare two crosscoders at equal L0
# The denser one keeps only its strongest latents, those with acts_i * sum_l ||W_dec_i^l|| above a threshold that
# brings it to the L0 of the other. Here: the last two checkpoints; give any two of the same sources.
pair = {str(path): CrossCoder.load(path, cfg["device"]) for path in CHECKPOINTS[-2:]}
x = get_stacked_resids(models, held_out[:16], cfg)[:, 1:].flatten(0, 1).float()
acts = {path: cc.encode(x).float() for path, cc in pair.items()}
target = min((a > 0).sum().item() for a in acts.values())
print(f"{'at L0 ' + format(target / len(x), '.1f'):<40} " + "  ".join(f"{name:>14}" for name in names))
for path, cc in pair.items():
    scores = acts[path] * cc.W_dec.norm(dim=-1).sum(-1)
    threshold = scores.flatten().sort(descending=True).values[target - 1]
    error = x - cc.decode(acts[path] * (scores >= threshold))
    fvu = error.pow(2).sum((0, 2)) / (x - x.mean(0)).pow(2).sum((0, 2))
    print(f"{path[-40:]:<40} " + "  ".join(f"{value:14.4f}" for value in fvu))
first, second = (torch.nn.functional.normalize(cc.W_dec.flatten(1), dim=1) for cc in (list(pair.values()) * 2)[:2])
closest = torch.cat([(some @ second.T).max(dim=1).values for some in first.split(1024)])
print(f"latents of the first with one of cosine above 0.9 in the second: {(closest > 0.9).float().mean():.1%}")

# %% Where a latent fires most: the top tokens with their context
# By default one that fires on about one token in 500. The token that it fires on is in [brackets].
stats = get_stats(crosscoder, models, held_out, cfg)
latent = int((stats["freqs"] - 0.002).abs().argmin())
acts = torch.cat([crosscoder.encode(get_stacked_resids(models, rows, cfg).float())[..., latent].float().cpu()
                  for rows in held_out.split(4)])  # [seq, pos]
acts[:, 0] = 0  # position 0 was not trained on
print(f"latent {latent}: active on {stats['freqs'][latent]:.2%} of the tokens; decoder norms "
      + ", ".join(f"{name} {norm:.2f}" for name, norm in zip(names, dec_norms[latent])))
for index in acts.flatten().argsort(descending=True)[:12].tolist():
    seq, pos = divmod(index, acts.shape[1])
    before, token, after = (tokenizer.decode(held_out[seq, part].long()).replace("\n", " ")
                            for part in (slice(max(0, pos - 12), pos), slice(pos, pos + 1), slice(pos + 1, pos + 7)))
    print(f"{acts[seq, pos]:7.2f}  {before[-60:]:>60}[{token}]{after}")

# %% Steer with a latent: add its decoder vector to one source while the model writes
latent, source, strength = int(dec_norms.sum(1).argmax()), len(sources) // 2, 4.0
model, hook = models[sources[source].model], sources[source].hook
direction = torch.nn.functional.normalize(crosscoder.W_dec[latent, source], dim=0).to(cfg["device"])
direction *= crosscoder.norm_factor[source] * math.sqrt(len(direction))  # now as long as a mean x


def steer(act, hook, strength):
    act[:, 1:] += strength * direction.to(act)
    return act


for strength in (0.0, 0.5, 1.0):
    text = held_out[:1, :16].to(cfg["device"]).long()
    for _ in range(24):
        logits = model.run_with_hooks(text, fwd_hooks=[(hook, partial(steer, strength=strength))])
        text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    print(f"latent {latent} at {names[source]} x {strength}: {tokenizer.decode(text[0, 1:])!r}")

# %% What one latent does: take its contribution out of every source and see the cross-entropy
stats = get_stats(crosscoder, models, held_out, cfg)
batch = held_out[:16].to(cfg["device"]).long()
x = get_stacked_resids(models, batch, cfg).float()
acts = crosscoder.encode(x).float()
clean = get_ce(models[0], batch)
print(f"clean cross-entropy {clean:.4f}; the latents that write most:")
for latent in (acts.mean((0, 1)).cpu() * dec_norms.sum(1)).argsort(descending=True)[:8].tolist():
    write = einops.einsum(acts[..., latent], crosscoder.W_dec[latent], "seq pos, l d_model -> seq pos l d_model")
    without = x - write * crosscoder.norm_factor[:, None]
    splices = [(source.hook, without[:, :, i]) for i, source in enumerate(sources) if source.model == 0]
    print(f"latent {latent:6}: active on {stats['freqs'][latent]:6.1%}, without it "
          f"{get_ce(models[0], batch, splices) - clean:+.4f}")

# %% Export plain weights, the normalisation folded in
weights = crosscoder.fold()
safetensors.torch.save_file({name: w.cpu().contiguous() for name, w in weights.items()},
                            CHECKPOINTS[-1] / "folded.safetensors")
x = get_stacked_resids(models, held_out[:4], cfg)[:, 1:].flatten(0, 1).float()
h = einops.einsum(x, weights["W_enc"], "row l d_model, l d_model d_sae -> row d_sae") + weights["b_enc"]
acts = h * (h > weights["thresholds"])
if crosscoder.activation == "topk":
    scores = acts * weights["decoder_norms"]
    acts = acts * (scores >= scores.topk(cfg["k"]).values[:, -1:])
x_hat = einops.einsum(acts, weights["W_dec"], "row d_sae, d_sae l d_model -> row l d_model") + weights["b_dec"]
print(f"{CHECKPOINTS[-1] / 'folded.safetensors'}: the plain formula is within "
      f"{(x_hat - crosscoder(x)).norm() / x_hat.norm():.1e} of the crosscoder, which computes in {cfg['enc_dtype']}")

# %% The picture in the README: reconstruction, cost and span in one
metrics = evaluate(crosscoder, models, held_out, cfg)
shape = dec_norms / dec_norms.max(dim=1, keepdim=True).values
centre = (shape * torch.arange(len(names))).sum(1) / shape.sum(1)
labels = [str(source.layer) for source in sources] if len(models) == 1 else names
overview = make_subplots(cols=3, column_widths=[0.28, 0.28, 0.44], subplot_titles=(
    "FVU", "Rise of cross-entropy (nats)", "Decoder norm of each latent, relative to its largest"))
for column, (key, colour) in enumerate((("fvu/", "#3b528b"), ("ce/delta_", "#21918c")), start=1):
    overview.add_bar(x=labels, y=[metrics[key + name] for name in names], marker_color=colour, row=1, col=column)
heat = go.Heatmap(z=shape[centre.argsort()], x=labels, colorscale="Viridis", colorbar_thickness=12)
overview.add_trace(heat, row=1, col=3)
overview.update_xaxes(title=f"layer ({cfg['site']})", type="category")
overview.update_yaxes(title="latents, sorted by centre", row=1, col=3)
overview.update_layout(
    width=1200, height=400, showlegend=False, template="plotly_white",
    title=f"{len(shape):,} latents over {len(names)} sources: L0 {metrics['sparsity/l0']:.1f}, "
          f"FVU {metrics['fvu/all']:.3f}, clean cross-entropy {metrics['ce/clean']:.2f}")
overview

# %% Open a published crosscoder or autoencoder of another code
# norm_factor: what the activations of each source were divided by, [n_layers]; leave it out where it is folded into the
# weights. That cannot always be told: for GPT-2 Small's it is, for others say torch.ones(n_layers).


def convert_checkpoint(path, norm_factor=None, **overrides):
    """A file of weights, read without running any code in it -> CrossCoder. It can be
    - of GPT-2 Small's crosscoders or the Gemma 2 2B model diff (W_enc [n_layers, d_model, d_sae]): N.pt, cc_weights.pt
    - of dictionary_learning's CrossCoder or BatchTopKCrossCoder (encoder.weight, with its code normalisation): model.pt
    - of the one-layer autoencoders (W_enc [d_mlp, d_hidden], b_dec taken from the input)
    overrides: make_cfg's, such as model_name, layers and site, which no such file tells."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = {key.removeprefix("_orig_mod."): value.float() for key, value in weights.items()}
    activation, thresholds = "relu", None
    if "encoder.weight" in weights:
        W_enc, b_enc, b_dec = weights["encoder.weight"], weights["encoder.bias"], weights["decoder.bias"]
        W_dec = weights["decoder.weight"].transpose(0, 1)  # [d_sae, n_layers, d_model]
        for key in ("activation_mean", "activation_std"):
            if key in weights and weights[key].isfinite().any():
                raise ValueError(f"{path}: {key} is used for normalising, which cannot be converted")
        if "threshold" in weights:
            norms, whole = W_dec.norm(dim=-1).sum(1), W_dec.flatten(1).norm(dim=1)
            kinds = {1: norms, 2: whole, 3: whole + 0.1 * norms, 4: torch.ones_like(norms)}
            kind = int(weights.get("code_normalization_id", torch.tensor(1)))
            if kind not in kinds:
                raise ValueError(f"{path}: a threshold for each layer cannot be converted")
            activation, thresholds = "jumprelu", weights["threshold"].clamp(min=1e-30) / kinds[kind]
    elif weights["W_enc"].ndim == 2:
        W_enc, W_dec, b_dec = weights["W_enc"][None], weights["W_dec"][:, None], weights["b_dec"][None]
        b_enc = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
    else:
        W_enc, W_dec, b_enc, b_dec = (weights[key] for key in ("W_enc", "W_dec", "b_enc", "b_dec"))
        if norm_factor is None:  # where it is folded in, decoder over encoder norms grow as its square
            ratios = (W_dec.norm(dim=(0, 2)) / W_enc.norm(dim=(1, 2))).log()
            if W_enc.shape[:2] != (12, 768):
                raise ValueError("norm_factor: give what each source was divided by, or ones if that is folded in")
            slope = np.polyfit(np.log(PUBLISHED_NORMS), ratios.numpy(), 1)[0]
            if 0.5 < slope < 1.5:
                raise ValueError(f"norm_factor: cannot be told from the weights (slope {slope:.2f} of 0 or 2); give it")
            norm_factor = torch.tensor(PUBLISHED_NORMS) if slope < 1 else torch.ones(12)
    n_layers, d_model, dict_size = W_enc.shape
    cfg = make_cfg(**{"device": "cpu", "enc_dtype": "fp32", **overrides, "activation": activation, "dict_size": dict_size})
    crosscoder = CrossCoder(cfg, n_layers, d_model)
    crosscoder.load_state_dict({
        **crosscoder.state_dict(), "W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec,
        **({} if thresholds is None else {"log_threshold": thresholds.log()}),
        **({} if norm_factor is None else {"norm_factor": torch.as_tensor(norm_factor)})})
    return crosscoder


path = Path("published/0.pt")  # such as one of GPT-2 Small's
if path.exists():
    print(f"{path}: {convert_checkpoint(path, model_name='gpt2', center=True).W_dec.shape}")

# %% Beside sparse autoencoders of single layers, if sae_lens is installed: L0 against CE delta, a layer a panel
# Give a release and its names for the layers of your model; those of GPT-2 Small are the default.
release, sae_id = "gpt2-small-resid-post-v5-32k", "blocks.{layer}.hook_resid_post"
try:
    from sae_lens import SAE
except ImportError as error:
    print(f"{error}: pip install sae-lens, in another environment, as it brings transformer_lens 3; all here runs on that")
    SAE = None
if SAE and cfg["model_name"] != "gpt2":
    print(f"{release} is of gpt2, not of {cfg['model_name']}; give another release")
elif SAE:
    metrics, batch = evaluate(crosscoder, models, held_out, cfg), held_out[:16].to(cfg["device"]).long()
    clean = get_ce(models[0], batch)
    fig_saes = make_subplots(cols=len(sources), subplot_titles=names)
    for column, (source, name) in enumerate(zip(sources, names), start=1):
        sae = SAE.from_pretrained(release, sae_id.format(layer=source.layer), device=cfg["device"])
        x = get_stacked_resids(models, batch, {**cfg, "layers": str(source.layer)})[:, :, 0].float()
        features = sae.encode(x)
        l0, x_hat = (features[:, 1:] > 0).sum(-1).float().mean().item(), sae.decode(features)
        points = {"crosscoder": (metrics["sparsity/l0"], metrics[f"ce/delta_{name}"]),
                  "SAE": (l0, get_ce(models[0], batch, [(source.hook, x_hat)]) - clean)}
        for label, colour in (("crosscoder", "#3b528b"), ("SAE", "#21918c")):
            fig_saes.add_scatter(x=points[label][:1], y=points[label][1:], name=label, mode="markers", row=1, col=column,
                                 marker={"color": colour, "size": 12}, showlegend=column == 1)
    fig_saes.update_xaxes(title="L0", rangemode="tozero").update_yaxes(rangemode="tozero")
    fig_saes.update_layout(title="Rise of cross-entropy (nats) against L0", template="plotly_white", height=400)
    fig_saes.show()

# %% Model diffing: the cells from here on need a crosscoder of two models
if len(models) != 2:
    print("for the cells from here on: python train.py --preset=diff-tiny")
    raise SystemExit(0)

# %% Model diff: which latents do both models have, and which only one?
# Relative norm: 0 where only the first model has a decoder vector, 1 where only the second has. That alone proves
# nothing: a penalty on norms makes latents look exclusive which are not.
rel_norms, cosines = (each.cpu() for each in get_relative_norms(crosscoder))
active = get_stats(crosscoder, models, held_out, cfg)["freqs"] > 0
shared = active & (0.3 < rel_norms) & (rel_norms < 0.7)
fig_diff = make_subplots(cols=2, subplot_titles=(
    "relative decoder norm, active latents", "decoder cosine, shared latents"))
fig_diff.add_histogram(x=rel_norms[active], xbins={"start": 0, "end": 1.02, "size": 0.02}, row=1, col=1)
fig_diff.add_histogram(x=cosines[shared], xbins={"start": -1, "end": 1, "size": 0.05}, row=1, col=2)
first, second = (Path(name).name for name in cfg["model_name"].split(","))
fig_diff.update_xaxes(range=[0, 1.02], row=1, col=1)
fig_diff.update_layout(
    width=1000, height=360, showlegend=False, template="plotly_white",
    title=f"{shared.sum()} shared, {(active & (rel_norms < 0.05)).sum()} only in {first}, "
          f"{(active & (rel_norms > 0.95)).sum()} only in {second}")
fig_diff


# %% Model diff: latent scaling, to see which latents are truly exclusive
# Minder et al., Overcoming Sparsity Artifacts in Crosscoders, April 2025, section 3.
def get_latent_scaling(crosscoder, batches, own):
    """How much of a latent the model that should not have it has after all, against its own model: for what the
    reconstruction leaves of the other's activations, where much means that the penalty shrank the latent away
    (nu_eps), and for the reconstruction itself, where much means that other latents stand in for it (nu_r).
    batches: raw activations [rows, n_layers, d_model]; own: 0 or 1, the model whose latent it is -> two [d_sae]"""
    W_dec = crosscoder.W_dec.unflatten(1, (2, -1)).flatten(2)  # [d_sae, model, n_layers / 2 * d_model]
    with_error, with_x_hat, squares = torch.zeros_like(W_dec), torch.zeros_like(W_dec), 0
    for x in batches:
        acts = crosscoder.encode(x.float()).float()
        x_hat = crosscoder.decode(acts) / crosscoder.norm_factor[:, None]
        error = x.float() / crosscoder.norm_factor[:, None] - x_hat
        error, x_hat = (each.unflatten(1, (2, -1)).flatten(2) for each in (error, x_hat))
        with_error += einops.einsum(acts, error, "row d_sae, row model d -> d_sae model d")
        with_x_hat += einops.einsum(acts, x_hat, "row d_sae, row model d -> d_sae model d")
        squares = squares + acts.square().sum(0)
    rows, own = torch.arange(len(W_dec)), torch.as_tensor(own, device="cpu").long()
    d = W_dec[rows, own]  # [d_sae, d]
    betas = [einops.einsum(y, d, "d_sae model d, d_sae d -> d_sae model")  # up to a factor, the same in both models
             for y in (with_error + squares[:, None, None] * W_dec, with_x_hat)]
    return [(beta[rows, 1 - own] / beta[rows, own]).cpu() for beta in betas]


def get_exclusive(crosscoder, models, tokens, cfg):
    """A table [d_sae, 5]: is it the second model's, a candidate by relative norm, exclusive; nu_eps, nu_r."""
    rel_norms = get_relative_norms(crosscoder)[0].cpu()
    nu_eps, nu_r = get_latent_scaling(crosscoder, iter_rows(models, tokens, cfg), rel_norms > 0.5)
    candidates = ((rel_norms < 0.05) | (rel_norms > 0.95)) & nu_eps.isfinite()  # nan where never active
    return torch.stack([rel_norms > 0.5, candidates, candidates & (nu_eps < 0.2) & (nu_r < 0.5), nu_eps, nu_r], dim=1)


table = get_exclusive(crosscoder, models, held_out, cfg)
second, candidates, exclusive = table[:, :3].bool().unbind(1)
print(f"{candidates.sum()} candidates, of which {exclusive.sum()} are exclusive: nu_eps < 0.2 and nu_r < 0.5")
fig_scaling = go.Figure()
for m, name in enumerate(cfg["model_name"].split(",")):
    nu = table[candidates & (second == bool(m)), 3:]
    fig_scaling.add_scatter(x=nu[:, 0], y=nu[:, 1], mode="markers", name=f"only in {Path(name).name}")
fig_scaling.add_shape(type="rect", x0=-0.6, x1=0.2, y0=-0.6, y1=0.5, line_color="#888888")
fig_scaling.update_layout(
    width=620, height=480, template="plotly_white", title="Latent scaling: exclusive are those in the corner",
    xaxis={"range": [-0.6, 1.2], "title": "nu_eps: much where it was shrunk away"},
    yaxis={"range": [-0.6, 1.2], "title": "nu_r: much where others stand in"})
fig_scaling


# %% Model diff: null controls
# Two more trainings. The first model against itself: nothing is exclusive. Against itself with its sequences shuffled,
# so that the two never see the same text: all is, but for what only depends on the position.
class Shuffled:
    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def run_with_hooks(self, tokens, **kwargs):
        return self.model.run_with_hooks(tokens.roll(1, 0), **kwargs)


assert cfg["model_batch_size"] > 1, "nothing to shuffle in passes of one sequence"
all_tokens = load_tokens(cfg, tokenizer)
print(f"{'models':<32} {'active':>7} {'candidates':>11} {'exclusive':>10}")
for name, pair in (("the two", models), ("the first and itself", models[:1] * 2),
                   ("the first and itself, shuffled", [models[0], Shuffled(models[0])])):
    other = crosscoder
    if pair is not models:
        trainer = Trainer({**cfg, "save_dir": tempfile.mkdtemp(), "wandb_mode": "disabled"}, pair, all_tokens)
        with torch.enable_grad():
            for _ in tqdm.trange(trainer.total_steps, desc=name, leave=False):
                trainer.step()
        other = trainer.crosscoder
        other.fit_threshold(iter_rows(pair, held_out, cfg))
    result = get_exclusive(other, pair, held_out, cfg)
    counts = [result[:, 3].isfinite().sum().item(), *result[:, 1:3].sum(0).int().tolist()]
    print(f"{name:<32} {counts[0]:>7} {counts[1]:>11} {counts[2]:>10}")

# %% Model diff: the exclusive latents, with the tokens on which they are most active
chosen = table[:, 2].nonzero().flatten()
stats = get_stats(crosscoder, models, held_out, cfg)
chosen = chosen[stats["freqs"][chosen].argsort(descending=True)][:20]
acts = torch.cat([crosscoder.encode(get_stacked_resids(models, rows, cfg).float())[..., chosen].float().cpu()
                  for rows in held_out.split(4)])  # [seq, pos, chosen]
acts[:, 0] = 0
print(f"{'latent':>6} {'model':>8} {'active':>7} {'nu_eps':>7} {'nu_r':>6}  most active on")
for i, latent in enumerate(chosen.tolist()):
    seqs, positions = np.unravel_index(acts[..., i].flatten().argsort(descending=True)[:8].numpy(), acts.shape[:2])
    shown = [tokenizer.decode(held_out[seq, max(1, pos - 3) : pos + 1].long()) for seq, pos in zip(seqs, positions)]
    model = Path(cfg["model_name"].split(",")[int(table[latent, 0])]).name
    print(f"{latent:>6} {model:>8} {stats['freqs'][latent]:>7.2%} {table[latent, 3]:>7.2f} {table[latent, 4]:>6.2f}  "
          f"{' | '.join(shown)!r}")

# %% Model diff: put what the second model's latents write into the first, and see what it says
# Each latent's contribution to the second model in place of that to the first, whose exclusive ones have none. KL: from
# the second model's next-token distribution. The models must be of one width.
batch = held_out[:16].to(cfg["device"]).long()
x = get_stacked_resids(models, batch, cfg).float()
x_A, x_B = x.chunk(2, dim=2)
acts, factor = crosscoder.encode(x).float(), crosscoder.norm_factor[:, None]
factor_A, factor_B = factor.chunk(2)
d_A, d_B = crosscoder.W_dec.chunk(2, dim=1)
new_latents = (table[:, 2] * table[:, 0]).to(acts)  # the second model's exclusive ones


def write(latents, d, factor):
    return einops.einsum(acts * latents, d, "seq pos d_sae, d_sae l d_model -> seq pos l d_model") * factor


def get_log_probs(model, new=None):
    hooks = [source.hook for source in sources if source.model == 0] if new is not None else []
    put = [(hook, partial(lambda act, hook, part: torch.cat([act[:, :1], part[:, 1:].to(act)], 1), part=new[:, :, i]))
           for i, hook in enumerate(hooks)]
    return model.run_with_hooks(batch, fwd_hooks=put)[:, 1:-1].float().log_softmax(-1)


everything = torch.ones_like(new_latents)
wanted = get_log_probs(models[1])
print(f"{'the first model, with':<32} {'KL':>7} {'CE':>7}")
sizes = acts.mean((0, 1)) * d_B.norm(dim=-1).sum(-1) * (1 - new_latents)
others = torch.zeros_like(new_latents).index_fill_(0, sizes.topk(int(new_latents.sum())).indices, 1)
for name, new in (
        ("its own activations", x_A), ("the second's exclusive latents", x_A + write(new_latents, d_B, factor_B)),
        ("as many of the largest others", x_A + write(others, d_B, factor_B) - write(others, d_A, factor_A)),
        ("all latents", x_A + write(everything, d_B, factor_B) - write(everything, d_A, factor_A)),
        ("the second's activations", x_B)):
    log_probs = get_log_probs(models[0], new)
    kl = (wanted.exp() * (wanted - log_probs)).sum(-1).mean()
    ce = -log_probs.gather(-1, batch[:, 2:, None]).mean()
    print(f"{name:<32} {kl:7.3f} {ce:7.3f}")
