import json

import torch

import frontier
from utils import Buffer, CrossCoder, Trainer


def test_the_frontier_is_made_drawn_and_not_made_twice(tmp_path, capsys):
    argv = [
        "--seeds=2", "--activations=topk,jumprelu", "--out=out", "--num_tokens=5_000", "--batch_size=128",
        "--dict_size=256", "--buffer_mult=16", "--eval_seqs=4"]
    frontier.main(argv)
    first = capsys.readouterr().out
    rows = [json.loads(line) for line in open(tmp_path / "out" / "frontier.jsonl")]
    wanted = []
    for activation in ("topk", "jumprelu"):
        _, values = frontier.SPARSITIES[activation]
        wanted += [(activation, value) for value in values]
    assert [(row["activation"], row["value"]) for row in rows] == 2 * wanted
    assert rows[0]["fvu/all"] > rows[3]["fvu/all"]
    assert all(0 < row["fvu/all"] < 1 <= row["coherence"] <= 4 for row in rows)
    assert all(1 <= row["span"] <= 4 for row in rows)
    assert (tmp_path / "out" / "frontier.html").stat().st_size > 10**5
    frontier.main(argv)
    assert capsys.readouterr().out == first and first.count("\n| topk | k=") == 4
    assert len(open(tmp_path / "out" / "frontier.jsonl").readlines()) == 16


def test_crosscoders_trained_together_are_those_trained_alone(cfg, models, tokens):
    """All see the batches of the first one's buffer."""
    choices = [cfg, {**cfg, "seed": 7}, {**cfg, "activation": "batchtopk", "k": 8, "aux_coeff": 1 / 32}]
    together = frontier.SCRATCH["train_together"](choices, models, tokens)
    for choice, one in zip(choices, together):
        alone = Trainer(choice, models, tokens, Buffer(cfg, models, tokens[: -cfg["eval_seqs"]]))
        for _ in range(alone.total_steps):
            alone.step()
        for name, parameter in alone.crosscoder.named_parameters():
            assert torch.equal(parameter, dict(one.crosscoder.named_parameters())[name]), name
        assert (one.run_dir / f"step_{one.total_steps:07d}").is_dir()


def test_stability_is_the_share_of_latents_that_another_seed_has(cfg, tmp_path):
    first, second = CrossCoder(cfg, 4, 128), CrossCoder({**cfg, "seed": 7}, 4, 128)
    second.W_dec.data[:64] = 2 * first.W_dec.data[:64].flip(0)  # in another order, and longer
    runs = []
    for i, crosscoder in enumerate((first, second)):
        crosscoder.save(tmp_path / f"version_{i}")
        runs.append({"folder": tmp_path / f"version_{i}"})
    assert frontier.get_stability(runs) == 64 / 256
