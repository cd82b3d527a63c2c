"""Faults, injected for real: killed processes, signals, full disks, damaged and hostile files, a hanging server.

  python tests/test_faults.py --kills=20     kills a run that often, at random moments, and prints what became of it
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils import TINY, Buffer, CrossCoder, Trainer, load_models, load_tokens, make_cfg

TRAIN = [sys.executable, Path(__file__).parent.parent / "train.py", "--preset=tiny", "--buffer_mult=64", "--eval_seqs=16",
         "--log_every=5", "--eval_every=50", "--save_every=25", "--keep=2"]


def start(folder, *arguments, num_tokens=100_000, **env):
    """A real `python train.py` that saves into folder; 195 steps unless told."""
    folder.mkdir(exist_ok=True, parents=True)
    with open(folder / "stderr.txt", "w") as err:
        return subprocess.Popen(
            [*TRAIN, f"--save_dir={folder}", f"--num_tokens={num_tokens}", *arguments], stdout=subprocess.DEVNULL,
            stderr=err, env={**os.environ, "HF_HUB_OFFLINE": "1", **env}, preexec_fn=os.setpgrp)


def finish(run, folder, code=0, within=200):
    """Waits for its end. -> what it wrote on stderr, without progress bars"""
    returned = run.wait(within)
    err = "\n".join(line for line in re.split("[\r\n]", (folder / "stderr.txt").read_text()) if line and "%|" not in line)
    assert returned == code, f"{returned}: {err[-2000:]}"
    return err


def wait_for(run, condition, within=60):
    """Waits until condition() holds; the run must be alive then."""
    until = time.time() + within
    while not condition():
        assert run.poll() is None and time.time() < until
        time.sleep(0.005)


def rows(folder):
    """Every whole line of a run's metrics.jsonl, but for how fast it was."""
    file = folder / "version_0" / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("perf/")} for line in lines]


def saved(folder):
    """The checkpoints of a run, by step."""
    return sorted((folder / "version_0").glob("step_*"))


def evaluating(folder):
    """The last that was logged and the last that was saved are a step after which there is an evaluation."""
    last = rows(folder)[-1] if rows(folder) else {}
    return "loss/total" in last and last["step"] % 50 == 0 and saved(folder)[-1:] == [
        folder / "version_0" / f"step_{last['step']:07d}"]


def assert_same(folder, whole):
    """The run ended where the uninterrupted one did, bit for bit, and logged what that did."""
    for name in ("crosscoder.safetensors", "trainer.safetensors"):
        assert (saved(folder)[-1] / name).read_bytes() == (saved(whole)[-1] / name).read_bytes()
    assert rows(folder) == rows(whole)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder), folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the uninterrupted run, last saved at steps 175 and 195."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_the_log_of_a_run_has_every_step_once(whole):
    logged = rows(whole)
    assert [row["step"] for row in logged if "loss/total" in row] == list(range(5, 200, 5))
    assert [row["step"] for row in logged if "fvu/all" in row] == [0, 50, 100, 150, 195]
    assert [path.name for path in saved(whole)] == ["step_0000175", "step_0000195"]


def test_a_killed_run_goes_on_as_if_nothing_had_been(whole, tmp_path):
    run = start(tmp_path)
    wait_for(run, lambda: len(saved(tmp_path)) and rows(tmp_path)[-1]["step"] > 40)
    run.kill()
    run.wait()
    run = start(tmp_path, "--resume=latest")
    wait_for(run, lambda: saved(tmp_path)[-1].name > "step_0000050" and list((tmp_path / "version_0").glob(".step_*")))
    run.kill()  # while it saves
    run.wait()
    finish(start(tmp_path, f"--resume={tmp_path / 'version_0'}"), tmp_path)
    assert_same(tmp_path, whole)
    assert not list((tmp_path / "version_0").glob(".step_*"))  # what the dead left lying


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_can_go_on_with_its_wandb_run(whole, tmp_path, number):
    run = start(tmp_path, "--wandb_mode=offline")
    wait_for(run, lambda: rows(tmp_path) and rows(tmp_path)[-1]["step"] > 30)
    run.send_signal(number)
    sent = time.time()
    err = finish(run, tmp_path, 128 + number)
    assert time.time() - sent < 30 and "Traceback" not in err
    assert saved(tmp_path)[-1].name > "step_0000030"
    if number == signal.SIGTERM:
        finish(start(tmp_path, f"--resume={saved(tmp_path)[-1]}"), tmp_path)
        assert_same(tmp_path, whole)
        first, second = (tmp_path / "version_0" / "wandb").glob("offline-run-*")
        assert first.name[-8:] == second.name[-8:] and first.name != second.name


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    run = start(tmp_path, "--eval_seqs=64")
    wait_for(run, lambda: evaluating(tmp_path))
    run.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.wait(1) == -signal.SIGTERM


def flip(file):
    """Flips a bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def sign(folder, name):
    """Puts a changed file into the manifest, as a stranger would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["trainer.safetensors", "crosscoder.safetensors", "trainer.json", "cfg.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_taken(copy, name):
    last, before = saved(copy)[-1] / name, saved(copy)[-2]
    flip(last) if name.endswith("safetensors") else last.write_bytes(last.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"resume='{last.parent}': no checkpoint, or a damaged one .*{name}|JSON|line"):
        make_cfg(resume=last.parent)
    assert make_cfg(resume="latest", save_dir=copy)["resume"] == str(before)
    assert make_cfg(resume=copy / "version_0")["resume"] == str(before)


def test_a_run_goes_on_from_before_the_damage_and_says_so(copy, whole):
    flip(saved(copy)[-1] / "trainer.safetensors")
    err = finish(start(copy, "--resume=latest"), copy)
    assert "step_0000195': no checkpoint, or a damaged one (trainer.safetensors" in err and "trying the one before" in err
    assert_same(copy, whole)
    assert len(list((copy / "version_0").glob("undone_*_step_0000195"))) == 1


def test_what_must_not_change_on_resume_is_refused_by_name(copy):
    for key, value in (("lr", 1), ("dict_size", 5), ("layers", "0"), ("enc_dtype", "fp32"), ("batch_size", 64), ("seed", 1),
                       ("model_name", TINY / "tuned"), ("eval_seqs", 9)):
        with pytest.raises(ValueError, match=f"^{key}=.*cannot change on resume.*step_0000195 has"):
            make_cfg(resume=copy / "version_0", **{key: value})
    cfg = make_cfg(resume="latest", save_dir=copy, log_every=7, num_tokens=2e5, wandb_mode="offline", preset="tiny")
    assert (cfg["log_every"], cfg["num_tokens"], cfg["wandb_mode"], cfg["lr"]) == (7, 200_000, "offline", 1e-3)
    assert make_cfg(**cfg) == cfg
    for resume in ("latest", copy / "no"):
        with pytest.raises(ValueError, match="^resume="):
            make_cfg(resume=resume)


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"step_counter": 3}'])
def test_a_checkpoint_without_a_runs_state_is_refused(copy, models, tokens, content):
    folder = saved(copy)[-1]
    (folder / "trainer.json").write_text(content)
    sign(folder, "trainer.json")
    with pytest.raises(ValueError, match="^resume=.*another version"):
        Trainer(make_cfg(resume=folder), models, tokens)


def test_another_text_is_refused_and_more_text_is_not(copy):
    cfg = make_cfg(resume="latest", save_dir=copy)
    models = load_models(cfg)
    tokens = load_tokens(cfg, models[0].tokenizer).clone()
    Trainer(cfg, models, torch.cat([tokens, tokens[:5]])).lock.release()
    tokens[3, 3] = 7
    before = saved(copy)
    with pytest.raises(ValueError, match="^tokens=.*not the text"):
        Trainer({**cfg, "resume": str(before[0])}, models, tokens)
    assert saved(copy) == before  # nothing is put aside in vain


def test_after_an_error_no_evaluation_is_logged_twice(cfg, models, tokens, tmp_path):
    cfg = {**cfg, "eval_every": 10, "log_every": 5, "save_dir": str(tmp_path)}
    trainer = Trainer(cfg, models, tokens[:60])
    trainer.buffer.next, next_batch = (lambda: next_batch() if trainer.step_counter < 20 else 1 / 0), trainer.buffer.next
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    Trainer({**cfg, "resume": str(saved(tmp_path)[-1])}, models, tokens[:60]).train()
    assert [row["step"] for row in rows(tmp_path) if "fvu/all" in row] == [0, 10, 20, 30, 40]


def test_checkpoints_are_kept_by_number_and_other_files_are_left_alone(cfg, models, tokens, tmp_path):
    trainer = Trainer({**cfg, "keep": 2, "save_dir": str(tmp_path)}, models, tokens[:60])
    (trainer.run_dir / "step_notes").mkdir()
    for trainer.step_counter in (9_999_990, 9_999_999, 10_000_000):
        trainer.save()
    assert sorted(path.name for path in saved(tmp_path)) == ["step_10000000", "step_9999999", "step_notes"]
    assert make_cfg(resume=trainer.run_dir)["resume"].endswith("step_10000000")


@contextlib.contextmanager
def disk(options, folder):
    """A disk, mounted at folder."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_run_outlives_a_full_disk_and_one_that_cannot_be_written(whole, tmp_path):
    folder, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    folder.mkdir()
    with disk("size=200m", folder):
        elsewhere.mkdir()
        with open(elsewhere / "stderr.txt", "w") as err:
            run = subprocess.Popen([*TRAIN, f"--save_dir={folder}", "--num_tokens=100_000"], stdout=err, stderr=err,
                                   env={**os.environ, "HF_HUB_OFFLINE": "1"})
        said = lambda: (elsewhere / "stderr.txt").read_text()
        wait_for(run, lambda: saved(folder))
        with contextlib.suppress(OSError), open(folder / "filler", "wb") as file:
            while True:
                file.write(bytes(2**16))
        wait_for(run, lambda: "No space left" in said())
        for checkpoint in saved(folder):
            CrossCoder.load(checkpoint)  # the good ones are whole
        (folder / "filler").unlink()
        wait_for(run, lambda: saved(folder)[-1].name > "step_0000075")
        with disk("ro,size=1m", folder / "version_0"):
            wait_for(run, lambda: "Read-only file system" in said())
        finish(run, elsewhere)
        assert_same(folder, whole)


def test_a_quota_that_is_lifted_in_time_loses_nothing(whole, tmp_path):
    """The last checkpoint is not given up on."""
    run = start(tmp_path)
    wait_for(run, lambda: saved(tmp_path))
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))
    wait_for(run, lambda: (tmp_path / "stderr.txt").read_text().count("step_0000195"))  # trained, not yet saved
    for checkpoint in saved(tmp_path):
        CrossCoder.load(checkpoint)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "File too large" in finish(run, tmp_path)
    assert_same(tmp_path, whole)


def test_a_step_that_is_not_finite_is_skipped_and_counted(cfg, models, tokens):
    trainer = Trainer(cfg, models, tokens[:60])
    trainer.step()
    before = {name: value.clone() for name, value in trainer.crosscoder.state_dict().items()}
    adam = [each["exp_avg_sq"].clone() for each in trainer.optimizer.state.values()]
    slot = trainer.buffer.order[trainer.buffer.pointer]
    row, trainer.buffer.buffer[slot] = trainer.buffer.buffer[slot].clone(), 1e30  # the squared error overflows
    metrics = trainer.step()
    assert not metrics["loss/total"].isfinite() and metrics["data/steps_skipped"] == 1 and trainer.step_counter == 2
    assert all(torch.equal(value, before[name]) for name, value in trainer.crosscoder.state_dict().items())
    assert all(torch.equal(each["exp_avg_sq"], old) for each, old in zip(trainer.optimizer.state.values(), adam))
    trainer.buffer.buffer[slot] = row
    assert trainer.step()["data/steps_skipped"] == 1 and trainer.skipped_in_a_row == 0
    assert not torch.equal(trainer.crosscoder.W_enc, before["W_enc"])


@pytest.mark.parametrize("log_every, step", [(3, 186), (1000, 195)])  # the last step is always logged
def test_ten_such_steps_in_a_row_end_a_run_with_what_it_knows(copy, log_every, step):
    good = saved(copy)[0]
    (good / "cfg.json").write_text((good / "cfg.json").read_text().replace('"lr": 0.001', '"lr": 1e25'))
    sign(good, "cfg.json")
    err = finish(start(copy, f"--resume={good}", f"--log_every={log_every}", "--save_every=5"), copy, code=1)
    (line,) = (line for line in err.split("\n") if line.startswith("error:"))
    assert f"step {step}: loss or gradients not finite 10 times in a row; largest norms: " in line and "post.3" in line
    assert line.endswith(f"last good checkpoint: {good}") and "Traceback" not in err
    assert saved(copy) == [good] and CrossCoder.load(good).W_enc.isfinite().all()


def test_activations_that_are_not_finite_are_caught_with_their_sequences(cfg, tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY / "base")
    token = int(tokens[5, 100])
    model.transformer.wte.weight.data[token] = math.nan
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(tmp_path / "broken")
    cfg = {**cfg, "model_name": str(tmp_path / "broken")}
    broken = [seq for seq in range(8) if (tokens[seq, 1:].int() == token).any()]
    assert 5 in broken
    with pytest.raises(FloatingPointError, match=re.escape(f"sequences {broken}")):
        Buffer(cfg, load_models(cfg), tokens[:60])


class Exploit:
    """Unpickling it leaves a file."""
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("name", ["cfg.json", "crosscoder.safetensors", "trainer.safetensors", "trainer.json", "manifest.json"])
def test_a_file_from_strangers_runs_no_code(copy, name):
    folder = saved(copy)[-1]
    for data in (pickle.dumps(Exploit()), None):
        (folder / name).write_bytes(data) if data else torch.save(Exploit(), folder / name)
        if name != "manifest.json":
            sign(folder, name)
        with pytest.raises(ValueError, match="^resume=.*damaged"):
            make_cfg(resume=folder)
        if not name.startswith("trainer"):
            with pytest.raises(ValueError, match="^path=.*damaged"):
                CrossCoder.load(folder)
    assert not Path("unpickled").exists()
    with pytest.raises(FileExistsError):  # the file is what it is meant to be
        os.mkdir("unpickled")
        pickle.loads(pickle.dumps(Exploit()))


def test_token_files_from_strangers_run_no_code(cfg, models, tmp_path):
    for name in ("tokens.npy", "tokens.pt"):
        for write in (lambda file: file.write_bytes(pickle.dumps(Exploit())), lambda file: torch.save(Exploit(), file)):
            write(tmp_path / name)
            with pytest.raises(ValueError, match="^tokens="):
                load_tokens({**cfg, "tokens": str(tmp_path / name)}, models[0].tokenizer)
    assert not Path("unpickled").exists()


def test_two_runs_at_the_same_moment_each_get_a_folder_and_a_run_is_resumed_only_once(copy, tmp_path):
    runs = [start(tmp_path, OMP_NUM_THREADS="1") for _ in range(2)]
    assert [run.wait(200) for run in runs] == [0, 0]
    one, other = (sorted((tmp_path / f"version_{n}").glob("step_*")) for n in range(2))
    assert [path.name for path in one] == [path.name for path in other] == ["step_0000175", "step_0000195"]
    assert (one[1] / "crosscoder.safetensors").read_bytes() == (other[1] / "crosscoder.safetensors").read_bytes()
    shutil.rmtree(saved(copy)[-1])
    first = start(copy, "--resume=latest", num_tokens=1_000_000)
    wait_for(first, lambda: rows(copy) and rows(copy)[-1]["step"] > 195)
    assert re.search("^error: resume=.*another run is at work in", finish(start(copy, "--resume=latest"), copy, code=2), re.M)
    first.kill()
    first.wait()


@pytest.mark.parametrize("odd", [{"buffer_mult": 7, "model_batch_size": 3}, {"batch_size": 50, "buffer_mult": 5},
                                 {"model_name": f"{TINY / 'base'},{TINY / 'tuned'}", "layers": "0,2", "enc_dtype": "bf16"}])
def test_a_run_resumed_in_a_later_epoch_is_the_same_to_the_last_bit(cfg, tokens, tmp_path, odd):
    cfg = {**cfg, "save_dir": str(tmp_path), **odd}
    models = load_models(cfg)
    one, other = (Trainer(cfg, models, tokens[:20]) for _ in range(2))
    for _ in range(60):
        wanted = one.step()
    for _ in range(35):
        other.step()
    resumed = Trainer({**cfg, "resume": str(other.save())}, models, tokens[:20])
    for _ in range(25):
        metrics = resumed.step()
    assert wanted["data/rows_replayed"] > 0 and all(metrics[key] == wanted[key] for key in wanted)
    assert torch.equal(resumed.buffer.buffer, one.buffer.buffer)
    assert all(torch.equal(a, b) for a, b in zip(resumed.crosscoder.parameters(), one.crosscoder.parameters()))


def test_a_longer_run_can_follow_and_the_folder_says_what_made_it(copy):
    before = json.loads((copy / "version_0" / "cfg.json").read_text())
    finish(start(copy, "--resume=latest", num_tokens=110_000), copy)
    assert saved(copy)[-1].name == "step_0000214"
    assert [row["step"] for row in rows(copy) if "loss/total" in row] == [*range(5, 215, 5), 214]
    assert [row["step"] for row in rows(copy) if "fvu/all" in row] == [0, 50, 100, 150, 200, 214]
    first, second = (json.loads(line) for line in open(copy / "version_0" / "starts.jsonl"))
    assert first["command"][-1] == "--num_tokens=100000" and second["command"][-1] == "--resume=latest"
    assert torch.__version__.startswith(first["versions"]["torch"])
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", first["commit"])
    cfg = json.loads((copy / "version_0" / "cfg.json").read_text())
    assert (before["num_tokens"], cfg["num_tokens"]) == (100_000, 110_000)
    crosscoder = CrossCoder.load(copy / "version_0")
    assert make_cfg(**crosscoder.cfg) == crosscoder.cfg  # as scratch.py does: not a run to resume


class Wandb(BaseHTTPRequestHandler):
    """A server of wandb's that answers what a run asks at its start, until `hangs` is set: then nothing any more."""
    protocol_version, hangs = "HTTP/1.1", False

    def do_POST(self):
        query = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.hangs:
            threading.Event().wait()  # for ever: what it would write later nobody reads
        data = {"model": None, "viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
                "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "features": []}}
        if "upsertBucket" in query:
            project = {"id": "p", "name": "crosscoders", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "r", "name": "abc", "displayName": "d", "config": "{}", "project": project, "historyLineCount": 0}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module", autouse=True)
def with_wandb(tmp_path_factory):
    """Two runs in the background of the other tests, as they mostly wait: one whose server never answers, one whose
    server stops answering once there is a checkpoint. -> (process, folder) of each"""
    runs, servers = [], [ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Wandb,), {})) for _ in range(2)]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folder = tmp_path_factory.mktemp("wandb")
        runs.append((start(folder, "--wandb_mode=online", WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}",
                           WANDB_API_KEY="0" * 40, OMP_NUM_THREADS="1"), folder))
    servers[0].RequestHandlerClass.hangs = True

    def hang():
        wait_for(runs[1][0], lambda: saved(runs[1][1]))
        servers[1].RequestHandlerClass.hangs = True

    threading.Thread(target=hang, daemon=True).start()
    yield runs
    for run, _ in runs:
        run.kill()


def test_a_run_outlives_wandb_hanging_from_the_start_or_later(with_wandb):
    never, later = (finish(*each) for each in with_wandb)
    assert "the run goes on without it" in never
    assert "Timed out finishing run" in later and "goes on without it" not in later
    assert_same(with_wandb[0][1], with_wandb[1][1])


def kill_and_resume(folder, kills, random, total):
    """Kills a run that often and goes on with it each time. -> a list of (what it was doing, steps lost)"""
    done = []
    for n in range(kills):
        wanted = ("harvesting", "training", "saving", "evaluating")[n % 4]
        if not saved(folder):  # nothing to go on from: a run of its own
            shutil.rmtree(folder, ignore_errors=True)
        before = rows(folder)
        run = start(folder, *(["--resume=latest"] if saved(folder) else []), num_tokens=total)
        err = lambda: (folder / "stderr.txt").read_text()
        if wanted == "harvesting":
            wait_for(run, lambda: "filling the buffer" in err())
            time.sleep(random.uniform(0, 0.3))
        else:
            wait_for(run, lambda: "training" in err() and rows(folder) != before)
            time.sleep(random.uniform(0, 2))
            if wanted == "saving":
                wait_for(run, lambda: list((folder / "version_0").glob(".step_*")))
            elif wanted == "evaluating":
                wait_for(run, lambda: evaluating(folder))
            time.sleep(random.uniform(0, 0.1))
        doing = ("harvesting" if "training" not in err() else "saving" if list((folder / "version_0").glob(".step_*"))
                 else "evaluating" if evaluating(folder) else "training")
        assert run.poll() is None, err()[-2000:]
        run.kill()
        run.wait()
        at = rows(folder)[-1]["step"] if rows(folder) else 0
        done.append((doing, max(0, at - (int(saved(folder)[-1].name[5:]) if saved(folder) else 0))))
        print(f"kill {n + 1}: {doing} at step {at}, {done[-1][1]} steps lost", flush=True)
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    total = 40_000 * args.kills
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        finish(start(whole, num_tokens=total), whole, within=600)
        done = kill_and_resume(killed, args.kills, random.Random(args.seed), total)
        finish(start(killed, "--resume=latest", num_tokens=total), killed, within=600)
        assert_same(killed, whole)
    print("\n| killed while | tried | survived, the same to the last bit | most steps lost |\n|---|---|---|---|")
    for doing, count in Counter(doing for doing, _ in done).items():
        print(f"| {doing} | {count} | {count} | {max(lost for each, lost in done if each == doing)} |")
