"""Makes everything in this folder: a tokenizer, two token files and two small GPT-2 models.

    apt-get install bible-kjv wordnet-base        # the two texts, from Debian; see README.md for their licences
    python tests/tiny/make.py --out=tests/tiny    # about 20 minutes on 2 CPU cores

`base` is trained on the King James Bible, `tuned` is `base` fine-tuned on WordNet's definitions. Both texts are
packed into rows of 128 tokens that begin with <|endoftext|>; the last 5% of each file's rows are held out from the
models. Ends by writing losses.json, the numbers in README.md.
"""
import argparse
import glob
import json
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

SEQ_LEN, VOCAB, HELD_OUT, EOT = 128, 4096, 0.05, "<|endoftext|>"


def kjv() -> list[str]:
    """One string a chapter, verse numbers taken off."""
    text = subprocess.run(["bible", "-l100000", "-f", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=True).stdout
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"(\d?\s?\w+?\d+):\d+ (.*)", line):
            chapters.setdefault(match[1], []).append(match[2].strip())
    return [" ".join(verses) for verses in chapters.values()]


def wordnet() -> list[str]:
    """One string an entry: its words, its part of speech, its definition and examples."""
    entries = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in open(f"/usr/share/wordnet/data.{part}"):
            if line.startswith(" "):  # the licence at the head of each file
                continue
            fields, gloss = line.split(" | ")
            fields = fields.split()
            words = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            entries.append(f"{', '.join(words)} ({part}): {gloss.strip()}")
    return entries


def pack(texts: list[str], tokenizer, n_rows: int | None = None) -> np.ndarray:
    """Shuffled texts, joined by <|endoftext|>, as uint16 rows [n_seqs, SEQ_LEN] that each begin with it."""
    order = np.random.default_rng(0).permutation(len(texts))
    eot = tokenizer.convert_tokens_to_ids(EOT)
    stream = [t for i in order for t in tokenizer(texts[i])["input_ids"] + [eot]]
    body = np.array(stream[: len(stream) // (SEQ_LEN - 1) * (SEQ_LEN - 1)], dtype=np.uint16).reshape(-1, SEQ_LEN - 1)
    return np.pad(body, ((0, 0), (1, 0)), constant_values=eot)[:n_rows]


def loss_on(model, rows: np.ndarray) -> float:
    model.eval()
    with torch.inference_mode():
        losses = [model(b, labels=b).loss.item() for b in torch.from_numpy(rows[:512].astype(np.int64)).split(64)]
    return float(np.mean(losses))


def train(model, rows: np.ndarray, epochs: int, lr: float, name: str) -> dict:
    """AdamW, cosine schedule, bf16 autocast. -> losses in nats a token, on 512 rows each"""
    cut = int(len(rows) * (1 - HELD_OUT))
    seen, held = rows[:cut], rows[cut:]
    generator, batch = np.random.default_rng(1), 32
    steps = epochs * (cut // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    start, step = time.time(), 0
    for epoch in range(epochs):
        model.train()
        order = generator.permutation(cut)
        for i in range(cut // batch):
            ids = torch.from_numpy(seen[order[i * batch : (i + 1) * batch]].astype(np.int64))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
        print(f"{name} epoch {epoch + 1}/{epochs} step {step}/{steps} train {loss_on(model, seen):.3f} "
              f"held-out {loss_on(model, held):.3f} {time.time() - start:.0f} s", flush=True)
    counts = np.bincount(seen[:, 1:].ravel(), minlength=VOCAB) + 1
    unigram = -np.log(counts / counts.sum())[held[:, 1:].ravel()].mean()
    return {"train": round(loss_on(model, seen), 3), "held_out": round(loss_on(model, held), 3), "unigram": round(float(unigram), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    texts = {"kjv": kjv(), "wordnet": wordnet()}
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts["kjv"] + texts["wordnet"][::2], vocab_size=VOCAB, special_tokens=[EOT], show_progress=False)
    bpe.save(str(args.out / "tokenizer.json"))
    tokenizer = GPT2TokenizerFast(tokenizer_file=str(args.out / "tokenizer.json"), model_max_length=SEQ_LEN,
                                  bos_token=EOT, eos_token=EOT, unk_token=EOT)
    (args.out / "tokenizer.json").unlink()  # each model's folder has it
    rows = {"kjv": pack(texts["kjv"], tokenizer)}
    rows["wordnet"] = pack(texts["wordnet"], tokenizer, n_rows=len(rows["kjv"]))
    for name, array in rows.items():
        np.save(args.out / f"{name}.npy", array)
        print(f"{name}: {array.shape} tokens {array.size:,}", flush=True)

    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=SEQ_LEN, n_embd=128, n_layer=4, n_head=4,
                                       embd_pdrop=0.1, resid_pdrop=0.1, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    losses = {}
    for name, text, epochs, lr in (("base", "kjv", args.epochs, 2e-3), ("tuned", "wordnet", max(1, args.epochs // 2), 5e-4)):
        cut = int(len(rows[text]) * (1 - HELD_OUT))
        before = {other: round(loss_on(model, rows[other][int(len(rows[other]) * (1 - HELD_OUT)):]), 3) for other in rows}
        losses[name] = {"text": text, "held_out_before": before, **train(model, rows[text], epochs, lr, name)}
        losses[name]["held_out_after"] = {o: round(loss_on(model, rows[o][int(len(rows[o]) * (1 - HELD_OUT)):]), 3) for o in rows}
        model.half().save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
        model.float()
    (args.out / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
    print(json.dumps(losses, indent=1))


if __name__ == "__main__":
    main()
