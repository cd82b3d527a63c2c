import functools

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from conftest import TINY, open_models
from train import PRESETS, load_models, make_cfg
from utils import get_sources, get_stacked_resids, source_names


def cfg_for(**overrides):
    return make_cfg(preset="tiny", enc_dtype="fp32", device="cpu", **overrides)


@functools.cache
def run_plain(folder, tokens, dtype):
    """All activations as TransformerLens alone gives them, with its eager attention."""
    plain = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=dtype)
    return plain.run_with_cache(tokens[:8].long())[1]


def transformer_lens_activations(folder, tokens, hooks, dtype=torch.float32):
    """The same of these hooks, for the first 8 sequences: [batch, pos, hooks, d]"""
    cache = run_plain(folder, tokens, dtype)
    return torch.stack([cache[hook].flatten(2) for hook in hooks], dim=2)


def fused_parts(model):
    """How many (attentions, normalisations, activation functions) are fused."""
    names = [type(part).__name__ for part in model.original_model.modules() if "forward" in vars(part)]
    return tuple(sum(kind in name for name in names) for kind in ("Attention", "Norm", "GELU"))


@pytest.mark.parametrize("site, layers, fused", [
    ("resid_post", "all", (4, 9, 4)), ("resid_pre", "2,0", (4, 9, 4)), ("mlp_out", "all", (4, 9, 4)), ("post", "2,0", (4, 9, 4)),
    ("resid_mid", "all", (4, 5, 4)), ("resid_mid", "2,0", (4, 7, 4)),  # it is read where it enters ln2
    ("z", "all", (0, 9, 4)), ("z", "2,0", (2, 9, 4)), ("attn_out", "all", (0, 9, 4))])  # a hook has to fire in there
def test_activations_equal_those_of_run_with_cache(tokens, site, layers, fused):
    cfg = cfg_for(site=site, layers=layers)
    models = open_models(cfg)
    wanted = transformer_lens_activations(TINY / "base", tokens, [source.hook for source in get_sources(models, cfg)])
    hooks = [source.hook for source in get_sources(models, cfg)]
    assert [int(hook.split(".")[1]) for hook in hooks] == ([0, 1, 2, 3] if layers == "all" else [2, 0])
    assert fused_parts(models[0]) == fused
    assert relative_error(get_stacked_resids(models, tokens[:3], cfg), wanted[:3]) < 1e-5


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "z"])
def test_bf16_activations_are_as_close_as_those_of_run_with_cache(tokens, site):
    cfg = make_cfg(preset="tiny", enc_dtype="bf16", device="cpu", site=site)
    models = open_models(cfg)
    hooks = [source.hook for source in get_sources(models, cfg)]
    wanted, plain = (transformer_lens_activations(TINY / "base", tokens, hooks, dtype)[:, 1:].float()
                     for dtype in (torch.float32, torch.bfloat16))
    mine = get_stacked_resids(models, tokens[:8], cfg)[:, 1:].float()
    assert 0 < (mine - wanted).norm() < 1.2 * (plain - wanted).norm()


def relative_error(x, wanted):
    """The largest over sources, positions and sequences."""
    assert x.shape == wanted.shape
    return ((x - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()


def test_two_models_stack_one_after_the_other(tokens):
    cfg = cfg_for(model_name=f"{TINY / 'base'},{TINY / 'tuned'}", layers="1,3")
    resids = get_stacked_resids(open_models(cfg), tokens[:2], cfg)
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (1, 3)]
    for m, name in enumerate(("base", "tuned")):
        wanted = transformer_lens_activations(TINY / name, tokens, hooks)
        assert relative_error(resids[:, :, 2 * m : 2 * m + 2], wanted[:2]) < 1e-5
    assert relative_error(resids[:, :, :1], resids[:, :, 2:3]) > 0.1
    assert source_names(cfg, 4) == [f"{m}:resid_post.{l}" for m in ("base", "tuned") for l in (1, 3)]


def test_a_place_inside_attention_needs_models_opened_for_it(models, tokens):
    with pytest.raises(ValueError, match="site='z'.*blocks.0.attn.hook_z.*open the models with this cfg"):
        get_stacked_resids(models, tokens[:1], cfg_for(site="z"))


def test_attention_whose_logits_are_capped_stays_eager(tokens, tmp_path):
    """Gemma 2's, which sdpa cannot compute; the cap is made so low that it matters."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(
        num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, vocab_size=4096, attn_logit_softcapping=0.01, initializer_range=0.2)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(tmp_path)
    cfg = cfg_for(model_name=str(tmp_path))
    models = load_models(cfg)
    wanted = transformer_lens_activations(tmp_path, tokens, [f"blocks.{i}.hook_resid_post" for i in range(2)])[:2]
    attention, norms, _ = fused_parts(models[0])
    assert attention == 0 and norms > 0
    assert torch.allclose(get_stacked_resids(models, tokens[:2], cfg), wanted, rtol=1e-4, atol=1e-4)


def test_a_fused_attention_that_computes_something_else_is_not_used(tokens):
    """The check itself, on a real model whose fused attention is made wrong from outside."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def wrong(module, query, key, value, *args, **kwargs):
        return sdpa_attention_forward(module, query, key, -value, *args, **kwargs)

    cfg = cfg_for()
    wanted = get_stacked_resids(open_models(cfg), tokens[:2], cfg)
    AttentionInterface.register("sdpa", wrong)
    try:
        models = load_models(cfg)
        assert fused_parts(models[0]) == (0, 0, 0)
        assert 0 < relative_error(get_stacked_resids(models, tokens[:2], cfg), wanted) < 1e-5
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)


def test_one_model_twice_is_opened_once_and_named_apart():
    cfg = cfg_for(model_name=f"{TINY / 'base'},{TINY / 'base'}", layers="1")
    first, second = load_models(cfg)
    assert first is second
    assert source_names(cfg, 2) == ["0_base:resid_post.1", "1_base:resid_post.1"]


def test_no_logits_and_no_layer_above_the_last_source_are_computed(tokens):
    cfg = cfg_for(layers="0,1", site="resid_mid")
    models, ran = load_models(cfg), []
    hf = models[0].original_model
    handles = [module.register_forward_hook(lambda *_, name=name: ran.append(name))
               for name, module in [("head", hf.lm_head), *((i, block) for i, block in enumerate(hf.transformer.h))]]
    get_stacked_resids(models, tokens[:1], cfg)
    computed = set(ran)
    for handle in handles:
        handle.remove()
    assert computed <= {0} and "head" not in computed  # block 1 is left in its middle, 2 and 3 are not begun
    assert models[0](tokens[:1].long()).shape == (1, 128, 4096)  # and the model still works whole


def test_center_removes_the_mean_over_d_model(models, tokens):
    raw = get_stacked_resids(models, tokens[:2], cfg_for())
    centred = get_stacked_resids(models, tokens[:2], cfg_for(center=True))
    assert centred.mean(-1).abs().max() < 1e-5 < raw.mean(-1).abs().max()
    assert torch.allclose(centred, raw - raw.mean(-1, keepdim=True))


@pytest.fixture(scope="module")
def other_models(tmp_path_factory):
    """Folders of models that do not go with tests/tiny: other words, another width, no LayerNorm."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    shape = dict(vocab_size=4096, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=64, n_head=2, n_positions=128, **shape)).save_pretrained(folder / "narrow")
    GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=128, n_head=2, n_positions=128, **shape)).save_pretrained(folder / "words")
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2,
                                 max_position_embeddings=128, **shape)).save_pretrained(folder / "llama")
    for name in ("narrow", "llama", "words"):
        tokenizer.add_tokens(["zounds"] * (name == "words"))
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("overrides, said", [
    (dict(layers="1,4"), "the layers are 0 to 3"),
    (dict(site="resid_pots"), "resid_post"),
    (dict(site="mlp_in"), r"^site='mlp_in': no blocks.0.hook_mlp_in here; give resid_post"),
    (dict(site="post3"), r"^site='post3': no blocks.3.mlp.hook_post here"),  # else four times the same source
    (dict(site="result"), "^site='result': no "),
    (dict(site="q_input"), "^site='q_input': no "),
    (dict(site="pattern"), r"\[batch, pos, ...\]"),
    (dict(seq_len=129), "128"),
    (dict(model_name="gpt2-nowhere"), "preset=tiny"),
    (dict(model_name="base,words"), "differ in 1 entries, first 'zounds'"),
    (dict(model_name="base,llama"), "base and .*llama differ in their number; give layer numbers"),
    (dict(model_name="base,llama", layers="1"), "^model_name=.*base and .*llama differ in width"),
    (dict(model_name="narrow,base"), "^model_name=.*narrow and .*base differ in width"),
    (dict(model_name="llama", center=True), "no LayerNorm"),
    (dict(norm="1.5,2,2.5"), r"^norm=\[1.5, 2.0, 2.5\]: give a number above 0 for each of the 4 sources"),
    (dict(norm="1,2,3,0"), "^norm=.*above 0"),
    (dict(norm=[1.0, 2, 3, -2.0]), "^norm=.*above 0"),
    (dict(norm="1,2,3,nan"), "^norm=.*give numbers"),
    (dict(norm="1,2,3,inf"), "^norm=.*give numbers"),
    (dict(layers=[0, -1]), "^layers=.*the layers are 0 to 3"),
    (dict(norm=PRESETS["gpt2-published"]["norm"]), "^norm=.*each of the 4 sources"),
    (dict(norm=[1, 2, 3, 4], layers="0,1,3"), "^norm=.*each of the 3 sources"),
])
def test_sources_that_do_not_exist_or_fit_are_refused(other_models, overrides, said):
    if "," in overrides.get("model_name", "") or overrides.get("model_name") == "llama":
        overrides["model_name"] = ",".join(str((TINY if name == "base" else other_models) / name)
                                           for name in overrides["model_name"].split(","))
    with pytest.raises(ValueError, match=said) as error:
        load_models(cfg_for(**overrides))
    assert "\n" not in str(error.value)


def test_a_llama_is_harvested_too(other_models, tokens):
    cfg = cfg_for(model_name=str(other_models / "llama"))
    models = load_models(cfg)
    wanted = transformer_lens_activations(other_models / "llama", tokens, [f"blocks.{i}.hook_resid_post" for i in range(2)])[:2]
    assert fused_parts(models[0]) == (2, 5, 0)
    assert relative_error(get_stacked_resids(models, tokens[:2], cfg), wanted) < 1e-5
