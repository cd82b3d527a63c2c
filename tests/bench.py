"""How fast training is, beside a plain reference and beside what the machine allows.

    python tests/bench.py --size=cpu            12 x 768, dictionary 4,096, batch 512, sequences of 128 and 1,024
    python tests/bench.py --size=gpu --json     12 x 768, dictionaries 2^14 and 2^16, batch 4,096, sequences of 1,024
    python tests/bench.py --activations         losses and gradients of each activation, dictionaries 2^12 to 2^16

The language model has GPT-2 Small's shape and random weights, so nothing is downloaded. All that is compared is measured
in this process, in turns, and given as medians. The reference is the published arithmetic written out plainly: fp32
einsum encode and decode, unfused Adam, three .item() a step; run_with_cache with logits under bf16 autocast; a buffer
shuffled by indexing it. The limit is six matrix products at the bf16 rate of a large one, measured here, and 28 bytes a
parameter of Adam at the copy bandwidth, measured here; for harvesting, the model body's products without the unembedding.
"""
import argparse
import gc
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import einops
import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from train import load_models, make_cfg, tune_allocator
from utils import CrossCoder, Trainer, get_stacked_resids


TINY = Path(__file__).parent / "tiny"


def save_gpt2(folder: str, small: bool = False) -> None:
    """A model folder: GPT-2 Small's shape, or that of a smaller one, and random weights."""
    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_embd": 64, "n_head": 4} if small else {}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(folder)


class Reference:
    """The published crosscoder's step, harvest and buffer, from its formulas."""

    def __init__(self, cfg: dict, model, all_tokens: torch.Tensor):
        self.cfg = cfg
        self.model = model
        self.all_tokens = all_tokens
        shape = model.cfg.n_layers, model.cfg.d_model
        start = CrossCoder({**cfg, "enc_dtype": "fp32"}, *shape)
        self.weights = {name: nn.Parameter(p.detach().clone()) for name, p in start.named_parameters()}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=cfg["lr"], foreach=False, fused=False)
        self.buffer = torch.zeros(cfg["batch_size"] * cfg["buffer_mult"], *shape, dtype=torch.bfloat16, device=cfg["device"])

    def step(self, x: torch.Tensor) -> tuple[float, float, float]:
        """-> l2, l1, l0"""
        w = self.weights
        x = x.float()
        acts = torch.relu(einops.einsum(x, w["W_enc"], "b l d, l d s -> b s") + w["b_enc"])
        x_hat = einops.einsum(acts, w["W_dec"], "b s, s l d -> b l d") + w["b_dec"]
        l2 = (x_hat - x).pow(2).sum((1, 2)).mean()
        l1 = (acts * w["W_dec"].norm(dim=-1).sum(1)).sum(-1).mean()
        l0 = (acts > 0).float().sum(-1).mean()
        (l2 + self.cfg["l1_coeff"] * l1).backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return l2.item(), l1.item(), l0.item()

    @torch.no_grad()
    def harvest(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.cfg["device"].split(":")[0], torch.bfloat16):
            _, cache = self.model.run_with_cache(tokens, names_filter=lambda name: name.endswith("resid_post"))
        return torch.stack([cache["resid_post", layer] for layer in range(self.model.cfg.n_layers)], dim=2)

    @torch.no_grad()
    def refill(self) -> None:
        n_rows = len(self.buffer) // 2
        filled = 0
        for batch in self.all_tokens.split(self.cfg["model_batch_size"]):
            acts = self.harvest(batch)[:, 1:].flatten(0, 1)[: n_rows - filled]
            self.buffer[filled : filled + len(acts)] = acts
            filled += len(acts)
            if filled == n_rows:
                break
        self.buffer = self.buffer[torch.randperm(len(self.buffer), device=self.buffer.device)]


def timed(*parts, rounds: int) -> list[float]:
    """Median seconds of each part, run in turns after a first, uncounted round."""
    seconds: list[list[float]] = [[] for _ in parts]
    for _ in range(rounds + 1):
        for part, times in zip(parts, seconds):
            synchronize()
            start = time.perf_counter()
            part()
            synchronize()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in seconds]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(part) -> float:
    """The bytes of tensors that part needs at its peak beyond what was held before, as the allocator counts them."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        part()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        part()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def machine_limits(device: str, n: int) -> tuple[float, float]:
    """-> bf16 products of matrices of n x n in FLOP/s, copy bandwidth in bytes/s (read and written)"""
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    big, other = (torch.ones(2**27, device=device) for _ in range(2))
    product, copy = timed(lambda: a @ b, lambda: big.copy_(other), rounds=7)
    return 2 * n**3 / product, 2 * big.nbytes / copy


def bench(cfg: dict, folder: str, flops: float, bandwidth: float, rounds: int) -> list[dict]:
    """The rows of the table for one dictionary size and sequence length."""
    (model,) = load_models(cfg)
    plain = type(model).boot_transformers(folder, device=cfg["device"], dtype=torch.float32)
    n_seqs = 4 * cfg["batch_size"] * cfg["buffer_mult"] // cfg["seq_len"] + cfg["eval_seqs"]
    all_tokens = torch.randint(4096, (n_seqs, cfg["seq_len"]), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(cfg, [model], all_tokens)
    reference = Reference(cfg, plain, all_tokens.to(cfg["device"]))
    buffer = trainer.buffer
    size = f"{cfg['dict_size']:,} x {cfg['seq_len']}"

    x = buffer.next()
    buffer.next = lambda: x
    ours_step, ref_step = timed(trainer.step, lambda: reference.step(x), rounds=rounds)
    step_memory = peak_memory(trainer.step)
    del buffer.next  # which uncovers the method

    tokens = all_tokens[: cfg["model_batch_size"]].to(cfg["device"])
    ours_harvest, ref_harvest = timed(lambda: get_stacked_resids([model], tokens, cfg),
                                      lambda: reference.harvest(tokens), rounds=rounds)
    harvest_memory = peak_memory(lambda: get_stacked_resids([model], tokens, cfg))

    def refill() -> None:
        buffer.pointer = buffer.size // 2
        buffer.refresh()

    ours_refill, ref_refill = timed(refill, reference.refill, rounds=max(1, rounds // 3))
    refill_memory = peak_memory(refill)
    steps = cfg["buffer_mult"] // 2  # to the next refill

    def ours_cycle() -> None:
        for _ in range(steps):
            trainer.step()

    def ref_cycle() -> None:
        for i in range(steps):
            reference.step(reference.buffer[i * cfg["batch_size"] : (i + 1) * cfg["batch_size"]])
        reference.refill()

    buffer.pointer = buffer.size  # so that each cycle begins with one refill of half the buffer
    buffer.refresh()
    buffer.pointer = buffer.size // 2
    ours_all, ref_all = timed(ours_cycle, ref_cycle, rounds=max(1, rounds // 3))

    batch = cfg["batch_size"]
    half = buffer.size // 2
    parameters = sum(p.numel() for p in trainer.crosscoder.parameters())
    width = model.cfg.n_layers * model.cfg.d_model
    limit_step = 6 * 2 * batch * width * cfg["dict_size"] / flops + 28 * parameters / bandwidth
    body = 0
    for name, p in model.original_model.named_parameters():
        if name.endswith("weight") and p.ndim == 2 and not any(part in name for part in ("wte", "wpe", "lm_head")):
            body += p.numel()
    limit_token = (2 * body + 2 * 2 * width * cfg["seq_len"] / 2) / flops  # and causal attention
    limit_harvest = limit_token * tokens.numel()
    limit_refill = limit_token * half * cfg["seq_len"] / (cfg["seq_len"] - 1)
    parts = ours_step * steps + ours_harvest / tokens.numel() * half * cfg["seq_len"] / (cfg["seq_len"] - 1)

    def row(what: str, tokens: int, ours: float, ref: float, limit: float, memory: float) -> dict:
        return {"what": what, "size": size, "tokens_per_s": tokens / ours, "times_reference": ref / ours,
                "share_of_limit": limit / ours, "peak_gb": memory / 1e9}

    return [
        row("train step", batch, ours_step, ref_step, limit_step, step_memory),
        row("harvest", tokens.numel(), ours_harvest, ref_harvest, limit_harvest, harvest_memory),
        row("refill", half, ours_refill, ref_refill, limit_refill, refill_memory),
        {**row("end to end", half, ours_all, ref_all, limit_step * steps + limit_refill, max(step_memory, refill_memory)),
         "share_of_parts": parts / ours_all, "refill_memory_share_of_buffer": refill_memory / buffer.buffer.nbytes,
         "bytes_a_parameter": 12 + step_memory / parameters}]


def bench_activations(device: str, dict_sizes: list[int], shape: tuple[int, int], batch: int, k: int, rounds: int) -> None:
    """Prints milliseconds for the losses and gradients of a batch, dictionary by dictionary."""
    names = ["relu", "jumprelu", "topk", "batchtopk", "topk, dense"]
    print(f"ms for losses and gradients, {shape[0]} x {shape[1]}, batch {batch}, k {k}\n{'':<12}" + "".join(
        f"{name:>14}" for name in names))
    x = torch.randn(batch, *shape, device=device).bfloat16()
    for dict_size in dict_sizes:
        parts = []
        for name in names:
            overrides = {"k": k} if "topk" in name else {}
            cfg = make_cfg(
                activation=name.split(",")[0], device=device, enc_dtype="bf16", dict_size=dict_size, **overrides)
            crosscoder = CrossCoder(cfg, *shape)
            crosscoder.calibrate(x)
            if "dense" in name:
                crosscoder.sparse_from = math.inf

            def part(crosscoder=crosscoder) -> None:
                losses = crosscoder.get_losses(x)
                (losses.l2_loss + losses.l1_loss + losses.aux_loss).backward()
                crosscoder.zero_grad()

            parts.append(timed(part, rounds=rounds)[0])  # one by one, as they would not all fit
            del crosscoder, part
        print(f"{dict_size:<12,}" + "".join(f"{1000 * seconds:>14.0f}" for seconds in parts), flush=True)


def main() -> None:
    """Prints the table, or the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("cpu", "gpu"), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--activations", action="store_true")
    args = parser.parse_args()
    tune_allocator()
    cpu = args.size == "cpu"
    device = "cpu" if cpu else "cuda"
    if args.activations:
        sizes = [2**n for n in (12, 13, 14, 15, 16)]
        if cpu:
            bench_activations(device, sizes, (4, 768), batch=512, k=32, rounds=args.rounds)
        else:
            bench_activations(device, sizes, (12, 768), batch=4096, k=64, rounds=args.rounds)
        return
    flops, bandwidth = machine_limits(device, 4096 if cpu else 8192)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_gpt2(folder)
        if cpu:
            sizes = [(4096, 128), (4096, 1024)]
            batch_size = 512
            tokens_per_pass = 1024
        else:
            sizes = [(2**14, 1024), (2**16, 1024)]
            batch_size = 4096
            tokens_per_pass = 32768
        for dict_size, seq_len in sizes:
            cfg = make_cfg(
                model_name=folder, device=device, enc_dtype="bf16", dict_size=dict_size, seq_len=seq_len, batch_size=batch_size,
                buffer_mult=64, num_tokens=10**9, eval_seqs=1, model_batch_size=tokens_per_pass // seq_len)
            rows += bench(cfg, folder, flops, bandwidth, args.rounds)
            gc.collect()  # one size is gone before the next is there
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if args.json:
        print(json.dumps({"bf16_flops": flops, "copy_bytes_per_s": bandwidth, "rows": rows}, indent=1))
        return
    print(f"bf16 products {flops / 1e12:.2f} TFLOP/s, copies {bandwidth / 1e9:.0f} GB/s, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")
    print(f"{'':<12}{'dict x seq':>14}{'tokens/s':>12}{'x reference':>13}{'of limit':>10}{'peak GB':>9}")
    for row in rows:
        print(f"{row['what']:<12}{row['size']:>14}{row['tokens_per_s']:>12,.0f}{row['times_reference']:>13.2f}"
              f"{row['share_of_limit']:>10.0%}{row['peak_gb']:>9.2f}")
        if "share_of_parts" in row:
            print(f"{'':<12}end to end has {row['share_of_parts']:.0%} of the speed of harvest and step alone; a refill needs "
                  f"{row['refill_memory_share_of_buffer']:.0%} of the buffer beyond it;\n{'':<12}weights, gradients, Adam, "
                  f"the bf16 copy and a step's activations take {row['bytes_a_parameter']:.1f} bytes a parameter")


if __name__ == "__main__":
    main()
