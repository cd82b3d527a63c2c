"""Faults, injected for real: killed processes, signals, full disks, damaged and hostile files, a hanging
server.

  python tests/test_faults.py --kills=20     kills a run that often, at random moments, and prints what
                                             became of it
  python tests/test_faults.py --fuzz=300     300 random command lines and as many notebook calls
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
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT, Run, TINY, open_models
import train  # once conftest has said where it is
from fuzz import fuzz
from train import load_models, load_tokens, make_cfg
from utils import Buffer, CrossCoder, Trainer

ARGUMENTS = [  # 195 steps of a small dictionary
    "--preset=tiny", "--buffer_mult=64", "--eval_seqs=16", "--log_every=5", "--eval_every=50",
    "--save_every=25", "--keep=2", "--batch_size=128", "--dict_size=512", "--num_tokens=25_000"]


def start(folder, *arguments, threads=1, env={}, function=train.main):
    """A run that saves into folder, in a process of its own."""
    folder.mkdir(exist_ok=True, parents=True)
    argv = [*ARGUMENTS, f"--save_dir={folder}", *arguments]
    return Run(argv, err=folder / "stderr.txt", env=env, threads=threads, function=function)


def get_err(folder):
    """What a run wrote on stderr."""
    return (folder / "stderr.txt").read_text(errors="replace")  # perhaps half a character


def finish(run, folder, code=0, within=200):
    """Waits for a run's end. -> what it wrote on stderr, without progress bars"""
    returned = run.wait(within)
    lines = re.split("[\r\n]", get_err(folder))
    err = "\n".join(line for line in lines if line and "%|" not in line)
    assert returned == code, f"{returned}: {err[-2000:]}"
    return err


def wait_for(run, condition, within=60):
    """Waits until condition() holds; the run must be alive then."""
    until = time.time() + within
    while not condition():
        assert run.poll() is None and time.time() < until
        time.sleep(0.005)


def kill(run):
    run.kill()
    run.wait()


def rows(folder):
    """Every whole line of a run's metrics.jsonl, but for how fast it was."""
    file = folder / "version_0" / "metrics.jsonl"
    rows = []
    for line in file.read_text().split("\n")[:-1] if file.exists() else []:
        row = json.loads(line)
        rows.append({key: value for key, value in row.items() if not key.startswith("perf/")})
    return rows


def last_step(folder):
    """Of those that are logged."""
    logged = rows(folder)
    return logged[-1]["step"] if logged else 0


def saved(folder):
    """The checkpoints of a run, by step."""
    return sorted((folder / "version_0").glob("step_*"))


def half_saved(folder):
    """What a run is writing at the moment, or was when it was killed."""
    return list((folder / "version_0").glob(".step_*"))


def evaluating(folder):
    """The last that was logged and the last that was saved are a step after which there is an evaluation."""
    logged = rows(folder)
    if not logged or "loss/total" not in logged[-1] or logged[-1]["step"] % 50:
        return False
    return saved(folder)[-1:] == [folder / "version_0" / f"step_{logged[-1]['step']:07d}"]


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


# ---- Kills and signals ---------------------------------------------------------------------------
def test_the_log_of_a_run_has_every_step_once(whole):
    logged = rows(whole)
    assert [row["step"] for row in logged if "loss/total" in row] == list(range(5, 200, 5))
    assert [row["step"] for row in logged if "fvu/all" in row] == [0, 50, 100, 150, 195]
    assert [path.name for path in saved(whole)] == ["step_0000175", "step_0000195"]


def test_a_killed_run_goes_on_as_if_nothing_had_been(whole, tmp_path):
    run = start(tmp_path)
    wait_for(run, lambda: saved(tmp_path) and last_step(tmp_path) > 40)
    kill(run)
    run = start(tmp_path, "--resume=latest")
    wait_for(run, lambda: saved(tmp_path)[-1].name > "step_0000050" and half_saved(tmp_path))
    kill(run)  # while it saves
    finish(start(tmp_path, f"--resume={tmp_path / 'version_0'}"), tmp_path)
    assert_same(tmp_path, whole)
    assert not half_saved(tmp_path)  # what the dead left lying


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_run_can_go_on_with_its_wandb_run(whole, tmp_path, number):
    run = start(tmp_path, "--wandb_mode=offline")
    wait_for(run, lambda: last_step(tmp_path) > 30)
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


def test_a_schedulers_warning_saves_and_the_run_goes_on(whole, tmp_path):
    run = start(tmp_path, "--save_every=1000")
    wait_for(run, lambda: last_step(tmp_path) > 30)
    run.send_signal(signal.SIGUSR1)
    wait_for(run, lambda: saved(tmp_path))
    assert saved(tmp_path)[0].name < "step_0000195"
    finish(run, tmp_path)
    assert len(saved(tmp_path)) == 2
    assert_same(tmp_path, whole)


def test_under_nohup_a_closed_terminal_ends_nothing(whole, tmp_path):
    run = start(tmp_path, function=main_under_nohup)
    wait_for(run, lambda: last_step(tmp_path) > 30)
    run.send_signal(signal.SIGHUP)
    finish(run, tmp_path)
    assert_same(tmp_path, whole)


def main_under_nohup(argv):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return train.main(argv)


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    run = start(tmp_path, "--eval_seqs=64")
    wait_for(run, lambda: evaluating(tmp_path))
    run.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.wait(1) == -signal.SIGTERM


# ---- Damaged checkpoints, and what may change on resume ------------------------------------------
FILES = ["cfg.json", "crosscoder.safetensors", "trainer.safetensors", "trainer.json", "manifest.json"]


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


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_taken(copy, name):
    before, last = saved(copy)
    if name.endswith("safetensors"):
        flip(last / name)
    else:
        (last / name).write_bytes((last / name).read_bytes()[:-9])
    problem = f"resume='{last}': no checkpoint, or a damaged one .*({name}|JSON|line)"
    with pytest.raises(ValueError, match=problem):
        make_cfg(resume=last)
    assert make_cfg(resume="latest", save_dir=copy)["resume"] == str(before)
    assert make_cfg(resume=copy / "version_0")["resume"] == str(before)


def test_a_run_goes_on_from_before_the_damage_and_says_so(copy, whole):
    flip(saved(copy)[-1] / "trainer.safetensors")
    shutil.copytree(saved(copy)[-1], copy / "version_0" / "damaged_step_0000195")  # of an earlier time
    err = finish(start(copy, "--resume=latest"), copy)
    assert "step_0000195': no checkpoint, or a damaged one (trainer.safetensors" in err
    assert "trying the one before" in err
    assert_same(copy, whole)
    assert [path.name for path in (copy / "version_0").glob("damaged_*")] == ["damaged_step_0000195"]


def test_an_earlier_checkpoint_than_the_last_is_refused_with_the_remedy(copy):
    before, last = saved(copy)
    with pytest.raises(ValueError, match=f"^resume='{before}': {last.name} is later; .*move it away"):
        make_cfg(resume=before)
    last.rename(copy / "elsewhere")
    assert make_cfg(resume=before)["resume"] == str(before)
    with pytest.raises(ValueError, match="^resume="):
        make_cfg(resume=copy / "elsewhere")  # of no run's


def test_what_must_not_change_on_resume_is_refused_by_name(copy):
    other = {"bf16": "fp32", "fp32": "bf16"}[CrossCoder.load(copy / "version_0").cfg["enc_dtype"]]
    changes = {
        "lr": 1, "dict_size": 5, "layers": "0", "enc_dtype": other, "batch_size": 64, "seed": 1,
        "fingerprint": "1,2", "eval_seqs": 9}
    for key, value in changes.items():
        with pytest.raises(ValueError, match=f"^{key}=.*cannot change on resume.*step_0000195 has"):
            make_cfg(resume=copy / "version_0", **{key: value})
    cfg = make_cfg(
        resume="latest", save_dir=copy, log_every=7, num_tokens=3e4, wandb_mode="offline", preset="tiny")
    assert (cfg["log_every"], cfg["num_tokens"], cfg["wandb_mode"]) == (7, 30_000, "offline")
    assert cfg["lr"] == 1e-3
    assert make_cfg(**cfg) == cfg
    more = make_cfg(resume=copy / "version_0", num_tokens=3e4, dataset="more")
    assert (more["dataset"], more["tokens"]) == (["more"], [])
    assert make_cfg(save_dir="~nobody_of_that_name/x")["save_dir"] == "~nobody_of_that_name/x"
    for resume in ("latest", copy / "no"):
        with pytest.raises(ValueError, match="^resume="):
            make_cfg(resume=resume)


def test_the_latest_run_is_the_one_that_was_started_last(copy, capfd):
    """Copying has changed the times of the files."""
    shutil.copytree(copy / "version_0", copy / "version_1")
    for run, start_time in (("version_0", "2026-03-01 10:00:01 UTC"), ("version_1", "2026-03-01 10:00:00 UTC")):
        line = json.loads((copy / run / "starts.jsonl").read_text())
        (copy / run / "starts.jsonl").write_text(json.dumps({**line, "time": start_time}) + "\n")
    os.utime(copy / "version_0", (0, 0))
    os.utime(saved(copy)[-1], (0, 0))
    assert make_cfg(resume="latest", save_dir=copy, num_tokens=30_000)["resume"] == str(saved(copy)[-1])
    assert capfd.readouterr().err == f"resume=latest: {copy / 'version_0'}\n"
    for cut_off in ("", "{", "5\n"):
        (copy / "version_0" / "starts.jsonl").write_text(cut_off)
        assert "version_1" in make_cfg(resume="latest", save_dir=copy, num_tokens=30_000)["resume"]


def test_a_checkpoint_that_came_after_the_one_to_resume_is_left_alone(copy, models, tokens):
    """As where the other process saves once more while this one opens its models."""
    before, last = saved(copy)
    aside = last.rename(copy / last.name)
    cfg = make_cfg(resume=before)
    aside.rename(last)
    with pytest.raises(ValueError, match="^resume=.*another run is or was at work in"):
        Trainer(cfg, models, tokens)
    shutil.rmtree(before)  # which the other's keep has removed
    with pytest.raises(ValueError, match="^resume=.*another run is or was at work in"):
        Trainer(cfg, models, tokens)
    assert saved(copy) == [last]


def test_a_run_killed_in_its_last_evaluation_is_not_finished(whole, tmp_path):
    run = start(tmp_path)
    wait_for(run, lambda: (tmp_path / "version_0" / "step_0000195").exists(), within=200)
    kill(run)
    assert "ce/clean" not in rows(tmp_path)[-1]
    finish(start(tmp_path, "--resume=latest"), tmp_path)
    assert_same(tmp_path, whole)


def test_a_finished_run_says_so_at_once_and_how_to_train_longer(copy):
    with pytest.raises(ValueError, match="^resume=.*step_0000195': finished; to train longer give a larger num_tokens than 25000"):
        make_cfg(resume="latest", save_dir=copy)


def test_other_weights_at_the_same_path_are_refused_and_a_model_that_moved_is_not(cfg, tokens, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(TINY / "base", place)
    cfg = {**cfg, "model_name": [str(place)], "save_dir": str(tmp_path)}
    trainer = Trainer(cfg, load_models(cfg), tokens[:60])
    for _ in range(3):
        trainer.step()
    trainer.save()
    trainer.lock.release()
    assert len(CrossCoder.load(trainer.run_dir).cfg["fingerprint"]) == 8
    with pytest.raises(ValueError, match="^fingerprint=.*cannot change on resume"):
        make_cfg(resume=trainer.run_dir, fingerprint="")

    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(place, moved)
    resumed_cfg = make_cfg(resume=trainer.run_dir, model_name=moved)
    resumed = Trainer(resumed_cfg, load_models(resumed_cfg), tokens[:60])
    resumed.lock.release()
    assert all(torch.equal(resumed.step()[key], trainer.step()[key]) for key in ("loss/total", "loss/grad_norm"))

    model = AutoModelForCausalLM.from_pretrained(place)
    for parameter in model.parameters():
        parameter.data *= 1.2
    model.save_pretrained(place)
    for remade in (make_cfg(resume=trainer.run_dir), make_cfg(**CrossCoder.load(trainer.run_dir).cfg)):
        with pytest.raises(ValueError, match="^model_name=.*not the weights that the crosscoder was trained on"):
            load_models(remade)
    load_models(make_cfg(**CrossCoder.load(trainer.run_dir).cfg | {"fingerprint": []}))


def test_a_fingerprint_holds_across_types(cfg):
    fp32, bf16 = ({**cfg, "enc_dtype": dtype, "fingerprint": []} for dtype in ("fp32", "bf16"))
    load_models(fp32)
    load_models({**bf16, "fingerprint": fp32["fingerprint"]})
    load_models(bf16)
    assert bf16["fingerprint"] != fp32["fingerprint"]


@pytest.mark.parametrize("name, content", [
    ("trainer.json", "{}"), ("trainer.json", "[]"), ("trainer.json", "null"),
    ("trainer.json", '{"step_counter": 3}'), ("trainer.json", '{"step_counter": "3"}'), ("cfg.json", "[]"), ("cfg.json", "null"),
    ("cfg.json", "5")])
def test_a_checkpoint_without_a_runs_state_is_refused(copy, models, tokens, name, content):
    folder = saved(copy)[-1]
    (folder / name).write_text(content)
    sign(folder, name)
    with pytest.raises(ValueError, match="^resume=.*not a run of this version"):
        Trainer(make_cfg(resume=folder, num_tokens=30_000), models, tokens)


def test_another_text_is_refused_and_more_text_is_not(copy):
    cfg = make_cfg(resume="latest", save_dir=copy, num_tokens=30_000)
    models = open_models(cfg)
    tokens = load_tokens(cfg, models).clone()
    Trainer(cfg, models, torch.cat([tokens, tokens[:5]])).lock.release()
    tokens[3, 3] = 7
    before = saved(copy)
    with pytest.raises(ValueError, match="^tokens=.*not the text"):
        Trainer(cfg, models, tokens)
    assert saved(copy) == before  # nothing is put aside in vain


def test_after_an_error_no_evaluation_is_logged_twice(cfg, models, tokens, tmp_path):
    cfg = {**cfg, "eval_every": 10, "log_every": 5, "save_dir": str(tmp_path)}
    trainer = Trainer(cfg, models, tokens[:60])
    next_batch = trainer.buffer.next

    def fail_at_step_20():
        return next_batch() if trainer.step_counter < 20 else 1 / 0

    trainer.buffer.next = fail_at_step_20
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    Trainer({**cfg, "resume": str(saved(tmp_path)[-1])}, models, tokens[:60]).train()
    assert [row["step"] for row in rows(tmp_path) if "fvu/all" in row] == [0, 10, 20, 30, 40]


def test_checkpoints_are_kept_by_number_and_other_files_are_left_alone(cfg, models, tokens, tmp_path):
    trainer = Trainer({**cfg, "keep": 2, "save_dir": str(tmp_path)}, models, tokens[:60])
    for name in ("step_notes", "step_0000009_copy"):
        (trainer.run_dir / name).mkdir()
    for step in (9_999_990, 9_999_999, 10_000_000):
        trainer.step_counter = step
        trainer.save()
    kept = ["step_0000009_copy", "step_10000000", "step_9999999", "step_notes"]
    assert [path.name for path in saved(tmp_path)] == kept
    assert make_cfg(resume=trainer.run_dir, num_tokens=1e10)["resume"].endswith("step_10000000")


def test_a_longer_run_can_follow_and_the_folder_says_what_made_it(copy):
    before = json.loads((copy / "version_0" / "cfg.json").read_text())
    finish(start(copy, "--resume=latest", "--num_tokens=27_500"), copy)
    assert saved(copy)[-1].name == "step_0000214"
    logged = rows(copy)
    assert [row["step"] for row in logged if "loss/total" in row] == [*range(5, 215, 5), 214]
    assert [row["step"] for row in logged if "fvu/all" in row] == [0, 50, 100, 150, 200, 214]
    assert len(open(copy / "version_0" / "starts.jsonl").readlines()) == 2
    cfg = json.loads((copy / "version_0" / "cfg.json").read_text())
    assert (before["num_tokens"], cfg["num_tokens"]) == (25_000, 27_500)
    crosscoder = CrossCoder.load(copy / "version_0")
    assert make_cfg(**crosscoder.cfg) == crosscoder.cfg  # as scratch.py does: not a run to resume


@pytest.mark.parametrize("odd", [
    {"buffer_mult": 7, "model_batch_size": 3},
    {"batch_size": 50, "buffer_mult": 5},
    {"model_name": [str(TINY / "base"), str(TINY / "tuned")], "layers": [0, 2], "enc_dtype": "bf16"},
])
def test_a_run_resumed_in_a_later_epoch_is_the_same_to_the_last_bit(cfg, tokens, tmp_path, odd):
    cfg = {**cfg, "save_dir": str(tmp_path), **odd}
    models = open_models(cfg)
    one = Trainer(cfg, models, tokens[:20])
    other = Trainer(cfg, models, tokens[:20])
    for _ in range(60):
        wanted = one.step()
    for _ in range(35):
        other.step()
    cfg["resume"] = str(other.save())
    with pytest.raises(ValueError, match="^resume=.*another run is or was at work in"):
        Trainer(cfg, models, tokens[:20])
    other.lock.release()
    resumed = Trainer(cfg, models, tokens[:20])
    for _ in range(25):
        metrics = resumed.step()
    assert wanted["data/epochs"] > 1 and all(metrics[key] == wanted[key] for key in wanted)
    assert torch.equal(resumed.buffer.buffer, one.buffer.buffer)
    for parameter, same in zip(resumed.crosscoder.parameters(), one.crosscoder.parameters()):
        assert torch.equal(parameter, same)


def test_two_runs_at_the_same_moment_each_get_a_folder_and_a_run_is_resumed_only_once(copy, tmp_path):
    runs = [start(tmp_path) for _ in range(2)]
    assert [run.wait(200) for run in runs] == [0, 0]
    last = []
    for n in range(2):
        checkpoints = sorted((tmp_path / f"version_{n}").glob("step_*"))
        assert [path.name for path in checkpoints] == ["step_0000175", "step_0000195"]
        last.append((checkpoints[1] / "crosscoder.safetensors").read_bytes())
    assert last[0] == last[1]
    shutil.rmtree(saved(copy)[-1])
    first = start(copy, "--resume=latest", "--num_tokens=200_000")
    wait_for(first, lambda: last_step(copy) > 195)
    err = finish(start(copy, "--resume=latest", "--num_tokens=200_000"), copy, code=2)
    assert re.search("^error: resume=.*another run is or was at work in", err, re.M)
    kill(first)


# ---- Disks ---------------------------------------------------------------------------------------
@contextlib.contextmanager
def disk(options, folder):
    """A disk, mounted at folder."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_run_outlives_a_full_disk_and_one_that_cannot_be_written(whole, tmp_path):
    folder = tmp_path / "disk"
    elsewhere = tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    with disk("size=200m", folder):
        run = Run([*ARGUMENTS, f"--save_dir={folder}"], err=elsewhere / "stderr.txt", threads=1)
        wait_for(run, lambda: saved(folder))
        with contextlib.suppress(OSError), open(folder / "filler", "wb") as file:
            while True:
                file.write(bytes(2**16))
        wait_for(run, lambda: "No space left" in get_err(elsewhere))
        for checkpoint in saved(folder):
            CrossCoder.load(checkpoint)  # the good ones are whole
        (folder / "filler").unlink()
        wait_for(run, lambda: saved(folder)[-1].name > "step_0000075")
        with disk("ro,size=1m", folder / "version_0"):
            wait_for(run, lambda: "Read-only file system" in get_err(elsewhere))
        finish(run, elsewhere)
        assert_same(folder, whole)


def test_no_output_ends_a_run(whole, tmp_path):
    """Its log is on a disk that is full, and nobody reads its pipe."""
    command = [sys.executable, ROOT / "train.py", *ARGUMENTS, f"--save_dir={tmp_path}"]
    with open("/dev/full", "w") as full:
        run = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=full, env={**os.environ, "OMP_NUM_THREADS": "1"})
    run.stdout.close()
    assert run.wait(200) == 0
    assert_same(tmp_path, whole)


def test_a_quota_that_is_lifted_in_time_loses_nothing(whole, tmp_path):
    """The last checkpoint is not given up on."""
    run = start(tmp_path)
    wait_for(run, lambda: saved(tmp_path))
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))
    wait_for(run, lambda: "step_0000195" in get_err(tmp_path))  # trained, not yet saved
    for checkpoint in saved(tmp_path):
        CrossCoder.load(checkpoint)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "File too large" in finish(run, tmp_path)
    assert_same(tmp_path, whole)


# ---- Numbers that are not finite -----------------------------------------------------------------
def test_a_step_that_is_not_finite_is_skipped_and_counted(cfg, models, tokens):
    trainer = Trainer(cfg, models, tokens[:60])
    trainer.step()
    before = {name: value.clone() for name, value in trainer.crosscoder.state_dict().items()}
    adam = [moments["exp_avg_sq"].clone() for moments in trainer.optimizer.state.values()]
    slot = trainer.buffer.order[trainer.buffer.pointer]
    row = trainer.buffer.buffer[slot].clone()
    trainer.buffer.buffer[slot] = 1e30  # the squared error overflows
    metrics = trainer.step()
    assert not metrics["loss/total"].isfinite() and metrics["data/steps_skipped"] == 1
    assert trainer.step_counter == 2
    for name, value in trainer.crosscoder.state_dict().items():
        assert torch.equal(value, before[name])
    for moments, old in zip(trainer.optimizer.state.values(), adam):
        assert torch.equal(moments["exp_avg_sq"], old)
    trainer.buffer.buffer[slot] = row
    assert trainer.step()["data/steps_skipped"] == 1 and trainer.skipped_in_a_row == 0
    after = trainer.crosscoder.W_enc.detach().clone()
    assert not torch.equal(after, before["W_enc"])
    trainer.skipped_in_a_row.fill_(10)  # after that many no step is taken, even a good one
    assert trainer.step()["data/steps_skipped"] == 2 and torch.equal(trainer.crosscoder.W_enc, after)


@pytest.mark.parametrize("log_every, step", [(3, 186), (1000, 195)])  # the last step is always logged
def test_ten_such_steps_in_a_row_end_a_run_with_what_it_knows(copy, log_every, step):
    good, last = saved(copy)
    shutil.rmtree(last)
    text = (good / "cfg.json").read_text()
    (good / "cfg.json").write_text(text.replace('"lr": 0.001', '"lr": 1e15'))
    sign(good, "cfg.json")
    err = finish(start(copy, f"--resume={good}", f"--log_every={log_every}", "--save_every=5"), copy, code=1)
    (line,) = (line for line in err.split("\n") if line.startswith("error:"))
    assert f"step {step}: loss or gradients not finite 10 times in a row; largest norms: " in line
    assert "post.3" in line and line.endswith(f"go on with --resume={good}") and "Traceback" not in err
    assert saved(copy) == [good] and CrossCoder.load(good).W_enc.isfinite().all()


def test_activations_that_are_not_finite_are_caught_with_their_sequences(cfg, tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY / "base")
    token = int(tokens[5, 100])
    model.transformer.wte.weight.data[token] = math.nan
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(tmp_path / "broken")
    cfg = {**cfg, "model_name": [str(tmp_path / "broken")]}
    broken = [seq for seq in range(8) if (tokens[seq, 1:].int() == token).any()]
    assert 5 in broken
    models = load_models(cfg)
    for epoch in (0, 3):
        buffer = Buffer(cfg, models, tokens[:60])
        buffer.next_row = epoch * buffer.rows_per_epoch
        before = deepcopy(buffer.state_dict())
        with pytest.raises(FloatingPointError, match=re.escape(f"sequences {broken}")):
            buffer.refresh()
        for key, value in buffer.state_dict().items():  # the next shuffle's generator included
            assert torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else value == before[key]


# ---- Files from strangers ------------------------------------------------------------------------
class Exploit:
    """Unpickling it leaves a folder."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def write_exploits(file):
    """Writes it in two ways, one after the other."""
    file.write_bytes(pickle.dumps(Exploit()))
    yield
    torch.save(Exploit(), file)
    yield


@pytest.mark.parametrize("name", FILES)
def test_a_file_from_strangers_runs_no_code(copy, models, tokens, name):
    folder = saved(copy)[-1]
    for _ in write_exploits(folder / name):
        if name != "manifest.json":
            sign(folder, name)
        with pytest.raises(ValueError, match="^resume=.*(damaged|not a run of this version)"):
            Trainer(make_cfg(resume=folder, num_tokens=30_000), models, tokens)
        if not name.startswith("trainer"):
            with pytest.raises(ValueError, match="^path=.*(damaged|holds no crosscoder)"):
                CrossCoder.load(folder)
    assert not Path("unpickled").exists()
    with pytest.raises(FileExistsError):  # the file is what it is meant to be
        os.mkdir("unpickled")
        pickle.loads(pickle.dumps(Exploit()))


def test_token_files_from_strangers_run_no_code(cfg, models, tmp_path):
    for name in ("tokens.npy", "tokens.pt"):
        for _ in write_exploits(tmp_path / name):
            with pytest.raises(ValueError, match="^tokens="):
                load_tokens({**cfg, "tokens": [str(tmp_path / name)]}, models)
    assert not Path("unpickled").exists()


# ---- A server of wandb's that hangs --------------------------------------------------------------
class Wandb(BaseHTTPRequestHandler):
    """A server of wandb's that answers what a run asks at its start, until `hangs` is set: then nothing."""
    protocol_version = "HTTP/1.1"
    hangs = False

    def do_POST(self):
        query = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.hangs or "runfiles" in query.lower():  # an upload, whose answer is not known here
            threading.Event().wait()  # for ever: what it would write later nobody reads
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        info = {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "features": []}
        data = {"model": None, "viewer": viewer, "serverInfo": info}
        if "upsertBucket" in query:
            bucket = {
                "id": "r", "name": "abc", "displayName": "d", "config": "{}", "historyLineCount": 0,
                "project": {"id": "p", "name": "crosscoders", "entity": {"id": "e", "name": "me"}}}
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
    """Two runs in the background of the other tests, as they mostly wait: one whose server never answers, and
    a real `python train.py` whose server stops answering once there is a checkpoint. -> (process, folder) of
    each"""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Wandb,), {})) for _ in range(2)]
    folders = [tmp_path_factory.mktemp("wandb") for _ in range(2)]
    envs = []
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        envs.append({"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "0" * 40})
    servers[0].RequestHandlerClass.hangs = True
    never = start(folders[0], "--wandb_mode=online", env=envs[0])
    argv = [*ARGUMENTS, f"--save_dir={folders[1]}", "--wandb_mode=online"]
    env = {**os.environ, **envs[1], "OMP_NUM_THREADS": "1"}
    env.pop("WANDB_SERVICE", None)  # of a run in this process
    with open(folders[1] / "stderr.txt", "w") as err:
        later = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *argv], stdout=subprocess.DEVNULL, stderr=err, env=env)

    def hang():
        while later.poll() is None and not saved(folders[1]):
            time.sleep(0.01)
        servers[1].RequestHandlerClass.hangs = True

    threading.Thread(target=hang, daemon=True).start()
    yield (never, folders[0]), (later, folders[1])
    never.kill()
    later.kill()


def test_a_run_outlives_wandb_hanging_from_the_start_or_later(with_wandb, whole):
    for run, folder in with_wandb:
        finish(run, folder)
        assert_same(folder, whole)
    never, later = (get_err(folder) for _, folder in with_wandb)
    assert "the run goes on without it" in never
    assert "Timed out finishing run" in later and "goes on without it" not in later


# ---- Random command lines and calls --------------------------------------------------------------
def test_whatever_is_given_a_run_trains_or_ends_in_one_line():
    ends = fuzz(n_lines=8, n_calls=200, seed=0)
    assert ends["exit code 2"] and ends["call taken"] and ends["call refused"]


# ---- Kills at random moments ---------------------------------------------------------------------
LARGE = ["--batch_size=512", "--dict_size=2048"]


def kill_and_resume(folder, kills, random, total):
    """Kills a run that often and goes on with it each time. -> a list of (what it was doing, steps lost)"""
    results = []
    for n in range(kills):
        wanted = ("harvesting", "training", "saving", "evaluating")[n % 4]
        arguments = [*LARGE, f"--num_tokens={total}"]
        if saved(folder):
            arguments.append("--resume=latest")
        else:
            shutil.rmtree(folder, ignore_errors=True)  # nothing to go on from: a run of its own
        before = rows(folder)
        run = start(folder, *arguments, threads=None)
        if wanted == "harvesting":
            wait_for(run, lambda: "filling the buffer" in get_err(folder))
            time.sleep(random.uniform(0, 0.3))
        else:
            wait_for(run, lambda: "training" in get_err(folder) and rows(folder) != before)
            time.sleep(random.uniform(0, 2))
            if wanted == "saving":
                wait_for(run, lambda: half_saved(folder))
            elif wanted == "evaluating":
                wait_for(run, lambda: evaluating(folder))
            if wanted != "saving":  # which is soon over
                time.sleep(random.uniform(0, 0.1))
        doing = "training"
        if "training" not in get_err(folder):
            doing = "harvesting"
        elif half_saved(folder):
            doing = "saving"
        elif evaluating(folder):
            doing = "evaluating"
        assert run.poll() is None, get_err(folder)[-2000:]
        kill(run)
        step = last_step(folder)
        step_saved = int(saved(folder)[-1].name[5:]) if saved(folder) else 0
        lost = max(0, step - step_saved)
        results.append((doing, lost))
        print(f"kill {n + 1}: {doing} at step {step}, {lost} steps lost", flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--fuzz", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.fuzz:
        for end, count in sorted(fuzz(args.fuzz, args.fuzz, args.seed).items()):
            print(f"| {end} | {count} |")
        return
    total = 40_000 * args.kills
    arguments = [*LARGE, f"--num_tokens={total}"]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        killed = Path(folder, "killed")
        finish(start(whole, *arguments, threads=None), whole, within=600)
        results = kill_and_resume(killed, args.kills, random.Random(args.seed), total)
        finish(start(killed, *arguments, "--resume=latest", threads=None), killed, within=600)
        assert_same(killed, whole)
    print("\n| killed while | tried | survived, the same to the last bit | most steps lost |")
    print("|---|---|---|---|")
    for doing, count in Counter(doing for doing, _ in results).items():
        most = max(lost for what, lost in results if what == doing)
        print(f"| {doing} | {count} | {count} | {most} |")


if __name__ == "__main__":
    main()
