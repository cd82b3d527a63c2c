"""Sparse crosscoders: dictionaries whose latents read from and write to several places of models.

In reading order: ranks, activations, crosscoder, buffer, evaluation, files, trainer. The n_layers axis
is a list of sources, each one (model, hook point): all layers of GPT-2 Small, or one layer of base and
chat. x is raw activations, y normalised ones, throughout. cfg is the dict that train.make_cfg makes.

[A24] Anthropic, Circuits Updates, April 2024: how dictionaries are initialised and trained.
[O24] Anthropic, Sparse Crosscoders, October 2024. [F25] Crosscoder Model Diffing, February 2025.
[J25] Anthropic, Circuits Updates, January 2025: JumpReLU. [G24] Gao et al., June 2024: TopK, AuxK.
[B24] Bussmann et al., December 2024: BatchTopK. [M25] Minder et al., April 2025: BatchTopK crosscoders.
[N24] Nanda, 2024: the published GPT-2 Small crosscoders.
"""
import glob
import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import einops
import filelock
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tqdm
import wandb
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.utilities import get_act_name

Tokens = Int[Tensor, "n_seqs seq_len"]
Resids = Float[Tensor, "... n_layers d_model"]  # x or y, with whatever axes lead
Acts = Float[Tensor, "... d_sae"]  # of latents, before (h) and after their activation (acts)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RUN_FILES = ["cfg.json", "crosscoder.safetensors", "trainer.json", "trainer.safetensors"]


def bad(key: str, value, remedy: str) -> ValueError:
    """The error for a user's mistake: the key, its value, and what would be right."""
    shown = repr(value).replace("\n", " ")
    return ValueError(f"{key}={shown}: {remedy}")


# ---- Ranks ---------------------------------------------------------------------------------------
# torchrun starts one process for each GPU, a rank. Rank r of n reads every n-th sequence, from the r-th,
# and has latents r d_sae / n to (r + 1) d_sae / n - 1. All see the whole batch and come to the same
# error, losses and b_dec. In a process by itself nothing in this section changes anything.
def get_ranks() -> tuple[int, int]:
    """-> the rank of this process; how many there are"""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(x: Float[Tensor, "n ..."]) -> Float[Tensor, "all ..."]:
    """All ranks' x, one after the other, without a gradient."""
    _, n_ranks = get_ranks()
    if n_ranks == 1:
        return x
    everyones = x.new_empty(n_ranks * len(x), *x.shape[1:])
    dist.all_gather(list(everyones.chunk(n_ranks)), x.contiguous())
    return everyones


def sum_ranks(x: Tensor) -> Tensor:
    """The sum of all ranks' x, in fp32 if they are several. All make the same loss of it, and d sum / d x
    is 1: so this rank's x has the sum's gradient, with nothing to add up. Autograd sees the copy, not what
    fills .data."""
    if get_ranks()[1] > 1:
        x = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        dist.all_reduce(x.data)
    return x


def cut(scores: Float[Tensor, "rows n"], most: int, total: float) -> Float[Tensor, "rows n"]:
    """The largest scores of each row that a rank has, with -inf for those that are not kept. Of a row the
    `most` largest that any rank has are kept; and of these, if they are more, the `total` largest."""
    rank, n_ranks = get_ranks()
    if n_ranks == 1:
        return scores
    everyones = gather(scores[None]).movedim(0, 1)  # [rows, n_ranks, n]
    lost = torch.full_like(everyones, -math.inf).flatten(1)
    best, places = everyones.flatten(1).topk(min(most, lost.shape[1]), sorted=False)
    if total < best.numel():
        kept, chosen = best.flatten().topk(total, sorted=False)
        best = torch.full_like(best, -math.inf).flatten().scatter(0, chosen, kept).view_as(best)
    return lost.scatter(1, places, best).view_as(everyones)[:, rank]


# ---- Activations ---------------------------------------------------------------------------------
class Source(NamedTuple):
    """One entry of the n_layers axis: a place that latents read from and write to."""
    model: int  # which of the models
    hook: str  # the hook point's name, such as blocks.3.hook_resid_post


def get_sources(models: list, cfg: dict) -> list[Source]:
    """The sources, model by model and layer by layer. ValueError for one that is not there."""
    sources = []
    for m, model in enumerate(models):
        depth = model.cfg.n_layers
        hooks = model.hook_dict  # once, as each time it is made anew
        for layer in cfg["layers"] or range(depth):
            if not 0 <= layer < depth:
                raise bad("layers", cfg["layers"], f"the layers are 0 to {depth - 1}")
            hook = get_act_name(cfg["site"], layer)
            # TransformerLens computes hook_mlp_in, hook_q_input, ... only after a call for each.
            is_own = hook.startswith(f"blocks.{layer}.")  # get_act_name reads post3 as layer 3
            if not is_own or hook not in hooks or hook.endswith(("_in", "_input", "_result")):
                raise bad("site", cfg["site"], f"no {hook} here; give resid_post, mlp_out, z, ...")
            sources.append(Source(m, hook))
    return sources


def source_names(cfg: dict, n_layers: int) -> list[str]:
    """A short name for each source, such as resid_post.3 or chat:resid_post.3. Needs no model."""
    models = [Path(name).name for name in cfg["model_name"]]
    layers = cfg["layers"] or range(n_layers // len(models))
    if len(models) == 1:
        return [f"{cfg['site']}.{layer}" for layer in layers]
    if len(set(models)) < len(models):
        models = [f"{m}_{model}" for m, model in enumerate(models)]
    return [f"{model}:{cfg['site']}.{layer}" for model in models for layer in layers]


class AllSeen(Exception):
    """Leaves a model whose sources have all been seen."""


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """tensor on device; a GPU need not finish its work first, as from memory that is not pinned."""
    if tensor.is_cpu and "cuda" in str(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@torch.no_grad()
def get_stacked_resids(models: list, tokens: Tokens, cfg: dict) -> Resids:
    """Runs the models on tokens [batch, pos] and stacks the raw activations of all sources,
    position 0 included: [batch, pos, n_layers, d_model], on cfg["device"]. Sites with heads are
    flattened. A model is left once its last source is seen: no later layer and no logits are
    computed. ValueError for a site whose activations are not [batch, pos, ...]."""
    sources = get_sources(models, cfg)
    resids = None  # [batch, pos, n_layers, d_model], made when the first activation shows d_model

    def collect(act, hook, i):
        nonlocal resids
        if act.shape[:2] != tokens.shape:
            raise bad("site", cfg["site"], f"{hook.name}: {list(act.shape)}, not [batch, pos, ...]")
        act = act.flatten(2)  # [batch, pos, d_model]
        if cfg["center"]:
            act = act - act.mean(-1, keepdim=True)
        if resids is None:
            resids = act.new_empty(*tokens.shape, len(sources), act.shape[2], device=cfg["device"])
        resids[:, :, i] = act
        unseen.remove(i)
        if not unseen:
            raise AllSeen

    for m, model in enumerate(models):
        unseen = [i for i, source in enumerate(sources) if source.model == m]
        hooks = [(sources[i].hook, partial(collect, i=i)) for i in unseen]
        with suppress(AllSeen):
            ids = send(tokens, model.cfg.device).long()
            model.run_with_hooks(ids, return_type=None, fwd_hooks=hooks)
        if unseen:
            hook = sources[unseen[0]].hook
            raise bad("site", cfg["site"], f"{hook} is not computed; open the models with this cfg")
    return resids


# ---- CrossCoder ----------------------------------------------------------------------------------
class LossOutput(NamedTuple):
    """Losses of a batch, on y. Training minimises l2_loss + coefficient * l1_loss + aux_loss."""
    l2_loss: Float[Tensor, ""]  # squared error, summed over sources and d_model, mean over the batch
    # relu: sum_i penalty_i acts_i sum_l ||W_dec_i^l|| [O24], mean over the batch; jumprelu: penalty_i times
    # tanh of 4 times the rest [J25]; topk, batchtopk: as relu, but a metric alone: no penalty_i, no gradient
    l1_loss: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]  # what keeps latents alive, times its coefficient
    l0_loss: Float[Tensor, ""]  # active latents, mean over the batch
    fvu: Float[Tensor, ""]  # squared error / squared distance from the batch's mean, all sources
    fired: Int[Tensor, "d_sae"]  # rows of the batch in which each latent is active


class Product(torch.autograd.Function):
    """x @ W in the type of x and, where W has three axes, the norms of its last one. Plain autograd
    would make three gradients of W's size, one through each and their sum; here the norms' is added
    to the product's in place. W's gradient is fp32: a GPU's product gives that itself, a CPU's is
    faster with a contiguous x. Together they save a fifth of the step on 2 cores: tests/RESULTS.md."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "batch n"], W: Float[Tensor, "n ..."]):
        weights = W.flatten(1).to(x.dtype)  # [n, m]
        norms = W.norm(dim=-1) if W.ndim == 3 else None
        ctx.save_for_backward(x, W, norms, weights if ctx.needs_input_grad[0] else None)
        return x @ weights, norms

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "batch m"], grad_norms: Float[Tensor, "n n_layers"]):
        x, W, norms, weights = ctx.saved_tensors
        if x.is_cuda and x.dtype == torch.bfloat16:
            grad_W = torch.mm(x.T, grad, out_dtype=torch.float32).view_as(W)
        else:
            grad_W = (x.T.contiguous() @ grad).to(W.dtype).view_as(W)
        if norms is not None:  # grad_norms is 0 where nothing used the norms
            scale = grad_norms / norms.clamp(min=1e-30)
            grad_W.addcmul_(W, scale[..., None])  # adds 0 where the norm is 0
        grad_x = None if weights is None else grad @ weights.T
        return grad_x, grad_W


def fused(function: Callable) -> Callable:
    """function, compiled where its tensors are on a GPU, so that it seldom reads and writes memory. If
    that fails, it says so and stays as it is. This is to save 6 of 24 ms a step of jumprelu on an H100:
    predicted, tests/RESULTS.md, CUDA."""
    compiled = None  # not yet, as torch.compile takes seconds to import

    @wraps(function)
    def call(*args):
        nonlocal compiled
        if not args[0].is_cuda:
            return function(*args)
        if compiled is None:
            compiled = torch.compile(function)
        try:
            return compiled(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            tqdm.tqdm.write(f"{function.__name__} runs uncompiled ({error!r:.200})", file=sys.stderr)
            compiled = function
            return function(*args)

    return call


@fused
def rectify(h: Acts) -> tuple[Acts, Int[Tensor, "d_sae"], Float[Tensor, "d_sae"]]:
    """-> relu(h); rows in which each latent is active; the sum of its activations"""
    acts = F.relu(h)
    return acts, (acts > 0).sum(0, dtype=torch.int32), acts.sum(0, dtype=torch.float32)


@fused
def jump(h: Acts, log_threshold: Float[Tensor, "d_sae"]) -> tuple[Acts, Int[Tensor, "d_sae"]]:
    """-> JumpReLU of h; rows in which each is active. As the jump has no gradient, the threshold is given
    that of a ramp which falls by 1 while it passes from h - 1 to h + 1 [J25]: the ramp is added and, as a
    constant, subtracted."""
    threshold = log_threshold.exp()
    ramp = ((h.detach() - threshold) / 2).clamp(-0.5, 0.5)
    acts = (h * (h > threshold) + (ramp - ramp.detach())).to(h.dtype)
    return acts, (acts > 0).sum(0, dtype=torch.int32)


@fused
def get_jump_losses(h: Acts, acts: Acts, log_threshold: Acts, norms: Acts) -> tuple[Acts, Acts]:
    """-> what jumprelu's active and inactive latents are penalised for, summed over rows [J25]"""
    return torch.tanh(4 * acts * norms).sum(0), (F.relu(log_threshold.exp() - h) * norms).sum(0)


@fused
def compare(y_hat: Resids, b_dec: Resids, y: Resids) -> tuple[Resids, Tensor, Tensor]:
    """-> the error of y_hat + b_dec; its squares, and those of y's distance from the mean, summed"""
    error = y_hat + b_dec - y
    # norm, as it makes no tensor of squares
    return error, error.pow(2).sum(), (y - y.mean(0)).norm(dim=-1).pow(2).sum()


class CrossCoder(nn.Module):
    """A sparse crosscoder. It takes raw activations and gives raw reconstructions, always. Its fp32
    weights are for the normalised space, where source l is divided by norm_factor[l]; its products
    are computed in cfg["enc_dtype"]."""

    def __init__(self, cfg: dict, n_layers: int, d_model: int):
        super().__init__()
        self.cfg = cfg
        self.activation = cfg["activation"]
        # How it starts: its b_enc is 0, which steer would never move. An earlier version's cfg has no l0.
        self.as_published = cfg["activation"] == "relu" and not cfg.get("l0")
        self.dtype = DTYPES[cfg["enc_dtype"]]
        self.n_models = len(cfg["model_name"])
        # A row keeps at most so many times k latents. unlike [B24]: batchtopk has a limit, too, as a row a
        # hundred times as long as others would keep thousands, and come out at a multiple of its length.
        self.most = 8 if cfg["activation"] == "batchtopk" else 1
        # decode_chosen is sparse where d_sae is at least this many times k; on a GPU as predicted.
        self.sparse_from = 512 if "cuda" in cfg["device"] else 64
        rank, n_ranks = get_ranks()
        d_sae = cfg["dict_size"] // n_ranks
        self.first = rank * d_sae  # latent 0 of this rank is this one of all

        # All models begin with the same decoder vectors, the encoder as the decoder's transpose.
        generator = torch.Generator().manual_seed(cfg["seed"])
        for _ in range(rank + 1):  # as one process draws them: those of earlier ranks, then its own
            W_dec = torch.randn(d_sae, n_layers // self.n_models, d_model, generator=generator)
        W_dec = W_dec.repeat(1, self.n_models, 1)
        init_norm = 3**-0.5 / n_layers  # [J25]
        if self.as_published:
            init_norm = cfg["dec_init_norm"]  # unlike [A24]: at each source [N24], not of all
        W_dec *= init_norm / W_dec.norm(dim=-1, keepdim=True)
        W_enc = einops.rearrange(W_dec, "d_sae n_layers d_model -> n_layers d_model d_sae")
        W_enc = W_enc.clone(memory_format=torch.contiguous_format)

        self.W_enc: Float[Tensor, "n_layers d_model d_sae"] = nn.Parameter(W_enc)
        self.W_dec: Float[Tensor, "d_sae n_layers d_model"] = nn.Parameter(W_dec)
        self.b_enc: Float[Tensor, "d_sae"] = nn.Parameter(torch.zeros(d_sae))
        self.b_dec: Float[Tensor, "n_layers d_model"] = nn.Parameter(torch.zeros(n_layers, d_model))
        if self.activation == "jumprelu":
            log_threshold = torch.full((d_sae,), 0.1)  # a threshold of 1.1 [J25]
            self.log_threshold: Float[Tensor, "d_sae"] = nn.Parameter(log_threshold)
        norm = cfg["norm"] or [1.0] * n_layers
        self.norm_factor: Float[Tensor, "n_layers"] = nn.Buffer(torch.tensor(norm))
        self.mean: Float[Tensor, "n_layers d_model"] = nn.Buffer(torch.zeros(n_layers, d_model))
        self.threshold: Float[Tensor, ""] = nn.Buffer(torch.zeros(()))  # batchtopk's
        self.penalty: Float[Tensor, "d_sae"] = nn.Buffer(torch.ones(d_sae), persistent=False)
        self.penalty[: max(0, cfg["n_shared"] - self.first)] = cfg["shared_penalty"]
        self.constrain(self.W_enc.data, self.W_dec.data)
        self.to(cfg["device"])

    @torch.no_grad()
    def constrain(
        self, W_enc: Float[Tensor, "n_layers d_model d_sae"], W_dec: Float[Tensor, "d_sae n_layers d_model"]
    ) -> None:
        """The first n_shared latents write the same to every model: what W_dec holds for them is
        averaged over the models [F25]. The next n_exclusive are the first model's alone, and so on:
        what W_enc and W_dec hold for them at other models is zeroed. In place, on the weights once
        and on the gradients in each step, so that Adam never moves anything out of place."""
        n_shared = max(0, self.cfg["n_shared"] - self.first)
        # Both as views [d_sae, n_models, n_layers / n_models, d_model].
        W_enc = W_enc.movedim(2, 0).unflatten(1, (self.n_models, -1))
        W_dec = W_dec.unflatten(1, (self.n_models, -1))
        W_dec[:n_shared] = W_dec[:n_shared].mean(1, keepdim=True)
        for m in range(self.n_models):
            start = self.cfg["n_shared"] + m * self.cfg["n_exclusive"] - self.first
            exclusive = slice(max(0, start), max(0, start + self.cfg["n_exclusive"]))
            for W in (W_enc, W_dec):
                W[exclusive, :m] = 0
                W[exclusive, m + 1 :] = 0

    def extra_repr(self) -> str:
        """What print(crosscoder) says of it."""
        d_sae, n_layers, d_model = self.W_dec.shape
        return f"{self.activation}, {d_sae:,} latents, {n_layers} sources of width {d_model}"

    # ---- CrossCoder: the forward pass
    def normalise(self, x: Resids) -> Resids:
        """x -> y, in fp32 (in float64, of float64). ValueError for another shape, which would be
        broadcast, or whole numbers."""
        if x.shape[-2:] != self.b_dec.shape or not x.is_floating_point():
            wanted = f"floating-point [..., {', '.join(map(str, self.b_dec.shape))}]"
            raise ValueError(f"x: {x.dtype} {list(x.shape)}, not {wanted}")
        return x / self.norm_factor[:, None]

    def get_pre_acts(self, y: Resids) -> Acts:
        """h = (y - mean) . W_enc, summed over n_layers and d_model, + b_enc, in the compute type. Where
        mean is 0, as in a new run of relu as published, W_enc sees the mean of y: what it learns from one
        row moves h on all, and many latents may end below 0 for good: tests/RESULTS.md, At size."""
        rows = (y - self.mean).reshape(-1, self.b_dec.numel()).to(self.dtype)  # [rows, n_layers * d_model]
        h, _ = Product.apply(rows, self.W_enc.flatten(0, 1))
        h = h + self.b_enc.to(self.dtype)
        return h.view(*y.shape[:-2], self.b_enc.numel())

    def encode(self, x: Resids) -> Acts:
        """Raw activations to latent activations, in the compute type. No row depends on another.
        Gradients are tracked, as by decode; where none are wanted use torch.no_grad()."""
        return self.activate(self.get_pre_acts(self.normalise(x)))

    def decode(self, acts: Acts) -> Resids:
        """Latent activations to raw reconstructions, in fp32."""
        y_hat = sum_ranks(acts.to(self.dtype) @ self.W_dec.flatten(1).to(self.dtype))
        y_hat = y_hat.unflatten(-1, self.b_dec.shape) + self.b_dec
        return y_hat * self.norm_factor[:, None]

    def forward(self, x: Resids) -> Resids:
        """Raw activations to raw reconstructions."""
        return self.decode(self.encode(x))

    # ---- CrossCoder: which latents are active
    @torch.no_grad()
    def get_decoder_norms(self) -> Float[Tensor, "d_sae"]:
        """sum_l ||W_dec_i^l||. Times this, an activation is a score [M25], which stays the same
        where the encoder is scaled up and the decoder down."""
        return self.W_dec.norm(dim=-1).sum(-1)

    @torch.no_grad()
    def get_thresholds(self) -> Float[Tensor, "d_sae"]:
        """What a latent's pre-activation must exceed. topk has 0, of those that it has chosen."""
        if self.activation == "jumprelu":
            return self.log_threshold.exp()
        if self.activation == "batchtopk":
            return self.threshold / self.get_decoder_norms()  # the threshold is one on scores
        return torch.zeros_like(self.b_enc)

    def activate(self, h: Acts) -> Acts:
        """Latent activations of pre-activations, in use: those above their thresholds; with topk and
        batchtopk, at most the k and 8 k largest scores of a row."""
        if self.activation in ("relu", "jumprelu"):
            return h * (h > self.get_thresholds())
        rows = h.reshape(-1, h.shape[-1])
        places, scores = self.choose(rows, self.cfg["k"], math.inf)
        return self.keep(rows, places, scores - self.threshold).view_as(h)

    @torch.no_grad()
    def choose(self, h: Acts, k: int, total: float) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        """The k largest scores of each row, or with batchtopk 8 k; if they are more than total, the total
        largest of these [B24]. -> their places in h.flatten(), row after row, in any order within one; these
        scores, at least 0, or -inf where other ranks have larger ones"""
        rows, d_sae = h.shape
        most = self.most * k
        scores = h * self.get_decoder_norms().to(h.dtype)
        scores, latents = scores.topk(min(most, d_sae), sorted=False)  # [rows, most]
        row_starts = torch.arange(rows, device=h.device)[:, None] * d_sae
        places = (row_starts + latents).flatten()
        scores = cut(F.relu(scores), most, total).flatten()
        if total < len(scores):
            chosen = scores.topk(total, sorted=False).indices.sort().values
            return places[chosen], scores[chosen]
        return places, scores

    def keep(self, h: Acts, places: Int[Tensor, "n"], scores: Float[Tensor, "n"]) -> Acts:
        """h at these places of h.flatten(), where its score is positive; else 0."""
        values = h.flatten().gather(0, places) * (scores > 0)
        return h.new_zeros(h.numel()).scatter_(0, places, values).view_as(h)

    # ---- CrossCoder: training
    def get_losses(self, x: Resids, k: int = 0, dead: Int[Tensor, "n_dead"] | None = None) -> LossOutput:
        """The losses on raw activations [batch, n_layers, d_model] [O24]; changes nothing. k: how many
        latents a row topk and batchtopk keep, if not cfg["k"]. dead: latents that AuxK is to revive, of
        this rank; None where no rank has any."""
        y = self.normalise(x)
        h = self.get_pre_acts(y)
        batch = max(1, len(y))  # nothing is lost on no rows
        aux_loss = y.new_zeros(())
        if self.activation == "relu":
            acts, fired, sums = rectify(h)
            y_hat, norms = Product.apply(acts, self.W_dec)
            l1_loss = (sums * norms.sum(1)) @ self.penalty / batch
        elif self.activation == "jumprelu":
            acts, fired = jump(h, self.log_threshold)
            y_hat, norms = Product.apply(acts, self.W_dec)
            active, inactive = get_jump_losses(h, acts, self.log_threshold, norms.sum(1))
            l1_loss = active @ self.penalty / batch
            aux_loss = 3e-6 * inactive.sum() / batch  # [J25]
        else:
            k = k or self.cfg["k"]
            places, scores = self.choose(h, k, k * len(h))
            y_hat, fired = self.decode_chosen(h, places, scores)
            l1_loss = F.relu(scores).sum(dtype=torch.float32) / batch
        l1_loss, aux_loss, l0_loss = sum_ranks(torch.stack([l1_loss, aux_loss, fired.sum() / batch]))
        error, l2_loss, variance = compare(sum_ranks(y_hat).view_as(y), self.b_dec, y)
        if dead is not None:
            # [G24] divides l2_loss by y's variance, and AuxK's by the error's; here l2_loss is not divided.
            left = self.get_aux_k(h[:, dead], self.W_dec[dead], error.detach())
            aux_loss = aux_loss + self.cfg["aux_coeff"] * variance / batch * left
        fvu = l2_loss.detach() / variance
        return LossOutput(l2_loss / batch, l1_loss, aux_loss, l0_loss.detach(), fvu, fired)

    def decode_chosen(self, h: Acts, places: Int[Tensor, "n"], scores: Float[Tensor, "n"]) -> tuple:
        """-> y_hat without b_dec, of the latents that keep keeps; rows in which each is active. Where
        they are few, the rows of W_dec that they need are summed instead of a whole product: 1.7 times
        as fast at 2^16 latents on 2 cores, tests/RESULTS.md, Speed."""
        batch, d_sae = h.shape
        W_dec = self.W_dec.flatten(1)
        latents = places % d_sae
        values = h.flatten().gather(0, places) * (scores > 0)
        fired = torch.zeros_like(self.b_enc, dtype=torch.int32)
        fired.index_add_(0, latents, (scores > 0).int())
        if self.sparse_from * len(places) > h.numel():
            y_hat, _ = Product.apply(self.keep(h, places, scores), W_dec)
            return y_hat, fired
        # Places are in no order within a row, but those of one row come after those of the row
        # before, which is all that this search needs.
        offsets = torch.searchsorted(places, torch.arange(batch, device=h.device) * d_sae)
        if h.is_cuda:
            W_dec = W_dec.to(self.dtype)  # half the bytes to read; its gradient is rounded, too
        values = values.to(W_dec.dtype)
        return F.embedding_bag(latents, W_dec, offsets, mode="sum", per_sample_weights=values), fired

    def get_aux_k(
        self, h: Float[Tensor, "batch n_dead"], W_dec: Float[Tensor, "n_dead n_layers d_model"], error: Resids
    ) -> Float[Tensor, ""]:
        """AuxK [G24]: what is left of the error, relative to its variance, once the d_model / 2
        [M25] dead latents with the largest scores of each row have reconstructed it."""
        k = error.shape[2] // 2
        scores = h.detach() * W_dec.detach().norm(dim=-1).sum(-1)
        largest = scores.topk(min(k, len(W_dec)), sorted=False).values
        largest = F.pad(largest, (0, k - largest.shape[1]), value=-math.inf)  # as many on each rank
        largest = cut(largest, k, k * len(h))
        lowest = largest.masked_fill(largest == -math.inf, math.inf).amin(1, keepdim=True)
        # unlike [G24]: not rectified, as a latent that is nowhere positive would get no gradient
        error_hat, _ = Product.apply(h * (scores >= lowest), W_dec.flatten(1))
        left = (sum_ranks(error_hat).view_as(error) + error).pow(2).sum()  # a plus: it is y_hat - y
        variance = (error - error.mean(0)).pow(2).sum()
        return left / variance.clamp(min=1e-30)

    # ---- CrossCoder: what is fitted to activations rather than learnt
    @torch.no_grad()
    def calibrate(self, x: Resids) -> None:
        """Has a new run begin with FVU below 1, but for relu without an l0, which begins as published. Sets
        mean, b_dec, b_enc and the scale of W_enc on these raw activations."""
        if self.as_published:
            return
        # b_enc: so that with relu and jumprelu a tenth of the rows exceed a latent's threshold. Else it stays
        # 0, as a latent's mean product with y - mean is 0, and its threshold, too.
        y = self.normalise(x)
        self.mean.copy_(y.mean(0))
        self.b_dec.copy_(self.mean)
        thresholds = self.get_thresholds()
        level = thresholds
        if self.activation in ("relu", "jumprelu"):
            h = self.get_pre_acts(y).float()
            level = h.topk(math.ceil(len(h) / 10), dim=0).values[-1]
        self.b_enc.copy_(thresholds - level)
        self.fit_threshold(x)

        # The scale: by least squares, as if reconstructions grew in proportion to it.
        y_hat = self.normalise(self(x))
        y_hat -= y_hat.mean(0)
        scale = ((y - self.b_dec) * y_hat).sum() / y_hat.pow(2).sum()
        self.W_enc *= scale
        self.b_enc.copy_(thresholds - scale * level)
        self.fit_threshold(x)

        # b_dec: so that the error's mean is 0.
        self.b_dec += self.normalise(x - self(x)).mean(0)

    @torch.no_grad()
    def fit_threshold(self, x: Resids) -> None:
        """batchtopk: sets the threshold to the lowest score that is kept where k a row are, the mean
        over batches of these raw activations."""
        if self.activation == "batchtopk":
            lowest = []
            for rows in x.split(self.cfg["batch_size"]):
                h = self.get_pre_acts(self.normalise(rows))
                _, scores = self.choose(h, self.cfg["k"], self.cfg["k"] * len(h))
                scores = scores.masked_fill(scores < 0, math.inf)  # where others' are larger
                lowest.append(gather(scores.amin(0, keepdim=True)).min().float())
            self.threshold.copy_(torch.stack(lowest).mean())

    # ---- CrossCoder: files
    @torch.no_grad()
    def start_from(self, parent: "CrossCoder") -> None:
        """Takes over another's weights, normalisation, mean and thresholds. Of a one-model crosscoder each of
        several models gets the decoder, and its share of the encoder: of models that are alike, all but
        exclusive latents stay as active as they were. ValueError, naming the key, where they do not fit."""
        weights = parent.state_dict()
        copies = self.n_models if parent.n_models == 1 else 1
        for key, axis in (("W_enc", 0), ("W_dec", 1), ("b_dec", 0), ("norm_factor", 0), ("mean", 0)):
            weights[key] = torch.cat([weights[key]] * copies, axis)
        weights["W_enc"] /= copies
        weights["threshold"] = weights["threshold"] * copies  # as decoder norms are summed
        found = {**parent.cfg, "n_models": parent.n_models * copies, "W_enc": [*weights["W_enc"].shape]}
        wanted = {**self.cfg, "n_models": self.n_models, "W_enc": [*self.W_enc.shape]}
        for key in ("activation", "site", "layers", "center", "dict_size", "n_models", "W_enc"):
            if found[key] != wanted[key]:
                raise bad("init_from", self.cfg["init_from"], f"its {key} is {found[key]}, not {wanted[key]}")
        self.load_state_dict(weights)
        self.constrain(self.W_enc, self.W_dec)

    def save(self, path: str | Path, state: dict = {}) -> None:
        """Writes the folder path, whole or not at all: crosscoder.safetensors, cfg.json,
        manifest.json. The tensors of a trainer's state go into trainer.safetensors, all else into
        trainer.json. All ranks call it, and the first one writes. OSError where it cannot be written,
        or something is there already."""
        weights = {key: join_shares(key, value) for key, value in self.state_dict().items()}
        tensors = {key: join_shares(key, value) for key, value in state.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in state.items() if key not in tensors}
        if get_ranks()[0] > 0:
            return
        if Path(path).exists():
            raise FileExistsError(f"{path} is there already; save to a new folder")
        with atomically(Path(path)) as folder:
            folder.mkdir()
            (folder / "cfg.json").write_text(json.dumps(self.cfg, indent=2) + "\n")
            safetensors.torch.save_file(weights, folder / "crosscoder.safetensors")
            if state:
                safetensors.torch.save_file(tensors, folder / "trainer.safetensors")
                (folder / "trainer.json").write_text(json.dumps(others))
            manifest = {file.name: get_identity(file) for file in folder.iterdir()}
            for name in manifest:  # safetensors lets nobody else read its files
                shutil.copymode(folder / "cfg.json", folder / name)
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "CrossCoder":
        """Opens a checkpoint folder, or the newest in a run's folder, without a language model or
        network. ValueError where there is none, or it is damaged or something else."""
        folder = find_checkpoint("path", Path(path), ["cfg.json", "crosscoder.safetensors"])
        try:
            cfg = json.loads((folder / "cfg.json").read_text())
            if isinstance(cfg["model_name"], str):  # written by an earlier version
                layers = cfg["layers"].replace("all", "").split(",")
                cfg |= {"model_name": cfg["model_name"].split(","), "norm": []}
                cfg |= {"layers": [int(layer) for layer in layers if layer]}
                cfg.setdefault("shared_penalty", 0.1)
            dropped = ("loss_weights", "ignore_tokens", "outlier_norm")
            cfg = {key: cfg[key] for key in cfg if key not in dropped}
            weights = safetensors.torch.load_file(folder / "crosscoder.safetensors")
            n_layers, d_model, d_sae = weights["W_enc"].shape
            weights.setdefault("mean", torch.zeros(n_layers, d_model))  # an earlier version has none
            is_finite = all(weight.isfinite().all() for weight in weights.values())
            if not is_finite or not weights["norm_factor"].min() > 0 or weights["W_enc"].numel() == 0:
                raise ValueError("weights are not finite, none, or divided by 0")
            cfg |= {"dict_size": d_sae, "device": device, "buffer_device": device, "model_device": device}
            crosscoder = cls(cfg, n_layers, d_model)
            crosscoder.load_state_dict({key: take_share(key, weights[key]) for key in weights})
        except Exception as error:
            raise bad("path", str(folder), f"it holds no crosscoder: {error!r:.200}") from None
        return crosscoder


# ---- Buffer --------------------------------------------------------------------------------------
class Buffer:
    """The shuffled activation buffer: runs the models over all_tokens, serves their activations.

    It has batch_size * buffer_mult slots. Each holds a row: the raw activations [n_layers, d_model]
    at one (sequence, position), position 0 left out. The first next or refresh fills it; once half
    of it is served, exactly those slots are filled with the rows that come next. Row r is position
    1 + r % (seq_len - 1) of sequence r // (seq_len - 1), and sequences are counted on from one
    epoch to the next: with seq_len 128, row 130 is position 4 of sequence 1. What is shuffled is
    slot numbers, never rows: there is no second buffer. ValueError where all_tokens do not fill it
    once, FloatingPointError for activations that are not finite."""
    STATE = ("order", "row_numbers", "pointer", "next_row", "bounds", "rows_served")

    def __init__(self, cfg: dict, models: list, all_tokens: Tokens):
        self.cfg = cfg
        self.models = models
        self.all_tokens = all_tokens
        self.rows_per_seq = all_tokens.shape[1] - 1
        self.rows_per_epoch = len(all_tokens) * self.rows_per_seq
        self.size = cfg["batch_size"] * cfg["buffer_mult"]
        if self.rows_per_epoch < self.size:
            raise bad("buffer_mult", cfg["buffer_mult"], f"{self.size:,} rows in the buffer, but only "
                      f"{self.rows_per_epoch:,} in the text; lower it, or give more text")
        device = cfg["buffer_device"]
        resids = get_stacked_resids(models, all_tokens[:1, :2], cfg)  # [1, 2, n_layers, d_model]
        self.buffer = resids.new_empty(self.size, *resids.shape[2:], device=device)
        self.pinned = "cuda" in cfg["device"] and not self.buffer.is_cuda  # for faster copies
        self.generator = torch.Generator().manual_seed(cfg["seed"])
        self.order = torch.arange(self.size, device=device)  # the slots, in the order of serving
        self.row_numbers = torch.zeros_like(self.order)  # of the row in each slot
        self.pointer = self.size  # how many of order are served; at first all slots are free
        self.next_row = 0  # the first that is not yet harvested
        self.bounds = [0]  # pass i of the models gave the rows bounds[i] to bounds[i + 1] - 1
        self.rows_served = 0

    def refresh(self) -> None:
        """Fills the served slots with the next rows, and shuffles the order of all slots."""
        if self.pointer == 0:
            return
        end = self.next_row + self.pointer
        # Each pass ends with a sequence, but for the last, which may end within one; the next
        # refresh then runs that sequence again.
        rows_per_pass = self.cfg["model_batch_size"] * self.rows_per_seq
        first_end = self.next_row - self.next_row % self.rows_per_seq + rows_per_pass
        bounds = [self.next_row, *range(first_end, end, rows_per_pass), end]
        # Drawn while a GPU is still at the last steps, and from a copy, in case harvest fails.
        generator = self.generator.clone_state()
        order = send(torch.randperm(self.size, generator=generator), self.buffer.device)
        served = self.order[: self.pointer]
        row_numbers = self.row_numbers.clone()
        row_numbers[served] = torch.arange(self.next_row, end, device=served.device)
        self.harvest(row_numbers, bounds)

        self.row_numbers = row_numbers
        self.bounds = self.bounds + bounds[1:]
        self.order = order
        self.generator = generator
        self.next_row = end
        self.pointer = 0

    @torch.no_grad()
    def harvest(self, row_numbers: Int[Tensor, "size"], bounds: list[int]) -> None:
        """Runs each of the passes between these bounds that gives a row in row_numbers, and puts
        its rows into their slots; others stay. A row comes out the same to the last bit only beside
        the same sequences, so a resumed run has to repeat the passes as they were."""
        numbers, slots = row_numbers.sort()
        splits = torch.searchsorted(numbers, send(torch.tensor(bounds), numbers.device)).tolist()
        numbers = numbers.to(self.cfg["device"])
        finite = []  # read once, as to read one is to wait for the device
        passes = list(zip(bounds, bounds[1:], splits, splits[1:]))
        bar = tqdm.tqdm(passes, desc="filling the buffer", leave=False, disable=bounds[0] > 0)
        for start, end, low, high in bar:
            if low == high:
                continue
            first_seq = start // self.rows_per_seq
            seqs = torch.arange(first_seq, math.ceil(end / self.rows_per_seq))
            tokens = self.all_tokens[seqs % len(self.all_tokens)]
            resids = get_stacked_resids(self.models, tokens, self.cfg)
            row_seqs = numbers[low:high] // self.rows_per_seq
            x = resids[row_seqs - first_seq, numbers[low:high] % self.rows_per_seq + 1]
            finite.append(x.sum((1, 2)).isfinite())
            if self.pinned:
                x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
            self.buffer[slots[low:high]] = x.to(self.buffer.device)
            del resids, x  # before the next are made
        finite = torch.cat(finite)
        if not finite.all():
            broken = numbers[splits[0] :][~finite] // self.rows_per_seq % len(self.all_tokens)
            raise FloatingPointError(f"activations of sequences {broken.unique().tolist()} not finite")

    def next(self) -> Resids:
        """The next batch of raw activations, on cfg["device"], in the models' type."""
        if self.pointer >= self.size / 2:
            self.refresh()
        slots = self.order[self.pointer : self.pointer + self.cfg["batch_size"]]
        self.pointer += len(slots)
        self.rows_served += len(slots)
        x = torch.empty_like(self.buffer[: len(slots)], pin_memory=self.pinned)
        torch.index_select(self.buffer, 0, slots, out=x)
        return x.to(self.cfg["device"], non_blocking=self.pinned)

    def peek(self) -> Resids:
        """All ranks' rows of the next four batches, or of as many as are left, without serving them."""
        slots = self.order[self.pointer : self.pointer + 4 * self.cfg["batch_size"]]
        return gather(self.buffer[slots].to(self.cfg["device"]))

    def start_at(self, seq: int) -> None:
        """Fills an empty buffer from this sequence on."""
        self.rows_served = self.next_row = seq * self.rows_per_seq
        self.bounds = [self.next_row]
        self.refresh()

    def hash_text(self) -> Int[Tensor, "32"]:
        """SHA-256 of the sequences that were read so far."""
        text = self.all_tokens[: math.ceil(self.next_row / self.rows_per_seq)]
        digest = hashlib.sha256(text.contiguous().cpu().numpy()).digest()
        return torch.frombuffer(bytearray(digest), dtype=torch.uint8)

    def state_dict(self) -> dict:
        """All but the activations, which load_state_dict harvests again."""
        state = {name: getattr(self, name) for name in self.STATE}
        return {**state, "generator": self.generator.get_state(), "text": self.hash_text()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a state_dict; ValueError where the text is another."""
        for name in self.STATE:
            value = state[name]
            if isinstance(value, Tensor):
                value = value.to(self.buffer.device)
            setattr(self, name, value)
        if len(self.order) != self.size or self.next_row - self.rows_served != self.size - self.pointer:
            raise bad("resume", self.cfg["resume"], "its buffer's state is not one of this run")
        if not torch.equal(self.hash_text(), state["text"].cpu()):
            raise bad("tokens", self.cfg["tokens"] or self.cfg["dataset"], "not the text of the run so far")
        self.generator.set_state(state["generator"].cpu())
        self.harvest(self.row_numbers, self.bounds)


# ---- Evaluation ----------------------------------------------------------------------------------
def iter_rows(models: list, tokens: Tokens, cfg: dict) -> Iterator[Tensor]:
    """Raw activations on tokens, without position 0, [up to batch_size, n_layers, d_model] each."""
    for batch in tokens.split(cfg["model_batch_size"]):
        x = get_stacked_resids(models, batch, cfg)[:, 1:].flatten(0, 1)
        yield from x.split(cfg["batch_size"])
        del x  # before the next is made


@torch.no_grad()
def get_stats(crosscoder: CrossCoder, models: list, tokens: Tokens, cfg: dict) -> dict:
    """How the crosscoder reconstructs and fires on tokens without position 0. On the CPU, in float64:
    fvu [n_layers]: sum ||x - x_hat||^2 / sum ||x - E x||^2; nan where x is constant
    fvu_all: the same over all sources, source l weighted by norm_factor[l] ** -2, as in the loss
    norm_ratio [n_layers]: E||x_hat|| / E||x||, below 1 where there is shrinkage
    mean [n_layers, d_model]: E x; l0: active latents a token; freqs [d_sae]: how often each fires.
    Of several ranks each reads all tokens, with its own latents."""
    n_rows = totals = means = fires = 0
    center = None  # near the mean; squares around 0 would have lost the digits of the variance
    for x in iter_rows(models, tokens, cfg):
        x = x.float()
        if center is None:
            center = x.mean(0)
        acts = crosscoder.encode(x)
        x_hat = crosscoder.decode(acts)
        sums = torch.stack([
            (x - center).pow(2).sum((0, 2)), (x - x_hat).pow(2).sum((0, 2)),
            x.norm(dim=-1).sum(0), x_hat.norm(dim=-1).sum(0)])
        totals = totals + sums.cpu().double()  # [4, n_layers]
        means = means + (x - center).sum(0).cpu().double()
        fires = fires + (acts > 0).sum(0).cpu().double()
        n_rows += len(x)
    squares, errors, norms, norms_hat = totals
    means = means / n_rows
    variances = squares - n_rows * means.pow(2).sum(-1)  # [n_layers]
    means = means + center.cpu().double()
    variances[variances <= 1e-14 * n_rows * means.pow(2).sum(-1)] = math.nan  # nothing to explain
    weights = crosscoder.norm_factor.cpu().double().pow(-2)
    return {
        "fvu": errors / variances,
        "fvu_all": (errors * weights).sum() / (variances * weights).nansum(),
        "norm_ratio": norms_hat / norms,
        "mean": means,
        "l0": sum_ranks(fires.sum()) / n_rows,
        "freqs": fires / n_rows}


@torch.no_grad()
def get_ce(model, tokens: Tokens, splices: list[tuple[str, Tensor]] = []) -> float:
    """A model's mean next-token cross-entropy in nats, each (hook name, activations [batch, pos,
    d_model]) of splices standing in for the model's own activations. Position 0 keeps its own."""
    hooks = []
    changes = {}

    def splice(act, hook, name, new):
        new = new.to(act).view_as(act)
        spliced = torch.cat([act[:, :1], new[:, 1:]], dim=1)
        changes[name] = spliced - act
        return spliced

    def add_change(act, hook, name):
        return act + changes[name]

    for name, new in splices:
        hooks.append((name, partial(splice, name=name, new=new)))
        # Only the MLP reads TransformerLens 4's resid_mid; so what goes round it is changed, too.
        if name.endswith("resid_mid"):
            hooks.append((name.replace("mid", "post"), partial(add_change, name=name)))
    tokens = tokens.to(model.cfg.device).long()
    logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    # One sequence at a time takes less memory.
    losses = [F.cross_entropy(row[:-1].float(), ids[1:]) for row, ids in zip(logits, tokens)]
    return torch.stack(losses).mean().item()


def get_rises(x: Resids, models: list, tokens: Tokens, clean: list[float], cfg: dict) -> dict[str, float]:
    """By how much splicing x in raises the cross-entropy over clean, which has one per model: for
    each source alone, by its name; and as "all" for all of a model's sources, mean over models."""
    sources = get_sources(models, cfg)
    rises = {}
    splices = [[] for _ in models]
    for i, name in enumerate(source_names(cfg, len(sources))):
        m, hook = sources[i]
        splices[m].append((hook, x[:, :, i]))
        rises[name] = get_ce(models[m], tokens, splices[m][-1:]) - clean[m]
    together = [get_ce(model, tokens, splices[m]) - clean[m] for m, model in enumerate(models)]
    rises["all"] = sum(together) / len(models)
    return rises


@torch.no_grad()
def evaluate(crosscoder: CrossCoder, models: list, tokens: Tokens, cfg: dict) -> dict:
    """get_stats and cross-entropies on tokens as a flat dict of floats, a key per source.
    ce/clean: of the models, in nats. ce/delta_*: what it rises by with the reconstruction in place
    of a source, or of all. ce/ablated_*: with the mean. An acausal reconstruction has seen later
    layers, which can flatter it."""
    stats = get_stats(crosscoder, models, tokens, cfg)
    metrics = {"fvu/all": stats["fvu_all"].item(), "sparsity/l0": stats["l0"].item()}
    for i, name in enumerate(source_names(cfg, len(stats["fvu"]))):
        metrics[f"fvu/{name}"] = stats["fvu"][i].item()
        metrics[f"norm_ratio/{name}"] = stats["norm_ratio"][i].item()
    for batch in tokens.split(cfg["model_batch_size"]):
        clean = [get_ce(model, batch) for model in models]
        x = get_stacked_resids(models, batch, cfg)
        x_hat = [crosscoder(rows).to(x) for rows in x.flatten(0, 1).split(cfg["batch_size"])]
        x_hat = torch.cat(x_hat).view_as(x)
        ces = {"ce/clean": sum(clean) / len(models)}
        mean = stats["mean"].to(x).expand_as(x)
        for kind, new in (("delta", x_hat), ("ablated", mean)):
            for name, rise in get_rises(new, models, batch, clean, cfg).items():
                ces[f"ce/{kind}_{name}"] = rise
        for key, ce in ces.items():
            metrics[key] = metrics.get(key, 0.0) + ce * len(batch) / len(tokens)
        del x, x_hat, mean, new  # before the next are made
    return metrics


# ---- Files ---------------------------------------------------------------------------------------
@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary path to write a file or a folder at; it becomes path once it is whole and on the
    disk. A file that was there is replaced. OSError where a folder was, which stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        new = Path(temporary) / path.name
        yield new
        for file in (*new.glob("*"), new):
            flush(file)
        new.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Has a file or a folder written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def get_axis(name: str, tensor: Tensor) -> int | None:
    """Along which axis the ranks share a checkpoint's tensor; None where each has all of it."""
    if get_ranks()[1] == 1 or tensor.ndim == 0 or name in ("norm_factor", "mean") or "b_dec" in name:
        return None
    return 2 if "W_enc" in name else 0


def join_shares(name: str, tensor: Tensor) -> Tensor:
    """A checkpoint's tensor; of several ranks, on the first, what all have of it, on the CPU."""
    axis = get_axis(name, tensor)
    if axis is None:
        return tensor.contiguous()
    rank, n_ranks = get_ranks()
    tensor = tensor.cpu().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(n_ranks)] if rank == 0 else None
    dist.gather(tensor, parts)
    return torch.cat(parts or [tensor], axis)


def take_share(name: str, tensor: Tensor) -> Tensor:
    """What this rank has of a checkpoint's tensor."""
    axis = get_axis(name, tensor)
    if axis is None:
        return tensor
    rank, n_ranks = get_ranks()
    return tensor.tensor_split(n_ranks, axis)[rank]


def get_identity(file: Path) -> dict:
    """What manifest.json says of a file."""
    with open(file, "rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": sha256}


def list_checkpoints(run: Path) -> list[Path]:
    """The folders step_N in a run's folder, by N."""
    names = [name for name in glob.glob("step_*", root_dir=run) if name[5:].isdecimal()]
    return [run / name for name in sorted(names, key=lambda name: int(name[5:]))]


def find_checkpoint(key: str, path: Path, names: list[str]) -> Path:
    """A checkpoint whose files of these names are whole: path, or the newest in a run's folder,
    passing over damaged ones and saying so. ValueError, naming the key, where there is none."""
    folders = list_checkpoints(path) or [path]
    while folders:
        folder = folders.pop()
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            for name in names:
                if manifest.get(name) != get_identity(folder / name):
                    raise ValueError(f"{name} is not as in manifest.json")
            return folder
        except Exception as error:
            problem = bad(key, str(folder), f"no checkpoint, or a damaged one ({error}); give a run's "
                          "folder, version_N, or a step_N in it")
        if folders:
            print(f"{problem}; trying the one before", file=sys.stderr)
    raise problem


def open_run(cfg: dict) -> tuple[Path, filelock.FileLock]:
    """The folder of the run to resume, or of a new one, save_dir/version_N, N the first that is not
    taken; and a lock on it. ValueError where it is not writable, or another process trains there."""
    folder = Path(cfg["resume"]).parent
    try:
        numbers = itertools.count()
        while not cfg["resume"]:  # a new run takes the first number that is free
            folder = Path(os.path.expanduser(cfg["save_dir"])).resolve() / f"version_{next(numbers)}"
            with suppress(FileExistsError):  # of another run, perhaps started at this moment
                folder.mkdir(parents=True)
                break
        lock = filelock.FileLock(folder / ".lock", blocking=False)
        lock.acquire()
        for left in folder.glob(".step_*"):  # where a process died while writing
            shutil.rmtree(left)
        for later in reversed(list_checkpoints(folder)):
            if later.name == Path(cfg["resume"]).name:
                break
            with suppress(ValueError):  # damaged, as make_cfg has found; or else it is new
                find_checkpoint("resume", later, RUN_FILES)
                raise filelock.Timeout(folder)
            aside = folder / f"damaged_{later.name}"
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)
    except filelock.Timeout:
        raise bad("resume", cfg["resume"], f"another run is or was at work in {folder}") from None
    except OSError as error:
        raise bad("save_dir", cfg["save_dir"], f"no writing in {folder} ({error.strerror})") from None
    return folder, lock


# ---- Trainer -------------------------------------------------------------------------------------
MOST_SKIPPED = 10  # steps in a row before a run stops
LIVE = "loss {loss/total:.1f} FVU {fvu/batch:.3f} L0 {sparsity/l0_batch:.1f} {perf/tokens_per_s:,.0f} tok/s"


def make_adam(crosscoder: CrossCoder, cfg: dict) -> torch.optim.Adam:
    """Adam, with a group for each parameter, which learns at the group's scale times the rate. unlike [J25]:
    thresholds learn at the full rate, or in a short run they hardly move."""
    # b_enc at 20 times, as nothing else moves h on all rows: tests/RESULTS.md, At size. Not relu's: it is as
    # published, or steer moves it, and latents died at 20 times: the same, An L0 to aim at.
    scales = {} if cfg["activation"] == "relu" else {"b_enc": 20.0}
    parameters = crosscoder.named_parameters()
    groups = [{"params": [p], "scale": scales.get(name, 1.0)} for name, p in parameters]
    return torch.optim.Adam(groups, cfg["lr"], betas=(cfg["beta1"], cfg["beta2"]), fused=True)


def step_adam(optimizer: torch.optim.Adam, grad_norm: Float[Tensor, ""], skip: Float[Tensor, ""]) -> None:
    """A step on gradients clipped to a norm of 1, or none where skip is 1, without writing the
    clipped gradients and without a wait for the device. Fused Adam can do both, for mixed
    precision: it divides gradients by grad_scale, and does nothing where found_inf is 1. This saves
    a tenth of the step on 2 cores: tests/RESULTS.md, Speed."""
    optimizer.grad_scale = grad_norm.clamp(min=1.0)
    optimizer.found_inf = skip
    optimizer.step()
    optimizer.zero_grad()


class Trainer:
    """Trains a crosscoder on the models' activations over all_tokens, whose last cfg["eval_seqs"]
    sequences are held out; from where the checkpoint cfg["resume"] leaves off, if one is given. buffer:
    one that is there already, and may serve others, too."""
    STATE = (
        "step_counter", "evaluated_at", "history", "wandb_id", "tokens_since_fired", "is_dead",
        "steps_skipped", "log_scale", "n_ranks")

    def __init__(self, cfg: dict, models: list, all_tokens: Tokens, buffer: Buffer | None = None):
        self.cfg = cfg
        self.models = models
        self.rank, self.n_ranks = get_ranks()
        self.eval_tokens = all_tokens[-cfg["eval_seqs"] :]
        share = {"batch_size": cfg["batch_size"] // self.n_ranks, "seed": cfg["seed"] + self.rank}
        tokens = all_tokens[: -cfg["eval_seqs"]][self.rank :: self.n_ranks]
        self.buffer = buffer or Buffer(cfg | share, models, tokens)
        n_layers, d_model = self.buffer.buffer.shape[1:]
        self.crosscoder = CrossCoder({**cfg, "resume": ""}, n_layers, d_model)  # its cfg.json is for anyone
        self.optimizer = make_adam(self.crosscoder, cfg)
        self.step_counter = 0
        self.total_steps = cfg["num_tokens"] // cfg["batch_size"]
        self.tokens_since_fired = torch.zeros_like(self.crosscoder.b_enc, dtype=torch.long)
        self.is_dead = torch.zeros_like(self.crosscoder.b_enc, dtype=torch.uint8)  # for AuxK to revive
        self.dead: Int[Tensor, "n_dead"] | None = None  # their numbers, for get_losses
        self.log_scale = torch.zeros((), device=cfg["device"])  # log of steer's factor on relu's coefficient
        self.steps_skipped = torch.zeros((), device=cfg["device"])
        self.skipped_in_a_row = torch.zeros((), device=cfg["device"])
        self.history: list[dict] = []  # all that was logged
        self.evaluated_at = -1  # the step of the last evaluation in it
        self.wandb_id = secrets.token_hex(4)
        self.wandb_failed = self.rank > 0  # the first rank speaks for all
        self.stop: BaseException | None = None  # train raises it after the step
        self.save_soon = False  # train saves after the step
        if cfg["init_from"] and not cfg["resume"]:
            self.crosscoder.start_from(CrossCoder.load(cfg["init_from"], cfg["device"]))
        own = {}
        if self.rank > 0:  # whose log nobody reads
            self.temporary = tempfile.TemporaryDirectory()
            own = {"save_dir": self.temporary.name, "resume": ""}
        self.run_dir, self.lock = open_run(cfg | own)
        if cfg["resume"]:
            self.load(Path(cfg["resume"]))
            return
        self.buffer.refresh()
        if cfg["init_from"]:
            return  # normalised and calibrated as its parent
        if not cfg["norm"]:
            self.crosscoder.norm_factor.copy_(self.get_norm_factor())
        self.crosscoder.calibrate(self.buffer.peek())

    def get_norm_factor(self) -> Float[Tensor, "n_layers"]:
        """E||x|| / sqrt(d_model) of each source, over the rows in the buffer."""
        rows = self.buffer.buffer
        norms = sum(x.float().norm(dim=-1).sum(0) for x in rows.split(self.cfg["batch_size"]))
        norms = sum_ranks(norms) / self.n_ranks
        if not (norms.isfinite() & (norms > 0)).all():
            raise bad("site", self.cfg["site"], "its activations are all 0, or not finite")
        return norms / len(rows) / math.sqrt(rows.shape[-1])

    # ---- Trainer: schedules
    def get_lr(self) -> float:
        """Up over the first 5% of the steps, then flat, down to zero over the last 20% [A24]."""
        warm_up = (self.step_counter + 1) / (0.05 * self.total_steps)
        decay = (self.total_steps - self.step_counter) / (0.2 * self.total_steps)
        return self.cfg["lr"] * max(0.0, min(1.0, warm_up, decay))

    def get_rise(self) -> float:
        """The share of the sparsity coefficient that is reached. relu: from 0 to 1 over the first 5% of the
        steps [A24]. jumprelu: over all steps [J25]. With an l0: over 35%, never below where l0 / rise, which
        steer aims at, is the tenth of all latents that calibrate leaves active; of a child all at once."""
        progress = self.step_counter / self.total_steps
        if self.cfg["l0"]:
            start = 1.0 if self.cfg["init_from"] else 10 * self.cfg["l0"] / self.cfg["dict_size"]
            return min(1.0, max(start, progress / 0.35))
        span = 0.05 if self.cfg["activation"] == "relu" else 1.0
        return min(1.0, progress / span)

    def get_l1_coeff(self) -> float | Tensor:
        """The sparsity penalty's coefficient; with an l0 a tensor, relu's scaled by what steer has found."""
        coeffs = {"relu": self.cfg["l1_coeff"], "jumprelu": self.cfg["l0_coeff"]}
        coeff = coeffs.get(self.cfg["activation"], 0.0) * self.get_rise()
        return coeff * self.log_scale.exp() if self.cfg["l0"] else coeff

    @torch.no_grad()
    def steer(self, l0: Float[Tensor, ""], skip: Bool[Tensor, ""]) -> None:
        """After a batch with this L0, unless skip, moves L0 towards cfg["l0"] / rise, an aim that falls while
        the coefficient rises. jumprelu: all thresholds are multiplied by (L0 / aim) ** 0.05, or, while little
        of the coefficient is reached, by less. Adam alone moves one by about its rate a step, too slow for a
        short run; what it learns is which are higher. relu: each b_enc moves by such a share of its size. A
        coefficient that is too large would shrink the decoder to nothing: it is lowered while L0 is below
        the aim, and comes back, up to l1_coeff, while L0 is above."""
        rise = self.get_rise()
        error = ~skip * rise * (l0 * rise / self.cfg["l0"]).clamp(min=0.1, max=10).log()
        if self.cfg["activation"] == "jumprelu":
            self.crosscoder.log_threshold += 0.05 * error
        else:
            self.crosscoder.b_enc -= 0.05 * error * self.crosscoder.b_enc.abs()
            # At a fifth of this speed, ten times a usual coefficient fell too late: tests/RESULTS.md.
            change = 1000 * self.get_lr() * error
            self.log_scale = (self.log_scale + change).clamp(-5, 0)  # a factor of 1/148 to 1

    def get_k(self) -> int:
        """topk, batchtopk: from 8 k down to k over the first 5% of the steps."""
        progress = min(1.0, self.step_counter / self.total_steps / 0.05)
        return min(self.cfg["dict_size"], round(self.cfg["k"] * (8 - 7 * progress)))

    # ---- Trainer: training
    def step(self, x: Resids | None = None) -> dict[str, float | Tensor]:
        """One step on the buffer's next batch, or on x, this rank's share of one. Metrics stay tensors, as
        reading one waits for the device."""
        cfg = self.cfg
        lr = self.get_lr()
        l1_coeff = self.get_l1_coeff()
        if cfg["aux_coeff"] and self.step_counter % 100 == 0:  # seldom, as it waits for the device
            self.is_dead = (self.tokens_since_fired >= cfg["dead_after"]).byte()
            self.find_dead()
        if x is None:
            x = self.buffer.next()
        losses = self.crosscoder.get_losses(gather(x), self.get_k(), self.dead)
        loss = losses.l2_loss + l1_coeff * losses.l1_loss + losses.aux_loss
        loss.backward()
        self.crosscoder.constrain(self.crosscoder.W_enc.grad, self.crosscoder.W_dec.grad)

        # A step that is not finite is skipped. After MOST_SKIPPED in a row every step is skipped,
        # until run_steps ends the run at the next log. Rows first, as in one go the norm of 75
        # million numbers is off by 0.7% in fp32 on a CPU.
        parameters = self.crosscoder.named_parameters()  # every rank has all of b_dec: it counts once
        grad_norms = [p.grad.norm(dim=-1) for name, p in parameters if name != "b_dec" or self.rank == 0]
        grad_norm = sum_ranks(nn.utils.get_total_norm(grad_norms).square()).sqrt()
        skip = ~(loss.detach() + grad_norm).isfinite() | (self.skipped_in_a_row >= MOST_SKIPPED)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        step_adam(self.optimizer, grad_norm, skip.float())

        self.steps_skipped = self.steps_skipped + skip  # not in place, as the metrics hold it
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skip
        self.tokens_since_fired += cfg["batch_size"]
        self.tokens_since_fired.masked_fill_(losses.fired > 0, 0)
        if cfg["l0"]:
            self.steer(losses.l0_loss, skip)
        self.step_counter += 1
        return {
            "loss/total": loss.detach(), "loss/l2": losses.l2_loss.detach(),
            "loss/l1": losses.l1_loss.detach(), "loss/aux": losses.aux_loss.detach(),
            "loss/l1_coeff": l1_coeff, "loss/lr": lr, "loss/grad_norm": grad_norm,
            "fvu/batch": losses.fvu, "sparsity/l0_batch": losses.l0_loss,
            "data/epochs": self.buffer.rows_served / self.buffer.rows_per_epoch,
            "data/steps_skipped": self.steps_skipped}

    def find_dead(self) -> None:
        """Has get_losses revive what is dead, if any is on any rank."""
        self.dead = None
        if sum_ranks(self.is_dead.sum()) > 0:
            self.dead = self.is_dead.nonzero().flatten()

    def evaluate(self) -> dict[str, float]:
        """evaluate() on the held-out sequences, and the share of latents that are dead."""
        self.crosscoder.fit_threshold(self.buffer.peek())  # never on the text that is scored
        dead = (self.tokens_since_fired >= self.cfg["dead_after"]).float().mean()
        metrics = evaluate(self.crosscoder, self.models, self.eval_tokens, self.cfg)
        return {**metrics, "sparsity/dead": sum_ranks(dead).item() / self.n_ranks}

    def train(self) -> dict[str, float]:
        """Trains to the end; returns the last evaluation. self.stop, once set, is raised after the
        step. Whatever ends it, it saves; but for a FloatingPointError, where loss or gradients of
        MOST_SKIPPED steps in a row are not finite; of several ranks only after a stop."""
        self.lock.acquire()  # An earlier train() that was stopped has given it back,
        self.optimizer.zero_grad()  # and may have left gradients.
        try:
            self.call_wandb(
                "init", project="crosscoders", dir=self.run_dir, config=self.cfg, id=self.wandb_id,
                mode=self.cfg["wandb_mode"], resume="allow",
                settings={"init_timeout": 30, "finish_timeout": 30})
            self.run_steps()
            while not self.save():  # try again rather than lose it
                self.agree()
                time.sleep(5)
            final = self.evaluate()
            self.log(final)
            return final
        except BaseException as error:
            # After that many bad steps the checkpoint before is better than what there is now. And it
            # takes all ranks to save, which only a stop ends together.
            if self.skipped_in_a_row < MOST_SKIPPED and (self.n_ranks == 1 or error is self.stop):
                self.save()
            raise
        finally:
            self.call_wandb("finish")
            self.lock.release(force=True)
            self.stop = None

    def agree(self) -> bool:
        """Raises self.stop if any rank has one; -> whether any is to save soon. Signals do not come to
        all ranks in the same step, and all have to stop or save after the same."""
        wishes = torch.tensor([self.stop is not None, self.save_soon]).float()
        stop, save = sum_ranks(wishes).tolist()
        if stop:
            self.stop = self.stop or KeyboardInterrupt()
            raise self.stop
        return save > 0

    def run_steps(self) -> None:
        """The steps that are left, with evaluations, logs and checkpoints between them."""
        cfg = self.cfg
        last_step = self.step_counter
        last_time = time.time()
        with tqdm.tqdm(initial=last_step, total=self.total_steps, desc="training", unit="step") as bar:
            while self.step_counter < self.total_steps:
                if self.step_counter % cfg["eval_every"] == 0 and self.step_counter != self.evaluated_at:
                    self.log(self.evaluate())
                    self.evaluated_at = self.step_counter
                metrics = self.step()
                bar.update()
                is_last = self.step_counter == self.total_steps
                if self.step_counter % cfg["log_every"] == 0 or is_last:
                    tokens = (self.step_counter - last_step) * cfg["batch_size"]
                    self.log({**metrics, "perf/tokens_per_s": tokens / (time.time() - last_time)})
                    last_step = self.step_counter
                    last_time = time.time()
                    bar.set_postfix_str(LIVE.format_map(self.history[-1]))
                    if self.skipped_in_a_row >= MOST_SKIPPED:
                        norms = self.buffer.buffer.norm(dim=-1).amax(0).tolist()
                        norms = dict(zip(source_names(cfg, len(norms)), norms))
                        raise FloatingPointError(
                            f"step {self.step_counter}: loss or gradients not finite {MOST_SKIPPED} "
                            f"times in a row; largest norms: {norms}")
                is_asked = self.agree()
                is_due = self.step_counter % cfg["save_every"] == 0 and not is_last
                if (is_due or is_asked) and not self.skipped_in_a_row:  # else weights may be bad
                    self.save_soon = False
                    self.save()

    # ---- Trainer: logs and checkpoints
    def log(self, metrics: dict[str, float | Tensor]) -> None:
        """Puts metrics into history, metrics.jsonl and wandb."""
        row = {"step": self.step_counter, **{key: float(value) for key, value in metrics.items()}}
        self.history.append(row)
        with suppress(OSError), open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")  # if it cannot, the next save writes all of history
        self.call_wandb("log", row, step=self.step_counter)

    def write_history(self) -> None:
        """Writes metrics.jsonl anew."""
        with atomically(self.run_dir / "metrics.jsonl") as new:
            new.write_text("".join(json.dumps(row) + "\n" for row in self.history))

    def call_wandb(self, function: str, *args, **kwargs) -> None:
        """Calls a function of wandb's, which must never stop a run: after a failure none is called."""
        if self.wandb_failed:
            return
        try:
            getattr(wandb, function)(*args, **kwargs)
        except Exception as error:
            tqdm.tqdm.write(f"wandb failed ({error!r:.200}); the run goes on without it", file=sys.stderr)
            self.wandb_failed = True

    def save(self) -> Path | None:
        """Writes this step's checkpoint, save_dir/version_N/step_NNNNNNN, unless it is there, and the
        log; removes all but the newest cfg["keep"]. -> the folder, or None where it cannot write"""
        path = self.run_dir / f"step_{self.step_counter:07d}"
        self.crosscoder.fit_threshold(self.buffer.peek())
        state = {name: getattr(self, name) for name in self.STATE}
        state |= {f"buffer.{key}": value for key, value in self.buffer.state_dict().items()}
        for name, parameter in self.crosscoder.named_parameters():
            moments = self.optimizer.state[parameter]
            state |= {f"adam.{name}.{key}": value for key, value in moments.items()}
        written = torch.ones(())
        try:
            is_there = torch.tensor(float(path.exists()))  # all ranks ask the first one's folder
            if not sum_ranks(is_there):
                self.crosscoder.save(path, state)
            self.write_history()
        except (OSError, safetensors.SafetensorError) as error:
            tqdm.tqdm.write(f"cannot save {path} ({error})", file=sys.stderr)
            written = torch.zeros(())
        if sum_ranks(written) < self.n_ranks:  # all wait for the one that writes
            return None
        for old in list_checkpoints(self.run_dir)[: -self.cfg["keep"]]:
            with suppress(OSError):  # it only takes space
                shutil.rmtree(old.rename(old.with_name(f".{old.name}")))  # nobody sees half of it
        return path

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint: with its weights, moments, counters, log and buffer."""

        def select(prefix: str) -> dict:
            return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}

        try:
            weights = safetensors.torch.load_file(folder / "crosscoder.safetensors")
            self.crosscoder.load_state_dict({key: take_share(key, weights[key]) for key in weights})
            state = safetensors.torch.load_file(folder / "trainer.safetensors")
            # Copied, as tensors in a file are not aligned, which changes some sums' last bits.
            device = self.cfg["device"]
            state = {key: take_share(key, state[key]).to(device, copy=True) for key in state}
            state |= json.loads((folder / "trainer.json").read_text())
            for name in self.STATE:
                if type(state[name]) is not type(getattr(self, name)):
                    raise TypeError(name)
                setattr(self, name, state[name])
            for name, parameter in self.crosscoder.named_parameters():
                self.optimizer.state[parameter] = select(f"adam.{name}.")
            self.find_dead()
        except Exception as error:
            raise bad("resume", str(folder), f"not a run of this version ({error!r:.200})") from None
        before = self.n_ranks
        _, self.n_ranks = get_ranks()
        if before == self.n_ranks:
            self.buffer.load_state_dict(select("buffer."))
        else:
            print(f"{folder}: of {before} ranks; {self.n_ranks} begin with a new buffer", file=sys.stderr)
            seqs = before * math.ceil(state["buffer.next_row"] / self.buffer.rows_per_seq)  # read so far
            self.buffer.start_at(math.ceil(seqs / self.n_ranks))
        self.write_history()  # without what was logged after the checkpoint
