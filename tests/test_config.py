import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from train import KEYS, PRESETS, RECIPES, default_cfg, make_cfg
from utils import open_run


def test_values_take_the_kind_of_the_default():
    cfg = make_cfg(l1_coeff=2, lr="1e-4", num_tokens="1e8", center="true", layers="0,3", batch_size=64.0)
    assert [cfg[k] for k in ("l1_coeff", "lr", "num_tokens", "center", "layers", "batch_size")] == [
        2.0, 1e-4, 100_000_000, True, [0, 3], 64]
    assert type(cfg["l1_coeff"]) is float and type(cfg["num_tokens"]) is int and type(cfg["batch_size"]) is int
    assert make_cfg(l1_coeff="0.5")["l1_coeff"] == 0.5


LISTS = {"model_name": str, "layers": int, "norm": float, "tokens": str, "dataset": str}


@pytest.mark.parametrize("activation", RECIPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_cfg_has_all_keys_as_real_types_and_gives_itself_again(preset, activation):
    cfg = make_cfg(preset=preset, activation=activation)
    assert list(cfg) == list(KEYS)
    for key, value in cfg.items():
        assert type(value) is type(default_cfg[key]), key
        if key in LISTS:
            assert type(value) is list and all(type(item) is LISTS[key] for item in value), key
    assert make_cfg(**cfg) == cfg
    assert json.loads(json.dumps(cfg)) == cfg


def test_presets_without_an_activation_of_their_own_give_themselves_again():
    for preset in PRESETS:
        cfg = make_cfg(preset=preset)
        assert make_cfg(**cfg) == cfg == make_cfg(preset=preset, activation=cfg["activation"])


@pytest.mark.parametrize("key, text, items", [
    ("layers", "0,3", [0, 3]), ("layers", " 0, 3 ", (0, 3)), ("layers", "7", [7]), ("layers", "all", []), ("layers", "", []),
    ("layers", 3, ["3"]), ("norm", "1.5,2", [1.5, 2]), ("norm", "", []), ("model_name", "a,b/c", ["a", "b/c"]),
    ("tokens", "a.npy:0.5,b.npy:0.5", ["a.npy:0.5", "b.npy:0.5"]), ("tokens", "", []),
    ("dataset", "a@main:1,b:2", ["a@main:1", "b:2"])])
def test_a_list_can_be_given_as_text(key, text, items):
    cfg = make_cfg(**{key: items})
    assert make_cfg(**{key: text}) == cfg
    assert cfg[key] == [LISTS[key](item) for item in items]


def test_what_python_has_for_numbers_lists_and_paths_can_be_given():
    given = dict(
        layers=range(3), norm=np.array([1.5, 2, 3], np.float32), dict_size=np.int64(100), lr=np.float64(1e-3),
        center=np.True_, save_dir=Path("some/where"), tokens=[Path("a.npy:1"), Path("b.npy:1")], site="mlp_out")
    cfg = make_cfg(**given)
    assert [cfg[key] for key in given] == [
        [0, 1, 2], [1.5, 2, 3], 100, 1e-3, True, "some/where", ["a.npy:1", "b.npy:1"], "mlp_out"]
    assert json.loads(json.dumps(cfg)) == cfg


def test_a_dataset_that_is_given_comes_before_a_presets_tokens():
    assert make_cfg(preset="tiny", dataset="mine")["tokens"] == []
    assert make_cfg(preset="tiny", dataset="mine", tokens="ids.npy")["tokens"] == ["ids.npy"]
    assert make_cfg(preset="tiny")["tokens"] == ["tests/tiny/kjv.npy"]


def test_overrides_come_before_the_preset_and_the_preset_before_the_defaults():
    cfg = make_cfg(preset="tiny", dict_size=100)
    assert cfg["dict_size"] == 100
    assert cfg["seq_len"] == PRESETS["tiny"]["seq_len"] != default_cfg["seq_len"]
    assert cfg["beta2"] == default_cfg["beta2"]


def test_the_activation_changes_the_learning_rate_and_the_preset_comes_before_it():
    assert make_cfg(activation="topk")["lr"] == 2e-4 != make_cfg()["lr"]
    assert make_cfg(activation="topk")["aux_coeff"] == 1 / 32 != make_cfg(activation="jumprelu")["aux_coeff"]
    assert make_cfg(activation="topk", preset="tiny")["lr"] == make_cfg(preset="tiny")["lr"] == 1e-3


def test_every_auto_is_filled_in_and_the_default_is_the_published_recipe():
    cfg = make_cfg()
    assert "auto" not in cfg.values()
    assert cfg["buffer_device"] == cfg["device"]
    recipe = dict(model_name=["gpt2"], layers=[], site="resid_post", batch_size=2048, lr=2e-5, beta1=0.9, beta2=0.999,
                  l1_coeff=2.0, dict_size=2**14, seq_len=1024, buffer_mult=512, dec_init_norm=0.005)
    assert {key: cfg[key] for key in recipe} == recipe


def test_the_published_normalisation_is_a_preset():
    cfg = make_cfg(preset="gpt2-published")
    assert cfg["center"] and len(cfg["norm"]) == 12 and (cfg["norm"][0], cfg["norm"][-1]) == (1.8281, 16.5)
    assert {**cfg, "preset": "gpt2-small", "center": False, "norm": []} == make_cfg()


@pytest.mark.parametrize("overrides, said", [
    (dict(l1_coef=2), "did you mean l1_coeff"),
    (dict(preset="tinny"), "tiny"),
    (dict(dict_size="1.5"), "whole number"),
    (dict(dict_size=True), "whole number"),
    (dict(lr="fast"), "number"),
    (dict(lr="nan"), "number"),
    (dict(num_tokens="inf"), "whole number"),
    (dict(center="yes"), "true, false"),
    (dict(batch_size=0), "above 0"),
    (dict(dict_size=-4), "above 0"),
    (dict(l1_coeff=-1), "at least 0"),
    (dict(buffer_mult=1), "at least 2"),
    (dict(seq_len=1), "at least 2"),
    (dict(beta2=1.0), "below 1"),
    (dict(num_tokens=100, batch_size=200), "batch_size=200"),
    (dict(layers="0,x"), "0,3,6"),
    (dict(wandb_mode="loud"), "offline"),
    (dict(enc_dtype="fp8"), "bf16"),
    (dict(device="cuda:99"), "cpu"),
    (dict(device="mps"), "cpu"),
    (dict(device="abacus"), "cpu"),
    (dict(norm="published"), "^norm=.*give numbers"),
    (dict(center=True, site="z"), "z is not in the residual stream"),
    (dict(model_name=""), "such as gpt2"),
    (dict(dataset=","), "such as Skylion007/openwebtext"),
    (dict(dict_size=1e19), "whole number"),
    (dict(dead_after="1e30"), "whole number"),
    (dict(num_tokens="9" * 20_000), "whole number"),
    (dict(seed=2**53 + 1), "whole number"),
    (dict(lr="1e999"), "number"),
    (dict(lr=None), "such as 2e-05"),
    (dict(save_dir=None), "such as 'checkpoints'"),
    (dict(layers=[None]), "0,3,6"),
    (dict(layers="all,3"), "0,3,6"),
    (dict(layers=[3, 1, 3]), "each once"),
    (dict(loss_weights="1,1"), "loss_weights: no such key"),
    (dict(layers="\u00b2"), "0,3,6"),
    (dict(lr="1\n2"), "number"),
    (dict(preset="ti\nny"), "diff-tiny"),
    (dict(lr=np.zeros(3)), "number"),
    (dict(lr=[1e-3]), "number"),
    (dict(norm=[1.0, 2.0], init_from="x"), "brings its own"),
])
def test_a_wrong_value_is_refused_by_key_value_and_remedy(overrides, said):
    start = time.time()
    with pytest.raises(ValueError, match=said) as error:
        make_cfg(**overrides)
    assert time.time() - start < 1
    key, value = next(iter(overrides.items()))
    assert key in str(error.value) and "\n" not in str(error.value)
    assert key in ("l1_coef", "loss_weights") or repr(value) in str(error.value)


def test_a_save_dir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    for save_dir in (tmp_path / "file", tmp_path / "file" / "runs", "/proc/runs"):
        with pytest.raises(ValueError, match="save_dir"):
            open_run(make_cfg(save_dir=str(save_dir)))
    assert make_cfg(save_dir=str(tmp_path / "new" / "runs")) and not (tmp_path / "new").exists()
    assert (tmp_path / "file").read_text() == "precious"


def test_importing_utils_or_train_does_nothing(tmp_path):
    """But the allocator, of which only the environment variable can be seen."""
    code = ("import os, sys, torch; sys.argv = ['x', '--l1_coeff=oops', '--help']; state = torch.get_rng_state();"
            f"sys.path.insert(0, {str(ROOT)!r}); import utils; assert 'train' not in sys.modules; import train;"
            "assert torch.equal(state, torch.get_rng_state()); assert not torch.cuda.is_initialized();"
            "assert 'THP_MEM_ALLOC_ENABLE' not in os.environ;"
            "assert 'wandb.sdk.wandb_run' not in sys.modules or utils.wandb.run is None")
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
