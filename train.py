"""Trains a sparse crosscoder.

  python train.py --preset=tiny      on a small model that comes with the code: a minute on a laptop
  python train.py --l1_coeff=2       on GPT-2 Small, all 12 layers: for a CUDA box
"""
import argparse
import math
import os
import re
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: on a CPU a fifth of a step was page faults

import torch

import utils
from utils import (
    CrossCoder, Trainer, default_cfg, get_stacked_resids, load_models, load_tokens, make_cfg, source_names)


class Parser(argparse.ArgumentParser):
    """Reports mistakes as make_cfg does."""

    def error(self, message: str):
        raise ValueError(f"{message}; write --key=value, see --help")


def parse_overrides(argv: list[str]) -> dict[str, str]:
    """The --key=value arguments as a dict for make_cfg, which converts and checks them."""
    source = Path(utils.__file__).read_text()
    comments = dict(re.findall(r'^    "(\w+)": .*,  # (.*)$', source, flags=re.MULTILINE))
    plain = argparse.RawDescriptionHelpFormatter
    usage = "python train.py [--key=value ...]"
    parser = Parser(usage=usage, description=__doc__, formatter_class=plain, allow_abbrev=False)
    for key, default in default_cfg.items():
        shown = str(default).lower() if isinstance(default, bool) else default
        help = f"{comments[key]} (default: {shown})".replace("%", "%%")
        parser.add_argument(f"--{key}", default=argparse.SUPPRESS, metavar="VALUE", help=help)
    known, unknown = parser.parse_known_args(argv)
    overrides = vars(known)
    for argument in unknown:
        if not (match := re.fullmatch(r"--([\w-]+)(?:=(.*))?", argument)):
            raise ValueError(f"{argument}: write --key=value, see --help")
        overrides[match[1]] = match[2]  # make_cfg knows the nearest key
    return overrides


def estimate_seconds(cfg: dict, models: list, n_layers: int, d_model: int) -> float:
    """How long a run takes, from timing a forward pass of the models and a step of a small crosscoder."""
    small = CrossCoder({**cfg, "dict_size": min(4096, cfg["dict_size"])}, n_layers, d_model)
    x = torch.randn(cfg["batch_size"], n_layers, d_model, device=cfg["device"])
    n_seqs = math.ceil(1024 / cfg["seq_len"]) if cfg["device"] == "cpu" else cfg["model_batch_size"]
    tokens = torch.zeros(n_seqs, cfg["seq_len"])

    def harvest() -> float:
        return get_stacked_resids(models, tokens, cfg)[..., 0].sum().item()

    def step() -> float:
        losses = small.get_losses(x)
        (losses.l2_loss + losses.l1_loss).backward()
        return small.b_enc.grad.sum().item()

    seconds = {harvest: [], step: []}
    for part in (harvest, step) * 5:  # the first time is slower, others may be disturbed
        start = time.time()
        part()
        seconds[part].append(time.time() - start)
    per_row = min(seconds[harvest]) / tokens.numel()
    per_row += min(seconds[step]) / len(x) * cfg["dict_size"] / len(small.b_enc)
    return per_row * cfg["num_tokens"]


def peak_memory_gb(cfg: dict) -> float:
    """The most memory in use so far: on the GPU where the run is on one, else of the process."""
    if cfg["device"].startswith("cuda"):
        return torch.cuda.max_memory_allocated(cfg["device"]) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def format_seconds(seconds: float) -> str:
    """A duration for people."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def header(cfg: dict, models: list) -> str:
    """What the run is, what it needs and how long it will take."""
    n_layers, d_model = get_stacked_resids(models, torch.zeros(1, 2), cfg).shape[2:]
    names = source_names(cfg, n_layers)
    parameters = cfg["dict_size"] * (2 * n_layers * d_model + 1) + n_layers * d_model
    itemsize = utils.DTYPES[cfg["enc_dtype"]].itemsize
    buffer_gb = cfg["batch_size"] * cfg["buffer_mult"] * n_layers * d_model * itemsize / 1e9
    seconds = estimate_seconds(cfg, models, n_layers, d_model)
    if cfg["device"] == "cpu" and seconds > 3600:
        print(f"warning: without a GPU this run takes about {format_seconds(seconds)}; --preset=tiny takes "
              "a minute", file=sys.stderr)
    return "\n".join((
        f"models      {cfg['model_name']}",
        f"sources     {n_layers} of width {d_model}: {names[0]}{f' to {names[-1]}' if n_layers > 1 else ''}",
        f"dictionary  {cfg['dict_size']:,} latents, {parameters:,} parameters, compute in {cfg['enc_dtype']}",
        f"training    {cfg['num_tokens']:,} tokens in {cfg['num_tokens'] // cfg['batch_size']:,} steps",
        f"memory      {16 * parameters / 1e9:.2f} GB weights, gradients and Adam, {buffer_gb:.2f} GB buffer",
        f"device      {cfg['device']}, about {format_seconds(seconds)}"))


def results(cfg: dict, metrics: dict[str, float], n_layers: int) -> str:
    """evaluate()'s numbers as text, a line a source."""
    names = source_names(cfg, n_layers)
    width = max(map(len, names))
    lines = [f"{'source':<{width}}     FVU  CE delta  (mean-ablated)  norm ratio"]
    for name in [*names, "all"]:
        ratio = f"{metrics[f'norm_ratio/{name}']:10.3f}" if name != "all" else ""
        lines.append(f"{name:<{width}}  {metrics[f'fvu/{name}']:6.4f}  {metrics[f'ce/delta_{name}']:+8.4f}  "
                     f"{metrics[f'ce/ablated_{name}']:+14.4f}  {ratio}".rstrip())
    lines.append(f"L0 {metrics['sparsity/l0']:.1f}, dead latents {metrics['sparsity/dead']:.1%}, "
                 f"clean CE {metrics['ce/clean']:.4f}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """One run. -> exit code: 0, 2 for a user's mistake, 130 after Ctrl-C"""
    try:
        start, cfg = time.time(), make_cfg(**parse_overrides(argv))
        models = load_models(cfg)
        print(header(cfg, models), flush=True)
        all_tokens = load_tokens(cfg, models[0].tokenizer)
        trainer = Trainer(cfg, models, all_tokens)
        metrics = trainer.train()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(results(cfg, metrics, len(trainer.crosscoder.b_dec)))
    seconds = time.time() - start
    print(f"{cfg['num_tokens'] / seconds:,.0f} tokens/s all in all, {format_seconds(seconds)}, "
          f"peak memory {peak_memory_gb(cfg):.2f} GB")
    print(f'load it with: crosscoder = CrossCoder.load("{trainer.run_dir}")')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
