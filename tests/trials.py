"""What training could do otherwise: a row for each change, the mean over the seeds, one harvest a seed for all.

  python tests/trials.py l0                           one of TRIALS, on tests/tiny, three seeds
  python tests/trials.py l0 --seeds=1 --num_tokens=3e5 --model_name=...     train.py's keys

Prints a table, which stands in tests/RESULTS.md, and adds a line a run to trials.jsonl. A trial of something that
is not in the code changes the trainer: so it can be tried again, though it was not worth a key.
"""
import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import utils
from frontier import get_stability, look
from train import load_models, load_tokens, make_cfg, parse_overrides
from utils import Trainer, get_jump_losses


# ---- Changes to a trainer that are not in the code ------------------------------------------------
def mask_sources(trainer: Trainer, share: float) -> None:
    """The encoder misses a source, in this share of rows and sources, in training only [fmxcoders, May 2026]."""
    whole = trainer.crosscoder.get_pre_acts
    generator = torch.Generator().manual_seed(0)

    def get_pre_acts(y):
        if torch.is_grad_enabled():  # neither in evaluation nor where thresholds are fitted
            is_seen = torch.rand(y.shape[:-1], generator=generator) >= share
            y = torch.where(is_seen[..., None], y, mean)  # less the mean, which the encoder reads, it is 0
        return whole(y)

    mean = trainer.crosscoder.mean
    trainer.crosscoder.get_pre_acts = get_pre_acts


def warm_up(trainer: Trainer, share: float) -> None:
    """The learning rate rises over this share of the steps, not 5%."""
    def get_lr():
        step, total = trainer.step_counter, trainer.total_steps
        return trainer.cfg["lr"] * min(1.0, (step + 1) / max(share * total, 1e-9), (total - step) / (0.2 * total))

    trainer.get_lr = get_lr


def split_batches(trainer: Trainer, parts: int) -> None:
    """Each batch is so many, with a step for each."""
    batch_size = trainer.cfg["batch_size"] // parts
    trainer.cfg = trainer.cfg | {"batch_size": batch_size}
    trainer.total_steps = trainer.cfg["num_tokens"] // batch_size


def slow_bias(trainer: Trainer) -> None:
    """b_enc learns at the rate of all else."""
    for group in trainer.optimizer.param_groups:
        group["scale"] = 1.0


def see_mean(trainer: Trainer) -> None:
    """W_enc sees y as it is [O24], and b_enc learns at the rate of all else."""
    crosscoder = trainer.crosscoder
    with torch.no_grad():
        crosscoder.b_enc -= (crosscoder.mean[..., None] * crosscoder.W_enc).sum((0, 1))
    crosscoder.mean.zero_()
    slow_bias(trainer)


def aim_by_loss(trainer: Trainer, weight: float) -> None:
    """jumprelu's penalty is weight * (L0 / aim - 1)^2, L0 with the gradient of the thresholds' ramp [Gemma Scope 2]."""
    aim, trainer.cfg = trainer.cfg["l0"], trainer.cfg | {"l0": 0.0}
    plain = trainer.crosscoder.get_losses

    def losses_of_l0(h, acts, log_threshold, norms):
        threshold = log_threshold.exp()
        slope = ((h - threshold) / 2).clamp(-0.5, 0.5)
        l0 = ((h > threshold) + slope - slope.detach()).sum() / len(h)
        _, inactive = get_jump_losses(h, acts, log_threshold, norms)
        return ((l0 / aim - 1).square() * len(h) / h.shape[1]).expand(h.shape[1]), inactive

    def get_losses(*args):
        utils.get_jump_losses = losses_of_l0
        losses = plain(*args)
        utils.get_jump_losses = get_jump_losses
        return losses

    trainer.crosscoder.get_losses = get_losses
    trainer.get_l1_coeff = lambda: weight * min(1.0, trainer.step_counter / trainer.total_steps / 0.05)


# ---- Trials: what a row is called, its keys, and a change to the trainer ----------------------------
K = {"activation": "batchtopk", "k": 32}
RELU = {"activation": "relu", "l0": 32}
JUMP = {"activation": "jumprelu", "l0": 32}
K_54 = K | {"k": 54}  # on SmolLM2
RELU_54 = RELU | {"l0": 54, "dec_init_norm": 0.03}  # the norm of those that have no l0
JUMP_54 = JUMP | {"l0": 54, "l0_coeff": 0.6}
TRIALS = {
    "l0": [
        *[(f"relu, l1_coeff={2 * n:g}", RELU | {"l1_coeff": 2 * n}, None) for n in (0.1, 1, 10)],
        *[(f"jumprelu, l0_coeff={0.15 * n:g}", JUMP | {"l0_coeff": 0.15 * n}, None) for n in (0.1, 1, 10)],
        ("jumprelu, l0_coeff=0.13, no l0", JUMP | {"l0_coeff": 0.13, "l0": 0}, None),
        *[(f"jumprelu, {n} (L0 / 32 - 1)^2", JUMP, partial(aim_by_loss, weight=n)) for n in (30, 300)]],
    "batchtopk": [
        ("batchtopk", K, None),
        *[(f"{n:.0%} of sources masked", K, partial(mask_sources, share=n)) for n in (0.05, 0.1)],
        *[(f"aux_coeff={n:g}", K | {"aux_coeff": n}, None) for n in (1 / 4, 1)],
        *[(f"warm-up over {n:.0%}", K, partial(warm_up, share=n)) for n in (0.02, 0)],
        ("topk", K | {"activation": "topk"}, None)],
    "relu": [
        ("relu", RELU, None),
        ("5% of sources masked", RELU, partial(mask_sources, share=0.05)),
        *[(f"warm-up over {n:.0%}", RELU, partial(warm_up, share=n)) for n in (0.02, 0)]],
    **{f"batch_{n}": [(f"batch_size={n}", K | {"batch_size": n, "buffer_mult": 65536 // n}, None)] for n in (256, 1024)},
    "smollm2": [
        ("batchtopk", K_54, None),
        ("batchtopk, aux_coeff=1", K_54 | {"aux_coeff": 1}, None),
        ("batchtopk, 5% of sources masked", K_54, partial(mask_sources, share=0.05)),
        ("batchtopk, no warm-up", K_54, partial(warm_up, share=0)),
        ("batchtopk, two steps a batch", K_54, partial(split_batches, parts=2))],
    "smollm2_l0": [
        *[(f"relu, l0=54, l1_coeff={n:g}", RELU_54 | {"l1_coeff": n}, None) for n in (0.2, 2, 20)],
        *[(f"jumprelu, l0=54, l0_coeff={n:g}", JUMP_54 | {"l0_coeff": n}, None) for n in (0.06, 0.6, 6)],
        ("batchtopk, k=54", K_54, None),
        ("relu, l1_coeff=2, no l0", RELU_54 | {"l0": 0, "l1_coeff": 2}, None)],
    "mean": [
        (f"{keys['activation']}{said}", keys, change) for keys in (K, JUMP, RELU)
        for said, change in (("", None), (", b_enc as slow as all else", slow_bias), (", and W_enc sees the mean", see_mean))],
    "at_size": [("batchtopk", K | {"k": 64}, None), ("jumprelu", JUMP | {"l0": 64, "l0_coeff": 1}, None)],
}


COLUMNS = {  # with how many digits
    "sparsity/l0": 1, "fvu/all": 4, "ce/delta_all": 3, "sparsity/dead": 3, "rare": 3, "coherence": 2}


def run(trial: str, seed: int, overrides: dict, rare_tokens: int = 200_000) -> list[dict]:
    """Trains a trial's rows together. -> what each has come to: what look says; rare, the share of latents that are
    active on fewer than one in 100,000 of rare_tokens trained on; growth, the share that is dead after each tenth"""
    paths = {"seed": seed, "save_dir": tempfile.mkdtemp(), "wandb_mode": "disabled"}
    cfgs = [make_cfg(**{"preset": "tiny", **keys, **overrides, **paths}) for _, keys, _ in TRIALS[trial]]
    models = load_models(cfgs[0])
    all_tokens = load_tokens(cfgs[0], models)
    trainers: list[Trainer] = []
    for cfg, (_, _, change) in zip(cfgs, TRIALS[trial]):
        trainers.append(Trainer(cfg, models, all_tokens, trainers[0].buffer if trainers else None))
        if change is not None:
            change(trainers[-1])
    rows = [{"trial": trial, "row": row, "seed": seed, "growth": []} for row, _, _ in TRIALS[trial]]
    for step in tqdm.trange(trainers[0].total_steps, desc=f"{trial}, seed {seed}"):
        x = trainers[0].buffer.next()
        is_tenth = (step + 1) * 10 // trainers[0].total_steps > step * 10 // trainers[0].total_steps
        for row, trainer in zip(rows, trainers):
            for part in x.split(trainer.cfg["batch_size"]):
                trainer.step(part)
            if is_tenth:
                dead = trainer.tokens_since_fired >= trainer.cfg["dead_after"]
                row["growth"].append(dead.float().mean().item())
    for row, trainer in zip(rows, trainers):
        row.update(look(trainer), folder=str(trainer.run_dir))
        trainer.crosscoder.save(trainer.run_dir / "step_1")
    fires = [torch.zeros(len(trainer.crosscoder.b_enc), dtype=torch.long) for trainer in trainers]
    n_rows = 0
    tokens = all_tokens[: min(rare_tokens, cfgs[0]["num_tokens"]) // all_tokens.shape[1]]
    for x in utils.iter_rows(models, tokens, cfgs[0]):
        n_rows += len(x)
        for count, trainer in zip(fires, trainers):
            with torch.no_grad():
                count += (trainer.crosscoder.encode(x.float()) > 0).sum(0).cpu()
    for row, count in zip(rows, fires):
        row["rare"] = (count < 1e-5 * n_rows).double().mean().item()
    return rows


def table(rows: list[dict]) -> str:
    """Means over the seeds, and the largest distance of one from them; how the dead grow."""
    lines = ["| | L0 | FVU | CE delta | dead | rare | coherence | stable |", "|" + "---|" * 8]
    growth = ["", "dead after each tenth of training:"]
    for name in dict.fromkeys(row["row"] for row in rows):
        runs = [row for row in rows if row["row"] == name]
        cells = []
        for key, digits in COLUMNS.items():
            values = np.array([run[key] for run in runs])
            cells.append(f"{values.mean():.{digits}f} ± {abs(values - values.mean()).max():.{digits}f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {get_stability(runs):.1%} |")
        dead = np.mean([run["growth"] for run in runs], axis=0)
        growth.append(f"{name}: " + " ".join(f"{share:.1%}" for share in dead))
    return "\n".join(lines + growth)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rare_tokens", type=int, default=200_000, help="on how many it is counted which are rare")
    args, others = parser.parse_known_args(argv)
    rows = []
    for seed in range(args.seeds):
        rows += run(args.trial, seed, parse_overrides(others), args.rare_tokens)
    with open("trials.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
