"""What drives a latent, by hand-made weights; and its pages, in a real browser."""
import json
import re
import shutil
import time
from contextlib import suppress

import pytest
import safetensors.numpy
import torch

with suppress(ImportError):  # the tests that need it are skipped without it
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

from conftest import open_models
from planted import functions_of_scratch
from train import get_tokenizer, load_tokens, make_cfg
from utils import CrossCoder, Trainer, get_sources, get_stacked_resids, source_names

SCRATCH = functions_of_scratch()
HOSTILE = '<img src=x onerror="document.title=1"></script><script>document.title=2</script>'


# ---- What drives a latent ------------------------------------------------------------------------
def crosscoder_for(activation, W_enc, **overrides):
    cfg = make_cfg(preset="tiny", activation=activation, dict_size=W_enc.shape[2], enc_dtype="fp32", device="cpu", **overrides)
    crosscoder = CrossCoder(cfg, *W_enc.shape[:2])
    crosscoder.W_enc.data = W_enc
    crosscoder.b_enc.data.zero_()
    return crosscoder


@torch.no_grad()
def test_coherence_is_how_many_sources_drive_a_latent():
    W_enc = torch.zeros(3, 2, 4)
    W_enc[0, 0, 0] = 1  # latent 0 reads source 0 alone
    W_enc[:, 0, 1] = 1  # latent 1 reads all three alike
    W_enc[:2, 1, 2] = 1  # latent 2 reads two; latent 3 is dead
    crosscoder = crosscoder_for("relu", W_enc)
    crosscoder.norm_factor.copy_(torch.tensor([2.0, 2.0, 2.0]))
    x = 2 * torch.randn(20_000, 1, 2, generator=torch.Generator().manual_seed(0)).abs().repeat(1, 3, 1)  # alike at all sources
    drives = SCRATCH["get_drives"](crosscoder, [x[:9000], x[9000:]], x.mean(0))
    coherence = drives.sum(1) / drives.amax(1)
    assert torch.allclose(coherence[:3], torch.tensor([1.0, 3.0, 2.0]), atol=1e-4)
    assert (drives[0, 1:] == 0).all() and (drives[2, 2] == 0) and (drives[3] == 0).all()
    # Source 0 alone, set to its mean m, leaves relu(m): the change is y - m, its RMS the standard deviation.
    y = x[:, 0, 0] / 2
    assert drives[0, 0] == pytest.approx((y.std(correction=0) / y.square().mean().sqrt()).item(), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_drives_are_changes_of_what_encode_gives(activation):
    generator = torch.Generator().manual_seed(1)
    crosscoder = crosscoder_for(activation, torch.randn(3, 5, 40, generator=generator), **({"k": 6} if "topk" in activation else {}))
    crosscoder.b_enc.data = torch.randn(40, generator=generator)
    crosscoder.norm_factor.copy_(torch.tensor([1.0, 2.0, 3.0]))
    crosscoder.mean.copy_(0.3 * torch.randn(3, 5, generator=generator))
    crosscoder.threshold.fill_(0.02)
    x = torch.randn(500, 3, 5, generator=generator) + 1
    drives = SCRATCH["get_drives"](crosscoder, [x], x.mean(0))
    acts = crosscoder.encode(x)
    assert (acts > 0).any(0).sum() > 30
    for source in range(3):
        without = x.clone()
        without[:, source] = x.mean(0)[source]
        change = (acts - crosscoder.encode(without)).square().sum(0).sqrt() / (acts.square().sum(0).sqrt() + 1e-8)
        assert torch.allclose(drives[:, source], change, rtol=1e-3, atol=1e-4)


# ---- Pages ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of a small diff of two models, one of whose tokens is hostile; its crosscoder."""
    folder = tmp_path_factory.mktemp("pages")
    cfg = make_cfg(
        preset="diff-tiny", enc_dtype="fp32", batch_size=64, buffer_mult=16, dict_size=256, model_batch_size=8, eval_seqs=8,
        num_tokens=64 * 200, device="cpu", k=12, n_exclusive=0, layers="1,3", save_dir=str(folder / "checkpoints"))
    models = open_models(cfg)
    tokens = load_tokens(cfg, models)[:80]
    trainer = Trainer(cfg, models, tokens)
    trainer.train()
    scratch = functions_of_scratch()
    tokenizer = get_tokenizer(models)
    decode = tokenizer.decode
    frequent = int(tokens[-8:, 1:].long().flatten().mode().values)
    tokenizer.decode = lambda ids: HOSTILE if ids == [frequent] else decode(ids)
    names = source_names(cfg, 4)
    scratch["write_pages"].__globals__.update(cfg=cfg, tokenizer=tokenizer, sources=get_sources(models, cfg), names=names)
    crosscoder = trainer.crosscoder
    with torch.no_grad():
        scratch["write_pages"](
            crosscoder, models, tokens[-8:], range(0, 256, 2), folder / "pages.html", {"exclusive": torch.arange(256) % 3})
    return folder / "pages.html", crosscoder, (cfg, models, tokens[-8:]), names


def unpack(html, name):
    (text,) = re.findall(f'<script type="text/plain" id="{name}">(.*)</script>', html)
    return SCRATCH["gzip"].decompress(SCRATCH["base64"].b64decode(text)).decode()


@torch.no_grad()
def test_a_page_says_what_is_so(pages):
    path, crosscoder, (cfg, models, tokens), _ = pages
    html = path.read_text()
    rows = json.loads(unpack(html, "rows"))
    assert len(rows) == 256 and [row["values"][0] for row in rows if "#latent" in row["line"]] == [*range(0, 256, 2)]
    latent, _, density, mean, span, coherence, exclusive, _ = max(rows[::2], key=lambda row: row["values"][2])["values"]
    acts = crosscoder.encode(get_stacked_resids(models, tokens, cfg))[..., latent].float()
    acts[:, 0] = 0
    norms = crosscoder.W_dec[latent].norm(dim=-1)
    assert (density, mean) == pytest.approx(((acts[:, 1:] > 0).float().mean().item(), acts[acts > 0].mean().item()), rel=1e-4)
    assert span == pytest.approx((norms.sum() / norms.max()).item(), rel=1e-5) and exclusive == latent % 3
    assert 1 <= coherence <= 4
    shown = unpack(html, f"l{latent}")
    for text in [f"density {density:.3g}, ", *[f"</i> {norm:.3g}" for norm in norms.tolist()], f'<span class="dim">{acts.max():.3g} ']:
        assert text in shown, text
    SCRATCH["get_page"].__globals__.update(cfg=cfg, tokenizer=get_tokenizer(models))
    page = SCRATCH["get_page"](crosscoder, models, tokens, latent, acts)
    examples = page["bands"][0][1]
    assert [example["act"] for example in examples] == sorted((example["act"] for example in examples), reverse=True)
    for title, examples in page["bands"]:
        for example in examples:
            assert example["acts"][example["at"]] == pytest.approx(example["act"], abs=1e-3)
            assert len(example["tokens"]) == len(example["acts"])
    assert sum(page["counts"]) == round(density * 8 * 127)
    assert len(page["promoted"]) == len(page["suppressed"]) == 4 and all(len(words) == 8 for words in page["promoted"])
    near = [int(found) for found in re.findall(r"<div>(?:<a [^>]*>)?(\d+)(?:</a>)? <span", shown)]
    assert len(near) == 16 and latent not in near  # eight by each measure
    unit = torch.nn.functional.normalize(crosscoder.W_dec.flatten(1), dim=1)
    assert near[:8] == (unit @ unit[latent]).topk(9).indices[1:].tolist()


def test_no_text_can_be_markup(pages):
    html = pages[0].read_text()
    assert "onerror" not in html and html.count("<script") == 2 + 128  # the code, the table, the pages
    shown = [unpack(html, f"l{latent}") for latent in range(0, 256, 2)]
    shown += [row["line"] for row in json.loads(unpack(html, "rows"))]
    assert "&lt;img src=x" in shown[0] + shown[-2] and not any("<img" in text or "<script" in text for text in shown)


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("selenium", reason="no selenium: pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with its driver: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def until(condition, within=10):
    start = time.time()
    while not condition():
        assert time.time() < start + within
        time.sleep(0.02)


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_one_goes_from_the_table_to_a_latent_and_on(pages, browser, width):
    run = browser.execute_script
    texts = lambda css: run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css)
    click = lambda css, i=0: run("document.querySelectorAll(arguments[0])[arguments[1]].click()", css, i)
    press = lambda key: ActionChains(browser).send_keys(key).perform()
    browser.set_window_size(width, 1000)
    browser.get("about:blank")
    browser.get(f"file://{pages[0]}")
    until(lambda: texts("td a"))
    assert browser.title == "Latents" and texts("#index h1") == ["256 latents of base, tuned"]
    active = sum(row["values"][2] > 0 for row in json.loads(unpack(pages[0].read_text(), "rows")))
    assert len(texts("circle")) == active > 200 and len(texts("#lines tr")) == 200
    click("#more")
    assert len(texts("#lines tr")) == 256 and run("return document.getElementById('more').hidden")
    order = texts("td a")
    click("td a", 3)
    until(lambda: texts(".example"))
    assert texts("#page h1") == [f"latent {order[3]}"] and texts("#page td:first-child") == pages[3]
    assert run("return document.documentElement.scrollWidth <= innerWidth")
    press(Keys.ARROW_RIGHT)  # in the table's order
    until(lambda: texts("#page h1") == [f"latent {order[4]}"])
    click("#before")
    until(lambda: texts("#page h1") == [f"latent {order[3]}"])
    neighbour = texts(".near a")[0]
    click(".near a")
    until(lambda: texts("#page h1") == [f"latent {neighbour}"])
    press("/")
    until(lambda: not texts("#page h1"))
    run("document.activeElement.blur()")
    press("/")  # also where the table is shown already
    press("onerror")
    until(lambda: len(texts("#lines tr")) < 200)
    assert texts("#lines tr") and all(HOSTILE in text for text in texts("#lines tr"))
    marks = lambda: run("return [...document.querySelectorAll('th')].map(e => e.dataset.mark || '')")
    assert marks()[2] == " ▼"
    click("th", 2)
    assert marks()[2] == " ▲"
    densities = [float(text) for text in texts("#lines td:nth-child(3)")]
    assert densities == sorted(densities)
    first = texts("td a")[0]
    press(Keys.ENTER)  # still in the search
    until(lambda: texts("#page h1") == [f"latent {first}"])
    browser.get("about:blank")
    browser.get(f"file://{pages[0]}#latent=127")
    until(lambda: texts("#page h1"))
    assert "has no page" in texts("#page h1")[0]
    browser.get(f"file://{pages[0]}#latent=128")
    until(lambda: texts("#page h1") == ["latent 128"])
    press("/")
    until(lambda: not texts("#page h1"))
    press("12")
    press(Keys.ENTER)  # the latent of this number, not the first whose tokens have it
    until(lambda: texts("#page h1") == ["latent 12"])
    browser.get("about:blank")
    browser.get(f"file://{pages[0]}")
    until(lambda: texts("td a"))
    run("scrollTo(0, 900)")
    click("td a", 20)
    until(lambda: texts("#page h1"))
    assert run("return scrollY") == 0
    browser.back()
    until(lambda: not texts("#page h1"))
    assert run("return scrollY") == 900 and not texts("#dots:not(:empty) > :not(a)")
    assert browser.title == "Latents"
    assert not browser.get_log("browser")
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [message["params"]["request"]["url"] for message in requests if message["method"] == "Network.requestWillBeSent"]
    assert {url.split("#")[0] for url in urls} <= {f"file://{pages[0]}", "about:blank"}


# ---- Lists and files -----------------------------------------------------------------------------
@torch.no_grad()
def test_what_delphi_reads_is_what_encode_gives(pages, tmp_path):
    _, crosscoder, (cfg, models, tokens), _ = pages
    SCRATCH["write_examples"].__globals__.update(cfg=cfg, tokenizer=get_tokenizer(models))
    latents = [3, 50, 200]
    SCRATCH["write_examples"](crosscoder, models, tokens, latents, tmp_path)
    # As delphi's TensorBuffer and LatentDataset have it: START_END.safetensors, latents counted from START.
    (file,) = (tmp_path / "latents" / "crosscoder").glob("*.safetensors")
    assert file.name == "0_255.safetensors"
    cache = safetensors.numpy.load_file(file)
    acts = crosscoder.encode(get_stacked_resids(models, tokens, cfg)).float()
    acts[:, 0] = 0
    found = torch.zeros_like(acts)
    found[tuple(torch.tensor(cache["locations"].astype("int64")).T)] = torch.tensor(cache["activations"]).float()
    assert torch.allclose(found[..., latents], acts[..., latents], rtol=1e-3) and (cache["tokens"] == tokens.numpy()).all()
    assert len(cache["activations"]) == (acts[..., latents] > 0).sum()
    config = json.loads((file.parent / "config.json").read_text())
    assert config["ctx_len"] == 128 and config["model_name"].endswith("base")
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert [row["latent"] for row in rows] == latents
    for row in rows:
        for example in row["top"] + row["random"]:
            assert example["acts"][example["at"]] == pytest.approx(example["act"], abs=1e-3)


@torch.no_grad()
def test_latents_of_a_text_are_those_that_encode_gives(pages):
    _, crosscoder, (cfg, models, _), _ = pages
    tokenizer = get_tokenizer(models)
    SCRATCH["find_latents"].__globals__.update(
        cfg=cfg, models=models, crosscoder=crosscoder, tokenizer=tokenizer, held_out=torch.tensor([[tokenizer.bos_token_id]]))
    found = SCRATCH["find_latents"]("And God said, Let there be light", n=3)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("And God said, Let there be light", add_special_tokens=False)]])
    acts = crosscoder.encode(get_stacked_resids(models, ids, cfg))[0]
    assert "".join(token for token, _ in found) == "And God said, Let there be light"
    for (_, top), row in zip(found, acts[1:]):
        assert top and all(act == pytest.approx(row[latent].item(), abs=0.006) for latent, act in top)
        scores = row * crosscoder.get_decoder_norms()
        assert scores[top[0][0]] == scores.max()


@torch.no_grad()
def test_a_source_that_is_not_written_to_promotes_nothing(pages):
    _, crosscoder, (cfg, models, _), _ = pages
    SCRATCH["get_words"].__globals__.update(cfg=cfg, tokenizer=get_tokenizer(models))
    vectors = crosscoder.W_dec[0].clone()
    vectors[2] = 0
    for words in SCRATCH["get_words"](vectors, models):
        assert [len(each) for each in words] == [8, 8, 0, 8]
    (promoted, *_), (suppressed, *_) = SCRATCH["get_words"](vectors, models)
    direction = (vectors[0] - vectors[0].mean()) * models[0].ln_final.weight
    logits = direction @ models[0].W_U
    decode = SCRATCH["show_token"]
    assert promoted == [decode(i) for i in logits.topk(8).indices.tolist()]
    assert suppressed == [decode(i) for i in (-logits).topk(8).indices.tolist()]
