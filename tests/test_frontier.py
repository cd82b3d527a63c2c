import json

import frontier


def test_the_frontier_is_made_drawn_and_not_made_twice(tmp_path, capsys):
    argv = [
        "--seeds=1", "--activations=topk,jumprelu", "--out=out", "--num_tokens=5_000", "--batch_size=128",
        "--dict_size=256", "--buffer_mult=16", "--eval_seqs=4"]
    frontier.main(argv)
    first = capsys.readouterr().out
    rows = [json.loads(line) for line in open(tmp_path / "out" / "frontier.jsonl")]
    wanted = []
    for activation in ("topk", "jumprelu"):
        _, values = frontier.SPARSITIES[activation]
        wanted += [(activation, value) for value in values]
    assert [(row["activation"], row["value"]) for row in rows] == wanted
    assert rows[0]["fvu/all"] > rows[3]["fvu/all"]
    assert all(row["fvu/all"] < row["fvu_at_step_0"] for row in rows)
    assert all(1 <= row["span"] <= 4 for row in rows)
    assert (tmp_path / "out" / "frontier.html").stat().st_size > 10**5
    frontier.main(argv)
    assert capsys.readouterr().out == first and first.count("\n| topk | k=") == 4
    assert len(open(tmp_path / "out" / "frontier.jsonl").readlines()) == 8
