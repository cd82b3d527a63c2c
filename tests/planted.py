"""A planted truth for model diffing: two made-up models with known directions, some shared, some of one model only.

  python tests/planted.py                 each of RUNS, three seeds: precision and recall of 'exclusive', before (by
                                          relative norm) and after latent scaling; L0 ± is the largest distance
  python tests/planted.py --n_shared=96   the same with any of make_cfg's keys
A token's activation is the sum of its features' directions in that model, alike in both, plus noise. A feature that both
have can be weak in one of them, which is what a penalty on norms shrinks away there, as if the other alone had it.
"""
import argparse
import ast
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from train import make_cfg
from utils import Trainer, get_stats

D_MODEL = 96
VOCABULARY = 2**15
KINDS = {
    "shared": 96, "weak in the first": 16, "weak in the second": 16, "only in the first": 32, "only in the second": 32}
RUNS = {
    "relu": {"l1_coeff": 2.5}, "batchtopk": {"k": 8}, "relu, l0=8": {"activation": "relu", "l0": 8},
    "jumprelu, l0=8": {"activation": "jumprelu", "l0": 8}}


def functions_of_scratch() -> dict:
    """The functions of scratch.py's cells and the text that they use, without running the cells."""
    tree = ast.parse((ROOT / "scratch.py").read_text())
    kept = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.Import, ast.ImportFrom))
            or isinstance(node, ast.Assign) and isinstance(getattr(node.value, "value", None), str)]
    names: dict = {}
    exec(compile(ast.Module(kept, []), "scratch.py", "exec"), names)
    return names


class PlantedModel:
    """As much of a language model as the buffer needs: one hook, whose activation depends on the token."""

    def __init__(self, activations):
        self.activations = activations  # [VOCABULARY, D_MODEL]
        self.cfg = SimpleNamespace(n_layers=1, d_model=D_MODEL, device="cpu")
        self.hook_dict = {"blocks.0.hook_resid_post": None}

    def run_with_hooks(self, tokens, return_type, fwd_hooks):
        for _, function in fwd_hooks:
            function(self.activations[tokens], hook=None)


def plant(seed: int) -> tuple[list, torch.Tensor, np.ndarray]:
    """-> the two models; directions [model, feature, D_MODEL], unit or 0 where it has none; each feature's kind"""
    generator = torch.Generator().manual_seed(seed)
    kinds = np.repeat([*KINDS], [*KINDS.values()])
    directions = torch.randn(len(kinds), D_MODEL, generator=generator) + 0.3 * torch.randn(
        2, len(kinds), D_MODEL, generator=generator)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    scales = torch.ones(2, len(kinds))
    for m, (this, other) in enumerate((("first", "second"), ("second", "first"))):
        scales[m, kinds == f"weak in the {this}"] = 0.3
        scales[m, kinds == f"only in the {other}"] = 0
    active = torch.rand(VOCABULARY, len(kinds), generator=generator) < 0.04
    features = active * (1 + 0.25 * torch.randn(active.shape, generator=generator)).clamp(min=0.25)
    noise = 0.02 * torch.randn(2, VOCABULARY, D_MODEL, generator=generator)
    activations = torch.einsum("vf,mfd->mvd", features, directions * scales[..., None]) + noise
    return [PlantedModel(each) for each in activations], directions * (scales[..., None] > 0), kinds


def score(called, second, W_dec, directions, kinds) -> tuple[float, float]:
    """Precision: of the latents called exclusive, the share whose decoder vector has a cosine above 0.7 with a direction
    that only their model has. Recall: the share of such directions that one of them has found."""
    found = set()
    right = 0
    for latent in called.nonzero().flatten().tolist():
        m = int(second[latent])
        cosines = torch.nn.functional.cosine_similarity(W_dec[latent, m], directions[m], dim=-1)
        feature = int(cosines.argmax())
        if cosines[feature] > 0.7 and kinds[feature] == f"only in the {('first', 'second')[m]}":
            found.add(feature)
            right += 1
    return right / max(1, int(called.sum())), len(found) / sum(kind.startswith("only") for kind in kinds)


def run(name: str, seed: int, get_exclusive, **overrides) -> dict:
    """Trains on a planted pair. -> precision and recall before and after latent scaling, and what was called"""
    models, directions, kinds = plant(seed)
    tokens = torch.randint(VOCABULARY, (8000, 128), generator=torch.Generator().manual_seed(seed))
    cfg = make_cfg(**{
        "preset": "diff-tiny", "activation": name, "n_exclusive": 0, "layers": "all", "dict_size": 512, "seed": seed,
        "device": "cpu", "enc_dtype": "fp32", "save_dir": tempfile.mkdtemp(), **RUNS[name], **overrides})
    trainer = Trainer(cfg, models, tokens)
    for _ in range(trainer.total_steps):
        trainer.step()
    crosscoder = trainer.crosscoder
    crosscoder.fit_threshold(trainer.buffer.peek())
    with torch.no_grad():
        stats = get_stats(crosscoder, models, trainer.eval_tokens, cfg)
        table = get_exclusive(crosscoder, models, trainer.eval_tokens, cfg)
        calls = [table["candidate"], table["exclusive"]]
        scores = [score(called, table["second"], crosscoder.W_dec, directions, kinds) for called in calls]
    return {"L0": stats["l0"].item(), "FVU": stats["fvu_all"].item(), "scores": scores,
            "called": [int(called.sum()) for called in calls]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    args, others = parser.parse_known_args()
    overrides = dict(argument.removeprefix("--").split("=", 1) for argument in others)
    get_exclusive = functions_of_scratch()["get_exclusive"]
    print("| run | L0 | FVU | called by relative norm | precision | recall | after latent scaling | precision | recall |")
    print("|" + "---|" * 9)
    for name in RUNS:
        results = [run(name, seed, get_exclusive, **overrides) for seed in range(args.seeds)]
        l0s = np.array([each["L0"] for each in results])
        cells = [f"{l0s.mean():.2f} ± {abs(l0s - l0s.mean()).max():.2f}", f"{np.mean([each['FVU'] for each in results]):.3f}"]
        for i in range(2):
            cells.append(f"{np.mean([each['called'][i] for each in results]):.0f}")
            cells += [f"{np.mean([each['scores'][i][j] for each in results]):.2f}" for j in range(2)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
