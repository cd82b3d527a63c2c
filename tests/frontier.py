"""Which activation to choose: trains each at four sparsities on equal tokens, and draws what comes out.

  python tests/frontier.py                            on tests/tiny, three seeds of 16 runs, off one harvest each
  python tests/frontier.py --seeds=1 --num_tokens=2e5 a quick look
  python tests/frontier.py --model_name=... --tokens=... --seq_len=...   on another model; train.py's keys

Writes frontier.html, frontier.jsonl, a line a run, and the runs into --out; what is in it is not made again.
"""
import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

sys.path.insert(0, str(Path(__file__).parent.parent))
from planted import functions_of_scratch
from train import load_models, load_tokens, make_cfg, parse_overrides
from utils import CrossCoder, Trainer, get_stats, iter_rows

SPARSITIES = {  # chosen so that the L0 overlap
    "relu": ("l1_coeff", (1, 1.5, 2.5, 4)),
    "topk": ("k", (12, 20, 32, 48)),
    "batchtopk": ("k", (12, 20, 32, 48)),
    "jumprelu": ("l0_coeff", (0.1, 0.15, 0.25, 0.4)),
}
COLOURS = {"relu": "#777777", "topk": "#3b528b", "batchtopk": "#21918c", "jumprelu": "#d1603d"}
COLUMNS = {
    "fvu/all": "FVU", "ce/delta_all": "CE delta (nats)", "sparsity/dead": "dead share",
    "stable": "share found by another seed"}

SCRATCH = functions_of_scratch()


def look(trainer: Trainer) -> dict:
    """What a run has come to: its evaluation, over how many sources a latent spans (where its decoder norm is
    at least a tenth of its largest, mean over latents alive), and how many drive it, its coherence"""
    metrics = trainer.evaluate()
    norms = trainer.crosscoder.W_dec.detach().norm(dim=-1)  # [d_sae, n_layers]
    spans = (norms >= 0.1 * norms.amax(1, keepdim=True)).sum(1).float()
    alive = trainer.tokens_since_fired < trainer.cfg["dead_after"]
    of = (trainer.models, trainer.eval_tokens, trainer.cfg)
    with torch.no_grad():
        drives = SCRATCH["get_drives"](
            trainer.crosscoder, iter_rows(*of), get_stats(trainer.crosscoder, *of)["mean"])
    coherence = (drives.sum(1) / drives.amax(1))[drives.amax(1) > 0].mean().item()
    return {**metrics, "span": spans[alive].mean().item(), "coherence": coherence}


def get_stability(runs: list[dict]) -> float:
    """The share of a seed's latents that have a decoder cosine above 0.9 with one of another seed, mean over
    all pairs of seeds; nan of one seed"""
    crosscoders = [CrossCoder.load(run["folder"]) for run in runs]
    shares = []
    for first, second in itertools.permutations(crosscoders, 2):
        shares.append((SCRATCH["get_closest"](first, second) > 0.9).float().mean().item())
    return float(np.mean(shares or [np.nan]))


def get_runs(rows: list[dict], activation: str, value: float) -> list[dict]:
    """The rows of this activation and sparsity, one a seed."""
    return [row for row in rows if (row["activation"], row["value"]) == (activation, value)]


def table(rows: list[dict]) -> str:
    """A line for each activation and sparsity: means over the seeds, and for FVU the largest distance."""
    lines = [
        "| activation | sparsity | L0 | FVU | CE delta | dead | layers spanned | coherence | stable |",
        "|" + "---|" * 9]
    for activation, (key, values) in SPARSITIES.items():
        for value in values:
            runs = get_runs(rows, activation, value)
            if not runs:
                continue
            mean = {}
            for name in (*COLUMNS, "sparsity/l0", "span", "coherence"):
                mean[name] = np.mean([row[name] for row in runs])
            fvu = f"{mean['fvu/all']:.4f}"
            if len(runs) > 1:
                spread = max(abs(row["fvu/all"] - mean["fvu/all"]) for row in runs)
                fvu += f" ± {spread:.4f}"
            lines.append(
                f"| {activation} | {key}={value} | {mean['sparsity/l0']:.1f} | {fvu} | "
                f"{mean['ce/delta_all']:+.3f} | {mean['sparsity/dead']:.1%} | {mean['span']:.2f} | "
                f"{mean['coherence']:.2f} | {mean['stable']:.1%} |")
    return "\n".join(lines)


def draw(rows: list[dict]) -> go.Figure:
    """What each activation comes to, against L0: a point a run, a line through the means."""
    figure = make_subplots(cols=len(COLUMNS), subplot_titles=[*COLUMNS.values()], horizontal_spacing=0.05)
    for column, name in enumerate(COLUMNS, start=1):
        for activation, colour in COLOURS.items():
            points = []  # of all runs: L0, and what is drawn
            means = []
            for value in SPARSITIES[activation][1]:
                runs = get_runs(rows, activation, value)
                if runs:
                    points += [(row["sparsity/l0"], row[name]) for row in runs]
                    means.append(np.mean(points[-len(runs) :], axis=0).tolist())
            for shown, mode in ((sorted(means), "lines"), (points, "markers")):
                figure.add_scatter(
                    x=[l0 for l0, _ in shown], y=[y for _, y in shown], mode=mode, name=activation,
                    line_color=colour, row=1, col=column, showlegend=column == 1 and mode == "lines")
    figure.update_xaxes(title="L0: latents active on a token")
    figure.update_yaxes(rangemode="tozero")
    return figure.update_layout(
        width=1400, height=360, template="plotly_white", margin=dict(t=40, b=50, l=40, r=20))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--activations", default=",".join(SPARSITIES))
    parser.add_argument("--out", type=Path, default=Path("frontier"))
    args, others = parser.parse_known_args(argv)
    overrides = {"preset": "tiny", "wandb_mode": "disabled", "eval_every": 10**9, **parse_overrides(others)}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "frontier.jsonl"
    rows = [json.loads(line) for line in open(file)] if file.exists() else []
    made = {(row["seed"], row["activation"], row["value"]) for row in rows}
    for seed in range(args.seeds):
        choices = []
        for activation, (key, values) in SPARSITIES.items():
            for value in values:
                if (seed, activation, value) not in made and activation in args.activations.split(","):
                    choices.append({"seed": seed, "activation": activation, key: value})
        if not choices:
            continue
        paths = {"save_dir": str(args.out / "runs"), "keep": 1}
        cfgs = [make_cfg(**{**overrides, **choice, **paths}) for choice in choices]
        models = load_models(cfgs[0])
        all_tokens = load_tokens(cfgs[0], models)
        for trainer in SCRATCH["train_together"](cfgs, models, all_tokens):
            activation = trainer.cfg["activation"]
            row = {"seed": seed, "activation": activation, "value": trainer.cfg[SPARSITIES[activation][0]]}
            rows.append({**row, **look(trainer), "folder": str(trainer.run_dir)})
            with open(file, "a") as log:
                log.write(json.dumps(rows[-1]) + "\n")
    for activation, value in {(row["activation"], row["value"]) for row in rows}:
        runs = get_runs(rows, activation, value)
        stable = get_stability(runs)
        for row in runs:
            row["stable"] = stable
    draw(rows).write_html(args.out / "frontier.html")
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
