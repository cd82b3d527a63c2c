"""Would the tests notice? Changes one thing at a time in a section of utils.py, and runs the fast tests of that part.

  python tests/mutate.py --n=150 --seed=0     prints every change that no test noticed, and the share that was noticed

What is changed: an arithmetic operator, a comparison, a number, or a statement is dropped.
"""
import argparse
import ast
import multiprocessing
import os
import queue
import random
import re
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets  # noqa: F401 - what takes long to import, once for all
import plotly.express  # noqa: F401
import pytest
import torch
import transformer_lens.model_bridge  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
import wandb  # noqa: F401

ROOT = Path(__file__).parent.parent
PARTS = {  # the section's title -> its fast tests
    "CrossCoder": ["test_sparsity.py", "test_crosscoder.py", "test_diff.py", "test_evaluation.py",
                   "--deselect=tests/test_crosscoder.py::test_a_planted_dictionary_is_recovered_in_bf16_as_in_fp32"],
    "Buffer": ["test_buffer.py"],
    "Evaluation": ["test_evaluation.py"],
    "Trainer": ["test_trainer.py", "test_sparsity.py", "test_diff.py", "-k=not tiny_run and not wandb_that and not wandb_offline"],
}
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.USub: ast.UAdd}


def get_sections(source: str) -> dict[str, range]:
    """Title -> its lines."""
    starts = [(match[1], source[: match.start()].count("\n") + 1) for match in re.finditer(r"^# ---- (\w+) -", source, re.M)]
    ends = [line for _, line in starts[1:]] + [source.count("\n") + 1]
    return {title: range(line, end) for (title, line), end in zip(starts, ends)}


def mutants(source: str, lines: range) -> list[tuple[int, str, str]]:
    """-> (line, what was changed, the whole source with it)"""
    lengths = [len(line.encode()) for line in source.splitlines(True)]
    nodes = list(ast.walk(ast.parse(source)))
    in_text = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}  # has no place
    found = []
    for i, node in enumerate(nodes):
        if getattr(node, "lineno", 0) not in lines or id(node) in in_text:
            continue
        for change in changes(node):
            same = list(ast.walk(ast.parse(source)))[i]
            old = ast.get_source_segment(source, node)
            new = change(same)
            start = sum(lengths[: node.lineno - 1]) + node.col_offset
            whole = source.encode()
            whole = whole[:start] + new.encode() + whole[start + len(old.encode()) :]
            found.append((node.lineno, f"{old}  ->  {new}", whole.decode()))
    return found


def changes(node: ast.AST) -> list:
    """Functions that each give the text of a copy of this node, changed in one way."""

    def other_operator(same):
        if isinstance(same, ast.Compare):
            same.ops[0] = OPERATORS[type(same.ops[0])]()
        else:
            same.op = OPERATORS[type(same.op)]()
        return ast.unparse(same)

    operator = getattr(node, "op", None) or getattr(node, "ops", [None])[0]
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    kinds = []
    if type(operator) in OPERATORS:
        kinds.append(other_operator)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        kinds.append(lambda same: str(same.value + 1))
    if isinstance(node, ast.AugAssign) or is_call:
        kinds.append(lambda same: "pass")
    return kinds


def run_tests(part: str, folder: Path) -> None:
    """In a process of its own, which has imported all but our modules."""
    os.setpgrp()
    os.chdir(folder)
    torch.set_num_threads(1)
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests")]
    tests = [f"tests/{test}" if test.startswith("test_") else test for test in PARTS[part]]
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


def is_noticed(mutant: tuple, folders: queue.Queue) -> bool:
    """Whether a test of the part fails where utils.py is this. A loop without an end is noticed as well."""
    part, _, _, source = mutant
    folder = folders.get()
    (folder / "utils.py").write_text(source)
    run = multiprocessing.get_context("fork").Process(target=run_tests, args=(part, folder))
    run.start()
    run.join(300)
    if run.is_alive():
        os.killpg(run.pid, signal.SIGKILL)
        run.join()
    folders.put(folder)
    return run.exitcode != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=PARTS)
    args = parser.parse_args()
    source = (ROOT / "utils.py").read_text()
    sections = get_sections(source)
    pool = []
    for part in [args.part] if args.part else PARTS:
        pool += [(part, *mutant) for mutant in mutants(source, sections[part])]
    chosen = random.Random(args.seed).sample(pool, min(args.n, len(pool)))
    folders = queue.Queue()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as threads:
        for name in ("one", "other"):
            folder = Path(temporary, name)
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "checkpoints", "__pycache__"))
            folders.put(folder)
        for part in PARTS:
            assert not is_noticed((part, 0, "", source), folders), f"{part}: its tests fail as it is"
        noticed = []
        for mutant, is_seen in zip(chosen, threads.map(lambda mutant: is_noticed(mutant, folders), chosen)):
            part, line, what, _ = mutant
            noticed.append(is_seen)
            if not is_seen:
                print(f"not noticed: {part}, line {line}: {what}", flush=True)
    print(f"{len(pool)} changes are possible\n| part | tried | noticed |\n|---|---|---|")
    for part in PARTS:
        seen = [is_seen for is_seen, mutant in zip(noticed, chosen) if mutant[0] == part]
        print(f"| {part} | {len(seen)} | {sum(seen)} |")


if __name__ == "__main__":
    main()
