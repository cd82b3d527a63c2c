"""What only a GPU can prove and measure, in one command. Says so and ends where there is none.

    python tests/gpu.py                 every part: under 9 minutes on an H100, predicted, not measured
    python tests/gpu.py waits speed     these parts
    python tests/gpu.py --rehearse      every part, small and on the CPU: proves that this script runs, measures nothing

Each part prints its rows, and writes them to gpu_results/PART.json (--out) as it goes; one that fails says why, and the
next begins. The exit code is the number of those that failed. It needs a torch with CUDA, 2.11 or later, and the other
packages of requirements.txt. For a machine without network: `pip download --only-binary=:all: -r requirements.txt` where
there is one, and there `pip install --no-index --find-links=FOLDER transformer_lens wandb datasets einops numpy tqdm`.
"""
import argparse
import gc
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import utils
from bench import Reference, machine_limits, peak_memory, save_gpt2, timed
from train import check_memory, load_models, load_tokens, make_cfg, tune_allocator
from utils import CrossCoder, Trainer, get_stacked_resids

ALL = ["relu", "topk", "batchtopk", "jumprelu"]


class Part:
    """The rows of a part. Prints and writes each as it comes."""

    def __init__(self, name: str, out: Path):
        self.file = out / f"{name}.json"
        self.rows = []
        self.wrong = []
        print(f"\n== {name}", flush=True)

    def row(self, **row) -> None:
        shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
        print("  " + ", ".join(shown), flush=True)
        self.rows.append(row)
        self.file.write_text(json.dumps(self.rows, indent=1))

    def at_most(self, limit: float, **row) -> None:
        """A row whose last value must not be above limit."""
        name, value = list(row.items())[-1]
        self.row(**row, limit=limit)
        if not value <= limit:
            about = [str(value) for value in row.values() if not isinstance(value, float)]
            self.wrong.append(f"{' '.join(about)}: {name} {value:.3g}, not at most {limit:g}")


def config(size: dict, **overrides) -> dict:
    """Training on activations of GPT-2 Small's shape, as large as size says."""
    overrides = {
        "model_name": size["model"], "device": size["device"], "seq_len": size["seq_len"], "eval_seqs": 4, "num_tokens": 10**9,
        "batch_size": size["batch"], "buffer_mult": 8, "model_batch_size": size["passes"], "enc_dtype": "bf16",
        "dict_size": size["dicts"][0], "wandb_mode": "disabled", "save_dir": size["folder"], **overrides}
    if "topk" in overrides.get("activation", ""):
        overrides.setdefault("k", size["k"])
    return make_cfg(**overrides)


def get_text(seq_len: int) -> torch.Tensor:
    """The tiny preset's text as sequences of seq_len."""
    cfg = make_cfg(preset="tiny", device="cpu")
    ids = load_tokens(cfg, load_models(cfg)).flatten()
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- Parts ---------------------------------------------------------------------------------------
def correctness(part: Part, size: dict) -> None:
    """Losses and gradients of each activation and both decoders, with AuxK, against float64 on the CPU. In bf16 a latent
    near a cut or a threshold may be on its other side, which changes a gradient by more than rounding does."""

    def get_grads(activation: str, device: str, dtype: torch.dtype, sparse: bool) -> list:
        over = {"k": 16} if "topk" in activation else {}
        cfg = make_cfg(preset="tiny", activation=activation, dict_size=1024, device="cpu", enc_dtype="fp32", **over)
        generator = torch.Generator().manual_seed(1)
        basis = torch.randn(40, 4, 64, generator=generator)
        x = torch.einsum("bi,ild->bld", torch.randn(256, 40, generator=generator).relu(), basis)
        x += 0.1 * torch.randn(x.shape, generator=generator)
        crosscoder = CrossCoder(cfg, 4, 64)
        crosscoder.calibrate(x)
        crosscoder.W_enc.data += 0.3 * crosscoder.W_enc.std() * torch.randn(crosscoder.W_enc.shape, generator=generator)
        crosscoder.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        crosscoder.dtype = dtype
        crosscoder.sparse_from = 0 if sparse else math.inf
        losses = crosscoder.get_losses(x.to(device), dead=torch.arange(50, device=device))
        loss = losses.l2_loss + losses.aux_loss
        if losses.l1_loss.requires_grad:
            loss = loss + losses.l1_loss
        loss.backward()
        return [loss.detach(), *[p.grad for p in crosscoder.parameters()]]

    for activation in ALL:
        for sparse in [False, True][: 1 + ("topk" in activation)]:  # dense, and where there is one sparse
            wanted = get_grads(activation, "cpu", torch.float64, sparse)
            for dtype, loss_limit, grad_limit in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 2e-2, 0.2)):
                if activation == "relu" and dtype == torch.bfloat16:
                    grad_limit = 2e-2
                got = get_grads(activation, size["device"], dtype, sparse)
                errors = [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(got, wanted)]
                about = {"activation": activation, "decode": "sparse" if sparse else "dense", "dtype": str(dtype)[6:]}
                part.at_most(loss_limit, **about, loss_error=errors[0])
                part.at_most(grad_limit, **about, largest_gradient_error=max(errors[1:]))


def compiled(part: Part, size: dict) -> None:
    """What torch.compile makes of the fused functions against the functions themselves."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, dtype=torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(size["device"], dtype).requires_grad_()

    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        h = draw(512, 2048, dtype=dtype)
        log_threshold = draw(2048)
        acts = h.detach().relu().requires_grad_()
        for function, args in (
                (utils.rectify, [h]), (utils.jump, [h, log_threshold]),
                (utils.get_jump_losses, [h, acts, log_threshold, draw(2048)]),
                (utils.compare, [draw(512, 4, 64, dtype=dtype), draw(4, 64), draw(512, 4, 64)])):
            results = []
            for version in (function, function.__wrapped__):
                outs = [out for out in version(*args) if out.is_floating_point()]
                grads = torch.autograd.grad(sum((out.float() ** 2).sum() for out in outs), args)
                results.append([*outs, *grads])
            errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(*results)]
            part.at_most(limit, function=function.__name__, dtype=str(dtype)[6:], error=max(errors))
    if size["device"] != "cpu":  # where nothing is compiled, so that each was compared with itself
        part.at_most(0, uncompiled=4 - torch._dynamo.utils.counters["stats"]["unique_graphs"])


def harvest(part: Part, size: dict) -> None:
    """A pass of the models in bf16 against fp32 on the CPU; and that its attention is the fused one."""
    tokens = get_text(size["seq_len"])[:2]
    on_cpu = config(size, device="cpu", enc_dtype="fp32")
    wanted = get_stacked_resids(load_models(on_cpu), tokens, on_cpu)
    cfg = config(size)
    models = load_models(cfg)
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda *args, **kwargs: calls.append(1) or plain(*args, **kwargs)
    kernels = [SDPBackend.FLASH_ATTENTION] if size["device"] != "cpu" else [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    try:
        with sdpa_kernel(kernels):
            got = get_stacked_resids(models, tokens, cfg)
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
    part.at_most(2e-2, error=((got.cpu().float() - wanted).norm() / wanted.norm()).item())
    part.at_most(0, fused_attentions=len(calls), missing=abs(len(wanted[0, 0]) - len(calls)))


def waits(part: Part, size: dict) -> None:
    """20 steps of each activation, away from refresh, log and AuxK's look at what is dead, in which the host may not wait."""
    models = load_models(config(size))
    tokens = get_text(size["seq_len"])
    for activation in ALL:
        for buffer_device in dict.fromkeys([size["device"], "cpu"]):
            cfg = config(size, activation=activation, buffer_mult=64, batch_size=256, buffer_device=buffer_device)
            trainer = Trainer(cfg, models, tokens)
            trainer.step()
            trainer.dead = torch.arange(50, device=size["device"])
            trainer.step()  # compiles what is left to be
            if size["device"] != "cpu":
                torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(20):
                    trainer.step()
            finally:
                if size["device"] != "cpu":
                    torch.cuda.set_sync_debug_mode("default")
            part.row(activation=activation, buffer=buffer_device, steps_without_a_wait=20)
            del trainer
            release()


def speed(part: Part, size: dict) -> None:
    """Step, harvest, refill and both together against the plain fp32 reference and the card's own limits; and a step's
    memory against what the header says."""
    flops, bandwidth = machine_limits(size["device"], size["product"])
    part.row(bf16_tflops=flops / 1e12, copy_gb_per_s=bandwidth / 1e9)
    base = config(size)
    models = load_models(base)
    (plain,) = load_models(config(size, enc_dtype="fp32"))
    tokens = get_text(size["seq_len"])
    width = models[0].cfg.n_layers * models[0].cfg.d_model
    for dict_size in size["dicts"]:
        for activation in ALL:
            cfg = config(size, activation=activation, dict_size=dict_size)
            trainer = Trainer(cfg, models, tokens)
            buffer = trainer.buffer
            x = buffer.next()
            buffer.next = lambda: x
            trainer.step_counter = trainer.total_steps // 2  # away from the warm-up, where k is larger
            parameters = sum(p.numel() for p in trainer.crosscoder.parameters())
            (step,) = timed(trainer.step, rounds=size["rounds"])
            five = 5 * 2 * size["batch"] * width * dict_size / flops + 28 * parameters / bandwidth
            row = {"what": "step", "activation": activation, "dict_size": dict_size, "ms": 1e3 * step}
            row |= {"tokens_per_s": size["batch"] / step, "share_of_limit_of_5_products": five / step}
            if activation == "relu":
                reference = Reference(cfg, plain, tokens.to(size["device"]))
                batch = tokens[: size["passes"]].long().to(size["device"])
                (slow,) = timed(lambda: reference.step(x), rounds=2)
                (slow_pass,) = timed(lambda: reference.harvest(batch), rounds=2)
                del reference
                release()
            row["times_reference"] = slow / step
            peak = peak_memory(trainer.step)
            part.row(**row)
            moments = 8 * parameters
            used = 4 * parameters + moments + buffer.buffer.nbytes + 16 * buffer.size + peak
            said = sum(check_memory(cfg | {"eval_seqs": 1, "model_batch_size": 1}, *buffer.buffer.shape[1:], 1).values())
            part.at_most(0.25, what="memory of a step", activation=activation, dict_size=dict_size, gb=used / 1e9,
                         header_gb=said / 1e9, off_by=abs(said / used - 1))
            del buffer.next
            if activation == "relu":
                def refill() -> None:
                    buffer.pointer = buffer.size // 2
                    buffer.refresh()

                one_pass, refill_s = timed(
                    lambda: get_stacked_resids(models, batch, cfg), refill, rounds=size["rounds"])
                half = buffer.size // 2
                cycle = refill_s + step * half / size["batch"]
                part.row(what="harvest", tokens_per_s=batch.numel() / one_pass, ms=1e3 * one_pass,
                         times_reference=slow_pass / one_pass)
                part.row(what="refill", tokens_per_s=half / refill_s, peak_gb=peak_memory(refill) / 1e9)
                part.row(what="end to end, by sum", dict_size=dict_size, tokens_per_s=half / cycle)
            del trainer, buffer
            release()


def switch(part: Part, size: dict) -> None:
    """Sparse against dense decoding, losses and gradients in turns: sets CrossCoder.sparse_from."""
    for ratio in size["ratios"]:
        cfg = config(size, activation="topk", dict_size=ratio * size["k"])
        crosscoder = CrossCoder(cfg, *size["shape"])
        x = torch.randn(size["batch"], *size["shape"], device=size["device"]).bfloat16()

        def get_grads(sparse_from: float) -> None:
            crosscoder.sparse_from = sparse_from
            crosscoder.get_losses(x).l2_loss.backward()
            crosscoder.zero_grad()

        dense, sparse = timed(lambda: get_grads(math.inf), lambda: get_grads(0), rounds=size["rounds"])
        part.row(dict_over_k=ratio, dict_size=ratio * size["k"], dense_ms=1e3 * dense, sparse_ms=1e3 * sparse)
        del crosscoder, get_grads
        release()


def kill(part: Part, size: dict) -> None:
    """A run that is killed goes on from its checkpoint; and one without a compiler ends as well, and says so."""
    command = [sys.executable, ROOT / "train.py", f"--device={size['device']}"]
    tiny = ["--preset=tiny", f"--num_tokens={size['tiny_tokens']}"]
    save_dir = Path(size["folder"], "killed")
    run = subprocess.Popen(
        [*command, *tiny, f"--save_dir={save_dir}", "--save_every=100", "--activation=batchtopk"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(save_dir.glob("version_0/step_*")) and run.poll() is None:
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    part.at_most(0, exit_code_off_minus_9=abs(run.wait() + 9))
    again = subprocess.run([*command, "--resume=latest", f"--save_dir={save_dir}"], capture_output=True, text=True)
    fvu = [line.split()[1] for line in again.stdout.splitlines() if line.startswith("all ")]
    part.at_most(0.07 if size["tiny_tokens"] >= 10**6 else 0.3, resumed_fvu=float([*fvu, "nan"][0]))
    caches = {name: tempfile.mkdtemp(dir=size["folder"]) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    without = subprocess.run(
        [*command, *tiny, f"--save_dir={save_dir}"],
        env=os.environ | caches | {"CC": "/bin/false", "CXX": "/bin/false"}, capture_output=True, text=True)
    wanted = 2 * (size["device"] != "cpu")  # relu's: rectify and compare
    part.at_most(0, lines_missing=wanted - without.stderr.count("runs uncompiled"))
    part.at_most(0, exit_code_without_a_compiler=without.returncode)


def run(part: Part, size: dict) -> None:
    """A run of GPT-2 Small's shape (random weights), 12 sources, for two minutes: tokens a second, refills included."""
    cfg = config(size, buffer_mult=size["run_buffer_mult"], eval_seqs=8)
    trainer = Trainer(cfg, load_models(cfg), get_text(size["seq_len"]))
    trainer.step()
    start = time.time()
    first = trainer.step_counter
    metrics = {}
    while time.time() - start < size["seconds"]:
        for _ in range(20):
            metrics = trainer.step()
        metrics["loss/total"].item()
    seconds = time.time() - start
    part.row(steps=trainer.step_counter - first, seconds=seconds, fvu=metrics["fvu/batch"].item(),
             tokens_per_s=(trainer.step_counter - first) * cfg["batch_size"] / seconds)


PARTS = {function.__name__: function for function in (correctness, compiled, harvest, waits, speed, switch, kill, run)}


def main() -> int:
    """-> how many parts failed"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS])
    parser.add_argument("--out", type=Path, default=Path("gpu_results"))
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--device")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("skipped: no GPU here; --rehearse runs every part small, on the CPU")
        return 0
    size = {
        "device": args.device or "cuda:0", "batch": 4096, "seq_len": 1024, "passes": 32, "dicts": [2**14, 2**16], "k": 64, "rounds": 5,
        "shape": (12, 768), "ratios": [128, 256, 512, 1024, 2048], "run_buffer_mult": 256, "seconds": 120, "product": 8192,
        "tiny_tokens": 10**6}
    if args.rehearse:
        size |= {
            "device": args.device or "cpu", "batch": 64, "seq_len": 128, "passes": 4, "dicts": [512, 1024], "k": 8, "rounds": 1,
            "shape": (4, 64), "ratios": [64, 128], "run_buffer_mult": 64, "seconds": 2, "product": 256,
            "tiny_tokens": 100_000}
    else:
        tune_allocator()
    args.out.mkdir(exist_ok=True, parents=True)
    print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}, "
          f"{time.strftime('%Y-%m-%d')}")
    failed = 0
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        save_gpt2(folder, small=args.rehearse)
        size |= {"model": folder, "folder": folder}
        for name in args.parts or PARTS:
            part = Part(name, args.out)
            try:
                PARTS[name](part, size)
                wrong = "; ".join(part.wrong)
            except Exception as error:
                wrong = f"{error!r:.1000}"
            print(f"  {wrong or 'as it should be'}; {time.time() - start:.0f} s so far", flush=True)
            failed += bool(wrong)
            release()
    return failed


if __name__ == "__main__":
    sys.exit(main())
