import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

import train
from conftest import TINY, open_models
from train import get_tokenizer, load_models, load_tokens, make_cfg


@pytest.fixture
def tokenizer(models):
    return get_tokenizer(models)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HF_HOME", str(tmp_path / "hf_home"))


def cfg_for(**overrides):
    return make_cfg(preset="tiny", **overrides)


def test_a_token_file_is_opened_as_it_is_without_being_read(tmp_path, models):
    rows = np.random.default_rng(0).integers(0, 4096, (10, 128))
    np.save(tmp_path / "rows.npy", rows.astype(np.uint16))
    torch.save(torch.from_numpy(rows), tmp_path / "rows.pt")
    for name in ("rows.npy", "rows.pt"):
        tokens = load_tokens(cfg_for(tokens=str(tmp_path / name)), models)
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
    ("bool.npy", np.zeros((2, 128), bool), "bool"),
    ("complex.npy", np.zeros((2, 128), complex), "complex128"),
    ("pickle.npy", np.array([[print]], dtype=object), "npy or .pt"),
    ("list.pt", [1, 2], "npy or .pt"),
])
def test_a_token_file_that_cannot_be_used_is_refused(tmp_path, models, name, rows, said):
    path = tmp_path / name
    if isinstance(rows, str):
        path.write_text(rows)
    elif name.endswith(".npy") and rows is not None:
        np.save(path, rows)
    elif rows is not None:
        torch.save(rows, path)
    with pytest.raises(ValueError, match=said) as error:
        load_tokens(cfg_for(tokens=str(path)), models)
    assert str(error.value).startswith("tokens=") and "\n" not in str(error.value)


def test_a_pipe_is_no_token_file_and_is_not_waited_for(tmp_path, models):
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(ValueError, match="^tokens=.*No such file"):
        load_tokens(cfg_for(tokens=tmp_path / "pipe.npy"), models)


def test_a_share_that_gives_no_sequence_is_refused(models):
    tokens = [f"{TINY / 'kjv.npy'}:1", f"{TINY / 'wordnet.npy'}:1e-9"]
    with pytest.raises(ValueError, match="^tokens=.*a share is too small"):
        load_tokens(cfg_for(tokens=tokens), models)


TEXTS = ["In the beginning God created the heaven and the earth. " * 30, "And God said, Let there be light. " * 30,
         "Jesus wept."]


def write_texts(folder, kind):
    folder.mkdir()
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (folder / f"{i}.txt").write_text(text)
    elif kind == "json":
        (folder / "all.json").write_text(json.dumps([{"text": t} for t in TEXTS]))
    elif kind == "csv":
        (folder / "all.csv").write_text("text\n" + "".join(f'"{t}"\n' for t in TEXTS))
    elif kind == "jsonl":
        (folder / "all.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    else:
        pq.write_table(pa.table({"text": TEXTS}), folder / "all.parquet")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
def test_a_folder_of_text_becomes_rows_of_bos_and_documents_end_to_end(tmp_path, models, tokenizer, kind):
    write_texts(tmp_path / "text", kind)
    tokens = load_tokens(cfg_for(dataset=str(tmp_path / "text"), seq_len=32), models)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (tokens[:, 0] == bos).all()
    stream = [t for text in TEXTS for t in tokenizer(text, add_special_tokens=False)["input_ids"] + [eos]]
    assert tokens[:, 1:].flatten().tolist() == stream[: len(stream) // 31 * 31]
    assert tokens.dtype == torch.uint16


PEOPLE = ["Adam", "Noah", "Abraham", "Moses", "Ruth", "David", "Solomon", "Daniel"]
NAMES = [  # of which a library would leave some out, or take them for other splits
    "train-station.txt", "test.txt", ".b.txt", "__x/a.txt", "training/c.txt", "[0]*?{1}.txt", "a space.txt", "\u00e9\n.txt"]


def test_every_file_is_read_whatever_it_is_called(tmp_path, models, tokenizer, capfd):
    folder = tmp_path / "text"
    for name, person in zip(NAMES, PEOPLE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"And {person} said, Amen. " * 20)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: test.txt\n---\n")
    tokens = load_tokens(cfg_for(dataset=folder, seq_len=16), models)
    text = tokenizer.decode(tokens[:, 1:].flatten().tolist())
    assert [text.count(person) for person in PEOPLE] == [20] * 7 + [text.count(PEOPLE[-1])]
    assert text.count(PEOPLE[-1]) in (18, 19, 20)  # the last row is cut off
    assert f"{folder}: 8 files, 8 documents, {len(tokens)} sequences" in capfd.readouterr().err


def test_a_file_is_a_dataset_and_files_of_two_kinds_or_a_revision_of_a_folder_are_not(tmp_path, models):
    write_texts(tmp_path / "lines", "jsonl")
    write_texts(tmp_path / "texts", "txt")
    folder = load_tokens(cfg_for(dataset=tmp_path / "lines", seq_len=32), models)
    file = load_tokens(cfg_for(dataset=tmp_path / "lines" / "all.jsonl", seq_len=32), models)
    assert torch.equal(file.int(), folder.int())
    shutil.copy(tmp_path / "lines" / "all.jsonl", tmp_path / "texts")
    with pytest.raises(ValueError, match=r"^dataset=.*files of one kind.*\['.jsonl', '.txt'\]"):
        load_tokens(cfg_for(dataset=tmp_path / "texts"), models)
    with pytest.raises(ValueError, match="^dataset=.*a local folder has no revisions"):
        load_tokens(cfg_for(dataset=f"{tmp_path / 'lines'}@main"), models)


def overwrite(file):
    data = bytearray(file.read_bytes())
    data[10:14] = bytes(4)
    file.write_bytes(data)


DAMAGE = {
    "removed": ("rows.bin", lambda file: file.unlink()),
    "cut": ("rows.bin", lambda file: os.truncate(file, 70)),
    "overwritten": ("rows.bin", overwrite),
    "no longer JSON": ("done.json", lambda file: file.write_text("{")),
    "a number": ("done.json", lambda file: file.write_text("5")),
    "without rows": ("done.json", lambda file: file.write_text("{}")),
    "of more rows": ("done.json", lambda file: file.write_text(file.read_text().replace('"rows": ', '"rows": 9'))),
    "of no rows": ("done.json", lambda file: file.write_text(file.read_text().replace('"rows": ', '"rows": -'))),
}


@pytest.mark.parametrize("name, damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_made_anew_and_says_so(tmp_path, models, capfd, monkeypatch, name, damage):
    write_texts(tmp_path / "text", "txt")
    cfg = cfg_for(dataset=tmp_path / "text", seq_len=32)
    wanted = load_tokens(cfg, models).clone()
    (file,) = (tmp_path / "hf_home").rglob(name)
    capfd.readouterr()
    damage(file)
    assert torch.equal(load_tokens(cfg, models).int(), wanted.int())
    assert "is damaged (" in capfd.readouterr().err
    monkeypatch.setattr(train.datasets, "load_dataset", None)  # calling it would fail
    assert torch.equal(load_tokens(cfg, models).int(), wanted.int())


def test_text_that_changes_without_its_time_is_tokenised_anew(tmp_path, models):
    write_texts(tmp_path / "text", "txt")
    cfg = cfg_for(dataset=tmp_path / "text", seq_len=32)
    before = len(load_tokens(cfg, models))
    file = tmp_path / "text" / "2.txt"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_text("He is risen. " * 50)
    os.utime(file, ns=times)
    assert len(load_tokens(cfg, models)) > before


def test_a_tokenizer_with_more_ids_than_the_model_has_is_refused_where_the_text_has_them(tmp_path):
    shutil.copytree(TINY / "base", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["<selah>"])
    tokenizer.save_pretrained(tmp_path / "model")
    models = load_models(cfg_for(model_name=tmp_path / "model"))
    write_texts(tmp_path / "text", "txt")
    assert len(load_tokens(cfg_for(dataset=tmp_path / "text", seq_len=32), models))
    (tmp_path / "text" / "3.txt").write_text("He is risen. <selah> " * 50)
    with pytest.raises(ValueError, match="^dataset=.*ids 0 to 4096 are not all below 4096"):
        load_tokens(cfg_for(dataset=tmp_path / "text", seq_len=32), models)


def test_the_second_run_starts_from_the_cache_and_changed_text_does_not(tmp_path, models, monkeypatch):
    write_texts(tmp_path / "text", "txt")
    cfg = cfg_for(dataset=str(tmp_path / "text"), seq_len=32)
    first = load_tokens(cfg, models).clone()
    with monkeypatch.context() as patch:
        patch.setattr(train.datasets, "load_dataset", None)  # calling it would fail
        assert torch.equal(load_tokens(cfg, models).int(), first.int())
    (tmp_path / "text" / "3.txt").write_text("He is risen. " * 50)
    assert len(load_tokens(cfg, models)) > len(first)


def test_no_more_text_is_tokenised_than_the_run_needs(tmp_path, models):
    write_texts(tmp_path / "text", "txt")
    cfg = cfg_for(dataset=str(tmp_path / "text"), seq_len=32, num_tokens=64, batch_size=32, buffer_mult=2, eval_seqs=1)
    assert load_tokens(cfg, models).shape == (6, 32)  # 64 rows and the buffer's 64 at 31 a sequence, one held out


def test_text_that_cannot_be_used_is_refused_and_leaves_nothing(tmp_path, models):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("Jesus wept.")
    (tmp_path / "keyless").mkdir()
    (tmp_path / "keyless" / "a.jsonl").write_text('{"body": "Jesus wept."}\n')
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "Jesus wept."}]}\n')
    for dataset, said in (("empty", "give files of one kind, .*not none"), ("short", "less text"), ("keyless", "no column text, messages"),
                          ("chat", "none of the models has a chat template"), ("no/where", "preset=tiny")):
        with pytest.raises(ValueError, match=said) as error:
            path = dataset if dataset == "no/where" else str(tmp_path / dataset)
            load_tokens(cfg_for(dataset=path), models)
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


def test_a_chat_template_of_the_users_own_makes_conversations_text(tmp_path, models, monkeypatch):
    tokenizer = models[0].tokenizer
    (tmp_path / "chat").mkdir()
    rows = [[{"role": "user", "content": f"Jesus wept. {i}"}, {"role": "assistant", "content": "Amen."}] for i in range(30)]
    (tmp_path / "chat" / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    cfg = cfg_for(dataset=str(tmp_path / "chat"), seq_len=16)
    texts = {}
    for sign in ("#", "%"):  # of which each has a cache of its own
        template = "{% for m in messages %}" + sign + "{{ m.role }}: {{ m.content }} {% endfor %}"
        monkeypatch.setattr(tokenizer, "chat_template", template)
        tokens = load_tokens(cfg, models)
        texts[sign] = tokenizer.decode(tokens[:, 1:].flatten().tolist())
        assert texts[sign].startswith(f"{sign}user: Jesus wept. 0 {sign}assistant: Amen.")
    assert texts["#"].replace("#", "%")[:400] == texts["%"][:400]
