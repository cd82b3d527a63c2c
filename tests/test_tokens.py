import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import train
from conftest import open_models
from train import TINY, get_tokenizer, load_tokens, make_cfg


@pytest.fixture
def tokenizer(models):
    return get_tokenizer(models)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HF_HOME", str(tmp_path / "hf_home"))


def cfg_for(**overrides):
    return make_cfg(preset="tiny", **overrides)


def test_a_token_file_is_opened_as_it_is_without_being_read(tmp_path, tokenizer):
    rows = np.random.default_rng(0).integers(0, 4096, (10, 128))
    np.save(tmp_path / "rows.npy", rows.astype(np.uint16))
    torch.save(torch.from_numpy(rows), tmp_path / "rows.pt")
    for name in ("rows.npy", "rows.pt"):
        tokens = load_tokens(cfg_for(tokens=str(tmp_path / name)), tokenizer)
        assert tokens[3:5].long().tolist() == rows[3:5].tolist()


@pytest.mark.parametrize("name, rows, said", [
    ("missing.npy", None, "No such file"),
    ("text.txt", "In the beginning", "npy or .pt"),
    ("broken.npy", "not numpy", "npy or .pt"),
    ("broken.pt", "not torch", "npy or .pt"),
    ("empty.npy", np.zeros((0, 128), np.uint16), r"\[0, 128\]"),
    ("flat.npy", np.zeros(1280, np.uint16), r"\[1280\]"),
    ("float.npy", np.zeros((2, 128), np.float32), "float32"),
    ("wide.npy", np.zeros((2, 256), np.uint16), "set seq_len=256"),
    ("alien.npy", np.full((2, 128), 50256, np.uint16), "50256"),
    ("negative.npy", np.full((2, 128), -1), "-1"),
    ("pickle.npy", np.array([[print]], dtype=object), "npy or .pt"),
    ("list.pt", [1, 2], "npy or .pt"),
])
def test_a_token_file_that_cannot_be_used_is_refused(tmp_path, tokenizer, name, rows, said):
    path = tmp_path / name
    if isinstance(rows, str):
        path.write_text(rows)
    elif name.endswith(".npy") and rows is not None:
        np.save(path, rows)
    elif rows is not None:
        torch.save(rows, path)
    with pytest.raises(ValueError, match=said) as error:
        load_tokens(cfg_for(tokens=str(path)), tokenizer)
    assert str(error.value).startswith("tokens=") and "\n" not in str(error.value)


TEXTS = ["In the beginning God created the heaven and the earth. " * 30, "And God said, Let there be light. " * 30,
         "Jesus wept."]


def write_texts(folder, kind):
    folder.mkdir()
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.txt").write_text(text)
    elif kind == "jsonl":
        (folder / "all.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    else:
        pq.write_table(pa.table({"text": TEXTS}), folder / "all.parquet")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_folder_of_text_becomes_rows_of_bos_and_documents_end_to_end(tmp_path, tokenizer, kind):
    write_texts(tmp_path / "text", kind)
    tokens = load_tokens(cfg_for(tokens="", dataset=str(tmp_path / "text"), seq_len=32), tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (tokens[:, 0] == bos).all()
    stream = [t for text in TEXTS for t in tokenizer(text, add_special_tokens=False)["input_ids"] + [eos]]
    assert tokens[:, 1:].flatten().tolist() == stream[: len(stream) // 31 * 31]
    assert tokens.dtype == torch.uint16


def test_the_second_run_starts_from_the_cache_and_changed_text_does_not(tmp_path, tokenizer, monkeypatch):
    write_texts(tmp_path / "text", "txt")
    cfg = cfg_for(tokens="", dataset=str(tmp_path / "text"), seq_len=32)
    first = load_tokens(cfg, tokenizer).clone()
    with monkeypatch.context() as patch:
        patch.setattr(train.datasets, "load_dataset", None)  # calling it would fail
        assert torch.equal(load_tokens(cfg, tokenizer).int(), first.int())
    (tmp_path / "text" / "3.txt").write_text("He is risen. " * 50)
    assert len(load_tokens(cfg, tokenizer)) > len(first)


def test_no_more_text_is_tokenised_than_the_run_needs(tmp_path, tokenizer):
    write_texts(tmp_path / "text", "txt")
    cfg = cfg_for(tokens="", dataset=str(tmp_path / "text"), seq_len=32, num_tokens=64, batch_size=32, buffer_mult=2, eval_seqs=1)
    assert load_tokens(cfg, tokenizer).shape == (6, 32)  # 64 rows and the buffer's 64 at 31 a sequence, one held out


def test_text_that_cannot_be_used_is_refused_and_leaves_nothing(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("Jesus wept.")
    (tmp_path / "keyless").mkdir()
    (tmp_path / "keyless" / "a.jsonl").write_text('{"body": "Jesus wept."}\n')
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "Jesus wept."}]}\n')
    for dataset, said in (("empty", "any data files"), ("short", "less text"), ("keyless", "no column text, messages"),
                          ("chat", "none of the models has a chat template"), ("no/where", "preset=tiny")):
        with pytest.raises(ValueError, match=said) as error:
            path = dataset if dataset == "no/where" else str(tmp_path / dataset)
            load_tokens(cfg_for(tokens="", dataset=path), tokenizer)
        assert str(error.value).startswith("dataset=") and "\n" not in str(error.value)
    assert not any(file.stat().st_size for file in (tmp_path / "hf_home").glob("**/rows.bin"))


def test_the_tokenizer_is_the_first_models_with_the_first_chat_template_of_any(monkeypatch):
    models = open_models(cfg_for(model_name=[TINY / "base", TINY / "tuned"], layers=[2], enc_dtype="fp32", device="cpu"))
    base, tuned = (model.tokenizer for model in models)
    assert get_tokenizer(models).chat_template is None and get_tokenizer(models) is not base
    assert get_tokenizer(models).get_vocab() == base.get_vocab()
    monkeypatch.setattr(tuned, "chat_template", "{{ messages[0].content }}")
    assert get_tokenizer(models).chat_template == tuned.chat_template and base.chat_template is None
    assert get_tokenizer(models[:1]).chat_template is None
    monkeypatch.setattr(base, "chat_template", "{{ messages | length }}")
    assert get_tokenizer(models).chat_template == base.chat_template


def test_a_chat_template_of_the_users_own_makes_conversations_text(tmp_path, models, tokenizer):
    (tmp_path / "chat").mkdir()
    rows = [[{"role": "user", "content": f"Jesus wept. {i}"}, {"role": "assistant", "content": "Amen."}] for i in range(30)]
    (tmp_path / "chat" / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    cfg = cfg_for(tokens="", dataset=str(tmp_path / "chat"), seq_len=16)
    texts = {}
    for sign in ("#", "%"):  # of which each has a cache of its own
        tokenizer.chat_template = "{% for m in messages %}" + sign + "{{ m.role }}: {{ m.content }} {% endfor %}"
        tokens = load_tokens(cfg, tokenizer)
        texts[sign] = tokenizer.decode(tokens[:, 1:].flatten().tolist())
        assert texts[sign].startswith(f"{sign}user: Jesus wept. 0 {sign}assistant: Amen.")
    assert texts["#"].replace("#", "%")[:400] == texts["%"][:400]
    assert models[0].tokenizer.chat_template is None
