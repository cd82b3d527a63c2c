"""Cells to copy into a notebook: looking at a trained crosscoder. Also runs from top to bottom.

Every cell needs only the first, those on model diffing also the one on latent scaling, and ends in a
figure or a small table. In a script figures go unseen: there write fig.write_html("fig.html").
"""
# %% Load a crosscoder, its models and its held-out text
import json
import math
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import einops
import huggingface_hub
import numpy as np
import plotly.express as px
import safetensors.torch
import torch
import torch.nn.functional as F
import tqdm
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from train import (
    DEVICES, MAY_CHANGE, PRESETS, USED_BY, explain, find_latest, get_tokenizer, load_models, load_tokens,
    make_cfg)
from utils import (
    CrossCoder, Trainer, bad, evaluate, find_checkpoint, get_ce, get_sources, get_stacked_resids,
    get_stats, iter_rows, list_checkpoints, source_names)

torch.set_grad_enabled(False)
np.set_printoptions(precision=4, suppress=True)
path = list_checkpoints(find_latest("checkpoints"))[-1]
crosscoder = CrossCoder.load(path)
# This machine may be another than the one it was trained on.
cfg = make_cfg(**crosscoder.cfg | dict.fromkeys([*DEVICES, "enc_dtype"], "auto"))
crosscoder.to(cfg["device"])
models = load_models(cfg)
tokenizer = get_tokenizer(models)
held_out = load_tokens(cfg, models)[-cfg["eval_seqs"] :]
sources = get_sources(models, cfg)
names = source_names(cfg, len(sources))
batch = held_out[:16].to(cfg["device"]).long()
x = get_stacked_resids(models, batch, cfg).float()  # [seq, pos, n_layers, d_model]
stats = get_stats(crosscoder, models, held_out, cfg)
freqs = stats["freqs"]
dec_norms = crosscoder.W_dec.norm(dim=-1).cpu()  # [d_sae, n_layers]
shares = dec_norms / dec_norms.amax(1, keepdim=True)  # 1 at the source that a latent writes most to

def get_acts(latents: Int[Tensor, "latent"]) -> Float[Tensor, "seq pos latent"]:
    """The activations of latents on the held-out text; 0 at position 0, which is not trained on."""
    acts = []
    for tokens in held_out.split(4):
        resids = get_stacked_resids(models, tokens, cfg)
        acts.append(crosscoder.encode(resids)[..., latents])
    acts = torch.cat(acts).float().cpu()
    acts[:, 0] = 0
    return acts

def get_top(acts: Float[Tensor, "seq pos"], n: int) -> list[tuple[float, str, str, str]]:
    """The n largest activations, each with the text before its token, the token, the text after it."""
    top = []
    for index in acts.flatten().topk(min(n, acts.count_nonzero())).indices.tolist():
        seq, pos = divmod(index, acts.shape[1])
        tokens = held_out[seq].long()
        parts = [tokens[max(1, pos - 12) : pos], tokens[pos], tokens[pos + 1 : pos + 7]]
        texts = [tokenizer.decode(part).replace("\n", " ") for part in parts]
        top.append((acts[seq, pos].item(), *texts))
    return top

print(path, names)

# %% Norms per source: how large the activations are, and what they are divided by
sizes = x[:, 1:].norm(dim=-1).mean((0, 1)).cpu()
factors = crosscoder.norm_factor.cpu().numpy() * math.sqrt(x.shape[3])
fig_norms = px.bar(x=names, y=sizes, title="Mean activation norm per source, position 0 left out")
fig_norms.add_scatter(x=names, y=factors, name="norm_factor x sqrt(d_model)")
fig_norms

# %% L0 and how often each latent fires
fig_freqs = px.histogram(
    x=freqs[freqs > 0].log10(), labels={"x": "log10 of the share of tokens"},
    title=f"L0 {stats['l0']:.1f}; of {len(freqs):,} latents {(freqs == 0).sum()} are never active here, "
          f"{(freqs > 0.1).sum()} on more than a tenth of the tokens")
fig_freqs

# %% How many sources each latent spans: those with at least a tenth of its largest norm
spans = (shares >= 0.1).sum(1)
fig_spans = px.histogram(x=spans, title=f"A latent spans {spans.float().mean():.2f} sources on average")
fig_spans

# %% Decoder cosine between sources: does a latent keep its direction?
# Weighted by the norms, so that a source where the latent is absent does not count.
W_dec = crosscoder.W_dec.cpu()
products = einops.einsum(W_dec, W_dec, "d_sae l d_model, d_sae k d_model -> l k")
weights = einops.einsum(dec_norms, dec_norms, "d_sae l, d_sae k -> l k")
fig_cosine = px.imshow(
    products / weights, x=names, y=names, zmin=-1, zmax=1, text_auto=".2f",
    color_continuous_scale="RdBu", title="Mean decoder cosine between sources")
fig_cosine

# %% The picture in the README: FVU, cross-entropy and decoder norms over the sources
# CE rises with the reconstruction of one source, or its mean, in place of that source. An acausal
# reconstruction has seen later layers, which can flatter it. On the right each row is a latent.
metrics = evaluate(crosscoder, models, held_out, cfg)
overview = make_subplots(
    cols=4,
    subplot_titles=["FVU", "CE rise (nats)", "CE rise, mean-ablated", "latents: decoder norm / largest"])
for column, key in enumerate(["fvu/", "ce/delta_", "ce/ablated_"], start=1):
    overview.add_bar(x=names, y=[metrics[key + name] for name in names], row=1, col=column)
centres = shares @ torch.arange(0.0, len(names)) / shares.sum(1)
overview.add_heatmap(x=names, z=shares[centres.argsort()].numpy(), colorscale="Viridis", row=1, col=4)
overview.update_yaxes(title="latents, by where they write", autorange="reversed", row=1, col=4)
overview.update_layout(
    title=f"L0 {stats['l0']:.1f}, FVU {metrics['fvu/all']:.3f}, clean CE {metrics['ce/clean']:.2f} nats",
    showlegend=False)
overview

# %% Compare two crosscoders at equal L0
# Each keeps only its largest scores, as many as the sparser of the two has. Here: the run's last two
# checkpoints; give any two of the same sources.
pair = [CrossCoder.load(folder, cfg["device"]) for folder in list_checkpoints(path.parent)[-2:]]
rows = x[:, 1:].flatten(0, 1)
n_active = min(int((each.encode(rows) > 0).sum()) for each in pair)
print(f"at L0 {n_active / len(rows):.1f}, FVU of {names}")
directions = []
for each in pair:
    acts = each.encode(rows)
    scores = acts * each.get_decoder_norms()
    lowest = scores.flatten().topk(n_active).values[-1]
    errors = (rows - each.decode(acts * (scores >= lowest))).pow(2)
    fvu = errors.sum((0, 2)) / (rows - rows.mean(0)).pow(2).sum((0, 2))
    print(fvu.cpu().numpy())
    directions.append(F.normalize(each.W_dec.flatten(1), dim=1))
closest = torch.cat([(part @ directions[-1].T).amax(1) for part in directions[0].split(1024)])
print(f"{(closest > 0.9).float().mean():.1%} of the first's latents have a cosine above 0.9 in the last")

# %% Where a latent fires most: the top tokens with their context
# By default one that fires on about one token in 500. The token that it fires on is in [brackets].
latent = int((freqs - 0.002).abs().argmin())
print(f"latent {latent}: active on {freqs[latent]:.2%} of the tokens; decoder norms of {names}:")
print(dec_norms[latent].numpy())
for act, before, token, after in get_top(get_acts([latent])[..., 0], 12):
    print(f"{act:7.2f}  {before[-60:]:>60}[{token}]{after}")

# %% Steer with a latent: add its decoder vector to one source while the model writes
i = len(sources) // 2
source = sources[i]
latent = int(dec_norms[:, i].argmax())
direction = F.normalize(crosscoder.W_dec[latent, i], dim=0)
direction *= crosscoder.norm_factor[i] * math.sqrt(len(direction))  # as long as a mean activation

def steer(act, hook):
    act[:, 1:] += strength * direction.to(act)
    return act

for strength in (0.0, 0.5, 1.0):
    text = batch[:1, :16]
    for _ in range(24):
        logits = models[source.model].run_with_hooks(text, fwd_hooks=[(source.hook, steer)])
        text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
    print(f"latent {latent} at {names[i]} x {strength}: {tokenizer.decode(text[0, 1:])!r}")

# %% What one latent does: take its contribution out of every source and see the cross-entropy
acts = crosscoder.encode(x).float()
hooks = [source.hook for source in sources if source.model == 0]
clean = get_ce(models[0], batch)
print(f"clean cross-entropy {clean:.4f}; the latents that write most:")
sizes = acts[:, 1:].mean((0, 1)) * crosscoder.get_decoder_norms()
for latent in sizes.topk(8).indices.tolist():
    vectors = crosscoder.W_dec[latent] * crosscoder.norm_factor[:, None]
    without = x - einops.einsum(acts[..., latent], vectors, "seq pos, l d_model -> seq pos l d_model")
    rise = get_ce(models[0], batch, list(zip(hooks, without.unbind(2)))) - clean
    print(f"latent {latent:6}: active on {freqs[latent]:6.1%}, without it {rise:+.4f}")

# %% Export plain weights, the normalisation folded in
@torch.no_grad()
def fold(crosscoder: CrossCoder) -> dict[str, Tensor]:
    """Plain weights for raw activations: h = x . W_enc + b_enc, acts = h * (h > thresholds), with topk only
    the k largest h * decoder_norms of them, x_hat = acts . W_dec + b_dec."""
    factor = crosscoder.norm_factor[:, None]  # [n_layers, 1]
    return {
        "W_enc": crosscoder.W_enc / factor[..., None],
        "W_dec": crosscoder.W_dec * factor,
        "b_enc": crosscoder.b_enc.clone(),
        "b_dec": crosscoder.b_dec * factor,
        "thresholds": crosscoder.get_thresholds(),
        "decoder_norms": crosscoder.get_decoder_norms(),
    }

weights = fold(crosscoder)
safetensors.torch.save_file(weights, path.with_name(f"folded_{path.name}.safetensors"))
rows = x[:4, 1:].flatten(0, 1)
h = einops.einsum(rows, weights["W_enc"], "row l d_model, l d_model d_sae -> row d_sae") + weights["b_enc"]
acts = h * (h > weights["thresholds"])
if crosscoder.activation == "topk":
    scores = acts * weights["decoder_norms"]
    acts *= scores >= scores.topk(cfg["k"]).values[:, -1:]
x_hat = einops.einsum(acts, weights["W_dec"], "row d_sae, d_sae l d_model -> row l d_model")
error = (x_hat + weights["b_dec"] - crosscoder(rows)).norm() / rows.norm()
print(f"the plain formula is within {error:.1e} of the crosscoder in {crosscoder.cfg['enc_dtype']}")

# %% Share it on the Hugging Face hub
def make_card(folder: Path, repo_id: str) -> str:
    """A model card: how to open the checkpoint, its last evaluation, its cfg."""
    crosscoder = CrossCoder.load(folder)
    cfg = make_cfg(**crosscoder.cfg | {"buffer_device": "cpu"})
    d_sae, n_layers, d_model = crosscoder.W_dec.shape
    names = source_names(cfg, n_layers)
    card = f"""---
tags: [crosscoder, sparse-autoencoder, interpretability]
---
# {repo_id}
A sparse crosscoder: {d_sae:,} latents ({cfg["activation"]}), {n_layers} sources of width {d_model}:
{", ".join(names)} of {", ".join(cfg["model_name"])}.
```python
from huggingface_hub import snapshot_download
from utils import CrossCoder
crosscoder = CrossCoder.load(snapshot_download("{repo_id}"))
acts = crosscoder.encode(x)  # x [..., n_layers, d_model], raw activations
```
"""
    log = folder.parent / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    evaluations = {}
    for line in lines:
        with suppress(ValueError):  # where a process was killed, or others wrote
            row = json.loads(line)
            if "ce/clean" in row:
                evaluations[f"step_{row['step']:07d}"] = row
    if folder.name in evaluations:
        row = evaluations[folder.name]
        card += "\n| source, on held-out text | FVU | CE delta, nats |\n|---|---|---|\n"
        for name in [*names, "all"]:
            card += f"| {name} | {row[f'fvu/{name}']:.4f} | {row[f'ce/delta_{name}']:+.4f} |\n"
        card += f"\nL0 {row['sparsity/l0']:.1f}, dead latents {row['sparsity/dead']:.1%}.\n\n"
    hidden = set(MAY_CHANGE) - {"model_name", "tokens", "dataset", "num_tokens"} | {"fingerprint"}
    hidden |= {key for key, activations in USED_BY.items() if cfg["activation"] not in activations}
    return card + "".join(f"- {key}: {cfg[key]}\n" for key in cfg if key not in hidden)

def push_to_hub(path: str | Path, repo_id: str, private: bool = False) -> str:
    """Puts a checkpoint, or a run's newest, there, without what only resuming needs. -> its address"""
    files = ["cfg.json", "crosscoder.safetensors", "manifest.json"]
    folder = find_checkpoint("path", Path(path), files[:2])
    card = make_card(folder, repo_id).encode()
    try:
        address = huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
        huggingface_hub.upload_file(repo_id=repo_id, path_or_fileobj=card, path_in_repo="README.md")
        huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files)
    except Exception as error:
        raise bad("repo_id", repo_id, explain(error)) from None
    return address

def from_hub(repo_id: str, revision: str | None = None, device: str = "cpu") -> CrossCoder:
    """CrossCoder.load of what push_to_hub has put there. ValueError where it cannot."""
    try:
        folder = huggingface_hub.snapshot_download(repo_id, revision=revision)
    except Exception as error:
        raise bad("repo_id", repo_id, explain(error)) from None
    return CrossCoder.load(folder, device)

# After hf auth login: push_to_hub(path, "you/your-crosscoder"), and then from_hub("you/your-crosscoder")
print(make_card(path, "you/your-crosscoder"))

# %% Open a published crosscoder or autoencoder of another code
def convert_dictionary_learning(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """dictionary_learning's CrossCoder or BatchTopKCrossCoder with our names. Its threshold is of
    activations times some norm of the decoder; here each latent has its own."""
    for key in ("activation_mean", "activation_std"):
        if key in weights and weights[key].isfinite().any():
            raise ValueError(f"{key} is used for normalising, which cannot be converted")
    W_dec = weights["decoder.weight"].transpose(0, 1)  # [d_sae, n_layers, d_model]
    converted = {
        "W_enc": weights["encoder.weight"],
        "W_dec": W_dec,
        "b_enc": weights["encoder.bias"],
        "b_dec": weights["decoder.bias"],
    }
    if "threshold" in weights:
        sums = W_dec.norm(dim=-1).sum(1)
        whole = W_dec.flatten(1).norm(dim=1)
        norms = {1: sums, 2: whole, 3: whole + 0.1 * sums, 4: torch.ones_like(sums)}
        kind = int(weights.get("code_normalization_id", 1))
        if kind not in norms:
            raise ValueError(f"code_normalization_id={kind}: a threshold for each layer, not for all")
        converted["log_threshold"] = (weights["threshold"].clamp(min=1e-30) / norms[kind]).log()
    return converted

def guess_norm_factor(weights: dict[str, Tensor]) -> list[float]:
    """What GPT-2 Small's activations were divided by; none if that is folded into the weights, whose
    ratio of decoder to encoder norms then grows as its square."""
    published = PRESETS["gpt2-published"]["norm"]
    if weights["W_enc"].shape[:2] != (12, 768):
        raise ValueError("norm_factor: give what each source was divided by, or ones if folded in")
    ratios = weights["W_dec"].norm(dim=(0, 2)) / weights["W_enc"].norm(dim=(1, 2))
    slope = np.polyfit(np.log(published), ratios.log(), 1)[0]
    if 0.5 < slope < 1.5:
        raise ValueError(f"norm_factor: not to be told from the weights (slope {slope:.2f}); give it")
    return published if slope < 1 else []

def convert_checkpoint(path: str | Path, norm_factor: list[float] = [], **overrides) -> CrossCoder:
    """A file of weights, read without running any code in it -> CrossCoder. It can be
    - of GPT-2 Small's crosscoders or the Gemma 2 2B diff (W_enc [n_layers, d_model, d_sae]): N.pt
    - of dictionary_learning's CrossCoder or BatchTopKCrossCoder (encoder.weight): model.pt
    - of the one-layer autoencoders (W_enc [d_mlp, d_hidden], b_dec taken from the input)
    norm_factor: what each source was divided by, ones if that is folded in; overrides: make_cfg's."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = {key.removeprefix("_orig_mod."): value.float() for key, value in weights.items()}
    if "encoder.weight" in weights:
        weights = convert_dictionary_learning(weights)
    elif weights["W_enc"].ndim == 2:
        weights["b_enc"] -= weights["b_dec"] @ weights["W_enc"]
        weights["W_enc"] = weights["W_enc"][None]
        weights["W_dec"] = weights["W_dec"][:, None]
    elif len(norm_factor) == 0:
        norm_factor = guess_norm_factor(weights)
    n_layers, d_model, d_sae = weights["W_enc"].shape
    overrides = {"device": "cpu", "enc_dtype": "fp32"} | overrides
    overrides["activation"] = "jumprelu" if "log_threshold" in weights else "relu"
    overrides["norm"] = torch.as_tensor(norm_factor).tolist()
    crosscoder = CrossCoder(make_cfg(**overrides | {"dict_size": d_sae}), n_layers, d_model)
    for name, parameter in crosscoder.named_parameters():
        parameter.data.copy_(weights[name])
    return crosscoder

# One of GPT-2 Small's: convert_checkpoint("0.pt", model_name="gpt2", center=True).save("published/0")

# %% Model diffing: the cells from here on need a crosscoder of two models
if len(models) != 2:
    print("for the cells from here on: python train.py --preset=diff-tiny")
    raise SystemExit

# %% Model diff: latent scaling, to see which latents are truly exclusive
# Minder et al., Overcoming Sparsity Artifacts in Crosscoders, April 2025, section 3.
@torch.no_grad()
def get_relative_norms(crosscoder: CrossCoder) -> Float[Tensor, "2 d_sae"]:
    """Of two models' decoder vectors d: ||d_B|| / (||d_A|| + ||d_B||) [O24], 0 for a latent that only
    the first has, 1 for one that only the second has; and their cosine."""
    d_A, d_B = crosscoder.W_dec.cpu().flatten(1).chunk(2, dim=1)
    total = d_A.norm(dim=1) + d_B.norm(dim=1)
    norms = d_B.norm(dim=1) / total.clamp(min=1e-30)
    return torch.stack([norms, F.cosine_similarity(d_A, d_B)])

def get_latent_scaling(
    crosscoder: CrossCoder, batches, own: Int[Tensor, "d_sae"]
) -> Float[Tensor, "2 d_sae"]:
    """How much of a latent the other model has, against its own, 0 or 1. nu_eps: in what other latents
    leave of the activations; much if the penalty shrank it away. nu_r: in the reconstruction; much if
    others stand in for it. batches: raw activations [rows, n_layers, d_model] each."""
    W_dec = crosscoder.W_dec.unflatten(1, (2, -1)).flatten(2)  # [d_sae, model, d]
    sums = squares = 0
    for x in batches:
        acts = crosscoder.encode(x).float()
        y_hat = crosscoder.normalise(crosscoder.decode(acts))
        y = torch.stack([crosscoder.normalise(x) - y_hat, y_hat])
        y = y.unflatten(2, (2, -1)).flatten(3)  # [nu, row, model, d]
        sums = sums + einops.einsum(acts, y, "row d_sae, nu row model d -> nu d_sae model d")
        squares = squares + acts.square().sum(0)
    sums[0] += squares[:, None, None] * W_dec  # the error without the latent, rather than with it
    latents = torch.arange(len(W_dec))
    d = W_dec[latents, own]
    # Betas up to a factor, which is the same in both models.
    betas = einops.einsum(sums, d, "nu d_sae model d, d_sae d -> nu model d_sae").cpu()
    return betas[:, 1 - own, latents] / betas[:, own, latents]

def get_exclusive(crosscoder: CrossCoder, models: list, tokens: Tensor, cfg: dict) -> dict:
    """Is a latent active, the second model's, a candidate by relative norm, exclusive? And its nu."""
    norms, _ = get_relative_norms(crosscoder)
    second = norms > 0.5
    nu = get_latent_scaling(crosscoder, iter_rows(models, tokens, cfg), second.long())
    active = nu[0].isfinite()
    candidate = active & ((norms - 0.5).abs() > 0.45)
    exclusive = candidate & (nu[0] < 0.2) & (nu[1] < 0.5)
    return dict(active=active, second=second, candidate=candidate, exclusive=exclusive, nu=nu)

table = get_exclusive(crosscoder, models, held_out, cfg)
nu_eps, nu_r = table["nu"].clamp(-0.6, 1.2)
fig_scaling = make_subplots()
for m, name in enumerate(cfg["model_name"]):
    chosen = table["candidate"] & (table["second"] == m)
    fig_scaling.add_scatter(
        x=nu_eps[chosen].numpy(), y=nu_r[chosen].numpy(), mode="markers", name=Path(name).name)
fig_scaling.add_shape(type="rect", x0=-0.6, x1=0.2, y0=-0.6, y1=0.5)
fig_scaling.update_layout(
    title=f"{table['candidate'].sum()} candidates, {table['exclusive'].sum()} exclusive: in the corner",
    xaxis_title="nu_eps: much where it was shrunk away (at the edge: beyond)",
    yaxis_title="nu_r: much where others stand in (at the edge: beyond)",
    xaxis_range=[-0.65, 1.25], yaxis_range=[-0.65, 1.25])
fig_scaling

# %% Model diff: which latents do both models have, and which only one?
# Relative norms alone prove nothing: a penalty on norms makes latents look exclusive which are not.
def get_diff_counts(crosscoder: CrossCoder, freqs: Float[Tensor, "d_sae"]) -> dict[str, float]:
    """How many active latents both models have, their mean decoder cosine, and how many only one has."""
    norms, cosines = get_relative_norms(crosscoder)
    active = freqs > 0
    shared = active & (0.3 < norms) & (norms < 0.7)
    return {
        "shared": int(shared.sum()),
        "cosine": round(cosines[shared].sum().item() / max(1, int(shared.sum())), 4),
        "only_0": int((active & (norms < 0.05)).sum()),
        "only_1": int((active & (norms > 0.95)).sum()),
    }

norms, cosines = get_relative_norms(crosscoder)
fig_diff = px.scatter(
    x=norms[freqs > 0], y=cosines[freqs > 0], marginal_x="histogram",
    labels={"x": "relative decoder norm", "y": "decoder cosine"},
    title=str(get_diff_counts(crosscoder, freqs)))
fig_diff

# %% Model diff: null controls
# Two more trainings. The first model against itself: nothing is exclusive. Against itself with its
# sequences shuffled, never on the same text: all is, but for what only depends on the position.
if cfg["model_batch_size"] == 1:
    raise ValueError("model_batch_size=1: one sequence cannot be shuffled; give 2 or more")
shuffled = SimpleNamespace(
    cfg=models[0].cfg,
    hook_dict=models[0].hook_dict,
    run_with_hooks=lambda tokens, **hooks: models[0].run_with_hooks(tokens.roll(1, 0), **hooks))
all_tokens = load_tokens(cfg, models)
results = {"the two": table}
for name, other in (("the first and itself", models[0]), ("the first, shuffled", shuffled)):
    trainer = Trainer(cfg | {"save_dir": tempfile.mkdtemp()}, [models[0], other], all_tokens)
    with torch.enable_grad():
        for _ in tqdm.trange(trainer.total_steps, desc=name):
            trainer.step()
    trainer.crosscoder.fit_threshold(trainer.buffer.peek())
    results[name] = get_exclusive(trainer.crosscoder, trainer.models, held_out, cfg)
print("models: active latents, candidates, exclusive ones")
for name, result in results.items():
    print(f"{name:<20}", *(int(result[key].sum()) for key in ("active", "candidate", "exclusive")))

# %% Model diff: the exclusive latents, with the tokens on which they are most active
chosen = table["exclusive"].nonzero().flatten()
chosen = chosen[freqs[chosen].argsort(descending=True)][:20]
acts = get_acts(chosen)
numbers = torch.stack([chosen, table["second"][chosen], freqs[chosen], *table["nu"][:, chosen]], dim=1)
print("latent, model, how often active, nu_eps, nu_r; most active on")
for i, row in enumerate(numbers.numpy()):
    print(row, [before[-12:] + token for _, before, token, _ in get_top(acts[..., i], 8)])

# %% Model diff: put what the second model's latents write into the first, and see what it says
# Each latent's contribution to the second model takes the place of that to the first. KL: from the
# second model's next-token distribution.
acts = crosscoder.encode(x)
x_A, x_B = x.chunk(2, dim=2)

def swap(latents):
    written = crosscoder.decode(acts * latents.to(acts)) - crosscoder.decode(acts * 0)
    to_A, to_B = written.chunk(2, dim=2)
    return x_A - to_A + to_B

def put(act, hook, new):
    return torch.cat([act[:, :1], new[:, 1:].to(act)], dim=1)

def get_log_probs(model, new):
    hooks = [(source.hook, partial(put, new=act)) for source, act in zip(sources, new.unbind(2))]
    return model.run_with_hooks(batch, fwd_hooks=hooks)[:, 1:-1].float().log_softmax(-1)

exclusive = table["exclusive"] & table["second"]
sizes = acts[:, 1:].float().mean((0, 1)).cpu() * dec_norms.chunk(2, dim=1)[1].sum(1)
others = torch.zeros_like(exclusive)
others[(sizes * ~exclusive).topk(int(exclusive.sum())).indices] = True
inputs = {
    "its own activations": x_A,
    "the second's exclusive latents": swap(exclusive),
    "as many of the largest others": swap(others),
    "all latents": swap(freqs >= 0),
    "the second's activations": x_B,
}
wanted = get_log_probs(models[1], x_B)
print(f"{'the first model, with':<32}      KL      CE")
for name, new in inputs.items():
    log_probs = get_log_probs(models[0], new)
    kl = (wanted.exp() * (wanted - log_probs)).sum(-1).mean()
    ce = F.nll_loss(log_probs.flatten(0, 1), batch[:, 2:].flatten())
    print(f"{name:<32} {kl:7.3f} {ce:7.3f}")
