"""Several ranks, as processes on the CPU: what one process does, they do together."""
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

import train
import utils
from conftest import ROOT, Run, open_models
from train import join_ranks, load_models, load_tokens, make_cfg
from utils import CrossCoder, Trainer, evaluate, gather, get_ranks, join_shares, list_checkpoints, step_adam, take_share

ACTIVATIONS = ["relu", "topk", "batchtopk", "jumprelu"]
DEVICE = "auto" if torch.cuda.device_count() >= 4 else "cpu"  # with nccl where each rank can have a GPU
STEPS = 100
SMALL = ["--preset=tiny", "--activation=batchtopk", "--enc_dtype=fp32", "--dict_size=256", "--batch_size=64", "--buffer_mult=16",
         "--model_batch_size=8", "--eval_seqs=8", f"--num_tokens={64 * STEPS}", "--save_every=20", "--log_every=5", "--eval_every=40",
         "--dead_after=640", "--device=cpu"]


def start_ranks(n, argv, folder, function=train.main):
    """n ranks as torchrun starts them, in folder. -> their Runs"""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    folder.mkdir(exist_ok=True)
    env = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    runs = []
    for rank in range(n):
        own = {key: str(value) for key, value in (env | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        os.chdir(folder)
        runs.append(Run(argv, folder / f"out{rank}", folder / f"err{rank}", own, threads=1, function=function))
    return runs


def finish(runs, folder, code=0):
    for rank, run in enumerate(runs):
        assert run.wait() == code, (folder / f"err{rank}").read_text()


def load(checkpoint):
    names = ("crosscoder", "trainer")
    return {key: value for name in names for key, value in safetensors.torch.load_file(checkpoint / f"{name}.safetensors").items()}


# ---- The same numbers ----------------------------------------------------------------------------
class Fixed:
    """A buffer that serves a rank its share of the same batches, however many ranks there are."""

    def __init__(self, cfg, models, tokens):
        rank, n_ranks = get_ranks()
        x = torch.load("x.pt", weights_only=True).to(cfg["device"])  # [batches, batch, n_layers, d_model]
        self.batches = [batch.chunk(n_ranks)[rank] for batch in x]
        self.buffer = torch.cat(self.batches)
        self.rows_served = 0
        self.rows_per_epoch = len(x)

    def refresh(self):
        pass

    def peek(self):
        return gather(self.batches[0])

    def next(self):
        self.rows_served += 1
        return self.batches[self.rows_served - 1]


class Counted:
    """Counts the bytes that a rank gives to torch.distributed."""

    def __init__(self, monkeypatch):
        self.sent = {"all_gather": 0, "all_reduce": 0}
        for name, at in (("all_gather", 1), ("all_reduce", 0)):
            monkeypatch.setattr(dist, name, self.count(name, getattr(dist, name), at))

    def count(self, name, function, at):
        def call(*args):
            self.sent[name] += args[at].numel() * args[at].element_size()
            return function(*args)

        return call


def join(crosscoder):
    return {name: join_shares(name, weight).cpu().clone() for name, weight in crosscoder.state_dict().items()}


def twenty_steps(argv):
    """Of each activation, on the same batches: metrics, weights, bytes sent, what is kept."""
    join_ranks()
    utils.Buffer = Fixed
    results = {}
    for activation, dtype in itertools.product(ACTIVATIONS, [torch.float32, torch.float64]):
        cfg = make_cfg(preset="diff-tiny", activation=activation, dict_size=argv[0], enc_dtype="fp32", device=DEVICE) | {
            "k": 8, "batch_size": 64, "num_tokens": 64 * 400, "n_shared": 20, "n_exclusive": 30, "aux_coeff": 1 / 32,
            "dead_after": 5 * 64, "lr": 2e-4, "l0": 30.0 if activation == "jumprelu" else 0.0}
        trainer = Trainer(cfg, [], torch.zeros(100, 128))
        crosscoder = trainer.crosscoder.to(dtype)
        crosscoder.dtype = dtype
        crosscoder.b_enc.data[-crosscoder.first % 5 :: 5] = -10  # every fifth of all, for AuxK
        calibrated = join(crosscoder)
        if os.path.exists(f"{activation}.pt"):
            # calibrate puts thresholds where a row is, so that rounding decides: all start as one process does.
            start = torch.load(f"{activation}.pt", weights_only=True)
            crosscoder.load_state_dict({name: take_share(name, weight) for name, weight in start.items()})
        trainer.step_counter = 95  # at the 100th AuxK begins
        trainer.tokens_since_fired += 10**6
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch)
            patch.setattr(utils, "step_adam", lambda optimizer, norm, skip: step_adam(optimizer, norm.float(), skip))  # it must be
            metrics = [{key: float(value) for key, value in trainer.step().items()} for _ in range(20)]
        trained = join(crosscoder)
        x = trainer.buffer.peek().to(dtype)
        kept = gather(crosscoder.get_losses(x, 8).fired)
        # Rows that are long enough to reach batchtopk's limit, which is more latents than one of four ranks has.
        crosscoder.cfg = {**crosscoder.cfg, "k": 16}
        acts = gather(crosscoder.encode(torch.cat([x, 100 * x])).T.contiguous())
        results[activation, dtype] = {
            "start": calibrated, "metrics": metrics, "trained": trained, "sent": counted.sent, "kept": kept.cpu(), "acts": acts.cpu()}
    if get_ranks()[0] == 0:
        torch.save(results, "results.pt")
    return 0


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """-> (ranks, latents) -> what twenty_steps saved"""
    cfg = make_cfg(preset="diff-tiny", enc_dtype="fp32", device="cpu")
    models = open_models(cfg)
    x = utils.get_stacked_resids(models, load_tokens(cfg, models)[:20], cfg)[:, 1:].flatten(0, 1)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))][: 25 * 64]
    results = {}
    for n, d_sae in ((1, 256), (2, 256), (4, 256), (2, 512)):
        folder = tmp_path_factory.mktemp(f"ranks{n}")
        torch.save(x.unflatten(0, (25, 64)), folder / "x.pt")
        if d_sae == 256 and n > 1:
            for activation in ACTIVATIONS:
                torch.save(results[1, 256][activation, torch.float64]["start"], folder / f"{activation}.pt")
        finish(start_ranks(n, [d_sae], folder, twenty_steps), folder)
        results[n, d_sae] = torch.load(folder / "results.pt", weights_only=True)
    return results


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ranks_train_to_the_numbers_of_one_process(results, activation, n, dtype, close):
    one, many = results[1, 256][activation, dtype], results[n, 256][activation, dtype]
    assert sum(row["loss/aux"] > 0 for row in one["metrics"]) >= 15  # AuxK, too
    for step, (a, b) in enumerate(zip(one["metrics"], many["metrics"])):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=close), (step, key)
    # In fp32 all weights in one, as Adam makes much of the rounding of b_dec's small gradients.
    parts = [list(one["trained"])] if dtype == torch.float32 else [[name] for name in one["trained"]]
    for names in parts:
        a, b = (torch.cat([side["trained"][name].flatten() for name in names]) for side in (one, many))
        assert (a - b).norm() <= close * a.norm(), names


@pytest.mark.parametrize("n", [2, 4])
def test_a_latent_begins_the_same_on_however_many_ranks(results, n):
    one, many = results[1, 256]["relu", torch.float32]["start"], results[n, 256]["relu", torch.float32]["start"]
    assert torch.equal(one["W_dec"], many["W_dec"]) and torch.equal(one["W_enc"], many["W_enc"])


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ranks_keep_exactly_what_one_process_keeps(results, activation, n):
    one, many = results[1, 256][activation, torch.float64], results[n, 256][activation, torch.float64]
    assert torch.equal(one["kept"], many["kept"]) and torch.equal(one["acts"] > 0, many["acts"] > 0)
    if "topk" in activation:
        assert one["kept"].sum() == 8 * 64
    if activation == "batchtopk":
        assert (one["acts"] > 0).sum(0).max() == 8 * 16


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bytes_sent_are_as_the_readme_says_and_do_not_grow_with_the_dictionary(results, activation):
    rows, k, n_layers, d_model, dtype = 64, 8, 2, 128, 4
    gathered = rows // 2 * n_layers * d_model * dtype
    if "topk" in activation:
        gathered += rows * k * {"topk": 1, "batchtopk": 8}[activation] * dtype
    reduced = 4 * rows * n_layers * d_model + 4 * 4  # and four numbers: three losses, the gradients' norm
    with_aux = 15  # steps, from the one on in which the dead are counted
    sent = {"all_gather": 20 * gathered + with_aux * rows * d_model // 2 * dtype,
            "all_reduce": 20 * reduced + with_aux * 4 * rows * n_layers * d_model + 4}
    assert results[2, 256][activation, torch.float32]["sent"] == sent
    assert results[2, 512][activation, torch.float32]["sent"] == sent


# ---- Runs ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start_ranks(2, SMALL, folder), folder)
    return folder


def last_of(folder):
    return list_checkpoints(folder / "checkpoints" / "version_0")[-1]


def test_only_the_first_rank_speaks_and_writes(whole):
    assert (whole / "out1").read_text() == (whole / "err1").read_text() == ""
    out = (whole / "out0").read_text()
    assert "for each of 2 ranks" in out and "resid_post.3" in out
    assert [path.name for path in (whole / "checkpoints").iterdir()] == ["version_0"]
    rows = [json.loads(line) for line in (whole / "checkpoints/version_0/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss/total" in row] == [*range(5, STEPS + 1, 5)]


def test_what_ranks_save_one_process_opens_and_evaluates_the_same(whole, models, tokens):
    crosscoder = CrossCoder.load(whole / "checkpoints" / "version_0")
    assert crosscoder.W_enc.shape == (4, 128, 256)
    metrics = evaluate(crosscoder, models, tokens[-8:], crosscoder.cfg)
    rows = [json.loads(line) for line in (whole / "checkpoints/version_0/metrics.jsonl").read_text().splitlines()]
    for key, value in metrics.items():
        assert value == pytest.approx(rows[-1][key], rel=1e-3, abs=1e-4), key


def wait_for(runs, condition, within=60):
    start = time.time()
    while not condition():
        assert time.time() < start + within and all(run.poll() is None for run in runs)
        time.sleep(0.01)


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_they_go_on_to_the_last_bit(whole, tmp_path):
    runs = start_ranks(2, SMALL, tmp_path)
    wait_for(runs, lambda: (tmp_path / "checkpoints/version_0/step_0000020").exists())
    runs[1].send_signal(signal.SIGTERM)
    assert runs[0].wait() == 130 and runs[1].wait() == 143
    assert "stopped; go on with --resume=" in (tmp_path / "err0").read_text()
    assert 20 < int(last_of(tmp_path).name[5:]) < STEPS
    finish(start_ranks(2, [*SMALL, "--resume=latest"], tmp_path), tmp_path)
    wanted, found = load(last_of(whole)), load(last_of(tmp_path))
    assert wanted.keys() == found.keys()
    for name in wanted:
        assert torch.equal(wanted[name], found[name]), name


def test_a_killed_rank_ends_all_in_a_line_and_one_process_can_go_on(tmp_path):
    runs = start_ranks(2, SMALL, tmp_path)
    wait_for(runs, lambda: (tmp_path / "checkpoints/version_0/step_0000040").exists())
    runs[1].send_signal(signal.SIGKILL)
    assert runs[0].wait(within=60) == 1
    err = (tmp_path / "err0").read_text()
    assert "error: " in err.splitlines()[-1] and "; go on with --resume=" in err.splitlines()[-1] and "Traceback" not in err
    before = load(last_of(tmp_path))
    run = Run([*SMALL, "--resume=latest"], tmp_path / "out", tmp_path / "err", threads=1)
    assert run.wait() == 0
    assert "of 2 ranks; 1 begin with a new buffer" in (tmp_path / "err").read_text()
    after = load(last_of(tmp_path))
    assert last_of(tmp_path).name == f"step_{STEPS:07d}"
    change = (after["W_dec"] - before["W_dec"]).norm() / before["W_dec"].norm()
    assert 0 < change < 0.5 and after["adam.W_dec.step"] == STEPS


def record(argv):
    """Which rows this rank is served, and which wait, after more than an epoch."""
    join_ranks()
    cfg = make_cfg(**train.parse_overrides(SMALL))
    models = load_models(cfg)
    tokens = load_tokens(cfg, models)[:31]
    buffer = Trainer(cfg, models, tokens).buffer
    rank, _ = get_ranks()
    served = []
    for _ in range(60):
        if buffer.pointer >= buffer.size / 2:
            buffer.refresh()
        rows = buffer.row_numbers[buffer.order[buffer.pointer : buffer.pointer + 32]]
        served += rows.tolist()
        seq = rows[:1] // 127 % (12 - rank) * 2 + rank  # 0, 2 to 22; or 1, 3 to 21; of 31, 8 are held out
        wanted = utils.get_stacked_resids(models, tokens[seq], cfg)[0, rows[0] % 127 + 1]
        assert torch.allclose(buffer.next()[0], wanted, atol=1e-3)
    waiting = buffer.row_numbers[buffer.order[buffer.pointer :]].tolist()
    assert sorted(served + waiting) == list(range(buffer.next_row)) and buffer.next_row > buffer.rows_per_epoch
    return 0


def test_every_row_is_served_once_and_by_one_rank(tmp_path):
    finish(start_ranks(2, [], tmp_path, record), tmp_path)


# ---- What cannot be ------------------------------------------------------------------------------
@pytest.mark.parametrize("argument, line", [
    ("--dict_size=255", "error: dict_size=255: not divisible by the 2 ranks"),
    ("--batch_size=63", "error: batch_size=63: not divisible by the 2 ranks"),
    ("--l1_coef=2", "error: l1_coef: no such key, did you mean l1_coeff?")])
def test_a_users_mistake_is_one_line_of_the_first_rank(argument, line, tmp_path):
    runs = start_ranks(2, [*SMALL, argument], tmp_path)
    assert runs[0].wait() == 2 and (tmp_path / "err0").read_text() == line + "\n"
    assert runs[1].poll() is None  # waits for torchrun to end it
    runs[1].send_signal(signal.SIGTERM)
    assert runs[1].wait() == -signal.SIGTERM and (tmp_path / "err1").read_text() == ""


def main_alone(argv):
    train.PATIENCE = train.datetime.timedelta(seconds=2)
    return train.main(argv)


def test_a_rank_that_does_not_find_the_others_says_so(tmp_path):
    run = start_ranks(2, SMALL, tmp_path, main_alone)
    run[1].kill()
    assert run[0].wait() == 2
    assert (tmp_path / "err0").read_text().startswith("error: rdzv_endpoint='127.0.0.1:")


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="^nproc_per_node='3': this machine has 2 GPUs"):
        join_ranks()


# ---- torchrun itself -----------------------------------------------------------------------------
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


def launch(folder, *command):
    folder.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)


def test_torchrun_ends_where_one_process_ends(tmp_path):
    arguments = ["--preset=tiny", "--activation=batchtopk", "--dict_size=512", "--num_tokens=50_000", "--eval_seqs=16"]
    ends = []
    for name, launcher in (("two", TORCHRUN), ("one", [])):
        done = launch(tmp_path / name, *launcher, ROOT / "train.py", *arguments)
        assert done.returncode == 0, done.stderr
        ends.append(json.loads((tmp_path / name / "checkpoints/version_0/metrics.jsonl").read_text().splitlines()[-1]))
    for key in ("fvu/all", "sparsity/l0"):
        assert ends[0][key] == pytest.approx(ends[1][key], rel=0.03)


BROKEN = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train, utils

def fail(*_):
    raise FloatingPointError("activations of sequences [3] not finite")

if os.environ["RANK"] == "1":
    utils.Buffer.harvest = fail
sys.exit(train.main(sys.argv[1:]))
"""


def test_what_one_rank_alone_finds_ends_all_and_is_torchruns_last_word(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    start = time.time()
    done = launch(tmp_path, *TORCHRUN, tmp_path / "broken.py", *SMALL)
    assert done.returncode != 0 and time.time() - start < 60
    last = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in last and "FloatingPointError: activations of sequences [3] not finite" in last
    assert "Traceback" not in done.stderr[: done.stderr.index("failed (exitcode: 1)")]
