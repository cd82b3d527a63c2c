"""The hub, both ways: real clients against the hub of hub.py on loopback, with an empty cache each time."""
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from conftest import ROOT
from hub import running_hub
from utils import TINY

SMALL = ("--device=cpu --num_tokens=20000 --batch_size=512 --buffer_mult=8 --dict_size=256 --seq_len=128 --model_batch_size=8 "
         "--eval_seqs=8 --wandb_mode=disabled").split()
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
def hub(texts):
    """With the default model's name for tests/tiny's base, and the default dataset's for its text."""
    with running_hub() as hub:
        hub.add("models/gpt2", {file.name: file.read_bytes() for file in (TINY / "base").iterdir()})
        hub.add("datasets/Skylion007/openwebtext", {"openwebtext.py": b"raise SystemExit", "README.md": b"text"})
        hub.add("datasets/Skylion007/openwebtext", {OPENWEBTEXT: parquet(texts)}, "refs/convert/parquet")
        yield hub


def start(hub, folder, *command, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.Popen([sys.executable, *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf_home"), **environment})


def train(hub, folder, *arguments, **environment):
    process = start(hub, folder, ROOT / "train.py", *arguments, **environment)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def error_line(err):
    """The one line that the user is told."""
    lines = [line for line in re.split("[\r\n]", err) if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_the_default_command_downloads_tokenises_and_trains(hub, tmp_path):
    code, out, err = train(hub, tmp_path, "--l1_coeff=2", *SMALL)
    assert code == 0, err
    assert "models      gpt2\n" in out and re.search(r"\nall +\d\.\d{4} ", out) and "CrossCoder.load(" in out
    (cache,) = (tmp_path / "hf_home" / "crosscoder_tokens").glob("*/rows.bin")
    bos = AutoTokenizer.from_pretrained(TINY / "base").bos_token_id
    assert (np.fromfile(cache, np.uint16).reshape(-1, 128)[:, 0] == bos).all()
    asked = len(hub.log)
    code, out, err = train(hub, tmp_path, "--l1_coeff=2", *SMALL, HF_HUB_OFFLINE="1")  # all is in the cache
    assert code == 0 and len(hub.log) == asked, err


@pytest.mark.parametrize("arguments, key, remedy", [
    (["--model_name=no/where"], "model_name='no/where'", "check it, or log in"),
    (["--model_name=me/gated"], "model_name='me/gated'", "accept its licence on its page and log in"),
    (["--dataset=no/where"], "dataset='no/where'", "no/where"),
    (["--dataset=me/gated"], "dataset='me/gated'", "accept its licence on its page and log in"),
    (["--dataset=Skylion007/openwebtext@nope"], "dataset='Skylion007/openwebtext@nope'", "no such revision"),
])
def test_a_gated_or_unknown_name_gives_one_line_with_the_remedy(hub, tmp_path, texts, arguments, key, remedy):
    for name in ("models/me/gated", "datasets/me/gated"):
        hub.add(name, {"train.parquet": parquet(texts[:10])})
        hub.gated.add(name)
    code, _, err = train(hub, tmp_path, *arguments, *SMALL)
    assert code == 2
    assert error_line(err).startswith(f"error: {key}: cannot be") and remedy in error_line(err)


def test_a_download_that_breaks_off_goes_on(hub, tmp_path):
    hub.cuts = {"model.safetensors": 1, OPENWEBTEXT: 1}
    code, _, err = train(hub, tmp_path, *SMALL)
    assert code == 0 and hub.cuts == {"model.safetensors": 0, OPENWEBTEXT: 0}, err


def test_a_download_that_never_comes_says_so(hub, tmp_path):
    hub.cuts = {"tokenizer.json": 10**6, "model.safetensors": 10**6}
    code, _, err = train(hub, tmp_path, *SMALL)
    assert code == 2 and error_line(err).startswith("error: model_name='gpt2': cannot be opened")


def test_tokenising_goes_on_where_it_was_killed(hub, tmp_path, texts):
    many = [parquet(texts[i % 10 :] * 3) for i in range(6)]  # 50,000 documents
    hub.add("datasets/much/text", {f"data/train-{i:05d}-of-00006.parquet": each for i, each in enumerate(many)})
    arguments = ["--dataset=much/text", *SMALL, "--num_tokens=3_000_000"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    script = ("import sys; sys.path.insert(0, {!r}); from train import *; cfg = make_cfg(**parse_overrides(sys.argv[1:])); "
              "tokens = load_tokens(cfg, load_models(cfg)[0].tokenizer); print(len(tokens)); "
              "tokens.numpy().tofile('tokens.bin')").format(str(ROOT))
    for folder in (killed, whole):
        folder.mkdir()
    process = start(hub, killed, "-c", script, *arguments)
    while not (found := list(killed.glob("hf_home/crosscoder_tokens/*/done.json"))):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = json.loads(found[0].read_text())["rows"]
    with open(found[0].with_name("rows.bin"), "ab") as file:
        file.write(b"half a row")  # as a process can leave it
    for folder in (killed, whole):
        process = start(hub, folder, "-c", script, *arguments)
        out, err = process.communicate()
        assert process.returncode == 0, err
    wanted = (3_000_000 + 512 * 8 + 126) // 127 + 8
    assert 0 < before < wanted == int(out)
    assert (killed / "tokens.bin").read_bytes() == (whole / "tokens.bin").read_bytes()
    # fewer need no dataset, more go on from there
    process = start(hub, whole, "-c", script, "--dataset=much/text", *SMALL, HF_HUB_OFFLINE="1")
    assert process.communicate()[0] == f"{(20_000 + 512 * 8 + 126) // 127 + 8}\n"


def test_a_crosscoder_goes_up_and_comes_down_the_same(hub, tmp_path):
    code, _, err = train(hub, tmp_path, *SMALL)
    assert code == 0, err
    log = tmp_path / "checkpoints" / "version_0" / "metrics.jsonl"
    final = json.loads(log.read_text().splitlines()[-1])
    with open(log, "a") as file:
        file.write('{"step": 40, "loss/to')  # as a process can leave it
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from utils import CrossCoder, push_to_hub
print(push_to_hub("checkpoints/version_0", "somebody/mine"))
one, other = CrossCoder.load("checkpoints/version_0"), CrossCoder.from_hub("somebody/mine", revision="main")
x = torch.randn(5, 4, 128)
assert torch.equal(one(x), other(x)) and torch.equal(one.encode(x), other.encode(x))
for name, revision in (("somebody/else", None), ("somebody/mine", "nope")):
    try:
        CrossCoder.from_hub(name, revision=revision)
    except ValueError as error:
        print(error)
"""
    process = start(hub, tmp_path, "-c", script, HF_TOKEN="hf_token")
    out, err = process.communicate()
    assert process.returncode == 0, err
    address, *errors = out.splitlines()
    assert address.startswith(hub.url)
    assert errors == ["repo_id='somebody/else': no such name; check it, or log in for what is private (hf auth login)",
                      "repo_id='somebody/mine': no such revision"]
    files = hub.repos["models/somebody/mine"]["main"]
    assert sorted(files) == ["README.md", "cfg.json", "crosscoder.safetensors", "manifest.json"]
    card = files["README.md"].decode()
    for said in ("256 latents (relu), 4 sources of width 128", f"| resid_post.2 | {final['fvu/resid_post.2']:.4f} |",
                 f"| all | {final['fvu/all']:.4f} | {final['ce/delta_all']:+.4f} |", f"L0 {final['sparsity/l0']:.1f}",
                 'crosscoder = CrossCoder.from_hub("somebody/mine")', "- num_tokens: 20000", "- l1_coeff: 2.0"):
        assert said in card
    assert str(tmp_path) not in card
