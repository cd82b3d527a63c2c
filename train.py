"""Trains a sparse crosscoder: makes a config, opens models and text, and starts the run.

  python train.py --preset=tiny      on a small model that comes with the code: a minute on a laptop
  python train.py --l1_coeff=2       on GPT-2 Small, all 12 layers: for a CUDA box
  torchrun --nproc_per_node=8 train.py --l1_coeff=2      the same on eight GPUs
"""
import copy
import ctypes
import datetime
import difflib
import glob
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

# ---- The command line ----------------------------------------------------------------------------
KEYS = {  # key: (default, comment); default_cfg and --help are made of this
    "preset": ("gpt2-small", "or gpt2-published, tiny, diff, diff-tiny, gelu-1l: other defaults"),
    "seed": (51, "of the initial weights and of the shuffling"),
    "device": ("auto", "cuda, cuda:1 or cpu; auto is cuda where there is one"),
    "save_dir": ("checkpoints", "folder in which each run makes its own, version_N"),
    "save_every": (100_000, "steps between checkpoints; one is always written at the end"),
    "keep": (3, "how many of a run's checkpoints are kept, the newest"),
    "resume": ("", "a run's folder, its last checkpoint, or latest (in save_dir), to go on with"),
    "log_every": (100, "steps between logged metrics"),
    "eval_every": (10_000, "steps between evaluations on the held-out sequences"),
    "eval_seqs": (64, "sequences at the end of the tokens that are held out from training"),
    "dead_after": (10_000_000, "tokens without firing after which a latent counts as dead"),
    "wandb_mode": ("online", "online, offline or disabled"),
    "model_name": (["gpt2"], "hub name or local folder; several with commas between"),
    "layers": ([], "layer numbers such as 0,3,6; none, or the word all: every layer"),
    "site": ("resid_post", "TransformerLens activation name: resid_mid, mlp_out, post, z, ..."),
    "center": (False, "remove the mean over d_model as [N24] did; for models with LayerNorm only"),
    "norm": ([], "what each source is divided by, as 1.8,2.1; none: estimated on the first buffer"),
    "fingerprint": ([], "of the models' weights; load_models fills it in, and refuses others"),
    "model_device": ("auto", "where the models are; auto is the device, balanced spreads them over all GPUs"),
    "model_batch_size": (32, "sequences in one forward pass of the models"),
    "tokens": ([], ".npy or .pt file of token ids [n_seqs, seq_len], used instead of dataset"),
    "dataset": (["Skylion007/openwebtext@refs/convert/parquet"],
                "hub name@revision, file or folder of text; it and tokens can be mixed: a:0.5,b:0.5"),
    "seq_len": (1024, "tokens in a sequence, the first of them BOS"),
    "num_tokens": (1_070_000_000, "tokens to train on: one row of activations each"),
    "batch_size": (2048, "rows in a step"),
    "buffer_mult": (512, "batches that the shuffled buffer holds"),
    "buffer_device": ("auto", "where the buffer is kept; auto is the device"),
    "dict_size": (2**14, "latents"),
    "enc_dtype": ("auto", "compute type, fp32 or bf16; auto is bf16 if it is fast. Weights are fp32"),
    "activation": ("relu", "which latents are active: relu, topk, batchtopk or jumprelu"),
    "dec_init_norm": (0.005, "relu without an l0: initial norm of a latent's decoder vector at each source"),
    "l1_coeff": (2.0, "relu: sparsity penalty after its warm-up, with an l0 at most"),
    "k": (64, "topk, batchtopk: active latents a token, for batchtopk on average; 8 k at first"),
    "l0": (0.0, "relu, jumprelu: active latents a token to aim at; their coefficients then matter less"),
    "l0_coeff": (5.0, "jumprelu: sparsity penalty at the end of training, with an l0 after 35% of it"),
    "init_from": ("", "a run's folder or hub name: begin with its weights, normalisation and thresholds"),
    "n_shared": (0, "several models: latents, the first, that write the same to all of them [F25]"),
    "shared_penalty": (0.1, "relu, jumprelu: share of the sparsity penalty that these pay"),
    "n_exclusive": (0, "several models: latents of each, the next, that read and write no other"),
    "aux_coeff": (0.0, "of the loss that revives dead latents; topk and batchtopk: 1/32"),
    "lr": (2e-5, "learning rate of Adam after its warm-up; topk, batchtopk and jumprelu: 2e-4"),
    "beta1": (0.9, "of Adam"),
    "beta2": (0.999, "of Adam"),
}
HEADINGS = {  # above which key
    "preset": "The run", "model_name": "The sources: n_layers = models x layers", "tokens": "The text",
    "num_tokens": "The crosscoder and its training, as published [N24]"}
default_cfg = {key: default for key, (default, _) in KEYS.items()}


def get_help() -> str:
    """What --help prints: every key with its comment and default."""
    lines = [__doc__, "Any key of the config can be given as --key=value:"]
    for key, (default, comment) in KEYS.items():
        if key in HEADINGS:
            lines += ["", HEADINGS[key]]
        if isinstance(default, list):
            default = ",".join(str(item) for item in default)
        lines.append(f"  --{key:<18} {comment} (default: {default})")
    return "\n".join(lines)


class Quiet(io.FileIO):
    """A file that drops what it cannot write, on a full disk or a closed pipe: no output may end a
    run."""

    def write(self, text: bytes) -> int:
        """-> how many bytes are dealt with"""
        try:
            return super().write(text) or len(text)  # or: a pipe that is full and lets nobody wait
        except OSError:
            return len(text)


if __name__ == "__main__":
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)  # none where it was closed
        if stream is getattr(sys, f"__{name}__"):  # and not a notebook's
            number = stream.fileno() if stream else os.open(os.devnull, os.O_WRONLY)
            file = io.BufferedWriter(Quiet(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(file, errors="replace", line_buffering=True))
    if "--help" in sys.argv:  # at once, without what takes seconds to import
        print(get_help())
        sys.exit()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # there is nothing to save yet

import datasets
import filelock
import huggingface_hub
import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tqdm
from huggingface_hub.constants import HF_HOME
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import AttentionBridge, NormalizationBridge
from transformers.activations import NewGELUActivation

from utils import (
    DTYPES, RUN_FILES, Tokens, Trainer, atomically, bad, find_checkpoint, get_ranks, get_sources,
    get_stacked_resids, list_checkpoints, source_names)

# ---- Config --------------------------------------------------------------------------------------
RECIPES = {  # what else differs with the activation [J25], [M25]
    "relu": {},
    "topk": {"aux_coeff": 1 / 32, "lr": 2e-4},
    "batchtopk": {"aux_coeff": 1 / 32, "lr": 2e-4},
    "jumprelu": {"lr": 2e-4},
}
PRESETS = {
    "gpt2-small": {},
    "gpt2-published": {  # E||x|| / sqrt(768) of GPT-2 Small, no position 0, its mean removed [N24]
        "center": True,
        "norm": [
            1.8281, 2.0781, 2.2031, 2.4062, 2.5781, 2.8281,
            3.1562, 3.6875, 4.3125, 5.4062, 7.875, 16.5],
    },
    "tiny": {  # a 4-layer model of the King James Bible: the whole job on a laptop, without a hub
        "model_name": ["tests/tiny/base"], "tokens": ["tests/tiny/kjv.npy"], "seq_len": 128,
        "batch_size": 512, "num_tokens": 10**6, "buffer_mult": 128, "model_batch_size": 64,
        "dict_size": 2048, "lr": 1e-3, "dec_init_norm": 0.05, "k": 32, "l0_coeff": 0.15,
        "dead_after": 10**5, "log_every": 20, "eval_every": 500, "wandb_mode": "disabled",
    },
    "diff": {  # what did Gemma 2's tuning add? [M25]
        "model_name": ["google/gemma-2-2b", "google/gemma-2-2b-it"], "layers": [13],
        "dataset": ["HuggingFaceFW/fineweb:0.5", "lmsys/lmsys-chat-1m:0.5"],
        "num_tokens": 2 * 10**8, "model_batch_size": 4, "activation": "batchtopk", "k": 100,
        "dict_size": 73_728, "lr": 1e-4,
    },
    "gelu-1l": {  # one source: an ordinary sparse autoencoder on the MLP of a one-layer model
        "model_name": ["NeelNanda/GELU_1L512W_C4_Code"], "layers": [0], "site": "post",
        "dataset": ["NeelNanda/c4-code-20k"], "num_tokens": 10**8, "lr": 1e-4, "dec_init_norm": 0.1,
    },
}
PRESETS["diff-tiny"] = PRESETS["tiny"] | {  # the same model, and it again tuned on a dictionary
    "model_name": ["tests/tiny/base", "tests/tiny/tuned"], "layers": [2], "activation": "batchtopk",
    "n_exclusive": 100, "tokens": ["tests/tiny/kjv.npy:0.5", "tests/tiny/wordnet.npy:0.5"],
}
CHOICES = {
    "preset": list(PRESETS), "activation": list(RECIPES), "center": ["true", "false"],
    "enc_dtype": ["auto", *DTYPES], "wandb_mode": ["online", "offline", "disabled"],
}
DEVICES = ["device", "buffer_device", "model_device"]
MOST = 2**53  # above it floats, which all numbers are read as, leave out whole numbers
LIMITS = {  # of numbers: the least; what they must be below; both in words. All others: above 0
    **dict.fromkeys(
        ["seed", "l1_coeff", "l0", "aux_coeff", "n_shared", "n_exclusive"], (0, MOST, "of at least 0")),
    **dict.fromkeys(["seq_len", "buffer_mult"], (2, MOST, "of at least 2")),
    **dict.fromkeys(["beta1", "beta2"], (1e-300, 1, "above 0 and below 1")),
}
USED_BY = {
    "dec_init_norm": ["relu"], "l1_coeff": ["relu"], "k": ["topk", "batchtopk"],
    "l0_coeff": ["jumprelu"], "l0": ["relu", "jumprelu"], "shared_penalty": ["relu", "jumprelu"],
}
MAY_CHANGE = [  # on resume; the text is known by its hash, and the models by their fingerprint
    "model_name", "resume", "keep", "save_dir", "save_every", "log_every", "eval_every", "wandb_mode",
    "model_batch_size", "tokens", "dataset", "num_tokens", *DEVICES]


def make_cfg(**overrides) -> dict:
    """The config: default_cfg, then what the activation, the preset or the run to resume change,
    then overrides, as text or not. Has every key, every "auto" filled in; afterwards read-only, but
    for fingerprint. ValueError names the key, the value and what would be right."""
    for key in overrides.keys() - KEYS.keys():
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0)
        raise ValueError(f"{key}: no such key, did you mean {near[0]}?")
    overrides = {key: convert(key, value) for key, value in overrides.items()}
    preset = PRESETS[overrides.get("preset", "gpt2-small")]
    activation = (default_cfg | preset | overrides)["activation"]
    base = default_cfg | RECIPES[activation] | preset
    if overrides.get("resume"):
        folder = find_resume(overrides["resume"], overrides.get("save_dir", base["save_dir"]))
        overrides["resume"] = str(folder)
        try:
            saved = json.loads((folder / "cfg.json").read_text())
            if isinstance(saved["model_name"], str):
                raise ValueError("but of an earlier one, which can only be loaded")
        except Exception as error:
            raise bad("resume", str(folder), f"not a run of this version ({error!r:.200})") from None
        base |= {key: convert(key, value) for key, value in saved.items() if key in KEYS}
        if get_ranks()[1] > 1:  # the file has the first rank's GPU
            base |= {key: "auto" for key in DEVICES if "cuda" in base[key]}
    if "dataset" in overrides:
        base["tokens"] = []  # the preset's or the run's, which would come before it
    cfg = base | overrides
    for key, activations in USED_BY.items():
        if cfg["activation"] not in activations and cfg[key] != base[key]:
            raise bad(key, cfg[key], f"activation={cfg['activation']} does not use it; it is for "
                      f"activation={' or '.join(activations)}")
    fill_in(cfg)
    check(cfg)
    for key in KEYS.keys() - set(MAY_CHANGE):
        if cfg["resume"] and cfg[key] != base[key]:
            raise bad(key, cfg[key], f"cannot change on resume; {cfg['resume']} has {base[key]!r}")
    if cfg["resume"]:
        steps_left = cfg["num_tokens"] // cfg["batch_size"] - int(folder.name[5:])
        log = folder.parent / "metrics.jsonl"
        is_evaluated = log.exists() and "ce/clean" in log.read_text().rpartition("\n{")[2]
        if steps_left < 0 or steps_left == 0 and is_evaluated:
            raise bad("resume", cfg["resume"], "finished; to train longer give a larger num_tokens than "
                      f"{cfg['num_tokens']}, to look at it see scratch.py")
    return cfg


def convert(key: str, value):
    """value, which may be text, as the kind of thing that the key's default is; 1e8 is a whole
    number."""
    default = default_cfg[key]
    if value is None:
        raise bad(key, value, f"give a value, such as {default!r}")
    if isinstance(default, list):
        return convert_list(key, value)
    text = str(value)
    if key in CHOICES:
        text = text.lower()
        if text not in CHOICES[key]:
            raise bad(key, value, f"give one of {', '.join(CHOICES[key])}")
    if isinstance(default, bool):
        return text == "true"
    if isinstance(default, str):
        return text
    kind = type(default)
    least, most, limit = LIMITS.get(key, (1e-300, MOST, "above 0"))
    try:
        number = kind(float(text))
        is_right = number == float(text) and least <= number < most
    except (ValueError, OverflowError):
        is_right = False
    if not is_right:
        name = {int: "whole number", float: "number"}[kind]
        raise bad(key, value, f"give a {name} {limit}, such as {default}")
    return number


def convert_list(key: str, value) -> list:
    """The same for a list, which as text has commas between its items."""
    items = value
    if isinstance(value, str):
        items = value.split(",")
    try:
        items = [str(item).strip() for item in items]
    except TypeError:  # a single one
        items = [str(value)]
    items = [item for item in items if item]
    if default_cfg[key] and not items:
        raise bad(key, value, f"give at least one, such as {default_cfg[key][0]}")
    kind = {"layers": int, "norm": float, "fingerprint": float}.get(key, str)
    if key == "layers" and items == ["all"]:
        return []
    try:
        items = [kind(item) for item in items]
    except ValueError:
        items = [math.nan]
    if not all(kind is str or abs(item) < MOST for item in items):
        raise bad(key, value, "give numbers such as 0,3,6, or none for all")
    return items


def locate(name: str) -> str:
    """The path of a file or folder, which presets give from this file's folder; else, the name."""
    for path in (Path(os.path.expanduser(name)), Path(__file__).parent / name):
        if os.path.exists(path):  # unlike Path.exists no error for what cannot be a name
            return str(path)
    return name


def find_latest(save_dir: str) -> Path:
    """The folder of the run in save_dir that was started last, as starts.jsonl has it: copying
    changes the times of files. ValueError where no run has a checkpoint."""
    folder = Path(os.path.expanduser(save_dir))
    runs = []
    for name in glob.glob("version_*", root_dir=folder):
        run = folder / name
        times = [""]  # the earliest there is, where starts.jsonl is cut off or not there
        if (run / "starts.jsonl").exists():
            times += re.findall('"time": "(.*?)"', (run / "starts.jsonl").read_text(errors="replace"))
        if list_checkpoints(run):
            runs.append((times[-1], int(list_checkpoints(run)[-1].name[5:]), run))
    if not runs:
        raise bad("resume", "latest", f"no checkpoint in {save_dir}; python train.py --preset=tiny makes one")
    return max(runs)[-1]


def find_resume(resume: str, save_dir: str) -> Path:
    """The checkpoint to go on with. ValueError where none is whole, or the one named is not the
    last."""
    path = Path(os.path.expanduser(resume))
    if resume == "latest":
        path = find_latest(save_dir)
        print(f"resume=latest: {path}", file=sys.stderr)
    path = path.resolve()
    folder = find_checkpoint("resume", path, RUN_FILES)
    run = list_checkpoints(folder.parent)
    if folder not in run:
        raise bad("resume", str(path), "not a run's folder, nor one of its checkpoints, step_N")
    if folder == path and run[-1] != folder:
        raise bad("resume", str(path), f"{run[-1].name} is later; resume that, or move it away")
    return folder


def find_crosscoder(key: str, name: str, revision: str | None = None) -> str:
    """The folder of a crosscoder on this machine, or on the hub. ValueError where there is none."""
    path = Path(locate(name)).resolve()
    try:
        if not path.exists():
            path = Path(huggingface_hub.snapshot_download(name, revision=revision))
    except Exception as error:
        raise bad(key, name, explain(error)) from None
    return str(find_checkpoint(key, path, ["cfg.json", "crosscoder.safetensors"]))


def fill_in(cfg: dict) -> None:
    """Fills in every "auto", as suits this machine. ValueError for what it does not have."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg["device"] == "auto":
        cfg["device"] = best
    for key in DEVICES:
        if cfg[key] == "auto":
            cfg[key] = cfg["device"]
        if cfg[key] == "balanced" and key == "model_device":
            continue
        try:
            if not cfg[key].startswith(("cuda", "cpu")):
                raise RuntimeError  # no other is tested
            cfg[key] = str(torch.empty(1, device=cfg[key]).device)  # cuda is cuda:0
        except (RuntimeError, AssertionError):
            raise bad(key, cfg[key], f"not on this machine; give auto, or {best}") from None
    if "cuda" in cfg["device"]:
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if cfg["enc_dtype"] == "bf16" and not fast_bf16:
            raise bad("enc_dtype", "bf16", "this GPU has no bf16 arithmetic; give fp32")
    else:
        capabilities = torch.cpu.get_capabilities()
        fast_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    if cfg["enc_dtype"] == "auto":
        cfg["enc_dtype"] = "bf16" if fast_bf16 else "fp32"


def check(cfg: dict) -> None:
    """ValueError for values that do not go together."""
    d_sae = cfg["dict_size"]
    n_ranks = get_ranks()[1]
    for key in ("dict_size", "batch_size"):
        if cfg[key] % n_ranks:
            raise bad(key, cfg[key], f"not divisible by the {n_ranks} ranks")
    if n_ranks > 1 and cfg["device"] not in ("cpu", f"cuda:{os.environ['LOCAL_RANK']}"):
        raise bad("device", cfg["device"], "each rank has its own; give auto")
    sparsity = "k" if "topk" in cfg["activation"] else "l0"
    if cfg[sparsity] > d_sae:
        raise bad(sparsity, cfg[sparsity], f"more than dict_size={d_sae}")
    if cfg["init_from"] and cfg["norm"]:
        raise bad("norm", cfg["norm"], "init_from brings its own; give none")
    if len(set(cfg["layers"])) < len(cfg["layers"]):
        raise bad("layers", cfg["layers"], "give each once")
    n_models = len(cfg["model_name"])
    for key in ("n_shared", "n_exclusive"):
        designated = cfg["n_shared"] + n_models * cfg["n_exclusive"]
        if cfg[key] and (n_models == 1 or designated > d_sae):
            raise bad(key, cfg[key], f"takes several models, and room in dict_size={d_sae}")
    if cfg["num_tokens"] < cfg["batch_size"]:
        raise bad("num_tokens", cfg["num_tokens"], f"less than one batch_size={cfg['batch_size']}")
    if cfg["center"] and not re.fullmatch("resid_.*|.*_out", cfg["site"]):
        raise bad("center", True, f"{cfg['site']} is not in the residual stream; give false")


# ---- Models --------------------------------------------------------------------------------------
REMEDIES = {  # by what an error is called or says
    "Offline|ConnectionError|ConnectError|onnect to|LocalEntryNotFound|Max retries":
        "the hub is out of reach; give a local folder, or preset=tiny",
    "GatedRepo|a gated dataset": "accept its licence on its page and log in (hf auth login)",
    "RevisionNotFound": "no such revision",
    "Can't load the model": "no weights there, or they did not arrive; check the name, or try again",
    "RepositoryNotFound|t exist on the Hub":
        "no such name; check it, or log in for what is private (hf auth login)",
    r"KeyError\('conversation'\)": "its rows have no column text, messages or conversation",
    "chat_template": "conversations, and none of the models has a chat template; give a column text",
}


def explain(error: BaseException | None) -> str:
    """What went wrong with the hub, a file or a dataset, and a remedy if one is known, in a line."""
    otherwise = f"{error!r:.300}"
    while error is not None:
        for pattern, remedy in REMEDIES.items():
            if re.search(pattern, repr(error)):
                return remedy
        error = error.__cause__ or error.__context__
    return otherwise


def get_shape(models: list, cfg: dict) -> tuple[int, int]:
    """-> n_layers, d_model of the models' stacked activations"""
    return tuple(get_stacked_resids(models, torch.zeros(1, 2), cfg).shape[2:])


def load_models(cfg: dict) -> list[TransformerBridge]:
    """Opens the models of cfg["model_name"], each once, in the compute type. Fills in or checks
    cfg["fingerprint"]. ValueError where one cannot be opened, does not have the sources or the
    context, does not go with the first, or has other weights than when the fingerprint was taken."""
    opened = {}
    for name in dict.fromkeys(cfg["model_name"]):
        option = "device_map" if cfg["model_device"] == "balanced" else "device"
        try:
            opened[name] = TransformerBridge.boot_transformers(
                locate(name), dtype=DTYPES[cfg["enc_dtype"]], **{option: cfg["model_device"]})
        except Exception as error:
            raise bad("model_name", name, f"cannot be opened: {explain(error)}") from None
        opened[name].original_model.config.use_cache = False  # which nobody would read
    models = [opened[name] for name in cfg["model_name"]]
    first_name = cfg["model_name"][0]
    vocabulary = models[0].tokenizer.get_vocab()
    for name, model in opened.items():
        if model.cfg.n_ctx and cfg["seq_len"] > model.cfg.n_ctx:
            raise bad("seq_len", cfg["seq_len"], f"the context of {name} is {model.cfg.n_ctx}")
        if cfg["center"] and model.cfg.normalization_type != "LN":
            raise bad("center", True, f"{name} has no LayerNorm, so that its mean matters; give false")
        differ = sorted(vocabulary.items() ^ model.tokenizer.get_vocab().items())
        if differ:
            raise bad("model_name", cfg["model_name"], "models must share a tokenizer; those of "
                      f"{first_name} and {name} differ in {len(differ)} entries, first {differ[0][0]!r}")
        if not cfg["layers"] and model.cfg.n_layers != models[0].cfg.n_layers:
            raise bad("layers", "all", f"{first_name} and {name} differ in their number; give layer numbers")
        if get_shape([model], cfg) != get_shape(models[:1], cfg):
            raise bad("model_name", cfg["model_name"], f"{first_name} and {name} differ in width")
    n_sources = len(get_sources(models, cfg))
    norm = cfg["norm"]
    if len(norm) not in (0, n_sources) or not all(0 < number < math.inf for number in norm):
        raise bad("norm", norm, f"give a number above 0 for each of the {n_sources} sources, or none")
    for model in opened.values():
        fuse(model, cfg)
    check_weights(models, cfg)
    return models


def check_weights(models: list, cfg: dict) -> None:
    """Puts eight numbers of each model's last resid_post on a fixed text into cfg["fingerprint"].
    ValueError where what is there already differs by a tenth; bf16 for fp32 makes a hundredth."""
    tokens = torch.arange(min(32, cfg["seq_len"]))[None]
    wanted = cfg | {"layers": [], "site": "resid_post", "center": False}
    x = [get_stacked_resids([model], tokens, wanted)[0, -1, -1, :8] for model in models]
    x = torch.stack(x).float().cpu()  # [n_models, 8]
    if not cfg["fingerprint"]:
        cfg["fingerprint"] = [float(f"{number:.4g}") for number in x.flatten().tolist()]
    known = torch.tensor(cfg["fingerprint"])
    if len(known) != x.numel() or not ((x - known.view_as(x)).norm(dim=1) <= 0.1 * x.norm(dim=1)).all():
        raise bad("model_name", cfg["model_name"], "not the weights that the crosscoder was trained "
                  "on; give those, or, to look at it all the same, make_cfg an empty fingerprint")


def fuse(model: TransformerBridge, cfg: dict) -> None:
    """Puts a model's own fused attention, normalisation and GELU back, which TransformerLens takes
    apart so that hooks inside them fire: where no source is inside, and as long as the activations
    stay close. Harvesting takes 0.5 to 0.7 of the time: tests/RESULTS.md, Speed."""
    hf_model = model.original_model
    config = hf_model.config
    read = {model.hook_dict[source.hook] for source in get_sources([model], cfg)}
    can_sdpa = hf_model._supports_sdpa and not getattr(config, "attn_logit_softcapping", None)
    fused = {}  # part of the model -> the forward that is to stand in
    for part in hf_model.modules():
        is_kind = isinstance(part, NormalizationBridge) or isinstance(part, AttentionBridge) and can_sdpa
        if isinstance(part, NewGELUActivation):
            fused[part] = partial(F.gelu, approximate="tanh")
        elif is_kind and read.isdisjoint(part.modules()):
            fused[part] = part.original_component.forward

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (1, cfg["seq_len"]), generator=generator)
    wanted = get_stacked_resids([model], tokens, cfg)[:, 1:].float()
    try:
        if can_sdpa:
            config._attn_implementation = "sdpa"
            config.output_attentions = False
        for part, forward in fused.items():
            vars(part)["forward"] = forward  # setattr on a bridge would reach what it wraps
        x = get_stacked_resids([model], tokens, cfg)[:, 1:]
        error = ((x - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean()
        is_close = error < torch.finfo(DTYPES[cfg["enc_dtype"]]).eps ** 0.5  # 9% in bf16, 0.03% in fp32
    except Exception:  # whatever another architecture's own forward cannot do
        is_close = False
    if not is_close:
        config._attn_implementation = "eager"
        config.output_attentions = True
        for part in fused:
            vars(part).pop("forward", None)


def get_tokenizer(models: list):
    """The first model's tokenizer, with the chat template of the first model that has one."""
    tokenizer = copy.deepcopy(models[0].tokenizer)
    templates = [model.tokenizer.chat_template for model in models]
    tokenizer.chat_template = next((template for template in templates if template), None)
    return tokenizer


# ---- Text ----------------------------------------------------------------------------------------
KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_tokens(cfg: dict, models: list) -> Tokens:
    """The text as token ids: the file cfg["tokens"], or cfg["dataset"] by way of a cache,
    memory-mapped. Of a mix a:0.5,b:0.5 in memory, rows of each in turn throughout, until those of
    one are used up. ValueError where there is nothing that the models can be run on."""
    key = "tokens" if cfg["tokens"] else "dataset"
    names = cfg[key]
    shares = np.ones(1)
    if len(names) > 1:
        names = [part.rpartition(":")[0] for part in cfg[key]]
        try:
            shares = np.array([part.rpartition(":")[2] for part in cfg[key]], float)
        except ValueError:
            shares = np.zeros(1)
        if not (shares > 0).all() or not np.isfinite(shares).all():
            raise bad(key, cfg[key], "give each part of a mix its share, such as a:0.5,b:0.5")
    shares = shares / shares.sum()
    tokenizer = get_tokenizer(models)
    n_ids = min(len(tokenizer), *(model.cfg.d_vocab for model in models))
    parts = []
    for name, share in zip(names, shares):
        if key == "tokens":
            part = open_tokens(cfg, name)
        else:
            part = tokenise(cfg, tokenizer, name, share)
        smallest = part.numpy().min()
        largest = part.numpy().max()
        if smallest < 0 or largest >= n_ids:
            raise bad(key, name, f"ids {smallest} to {largest} are not all below {n_ids}, the models' "
                      f"number; tokenise the text with the tokenizer of {cfg['model_name'][0]}")
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    if len({part.dtype for part in parts}) > 1:
        parts = [part.int() for part in parts]
    # Row i of a part has its turn at (i + 1/2) / share, until the first part is used up.
    end = min(len(part) / share for part, share in zip(parts, shares))
    parts = [part[: int(share * end)] for part, share in zip(parts, shares)]
    if not all(len(part) for part in parts):
        raise bad(key, cfg[key], "a share is too small to give a sequence")
    turns = [(np.arange(len(part)) + 0.5) / share for part, share in zip(parts, shares)]
    return torch.cat(parts)[np.argsort(np.concatenate(turns), kind="stable")]


def open_tokens(cfg: dict, name: str) -> Tokens:
    """A file of tokens, memory-mapped."""
    path = locate(name)
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise ValueError("No such file")
        if path.endswith(".pt"):
            tokens = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        else:
            tokens = torch.from_numpy(np.load(path, mmap_mode="c"))
        is_whole = np.issubdtype(tokens.numpy().dtype, np.integer)
        if tokens.ndim != 2 or tokens.numel() == 0 or not is_whole:
            raise ValueError(f"it holds {tokens.dtype} {list(tokens.shape)}")
    except Exception as error:
        raise bad("tokens", name, f"give ids [n_seqs, seq_len], .npy or .pt ({error!r:.200})") from None
    if tokens.shape[1] != cfg["seq_len"]:
        raise bad("tokens", name, f"has rows of {tokens.shape[1]} tokens; set seq_len={tokens.shape[1]}")
    return tokens


def list_files(path: Path) -> list[Path]:
    """The file, or all files of text in a folder and below, whatever they are called. ValueError
    where they are not of one kind."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in KINDS and file.is_file())
    kinds = {file.suffix for file in files}
    if len(kinds) != 1 or not kinds <= KINDS.keys():
        raise ValueError(f"give files of one kind, of {', '.join(KINDS)}, not {sorted(kinds) or 'none'}")
    return files


def tokenise(cfg: dict, tokenizer, dataset: str, share: float) -> Tokens:
    """The rows that the run needs of a dataset: each is BOS and then a piece of the documents laid
    end to end, EOS after each; what is a conversation as the chat template has it. Memory-mapped
    from a cache under HF_HOME, which grows and goes on where an earlier run, cut off or with fewer
    tokens, left it."""
    name, _, revision = dataset.partition("@")
    options = {"path": name, "revision": revision or None}
    n_rows = cfg["num_tokens"] + cfg["batch_size"] * cfg["buffer_mult"]  # the buffer reads ahead
    n_seqs = math.ceil(share * (math.ceil(n_rows / (cfg["seq_len"] - 1)) + cfg["eval_seqs"]))
    dtype = np.dtype("uint16" if len(tokenizer) <= 2**16 else "int32")
    try:
        files = []
        path = Path(locate(dataset))
        if path.exists():
            files = list_files(path)
            escaped = [glob.escape(str(file)) for file in files]
            options = {"path": KINDS[files[0].suffix], "data_files": escaped}
            if files[0].suffix == ".txt":
                options["sample_by"] = "document"  # else each line would be one
        elif revision and Path(locate(name)).exists():
            raise ValueError("a local folder has no revisions; leave out what comes after @")
        ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        ids = [token for token in ids if token is not None]  # one may stand for the other
        spelling = [tokenizer.get_vocab(), tokenizer.chat_template]
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        identity = [dataset, stats, cfg["seq_len"], ids[0], ids[-1], spelling]
        cache = Path(HF_HOME, "crosscoder_tokens", datasets.fingerprint.Hasher.hash(identity))
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / ".lock"):
            done = open_cache(cache, cfg["seq_len"], dtype)
            if done["rows"] < n_seqs and not done["ended"]:
                stream = datasets.load_dataset(**options, split="train", streaming=True)
                stream.load_state_dict(done["dataset"] or stream.state_dict())
                done = grow(cache, done, stream, tokenizer, n_seqs, cfg["seq_len"], dtype, ids)
        if not done["rows"]:
            raise ValueError(f"less text than one sequence of seq_len={cfg['seq_len']}")
        print(f"{dataset}: {len(files) or 'hub'} files, {done['documents']:,} documents, "
              f"{done['rows']:,} sequences in {cache}", file=sys.stderr)
        rows = np.memmap(cache / "rows.bin", dtype, "c", shape=(done["rows"], cfg["seq_len"]))
        return torch.from_numpy(rows)[:n_seqs]
    except Exception as error:
        raise bad("dataset", dataset, f"cannot be tokenised: {explain(error)}") from None


def open_cache(cache: Path, seq_len: int, dtype) -> dict:
    """What done.json says is in rows.bin; nothing, as at the beginning, if the two do not agree."""
    nothing = {"rows": 0, "crc": 0, "documents": 0, "rest": [], "dataset": None, "ended": False}
    if not (cache / "done.json").exists():
        return nothing
    try:
        done = json.loads((cache / "done.json").read_text())
        if done["rows"]:
            rows = np.memmap(cache / "rows.bin", dtype, "r", shape=(done["rows"], seq_len))
            if zlib.crc32(rows) != done["crc"]:
                raise ValueError("not the bytes that were written")
        return nothing | done
    except Exception as error:
        print(f"{cache} is damaged ({error!r:.200}); tokenising anew", file=sys.stderr)
        return nothing


def grow(
    cache: Path, done: dict, stream, tokenizer, n_seqs: int, seq_len: int, dtype, special: list[int]
) -> dict:
    """Adds rows to rows.bin until there are n_seqs or the text ends. What done.json says is on the
    disk is there: how many rows, their checksum, the ids left over, where the stream is."""
    texts = (get_text(row, tokenizer) for row in stream)
    bar = tqdm.tqdm(
        desc="tokenising", total=n_seqs, initial=done["rows"], unit="tok", unit_scale=seq_len)
    with bar, open(cache / "rows.bin", "ab") as file:
        file.truncate(done["rows"] * seq_len * dtype.itemsize)  # a killed process may have left more
        while done["rows"] < n_seqs and not done["ended"]:
            batch = list(itertools.islice(texts, 1024))
            ids = [np.array(done["rest"], dtype)]
            if batch:
                for document in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                    ids.append(np.array([*document, special[-1]], dtype))
            ids = np.concatenate(ids)
            rows = ids[: len(ids) // (seq_len - 1) * (seq_len - 1)].reshape(-1, seq_len - 1)
            rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=special[0])
            rows.tofile(file)
            file.flush()
            os.fsync(file)
            done = {
                "rows": done["rows"] + len(rows),
                "crc": zlib.crc32(rows, done["crc"]),
                "documents": done["documents"] + len(batch),
                "rest": ids[len(rows) * (seq_len - 1) :].tolist(),
                "dataset": stream.state_dict(),
                "ended": not batch,
            }
            with atomically(cache / "done.json") as new:
                new.write_text(json.dumps(done))
            bar.update(len(rows))
    return done


def get_text(row: dict, tokenizer) -> str:
    """A dataset's row as text."""
    if "text" in row:
        return row["text"] or ""
    chat = tokenizer.apply_chat_template(row.get("messages") or row["conversation"], tokenize=False)
    return chat.removeprefix(tokenizer.bos_token or "")


# ---- The run -------------------------------------------------------------------------------------
PATIENCE = datetime.timedelta(minutes=15)  # of a rank that waits for the others


def parse_overrides(argv: list[str]) -> dict[str, str]:
    """The --key=value arguments as a dict for make_cfg, which converts and checks them."""
    overrides = {}
    for argument in argv:
        match = re.fullmatch(r"--([\w-]+)(?:=(.*))?", argument, re.DOTALL)
        if not match or match[1] in KEYS and match[2] is None:
            raise ValueError(f"{argument}: write --key=value, see --help")
        overrides[match[1]] = match[2]  # of a key that is not there, make_cfg knows the nearest
    return overrides


def tune_allocator() -> None:
    """Keeps freed memory for the next step, and asks for large pages: on a CPU a step takes 0.6 of
    the time (tests/RESULTS.md, Speed). Of the whole process, and before its first large tensor."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself, and so given back when freed
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nor is the end of the heap
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch


def check_memory(cfg: dict, n_layers: int, d_model: int, d_vocab: int) -> dict[str, int]:
    """The bytes that a run needs beyond its models: exact for weights with their gradients and Adam's
    moments, and for the buffer; for what comes and goes an allowance, the largest of three estimates.
    ValueError where there are not as many, naming what to lower."""
    width = n_layers * d_model
    seq_len = cfg["seq_len"]
    itemsize = DTYPES[cfg["enc_dtype"]].itemsize
    n_ranks = get_ranks()[1]
    d_sae = cfg["dict_size"] // n_ranks  # of a rank, as is all that follows
    parameters = d_sae * (2 * width + 1) + width
    bytes_a_latent = 20
    if cfg["activation"] == "jumprelu":  # which has thresholds
        parameters += d_sae
        if cfg["device"] == "cpu":  # and, where nothing is compiled, more to keep for its gradient
            bytes_a_latent = 30
    step = cfg["batch_size"] * (20 * width + bytes_a_latent * d_sae)
    harvest = cfg["model_batch_size"] * seq_len * itemsize * (width + max(width, 13 * d_model))
    seqs = min(cfg["model_batch_size"], cfg["eval_seqs"])
    evaluation = seqs * seq_len * itemsize * (3 * width + d_vocab) + 8 * seq_len * d_vocab  # logits
    memory = {
        "weights": 16 * parameters,
        "buffer": cfg["batch_size"] // n_ranks * cfg["buffer_mult"] * (width * itemsize + 16),
        "at work": max(step, harvest, evaluation)}
    keys = {"weights": "dict_size", "buffer": "buffer_mult", "at work": "batch_size or model_batch_size"}
    places = dict.fromkeys(keys, cfg["device"]) | {"buffer": cfg["buffer_device"]}
    for device in set(places.values()):
        parts = {part: size for part, size in memory.items() if places[part] == device}
        needed = sum(parts.values()) / 1e9
        free = free_memory(device) / 1e9
        if needed > free:
            part = max(parts, key=parts.get)
            raise bad("device", device, f"{needed:,.2f} GB are needed beyond the models, {free:,.2f} are "
                      f"free; {parts[part] / 1e9:,.2f} are for {part}: lower {keys[part]}")
    return memory


def free_memory(device: str) -> int:
    """Bytes, those that PyTorch holds unused included."""
    if "cuda" in device:
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory(device: str) -> int:
    """The most bytes in use so far: on the GPU where the run is on one, else of the process."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def header(cfg: dict, models: list) -> str:
    """What the run is and what it needs. ValueError where it needs too much memory."""
    n_layers, d_model = get_shape(models, cfg)
    memory = check_memory(cfg, n_layers, d_model, models[0].cfg.d_vocab)
    days = 12 * cfg["num_tokens"] * n_layers * d_model * cfg["dict_size"] / 1e12 / 86400
    if cfg["device"] == "cpu" and days > 1 / 24:
        print(f"warning: without a GPU, at 1 TFLOP/s, this run takes {days:,.1f} days; --preset=tiny "
              "takes a minute", file=sys.stderr)
    names = source_names(cfg, n_layers)
    shown = ", ".join(names)
    if not cfg["layers"]:  # all of them
        shown = " to ".join(dict.fromkeys([names[0], names[-1]]))
    sizes = [f"{size / 1e9:.2f} GB {part}" for part, size in memory.items()]
    lines = [
        f"models      {', '.join(cfg['model_name'])}",
        f"sources     {n_layers} of width {d_model}: {shown}",
        f"dictionary  {cfg['dict_size']:,} latents, {cfg['activation']}, compute in {cfg['enc_dtype']}",
        f"training    {cfg['num_tokens']:,} tokens in {cfg['num_tokens'] // cfg['batch_size']:,} steps",
        f"memory      {', '.join(sizes)}; {free_memory(cfg['device']) / 1e9:.2f} GB free on {cfg['device']}"]
    if get_ranks()[1] > 1:
        lines[-1] += f", for each of {get_ranks()[1]} ranks"
    if cfg["resume"]:
        lines.insert(0, f"resuming    {cfg['resume']}")
    return "\n".join(lines)


def results(cfg: dict, metrics: dict[str, float], n_layers: int) -> str:
    """evaluate()'s numbers as text, a line a source."""
    names = source_names(cfg, n_layers)
    width = max(len(name) for name in names)
    lines = [f"{'source':<{width}}     FVU  CE delta  (mean-ablated)  norm ratio"]
    for name in [*names, "all"]:
        line = (f"{name:<{width}}  {metrics[f'fvu/{name}']:6.4f}  {metrics[f'ce/delta_{name}']:+8.4f}  "
                f"{metrics[f'ce/ablated_{name}']:+14.4f}")
        if name != "all":
            line += f"  {metrics[f'norm_ratio/{name}']:10.3f}"
        lines.append(line)
    lines.append(f"L0 {metrics['sparsity/l0']:.1f}, dead latents {metrics['sparsity/dead']:.1%}, "
                 f"clean CE {metrics['ce/clean']:.4f}")
    return "\n".join(lines)


def note_start(trainer: Trainer) -> None:
    """Puts cfg.json into a run's folder, and adds to starts.jsonl: time, command line, git commit,
    versions."""
    commit = ""
    if shutil.which("git"):
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    start = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "command": sys.orig_argv,
        "python": sys.version, "commit": commit,
        "versions": {package.name: package.version for package in distributions()}}
    with atomically(trainer.run_dir / "cfg.json") as new:
        new.write_text(json.dumps(trainer.crosscoder.cfg, indent=2) + "\n")
    with open(trainer.run_dir / "starts.jsonl", "a") as file:
        file.write(json.dumps(start) + "\n")


def handle_signals(trainer: Trainer) -> None:
    """Lets SIGINT, SIGTERM and SIGHUP end the training after the step; a second one ends the
    process at once, unless torchrun, which may send two, has started it. SIGUSR1, which schedulers
    send before their limit, has it save and go on."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)

    def stop(number: int, frame) -> None:
        trainer.stop = trainer.stop or KeyboardInterrupt(128 + number)
        if not dist.is_torchelastic_launched():
            for other in numbers:
                signal.signal(other, signal.SIG_DFL)

    def save(number: int, frame) -> None:
        trainer.save_soon = True

    for number in numbers:
        signal.signal(number, stop)
    signal.signal(signal.SIGUSR1, save)


def start(cfg: dict) -> Trainer:
    """Opens models and text and makes a Trainer; says what the run is on stdout and in its folder.
    In a notebook: trainer = start(make_cfg(...)), then trainer.train()."""
    if cfg["init_from"] and not cfg["resume"]:
        cfg |= {"init_from": find_crosscoder("init_from", cfg["init_from"])}
    models = load_models(cfg)
    print(header(cfg, models), flush=True)
    all_tokens = load_tokens(cfg, models)
    text = ", ".join(cfg["tokens"] or cfg["dataset"])
    n_seqs, seq_len = all_tokens.shape
    print(f"text        {text}: {n_seqs:,} sequences of {seq_len} tokens", flush=True)
    trainer = Trainer(cfg, models, all_tokens)
    note_start(trainer)
    return trainer


def join_ranks() -> None:
    """Under torchrun: meets the other ranks, of which the first speaks for all. ValueError where they,
    or a GPU for this one, are not there."""
    if not dist.is_torchelastic_launched():
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    n_gpus = torch.cuda.device_count()
    if n_gpus:
        if local_rank >= n_gpus:
            raise bad("nproc_per_node", os.environ["LOCAL_WORLD_SIZE"], f"this machine has {n_gpus} GPUs")
        torch.cuda.set_device(local_rank)  # what cuda and auto stand for
    try:
        dist.init_process_group(timeout=PATIENCE)
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise bad("rdzv_endpoint", address, f"not all ranks came there ({error!r:.200})") from None
    if dist.get_rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def complain(line: str) -> None:
    """Puts an error on stderr. torchrun ends all ranks when one has ended; what all have found the first
    says, and what only another has are torchrun's own last words."""
    print(line, file=sys.stderr, flush=True)
    if dist.is_torchelastic_launched():
        if get_ranks()[0] > 0:
            time.sleep(3)  # time for the first to end all, if it has found the same
        get_error_handler().record_exception(sys.exception())


def main(argv: list[str]) -> int:
    """One run. -> exit code: 0; 1 where numbers or disk broke down; 2 a user's mistake; 128 and a
    signal's number"""
    start_time = time.time()
    trainer = None
    try:
        join_ranks()
        cfg = make_cfg(**parse_overrides(argv))
        huggingface_hub.logging.set_verbosity_error()  # what it tries again is not an error yet
        tune_allocator()
        trainer = start(cfg)
        first_step = trainer.step_counter
        handle_signals(trainer)
        metrics = trainer.train()
    except ValueError as error:
        complain(f"error: {error}")
        return 2
    except (OSError, FloatingPointError, KeyboardInterrupt, RuntimeError) as error:
        if isinstance(error, RuntimeError) and get_ranks()[1] == 1:
            raise
        advice = "nothing new is saved"
        if trainer is not None and list_checkpoints(trainer.run_dir):
            advice = f"go on with --resume={list_checkpoints(trainer.run_dir)[-1]}"
        if isinstance(error, KeyboardInterrupt):
            print(f"stopped; {advice}", file=sys.stderr)
            return (*error.args, 130)[0]  # 128 and the signal's number
        complain(f"error: {error}; {advice}")
        return 1
    print(results(cfg, metrics, len(trainer.crosscoder.b_dec)))
    seconds = time.time() - start_time
    tokens = (trainer.step_counter - first_step) * cfg["batch_size"]
    print(f"{tokens / seconds:,.0f} tokens/s all in all, {seconds:,.0f} s, "
          f"peak memory {peak_memory(cfg['device']) / 1e9:.2f} GB")
    print(f'load it with: crosscoder = CrossCoder.load("{trainer.run_dir}")')
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
