"""Sparse crosscoders: dictionaries whose latents read from and write to several places of language models.

In reading order: config, files, tokens, activations, crosscoder, buffer, evaluation, trainer, sharing. The
n_layers axis is a list of sources, each one (model, hook point): all layers of GPT-2 Small, a layer of base
and chat.

[O24] Anthropic, Sparse Crosscoders for Cross-Layer Features and Model Diffing, October 2024.
[A24] Anthropic, Circuits Updates, April 2024: how dictionaries are initialised and trained.
[G24] Gao et al., Scaling and evaluating sparse autoencoders, June 2024: TopK and AuxK.
[B24] Bussmann et al., BatchTopK Sparse Autoencoders, December 2024.
[J25] Anthropic, Circuits Updates, January 2025: JumpReLU.
[M25] Minder et al., Overcoming Sparsity Artifacts in Crosscoders, April 2025: BatchTopK crosscoders.
[F25] Anthropic, Insights on Crosscoder Model Diffing, February 2025: latents shared by design.
[N24] Nanda, the published GPT-2 Small acausal crosscoders, 2024: github.com/neelnanda-io/Crosscoders.
"""
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections import namedtuple
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import datasets.fingerprint
import einops
import filelock
import huggingface_hub
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import tqdm
import wandb
from huggingface_hub.constants import HF_HOME
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import AttentionBridge, NormalizationBridge
from transformer_lens.utilities import get_act_name
from transformers.activations import NewGELUActivation

# ---- Config ----------------------------------------------------------------------------------------------
default_cfg = {
    # the run
    "preset": "gpt2-small",  # or tiny, diff, diff-tiny, gelu-1l: what differs from these defaults
    "seed": 51,  # of the initial weights and of the shuffling
    "device": "auto",  # cuda, cuda:1 or cpu; auto is cuda where there is one
    "save_dir": "checkpoints",  # folder in which each run makes its own, version_N
    "save_every": 100_000,  # steps between checkpoints; one is always written at the end
    "keep": 3,  # how many of a run's checkpoints are kept, the newest
    "resume": "",  # what to go on with: a run's folder, one of its checkpoints, or latest: save_dir's newest
    "log_every": 100,  # steps between logged metrics
    "eval_every": 10_000,  # steps between evaluations on the held-out sequences
    "eval_seqs": 64,  # sequences at the end of the tokens that are held out from training
    "dead_after": 10_000_000,  # tokens without firing after which a latent counts as dead
    "wandb_mode": "online",  # online, offline or disabled
    # the sources: n_layers = models x layers
    "model_name": "gpt2",  # hub name or local folder; several with commas between
    "layers": "all",  # all, or layer numbers such as 0,3,6
    "site": "resid_post",  # TransformerLens activation name: resid_mid, mlp_out, attn_out, post, z, ...
    "center": False,  # remove the mean over d_model as [N24] did; for models with LayerNorm only
    "norm": "estimate",  # of norm_factor: on the first buffer; or published: GPT-2's of [N24]
    "model_batch_size": 32,  # sequences in one forward pass of the models
    # the text
    "tokens": "",  # .npy or .pt file of token ids [n_seqs, seq_len], used instead of dataset
    "dataset": "Skylion007/openwebtext@refs/convert/parquet",  # hub name@revision, or local folder of text
    # tokens and dataset can be mixes: a:0.5,b:0.5
    "seq_len": 1024,  # tokens in a sequence, the first of them BOS
    "ignore_tokens": "",  # ids, such as 106,107, at which activations are left out, besides position 0
    # the crosscoder and its training, as published [N24]
    "num_tokens": 1_070_000_000,  # tokens to train on: one row of activations each
    "batch_size": 2048,  # rows in a step
    "buffer_mult": 512,  # batches that the shuffled buffer holds
    "buffer_device": "auto",  # where the buffer is kept; auto is the device
    "dict_size": 2**14,  # latents
    "enc_dtype": "auto",  # compute type, fp32 or bf16; auto is bf16 where that is fast. Weights are fp32
    "loss_weights": "",  # of the squared error at each source, such as 1,1,1,2; empty: all 1
    "activation": "relu",  # which latents are active: relu, topk, batchtopk or jumprelu
    "dec_init_norm": 0.005,  # relu: initial norm of each latent's decoder vector at each source
    "l1_coeff": 2.0,  # relu: sparsity penalty after its warm-up
    "k": 64,  # topk, batchtopk: active latents a token, for batchtopk on average; 8 k at first
    "l0_coeff": 5.0,  # jumprelu: sparsity penalty at the end of training, from 0 at its beginning
    "n_shared": 0,  # several models: latents, the first, with the same decoder vector in all of them [F25]
    "shared_penalty": 0.1,  # relu, jumprelu: share of the sparsity penalty that these pay
    "n_exclusive": 0,  # several models: latents of each, the next, that neither read nor write others
    "aux_coeff": 0.0,  # of the loss that revives dead latents; topk and batchtopk: 1/32
    "lr": 2e-5,  # learning rate of Adam after its warm-up; topk, batchtopk and jumprelu: 2e-4
    "beta1": 0.9,  # of Adam
    "beta2": 0.999,  # of Adam
}
RECIPES = {  # what else differs with the activation [J25], [M25]
    "relu": {}, "topk": {"aux_coeff": 1 / 32, "lr": 2e-4}, "batchtopk": {"aux_coeff": 1 / 32, "lr": 2e-4},
    "jumprelu": {"lr": 2e-4}}
OWN = {"dec_init_norm": ["relu"], "l1_coeff": ["relu"], "k": ["topk", "batchtopk"], "l0_coeff": ["jumprelu"],
       "shared_penalty": ["relu", "jumprelu"]}
TINY = Path(__file__).parent / "tests" / "tiny"
PRESETS = {
    "gpt2-small": {},
    "tiny": {  # a 4-layer model of the King James Bible: the whole main job on a laptop, without a hub
        "model_name": str(TINY / "base"), "tokens": str(TINY / "kjv.npy"), "seq_len": 128, "batch_size": 512,
        "num_tokens": 10**6, "buffer_mult": 128, "model_batch_size": 64, "dict_size": 2048, "lr": 1e-3,
        "dec_init_norm": 0.05, "k": 32, "l0_coeff": 0.15, "dead_after": 10**5, "log_every": 20,
        "eval_every": 500, "wandb_mode": "disabled",
    },
    "diff": {  # what did Gemma 2's tuning add? [M25]
        "model_name": "google/gemma-2-2b,google/gemma-2-2b-it", "layers": "13", "model_batch_size": 4,
        "dataset": "HuggingFaceFW/fineweb:0.5,lmsys/lmsys-chat-1m:0.5", "num_tokens": 2 * 10**8,
        "activation": "batchtopk", "k": 100, "dict_size": 73_728, "lr": 1e-4,
    },
    "gelu-1l": {  # one source: an ordinary sparse autoencoder on the MLP of a one-layer model
        "model_name": "NeelNanda/GELU_1L512W_C4_Code", "layers": "0", "site": "post", "num_tokens": 10**8,
        "dataset": "NeelNanda/c4-code-20k", "lr": 1e-4, "dec_init_norm": 0.1,
    },
}
PRESETS["diff-tiny"] = PRESETS["tiny"] | {  # the same of a model of the Bible, tuned on a dictionary
    "model_name": f"{TINY / 'base'},{TINY / 'tuned'}", "layers": "2", "activation": "batchtopk",
    "n_exclusive": 100, "tokens": f"{TINY / 'kjv.npy'}:0.5,{TINY / 'wordnet.npy'}:0.5"}
NO_HUB = "where there is no hub give a local folder, or preset=tiny"
REMEDIES = {  # by what the error is called or says
    "GatedRepo|a gated dataset": "accept its licence on its page and log in (hf auth login)",
    "RevisionNotFound": "no such revision",
    "RepositoryNotFound|t exist on the Hub":
        "no such name; check it, or log in for what is private (hf auth login)",
    r"KeyError\('conversation'\)": "its rows have no column text, messages or conversation",
    "chat_template": "conversations, and none of the models has a chat template; give a column text"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_SKIPPED = 10  # steps in a row before a run stops
CHOICES = {"preset": tuple(PRESETS), "activation": tuple(RECIPES), "enc_dtype": ("auto", *DTYPES),
           "norm": ("estimate", "published"), "wandb_mode": ("online", "offline", "disabled"),
           "center": ("true", "false")}
MAY_CHANGE = (  # on resume; the text is known by its hash, not by its name
    "resume", "keep", "save_dir", "save_every", "log_every", "eval_every", "wandb_mode", "device",
    "buffer_device", "model_batch_size", "tokens", "dataset", "num_tokens")
LEAST = {  # all others: above zero
    "seed": 0, "l1_coeff": 0, "aux_coeff": 0, "n_shared": 0, "n_exclusive": 0, "seq_len": 2, "buffer_mult": 2}
LISTS = ("model_name", "layers", "loss_weights", "ignore_tokens")  # a space may follow their commas
PUBLISHED_NORMS = (  # E||x|| / sqrt(768) at GPT-2 Small's resid_post without position 0, centred [N24]
    1.8281, 2.0781, 2.2031, 2.4062, 2.5781, 2.8281, 3.1562, 3.6875, 4.3125, 5.4062, 7.875, 16.5)


def bad(key: str, value, remedy: str) -> ValueError:
    """The error for a user's mistake: the key, its value, and what would be right."""
    return ValueError(f"{key}={value!r}: {remedy}")


def explain(error: BaseException | None) -> str:
    """What went wrong with the hub, a file or a dataset, and the remedy, in a line."""
    said = f"{error!r:.200}; {NO_HUB}"
    while error is not None:
        for pattern, remedy in REMEDIES.items():
            if re.search(pattern, repr(error)):
                return remedy
        error = error.__cause__ or error.__context__
    return said


def make_cfg(**overrides) -> dict:
    """The config: default_cfg, then the values of the preset or of the run to resume, then overrides, as text
    or not; 1e8 is a whole number too. Every "auto" is filled in. Read-only afterwards.
    Raises ValueError naming the key, the value and what would be right."""
    for key in overrides.keys() - default_cfg.keys():
        near = difflib.get_close_matches(key, default_cfg, n=1)
        raise ValueError(f"{key}: no such key, " + (f"did you mean {near[0]}?" if near else "see --help"))
    preset = PRESETS[_convert("preset", overrides.get("preset", default_cfg["preset"]))]
    activation = _convert("activation", (default_cfg | preset | overrides)["activation"])
    base = default_cfg | RECIPES[activation] | preset
    if resume := str(overrides.get("resume", "")):
        saved = Path(overrides.get("save_dir", base["save_dir"])).glob("version_*/step_*")
        newest = max(saved, key=lambda folder: folder.stat().st_mtime, default=Path("latest/none"))
        path = newest.parent if resume == "latest" else Path(resume).resolve()
        overrides["resume"], files = read_checkpoint("resume", path, RESUME)
        base |= files["cfg.json"]
    cfg = {k: _convert(k, v) for k, v in (base | overrides).items() if k in default_cfg}
    for key, activations in OWN.items():
        if cfg["activation"] not in activations:
            if key in overrides:
                raise bad(key, overrides[key], f"activation={cfg['activation']} does not use it; it is for "
                          f"activation={' or '.join(activations)}")
            del cfg[key]
    _fill_and_check(cfg)
    for key in cfg.keys() - set(MAY_CHANGE):
        if resume and cfg[key] != base[key]:
            raise bad(key, cfg[key], f"cannot change on resume; {cfg['resume']} has {base[key]!r}")
    return cfg


def _convert(key: str, value):
    """value as the kind of thing that the key's default is; ValueError where it cannot be."""
    kind = type(default_cfg[key])
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if key in CHOICES:
        if text.lower() not in CHOICES[key]:
            raise bad(key, value, f"give one of {', '.join(CHOICES[key])}")
        return text.lower() == "true" if kind is bool else text.lower()
    if kind is str:
        return text.replace(", ", ",") if key in LISTS else text
    below = 1 if key in ("beta1", "beta2") else math.inf
    with suppress(ValueError, OverflowError):
        number = kind(float(text))
        if number == float(text) and LEAST.get(key, 1e-300) <= number < below:
            return number
    least = f"of at least {LEAST[key]}" if key in LEAST else "above 0" + " and below 1" * (below == 1)
    raise bad(key, value, f"give a {'whole ' * (kind is int)}number {least}, such as {default_cfg[key]}")


def _fill_and_check(cfg: dict) -> None:
    """Fills in every "auto"; ValueError for what does not go together, or with this machine."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    for key in ("device", "buffer_device"):
        if cfg[key] == "auto":
            cfg[key] = best if key == "device" else cfg["device"]
        try:
            device = re.match("(?:cuda|cpu).*", cfg[key])[0]  # no other is tested
            cfg[key] = str(torch.empty(1, device=device).device)  # cuda is cuda:0
        except (RuntimeError, AssertionError, TypeError):
            raise bad(key, cfg[key], f"not on this machine; give auto, or {best}") from None
    cuda, cpu = cfg["device"].startswith("cuda"), getattr(torch.cpu, "get_capabilities", dict)()
    fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else (
        cfg["device"] == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16")))
    if cfg["enc_dtype"] == "auto":
        cfg["enc_dtype"] = "bf16" if fast_bf16 else "fp32"
    if cfg["enc_dtype"] == "bf16" and cuda and not fast_bf16:
        raise bad("enc_dtype", "bf16", "this GPU has no bf16 arithmetic; give fp32")
    if cfg["layers"] != "all" and not all(layer.isdigit() for layer in cfg["layers"].split(",")):
        raise bad("layers", cfg["layers"], "give all, or layer numbers such as 0,3,6")
    if cfg.get("k", 1) > cfg["dict_size"]:
        raise bad("k", cfg["k"], f"more than dict_size={cfg['dict_size']}")
    if not re.fullmatch(r"(\d*\.?\d+(,\d*\.?\d+)*)?", cfg["loss_weights"]):
        raise bad("loss_weights", cfg["loss_weights"], "give a number for each source, such as 1,1,1,2")
    if not re.fullmatch(r"(\d+(,\d+)*)?", cfg["ignore_tokens"]):
        raise bad("ignore_tokens", cfg["ignore_tokens"], "give token ids, such as 106,107")
    n_models = len(cfg["model_name"].split(","))
    for key in ("n_shared", "n_exclusive"):
        if cfg[key] and (n_models == 1 or cfg["n_shared"] + n_models * cfg["n_exclusive"] > cfg["dict_size"]):
            raise bad(key, cfg[key], f"takes several models, and room in dict_size={cfg['dict_size']}")
    if cfg["num_tokens"] < cfg["batch_size"]:
        raise bad("num_tokens", cfg["num_tokens"], f"less than one batch_size={cfg['batch_size']}")
    for key, value in (("model_name", "gpt2"), ("site", "resid_post"), ("center", True)):
        if cfg["norm"] == "published" and cfg[key] != value:
            raise bad("norm", "published", f"made for {key}={value}; give that, or norm=estimate")
    if cfg["center"] and not re.fullmatch("resid_.*|.*_out", cfg["site"]):
        raise bad("center", True, f"{cfg['site']} is not in the residual stream; give false")


# ---- Files -----------------------------------------------------------------------------------------------
RESUME = ("cfg.json", "crosscoder.safetensors", "trainer.safetensors", "trainer.json")


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path to write a file or a folder at; it becomes `path` once it is whole and on the disk.
    A file that was there is replaced. OSError where a folder was, which stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield (new := Path(folder) / path.name)
        for each in (*new.glob("*"), new):
            _flush(each)
        new.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _identity(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(np.memmap(path, mode="r")).hexdigest()}


def list_checkpoints(run: Path) -> list[Path]:
    """The folders step_N in a run's folder, by N."""
    steps = (each for each in run.glob("step_*") if each.name[5:].isdigit())
    return sorted(steps, key=lambda each: int(each.name[5:]))


def read_checkpoint(key: str, path: Path, names: tuple) -> tuple[Path, dict[str, dict]]:
    """A checkpoint, `path` or the newest undamaged one in a run's folder: the folder and its files of these
    names, which are data and never code. ValueError, naming the key, where there is none."""
    folders = list_checkpoints(path) or [path]
    while folders:
        folder, files = folders.pop(), {}
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            for name in names:
                if manifest.get(name) != _identity(folder / name):
                    raise ValueError(f"{name} is not as in manifest.json")
                if name.endswith(".safetensors"):  # copied, as tensors in a file are not aligned
                    tensors = safetensors.torch.load_file(folder / name)
                    files[name] = {key: tensor.clone() for key, tensor in tensors.items()}
                else:  # where {"tensor": key} stands for a tensor, see CrossCoder.save
                    files[name] = json.loads((folder / name).read_text(), object_hook=lambda value: (
                        files["trainer.safetensors"][value["tensor"]] if "tensor" in value else value))
            return folder, files
        except Exception as error:
            problem = bad(key, str(folder), f"no checkpoint, or a damaged one ({error})")
            if folders:
                print(f"{problem}; trying the one before", file=sys.stderr)
    raise problem


def open_run(cfg: dict) -> tuple[Path, filelock.FileLock]:
    """The folder of the run to resume, or a new one: save_dir/version_N, N the first number that no run has
    taken; and a lock on it. ValueError where it cannot be written, or another process trains there."""
    folder, resumed = Path(cfg["resume"]).parent, Path(cfg["resume"]).name.startswith("step_")
    try:
        for n in () if resumed else itertools.count():
            with suppress(FileExistsError):
                (folder := Path(cfg["save_dir"], f"version_{n}")).mkdir(parents=True)
                break
        lock = filelock.FileLock(folder / ".lock", blocking=False, is_singleton=True)
        lock.acquire()
        for left in folder.glob(".step_*"):  # where a process died while writing
            shutil.rmtree(left)
    except filelock.Timeout:
        raise bad("resume", cfg["resume"], f"another run is at work in {folder}") from None
    except OSError as error:
        raise bad("save_dir", cfg["save_dir"], f"cannot write in {folder} ({error.strerror})") from None
    return folder, lock


# ---- Tokens ----------------------------------------------------------------------------------------------
def load_tokens(cfg: dict, tokenizer) -> Int[Tensor, "n_seqs seq_len"]:
    """The text as token ids: the file cfg["tokens"], or cfg["dataset"] by way of a cache, memory-mapped.
    Of a mix a:0.5,b:0.5 in memory, rows of each in turn throughout, until those of one are used up.
    Raises ValueError where there is nothing that the models can be run on."""
    key = "tokens" if cfg["tokens"] else "dataset"
    names, _, shares = zip(*(part.rpartition(":") for part in cfg[key].split(",")))
    if len(names) == 1:
        return _load_tokens(cfg, tokenizer)
    try:
        shares = np.array(shares, float)
        assert (shares > 0).all() and np.isfinite(shares := shares / shares.sum()).all()
    except (ValueError, AssertionError):
        raise bad(key, cfg[key], "give each part of a mix its share, such as a:0.5,b:0.5") from None
    loaded = [_load_tokens({**cfg, key: name}, tokenizer, share) for name, share in zip(names, shares)]
    if len({tokens.dtype for tokens in loaded}) > 1:
        loaded = [tokens.int() for tokens in loaded]
    rows = [int(share * min(len(t) / s for t, s in zip(loaded, shares))) for share in shares]
    turns = np.concatenate([(np.arange(n) + 0.5) / share for n, share in zip(rows, shares)])
    return torch.cat([tokens[:n] for tokens, n in zip(loaded, rows)])[np.argsort(turns, kind="stable")]


def _load_tokens(cfg: dict, tokenizer, share: float = 1.0) -> Int[Tensor, "n_seqs seq_len"]:
    if not cfg["tokens"]:
        return _tokenise(cfg, tokenizer, share)
    path = Path(cfg["tokens"])
    try:
        if path.suffix == ".pt":
            tokens = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        else:
            tokens = torch.from_numpy(np.load(path, mmap_mode="c"))
        if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point():
            raise ValueError(f"it holds {tokens.dtype} {list(tokens.shape)}")
        smallest, largest = tokens.numpy().min(), tokens.numpy().max()
    except Exception as error:
        raise bad("tokens", str(path), f"give ids [n_seqs, seq_len], .npy or .pt ({error!r:.200})") from None
    if tokens.shape[1] != cfg["seq_len"]:
        raise bad("tokens", str(path), f"has rows of {tokens.shape[1]} tokens; set seq_len={tokens.shape[1]}")
    if smallest < 0 or largest >= len(tokenizer):
        raise bad("tokens", str(path), f"ids {smallest} to {largest} are not all in the vocabulary of "
                  f"{len(tokenizer)}; tokenise the text with the tokenizer of {cfg['model_name']}")
    return tokens


def _get_text(row: dict, tokenizer) -> str:
    if "text" in row:
        return row["text"] or ""
    chat = tokenizer.apply_chat_template(row.get("messages") or row["conversation"], tokenize=False)
    return chat.removeprefix(tokenizer.bos_token or "")


def _tokenise(cfg: dict, tokenizer, share: float) -> Int[Tensor, "n_seqs seq_len"]:
    """A dataset's share of what the run needs. Rows are added to a cache, which goes on where an earlier run,
    cut off or with fewer tokens, left it. A row is BOS and then a piece of the documents laid end to end, EOS
    after each; what is a conversation as the chat template has it, of the first model with one."""
    (name, _, revision), width = cfg["dataset"].partition("@"), cfg["seq_len"] - 1
    n_rows = cfg["num_tokens"] + cfg["batch_size"] * cfg["buffer_mult"]  # the buffer reads ahead
    n_seqs = math.ceil(share * (math.ceil(n_rows / width) + cfg["eval_seqs"]))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    bos, eos = (eos if bos is None else bos), (bos if eos is None else eos)
    files = sorted((str(file), file.stat().st_mtime_ns) for file in Path(name).glob("**/*"))  # none on a hub
    whole_files = {"sample_by": "document"} if any(file.endswith(".txt") for file, _ in files) else {}
    spelling = [tokenizer.get_vocab(), tokenizer.chat_template]
    identity = datasets.fingerprint.Hasher.hash([name, revision, files, cfg["seq_len"], bos, eos, spelling])
    cache = Path(HF_HOME, "crosscoder_tokens", identity)
    dtype = np.dtype("uint16" if len(tokenizer) <= 2**16 else "int32")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / ".lock"), open(cache / "rows.bin", "ab") as file:
            done = {"rows": 0, "rest": [], "dataset": None, "ended": False}
            with suppress(FileNotFoundError):
                done = json.loads((cache / "done.json").read_text())
            file.truncate(done["rows"] * cfg["seq_len"] * dtype.itemsize)
            if not (finished := done["rows"] >= n_seqs or done["ended"]):
                stream = datasets.load_dataset(
                    name, revision=revision or None, split="train", streaming=True, **whole_files)
                stream.load_state_dict(done["dataset"] or stream.state_dict())
                texts = (_get_text(row, tokenizer) for row in stream)
            with tqdm.tqdm(desc="tokenising", total=n_seqs, initial=done["rows"], unit="tok",
                           unit_scale=cfg["seq_len"], disable=finished) as bar:
                while done["rows"] < n_seqs and not done["ended"]:
                    batch = list(itertools.islice(texts, 1024))
                    ids = batch and tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
                    rest = [np.array(done["rest"], dtype), *(np.array([*i, eos], dtype) for i in ids)]
                    rest = np.concatenate(rest)
                    rows = rest[: len(rest) // width * width].reshape(-1, width)
                    np.pad(rows, ((0, 0), (1, 0)), constant_values=bos).tofile(file)
                    file.flush()
                    os.fsync(file)
                    done = {"rows": done["rows"] + len(rows), "rest": rest[rows.size :].tolist(),
                            "dataset": stream.state_dict(), "ended": not ids}
                    with atomically(cache / "done.json") as temporary:
                        temporary.write_text(json.dumps(done))
                    bar.update(len(rows))
        if not done["rows"]:
            raise ValueError(f"less text than one sequence of seq_len={cfg['seq_len']}")
        rows = np.memmap(cache / "rows.bin", dtype, "c", shape=(done["rows"], cfg["seq_len"]))
        return torch.from_numpy(rows)[:n_seqs]
    except Exception as error:
        raise bad("dataset", cfg["dataset"], f"cannot be tokenised: {explain(error)}") from None


# ---- Activations -----------------------------------------------------------------------------------------
Source = namedtuple("Source", "model layer hook")  # which of the models, which layer, the hook point's name


def get_sources(models: list, cfg: dict) -> list[Source]:
    """The sources along the n_layers axis: model by model, layer by layer. ValueError for one not there."""
    sources = []
    for m, model in enumerate(models):
        every = range(model.cfg.n_layers)
        for layer in every if cfg["layers"] == "all" else map(int, cfg["layers"].split(",")):
            hook = get_act_name(cfg["site"], layer)
            if layer not in every:
                raise bad("layers", cfg["layers"], f"the layers are {every[0]} to {every[-1]}")
            if hook not in model.hook_dict:
                raise bad("site", cfg["site"], f"no {hook} here; give resid_post, mlp_out, post, z, ...")
            sources.append(Source(m, layer, hook))
    return sources


def source_names(cfg: dict, n_layers: int) -> list[str]:
    """A short name for each source, such as resid_post.3 or chat:resid_post.3; needs no model."""
    models = [Path(name).name for name in cfg["model_name"].split(",")]
    layers = range(n_layers // len(models)) if cfg["layers"] == "all" else cfg["layers"].split(",")
    numbers = [f"{m}_" * (models.count(model) > 1) for m, model in enumerate(models)]
    return [f"{number}{model}:" * (len(models) > 1) + f"{cfg['site']}.{layer}"
            for number, model in zip(numbers, models) for layer in layers]


def is_used(tokens: Int[Tensor, "..."], cfg: dict) -> Bool[Tensor, "..."]:
    """Whether activations at these tokens are used: all but cfg["ignore_tokens"]."""
    ignored = [int(number) for number in cfg["ignore_tokens"].split(",") if number]
    return ~torch.isin(tokens.long(), torch.tensor(ignored, device=tokens.device).long())


@torch.no_grad()
def get_stacked_resids(models: list, tokens: Int[Tensor, "batch pos"], cfg: dict) -> Float[
        Tensor, "batch pos n_layers d_model"]:
    """Runs the models on tokens and stacks the activations of all sources, position 0 included, zeros at the
    end of those that are narrower than d_model. Sites with heads are flattened. Nothing above a model's last
    source is computed, so no logits either."""
    sources, tokens, seen, resids = get_sources(models, cfg), tokens.to(cfg["device"]).long(), set(), None
    for m, model in enumerate(models):
        mine = {i: source.hook for i, source in enumerate(sources) if source.model == m}

        def keep(act, hook, i):
            nonlocal resids
            if act.shape[:2] != tokens.shape:
                raise bad("site", cfg["site"], f"{sources[i].hook}: {list(act.shape)}, not [batch, pos, ...]")
            act = act.flatten(2)
            act = act - act.mean(-1, keepdim=True) if cfg["center"] else act
            if resids is None:
                resids = act.new_empty(*tokens.shape, len(sources), act.shape[2])
            if (more := act.shape[2] - resids.shape[3]) > 0:  # narrower ones end in zeros
                resids = F.pad(resids, (0, more))
            resids[:, :, i, : act.shape[2]], resids[:, :, i, act.shape[2] :] = act, 0
            seen.add(i)
            if mine.keys() <= seen:
                raise StopIteration  # nothing above the last source is needed

        with suppress(StopIteration):
            model.run_with_hooks(
                tokens, return_type=None, fwd_hooks=[(hook, partial(keep, i=i)) for i, hook in mine.items()])
            raise bad("site", cfg["site"], f"{list(mine.values())} not seen; open the models with this cfg")
    return resids


def get_widths(x: Float[Tensor, "rows n_layers d_model"]) -> Int[Tensor, "n_layers"]:
    """Of each source, without the zeros that narrower ones end in."""
    used = (x != 0).any(0)
    return (used * torch.arange(1, x.shape[2] + 1, device=x.device)).amax(-1)


def load_models(cfg: dict) -> list[TransformerBridge]:
    """Opens the models of cfg["model_name"], each once, in the compute type. ValueError where one cannot be
    opened or is too short for seq_len, a source does not exist, or tokenizers or sources' widths differ."""
    names, opened = cfg["model_name"].split(","), {}
    for name in dict.fromkeys(names):
        try:
            opened[name] = TransformerBridge.boot_transformers(
                name, device=cfg["device"], dtype=DTYPES[cfg["enc_dtype"]])
            opened[name].original_model.config.use_cache = False  # keys and values that nobody would read
        except Exception as error:
            raise bad("model_name", name, f"cannot be opened: {explain(error)}") from None
    models = [opened[name] for name in names]
    for name, model in zip(names, models):
        if cfg["seq_len"] > (model.cfg.n_ctx or math.inf):
            raise bad("seq_len", cfg["seq_len"], f"the context of {name} is {model.cfg.n_ctx}")
        if cfg["center"] and model.cfg.normalization_type != "LN":
            raise bad("center", True, f"{name} has no LayerNorm: its mean over d_model matters; give false")
        if differ := sorted(model.tokenizer.get_vocab().items() ^ models[0].tokenizer.get_vocab().items()):
            raise bad("model_name", cfg["model_name"], "models must share a tokenizer; those of "
                      f"{names[0]} and {name} differ in {len(differ)} entries, first {differ[0][0]!r}")
        if cfg["layers"] == "all" and model.cfg.n_layers != models[0].cfg.n_layers:
            raise bad("layers", "all", f"{names[0]} and {name} differ in their number; give layer numbers")
        models[0].tokenizer.chat_template = models[0].tokenizer.chat_template or model.tokenizer.chat_template
    get_stacked_resids(models, torch.zeros(1, 2), cfg)  # raises where the sources do not fit together
    for model in opened.values():
        _fuse(model, cfg)
    return models


def _fuse(model: TransformerBridge, cfg: dict) -> None:
    """Puts the model's own fused attention and normalisation back, which TransformerLens takes apart so that
    hooks inside them fire: where no source is inside, and as long as the activations stay close."""
    own, config = model.original_model, model.original_model.config
    hooks = {model.hook_dict[source.hook] for source in get_sources([model], cfg)}
    tokens = torch.randint(model.cfg.d_vocab, (1, cfg["seq_len"]), generator=torch.Generator().manual_seed(0))
    wanted = get_stacked_resids([model], tokens, cfg)[:, 1:].float()
    sdpa = own._supports_sdpa and not getattr(config, "attn_logit_softcapping", None)  # which it cannot do
    kinds = (NormalizationBridge, AttentionBridge) if sdpa else NormalizationBridge
    fused = {part: part.original_component.forward for part in own.modules()
             if isinstance(part, kinds) and hooks.isdisjoint(part.modules())}
    fused |= {part: partial(F.gelu, approximate="tanh") for part in own.modules()
              if isinstance(part, NewGELUActivation)}
    try:
        if sdpa:
            config._attn_implementation, config.output_attentions = "sdpa", False
        for part, forward in fused.items():  # vars: an attribute set on a bridge would go to what it wraps
            vars(part)["forward"] = forward
        error = (get_stacked_resids([model], tokens, cfg)[:, 1:] - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        if not error.mean() < torch.finfo(DTYPES[cfg["enc_dtype"]]).eps ** 0.5:  # 9% in bf16
            raise ArithmeticError
    except Exception:
        config._attn_implementation, config.output_attentions = "eager", True
        for part in fused:
            vars(part).pop("forward", None)


# ---- CrossCoder ------------------------------------------------------------------------------------------
class LossOutput(NamedTuple):
    """Losses of a batch, in the normalised space; l2_loss + the sparsity coefficient * l1_loss + aux_loss is
    what training minimises."""
    l2_loss: Float[Tensor, ""]  # squared error, summed over sources and d_model, mean over the batch
    l1_loss: Float[Tensor, ""]  # sum_i acts_i sum_l ||W_dec_i^l|| [O24], for jumprelu of tanh(4 ...) [J25]
    aux_loss: Float[Tensor, ""]  # what keeps latents alive, times its coefficient: AuxK, pre-activation loss
    l0_loss: Float[Tensor, ""]  # active latents, mean over the batch
    fvu: Float[Tensor, ""]  # squared error / squared distance from the batch's mean, over all sources
    fired: Int[Tensor, "d_sae"]  # rows of the batch in which each latent is active


class _Product(torch.autograd.Function):
    """x @ W in the type of x, W cast once, and where W has three axes its norms over the last: in one place,
    as the gradients of both are then summed in place, without a second W."""
    @staticmethod
    def forward(ctx, x, W):  # [batch, ...] of n in all, [n, m] or [n, n_layers, d_model]
        cast, norms = W.flatten(1).to(x.dtype), W.norm(dim=-1) if W.ndim == 3 else None
        ctx.save_for_backward(x, W, norms, cast if ctx.needs_input_grad[0] else None)
        return x.flatten(1) @ cast, norms  # [batch, m or n_layers * d_model], [n, n_layers]

    @staticmethod
    def backward(ctx, grad, grad_norms):
        x, W, norms, cast = ctx.saved_tensors
        x_T = x.movedim(0, -1).contiguous().flatten(0, -2)  # [n, batch]; contiguous is faster on CPUs
        grad_W = (x_T @ grad).float().view_as(W)
        if norms is not None:
            grad_W.addcmul_(W, (grad_norms / norms.clamp(min=1e-30))[..., None])  # 0 where the norm is 0
        return None if cast is None else (grad @ cast.T).view_as(x), grad_W


class CrossCoder(nn.Module):
    """A sparse crosscoder. Takes raw activations and gives raw reconstructions, always.
    The weights are fp32, for the normalised space, where source l is divided by norm_factor[l]. The matrix
    products are computed in cfg["enc_dtype"]."""
    sparse_from = 64  # latents for each that is active, where a sparse decoding is faster: README.md, Speed

    def __init__(self, cfg: dict, n_layers: int, d_model: int):
        super().__init__()
        self.cfg, self.dtype, self.activation = cfg, DTYPES[cfg["enc_dtype"]], cfg["activation"]
        generator = torch.Generator().manual_seed(cfg["seed"])
        self.n_models = len(cfg["model_name"].split(","))  # alike in all models at first:
        W_dec = torch.randn(cfg["dict_size"], n_layers // self.n_models, d_model, generator=generator)
        W_dec = W_dec.repeat(1, self.n_models, 1)
        # unlike [A24]: as in [N24] each source's vector has the given norm, not all of them laid end to end
        W_dec *= cfg.get("dec_init_norm", 3**-0.5 / n_layers) / W_dec.norm(dim=-1, keepdim=True)  # or [J25]
        W_enc = einops.rearrange(W_dec, "d_sae n_layers d_model -> n_layers d_model d_sae").contiguous()
        self.W_enc: Float[Tensor, "n_layers d_model d_sae"] = nn.Parameter(W_enc)
        self.W_dec: Float[Tensor, "d_sae n_layers d_model"] = nn.Parameter(W_dec)
        self.b_enc: Float[Tensor, "d_sae"] = nn.Parameter(torch.zeros(cfg["dict_size"]))
        self.b_dec: Float[Tensor, "n_layers d_model"] = nn.Parameter(torch.zeros(n_layers, d_model))
        self.norm_factor: Float[Tensor, "n_layers"] = nn.Buffer(torch.ones(n_layers))
        self.threshold: Float[Tensor, ""] = nn.Buffer(torch.zeros(()))  # of scores; batchtopk's is not zero
        if self.activation == "jumprelu":
            self.log_threshold: Float[Tensor, "d_sae"] = nn.Parameter(self.b_enc.detach() + 0.1)  # [J25]
        weights = [float(weight) for weight in cfg["loss_weights"].split(",") if weight] or [1.0] * n_layers
        if len(weights) != n_layers:
            raise bad("loss_weights", cfg["loss_weights"], f"there are {n_layers} sources")
        self.loss_weights: Float[Tensor, "n_layers"] = nn.Buffer(torch.tensor(weights), persistent=False)
        self.penalty: Float[Tensor, "d_sae"] = nn.Buffer(torch.ones(cfg["dict_size"]), persistent=False)
        self.penalty[: cfg["n_shared"]] = cfg.get("shared_penalty", 1.0)
        self.to(cfg["device"])
        self._constrain(self.W_enc.data.movedim(2, 0), 0)
        self._constrain(self.W_dec.data, 0)
        if cfg["n_shared"] or cfg["n_exclusive"]:  # so are the gradients, and so nothing leaves the subspace
            self.W_enc.register_post_accumulate_grad_hook(lambda W: self._constrain(W.grad.movedim(2, 0), 0))
            self.W_dec.register_post_accumulate_grad_hook(lambda W: self._constrain(W.grad, cfg["n_shared"]))

    @torch.no_grad()
    def _constrain(self, W: Float[Tensor, "d_sae n_layers d_model"], n_tied: int) -> None:
        """Makes the first n_tied latents alike in all models, and exclusive ones zero in the others."""
        W, first = W.unflatten(1, (self.n_models, -1)), self.cfg["n_shared"]
        W[:n_tied] = W[:n_tied].mean(1, keepdim=True)
        for m in range(self.n_models):
            mine, first = W[first : first + self.cfg["n_exclusive"]], first + self.cfg["n_exclusive"]
            mine[:, :m] = mine[:, m + 1 :] = 0

    def encode(self, x: Float[Tensor, "... n_layers d_model"]) -> Float[Tensor, "... d_sae"]:
        """Raw activations to latent activations, in the compute type. A row's do not depend on other rows."""
        h = self._pre_acts(x / self.norm_factor[:, None])
        if self.activation == "topk":
            return self._keep(h, self.cfg["k"])[0].view(*x.shape[:-2], -1)
        return (h * (h > self.get_thresholds())).view(*x.shape[:-2], -1)

    def _pre_acts(self, x: Float[Tensor, "... n_layers d_model"]) -> Float[Tensor, "rows d_sae"]:
        W_enc = einops.rearrange(self.W_enc, "n_layers d_model d_sae -> (n_layers d_model) d_sae")
        h, _ = _Product.apply(x.reshape(-1, *x.shape[-2:]).to(self.dtype), W_enc)
        return h + self.b_enc.to(self.dtype)

    @torch.no_grad()
    def get_thresholds(self) -> Float[Tensor, "d_sae"]:
        """What each latent's pre-activation must exceed; with topk it must be among the k largest besides."""
        if self.activation == "jumprelu":
            return self.log_threshold.exp()
        if self.activation == "batchtopk":
            return self.threshold / self.get_decoder_norms()
        return torch.zeros_like(self.b_enc)

    @torch.no_grad()
    def get_decoder_norms(self) -> Float[Tensor, "d_sae"]:
        """sum_l ||W_dec_i^l||. A latent's score is its activation times this [M25]: one that does not change
        where its encoder is scaled up and its decoder down."""
        return self.W_dec.norm(dim=-1).sum(-1)

    def _keep(self, h: Float[Tensor, "rows d_sae"], k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keeps the k largest scores of each row, for batchtopk those of all rows, k a row on average.
        -> acts [rows, d_sae]; where in acts.flatten() they are, row by row; their scores, both [rows * k]"""
        # unlike [B24]: no row keeps more than 8 k, which takes a third of the time on a CPU
        most = min(h.shape[1], k * 8 if self.activation == "batchtopk" else k)
        scores, latents = (F.relu(h.detach()) * self.get_decoder_norms()).topk(most, sorted=False)
        places = (latents + torch.arange(len(h), device=h.device)[:, None] * h.shape[1]).flatten()
        if self.activation == "batchtopk":
            scores, chosen = scores.flatten().topk(k * len(h), sorted=False)
            places = places[chosen].sort().values
        return F.relu(h) * torch.zeros_like(h).view(-1).index_fill_(0, places, 1).view_as(h), places, scores

    def _jump(self, h: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """JumpReLU in fp32, with its straight-through gradient [J25]."""
        threshold = self.log_threshold.exp()
        band = ((h.detach() - threshold) / 2).clamp(-0.5, 0.5)  # whose gradient stands for that of the jump
        return h * (h > threshold) + (band - band.detach())

    def decode(self, acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... n_layers d_model"]:
        """Latent activations to raw reconstructions, in fp32."""
        x_hat, _ = _Product.apply(acts.reshape(-1, acts.shape[-1]).to(self.dtype), self.W_dec)
        return (x_hat.view(*acts.shape[:-1], *self.b_dec.shape) + self.b_dec) * self.norm_factor[:, None]

    def forward(self, x: Float[Tensor, "... n_layers d_model"]) -> Float[Tensor, "... n_layers d_model"]:
        """Raw activations to raw reconstructions."""
        return self.decode(self.encode(x))

    def get_losses(self, x: Float[Tensor, "batch n_layers d_model"], k: int | None = None,
                   dead: Int[Tensor, "n_dead"] | None = None) -> LossOutput:
        """The losses on a batch of raw activations [O24], with k for cfg["k"], and dead latents to revive."""
        x = x.float() / self.norm_factor[:, None]
        h, k = self._pre_acts(x), k or self.cfg.get("k")
        if k:
            acts, places, scores = self._keep(h, k)
        else:
            acts = F.relu(h) if self.activation == "relu" else self._jump(h)
        if k and self.sparse_from * k <= h.shape[1]:
            rows = torch.arange(0, h.numel(), h.shape[1], device=h.device)
            x_hat, norms = F.embedding_bag(
                places % h.shape[1], self.W_dec.flatten(1), torch.searchsorted(places, rows), mode="sum",
                per_sample_weights=acts.flatten()[places].float()), self.get_decoder_norms()
        else:
            x_hat, norms = _Product.apply(acts.to(self.dtype), self.W_dec)
            norms = norms.sum(-1)
        error = x_hat.view_as(x) + self.b_dec - x
        errors = error.pow(2).sum((0, 2)) / len(x)  # [n_layers]
        if self.activation == "jumprelu":
            l1_loss = ((4 * acts * norms).tanh() @ self.penalty).sum() / len(x)  # 4, 3e-6, 2 in _jump: [J25]
            aux_loss = 3e-6 * (F.relu(self.log_threshold.exp() - h) * norms).sum() / len(x)
        else:
            l1_loss = (acts.sum(0, dtype=torch.float32) * norms) @ self.penalty / len(x)
            aux_loss = h.new_zeros(())
        if self.activation == "batchtopk":
            lowest = scores.where(scores > 0, math.inf).min()
            self.threshold.lerp_(lowest.where(lowest.isfinite(), self.threshold), 0.01)
        fired = (acts > 0).sum(0, dtype=torch.int32)
        variance = x.norm(dim=-1).pow(2).sum() / len(x) - x.mean(0).pow(2).sum()
        if dead is not None and len(dead):  # [G24] has both losses relative to a variance
            missed = self._aux_k(h[:, dead], self.W_dec[dead], error.detach())
            aux_loss = aux_loss + self.cfg["aux_coeff"] * missed * variance
        return LossOutput((errors * self.loss_weights).sum(), l1_loss, aux_loss, fired.sum() / len(x),
                          errors.detach().sum() / variance, fired)

    def _aux_k(self, h: Float[Tensor, "batch n_dead"], W_dec: Float[Tensor, "n_dead n_layers d_model"],
               error: Float[Tensor, "batch n_layers d_model"]) -> Float[Tensor, ""]:
        """What the d_model / 2 [M25] dead latents with the largest scores leave of the error, relative to its
        variance [G24]."""
        scores = h.detach() * W_dec.detach().norm(dim=-1).sum(-1)
        lowest = scores.topk(min(h.shape[1], error.shape[2] // 2), sorted=False).values.amin(1, keepdim=True)
        # unlike [G24]: not rectified, as a latent that is nowhere positive would get no gradient
        error_hat, _ = _Product.apply(h * (scores >= lowest), W_dec)
        variance = (error - error.mean(0)).pow(2).sum().clamp(min=1e-30)
        return (error_hat.view_as(error) + error).pow(2).sum() / variance

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "rows n_layers d_model"]) -> None:
        """Starts from raw activations. But for relu b_dec makes the mean error 0, pre-activations have mean
        0, jumprelu's exceed the threshold on a tenth, and the encoder's scale is the best: FVU < 1."""
        used = torch.arange(x.shape[2], device=x.device) < get_widths(x)[:, None]  # what is not stays 0
        if self.cfg["n_shared"] and not used.all():
            raise bad("n_shared", self.cfg["n_shared"], "these models differ in width; give 0")
        self.W_dec *= used
        self.W_enc *= used[..., None]
        if self.activation == "relu":
            return
        y, threshold = x.float() / self.norm_factor[:, None], self.get_thresholds()
        self.b_dec.copy_(y.mean(0))
        h = self._pre_acts(y).float()
        low = h.topk(math.ceil(len(h) / 10), dim=0).values[-1] if self.activation == "jumprelu" else h.mean(0)
        self.b_enc.copy_(threshold - low)
        self.fit_threshold([x])
        y_hat = self(x) / self.norm_factor[:, None]
        y_hat -= y_hat.mean(0)
        scale = ((y - self.b_dec) * y_hat).sum() / y_hat.pow(2).sum()
        self.W_enc *= scale
        self.b_enc.copy_(threshold - scale * low)
        self.fit_threshold([x])
        self.b_dec += ((x - self(x)) / self.norm_factor[:, None]).mean(0)

    @torch.no_grad()
    def fit_threshold(self, batches: Iterable[Float[Tensor, "rows n_layers d_model"]]) -> None:
        """Sets batchtopk's threshold to what keeps k latents a row in a batch, mean over raw activations."""
        for n, x in enumerate(batches if self.activation == "batchtopk" else (), start=1):
            scores = self._keep(self._pre_acts(x.float() / self.norm_factor[:, None]), self.cfg["k"])[2]
            self.threshold.lerp_(scores.min(), 1 / n)

    @torch.no_grad()
    def fold(self) -> dict[str, Tensor]:
        """Plain weights for raw activations: h = x . W_enc + b_enc, acts = h * (h > thresholds), with topk
        only the k largest h * decoder_norms of them, x_hat = acts . W_dec + b_dec."""
        factor = self.norm_factor[:, None]  # [n_layers, 1]
        return {"W_enc": self.W_enc / factor[..., None], "W_dec": self.W_dec * factor,
                "b_enc": self.b_enc.clone(), "b_dec": self.b_dec * factor,
                "thresholds": self.get_thresholds(), "decoder_norms": self.get_decoder_norms()}

    def save(self, path: str | Path, state: dict = {}) -> None:
        """Writes a checkpoint, whole or not at all: the folder `path` with crosscoder.safetensors, cfg.json,
        values of a nested state in trainer.json, its tensors in trainer.safetensors, and manifest.json.
        OSError where it cannot be written, or is there already."""
        tensors = {}

        def in_json(tensor: Tensor) -> dict:  # what stands for it
            tensors[name := str(len(tensors))] = tensor
            return {"tensor": name}

        with atomically(Path(path)) as folder:
            folder.mkdir()
            (folder / "cfg.json").write_text(json.dumps(self.cfg, indent=2) + "\n")
            safetensors.torch.save_file(self.state_dict(), folder / "crosscoder.safetensors")
            if state:
                (folder / "trainer.json").write_text(json.dumps(state, default=in_json))
                safetensors.torch.save_file(tensors, folder / "trainer.safetensors")
            manifest = {file.name: _identity(file) for file in folder.iterdir()}
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "CrossCoder":
        """Opens a checkpoint folder, or the newest in a run's folder; needs no language model and no network.
        Raises ValueError where there is none, or it is damaged or something else."""
        folder, files = read_checkpoint("path", Path(path), RESUME[:2])
        try:
            cfg, weights = (files[name] for name in RESUME[:2])
            n_layers, d_model, dict_size = weights["W_enc"].shape
            crosscoder = cls({**cfg, "dict_size": dict_size, "device": device}, n_layers, d_model)
            crosscoder.load_state_dict(weights)
        except Exception as error:
            raise bad("path", str(folder), f"it holds no crosscoder: {error!r:.200}") from None
        return crosscoder

    @classmethod
    def from_hub(cls, repo_id: str, revision: str | None = None, device: str = "cpu") -> "CrossCoder":
        """load, of what push_to_hub has put on the hub under this name. Raises ValueError where it cannot."""
        try:
            path = huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=[*RESUME[:2], "manifest.json"])
        except Exception as error:
            raise bad("repo_id", repo_id, explain(error)) from None
        return cls.load(path, device)


# ---- Buffer ----------------------------------------------------------------------------------------------
class Buffer:
    """The shuffled activation buffer: runs the models over all_tokens and serves activations in random order.
    It holds batch_size * buffer_mult rows, each the activations at one (sequence, position), position 0 left
    out. When half are served, exactly those slots are filled with the rows that come next. Rows are numbered
    through all epochs: row r of an epoch is position 1 + r % (seq_len - 1) of sequence r // (seq_len - 1).
    What is shuffled is slot numbers, never rows. With a state it goes on from there. Raises ValueError where
    all_tokens do not fill it once, FloatingPointError for activations that are not finite."""
    STATE = ("order", "row_numbers", "pointer", "next_row", "passes", "rows_served", "rows_replayed")

    def __init__(self, cfg: dict, models: list, all_tokens: Int[Tensor, "n_seqs seq_len"], state: dict = {}):
        self.cfg, self.models, self.all_tokens = cfg, models, all_tokens
        self.positions = all_tokens.shape[1] - 1  # rows in a sequence
        self.rows_per_epoch = len(all_tokens) * self.positions
        self.size = cfg["batch_size"] * cfg["buffer_mult"]
        if self.rows_per_epoch < self.size:
            raise bad("buffer_mult", cfg["buffer_mult"], f"{self.size:,} rows in the buffer, but only "
                      f"{self.rows_per_epoch:,} in the text; lower it, or give more text")
        few = get_stacked_resids(models, all_tokens[:1, :2], cfg)  # [1, 2, n_layers, d_model]
        self.buffer = few.new_empty(self.size, *few.shape[2:], device=cfg["buffer_device"])
        self.pinned = cfg["device"].startswith("cuda") and not self.buffer.is_cuda  # so that copies overlap
        self.order = torch.arange(self.size, device=self.buffer.device)  # the slots, as they will be served
        self.row_numbers = torch.zeros_like(self.order)  # of the row in each slot
        self.pointer = self.size  # how many of them are served: at first all are free
        self.next_row = 0  # the first that is not yet harvested
        self.passes = [0]  # of the models: the row that each begins with, and the one after the last
        self.rows_served, self.rows_replayed = 0, self.order.new_zeros(())  # replayed: in a later epoch
        self.generator = torch.Generator().manual_seed(cfg["seed"])
        if state:
            self.load_state_dict(state)
        else:
            self.refresh()

    def refresh(self) -> None:
        """Fills the served slots with the next rows and shuffles the order of all."""
        start, end, parts = self.next_row, self.next_row, []
        while missing := self.pointer - sum(map(len, parts)):
            rows, end = torch.arange(end, end + missing), end + missing
            seqs, positions = rows // self.positions % len(self.all_tokens), rows % self.positions + 1
            parts.append(rows[is_used(self.all_tokens[seqs, positions], self.cfg)])
            if end - start > self.rows_per_epoch:
                raise bad("ignore_tokens", self.cfg["ignore_tokens"], "without these too little text is "
                          "left for the buffer; lower buffer_mult, or give more text")
        length = self.cfg["model_batch_size"] * self.positions  # of a pass, up to the end of a sequence
        passes = [start, *range(start - start % self.positions + length, end, length), end]
        row_numbers = self.row_numbers.clone()
        row_numbers[self.order[: self.pointer]] = torch.cat(parts).to(self.order.device)
        self._harvest(row_numbers, passes)
        self.row_numbers, self.passes = row_numbers, self.passes + passes[1:]
        self.order = torch.randperm(self.size, generator=self.generator).to(self.order.device)
        self.next_row, self.pointer = end, 0

    @torch.no_grad()
    def _harvest(self, row_numbers: Int[Tensor, "size"], passes: list[int]) -> None:
        """Fills the slots that are to hold rows of these passes. Only in the same pass, beside the same
        sequences, does a row come out the same to the last bit."""
        rows, slots = row_numbers.sort()
        bounds = torch.searchsorted(rows, rows.new_tensor(passes)).tolist()
        assert bounds[-1] == self.size
        bar = tqdm.tqdm(passes[:-1], "filling the buffer", leave=False, disable=passes[0] > 0)
        for start, end, low, high in zip(bar, passes[1:], bounds, bounds[1:]):
            if low == high:
                continue
            seqs = torch.arange(start // self.positions, math.ceil(end / self.positions))
            resids = get_stacked_resids(self.models, self.all_tokens[seqs % len(self.all_tokens)], self.cfg)
            part = rows[low:high]
            acts = resids[part // self.positions - seqs[0], part % self.positions + 1]
            if not (finite := acts.sum((1, 2)).isfinite().cpu()).all():
                broken = part[~finite] // self.positions % len(self.all_tokens)
                raise FloatingPointError(f"activations of sequences {broken.unique().tolist()} not finite")
            self.buffer[slots[low:high]] = acts.to(self.buffer.device)
            del resids, acts  # before the next are made

    def state_dict(self) -> dict:
        """All but the activations, which load_state_dict harvests again, and a hash of the text."""
        text = self.all_tokens[: math.ceil(self.next_row / self.positions)].contiguous().cpu().numpy()
        state = {name: getattr(self, name) for name in self.STATE}
        return {**state, "generator": self.generator.get_state(), "text": hashlib.sha256(text).hexdigest()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a state_dict; ValueError where the text is another."""
        vars(self).update({name: state[name] for name in self.STATE})
        if self.state_dict()["text"] != state["text"]:
            raise bad("tokens", self.cfg["tokens"] or self.cfg["dataset"], "not the text of the run so far")
        self.order, self.row_numbers, self.rows_replayed = (
            state[name].to(self.buffer.device) for name in ("order", "row_numbers", "rows_replayed"))
        self.generator.set_state(state["generator"])
        self._harvest(self.row_numbers, self.passes)

    def next(self) -> Float[Tensor, "batch_size n_layers d_model"]:
        """The next batch of raw activations, on cfg["device"], in the compute type."""
        if self.pointer >= self.size / 2:
            self.refresh()
        slots = self.order[self.pointer : self.pointer + self.cfg["batch_size"]]
        self.pointer += len(slots)
        self.rows_served += len(slots)
        self.rows_replayed = self.rows_replayed + (self.row_numbers[slots] >= self.rows_per_epoch).sum()
        rows = torch.empty_like(self.buffer[: len(slots)], pin_memory=self.pinned)
        torch.index_select(self.buffer, 0, slots, out=rows)
        return rows.to(self.cfg["device"], non_blocking=self.pinned)


# ---- Evaluation ------------------------------------------------------------------------------------------
def iter_rows(models: list, tokens: Int[Tensor, "n_seqs seq_len"], cfg: dict) -> Iterator[Tensor]:
    """The activations on tokens, position 0 left out, [up to batch_size, n_layers, d_model] at a time."""
    for batch in tokens.split(cfg["model_batch_size"]):
        x = get_stacked_resids(models, batch, cfg)[:, 1:][is_used(batch[:, 1:], cfg)]
        yield from x.split(cfg["batch_size"]) if len(x) else ()
        del x  # before the next is made


@torch.no_grad()
def get_stats(crosscoder: CrossCoder, models: list, tokens: Int[Tensor, "n_seqs seq_len"], cfg: dict) -> dict:
    """How the crosscoder reconstructs and fires on tokens, position 0 left out. In float64 on the CPU:
    fvu [n_layers]: sum ||x - x_hat||^2 / sum ||x - mean||^2, the mean being per dimension over these tokens
    fvu_all: the same ratio over all sources, each as large as in the normalised space, as in the loss
    norm_ratio [n_layers]: E||x_hat|| / E||x||, below 1 where there is shrinkage
    mean [n_layers, d_model]: E x. l0: active latents a token. freqs [d_sae]: how often each is active"""
    n, totals = 0, None
    for rows in iter_rows(models, tokens, cfg):
        rows = rows.float()
        acts = crosscoder.encode(rows)
        rows_hat = crosscoder.decode(acts)
        sums = (rows.sum(0), rows.pow(2).sum((0, 2)), (rows - rows_hat).pow(2).sum((0, 2)),
                rows.norm(dim=-1).sum(0), rows_hat.norm(dim=-1).sum(0), (acts > 0).sum(0))
        sums = [each.cpu().double() for each in sums]
        totals = [total + each for total, each in zip(totals, sums)] if totals else sums
        n += len(rows)
    x_sum, squares, errors, norms, norms_hat, fires = totals
    variances = squares - x_sum.pow(2).sum(-1) / n  # [n_layers]
    weights = crosscoder.norm_factor.cpu().double().pow(-2)
    return {"fvu": errors / variances, "fvu_all": (errors * weights).sum() / (variances * weights).sum(),
            "norm_ratio": norms_hat / norms, "mean": x_sum / n, "l0": fires.sum() / n, "freqs": fires / n}


@torch.no_grad()
def get_ce(model, tokens: Int[Tensor, "batch pos"], splices: list[tuple[str, Tensor]] = []) -> float:
    """Mean next-token cross-entropy in nats, each (hook name, activations [batch, pos, d_model]) of splices
    standing in for the model's own activations. Position 0 keeps its own."""
    changes, hooks = {}, []

    def splice(act, hook, new, name):
        new = new[:, 1:, : act[0, 0].numel()].to(act)  # without what pads it
        spliced = torch.cat([act[:, :1], new.reshape(act[:, 1:].shape)], dim=1)
        changes[name] = spliced - act
        return spliced

    for name, new in splices:
        hooks.append((name, partial(splice, new=new, name=name)))
        if name.endswith("resid_mid"):  # the hook is on what the MLP reads; what goes round it changes too
            hooks.append((name.replace("mid", "post"), lambda act, hook, name=name: act + changes[name]))
    logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    each = [F.cross_entropy(row[:-1].float(), ids[1:]) for row, ids in zip(logits, tokens)]  # less memory
    return torch.stack(each).mean().item()


@torch.no_grad()
def get_relative_norms(crosscoder: CrossCoder) -> tuple[Float[Tensor, "d_sae"], Float[Tensor, "d_sae"]]:
    """Of two models' decoder vectors d: ||d_B|| / (||d_A|| + ||d_B||) [O24], 0 for a latent that only the
    first has and 1 for one that only the second has; and their cosine."""
    d_A, d_B = crosscoder.W_dec.unflatten(1, (2, -1)).flatten(2).unbind(1)
    norms = torch.stack([d_A.norm(dim=-1), d_B.norm(dim=-1)])
    return norms[1] / norms.sum(0).clamp(min=1e-30), F.cosine_similarity(d_A, d_B, dim=-1)


@torch.no_grad()
def evaluate(crosscoder: CrossCoder, models: list, tokens: Int[Tensor, "n_seqs seq_len"], cfg: dict) -> dict:
    """get_stats and cross-entropies on tokens as a flat dict of floats, with a key a source. ce/clean: of the
    models, in nats. ce/delta_*: what it rises by with the reconstruction in place of a source, or of all.
    ce/ablated_*: with the mean. An acausal reconstruction has seen later layers, which can flatter it.
    diff/*, of two models: how many latents active here both have, by relative norm, with the mean cosine of
    their decoder vectors, and how many only one has."""
    stats, sources = get_stats(crosscoder, models, tokens, cfg), get_sources(models, cfg)
    names = source_names(cfg, len(sources))
    metrics = {"fvu/all": stats["fvu_all"].item(), "sparsity/l0": stats["l0"].item()}
    for key in ("fvu", "norm_ratio"):
        metrics |= {f"{key}/{name}": value for name, value in zip(names, stats[key].tolist())}
    if len(models) == 2:
        norms, cosines = (each.cpu()[stats["freqs"] > 0] for each in get_relative_norms(crosscoder))
        shared = (0.3 < norms) & (norms < 0.7)
        metrics |= {"diff/shared": shared.sum().item(),
                    "diff/cosine": cosines[shared].sum().item() / max(1, shared.sum().item()),
                    "diff/only_0": (norms < 0.05).sum().item(), "diff/only_1": (norms > 0.95).sum().item()}
    for batch in tokens.split(cfg["model_batch_size"]):
        batch = batch.to(cfg["device"]).long()
        x = get_stacked_resids(models, batch, cfg)
        x_hat = torch.cat([crosscoder(rows).to(x) for rows in x.flatten(0, 1).split(cfg["batch_size"])])
        x_hat, ignored = x_hat.view_as(x), ~is_used(batch, cfg)  # these keep their own
        clean = [get_ce(model, batch) for model in models]
        ces = {"ce/clean": np.mean(clean)}
        for kind, new in (("delta", x_hat), ("ablated", stats["mean"].to(x))):
            x_hat.copy_(new)[ignored] = x[ignored]
            splices: list[list] = [[] for _ in models]
            for (m, _, hook), name, act in zip(sources, names, x_hat.unbind(2)):
                ces[f"ce/{kind}_{name}"] = get_ce(models[m], batch, [(hook, act)]) - clean[m]
                splices[m].append((hook, act))
            together = [get_ce(model, batch, splice) for model, splice in zip(models, splices)]
            ces[f"ce/{kind}_all"] = np.mean(together) - np.mean(clean)
        del x, x_hat  # before the next are made
        for key, ce in ces.items():
            metrics[key] = metrics.get(key, 0.0) + float(ce) * len(batch) / len(tokens)
    return metrics


# ---- Trainer ---------------------------------------------------------------------------------------------
class Trainer:
    """Trains a crosscoder on models' activations over all_tokens, the last cfg["eval_seqs"] held out; from
    where the checkpoint cfg["resume"] leaves off, if there is one."""
    STATE = ("step_counter", "history", "wandb_id", "tokens_since_fired", "dead", "steps_skipped")

    def __init__(self, cfg: dict, models: list, all_tokens: Int[Tensor, "n_seqs seq_len"]):
        self.cfg, self.models, self.eval_tokens = cfg, models, all_tokens[-cfg["eval_seqs"] :]
        state = {}
        if cfg["resume"]:
            _, files = read_checkpoint("resume", Path(cfg["resume"]), RESUME)
            state = files["trainer.json"] or {}
            if missing := {*self.STATE, "adam", "buffer"} - {*state}:
                raise bad("resume", cfg["resume"], f"of another version: it lacks {', '.join(missing)}")
        self.buffer = Buffer(cfg, models, all_tokens[: -cfg["eval_seqs"]], state.get("buffer", {}))
        self.run_dir, self.lock = open_run(cfg)
        self.crosscoder = CrossCoder({**cfg, "resume": ""}, *self.buffer.buffer.shape[1:])
        # unlike [J25]: the thresholds learn as fast as the rest, or the penalty hardly matters in a short run
        self.optimizer = torch.optim.Adam(
            self.crosscoder.parameters(), cfg["lr"], betas=(cfg["beta1"], cfg["beta2"]), fused=True)
        self.step_counter, self.total_steps = 0, cfg["num_tokens"] // cfg["batch_size"]
        self.tokens_since_fired = torch.zeros(cfg["dict_size"], dtype=torch.long, device=cfg["device"])
        self.dead = self.tokens_since_fired.new_empty(0)  # latents for AuxK to revive
        self.steps_skipped = self.skipped_in_a_row = torch.zeros((), device=cfg["device"])
        self.history: list[dict] = []  # all that was logged
        self.wandb_failed, self.wandb_id = False, secrets.token_hex(4)
        self.stop: BaseException | None = None  # what train raises after the step
        if not state:
            self.crosscoder.norm_factor.copy_(self.get_norm_factor())
            some = self.buffer.buffer[self.buffer.order[: 4 * cfg["batch_size"]]]
            self.crosscoder.calibrate(some.to(cfg["device"]))
            return
        self.crosscoder.load_state_dict(files["crosscoder.safetensors"])
        adam = {int(number): each for number, each in state["adam"].items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": adam})
        for name in self.STATE:
            value = state[name]
            setattr(self, name, value.to(cfg["device"]) if isinstance(value, Tensor) else value)
        for later in list_checkpoints(self.run_dir):
            if int(later.name[5:]) > self.step_counter:
                aside = later.rename(self.run_dir / f"undone_{time.time():.0f}_{later.name}")
                print(f"put aside: {aside}", file=sys.stderr)
        self._write_history()  # without what was logged after the checkpoint

    def get_norm_factor(self) -> Float[Tensor, "n_layers"]:
        """E||x|| / sqrt(d_model) of each source, over the rows in the buffer; or the published ones."""
        if self.cfg["norm"] == "published":
            return torch.tensor([PUBLISHED_NORMS[s.layer] for s in get_sources(self.models, self.cfg)])
        rows = self.buffer.buffer
        norms = sum(some.float().norm(dim=-1).sum(0) for some in rows.split(self.cfg["batch_size"]))
        return norms / (len(rows) * get_widths(rows[: self.cfg["batch_size"]]).sqrt())

    def get_lr(self) -> float:
        """Up over the first 5% of the steps, then flat, then down to zero over the last 20% [A24]."""
        done = self.step_counter / self.total_steps
        return self.cfg["lr"] * max(0.0, min(1.0, (done + 1 / self.total_steps) / 0.05, (1 - done) / 0.2))

    def get_l1_coeff(self) -> float:
        """relu: up over the first 5% of the steps, then flat [A24]. jumprelu: up over all of them [J25]."""
        done = self.step_counter / self.total_steps
        return self.cfg.get("l1_coeff", 0.0) * min(1.0, done / 0.05) + self.cfg.get("l0_coeff", 0.0) * done

    def get_k(self) -> int | None:
        """From 8 k down to k over the first 5% of the steps."""
        k, done = self.cfg.get("k"), self.step_counter / self.total_steps
        return k and min(self.cfg["dict_size"], round(k * (1 + 7 * max(0.0, 1 - done / 0.05))))

    def step(self) -> dict[str, float | Tensor]:
        """One step on the next batch. Metrics stay tensors: it is reading them that waits for the device."""
        self.optimizer.param_groups[0]["lr"], l1_coeff = (lr := self.get_lr()), self.get_l1_coeff()
        if self.cfg["aux_coeff"] and self.step_counter % 100 == 0:  # seldom, as it waits for the device
            self.dead = (self.tokens_since_fired >= self.cfg["dead_after"]).nonzero().flatten()
        losses = self.crosscoder.get_losses(self.buffer.next(), self.get_k(), self.dead)
        loss = losses.l2_loss + l1_coeff * losses.l1_loss + losses.aux_loss
        loss.backward()
        grad_norm = nn.utils.get_total_norm([p.grad.norm(dim=-1) for p in self.crosscoder.parameters()])
        skip = ~(loss.detach() + grad_norm).isfinite() | (self.skipped_in_a_row >= MOST_SKIPPED)
        self.steps_skipped = self.steps_skipped + skip  # not in place, as the metrics hold it
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skip
        # Adam divides by the one: clipped at a norm of 1; and where the other is 1 it does nothing
        self.optimizer.grad_scale, self.optimizer.found_inf = grad_norm.clamp(min=1.0), skip.float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens_since_fired.add_(self.cfg["batch_size"]).masked_fill_(losses.fired > 0, 0)
        self.step_counter += 1
        return {"loss/total": loss.detach(), "loss/l2": losses.l2_loss.detach(),
                "loss/l1": losses.l1_loss.detach(), "loss/l1_coeff": l1_coeff, "loss/lr": lr,
                "loss/aux": losses.aux_loss.detach(), "loss/grad_norm": grad_norm,
                "fvu/batch": losses.fvu, "sparsity/l0_batch": losses.l0_loss,
                "data/unique_tokens": self.buffer.rows_served - self.buffer.rows_replayed,
                "data/rows_replayed": self.buffer.rows_replayed,
                "data/epoch": self.buffer.next_row // self.buffer.rows_per_epoch,
                "data/steps_skipped": self.steps_skipped}

    def evaluate(self) -> dict[str, float]:
        """evaluate() on the held-out sequences, and the share of latents that training has left dead."""
        dead = (self.tokens_since_fired >= self.cfg["dead_after"]).float().mean().item()
        return {**evaluate(self.crosscoder, self.models, self.eval_tokens, self.cfg), "sparsity/dead": dead}

    def log(self, metrics: dict[str, float | Tensor]) -> None:
        """Puts metrics into history, metrics.jsonl and wandb."""
        row = {"step": self.step_counter, **{key: float(value) for key, value in metrics.items()}}
        self.history.append(row)
        with suppress(OSError), open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")  # where it cannot, the next save makes good for it
        self._wandb("log", row, step=self.step_counter)

    def _write_history(self) -> None:
        with atomically(self.run_dir / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.history))

    def _wandb(self, method: str, *args, **kwargs) -> None:
        """Calls a function of wandb's, which must never stop a run: after a failure it goes on without."""
        try:
            if not self.wandb_failed:
                getattr(wandb, method)(*args, **kwargs)
        except Exception as error:
            tqdm.tqdm.write(f"wandb failed ({error!r:.200}); the run goes on without it", file=sys.stderr)
            self.wandb_failed = True

    def save(self) -> Path | None:
        """Writes this step's checkpoint, save_dir/version_N/step_NNNNNNN, unless it is there, and removes all
        but the newest cfg["keep"]. -> the folder, or None where it cannot be written"""
        folder = self.run_dir / f"step_{self.step_counter:07d}"
        if folder.exists():
            return folder
        state = {name: getattr(self, name) for name in self.STATE}
        state |= {"adam": self.optimizer.state_dict()["state"], "buffer": self.buffer.state_dict()}
        try:
            self.crosscoder.save(folder, state)
            self._write_history()
        except (OSError, safetensors.SafetensorError) as error:
            tqdm.tqdm.write(f"cannot save {folder} ({error})", file=sys.stderr)
            return None
        for old in list_checkpoints(self.run_dir)[: -self.cfg["keep"]]:
            with suppress(OSError):  # it only takes space
                shutil.rmtree(old.rename(old.with_name(f".{old.name}")))  # nobody sees half of it
        return folder

    def train(self) -> dict[str, float]:
        """Trains to the end, logging, evaluating and saving on the way; returns the last evaluation. Whatever
        ends it, it saves; self.stop, once set, is raised after the step. FloatingPointError where the loss or
        gradients of MOST_SKIPPED steps in a row are not finite."""
        cfg, last, clock = self.cfg, self.step_counter, time.time()
        self.lock.acquire()  # it is given back, and gradients are left, where it was stopped before
        self.optimizer.zero_grad()
        self._wandb("init", project="crosscoders", dir=self.run_dir, config=cfg, mode=cfg["wandb_mode"],
                    id=self.wandb_id, resume="allow", settings={"init_timeout": 30, "finish_timeout": 30})
        bar = tqdm.tqdm(initial=self.step_counter, total=self.total_steps, desc="training", unit="step")
        try:
            while self.step_counter < self.total_steps and not self.stop:
                evaluated = [row["step"] for row in self.history[-1:] if "ce/clean" in row]  # before an error
                if self.step_counter % cfg["eval_every"] == 0 and evaluated != [self.step_counter]:
                    self.log(self.evaluate())
                metrics = self.step()
                bar.update()
                if self.step_counter % cfg["log_every"] == 0 or self.step_counter == self.total_steps:
                    speed = (self.step_counter - last) * cfg["batch_size"] / (time.time() - clock)
                    last, clock = self.step_counter, time.time()
                    self.log({**metrics, "perf/tokens_per_s": speed})
                    live = "loss {loss/total:.1f} FVU {fvu/batch:.3f} L0 {sparsity/l0_batch:.1f}"
                    bar.set_postfix_str(f"{live.format_map(self.history[-1])} {speed:,.0f} tok/s")
                    if self.skipped_in_a_row >= MOST_SKIPPED:
                        norms = self.buffer.buffer.norm(dim=-1).amax(0).tolist()
                        norms = dict(zip(source_names(cfg, len(norms)), norms))
                        raise FloatingPointError(f"step {self.step_counter}: loss or gradients not finite "
                                                 f"{MOST_SKIPPED} times in a row; largest norms: {norms}")
                if self.step_counter % cfg["save_every"] == 0 and not self.skipped_in_a_row and (
                        self.step_counter < self.total_steps):
                    self.save()
            if not self.stop:
                self.crosscoder.fit_threshold(iter_rows(self.models, self.eval_tokens, cfg))
            while not self.stop and not self.save():
                time.sleep(5)  # rather than lose it
            if self.stop:
                raise self.stop
            self.log(final := self.evaluate())
            return final
        except BaseException:
            if self.skipped_in_a_row < MOST_SKIPPED:  # else what there is is better
                self.save()
            raise
        finally:
            bar.close()
            self._wandb("finish")
            self.lock.release(force=True)


# ---- Sharing ---------------------------------------------------------------------------------------------
def push_to_hub(path: str | Path, repo_id: str, private: bool = False) -> str:
    """Puts a checkpoint, or the newest in a run's folder, on the hub, without what only resuming needs, with
    a model card of its cfg and last evaluation. -> its address. Raises ValueError where it cannot."""
    folder, files = read_checkpoint("path", Path(path), RESUME[:2])
    cfg, (n_layers, d_model, dict_size) = files["cfg.json"], files["crosscoder.safetensors"]["W_enc"].shape
    names, log = source_names(cfg, n_layers), folder.parent / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else ()
    rows = (json.loads(line) for line in lines if line.endswith("}"))  # the last may be cut off
    metrics = [row for row in rows if "ce/clean" in row and folder.name == f"step_{row['step']:07d}"][-1:]
    card = (
        "---", "tags: [crosscoder, sparse-autoencoder, interpretability]", "---", f"# {repo_id}",
        f"A sparse crosscoder: {dict_size:,} latents ({cfg['activation']}), {n_layers} sources of width "
        f"{d_model}: {', '.join(names)} of {cfg['model_name']}.", "", "```python",
        "from utils import CrossCoder", f'crosscoder = CrossCoder.from_hub("{repo_id}")',
        "acts = crosscoder.encode(x)  # x [..., n_layers, d_model], raw activations", "```", "",
        "| source | FVU | CE delta, nats |", "|---|---|---|",
        *(f"| {each} | {row[f'fvu/{each}']:.4f} | {row[f'ce/delta_{each}']:+.4f} |"
          for row in metrics for each in (*names, "all")), "",
        *(f"L0 {row['sparsity/l0']:.1f}, dead latents {row['sparsity/dead']:.1%}; on held-out text."
          for row in metrics), "", *(f"- {key}: {cfg[key]}" for key in cfg if key not in MAY_CHANGE[:10]))
    try:
        huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as upload:
            for name in (*RESUME[:2], "manifest.json"):
                shutil.copy(folder / name, upload)
            Path(upload, "README.md").write_text("\n".join(card) + "\n")
            return str(huggingface_hub.upload_folder(repo_id=repo_id, folder_path=upload))
    except Exception as error:
        raise bad("repo_id", repo_id, explain(error)) from None
