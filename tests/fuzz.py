"""Random command lines and notebook calls, made of the table of keys: whatever is given, a run trains to its end, or ends
in one line and exit code 2 and leaves nothing behind; or in exit code 1, where a learning rate is absurd.

  python tests/test_faults.py --fuzz=300 --seed=0
"""
import contextlib
import json
import math
import random
import re
import signal
import tempfile
import time
from collections import Counter
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import torch

from conftest import TINY, Run
import train  # once conftest has said where it is
from train import CHOICES, KEYS, default_cfg, make_cfg

SMALL = [
    "--preset=tiny", "--num_tokens=2048", "--batch_size=64", "--buffer_mult=4", "--dict_size=64", "--eval_seqs=2",
    "--model_batch_size=4", "--device=cpu", "--save_dir=runs"]
TEXT = ["", " ", ",", "x", "x" * 300, "a\nb", "\u00e9\u20ac", "..", "~/x", "/dev/null", "/proc/x", "-", "--", "=", "%s", "{0}", "'\""]
NUMBERS = ["0", "1", "2", "3", "7", "64", "100", "0.5", "1e3", "1e-3", "0.999", "1_000", " 5 ", "1e6", str(2**53 - 1)]
NO_NUMBERS = [
    "-1", "1.5", "1e19", str(2**53), "9" * 400, "nan", "-inf", "1e999", "1e-999", "0x10", "\u0661", "\u00b2", "True", *TEXT]
LISTS = {
    "layers": ["all", "0", "0,1", "3,3", "-1", "99", "1.5", "0,,1"],
    "norm": ["1,1,1,1", "1,2", "0,0,0,0", "-1,1,1,1", "nan,1,1,1", "inf,1,1,1", "1e-30,1,1,1"],
    "fingerprint": ["1", "1,2,3,4,5,6,7,8", "nan,1,1,1,1,1,1,1"],
    "model_name": [
        str(TINY / "base"), f"{TINY / 'base'},{TINY / 'tuned'}", f"{TINY / 'base'},{TINY / 'base'}", str(TINY), "no/where", "a/b/c"],
    "tokens": [
        f"{TINY / 'kjv.npy'}:1,{TINY / 'wordnet.npy'}:2", f"{TINY / 'kjv.npy'}:0,a:1", str(TINY / "wordnet.npy"), "ids.npy",
        str(TINY), f"{TINY / 'kjv.npy'}:1"],
    "dataset": [str(TINY / "base"), "text", "text/a.txt", "text/a.txt@main", "no/where", "no/where@main", "text:1,text:2"],
}
PLACES = {"resume": ["latest", "runs", "runs/version_0", "/"], "site": ["mlp_out", "z", "resid_mid", "pattern", "hook_embed", "mlp_in"]}
OBJECTS = [
    None, True, 0, -1, 3, 2**70, 1.5, math.nan, math.inf, 1 + 2j, Decimal("3"), b"3", [], [[1]], [None], (1, 2), {1}, {"a": 1}, range(3),
    object(), len, Path("x"), np.int64(3), np.float32(2), np.arange(2), np.zeros((2, 2)), torch.ones(2), torch.tensor(3), (n for n in "ab")]


def choose(key: str, chance: random.Random) -> str:
    """What a key is given on a command line: mostly something that could be right."""
    likely = NUMBERS
    odd = NO_NUMBERS
    if key in LISTS or key in CHOICES or isinstance(default_cfg[key], str):
        likely = LISTS.get(key) or CHOICES.get(key) or PLACES.get(key, ["cpu", "cuda:9", "auto"])
        odd = TEXT
    return chance.choice(odd if chance.random() < 0.15 else likely)


def make_line(chance: random.Random) -> list[str]:
    """Up to four keys, of which one may be misspelt."""
    keys = chance.sample(sorted(KEYS.keys() - {"save_dir"}), chance.randint(1, 4))
    line = [f"--{key}={choose(key, chance)}" for key in keys]
    if chance.random() < 0.05:
        line.append(chance.choice(["--seeed=1", "seed=1", "--seed", "-seed=1", "--=", "--seed=", "--loss_weights=1"]))
    return line


def tree(folder: Path) -> list[Path]:
    """All that lies in it, but for what the harness has put there."""
    return sorted(path for path in folder.rglob("*") if path.name not in ("out.txt", "err.txt"))


def train_in(folder: Path, argv: list[str]) -> int:
    """train.main, called in a folder."""
    with contextlib.chdir(folder):
        return train.main(argv)


def try_line(line: list[str]) -> int:
    """Runs train.py on it in a folder of its own. -> the exit code. AssertionError for any other end than the promised."""
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):
        folder = Path(home, "folder")
        (folder / "text").mkdir(parents=True)
        (folder / "text" / "a.txt").write_text("In the beginning God created the heaven and the earth. " * 800)
        np.save(folder / "ids.npy", np.zeros((3, 128), np.uint16))
        before = tree(folder)
        run = Run(
            [*SMALL, *line], folder / "out.txt", folder / "err.txt", {"HOME": home}, threads=1, function=partial(train_in, folder))
        start = time.time()
        for seconds in (12, 18):
            run.join(seconds)
            if run.exitcode is None:  # a run, or an evaluation, as long as was asked for
                run.send_signal(signal.SIGTERM)
        run.join(5)
        assert run.exitcode is not None, f"{line}: still at work"
        code = run.exitcode
        out = (folder / "out.txt").read_text()
        err = (folder / "err.txt").read_text(errors="replace")
        errors = [part for part in re.split("[\r\n]", err) if part.startswith("error: ")]
        told = f"{line}: exit code {code} after {time.time() - start:.0f} s, {err[-1500:]}"
        assert "Traceback" not in err and code in (0, 1, 2, 143, -signal.SIGTERM), told
        if code == 2:
            assert len(errors) == 1 and re.split("[\r\n]", err.strip())[-1] == errors[0], told
            assert tree(folder) == before, f"{told}; left {set(tree(folder)) - set(before)}"
        elif code == 1:
            assert len(errors) == 1 and "not finite" in errors[0], told
        elif code == 0:
            assert not errors and "load it with: " in out, told
    return code


def try_call(chance: random.Random) -> str:
    """make_cfg as a notebook may call it. -> what it did, "taken" or "refused"; any other error is raised."""
    keys = chance.sample(sorted(KEYS.keys() - {"resume"}), chance.randint(1, 3))
    overrides = {key: chance.choice(OBJECTS) for key in keys}
    try:
        cfg = make_cfg(**{"device": "cpu", **overrides})
    except ValueError as error:
        assert len(str(error).splitlines()) == 1, f"{overrides}: {error}"
        return "refused"
    assert json.loads(json.dumps(cfg)) == cfg == make_cfg(**cfg), overrides
    return "taken"


def fuzz(n_lines: int, n_calls: int, seed: int) -> Counter:
    """-> how many ended how"""
    chance = random.Random(seed)
    ends = Counter(f"call {try_call(chance)}" for _ in range(n_calls))
    for _ in range(n_lines):
        line = make_line(chance)
        ends[f"exit code {try_line(line)}"] += 1
    return ends
