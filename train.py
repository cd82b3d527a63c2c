"""Trains a sparse crosscoder.

  python train.py --preset=tiny      on a small model that comes with the code: a minute on a laptop
  python train.py --l1_coeff=2       on GPT-2 Small, all 12 layers: for a CUDA box
"""
import argparse
import ctypes
import math
import os
import re
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
import timeit
from bisect import bisect_right
from importlib.metadata import distributions
from pathlib import Path

# A step on a CPU is a quarter faster where large tensors need no fresh pages, and large pages.
if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc: M_MMAP_MAX, M_TRIM_THRESHOLD; keeps what is freed
    libc.mallopt(-4, 0), libc.mallopt(-1, -1)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch

import psutil
import torch

import utils
from utils import (
    CrossCoder, Trainer, default_cfg, get_stacked_resids, list_checkpoints, load_models, load_tokens,
    make_cfg, source_names)


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


def count_parameters(cfg: dict, n_layers: int, d_model: int) -> int:
    """Of the crosscoder."""
    thresholds = cfg["dict_size"] * (cfg["activation"] == "jumprelu")
    return cfg["dict_size"] * (2 * n_layers * d_model + 1) + n_layers * d_model + thresholds


def get_memory(cfg: dict, models: list, n_layers: int, d_model: int) -> dict[str, int]:
    """The bytes that a run needs beyond its models, by part; the formulas are those of README.md, Memory."""
    width, parameters = n_layers * d_model, count_parameters(cfg, n_layers, d_model)
    itemsize, d_vocab = utils.DTYPES[cfg["enc_dtype"]].itemsize, models[0].cfg.d_vocab
    seqs, seq_len = cfg["model_batch_size"], cfg["seq_len"]
    a_latent = {"relu": 12, "jumprelu": 30}.get(cfg["activation"], 20)
    return {
        "weights and Adam": 12 * parameters,
        "buffer": cfg["batch_size"] * cfg["buffer_mult"] * (width * itemsize + 16),
        "at work": max(
            5 * parameters,  # gradients, and weights and products in the compute type
            cfg["batch_size"] * (17 * width + a_latent * cfg["dict_size"]),  # a step's activations
            seqs * seq_len * itemsize * (width + max(width, 13 * models[0].cfg.d_model)),  # harvesting
            min(seqs, cfg["eval_seqs"]) * seq_len * itemsize * (2 * width + d_vocab)  # evaluating: logits,
            + 8 * seq_len * d_vocab)}  # and a sequence's in fp32, twice


def check_memory(cfg: dict, *shape) -> None:
    """ValueError where a run does not fit, naming the largest buffer_mult, dict_size, ... that would."""
    places = {"weights and Adam": cfg["device"], "buffer": cfg["buffer_device"], "at work": cfg["device"]}
    for device in set(places.values()):
        def needed(**changed) -> int:
            parts = get_memory({**cfg, **changed}, *shape)
            return sum(size for part, size in parts.items() if places[part] == device)

        if needed() > (free := free_memory(device)):
            most = {key: bisect_right(range(cfg[key]), free, key=lambda n: needed(**{key: n})) - 1
                    for key in ("buffer_mult", "dict_size", "model_batch_size")}
            fit = [f"{key}={n}" for key, n in most.items() if n >= utils.LEAST.get(key, 1)]
            raise utils.bad("device", device, f"{needed() / 1e9:,.2f} GB are needed beyond the models, "
                            f"{free / 1e9:,.2f} are free; what fits: {' or '.join(fit) or 'less of all'}")


def free_memory(device: str) -> int:
    """Bytes, those that PyTorch holds unused included."""
    if device.startswith("cuda"):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


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

    per_row = min(timeit.repeat(harvest, number=1)) / tokens.numel()
    per_row += min(timeit.repeat(step, number=1)) / len(x) * cfg["dict_size"] / len(small.b_enc)
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
    """What the run is, what it needs and how long it will take. ValueError where it needs too much memory."""
    n_layers, d_model = get_stacked_resids(models, torch.zeros(1, 2), cfg).shape[2:]
    check_memory(cfg, models, n_layers, d_model)
    names = source_names(cfg, n_layers)
    parameters = count_parameters(cfg, n_layers, d_model)
    memory = get_memory(cfg, models, n_layers, d_model).items()
    done = re.search(r"step_(\d+)$", cfg["resume"])
    seconds = estimate_seconds(cfg, models, n_layers, d_model)
    if done:
        seconds *= 1 - int(done[1]) * cfg["batch_size"] / cfg["num_tokens"]
    if cfg["device"] == "cpu" and seconds > 3600:
        print(f"warning: without a GPU this run takes about {format_seconds(seconds)}; --preset=tiny takes "
              "a minute", file=sys.stderr)
    return "\n".join((
        *[f"resuming    {cfg['resume']}"] * bool(cfg["resume"]),
        f"models      {cfg['model_name']}",
        f"sources     {n_layers} of width {d_model}: {names[0]}{f' to {names[-1]}' if n_layers > 1 else ''}",
        f"dictionary  {cfg['dict_size']:,} latents, {parameters:,} parameters, compute in {cfg['enc_dtype']}",
        f"training    {cfg['num_tokens']:,} tokens in {cfg['num_tokens'] // cfg['batch_size']:,} steps",
        f"memory      {', '.join(f'{size / 1e9:.2f} GB {part}' for part, size in memory)}; "
        f"{free_memory(cfg['device']) / 1e9:.2f} GB free",
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
    if "diff/shared" in metrics:
        only = [f"{metrics[f'diff/only_{m}']:,.0f} only in {Path(name).name}"
                for m, name in enumerate(cfg["model_name"].split(","))]
        lines.append(f"by relative norm {metrics['diff/shared']:,.0f} latents shared, of mean cosine "
                     f"{metrics['diff/cosine']:.2f}, {', '.join(only)}")
    lines.append(f"L0 {metrics['sparsity/l0']:.1f}, dead latents {metrics['sparsity/dead']:.1%}, "
                 f"clean CE {metrics['ce/clean']:.4f}")
    return "\n".join(lines)


def note_start(trainer: Trainer) -> None:
    """Puts cfg.json into a run's folder, and adds to starts.jsonl: command line, git commit, versions."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    versions = {each.name: each.version for each in distributions()}
    start = {"time": time.ctime(), "command": sys.orig_argv, "python": sys.version, "commit": commit,
             "versions": versions}
    with utils.atomically(trainer.run_dir / "cfg.json") as temporary:
        temporary.write_text(json.dumps(trainer.crosscoder.cfg, indent=2) + "\n")
    with open(trainer.run_dir / "starts.jsonl", "a") as file:
        file.write(json.dumps(start) + "\n")


def stop_on_signals(trainer: Trainer) -> None:
    """Lets SIGINT and SIGTERM end the training after the step; a second signal ends the process at once."""
    def stop(number: int, frame) -> None:
        trainer.stop = KeyboardInterrupt(128 + number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)


def newest(trainer: Trainer | None) -> Path | None:
    """The checkpoint that a run can go on from."""
    return (list_checkpoints(trainer.run_dir) or [None])[-1] if trainer else None


def main(argv: list[str]) -> int:
    """One run. -> exit code: 0; 1 where numbers or disk broke down; 2 a user's mistake; 130, 143 a signal"""
    start, trainer = time.time(), None
    try:
        cfg = make_cfg(**parse_overrides(argv))
        models = load_models(cfg)
        print(header(cfg, models), flush=True)
        all_tokens = load_tokens(cfg, models[0].tokenizer)
        trainer = Trainer(cfg, models, all_tokens)
        first_step = trainer.step_counter
        note_start(trainer)
        stop_on_signals(trainer)
        metrics = trainer.train()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except FloatingPointError as error:
        print(f"error: {error}; last good checkpoint: {newest(trainer)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        last = newest(trainer)
        print(f"stopped; {f'go on with --resume={last}' if last else 'nothing is saved'}", file=sys.stderr)
        return stop.args[0] if stop.args else 130
    print(results(cfg, metrics, len(trainer.crosscoder.b_dec)))
    seconds = time.time() - start
    tokens = (trainer.step_counter - first_step) * cfg["batch_size"]
    print(f"{tokens / seconds:,.0f} tokens/s all in all, {format_seconds(seconds)}, "
          f"peak memory {peak_memory_gb(cfg):.2f} GB")
    print(f'load it with: crosscoder = CrossCoder.load("{trainer.run_dir}")')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
