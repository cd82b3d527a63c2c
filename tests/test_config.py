import subprocess
import sys

import pytest

from conftest import ROOT
from utils import PRESETS, default_cfg, make_cfg, open_run


def test_values_take_the_kind_of_the_default():
    cfg = make_cfg(l1_coeff=2, lr="1e-4", num_tokens="1e8", center="true", layers=[0, 3], batch_size=64.0)
    assert [cfg[k] for k in ("l1_coeff", "lr", "num_tokens", "center", "layers", "batch_size")] == [
        2.0, 1e-4, 100_000_000, True, "0,3", 64]
    assert type(cfg["l1_coeff"]) is float and type(cfg["num_tokens"]) is int and type(cfg["batch_size"]) is int
    assert make_cfg(l1_coeff="0.5")["l1_coeff"] == 0.5


def test_overrides_come_before_the_preset_and_the_preset_before_the_defaults():
    cfg = make_cfg(preset="tiny", dict_size=100)
    assert cfg["dict_size"] == 100
    assert cfg["seq_len"] == PRESETS["tiny"]["seq_len"] != default_cfg["seq_len"]
    assert cfg["beta2"] == default_cfg["beta2"]


def test_every_auto_is_filled_in_and_the_default_is_the_published_recipe():
    cfg = make_cfg()
    assert "auto" not in cfg.values()
    assert cfg["buffer_device"] == cfg["device"]
    recipe = dict(model_name="gpt2", layers="all", site="resid_post", batch_size=2048, lr=2e-5, beta1=0.9, beta2=0.999,
                  l1_coeff=2.0, dict_size=2**14, seq_len=1024, buffer_mult=512, dec_init_norm=0.005)
    assert {key: cfg[key] for key in recipe} == recipe


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
    (dict(norm="published"), "center=True"),
    (dict(center=True, site="z"), "z is not in the residual stream"),
    (dict(norm="published", model_name="gpt2-xl", center=True), "model_name=gpt2"),
])
def test_a_wrong_value_is_refused_by_key_value_and_remedy(overrides, said):
    with pytest.raises(ValueError, match=said) as error:
        make_cfg(**overrides)
    key, value = next(iter(overrides.items()))
    assert key in str(error.value) and "\n" not in str(error.value)
    assert key == "l1_coef" or repr(value) in str(error.value)


def test_a_save_dir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    for save_dir in (tmp_path / "file", tmp_path / "file" / "runs", "/proc/runs"):
        with pytest.raises(ValueError, match="save_dir"):
            open_run(make_cfg(save_dir=str(save_dir)))
    assert make_cfg(save_dir=str(tmp_path / "new" / "runs")) and not (tmp_path / "new").exists()
    assert (tmp_path / "file").read_text() == "precious"


def test_importing_utils_does_nothing(tmp_path):
    code = ("import sys, torch; sys.argv = ['x', '--l1_coeff=oops', '--help']; state = torch.get_rng_state();"
            f"sys.path.insert(0, {str(ROOT)!r}); import utils;"
            "assert torch.equal(state, torch.get_rng_state()); assert not torch.cuda.is_initialized();"
            "assert 'wandb.sdk.wandb_run' not in sys.modules or utils.wandb.run is None")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
