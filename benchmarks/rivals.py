"This package and the two it is compared with: how each builds its network, trains and samples."
import contextlib
import importlib
import importlib.metadata
import sys
from dataclasses import replace
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import nn

from ddpm_nbdev.data import Batches
from ddpm_nbdev.graphs import Replayed
from ddpm_nbdev.machines import LowPrecision
from ddpm_nbdev.reverse import p_sample_progressive
from ddpm_nbdev.train import TrainState, preset, training_step
from ddpm_nbdev.unet import UNet

OURS, DIFFUSERS, LUCIDRAINS = 'ddpm_nbdev', 'diffusers', 'denoising-diffusion-pytorch'
LAYOUTS = {'channels last': torch.channels_last, 'channels first': torch.contiguous_format}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
FULL = dict(ch=128, ch_mult=[1, 2, 2, 2], num_res_blocks=2, attn_resolutions=[16], groups=32)
TINY = dict(ch=16, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[16], groups=8)

# ---- what is there

def import_diffusers():
    "diffusers, or ImportError."
    import diffusers
    return diffusers

def import_lucidrains():
    """denoising_diffusion_pytorch, or ImportError.

    Stand-ins take the place of what only its own training loop needs, where it is not installed.
    """
    for name in ('torchvision', 'accelerate', 'pytorch_fid', 'pytorch_fid.fid_score',
                 'pytorch_fid.inception'):
        try: importlib.import_module(name)
        except Exception: sys.modules[name] = MagicMock()  # another torch's torchvision raises, too
    import denoising_diffusion_pytorch
    importlib.import_module('ema_pytorch')
    return denoising_diffusion_pytorch

def find_missing(wanted=True):
    "name -> why it cannot be measured, of the other packages."
    missing = {}
    for who, load in ((DIFFUSERS, import_diffusers), (LUCIDRAINS, import_lucidrains)):
        if not wanted: missing[who] = 'not asked for'
        else:
            try: load()
            except Exception as e: missing[who] = f"cannot be imported ({' '.join(str(e).split())})"
    return missing

def rival_versions(missing):
    "name -> version, of those that are there."
    return {m: importlib.metadata.version(m) for m in (DIFFUSERS, LUCIDRAINS) if m not in missing}

# ---- networks

def wake(net):
    """Give the layers that start at zero something to do, as after some training.

    A zero gradient may cost another time.
    """
    for p in net.parameters():
        if p.ndim > 1 and not p.any(): nn.init.normal_(p, std=.02)

def ours_net(s):
    "The network of this package."
    return UNet(**s.net)

def diffusers_net(s):
    "UNet2DModel with the same configuration, that of google/ddpm-cifar10-32."
    n = s.net
    attn = [(32 >> i) in n['attn_resolutions'] for i in range(len(n['ch_mult']))]
    return import_diffusers().UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=n['num_res_blocks'],
        block_out_channels=[n['ch']*m for m in n['ch_mult']],
        down_block_types=['AttnDownBlock2D' if a else 'DownBlock2D' for a in attn],
        up_block_types=['AttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(attn)],
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        norm_eps=1e-6, norm_num_groups=n['groups'], dropout=.1)

def lucidrains_net(s):
    "Unet(dim=128, dim_mults=(1,2,2,2)), its defaults elsewhere."
    lib, n = import_lucidrains(), s.net
    return lib.Unet(dim=n['ch'], dim_mults=tuple(n['ch_mult']), flash_attn=False)

# ---- training: one call of what comes back is one step

def all_batches(s):
    "step -> images and their places, from memory: the same for all."
    return Batches(s.data.train.to(s.device), s.batch, flip=True, levels=s.data.levels)

def ours_state(s, precision='float32', layout=None, compiled=False, recorded=False):
    "The package's own training state for the settings `s`; in its own layout, or another."
    cfg = preset('cifar10', batch_size=s.batch, model_args=s.net, precision=precision,
                 compile=compiled, cuda_graph=recorded)
    state = TrainState(cfg, s.data, s.device)
    wake(state.model)
    for net in (state.model, state.ema.model):
        if layout: net.to(memory_format=LAYOUTS[layout])
    return state

def ours_training(s, **kw):
    "One step of `ddpm_train cifar10`."
    state, batches = ours_state(s, **kw), all_batches(s)
    return lambda: training_step(state, batches)

def diffusers_training(s, precision='float32', tuned=False, compiled=False):
    """One step as in examples/unconditional_image_generation.

    `tuned`: with this package's optimizer, average and layout.
    """
    lib = import_diffusers()
    from diffusers.training_utils import EMAModel
    net, sched = diffusers_net(s).to(s.device).train(), lib.DDPMScheduler(1000)
    if tuned: net = net.to(memory_format=torch.channels_last)
    ema = EMAModel(net.parameters(), decay=.9999, use_ema_warmup=True, inv_gamma=1., power=.75,
                   foreach=tuned)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(.95, .999), weight_decay=1e-6,
                            eps=1e-8, fused=tuned or None)
    call = torch.compile(net) if compiled else net
    batches, g, step = all_batches(s), torch.Generator(s.device).manual_seed(0), [0]
    low = precision == 'bfloat16'
    cast = torch.autocast(s.device.type, torch.bfloat16) if low else contextlib.nullcontext()
    def run():
        x, _ = batches(step[0])
        step[0] += 1
        noise = torch.randn(x.shape, generator=g, device=x.device)
        t = torch.randint(0, 1000, (len(x),), generator=g, device=x.device)
        with cast: out = call(sched.add_noise(x, noise, t), t).sample
        loss = F.mse_loss(out.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        ema.step(net.parameters())
    return run

def lucidrains_process(s):
    "Its GaussianDiffusion around its network."
    ddpm = import_lucidrains().GaussianDiffusion(lucidrains_net(s), image_size=32, timesteps=1000)
    return ddpm.to(s.device)

def lucidrains_training(s):
    "One step as in its Trainer."
    ddpm = lucidrains_process(s)
    from ema_pytorch import EMA
    opt = torch.optim.Adam(ddpm.parameters(), lr=1e-4, betas=(.9, .99))
    ema = EMA(ddpm, beta=.995, update_every=10)
    batches, step = all_batches(s), [0]
    def run():
        x, _ = batches(step[0])
        step[0] += 1
        ddpm((x+1)/2).backward()
        torch.nn.utils.clip_grad_norm_(ddpm.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        ema.update()
    return run

# ---- sampling: one call is `s.steps` steps of a batch

def for_sampling(ddpm, precision='float32', compiled=False, recorded=False):
    "The same model with a network that is faster to draw from."
    net = ddpm.model if precision == 'float32' else LowPrecision(ddpm.model, DTYPES[precision])
    if compiled: net = torch.compile(net)
    return replace(ddpm, model=Replayed(net) if recorded else net)

def ours_sampling(s, precision='float32', layout='channels last', **fast):
    "Algorithm 2."
    ddpm = ours_state(s, layout=layout).averaged()
    wake(ddpm.model)
    ddpm = for_sampling(ddpm, precision, **fast)
    ddpm.model.eval()
    g = torch.Generator(s.device).manual_seed(0)
    def run():
        x = torch.randn(s.batch, 3, 32, 32, generator=g, device=s.device)
        for _ in p_sample_progressive(ddpm.sched, ddpm.model, x, g, start=s.steps): pass
    return run

def diffusers_sampling(s, precision='float32', compiled=False):
    "DDPMPipeline; `compiled`: with channels last, too."
    lib = import_diffusers()
    pipe = lib.DDPMPipeline(unet=diffusers_net(s).eval(), scheduler=lib.DDPMScheduler(1000))
    pipe = pipe.to(s.device, DTYPES[precision])
    if compiled: pipe.unet = torch.compile(pipe.unet.to(memory_format=torch.channels_last))
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator(s.device).manual_seed(0)
    return lambda: pipe(batch_size=s.batch, generator=g, num_inference_steps=s.steps,
                        output_type='pt')

def lucidrains_sampling(s):
    "Its p_sample."
    ddpm = lucidrains_process(s).eval()
    def run():
        x = torch.randn(s.batch, 3, 32, 32, device=s.device)
        for t in reversed(range(s.steps)): x, _ = ddpm.p_sample(x, t)
    return run

NETWORKS = {OURS: ours_net, DIFFUSERS: diffusers_net, LUCIDRAINS: lucidrains_net}
MAKERS = {  # group -> name -> what makes the call
    'training': {OURS: ours_training, DIFFUSERS: diffusers_training,
                 LUCIDRAINS: lucidrains_training},
    'sampling': {OURS: ours_sampling, DIFFUSERS: diffusers_sampling,
                 LUCIDRAINS: lucidrains_sampling}}
