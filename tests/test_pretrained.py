"Official weights: ours beside diffusers, both ways round, and every way a folder can be wrong."
import inspect
import json
import os
import shutil
import subprocess
import sys
import types
from functools import partial

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ddpm_nbdev.ddpm import DDPM
from ddpm_nbdev.files import WeightsError
from ddpm_nbdev.pretrained import (_HUB_FILES, _SCHEDULER_DEFAULTS, _UNET_DEFAULTS, _WEIGHTS, OfficialUNet, _count_from_zero,
    _embedding_rotation, _from_diffusers_weights, _process_from_config, _process_to_config, _to_diffusers_weights, _unet_args,
    _unet_config, _is_diffusers, load_diffusers, load_unet, save_diffusers, save_unet)
from ddpm_nbdev.reverse import VARIANCES, p_sample
from ddpm_nbdev.schedule import NoiseSchedule, constant_schedule, linear_schedule, quadratic_schedule
from ddpm_nbdev.toy import MLP
from ddpm_nbdev.unet import UNet, cifar10_unet, digits_unet, image256_large_unet, image256_unet, timestep_embedding

TS = torch.tensor([1, 2, 500, 1000])
D, A, U, B = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
# as published, with the keys of 2022
COMMON = dict(_class_name="UNet2DModel", _diffusers_version="0.0.4", act_fn="silu", attention_head_dim=None, center_input_sample=False,
    downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, in_channels=3, layers_per_block=2, mid_block_scale_factor=1,
    norm_eps=1e-6, norm_num_groups=32, out_channels=3, time_embedding_type="positional")
CIFAR10 = dict(COMMON, block_out_channels=[128, 256, 256, 256], down_block_types=[D, A, D, D], up_block_types=[U, U, B, U], sample_size=32)
IMAGE256 = dict(COMMON, block_out_channels=[128, 128, 256, 256, 512, 512], down_block_types=[D, D, D, D, A, D],
    up_block_types=[U, B, U, U, U, U], sample_size=256)
SCHEDULER = dict(_class_name="DDPMScheduler", _diffusers_version="0.1.1", beta_end=.02, beta_schedule="linear", beta_start=1e-4,
    clip_sample=True, num_train_timesteps=1000, trained_betas=None, variance_type="fixed_small")
# small relatives: six levels with the paper's multiples; one with everything unusual that can be expressed
NARROW256 = dict(IMAGE256, block_out_channels=[32, 32, 64, 64, 128, 128], sample_size=64, norm_num_groups=8)
ODD = dict(COMMON, block_out_channels=[24, 24, 72], down_block_types=[A, D, A], up_block_types=[B, U, B], sample_size=12, in_channels=2,
    out_channels=2, layers_per_block=3, norm_num_groups=6, dropout=.3)
LEARNED = dict(CIFAR10, block_out_channels=[32, 64, 64, 64], out_channels=6, norm_num_groups=16)
TINY = dict(COMMON, block_out_channels=[8, 16], down_block_types=[D, A], up_block_types=[B, U], sample_size=8, norm_num_groups=4,
    layers_per_block=1)


def randomize(model, seed=0):
    "Every parameter random, also those that start at zero; features stay of order one."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            z = torch.randn(p.shape, generator=g)
            p.copy_(z/p[0].numel()**.5 if p.ndim > 1 else (1. if "norm" in name and name.endswith("weight") else 0.) + .2*z)
    return model.eval()


def their_model(cfg, seed=0): return randomize(UNet2DModel.from_config(cfg), seed)


def images(cfg, seed=1):
    return torch.randn(len(TS), cfg["in_channels"], *[cfg["sample_size"]]*2, generator=torch.Generator().manual_seed(seed))


def same(ours, theirs, tol=1e-5):
    "Equal to `tol` of the size of the predictions."
    assert theirs.abs().max() > .1
    assert_close(ours, theirs, rtol=0, atol=tol*max(1, theirs.abs().max().item()))


@pytest.fixture
def folder(tmp_path):
    "A small, whole folder, as diffusers writes it."
    their_model(TINY).save_pretrained(tmp_path)
    (tmp_path/"scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return tmp_path


def change(path, **kw):
    "Change some keys of a JSON file; `...` removes one."
    cfg = json.loads(path.read_text()) | kw
    path.write_text(json.dumps({k: v for k, v in cfg.items() if v is not ...}))


# ---- the network, theirs to ours

@pytest.mark.parametrize("cfg", [CIFAR10, NARROW256, LEARNED, ODD], ids=["cifar10", "six levels", "learned variance", "odd"])
@torch.no_grad()
def test_ours_equals_theirs(cfg, tmp_path):
    "Folders that diffusers makes: in float32 to 1e-5 (CIFAR-10 at its full 35.7 million parameters)."
    theirs = their_model(cfg)
    theirs.save_pretrained(tmp_path)
    ours = load_unet(tmp_path)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    if cfg is CIFAR10: assert sum(p.numel() for p in ours.parameters()) == 35_746_307
    x = images(cfg)
    same(ours(x, TS), theirs(x, TS-1).sample)


@pytest.mark.parametrize("cfg", [NARROW256, LEARNED, ODD], ids=["six levels", "learned variance", "odd"])
@torch.no_grad()
def test_the_same_function(cfg):
    "In float64, with the same embedding, nothing is left but float64's own rounding."
    theirs = their_model(cfg)
    ours = OfficialUNet(**_unet_args(cfg)).eval()
    ours.load_state_dict(_from_diffusers_weights(theirs.state_dict()))
    theirs.time_proj.forward = lambda t: timestep_embedding(t, cfg["block_out_channels"][0])
    x = images(cfg).double()
    assert_close(ours.double()(x, TS), theirs.double()(x, TS-1).sample, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cfg,make", [(CIFAR10, cifar10_unet), (IMAGE256, image256_unet)], ids=["cifar10", "256x256"])
@pytest.mark.parametrize("learned", [False, True])
def test_full_configurations(cfg, make, learned):
    "Arguments, names and shapes of the paper's networks, without memory for their weights."
    cfg = dict(cfg, out_channels=3*(1+learned))
    with torch.device("meta"): theirs, ours = UNet2DModel.from_config(cfg), make(learned_variance=learned)
    assert _unet_args(cfg) == {k: v for k, v in ours.config.items() if k != "out_channels"} | {"dropout": 0.}
    shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in _to_diffusers_weights(ours.state_dict()).items()} == shapes
    back = _from_diffusers_weights(theirs.state_dict())
    assert {k: tuple(v.shape) for k, v in back.items()} == {k: tuple(v.shape) for k, v in ours.state_dict().items()}


@pytest.mark.parametrize("make", [cifar10_unet, image256_unet, image256_large_unet, digits_unet, partial(UNet, in_channels=1, ch=24,
    ch_mult=(1, 2, 3), num_res_blocks=3, attn_resolutions=(28, 7), resolution=28, groups=12, learned_variance=True)])
def test_configurations_there_and_back(make):
    with torch.device("meta"): ours = make()
    cfg = _unet_config(ours.config)
    assert json.loads(json.dumps(cfg)) == cfg and set(cfg) == set(_UNET_DEFAULTS)
    args = _unet_args(cfg)
    assert args == {k: v for k, v in ours.config.items() if k != "out_channels"}
    assert _unet_config(OfficialUNet(**args).config if make is digits_unet else dict(args, out_channels=None)) == cfg
    with torch.device("meta"): theirs = UNet2DModel.from_config(cfg)
    assert {k: tuple(v.shape) for k, v in theirs.state_dict().items()} \
        == {k: tuple(v.shape) for k, v in _to_diffusers_weights(ours.state_dict()).items()}


def test_defaults_are_diffusers():
    "What is assumed for a missing key is what diffusers assumes."
    for defaults, cls in ((_UNET_DEFAULTS, UNet2DModel), (_SCHEDULER_DEFAULTS, DDPMScheduler)):
        theirs = {k: list(p.default) if isinstance(p.default, tuple) else p.default
                  for k, p in inspect.signature(cls.__init__).parameters.items() if k != "self"}
        assert {k: v for k, v in defaults.items() if k in theirs} == theirs
        assert set(defaults) - set(theirs) <= {"_class_name", "predict_epsilon", "tensor_format"}


def old_names(weights):
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        weights = {k.replace(f".{new}.", f".{old}."): v for k, v in weights.items()}
    return weights


@torch.no_grad()
def test_old_attention_names(folder):
    "As the official folders have them; diffusers still reads them too."
    new = load_unet(folder).state_dict()
    weights = load_file(folder/_WEIGHTS)
    save_file(old_names(weights), folder/_WEIGHTS, {"format": "pt"})
    assert not any("to_q" in k for k in load_file(folder/_WEIGHTS))
    for k, v in load_unet(folder).state_dict().items(): assert torch.equal(v, new[k])
    x = images(TINY)
    same(load_unet(folder)(x, TS), UNet2DModel.from_pretrained(folder)(x, TS-1).sample)
    save_file({k: v.clone() for k, v in (old_names(weights) | weights).items()}, folder/_WEIGHTS)
    with pytest.raises(WeightsError, match="two tensors for"): load_unet(folder)


@torch.no_grad()
def test_half_precision_weights(folder):
    "Weights saved in float16 or bfloat16 are read into float32."
    save_file({k: v.bfloat16() for k, v in load_file(folder/_WEIGHTS).items()}, folder/_WEIGHTS)
    assert {p.dtype for p in load_unet(folder).parameters()} == {torch.float32}


# ---- the network, ours to theirs

def our_ddpm(seed=0, cls=UNet, sched=None, **kw):
    model = randomize(cls(in_channels=3, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=16, groups=8), seed)
    return DDPM(model, sched or linear_schedule(), (3, 16, 16), **kw)


@pytest.mark.parametrize("cls", [UNet, OfficialUNet])
@torch.no_grad()
def test_theirs_equals_ours(cls, tmp_path):
    ddpm = our_ddpm(cls=cls)
    save_diffusers(ddpm, tmp_path/"new"/"folder")
    theirs = UNet2DModel.from_pretrained(tmp_path/"new"/"folder").eval()
    x = images(dict(in_channels=3, sample_size=16))
    same(ddpm.model(x, TS), theirs(x, TS-1).sample)
    back = load_diffusers(tmp_path/"new"/"folder")
    same(ddpm.model(x, TS), back.model(x, TS))
    if cls is OfficialUNet:
        for k, v in ddpm.model.state_dict().items(): assert torch.equal(v, back.model.state_dict()[k])


@torch.no_grad()
def test_full_cifar10_to_theirs(tmp_path):
    "An ordinary network of ours, 35.7 million parameters: the rotation is in its weights."
    ours = randomize(cifar10_unet())
    save_unet(ours, tmp_path)
    x = images(CIFAR10)
    same(ours(x, TS), UNet2DModel.from_pretrained(tmp_path).eval()(x, TS-1).sample, 2e-5)


@torch.no_grad()
def test_learned_variance_to_theirs(tmp_path):
    ours = randomize(UNet(in_channels=1, ch=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), resolution=8, groups=4,
                          learned_variance=True))
    save_unet(ours, tmp_path)
    theirs = UNet2DModel.from_pretrained(tmp_path).eval()
    assert theirs.config.out_channels == 2
    x = images(dict(in_channels=1, sample_size=8))
    same(ours(x, TS), theirs(x, TS-1).sample)
    with pytest.raises(ValueError, match="variance='learned'"): save_diffusers(DDPM(ours, linear_schedule(), (1, 8, 8), variance="learned"), tmp_path)


def test_a_measured_variance_to_theirs(tmp_path):
    ours = UNet(in_channels=1, ch=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), resolution=8, groups=4)
    ddpm = DDPM(ours, linear_schedule(), (1, 8, 8), variance="optimal", mse=torch.ones(1001))
    with pytest.raises(ValueError, match="variance='optimal' does; it can express beta, beta_tilde$"): save_diffusers(ddpm, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dim", [4, 16, 128, 192])
def test_rotation(dim):
    "Against the embedding in float64, formed here entry by entry."
    R = _embedding_rotation(dim)
    def e(t):
        w = 10000.**(-torch.arange(dim//2).double()/(dim//2-1))
        return torch.cat([(t*w).sin(), (t*w).cos()])
    assert_close(R @ R.T, torch.eye(dim).double())
    for t in (1, 2, 500, 1000): assert_close(R @ e(t-1), e(t), rtol=0, atol=1e-12)


def test_count_from_zero_changes_one_tensor_and_nothing_in_place():
    weights = randomize(digits_unet()).state_dict()
    before = {k: v.clone() for k, v in weights.items()}
    new = _count_from_zero(weights)
    assert [k for k in new if not torch.equal(new[k], before[k])] == ["temb.0.weight"]
    assert all(torch.equal(weights[k], before[k]) for k in before)
    assert new["temb.0.weight"].dtype == torch.float32


@pytest.mark.parametrize("mean,variance", [("eps", "beta"), ("eps", "beta_tilde"), ("x0", "beta_tilde")])
def test_pipeline_makes_our_samples(mean, variance, tmp_path):
    "The whole of Algorithm 2, by diffusers, from what we wrote: the same images from the same seed."
    ddpm = our_ddpm(mean=mean, variance=variance, sched=linear_schedule(T=20))
    save_diffusers(ddpm, tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(4, generator=torch.Generator().manual_seed(3), num_inference_steps=20, output_type="pt").images
    ours = ddpm.sample(4, generator=torch.Generator().manual_seed(3))
    assert_close((ours/2+.5).clamp(0, 1), theirs, rtol=0, atol=1e-3)


@torch.no_grad()
def test_pipeline_layout(tmp_path):
    "Parts in folders of their own, as pipelines are saved; what we write goes where it will be read."
    DDPMPipeline(their_model(TINY), DDPMScheduler.from_config(SCHEDULER)).save_pretrained(tmp_path)
    assert not (tmp_path/"config.json").exists() and _is_diffusers(tmp_path)
    ddpm = load_diffusers(tmp_path)
    ddpm.model.conv_out.bias += 1
    save_diffusers(ddpm, tmp_path)
    x = images(TINY)
    same(load_diffusers(tmp_path).model(x, TS), ddpm.model(x, TS))
    same(DDPMPipeline.from_pretrained(tmp_path).unet(x, TS-1).sample, ddpm.model(x, TS))


def test_saved_and_loaded_as_ours(folder, tmp_path):
    ddpm = load_diffusers(folder)
    ddpm.save(tmp_path/"own")
    again = DDPM.load(tmp_path/"own")
    assert type(again.model) is OfficialUNet and not _is_diffusers(tmp_path/"own")
    x = images(TINY)
    with torch.no_grad(): assert torch.equal(again.model(x, TS), ddpm.model(x, TS))


def test_learns(folder):
    "What was loaded can be trained: gradients reach every parameter."
    ddpm = load_diffusers(folder)
    ddpm.loss(torch.rand(4, 3, 8, 8)*2-1, generator=torch.Generator().manual_seed(0)).mean().backward()
    assert all(p.grad is not None for p in ddpm.model.parameters())


# ---- configurations that are another network

WRONG = [
    ("_class_name", "UNet2DConditionModel"), ("sample_size", None), ("sample_size", [8, 16]), ("sample_size", "8"), ("out_channels", 4),
    ("center_input_sample", True), ("time_embedding_type", "fourier"), ("time_embedding_dim", 64), ("freq_shift", 0), ("flip_sin_to_cos", True),
    ("down_block_types", [D, D]), ("down_block_types", [D, "SkipDownBlock2D"]), ("down_block_types", [D, A, A]), ("mid_block_type", None),
    ("mid_block_type", "UNetMidBlock2DCrossAttn"), ("up_block_types", [U, U]), ("up_block_types", [U, B]), ("block_out_channels", [8, 12]),
    ("block_out_channels", []), ("mid_block_scale_factor", 1.5), ("downsample_padding", 1), ("downsample_type", "resnet"),
    ("upsample_type", "resnet"), ("act_fn", "gelu"), ("attention_head_dim", 8), ("attn_norm_num_groups", 8), ("norm_eps", 1e-5),
    ("resnet_time_scale_shift", "scale_shift"), ("add_attention", False), ("class_embed_type", "timestep"), ("num_class_embeds", 10),
    ("brand_new", 1), ("brand_new", False),
    ("freq_shift", ...), ("flip_sin_to_cos", ...), ("downsample_padding", ...), ("norm_eps", ...), ("attention_head_dim", ...),  # defaults
]


@pytest.mark.parametrize("key,value", WRONG, ids=[f"{k}={'missing' if v is ... else v}" for k, v in WRONG])
def test_another_network_is_refused(folder, key, value):
    "One line that names the file, the key, and what it is."
    if key == "down_block_types" and value == [D, D]:
        change(folder/"config.json", up_block_types=[B, U])
        named = "up_block_types"                         # the arms disagree; it is said of the second
    elif key == "down_block_types": named = "down_block_types"
    else: named = key
    change(folder/"config.json", **{key: value})
    with pytest.raises(WeightsError) as e: load_diffusers(folder)
    message = str(e.value)
    assert str(folder/"config.json") in message and named in message and "\n" not in message
    if value is ...: assert "diffusers' default" in message
    elif key not in ("down_block_types", "sample_size"): assert json.dumps(value) in message


HARMLESS = [dict(act_fn="swish"), dict(sample_size=[8, 8]), dict(time_embedding_dim=32), dict(attn_norm_num_groups=4), dict(dropout=.2),
            dict(attention_head_dim=16), dict(num_train_timesteps=1000), dict(brand_new=None), dict(_name_or_path="somewhere"),
            dict(mid_block_type=..., add_attention=..., class_embed_type=...)]


@pytest.mark.parametrize("keys", HARMLESS, ids=[", ".join(k) for k in HARMLESS])
@torch.no_grad()
def test_the_same_network_said_otherwise(folder, keys):
    change(folder/"config.json", **keys)
    x = images(TINY)
    same(load_diffusers(folder).model(x, TS), UNet2DModel.from_pretrained(folder).eval()(x, TS-1).sample)


@pytest.mark.parametrize("keys", [dict(block_out_channels="8"), dict(block_out_channels=[0, 8]), dict(block_out_channels=[None, 8]),
    dict(layers_per_block="2"), dict(norm_num_groups=3), dict(norm_num_groups=8), dict(down_block_types=5), dict(up_block_types=None),
    dict(sample_size=7), dict(in_channels="3"), dict(in_channels=None), dict(dropout="much"), dict(layers_per_block=None), dict(layers_per_block=10**30)], ids=str)
def test_nonsense_is_refused_in_one_line(folder, keys):
    change(folder/"config.json", **keys)
    with pytest.raises(WeightsError) as e: load_diffusers(folder)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


# ---- the process

WRONG_PROCESS = [
    ("_class_name", "DDIMScheduler"), ("prediction_type", "v_prediction"), ("variance_type", "learned"), ("variance_type", "learned_range"),
    ("variance_type", "fixed_large_log"), ("variance_type", "other"), ("clip_sample", False), ("clip_sample_range", 2.), ("thresholding", True),
    ("beta_schedule", "squaredcos_cap_v2"), ("beta_schedule", "sigmoid"), ("steps_offset", 1), ("rescale_betas_zero_snr", True),
    ("num_train_timesteps", 0), ("num_train_timesteps", "many"), ("beta_start", 0.), ("beta_end", 1.), ("beta_end", None), ("trained_betas", [.1, .2]),
    ("trained_betas", 5), ("predict_epsilon", False), ("solver_order", 2),
]


@pytest.mark.parametrize("key,value", WRONG_PROCESS, ids=[f"{k}={v}" for k, v in WRONG_PROCESS])
def test_another_process_is_refused(folder, key, value):
    change(folder/"scheduler_config.json", **{key: value})
    with pytest.raises(WeightsError) as e: load_diffusers(folder)
    message = str(e.value)
    assert str(folder/"scheduler_config.json") in message and "\n" not in message
    if key not in ("num_train_timesteps", "beta_start", "beta_end", "trained_betas"): assert key in message and json.dumps(value) in message


@pytest.mark.parametrize("sched", [linear_schedule(), linear_schedule(200, .0005, .1), quadratic_schedule(), constant_schedule(50, .03),
    NoiseSchedule.from_betas([.1, .3, .2]), linear_schedule(1)], ids=["linear", "short", "quadratic", "constant", "betas", "one step"])
@pytest.mark.parametrize("mean", ["eps", "x0"])
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_processes_there_and_back(sched, mean, variance):
    "Ours comes back unchanged, and diffusers makes the same betas of it (in float32)."
    cfg = json.loads(json.dumps(_process_to_config(sched, mean, variance)))
    back, *choices = _process_from_config(cfg)
    assert_close(back.beta, sched.beta, rtol=1e-12, atol=0)
    assert choices == [mean, variance]
    theirs = DDPMScheduler.from_config(cfg)
    assert len(theirs) == sched.T
    assert_close(theirs.betas.double(), sched.beta[1:], rtol=2e-6, atol=0)


def test_published_processes():
    for kind, variance in (("fixed_large", "beta"), ("fixed_small", "beta_tilde"), ("fixed_small_log", "beta_tilde")):
        sched, *choices = _process_from_config(dict(SCHEDULER, variance_type=kind))
        assert choices == ["eps", variance] and torch.equal(sched.beta, linear_schedule().beta)
    old = dict(SCHEDULER, tensor_format="pt", timestep_values=None, predict_epsilon=True)
    assert _process_from_config(old)[1:] == ("eps", "beta_tilde")


@pytest.mark.parametrize("kw", [dict(mean="mu"), dict(variance="learned")])
def test_what_the_format_cannot_say(kw):
    with pytest.raises(ValueError, match="diffusers has nothing"): _process_to_config(linear_schedule(), **dict(mean="eps", variance="beta") | kw)


# ---- one step of Algorithm 2

OURS = {"fixed_small": "beta_tilde", "fixed_small_log": "beta_tilde", "fixed_large": "beta", "epsilon": "eps", "sample": "x0"}


def both_steps(t, kind, clip, prediction="epsilon", exact=True):
    "Ours and theirs from the same x_t, network output and noise, which both draw from the same seed."
    dtype, sched = torch.float64 if exact else torch.float32, linear_schedule()
    theirs = DDPMScheduler(variance_type=kind, clip_sample=clip, prediction_type=prediction)
    if exact: theirs.alphas_cumprod, theirs.one = sched.alpha_bar[1:], torch.ones((), dtype=dtype)
    g = torch.Generator().manual_seed(t)
    xt, out = torch.randn(2, 3, 3, 4, 4, generator=g, dtype=dtype)
    got, _ = p_sample(sched, lambda x, t: out, xt, torch.full((3,), t), generator=torch.Generator().manual_seed(9), clip=clip,
                      mean=OURS[prediction], variance=OURS[kind])
    want = theirs.step(out, t-1, xt, generator=torch.Generator().manual_seed(9))
    return got, want.prev_sample


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("t", [1, 2, 3, 10, 100, 500, 999, 1000])
def test_step(kind, clip, prediction, t):
    "The formulas agree; with diffusers' own float32 tables to 1e-3, since there beta_t is a difference of near equals."
    assert_close(*both_steps(t, kind, clip, prediction), rtol=1e-9, atol=1e-9)
    a, b = both_steps(t, kind, clip, prediction, exact=False)
    assert_close(a, b, rtol=1e-3, atol=1e-3 if t < 100 else 1e-4)


def test_where_their_variance_is_not_ours():
    "At t = 1: 1e-20 and beta_1, ours is beta-tilde_2 for both. From t = 2 on they are the same."
    sched, like = linear_schedule(), torch.zeros(1, 1, dtype=torch.float64)
    tilde2 = sched.beta[2].item()*sched.beta[1].item()/(1-sched.alpha_bar[2].item())
    for kind, ours, at_1 in (("fixed_small", VARIANCES["beta_tilde"], 1e-20), ("fixed_large", VARIANCES["beta"], 1e-4)):
        theirs = DDPMScheduler(variance_type=kind)
        assert theirs._get_variance(0).item() == pytest.approx(at_1, rel=2e-3)
        assert ours(sched, like, torch.tensor([1]), None).exp().item() == pytest.approx(tilde2)
        for t in (2, 3, 10, 500, 1000):
            assert theirs._get_variance(t-1).item() == pytest.approx(ours(sched, like, torch.tensor([t]), None).exp().item(), rel=1e-3)


def test_modes_of_theirs_that_are_refused():
    "`learned` takes the network's output as a variance; `fixed_large_log` gives NaN, unless a later diffusers has mended it."
    xt, gen = torch.zeros(1, 3, 4, 4), lambda: torch.Generator().manual_seed(0)
    step = lambda kind, out: DDPMScheduler(variance_type=kind).step(out, 500, xt, generator=gen()).prev_sample
    assert step("learned", -torch.ones(1, 6, 4, 4)).isnan().all()
    out = torch.cat([torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), .04)], 1)                   # sigma^2, not its logarithm
    assert_close(step("learned", out), .2*torch.randn(1, 3, 4, 4, generator=gen()))
    log = step("fixed_large_log", torch.zeros(1, 3, 4, 4))
    assert log.isnan().all() or torch.allclose(log, step("fixed_large", torch.zeros(1, 3, 4, 4)))


# ---- folders

def refused(path, *words):
    with pytest.raises(WeightsError) as e: load_diffusers(path)
    message = str(e.value)
    assert "\n" not in message and all(w in message for w in words), message


class Danger:
    "Opening its pickle makes a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", _WEIGHTS])
@pytest.mark.parametrize("legacy", [True, False])
def test_pickles_are_refused(folder, tmp_path, name, legacy):
    (folder/_WEIGHTS).unlink()
    torch.save({"conv_in.weight": Danger(tmp_path/"harm")}, folder/name, _use_new_zipfile_serialization=not legacy)
    refused(folder, name, "this is a pickle", "only safetensors")
    assert not (tmp_path/"harm").exists()


def test_a_pickle_beside_the_weights_is_left_alone(folder, tmp_path):
    torch.save({"x": Danger(tmp_path/"harm")}, folder/"diffusion_pytorch_model.bin")
    load_diffusers(folder)
    assert not (tmp_path/"harm").exists()


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_truncated_weights(folder, keep):
    (folder/_WEIGHTS).write_bytes((folder/_WEIGHTS).read_bytes()[:keep])
    refused(folder, _WEIGHTS, "not a complete safetensors file")


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", _WEIGHTS])
def test_missing_file(folder, name):
    (folder/name).unlink()
    refused(folder, name, "no such file")


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json"])
@pytest.mark.parametrize("text,word", [('{"_class_name": ', "not JSON"), ("[1, 2]", "a list"), ("", "not JSON"), ("\xff", "not JSON")])
def test_broken_json(folder, name, text, word):
    (folder/name).write_bytes(text.encode("latin1"))
    refused(folder, name, word)


def test_weights_of_another_network(folder):
    weights = load_file(folder/_WEIGHTS)
    for change in (lambda w: w.pop("conv_out.bias"), lambda w: w.update(extra=torch.zeros(1)),
                   lambda w: w.update({"conv_in.weight": torch.zeros(8, 4, 3, 3)})):
        other = dict(weights)
        change(other)
        save_file(other, folder/_WEIGHTS)
        refused(folder, "weights of another architecture")


def test_learned_variance_with_a_fixed_process(tmp_path):
    save_unet(digits_unet(learned_variance=True), tmp_path)
    (tmp_path/"scheduler_config.json").write_text(json.dumps(SCHEDULER))
    refused(tmp_path, "out_channels is 2", "must be 1")
    assert load_unet(tmp_path).config["learned_variance"]


def test_is_diffusers(folder, tmp_path):
    assert _is_diffusers(folder) and _is_diffusers(str(folder))
    (folder/"model_index.json").write_text("{}")
    (folder/"config.json").unlink()
    assert _is_diffusers(folder)
    for other in ("nowhere", "google/ddpm-cifar10-32", "empty", "own"):
        if other == "empty": (tmp_path/"e"/other).mkdir(parents=True)
        if other == "own": DDPM(digits_unet(), linear_schedule(), (1, 8, 8)).save(tmp_path/"e"/other)
        assert not _is_diffusers(tmp_path/"e"/other)


def test_our_folder_is_neither_read_nor_overwritten(tmp_path):
    ddpm = DDPM(digits_unet(), linear_schedule(), (1, 8, 8))
    ddpm.save(tmp_path)
    with pytest.raises(WeightsError, match="diffusers did not write it"): load_unet(tmp_path)
    with pytest.raises(FileExistsError, match="would be lost"): save_diffusers(ddpm, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    DDPM.load(tmp_path)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="no network like"): save_diffusers(DDPM(MLP(2), linear_schedule(), (2,)), tmp_path/"a")
    with pytest.raises(ValueError, match="square images"): save_diffusers(DDPM(digits_unet(), linear_schedule(), (1, 8, 16)), tmp_path/"b")
    with pytest.raises(ValueError, match="must begin with 1"): save_diffusers(DDPM(digits_unet(ch_mult=(2, 2)), linear_schedule(), (1, 8, 8)), tmp_path/"c")
    assert not list(tmp_path.iterdir())


# ---- the hub

def hub(monkeypatch, answer):
    "A hub that is not there: `answer(name, patterns)` returns a folder or raises."
    calls = []
    def snapshot_download(repo_id, **kw):
        calls.append((repo_id, kw))
        return str(answer())
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    return calls


def test_by_name(folder, monkeypatch):
    "Everything that loading needs is asked for, and no file that could be a pickle."
    from fnmatch import fnmatch
    calls = hub(monkeypatch, lambda: folder)
    ddpm = load_diffusers("google/ddpm-cifar10-32")
    assert ddpm.shape == (3, 8, 8)
    (name, kw), = calls
    assert name == "google/ddpm-cifar10-32" and kw == {"allow_patterns": _HUB_FILES}
    asked = lambda f: any(fnmatch(f, p) for p in _HUB_FILES)
    for f in ("config.json", _WEIGHTS, "scheduler_config.json"):
        assert asked(f) and asked(f"{'scheduler' if 'sched' in f else 'unet'}/{f}")
    for f in ("diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.bin", "model.ckpt", "x.pt", "x.pkl", "x.py", "README.md"): assert not asked(f)
    assert all(p.endswith((".json", ".safetensors")) for p in _HUB_FILES)


def test_a_name_with_only_a_pickle(folder, monkeypatch):
    (folder/_WEIGHTS).unlink()                      # what the hub would deliver of such a repository
    hub(monkeypatch, lambda: folder)
    refused("google/ddpm-cat-256", _WEIGHTS, "no such file")


def test_a_local_folder_comes_first(folder, monkeypatch):
    calls = hub(monkeypatch, lambda: pytest.fail("asked the hub"))
    shutil.copytree(folder, folder/"org"/"name")
    monkeypatch.chdir(folder)
    load_diffusers("org/name")
    assert not calls


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("google/ddpm-cifar10-32", "pip install huggingface_hub")


@pytest.mark.parametrize("error", [OSError("Got: ConnectError: Connection refused\nmore\nlines"), ValueError("no such repository"), OSError()])
def test_the_hub_does_not_answer(monkeypatch, error):
    def fail(): raise error
    hub(monkeypatch, fail)
    refused("google/ddpm-cifar10-32", "google/ddpm-cifar10-32", str(error).split("\n")[0] or "OSError")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../x", "/tmp/no/such", "a/../b", "", "org/"])
def test_not_a_name(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    if name == "":
        with pytest.raises(WeightsError): load_diffusers(name)     # the current folder, which is no model
    else: refused(name, "not a name on the hub")


def test_the_real_hub_offline(tmp_path):
    "The library itself, told that there is no network: still one line."
    code = "from ddpm_nbdev.pretrained import load_diffusers; load_diffusers('google/ddpm-cifar10-32')"
    res = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert res.returncode and "WeightsError: google/ddpm-cifar10-32: no such folder, and the Hugging Face hub" in res.stderr.splitlines()[-1]
