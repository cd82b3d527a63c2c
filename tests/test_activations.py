import pytest
import torch

from utils import TINY, get_sources, get_stacked_resids, load_models, make_cfg, source_names


def cfg_for(**overrides):
    return make_cfg(preset="tiny", enc_dtype="fp32", device="cpu", **overrides)


@pytest.mark.parametrize("site", ["resid_post", "resid_pre", "resid_mid", "mlp_out", "attn_out", "post", "z"])
@pytest.mark.parametrize("layers", ["all", "2,0"])
def test_activations_equal_those_of_run_with_cache(models, tokens, site, layers):
    cfg, batch = cfg_for(site=site, layers=layers), tokens[:3].long()
    _, cache = models[0].run_with_cache(batch)
    wanted = torch.stack([cache[source.hook].flatten(2) for source in get_sources(models, cfg)], dim=2)
    assert [s.layer for s in get_sources(models, cfg)] == ([0, 1, 2, 3] if layers == "all" else [2, 0])
    assert torch.equal(get_stacked_resids(models, batch, cfg), wanted)


def test_two_models_stack_one_after_the_other(tokens):
    cfg = cfg_for(model_name=f"{TINY / 'base'},{TINY / 'tuned'}", layers="1,3")
    models, batch = load_models(cfg), tokens[:2].long()
    resids = get_stacked_resids(models, batch, cfg)
    for m, model in enumerate(models):
        _, cache = model.run_with_cache(batch)
        for i, layer in enumerate((1, 3)):
            assert torch.equal(resids[:, :, 2 * m + i], cache[f"blocks.{layer}.hook_resid_post"])
    assert not torch.equal(resids[:, :, 0], resids[:, :, 2])
    assert source_names(cfg, 4) == [f"{m}:resid_post.{l}" for m in ("base", "tuned") for l in (1, 3)]


def test_one_model_twice_is_opened_once_and_named_apart():
    cfg = cfg_for(model_name=f"{TINY / 'base'},{TINY / 'base'}", layers="1")
    first, second = load_models(cfg)
    assert first is second
    assert source_names(cfg, 2) == ["0_base:resid_post.1", "1_base:resid_post.1"]


def test_no_logits_and_no_layer_above_the_last_source_are_computed(models, tokens):
    hf, ran = models[0].original_model, []
    handles = [module.register_forward_hook(lambda *_, name=name: ran.append(name))
               for name, module in [("head", hf.lm_head), *((i, block) for i, block in enumerate(hf.transformer.h))]]
    get_stacked_resids(models, tokens[:1], cfg_for(layers="0,1", site="resid_mid"))
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
    (dict(site="pattern"), r"\[batch, pos, ...\]"),
    (dict(seq_len=129), "128"),
    (dict(model_name="gpt2-nowhere"), "preset=tiny"),
    (dict(model_name="base,words"), "differ in 1 entries, first 'zounds'"),
    (dict(model_name="base,narrow"), "share d_model"),
    (dict(model_name="llama", center=True), "no LayerNorm"),
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
    _, cache = models[0].run_with_cache(tokens[:2].long())
    wanted = torch.stack([cache[f"blocks.{layer}.hook_resid_post"] for layer in range(2)], dim=2)
    assert torch.equal(get_stacked_resids(models, tokens[:2], cfg), wanted)
