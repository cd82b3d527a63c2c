"""Cells to copy into a notebook: looking at a trained crosscoder. Also runs from top to bottom.

Every cell needs only the first, those on model diffing also the one on latent scaling (and their pages
the one on latent pages), and ends in a figure, a small table or a file. In a script figures go unseen:
there write fig.write_html("fig.html").
"""
# %% Load a crosscoder, its models and its held-out text
import base64
import gzip
import json
import math
import tempfile
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import einops
import huggingface_hub
import jinja2
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
    DEVICES, MAY_CHANGE, PRESETS, USED_BY, explain, find_crosscoder, find_latest, get_tokenizer,
    load_models, load_tokens, make_cfg)
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

@cache
def show_token(token: int) -> str:
    """A token as text on one line."""
    return tokenizer.decode([token]).replace("\n", "⏎").replace("\t", "⇥")

def get_examples(acts: Float[Tensor, "seq pos"], tokens: Tensor, low: float, high: float, n: int) -> list:
    """Up to n examples of a latent's activations between these two, the largest, or where high is below
    the largest there is, random ones. Where the same six tokens lead to it, one stands for all."""
    places = ((acts > low) & (acts <= high)).nonzero()
    places = places[acts[tuple(places.T)].argsort(descending=True)]
    if high < acts.max():  # random ones
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
        places = places[order[:n].sort().values]
    examples = {}
    for seq, pos in places[:200].tolist():
        key = tuple(tokens[seq, max(0, pos - 5) : pos + 1].tolist())
        if key in examples:
            examples[key]["times"] += 1
        elif len(examples) < n:
            start = max(0, pos - 20)
            examples[key] = {
                "act": acts[seq, pos].item(), "most": acts.max().item(), "at": pos - start, "times": 1,
                "tokens": [show_token(token) for token in tokens[seq, start : pos + 11].tolist()],
                "acts": [round(act, 3) for act in acts[seq, start : pos + 11].tolist()]}
    return [*examples.values()]

def get_acts(crosscoder: CrossCoder, models: list, tokens: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """-> these latents' activations [latent, seq, pos], 0 at position 0, which is not trained on; the sums
    of all latents' [d_sae]. On the CPU."""
    acts = []
    sums = 0
    for part in tokens.split(4):
        every = crosscoder.encode(get_stacked_resids(models, part, cfg)).float()
        every[:, 0] = 0
        sums = sums + every.sum((0, 1)).cpu()
        acts.append(every[..., latents].movedim(2, 0).cpu())
    return torch.cat(acts, dim=1), sums

def get_drives(crosscoder: CrossCoder, batches, mean: Tensor) -> Float[Tensor, "d_sae n_layers"]:
    """What a latent reads: by how much its activation changes, over rows of raw activations, when one
    source is set to its mean [n_layers, d_model], and so tells nothing: RMS of the change / RMS of the
    activation. (Set to 0, a source would also take its share of the bias away.) After functional
    coherence, fmxcoders, May 2026. Takes 256 x d_sae x (n_layers + 4) floats."""
    y_mean = crosscoder.normalise(mean.float().to(crosscoder.b_dec.device))
    product = einops.einsum(y_mean - crosscoder.mean, crosscoder.W_enc, "l d_model, l d_model d_sae -> d_sae")
    base = product + crosscoder.b_enc
    changes = squares = 0
    for y in (crosscoder.normalise(rows.float()) for x in batches for rows in x.split(256)):
        # h is a sum over sources: each is computed once, and taken out of the whole in its turn.
        parts = torch.bmm((y - y_mean).movedim(1, 0), crosscoder.W_enc)  # [n_layers, row, d_sae]
        h = parts.sum(0) + base
        acts = crosscoder.activate(h)
        squares = squares + acts.square().sum(0)
        changes = changes + torch.stack(
            [(acts - crosscoder.activate(h - part)).square().sum(0) for part in parts], dim=1)
    return (changes.sqrt() / (squares.sqrt() + 1e-8)[:, None]).cpu()

def get_closest(first: CrossCoder, second: CrossCoder) -> Float[Tensor, "d_sae"]:
    """Of each latent of the first the largest cosine that its decoder vector has with one of the second."""
    directions = [F.normalize(each.W_dec.detach().flatten(1), dim=1) for each in (first, second)]
    return torch.cat([(part @ directions[1].T).amax(1) for part in directions[0].split(1024)]).cpu()

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

# %% What drives a latent, beside where it writes
# Coherence: the changes that the sources make, each over the largest, summed. 1 is a latent that one
# source drives, len(names) one that all drive alike. Span: the same of its decoder norms.
drives = get_drives(crosscoder, iter_rows(models, held_out, cfg), stats["mean"])  # [d_sae, n_layers]
alive = (freqs > 0).nonzero().flatten()
coherence = (drives.sum(1) / drives.amax(1))[alive]
spans = shares.sum(1)[alive]
order = alive[(shares[alive] @ torch.arange(0.0, len(names)) / shares[alive].sum(1)).argsort()]
titles = ["drives: change / largest", "writes: decoder norm / largest", "how many sources"]
fig_drives = make_subplots(cols=3, subplot_titles=titles)
for column, z in enumerate([drives / drives.amax(1, keepdim=True), shares], start=1):
    fig_drives.add_heatmap(x=names, z=z[order].numpy(), coloraxis="coloraxis", row=1, col=column)
    fig_drives.update_yaxes(autorange="reversed", title="latents, by where they write", row=1, col=column)
for name, values in (("coherence: driven by", coherence), ("span: written to", spans)):
    fig_drives.add_histogram(x=values, name=name, xbins={"size": 0.1}, row=1, col=3)
fig_drives.update_layout(
    coloraxis={"colorscale": "Viridis"}, legend={"orientation": "h", "x": 0.7}, barmode="overlay",
    title=f"{coherence.mean():.2f} sources drive a latent; it writes to {spans.mean():.2f}")
fig_drives.update_traces(opacity=0.6, selector={"type": "histogram"})
fig_drives

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
for each in pair:
    acts = each.encode(rows)
    scores = acts * each.get_decoder_norms()
    lowest = scores.flatten().topk(n_active).values[-1]
    errors = (rows - each.decode(acts * (scores >= lowest))).pow(2)
    fvu = errors.sum((0, 2)) / (rows - rows.mean(0)).pow(2).sum((0, 2))
    print(fvu.cpu().numpy())
same = (get_closest(pair[0], pair[-1]) > 0.9).float().mean()
print(f"{same:.1%} of the first's latents have a cosine above 0.9 with one of the last")

# %% Several crosscoders off one harvest: here, whether two seeds find the same latents
def train_together(cfgs: list[dict], models: list, all_tokens: Tensor) -> list[Trainer]:
    """Trains a crosscoder for each cfg, all on the batches that the first one's buffer serves, and saves
    them. The cfgs may differ in all that is not about models, text, batch_size and buffer."""
    trainers = [Trainer(cfgs[0], models, all_tokens)]
    trainers += [Trainer(cfg, models, all_tokens, trainers[0].buffer) for cfg in cfgs[1:]]
    with torch.enable_grad():
        for _ in tqdm.trange(trainers[0].total_steps, desc="training together", unit="step"):
            x = trainers[0].buffer.next()
            for trainer in trainers:
                trainer.step(x)
    for trainer in trainers:
        trainer.save()
    return trainers

short = cfg | {"num_tokens": 100 * cfg["batch_size"], "save_dir": tempfile.mkdtemp()}  # for a look
pair = train_together([short, short | {"seed": cfg["seed"] + 1}], models, load_tokens(cfg, models))
same = (get_closest(pair[0].crosscoder, pair[1].crosscoder) > 0.9).float().mean()
print(f"after 100 steps {same:.1%} of a seed's latents have a cosine above 0.9 with one of another's")

# %% Latent pages: one file for a browser, a table of all latents and a page for each that is chosen
PAGES = r"""{# Escaped, but for what these macros return: no text from a model or dataset can be markup. #}
{% macro bar(v, most, color) -%}
<i style="width: {{ (90 * v / most) | round }}px; background: var(--{{ color }})"></i> {{ "%.3g" % v }}
{%- endmacro %}
{% macro columns(values, labels, width, height) -%}
{%- set scale = height / [values | max, 1e-9] | max %}
{%- for v in values -%}
<i title="{{ labels[loop.index0] }}: {{ "%.3g" % v }}" style="width: {{ width }}px;
  height: {{ (scale * v) | round(1) }}px"></i>
{%- endfor %}
{%- endmacro %}
{% macro link(latent, pages) -%}
{% if latent in pages %}<a href="#latent={{ latent }}">{{ latent }}</a>{% else %}{{ latent }}{% endif %}
{%- endmacro %}
{% macro line(latent, tokens, values, norms, names, pages) -%}
<tr><td>{{ link(latent, pages) }}<td>{{ tokens }}
{%- for v in values %}<td>{{ "%.3g" % v }}{% endfor %}<td>{{ columns(norms, names, 4, 16) }}
{%- endmacro %}
{% macro example(e) -%}
<div class="example"><span class="dim">{{ "%.3g" % e.act }}{{ " ×%d" % e.times if e.times > 1 }} </span>
{%- for token in e.tokens %}{% set act = e.acts[loop.index0] %}
{%- if act %}<span title="{{ act }}" class="{{ "peak" if loop.index0 == e.at }}"
  style="background: rgba(240, 140, 0, {{ (0.75 * act / e.most) | round(2) }})">{{ token }}</span>
{%- else %}{{ token }}{% endif %}
{%- endfor %}</div>
{% endmacro %}
{% macro page(p) %}
<a href="#">all latents</a> &ensp; <a id="before">←</a> &ensp; <a id="after">→</a>
<h1>latent {{ p.latent }}</h1>
<p>{% for name, v in p.about.items() %}{{ name }} {{ "%.3g" % v }}{{ ", " if not loop.last }}{% endfor %}</p>
<div class="row"><div class="wide"><table>
<tr><th>source<th>writes: norm<th>driven by: change without it<th colspan="99">cosine with each, in this order
{% for name in p.names %}
{% set i = loop.index0 %}
<tr><td>{{ name }}<td>{{ bar(p.norms[i], [p.norms | max, 1e-9] | max, "writes") }}
<td>{{ bar(p.drives[i], [p.drives | max, 1e-9] | max, "drives") }}
{% for v in p.cosines[i] %}
<td style="background: rgba({{ "220, 90, 50" if v < 0 else "60, 90, 200" }}, {{ v | abs / 2 }})">
{{- "%.2f" % v }}
{% endfor %}{% endfor %}</table></div>
<div><h2>activations: {{ p.percentiles }}</h2>{{ columns(p.counts, p.edges, 8, 80) }}</div></div>
{% for title, examples in p.bands %}<h2>{{ title }}</h2>
{% for e in examples %}{{ example(e) }}{% endfor %}
{% endfor %}
{% for title, words in (("promotes, through the final norm", p.promoted), ("suppresses", p.suppressed)) %}
<h2>{{ title }}</h2>{% for tokens in words %}
<div><span class="dim">{{ p.names[loop.index0] }}</span> {{ tokens | join(" · ") }}</div>{% endfor %}
{% endfor %}<div class="row">
{% for title, near in (("decoder cosine", p.near), ("tokens in common (Jaccard)", p.together)) %}
<div class="near"><h2>nearest by {{ title }}</h2>
{% for latent, v in near %}<div>{{ link(latent, p.pages) }} <span class="dim">{{ "%.3g" % v }}</span></div>
{% endfor %}</div>{% endfor %}</div>
{% endmacro %}
{% macro document(title, heads, n_layers, packed) -%}
<!doctype html><html lang="en"><meta charset="utf-8"><title>Latents</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --ink: light-dark(#222, #ddd); --dim: light-dark(#707070, #999);
  --writes: light-dark(#3b528b, #8fa8e0); --drives: light-dark(#d1603d, #f09070) }
main { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 1rem auto; max-width: 76rem }
td, th { padding: .1rem .5rem; text-align: left; white-space: nowrap } #index th { cursor: pointer }
th, .dim { color: var(--dim); font-weight: normal } th::after { content: attr(data-mark) }
h2 { font-size: 1rem; margin: 1rem 0 .2rem } table { border-collapse: collapse } a { color: var(--writes) }
i { display: inline-block; height: 10px; background: var(--writes); margin-right: 1px }
.row { display: flex; flex-wrap: wrap; gap: 0 2rem } input { font: 16px system-ui; width: 95% }
.wide { overflow-x: auto } svg { fill: var(--writes) }
@media (max-width: 50rem) { .wide { box-shadow: inset -1rem 0 1rem -1rem var(--dim) } }  /* it scrolls */
.example { margin: .2rem 0; overflow-wrap: anywhere; white-space: pre-wrap } .peak { outline: 1px solid }
</style>
<main id="index"><h1>{{ title }}</h1>
<input id="search" aria-label="search" placeholder="/ to search: a latent's number, or a token">
<p class="dim">density: on how many of the tokens it is active; mean: its activation there; span, norms: to
how many sources, and how strongly to each, it writes; coherence: how many drive it; tokens: on which it is
most active. {% if "nu_eps" in heads %}Relative norm: 0 writes to the first model only, 1 to the second;
exclusive: really in one alone, as the other has little of it in what is left over (nu_eps) and reconstructed
(nu_r).{% endif %}</p>
<h2>span, 1 to {{ n_layers }} upwards, against density, 0.00001 to 1 to the right (log)</h2>
<svg width="340" height="200"><path d="M1 0V199H340" fill="none" stroke="gray"/>
<g id="dots" data-most="{{ [n_layers, 2] | max }}" fill-opacity=".4"></g></svg>
<h2 id="count"></h2><div class="wide"><table><thead><tr>{% for head in heads %}<th>{{ head }}{% endfor %}
</thead><tbody id="lines"></tbody></table></div><button id="more">more</button></main><main id="page"></main>
<script>
const get = id => document.getElementById(id), heads = [...document.querySelectorAll("th")];
let rows = [], order = [], column = 2, sign = -1, most = 200, place = 0;
async function unpack(id) {
  const bytes = Uint8Array.from(atob(get(id).textContent), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}
function list() {
  const wanted = get("search").value.toLowerCase();
  const matches = ([latent, tokens]) => wanted === String(latent) || tokens.toLowerCase().includes(wanted);
  const found = rows.filter(r => matches(r.values));
  const compare = (a, b) => (a > b) - (a < b);
  found.sort((a, b) => sign * compare(a.values[column], b.values[column]));
  order = found.map(r => r.values[0]).filter(latent => get("l" + latent));  // of those that have a page
  get("dots").innerHTML = found.map(({values: [latent, , density, , span]}) => !density ? "" : `
    <a href="#latent=${latent}" tabindex="-1"><circle r="3" cx="${333 + 66 * Math.log10(density)}"
    cy="${195 - 190 * (span - 1) / (get("dots").dataset.most - 1)}"/></a>`).join("");
  get("lines").innerHTML = found.slice(0, most).map(r => r.line).join("");
  get("count").textContent = `${found.length} latents, ${order.length} with a page: their number is a link`;
  get("more").hidden = found.length <= most;
  heads.forEach((head, i) => head.dataset.mark = i !== column ? "" : sign > 0 ? " ▲" : " ▼");
}
const latent = () => Number(location.hash.split("latent=")[1] ?? -1);
const turn = step => "#latent=" + (order.at((order.indexOf(latent()) + step) % order.length) ?? latent());
async function draw() {
  const has = get("l" + latent()), home = latent() < 0;
  const none = '<a href="#">all latents</a><h1>This latent has no page: it is not one of those chosen</h1>';
  const page = has ? await unpack(has.id) : home ? "" : none;
  if (has !== get("l" + latent())) return;  // another was asked for in the meantime
  if (!get("index").hidden) place = scrollY;  // to come back to
  get("index").hidden = !home;
  get("page").innerHTML = page;
  if (home) get("search").focus({preventScroll: true});
  if (has) [get("before").href, get("after").href] = [turn(-1), turn(1)];
  scrollTo(0, home ? place : 0);
}
onkeydown = event => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;  // Alt and an arrow: the browser's history
  const isSearch = event.target.id === "search", step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  const number = Number(event.target.value || NaN), first = order.includes(number) ? number : order[0];
  if (isSearch && event.key === "Enter" && order.length) location.hash = "latent=" + first;
  if (isSearch && event.key === "Escape") event.target.blur();
  if (!isSearch && step && latent() >= 0) location.hash = turn(step);
  if (isSearch || event.key !== "/") return;
  event.preventDefault();
  location.hash = "";
  get("search").focus();  // where the table is shown already
};
onhashchange = draw;
onload = async () => { rows = JSON.parse(await unpack("rows")); list(); draw(); };
get("search").oninput = list;
get("more").onclick = () => { most *= 2; list(); };
heads.forEach((head, i) => head.onclick = () => { sign = column === i ? -sign : -1; column = i; list(); });
</script>
{% for key, text in packed.items() %}<script type="text/plain" id="{{ key }}">{{ text }}</script>
{% endfor %}
{% endmacro %}"""

def pack(text: str) -> str:
    """Text, compressed, as letters that mean nothing to a browser."""
    return base64.b64encode(gzip.compress(text.encode())).decode()

def get_words(vectors: Float[Tensor, "n_layers d_model"], models: list) -> tuple[list, list]:
    """-> of each source the tokens that a latent promotes; that it suppresses: its decoder vector through
    the final norm, but for the scale, and the unembedding. None where it writes nothing, or elsewhere than
    to the residual stream."""
    words = ([], [])
    if not cfg["site"].startswith(("resid", "mlp_out", "attn_out")):
        return words
    for rows, model in zip(vectors.chunk(len(models)), models):  # [sources of this model, d_model]
        if model.cfg.normalization_type == "LN":
            rows = rows - rows.mean(1, keepdim=True)
        # All at once, and in the model's type: W_U is large, and would be read and converted for each.
        logits = ((rows * model.ln_final.weight).to(model.W_U) @ model.W_U).float()
        for each, sign in zip(words, (1, -1)):
            for row, top in zip(rows, (sign * logits).topk(8).indices.tolist()):
                each.append([show_token(token) for token in top] if row.any() else [])
    return words

def get_nearest(similarity: Float[Tensor, "n"], latents: Tensor, latent: int) -> list[tuple[int, float]]:
    """The eight of these latents that are most similar to this one, and how similar they are."""
    top = similarity.topk(min(9, len(similarity)))
    return [(i, v) for i, v in zip(latents[top.indices].tolist(), top.values.tolist()) if i != latent][:8]

def get_page(crosscoder: CrossCoder, models: list, tokens: Tensor, latent: int, acts: Tensor) -> dict:
    """What a latent's page shows; acts [seq, pos] are its activations on tokens."""
    most = acts.max().item()
    bands = [("largest activations", get_examples(acts, tokens, 0, most, 12))]
    for low, high in ((0.5, 0.75), (0.25, 0.5), (0, 0.25)):
        examples = get_examples(acts, tokens, low * most, high * most, 4)
        if examples:
            bands.append((f"from {low:.0%} to {high:.0%} of the largest", examples))
    positive = acts[acts > 0].numpy()
    counts, edges = np.histogram(positive, bins=30)
    percentiles = np.percentile(np.append(positive, 0), [50, 90, 99])
    vectors = crosscoder.W_dec[latent]
    unit = F.normalize(vectors, dim=1)
    promoted, suppressed = get_words(vectors, models)
    return {
        "latent": latent, "bands": bands, "counts": counts.tolist(),
        "edges": [f"from {edge:.3g}" for edge in edges[:-1]], "cosines": (unit @ unit.T).tolist(),
        "percentiles": "half to {:.3g}, 90% to {:.3g}, 99% to {:.3g}".format(*percentiles),
        "promoted": promoted, "suppressed": suppressed}

def write_pages(crosscoder, models: list, tokens: Tensor, latents, path: str, more: dict = {}) -> None:
    """Writes one HTML file, which needs no network: a table of all latents, and a page for each of these.
    more: further columns by name, [d_sae] each. Holds the activations of these latents on all tokens."""
    latents = torch.as_tensor(latents).cpu().unique()
    acts, sums = get_acts(crosscoder, models, tokens, latents)
    stats = get_stats(crosscoder, models, tokens, cfg)
    drives = get_drives(crosscoder, iter_rows(models, tokens, cfg), stats["mean"])
    norms = crosscoder.W_dec.norm(dim=-1).cpu()
    columns = {
        "density": stats["freqs"], "mean": sums / (stats["freqs"] * tokens[:, 1:].numel()).clamp(min=1),
        "span": norms.sum(1) / norms.amax(1).clamp(min=1e-30),
        "coherence": drives.sum(1) / drives.amax(1).clamp(min=1e-30), **more}
    table = torch.stack([column.double() for column in columns.values()], dim=1).nan_to_num().tolist()
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(PAGES).module
    fires = (acts.flatten(1) > 0).float()
    common = fires @ fires.T  # [latent, latent]: on how many tokens both are active
    jaccard = common / (common.diag()[:, None] + common.diag() - common).clamp(min=1)
    unit = F.normalize(crosscoder.W_dec.flatten(1), dim=1)
    pages = dict.fromkeys(latents.tolist(), "")  # of each the tokens on which it is most active
    packed = {}
    for j, latent in enumerate(tqdm.tqdm(pages, desc="latent pages")):
        page = get_page(crosscoder, models, tokens, latent, acts[j])
        page |= {
            "about": dict(zip(columns, table[latent])), "names": names, "pages": pages,
            "norms": norms[latent].tolist(), "drives": drives[latent].tolist(),
            "near": get_nearest((unit @ unit[latent]).cpu(), torch.arange(len(unit)), latent),
            "together": get_nearest(jaccard[j], latents, latent)}
        packed[f"l{latent}"] = pack(template.page(page))
        top = [example["tokens"][example["at"]] for example in page["bands"][0][1]]
        pages[latent] = " ".join(dict.fromkeys(top[:8]))
    rows = []
    for latent, values in enumerate(table):
        shown = (latent, pages.get(latent, ""))
        rows.append({
            "values": [*shown, *values, norms[latent].sum().item()],
            "line": template.line(*shown, values, norms[latent].tolist(), names, pages)})
    packed["rows"] = pack(json.dumps(rows))
    title = f"{len(rows):,} latents of {', '.join(Path(name).name for name in cfg['model_name'])}"
    html = template.document(title, ["latent", "tokens", *columns, "norms"], len(names), packed)
    Path(path).write_text(html, encoding="utf-8")

chosen = (freqs > 0).nonzero().flatten()[:2048]
write_pages(crosscoder, models, held_out, chosen, "latents.html")
print(f"latents.html, to open in a browser: {len(freqs)} latents, {len(chosen)} with a page")

# %% Which latents are active on a text of your own, and how strongly
def find_latents(text: str, n: int = 4) -> list[tuple[str, list[tuple[int, float]]]]:
    """For each token of a text the latents with the largest scores, and their activations."""
    ids = [int(held_out[0, 0]), *tokenizer(text, add_special_tokens=False).input_ids]  # after BOS
    acts = crosscoder.encode(get_stacked_resids(models, torch.tensor([ids]), cfg))[0, 1:].float()
    best = (acts * crosscoder.get_decoder_norms()).topk(n).indices.tolist()
    tops = [[(i, round(row[i].item(), 2)) for i in top if row[i] > 0] for row, top in zip(acts, best)]
    return [(tokenizer.decode([token]), top) for token, top in zip(ids[1:], tops)]

for token, top in find_latents("And the king said unto the people, Go up"):
    print(f"{token:>12}  " + ", ".join(f"{latent}: {act}" for latent, act in top))

# %% The latents most specific to a source: by its share of what they write, of what drives them
drives = get_drives(crosscoder, iter_rows(models, held_out, cfg), stats["mean"])
for kind, sizes in (("write", dec_norms), ("are driven", drives)):
    parts = sizes / sizes.sum(1, keepdim=True).clamp(min=1e-30) * (freqs > 0)[:, None]
    for name, part in zip(names, parts.T):
        top = [f"{latent} ({part[latent]:.0%})" for latent in part.topk(5).indices.tolist()]
        print(f"{kind} most by {name}: {', '.join(top)}")

# %% For automatic interpretation: files that EleutherAI's delphi reads, and a JSONL for anyone
def write_examples(crosscoder, models: list, tokens: Tensor, latents, folder: str | Path) -> None:
    """latents/crosscoder, as delphi caches them: locations [n, 3] (sequence, position, latent), activations
    [n] and tokens in one file, and config.json. examples.jsonl: of each latent the largest activations and
    random ones, each with the tokens around it and their activations."""
    latents = torch.as_tensor(latents).cpu()
    acts = get_acts(crosscoder, models, tokens, latents)[0].movedim(0, 2)  # [seq, pos, latent]
    places = acts.nonzero()
    values = acts[tuple(places.T)]
    places[:, 2] = latents[places[:, 2]]
    module = Path(folder) / "latents" / "crosscoder"
    module.mkdir(parents=True, exist_ok=True)
    cache = {"locations": places.int().contiguous(), "activations": values.half(), "tokens": tokens.int()}
    safetensors.torch.save_file(cache, module / f"0_{len(crosscoder.W_dec) - 1}.safetensors")
    about = {"model_name": cfg["model_name"][0], "ctx_len": cfg["seq_len"], "n_tokens": tokens.numel()}
    (module / "config.json").write_text(json.dumps(about))
    with open(Path(folder) / "examples.jsonl", "w") as file:
        for latent, act in zip(latents.tolist(), acts.unbind(2)):
            most = act.max().item()
            top = get_examples(act, tokens, 0, most, 20)
            rest = get_examples(act, tokens, 0, 0.99 * most, 20)
            file.write(json.dumps({"latent": latent, "top": top, "random": rest}) + "\n")

write_examples(crosscoder, models, held_out, (freqs > 0).nonzero().flatten()[:100], "interpret")
print("interpret/latents for delphi, interpret/examples.jsonl for others: 100 latents")

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
    """Plain weights for raw activations: h = x . W_enc + b_enc, acts = h * (h > thresholds), of these with
    topk only the k largest acts * decoder_norms, with batchtopk 8 k, x_hat = acts . W_dec + b_dec."""
    factor = crosscoder.norm_factor[:, None]  # [n_layers, 1]
    product = einops.einsum(crosscoder.mean, crosscoder.W_enc, "l d_model, l d_model d_sae -> d_sae")
    return {
        "W_enc": crosscoder.W_enc / factor[..., None],
        "W_dec": crosscoder.W_dec * factor,
        "b_enc": crosscoder.b_enc - product,
        "b_dec": crosscoder.b_dec * factor,
        "thresholds": crosscoder.get_thresholds(),
        "decoder_norms": crosscoder.get_decoder_norms(),
    }

weights = fold(crosscoder)
safetensors.torch.save_file(weights, path.with_name(f"folded_{path.name}.safetensors"))
print(f"folded_{path.name}.safetensors:", *(f"{key} {list(value.shape)}" for key, value in weights.items()))

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
    return CrossCoder.load(find_crosscoder("repo_id", repo_id, revision), device)

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
    norms, cosines = get_relative_norms(crosscoder)[:, freqs > 0]
    shared = (0.3 < norms) & (norms < 0.7)
    return {
        "shared": int(shared.sum()),
        "cosine": round(cosines[shared].sum().item() / max(1, int(shared.sum())), 4),
        "only_0": int((norms < 0.05).sum()), "only_1": int((norms > 0.95).sum())}

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

# %% Model diff: pages of the exclusive latents, and of 200 others
nu_eps, nu_r = table["nu"]
more = {
    "exclusive": table["exclusive"].int(), "relative norm": get_relative_norms(crosscoder)[0],
    "nu_eps": nu_eps, "nu_r": nu_r}
others = (table["active"] & ~table["exclusive"]).nonzero().flatten()[:200]
chosen = torch.cat([table["exclusive"].nonzero().flatten(), others])
write_pages(crosscoder, models, held_out, chosen, "diff.html", more)
print(f"diff.html: {table['exclusive'].sum()} latents are exclusive; click on that column")

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
