"""Which activation to choose: trains each at four sparsities on equal tokens, and draws what comes out.

  python tests/frontier.py                            on tests/tiny, three seeds: 48 runs of about a minute
  python tests/frontier.py --seeds=1 --num_tokens=2e5 a quick look
  python tests/frontier.py --model_name=... --tokens=... --seq_len=...   on another model; train.py's keys

Writes frontier.html and frontier.jsonl, a line a run, into --out; runs that are in it are not made again.
"""
import argparse
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
from utils import Trainer, get_stats, iter_rows

SPARSITIES = {  # chosen so that the L0 overlap
    "relu": ("l1_coeff", (1, 1.5, 2.5, 4)),
    "topk": ("k", (12, 20, 32, 48)),
    "batchtopk": ("k", (12, 20, 32, 48)),
    "jumprelu": ("l0_coeff", (0.1, 0.15, 0.25, 0.4)),
}
COLOURS = {"relu": "#777777", "topk": "#3b528b", "batchtopk": "#21918c", "jumprelu": "#d1603d"}
COLUMNS = {
    "fvu/all": "FVU", "ce/delta_all": "CE delta (nats)", "sparsity/dead": "dead share",
    "span": "layers a latent spans"}


get_drives = functions_of_scratch()["get_drives"]


def train(cfg: dict, models: list, all_tokens) -> dict:
    """One run. -> its last evaluation, and over how many sources a latent spans: where its decoder norm is
    at least a tenth of its largest, mean over latents alive; and how many drive it, its coherence"""
    trainer = Trainer(cfg, models, all_tokens)
    start = trainer.evaluate()["fvu/all"]
    metrics = trainer.train()
    norms = trainer.crosscoder.W_dec.detach().norm(dim=-1)  # [d_sae, n_layers]
    spans = (norms >= 0.1 * norms.amax(1, keepdim=True)).sum(1).float()
    alive = trainer.tokens_since_fired < cfg["dead_after"]
    mean = get_stats(trainer.crosscoder, models, trainer.eval_tokens, cfg)["mean"]
    with torch.no_grad():
        drives = get_drives(trainer.crosscoder, iter_rows(models, trainer.eval_tokens, cfg), mean)
    coherence = (drives.sum(1) / drives.amax(1))[drives.amax(1) > 0].mean().item()
    return {**metrics, "span": spans[alive].mean().item(), "coherence": coherence, "fvu_at_step_0": start}


def table(rows: list[dict]) -> str:
    """A line for each activation and sparsity: means over the seeds, and for FVU the largest distance."""
    lines = [
        "| activation | sparsity | L0 | FVU | CE delta | dead | layers spanned | coherence | FVU at step 0 |",
        "|" + "---|" * 9]
    for activation, (key, values) in SPARSITIES.items():
        for value in values:
            runs = [row for row in rows if (row["activation"], row["value"]) == (activation, value)]
            if not runs:
                continue
            mean = {}
            for name in (*COLUMNS, "sparsity/l0", "coherence", "fvu_at_step_0"):
                mean[name] = np.mean([row[name] for row in runs])
            fvu = f"{mean['fvu/all']:.4f}"
            if len(runs) > 1:
                spread = max(abs(row["fvu/all"] - mean["fvu/all"]) for row in runs)
                fvu += f" ± {spread:.4f}"
            lines.append(
                f"| {activation} | {key}={value} | {mean['sparsity/l0']:.1f} | {fvu} | "
                f"{mean['ce/delta_all']:+.3f} | {mean['sparsity/dead']:.1%} | {mean['span']:.2f} | "
                f"{mean['coherence']:.2f} | {mean['fvu_at_step_0']:.2f} |")
    return "\n".join(lines)


def draw(rows: list[dict]) -> go.Figure:
    """What each activation comes to, against L0: a point a run, a line through the means."""
    figure = make_subplots(cols=len(COLUMNS), subplot_titles=[*COLUMNS.values()], horizontal_spacing=0.05)
    for column, name in enumerate(COLUMNS, start=1):
        for activation, colour in COLOURS.items():
            points = []  # of all runs: L0, and what is drawn
            means = []
            for value in SPARSITIES[activation][1]:
                runs = [row for row in rows if (row["activation"], row["value"]) == (activation, value)]
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
    models = None
    for seed in range(args.seeds):
        for activation, (key, values) in SPARSITIES.items():
            for value in values:
                if (seed, activation, value) in made or activation not in args.activations.split(","):
                    continue
                choice = {"seed": seed, "activation": activation, key: value}
                cfg = make_cfg(**{**overrides, **choice, "save_dir": str(args.out / "runs"), "keep": 1})
                if models is None:
                    models = load_models(cfg)
                    all_tokens = load_tokens(cfg, models)
                metrics = train(cfg, models, all_tokens)
                rows.append({"seed": seed, "activation": activation, "value": value, **metrics})
                with open(file, "a") as log:
                    log.write(json.dumps(rows[-1]) + "\n")
                draw(rows).write_html(args.out / "frontier.html")
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
