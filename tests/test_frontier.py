import json
import subprocess
import sys

from conftest import ROOT
from frontier import SPARSITIES


def test_the_frontier_is_made_drawn_and_not_made_twice(tmp_path):
    command = [sys.executable, ROOT / "tests" / "frontier.py", "--seeds=1", "--activations=topk,jumprelu", "--out=out",
               "--num_tokens=20_000", "--dict_size=256", "--buffer_mult=16", "--eval_seqs=8"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    rows = [json.loads(line) for line in open(tmp_path / "out" / "frontier.jsonl")]
    assert [(row["activation"], row["value"]) for row in rows] == [
        (activation, value) for activation in ("topk", "jumprelu") for value in SPARSITIES[activation][1]]
    assert rows[0]["fvu/all"] > rows[3]["fvu/all"] and all(row["fvu/all"] < row["fvu_at_step_0"] for row in rows)
    assert all(1 <= row["span"] <= 4 for row in rows)
    assert (tmp_path / "out" / "frontier.html").stat().st_size > 10**5
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout == first.stdout and first.stdout.count("\n| topk | k=") == 4
    assert len(open(tmp_path / "out" / "frontier.jsonl").readlines()) == 8
