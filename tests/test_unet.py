"Properties of the U-Net that no reader of notebook 11 needs to see."
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ddpm_nbdev.unet import Attention, ResBlock, UNet, cifar10_unet, digits_unet, image256_unet, timestep_embedding

SMALL = dict(in_channels=1, ch=8, ch_mult=(1,2), num_res_blocks=1, attn_resolutions=(4,), resolution=8, groups=4)

def awake(model, seed=0):
    "The model with every parameter random, so that no layer is zero."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(.2*torch.randn(p.shape, generator=g) + (p.ndim == 1)*.1)
    return model.eval()

def batch(n=3, c=1, h=8, w=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, h, w, generator=g), torch.randint(1, 1001, (n,), generator=g)

# ---- the whole forward pass, written again as the official code's straight line, on the bare weights

def reference(sd, x, t, levels, nres, attn_levels, ch, groups):
    "Functional forward pass: official order of operations, weights looked up by name."
    W = {k: v.double() for k, v in sd.items()}
    def conv(h, name, **kw): return F.conv2d(h, W[name+'.weight'], W[name+'.bias'], **kw)
    def dense(h, name): return h @ W[name+'.weight'].T + W[name+'.bias']
    def swish(h): return h/(1+torch.exp(-h))
    def norm(h, name):
        b, c = h.shape[:2]
        g = h.reshape(b, groups, -1)
        g = (g - g.mean(2, keepdim=True))/torch.sqrt(g.var(2, unbiased=False, keepdim=True) + 1e-6)
        return g.reshape(h.shape)*W[name+'.weight'].view(1, c, 1, 1) + W[name+'.bias'].view(1, c, 1, 1)
    def res(h, name):
        y = conv(swish(norm(h, name+'.norm1')), name+'.conv1', padding=1)
        y = y + dense(swish(temb), name+'.temb_proj')[:, :, None, None]
        y = conv(swish(norm(y, name+'.norm2')), name+'.conv2', padding=1)
        return y + (conv(h, name+'.shortcut') if name+'.shortcut.weight' in W else h)
    def attn(h, name):
        b, c, hh, ww = h.shape
        n = norm(h, name+'.norm')
        q, k, v = (conv(n, f'{name}.{x}').reshape(b, c, hh*ww) for x in 'qkv')
        w = torch.einsum('bci,bcj->bij', q, k).div(c**.5).softmax(-1)
        return h + conv(torch.einsum('bij,bcj->bci', w, v).reshape(h.shape), name+'.proj_out')

    half = ch//2
    angle = t.double()[:, None]*10000.**(-torch.arange(half).double()/(half-1))
    temb = dense(swish(dense(torch.cat([angle.sin(), angle.cos()], 1), 'temb.0')), 'temb.2')
    hs = [conv(x.double(), 'conv_in', padding=1)]
    for i in range(levels):
        for j in range(nres):
            h = res(hs[-1], f'down.{i}.block.{j}')
            if i in attn_levels: h = attn(h, f'down.{i}.attn.{j}')
            hs.append(h)
        if i < levels-1: hs.append(conv(F.pad(hs[-1], (0,1,0,1)), f'down.{i}.resample.conv', stride=2))
    h = res(attn(res(hs[-1], 'mid.block.0'), 'mid.attn.0'), 'mid.block.1')
    for u, i in enumerate(reversed(range(levels))):
        for j in range(nres+1):
            h = res(torch.cat([h, hs.pop()], 1), f'up.{u}.block.{j}')
            if i in attn_levels: h = attn(h, f'up.{u}.attn.{j}')
        if i: h = conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3), f'up.{u}.resample.conv', padding=1)
    assert not hs
    return conv(swish(norm(h, 'norm_out')), 'conv_out', padding=1)

@pytest.mark.parametrize('mult, nres, attn_levels', [((1,2), 1, [1]), ((1,2,2), 2, [1]), ((1,), 1, []), ((2,1,3), 2, [0, 2])])
@pytest.mark.parametrize('learned', [False, True])
def test_forward_is_the_official_straight_line(mult, nres, attn_levels, learned):
    model = awake(UNet(2, ch=8, ch_mult=mult, num_res_blocks=nres, attn_resolutions=[8>>i for i in attn_levels],
                       resolution=8, groups=4, learned_variance=learned)).double()
    x, t = batch(c=2)
    with torch.no_grad():
        expected = reference(model.state_dict(), x, t, len(mult), nres, attn_levels, 8, 4)
        got = model(x.double(), t)
    assert got.shape == (3, 4 if learned else 2, 8, 8)
    assert_close(got, expected, rtol=1e-3, atol=1e-3*expected.abs().max().item())     # the embedding is float32

# ---- shapes and refusals

@pytest.mark.parametrize('h, w', [(8, 8), (12, 6), (2, 4), (16, 8)])
@pytest.mark.parametrize('c', [1, 3])
def test_any_even_size_gray_or_color(h, w, c):
    model = awake(UNet(**SMALL | dict(in_channels=c)))
    x, t = batch(c=c, h=h, w=w)
    assert model(x, t).shape == x.shape

@pytest.mark.parametrize('h, w', [(7, 8), (8, 7), (9, 9), (1, 1)])
def test_odd_sizes_are_refused(h, w):
    x, t = batch(h=h, w=w)
    with pytest.raises(ValueError, match=f'multiples of 2, got {h}x{w}'): UNet(**SMALL)(x, t)

@pytest.mark.parametrize('shape', [(3, 3, 8, 8), (3, 8, 8), (8, 8)])
def test_wrong_images_are_refused(shape):
    with pytest.raises(ValueError, match='expected images'): UNet(**SMALL)(torch.zeros(shape), torch.ones(3, dtype=torch.long))

@pytest.mark.parametrize('t', [torch.tensor(5), torch.tensor([5]), torch.ones(3, 1)])
def test_wrong_steps_are_refused(t):
    with pytest.raises(ValueError, match='expected steps'): UNet(**SMALL)(batch()[0], t)

@pytest.mark.parametrize('bad, message', [
    (dict(ch_mult=()), 'at least one level'), (dict(resolution=9), 'multiple of 2, got 9'), (dict(groups=3), 'groups=3'),
    (dict(groups=8), 'groups=8'), (dict(attn_resolutions=(16,)), r'levels are \[8, 4\]'), (dict(ch_mult=(1,2,2,2,2)), 'multiple of 16'),
])
def test_wrong_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message): UNet(**SMALL | bad)

@pytest.mark.parametrize('dim', [1, 2, 3, 5])
def test_embedding_refuses_dims_without_two_frequencies(dim):
    with pytest.raises(ValueError, match='even dim'): timestep_embedding(torch.ones(1), dim)

def test_out_channels_are_free():
    x, t = batch(c=3)
    assert UNet(**SMALL | dict(in_channels=3, out_channels=1))(x, t).shape == (3, 1, 8, 8)
    assert UNet(**SMALL | dict(in_channels=3, out_channels=1, learned_variance=True))(x, t).shape == (3, 2, 8, 8)

# ---- numbers

@pytest.mark.parametrize('learned', [False, True])
def test_zero_at_init(learned):
    x, t = batch()
    assert UNet(**SMALL, learned_variance=learned)(x, t).abs().max() == 0

def test_images_of_a_batch_do_not_meet():
    model, (x, t) = awake(UNet(**SMALL)), batch(n=4)
    with torch.no_grad():
        together = model(x, t)
        for i in range(4): assert_close(model(x[i:i+1], t[i:i+1]), together[i:i+1], rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-3), (torch.bfloat16, .1)])
def test_dtypes(dtype, tolerance):
    model, (x, t) = awake(UNet(**SMALL)), batch()
    with torch.no_grad():
        expected = model(x, t)
        got = copy.deepcopy(model).to(dtype)(x.to(dtype), t)
    assert got.dtype == dtype
    assert (got.double()-expected.double()).pow(2).mean().sqrt() < tolerance*expected.std()

def test_bfloat16_autocast():
    model, (x, t) = awake(UNet(**SMALL)), batch()
    with torch.no_grad():
        expected = model(x, t)
        with torch.autocast('cpu', dtype=torch.bfloat16): got = model(x, t)
    assert (got.float()-expected).pow(2).mean().sqrt() < .1*expected.std()

def test_channels_last_changes_nothing():
    model, (x, t) = awake(UNet(**SMALL)), batch()
    with torch.no_grad():
        expected = model(x, t)
        got = copy.deepcopy(model).to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t)
    assert_close(got, expected, rtol=1e-3, atol=1e-3)

def test_dropout_only_in_training_and_only_between_swish_and_conv2():
    model, (x, t) = UNet(**SMALL, dropout=.5), batch()
    awake(model)
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x, t))
        model.train()
        assert not torch.equal(model(x, t), model(x, t))
    places = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)]
    assert places == [f'{name}.dropout' for name, m in model.named_modules() if isinstance(m, ResBlock)]
    assert all(m.p == .5 for m in model.modules() if isinstance(m, torch.nn.Dropout))

def test_every_parameter_is_used():
    model, (x, t) = awake(UNet(**SMALL)), batch()
    model(x, t).pow(2).sum().backward()
    for name, p in model.named_parameters():
        if not name.endswith('.k.bias'): assert p.grad.abs().max() > 0, name      # the softmax cancels the keys' bias

def test_the_rng_is_touched_only_by_dropout():
    model, (x, t) = awake(UNet(**SMALL)), batch()
    state = torch.get_rng_state()
    model(x, t)
    assert torch.equal(torch.get_rng_state(), state)

# ---- configuration

@pytest.mark.parametrize('make', [digits_unet, cifar10_unet, image256_unet])
@pytest.mark.parametrize('kw', [{}, dict(learned_variance=True), dict(in_channels=4, dropout=.25)])
def test_config_round_trip(make, kw):
    with torch.device('meta'):
        model = make(**kw)
        again = UNet(**json.loads(json.dumps(model.config)))
    assert again.config == model.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}

def test_paper_configurations_are_the_official_ones():
    with torch.device('meta'): small, large = cifar10_unet(), image256_unet()
    assert small.config['dropout'] == .1 and large.config['dropout'] == 0
    for model in (small, large):
        assert all(m.num_groups == 32 and m.eps == 1e-6 for m in model.modules() if isinstance(m, torch.nn.GroupNorm))
        assert sum(isinstance(m, Attention) for m in model.modules()) == 6

def test_weight_names_stay():
    "Saved weights are found by these names: renaming one breaks every checkpoint."
    names = set(UNet(**SMALL).state_dict())
    for name in ('temb.0.weight', 'temb.2.bias', 'conv_in.weight', 'down.0.block.0.norm1.weight', 'down.0.block.0.conv1.weight',
                 'down.0.block.0.temb_proj.weight', 'down.0.block.0.norm2.bias', 'down.0.block.0.conv2.weight', 'down.0.resample.conv.weight',
                 'down.1.block.0.shortcut.weight', 'down.1.attn.0.norm.weight', 'down.1.attn.0.q.weight', 'down.1.attn.0.k.weight',
                 'down.1.attn.0.v.weight', 'down.1.attn.0.proj_out.weight', 'mid.block.0.conv1.weight', 'mid.attn.0.q.weight',
                 'mid.block.1.conv1.weight', 'up.0.block.1.conv1.weight', 'up.0.resample.conv.weight', 'norm_out.weight', 'conv_out.weight'):
        assert name in names, name
