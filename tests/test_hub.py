"""The hub, both ways: real clients against the hub of hub.py on loopback, with an empty cache each time."""
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

import train
from conftest import ROOT, Run, TINY, start_parent
from planted import functions_of_scratch
from train import load_models, load_tokens, make_cfg, parse_overrides
from utils import CrossCoder

SMALL = [
    "--device=cpu", "--num_tokens=20000", "--batch_size=512", "--buffer_mult=8", "--dict_size=256",
    "--seq_len=128", "--model_batch_size=8", "--eval_seqs=8", "--wandb_mode=disabled"]
WANTED = (20_000 + 512 * 8 + 126) // 127 + 8  # sequences
OPENWEBTEXT = "plain_text/partial-train/0000.parquet"


def parquet(texts):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def texts():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    return [tokenizer.decode(row[1:]) for row in np.load(TINY / "kjv.npy")[:3000].astype(int)]


@pytest.fixture
def home():
    """HF_HOME of every Run, emptied."""
    _, home = start_parent()
    clear(home)
    return home


@pytest.fixture
def hub(home, texts):
    """With the default model's name for tests/tiny's base, and the default dataset's for its text."""
    hub, _ = start_parent()
    hub.clear()
    hub.add("models/gpt2", {file.name: file.read_bytes() for file in (TINY / "base").iterdir()})
    hub.add("datasets/Skylion007/openwebtext", {"openwebtext.py": b"raise SystemExit", "README.md": b"text"})
    hub.add("datasets/Skylion007/openwebtext", {OPENWEBTEXT: parquet(texts)}, "refs/convert/parquet")
    return hub


def clear(home):
    for path in home.iterdir():
        shutil.rmtree(path)


def run(argv, function=train.main, env={}):
    """Calls function(argv) in a process of its own. -> exit code, stdout, stderr"""
    process = Run(argv, "out.txt", "err.txt", env, function=function)
    code = process.wait(600)
    return code, Path("out.txt").read_text(), Path("err.txt").read_text()


def error_line(err):
    """The one line that the user is told."""
    lines = [line for line in re.split("[\r\n]", err) if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_the_default_command_downloads_tokenises_and_trains(hub, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home")}
    command = [sys.executable, ROOT / "train.py", "--l1_coeff=2", *SMALL]
    first = subprocess.run(command, env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "models      gpt2\n" in first.stdout and re.search(r"\nall +\d\.\d{4} ", first.stdout)
    assert "CrossCoder.load(" in first.stdout
    (cache,) = (tmp_path / "hf_home" / "crosscoder_tokens").glob("*/rows.bin")
    bos = AutoTokenizer.from_pretrained(TINY / "base").bos_token_id
    assert (np.fromfile(cache, np.uint16).reshape(-1, 128)[:, 0] == bos).all()
    asked = len(hub.log)
    again = subprocess.run(command, env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert again.returncode == 0 and len(hub.log) == asked, again.stderr  # all is in the cache


NAMES = {  # argument -> what the line says
    "--model_name=no/where": ("model_name='no/where'", "check it, or log in"),
    "--model_name=me/gated": ("model_name='me/gated'", "accept its licence on its page and log in"),
    "--dataset=no/where": ("dataset='no/where'", "no/where"),
    "--dataset=me/gated": ("dataset='me/gated'", "accept its licence on its page and log in"),
    "--dataset=Skylion007/openwebtext@nope": ("dataset='Skylion007/openwebtext@nope'", "no such revision"),
}


def train_on_each(arguments):
    for argument in arguments:
        code = train.main([argument, *SMALL])
        print(f"exit code {code}", file=sys.stderr)


def test_a_gated_or_unknown_name_gives_one_line_with_the_remedy(hub, texts):
    for name in ("models/me/gated", "datasets/me/gated"):
        hub.add(name, {"train.parquet": parquet(texts[:10])})
        hub.gated.add(name)
    _, _, err = run(NAMES, train_on_each)
    *errs, last = err.split("exit code 2\n")
    assert len(errs) == len(NAMES) and last == "", err
    for err, (key, remedy) in zip(errs, NAMES.values()):
        assert error_line(err).startswith(f"error: {key}: cannot be") and remedy in error_line(err)


def test_a_download_that_breaks_off_goes_on(hub):
    hub.cuts = {"model.safetensors": 1, OPENWEBTEXT: 1}
    code, _, err = run(SMALL)
    assert code == 0 and hub.cuts == {"model.safetensors": 0, OPENWEBTEXT: 0}, err


def test_a_download_that_never_comes_says_so(hub):
    hub.cuts = {"tokenizer.json": 10**6, "model.safetensors": 10**6}
    code, _, err = run(SMALL)
    line = "error: model_name='gpt2': cannot be opened: no weights there, or they did not arrive; check the name, or try again"
    assert code == 2 and error_line(err) == line
    said = [line for line in re.split("[\r\n]", err) if line.strip() and "%|" not in line and "it/s" not in line]
    assert len(said) <= 2, said  # the hub client's tries are not one line each


def tokenise(argv):
    """What train.py does before it trains."""
    cfg = make_cfg(**parse_overrides(argv))
    tokens = load_tokens(cfg, load_models(cfg))
    np.save("tokens.npy", tokens.numpy())


def test_tokenising_goes_on_where_it_was_killed(hub, home, texts):
    files = [parquet(texts[i : i + 1000]) for i in range(6)]  # 6,000 documents
    files = {f"data/train-{i:05d}-of-00006.parquet": file for i, file in enumerate(files)}
    hub.add("datasets/much/text", files)
    argv = ["--dataset=much/text", *SMALL, "--num_tokens=500_000"]
    process = Run(argv, err="err.txt", function=tokenise)
    found = []
    while not found:
        found = list(home.glob("crosscoder_tokens/*/done.json"))
        assert process.poll() is None, Path("err.txt").read_text()
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = json.loads(found[0].read_text())["rows"]
    with open(found[0].with_name("rows.bin"), "ab") as file:
        file.write(b"half a row")  # as a process can leave it
    results = []
    for _ in range(2):
        code, _, err = run(argv, tokenise)
        assert code == 0, err
        results.append(np.load("tokens.npy"))
        if len(results) == 1:
            clear(home)
    resumed, whole = results
    assert 0 < before < len(whole) == (500_000 + 512 * 8 + 126) // 127 + 8
    assert (resumed == whole).all() and resumed.shape == whole.shape
    # fewer need no dataset, more go on from there
    asked = len(hub.log)
    code, _, err = run(["--dataset=much/text", *SMALL], tokenise)
    assert code == 0, err
    assert (np.load("tokens.npy") == whole[:WANTED]).all()
    assert not [path for _, path, _ in hub.log[asked:] if "much/text" in path]


def push_and_pull(argv):
    """Prints the address, and what is said where there is nothing."""
    scratch = functions_of_scratch()
    print(scratch["push_to_hub"]("checkpoints/version_0", "somebody/mine"))
    one = CrossCoder.load("checkpoints/version_0")
    other = scratch["from_hub"]("somebody/mine", revision="main")
    x = torch.randn(5, 4, 128)
    assert torch.equal(one(x), other(x)) and torch.equal(one.encode(x), other.encode(x))
    for name, revision in (("somebody/else", None), ("somebody/mine", "nope")):
        try:
            scratch["from_hub"](name, revision=revision)
        except ValueError as error:
            print(error)


def test_a_crosscoder_goes_up_and_comes_down_the_same(hub, tmp_path):
    code, _, err = run(SMALL)
    assert code == 0, err
    log = tmp_path / "checkpoints" / "version_0" / "metrics.jsonl"
    final = json.loads(log.read_text().splitlines()[-1])
    with open(log, "a") as file:
        file.write('{"step": 40, "loss/to')  # as a process can leave it
    code, out, err = run([], push_and_pull, {"HF_TOKEN": "hf_token"})
    assert code == 0, err
    address, *errors = out.splitlines()
    assert address.startswith(hub.url)
    assert errors == [
        "repo_id='somebody/else': no such name; check it, or log in for what is private (hf auth login)",
        "repo_id='somebody/mine': no such revision"]
    files = hub.repos["models/somebody/mine"]["main"]
    assert sorted(files) == ["README.md", "cfg.json", "crosscoder.safetensors", "manifest.json"]
    card = files["README.md"].decode()
    for said in (
        "256 latents (relu), 4 sources of width 128", f"| resid_post.2 | {final['fvu/resid_post.2']:.4f} |",
        f"| all | {final['fvu/all']:.4f} | {final['ce/delta_all']:+.4f} |", f"L0 {final['sparsity/l0']:.1f}",
        'crosscoder = CrossCoder.load(snapshot_download("somebody/mine"))', "- num_tokens: 20000",
        "- l1_coeff: 2.0"):
        assert said in card, said
    assert str(tmp_path) not in card
