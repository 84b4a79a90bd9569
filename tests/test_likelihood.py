"Bits per dimension: every term against the official algorithm written again, against models whose bound is known, and at every odd shape."
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import log_ndtr
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_nbdev.ddpm import DDPM
from ddpm_nbdev.decoder import to_model_range
from ddpm_nbdev.likelihood import evaluate_bits_per_dim, perfect_mean_cost, rate_distortion
from ddpm_nbdev.machines import Autocast
from ddpm_nbdev.noise import indexed_noise
from ddpm_nbdev.posterior import posterior_coefs, posterior_variance
from ddpm_nbdev.schedule import linear_schedule, quadratic_schedule

MEANS, VARIANCES = ("eps", "x0", "mu"), ("beta", "beta_tilde", "learned", "optimal")
TWELVE = [(m, v) for m in MEANS for v in VARIANCES]
BIT = math.log(2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def key_of(seed):
    "The number that an evaluation draws from its generator."
    return int(torch.randint(2**62, (1,), generator=seeded(seed)))


def gray(n, shape, levels, seed=0):
    "Random gray levels as integers."
    return torch.from_numpy(np.random.default_rng(seed).integers(0, levels, (n, *shape)).astype(np.uint8 if levels <= 256 else np.int32))


def scaled(x, levels):
    "Gray levels as floats in [-1, 1], float64."
    return x.double()*2/(levels-1) - 1


def noise_of(seed, like, T, index=None):
    "The noise of every (t, image), `(T, n, ...)`, as NumPy; row t is the paper's t+1."
    index = torch.arange(len(like)) if index is None else index
    return np.stack([indexed_noise(key_of(seed), index, torch.full_like(index, t), like).numpy() for t in range(1, T+1)])


# ---- the official algorithm, written again in NumPy: nothing below this line up to the next comes from the package

def official(x0, noise, net, betas, mean, variance, levels, measured=None):
    """bits/dim of the official TensorFlow code in float64 (t = 0..T-1; the network is shown t+1), with the exact normal CDF
    where that has a tanh: terms `(n, T)`, prior `(n,)`, mse `(n, T)`, total `(n,)`, and how often x_0-hat was clamped.
    It knows no variance "optimal": that is added by its formula, of Bao et al., with the `measured` errors `(T,)`."""
    T, n = len(betas), len(x0)
    flat = lambda v: v.reshape(n, -1).mean(1)
    alphas_bar = np.cumprod(1-betas, axis=0)
    alphas_bar_prev = np.append(1., alphas_bar[:-1])
    posterior_variance = betas*(1-alphas_bar_prev)/(1-alphas_bar)
    first = posterior_variance[1] if T > 1 else betas[0]                    # the official code needs T > 1
    posterior_log_variance_clipped = np.log(np.append(first, posterior_variance[1:]))
    coef1 = betas*np.sqrt(alphas_bar_prev)/(1-alphas_bar)
    coef2 = (1-alphas_bar_prev)*np.sqrt(1-betas)/(1-alphas_bar)

    def normal_kl(mean1, logvar1, mean2, logvar2):
        return .5*(-1. + logvar2 - logvar1 + np.exp(logvar1-logvar2) + (mean1-mean2)**2*np.exp(-logvar2))

    def decoder(x, means, log_variance):
        inv_std, half = np.exp(-.5*log_variance), 1/(levels-1)
        hi, lo = (x-means+half)*inv_std, (x-means-half)*inv_std
        lo, hi = np.where(lo+hi > 0, -hi, lo), np.where(lo+hi > 0, -lo, hi)  # by symmetry: to the tail with digits in it
        mid = log_ndtr(hi) + np.log1p(-np.exp(log_ndtr(lo)-log_ndtr(hi)))
        edge = half/2
        return np.where(x < -1+edge, log_ndtr((x-means+half)*inv_std), np.where(x > 1-edge, log_ndtr(-(x-means-half)*inv_std), mid))

    tables = {"beta": np.log(np.append(first, betas[1:])), "beta_tilde": posterior_log_variance_clipped}
    if variance == "optimal": tables["optimal"] = np.log(posterior_variance + coef1**2*measured)
    terms, mse, clamped = np.empty((n, T)), np.empty((n, T)), []
    for t in reversed(range(T)):
        xt = np.sqrt(alphas_bar[t])*x0 + np.sqrt(1-alphas_bar[t])*noise[t]
        out = net(xt, np.full(n, t+1))
        if variance == "learned": out, log_variance = np.split(out, 2, axis=1)
        else: log_variance = tables[variance][t]*np.ones_like(xt)
        if mean == "mu": pred = out/coef1[t] - coef2[t]/coef1[t]*xt
        elif mean == "x0": pred = out
        else: pred = np.sqrt(1/alphas_bar[t])*xt - np.sqrt(1/alphas_bar[t] - 1)*out
        clamped.append((np.abs(pred) > 1).mean())
        pred = np.clip(pred, -1., 1.)
        model_mean = out if mean == "mu" else coef1[t]*pred + coef2[t]*xt
        true_mean = coef1[t]*x0 + coef2[t]*xt
        kl = flat(normal_kl(true_mean, posterior_log_variance_clipped[t], model_mean, log_variance))
        terms[:, t] = (-flat(decoder(x0, model_mean, log_variance)) if t == 0 else kl)/np.log(2.)
        mse[:, t] = flat((pred-x0)**2)
    qt_mean, qt_log_variance = np.sqrt(alphas_bar[-1])*x0, np.log(1-alphas_bar[-1])
    prior = flat(normal_kl(qt_mean, qt_log_variance, 0., 0.))/np.log(2.)
    return terms, prior, mse, terms.sum(1) + prior, np.array(clamped[::-1])


# ---- all twelve combinations

class Net(nn.Module):
    "Two layers over the pixels and t, float64 inside whatever comes in. With `learned` also raw log-variances around -4."
    def __init__(self, shape, T, mean="eps", learned=False, seed=0, hidden=16, size=1.):
        super().__init__()
        g, d = np.random.default_rng(seed), math.prod(shape)
        weights = dict(A=g.normal(size=(d, hidden))/d**.5, a=g.normal(size=hidden), B=g.normal(size=(hidden, d))*size/hidden**.5,
                       C=g.normal(size=(hidden, d))*.5/hidden**.5)
        for k, v in weights.items(): self.register_parameter(k, nn.Parameter(torch.from_numpy(v)))
        self.T, self.skip, self.learned = T, float(mean == "mu"), learned

    def forward(self, xt, t):
        x = xt.double().flatten(1)
        h = (x @ self.A + t.double()[:, None]/self.T*self.a).tanh()
        outs = [h @ self.B + self.skip*x] + ([h @ self.C - 4] if self.learned else [])
        return torch.cat([o.reshape(xt.shape) for o in outs], 1).to(xt.dtype)

    def numpy(self):
        "The same function of arrays, from the bare weights."
        W, T, skip, learned = {k: p.detach().numpy() for k, p in self.named_parameters()}, self.T, self.skip, self.learned
        def net(xt, t):
            x = xt.reshape(len(xt), -1)
            h = np.tanh(x @ W["A"] + (t/T)[:, None]*W["a"])
            outs = [h @ W["B"] + skip*x] + ([h @ W["C"] - 4] if learned else [])
            return np.concatenate([o.reshape(xt.shape) for o in outs], 1)
        return net


def some_mse(T):
    "A table of errors that rises with t, as `DDPM` takes it."
    return torch.cat([torch.tensor([math.nan]), torch.linspace(.01, .4, T).sqrt()]).double()


def make(shape=(1, 4, 4), T=12, mean="eps", variance="beta", levels=256, seed=0, sched=None, size=1.):
    sched = sched or linear_schedule(T, 1e-3, .3)
    return DDPM(Net(shape, sched.T, mean, variance == "learned", seed, size=size), sched, shape, mean=mean, variance=variance, levels=levels,
                mse=some_mse(sched.T) if variance == "optimal" else None)


def reference(ddpm, x0, seed):
    "The official algorithm on the weights, tables and noise of an evaluation."
    T = ddpm.sched.T
    return official(x0.numpy(), noise_of(seed, x0, T), ddpm.model.numpy(), ddpm.sched.beta[1:].numpy(), ddpm.mean, ddpm.variance, ddpm.levels,
                    None if ddpm.mse is None else ddpm.mse[1:].numpy())


def per_pair(ddpm, x0, seed, **kw):
    "Terms in bits/dim and mse of every (image, t) from `bound_terms`, `(n, T)`."
    terms, mse = torch.full((2, len(x0), ddpm.sched.T), math.nan, dtype=torch.float64)
    for i, t, w, nats, p in ddpm.bound_terms(x0, key_of(seed), torch.arange(len(x0)), **kw):
        assert (w == 1).all() and terms[i, t-1].isnan().all()
        terms[i, t-1], mse[i, t-1] = nats.double()/BIT, ((p.x0-x0[i])**2).flatten(1).mean(1).double()
    return terms.numpy(), mse.numpy()


@pytest.mark.parametrize("levels", [17, 256])
@pytest.mark.parametrize("mean, variance", TWELVE)
def test_every_term_is_the_official_one(mean, variance, levels):
    n, shape, seed = 5, (2, 4, 3), 7
    ddpm = make(shape, 12, mean, variance, levels, seed=3)
    ints = gray(n, shape, levels)
    ints[0], ints[1] = 0, levels-1                                          # black and white: the open-ended bins
    x0 = scaled(ints, levels)
    terms, prior, mse, total, clamped = reference(ddpm, x0, seed)
    assert clamped.max() > .03 and clamped.min() < .97                      # the clamp has something to do, and something to leave alone
    ours, our_mse = per_pair(ddpm, x0, seed)
    np.testing.assert_allclose(ours, terms, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours, terms, rtol=1e-9, atol=1e-9)           # what float64 can do
    np.testing.assert_allclose(our_mse, mse, rtol=1e-10)
    r = evaluate_bits_per_dim(ddpm, x0, seeded(seed))
    assert (r.n, r.levels) == (n, levels)
    assert np.isnan([r.terms[0], r.mse[0], r.errors[0]]).all() and r.counts.tolist() == [0] + 12*[n]
    np.testing.assert_allclose(r.terms[1:], terms.mean(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(r.errors[1:], terms.std(0, ddof=1)/n**.5, rtol=1e-6)
    np.testing.assert_allclose(r.mse[1:], mse.mean(0), rtol=1e-9)
    want = prior.mean(), terms[:, 1:].sum(1).mean(), terms[:, 0].mean(), total.mean()
    np.testing.assert_allclose([r.L_T, r.L_mid, r.L_0, r.total], want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(r.total_error, total.std(ddof=1)/n**.5, rtol=1e-6)
    b = ddpm.bits_per_dim(x0, seeded(seed))
    for got, want in zip(b, (total, prior, terms[:, 1:].sum(1), terms[:, 0])): np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mean, variance", TWELVE)
def test_float32_from_uint8_stays_close(mean, variance):
    "The way a user calls it: integers in, float32 arithmetic. The error is relative to terms of up to hundreds of bits."
    n, shape, seed, levels = 6, (1, 4, 4), 8, 256
    ddpm = make(shape, 12, mean, variance, levels, seed=4, sched=quadratic_schedule(12, 1e-3, .4))
    ints = gray(n, shape, levels, seed=1)
    x0 = scaled(ints, levels)
    terms, prior, mse, total, _ = reference(ddpm, x0, seed)
    r = evaluate_bits_per_dim(ddpm, ints, seeded(seed))
    np.testing.assert_allclose(r.terms[1:], terms.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(r.mse[1:], mse.mean(0), rtol=1e-5)
    np.testing.assert_allclose([r.L_T, r.total], [prior.mean(), total.mean()], rtol=1e-5)


def test_float32_at_the_paper_schedule_is_exact_to_1e_5_bits():
    "T = 1000, terms of the size that a trained network has: here float32 must not cost anything that one could see."
    class Near(nn.Module):                                                  # x_0-hat = middle gray: off by the data's spread, not by 1000 bits
        def forward(self, xt, t): return torch.zeros_like(xt) + .01*torch.sin(t.to(xt.dtype)/50).reshape(-1, 1, 1, 1)
    ints = 120 + gray(3, (1, 3, 3), 16)
    ddpm, x0 = DDPM(Near(), linear_schedule(), (1, 3, 3), mean="x0"), scaled(ints, 256)
    net = lambda xt, t: np.zeros_like(xt) + .01*np.sin(t/50).reshape(-1, 1, 1, 1)
    terms, prior, _, total, _ = official(x0.numpy(), noise_of(0, x0, 1000), net, ddpm.sched.beta[1:].numpy(), "x0", "beta", 256)
    r = evaluate_bits_per_dim(ddpm, ints, seeded())
    np.testing.assert_allclose(r.terms[1:], terms.mean(0), rtol=0, atol=1e-5)
    assert abs(r.total - total.mean()) < 1e-4                               # a thousand of them
    np.testing.assert_allclose(r.L_T, prior.mean(), rtol=1e-6)              # it is computed in float64: 4e-8 bits, and six digits right


def test_the_clamp_reaches_the_mean_of_eps_and_x0_but_not_of_mu():
    shape, T = (1, 2, 2), 8
    for mean in MEANS:
        ddpm = make(shape, T, mean, seed=5, size=8.)
        xt, t = torch.randn(T, *shape, generator=seeded(), dtype=torch.float64), torch.arange(1, T+1)
        clipped, free = ddpm.p(xt, t), ddpm.p(xt, t, clip=False)
        outside = free.x0.abs() > 1
        assert outside.any() and (clipped.x0.abs() <= 1).all()
        if mean == "mu": assert torch.equal(clipped.mean, free.mean)
        else: assert (clipped.mean[outside] != free.mean[outside]).all() and torch.equal(clipped.mean[~outside], free.mean[~outside])


# ---- models whose bound is known: x_0-hat is linear in x_t, so every term is a quadratic of one Gaussian per pixel

class Linear:
    "x_0-hat = a_t x_t + b, said as eps, x_0 or mu-tilde; log-variance from a table if learned. Exact expectation and variance of every term."
    def __init__(self, T=20, levels=256, mean="eps", variance="beta", shape=(1, 2, 2)):
        self.sched = linear_schedule(T, 1e-3, .35)
        self.beta, self.abar = self.sched.beta.numpy(), self.sched.alpha_bar.numpy()
        prev = np.append(1., self.abar[:-1])
        with np.errstate(invalid="ignore", divide="ignore"):
            self.tilde = self.beta*(1-prev)/(1-self.abar)
            self.c0, self.ct = np.sqrt(prev)*self.beta/(1-self.abar), np.sqrt(1-self.beta)*(1-prev)/(1-self.abar)
        var = np.square(.15)
        self.a = .9*np.sqrt(self.abar)*var/(self.abar*var + 1-self.abar)     # nine tenths of the best: an imperfect model
        self.b = np.linspace(-.05, .05, math.prod(shape)).reshape(shape)
        first = self.tilde[2]
        self.table = np.where(np.arange(T+1) > 0, .15**2*(1-self.abar)/(self.abar*.15**2 + 1-self.abar + 1e-99), np.nan)
        optimal = np.where(np.arange(T+1) > 1, self.tilde, 0) + self.c0**2*self.table
        self.sigma2 = {"beta": self.beta, "beta_tilde": self.tilde, "learned": 1.3*self.beta, "optimal": optimal}[variance].copy()
        if variance.startswith("beta"): self.sigma2[1] = first
        self.mean, self.variance, self.levels, self.shape = mean, variance, levels, shape
        self.ddpm = DDPM(self.model, self.sched, shape, mean=mean, variance=variance, levels=levels,
                         mse=torch.from_numpy(self.table) if variance == "optimal" else None)

    def model(self, xt, t):
        at = lambda table: torch.from_numpy(table)[t].reshape(-1, 1, 1, 1)
        pred = at(self.a)*xt + torch.from_numpy(self.b)
        assert pred.abs().max() < 1                                          # never clamped: the process stays Gaussian
        out = {"x0": lambda: pred, "mu": lambda: at(self.c0)*pred + at(self.ct)*xt,
               "eps": lambda: (xt - at(self.abar).sqrt()*pred)/(1-at(self.abar)).sqrt()}[self.mean]()
        return torch.cat([out, at(self.sigma2).log().expand_as(out)], 1) if self.variance == "learned" else out

    def exact(self, x0):
        "Expectation and variance over the noise of each term `(n, T)`, of x_0-hat's mse `(n, T)`, and L_T `(n,)`; bits/dim."
        x0, n, T = x0.numpy(), len(x0), self.sched.T
        dims = math.prod(self.shape)
        terms, var, mse = np.empty((3, n, T))
        z, weight = hermegauss(80)
        weight = weight/weight.sum()
        for t in range(1, T+1):
            u, v = (self.a[t]*np.sqrt(self.abar[t]) - 1)*x0 + self.b, self.a[t]*np.sqrt(1-self.abar[t])   # x_0-hat - x_0 = u + v eps
            if t == 1:                                                       # one integral per pixel, over the noise
                half, sigma = 1/(self.levels-1), np.sqrt(self.sigma2[1])
                off = (u[..., None] + v*z)/sigma
                f = -log_interval(-half/sigma - off, half/sigma - off)
                mean, second = f @ weight, f**2 @ weight
                spread = second - mean**2
            else:
                k = .5*self.c0[t]**2/self.sigma2[t]
                mean = .5*np.log(self.sigma2[t]/self.tilde[t]) + .5*self.tilde[t]/self.sigma2[t] - .5 + k*(u**2 + v**2)
                spread = k**2*(4*u**2*v**2 + 2*v**4)
            terms[:, t-1] = mean.reshape(n, -1).mean(1)/BIT
            var[:, t-1] = spread.reshape(n, -1).sum(1)/dims**2/BIT**2
            mse[:, t-1] = (u**2 + v**2).reshape(n, -1).mean(1)
        last = self.abar[-1]
        L_T = .5*(-np.log(1-last) - last + last*x0**2).reshape(n, -1).mean(1)/BIT
        return terms, var, mse, L_T


def log_interval(lo, hi):
    lo, hi = np.where(lo+hi > 0, -hi, lo), np.where(lo+hi > 0, -lo, hi)
    return log_ndtr(hi) + np.log1p(-np.exp(log_ndtr(lo)-log_ndtr(hi)))


def near_gray(n, shape=(1, 2, 2), levels=256, seed=0):
    "Images around middle gray, standard deviation .15, on the grid."
    z = np.random.default_rng(seed).normal(size=(n, *shape)).clip(-3, 3)
    return scaled(torch.from_numpy(np.round((.15*z + 1)/2*(levels-1))), levels)


@pytest.mark.parametrize("mean, variance, levels", [("eps", "beta", 256), ("x0", "beta_tilde", 17), ("mu", "learned", 256), ("eps", "optimal", 256)])
def test_monte_carlo_meets_the_closed_form(mean, variance, levels):
    model, n = Linear(levels=levels, mean=mean, variance=variance), 1500
    x0 = near_gray(n, levels=levels)
    terms, var, mse, L_T = model.exact(x0)
    r = evaluate_bits_per_dim(model.ddpm, x0, seeded(1))
    error = np.sqrt(var.sum(0))/n                                            # of the mean over these images, each t
    assert abs(r.total - (terms.sum(1)+L_T).mean()) < 5*np.sqrt((error**2).sum())
    assert abs(r.L_mid - terms[:, 1:].sum(1).mean()) < 5*np.sqrt((error[1:]**2).sum())
    assert abs(r.L_0 - terms[:, 0].mean()) < 5*error[0]
    assert (np.abs(r.terms[1:].numpy() - terms.mean(0)) < 5*error).all()
    np.testing.assert_allclose(r.L_T, L_T.mean(), rtol=1e-12)
    np.testing.assert_allclose(r.mse[1:], mse.mean(0), rtol=.1)
    spread = np.sqrt((var.mean(0) + terms.var(0))/n)                              # images differ, and so does their noise
    np.testing.assert_allclose(r.errors[1:], spread, rtol=.15)
    np.testing.assert_allclose(r.total_error, np.sqrt((var.sum(1).mean() + (terms.sum(1)+L_T).var())/n), rtol=.1)


def test_reported_errors_are_those_of_the_noise_if_all_images_are_the_same():
    model, n = Linear(), 4000
    x0 = near_gray(1).expand(n, -1, -1, -1)
    _, var, _, _ = model.exact(x0[:1])
    r = evaluate_bits_per_dim(model.ddpm, x0, seeded(2))
    np.testing.assert_allclose(r.total_error, np.sqrt(var.sum()/n), rtol=.07)
    np.testing.assert_allclose(r.errors[1:], np.sqrt(var[0]/n), rtol=.15)


@pytest.mark.parametrize("steps", [None, 3])
def test_the_estimate_is_unbiased_over_seeds(steps):
    model, seeds = Linear(T=12), 300
    x0 = near_gray(3, seed=4)
    terms, var, _, L_T = model.exact(x0)
    results = [evaluate_bits_per_dim(model.ddpm, x0, seeded(s), steps=steps) for s in range(seeds)]
    totals, zeros = np.array([r.total for r in results]), np.array([r.L_0 for r in results])
    want, exact_sd = (terms.sum(1)+L_T).mean(), np.sqrt(var.sum())/3
    sd = totals.std(ddof=1)
    assert abs(totals.mean() - want) < 4*sd/seeds**.5
    assert abs(zeros.mean() - terms[:, 0].mean()) < 4*np.sqrt(var[:, 0].sum())/3/seeds**.5
    if steps is None: np.testing.assert_allclose(sd, exact_sd, rtol=.15)
    else: assert sd > 1.5*exact_sd                                           # the choice of t adds variance, and no bias


@pytest.mark.parametrize("steps", [1, 2, 5, 18])
def test_random_steps_agree_with_the_exact_sum(steps):
    model, n = Linear(T=20), 2500
    x0 = near_gray(n, seed=5)
    every, some = (evaluate_bits_per_dim(model.ddpm, x0, seeded(3), steps=k) for k in (None, steps))
    assert abs(some.total - every.total) < 5*math.hypot(some.total_error, every.total_error)
    assert some.L_0 == pytest.approx(every.L_0, rel=1e-12) and some.L_T == pytest.approx(every.L_T, rel=1e-12)   # t = 1 is always there
    terms, var, _, L_T = model.exact(x0)
    assert abs(some.total - (terms.sum(1)+L_T).mean()) < 5*some.total_error
    assert some.counts.sum() == n*(steps+1) and some.counts[1] == n and (some.counts[2:] > 0).all()
    close = np.abs(some.terms[1:].numpy() - terms.mean(0)) < 5*some.errors[1:].numpy()      # each t's mean is over those drawn
    assert close.all()


def test_more_random_steps_mean_a_smaller_error():
    model, x0 = Linear(T=20), near_gray(2000, seed=6)
    errors = [evaluate_bits_per_dim(model.ddpm, x0, seeded(4), steps=k).total_error for k in (1, 4, 16)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("T, steps", [(1, 1), (1, 7), (2, 1), (5, 4), (5, 100)])
def test_enough_steps_are_the_exact_sum(T, steps):
    ddpm, x = make(T=T), gray(4, (1, 4, 4), 256)
    same(evaluate_bits_per_dim(ddpm, x, seeded(), steps=steps), evaluate_bits_per_dim(ddpm, x, seeded()), exact=True)


# ---- shapes, levels, lengths

def same(a, b, exact=False, rtol=1e-9):
    "Two results agree."
    for k in a.__dataclass_fields__:
        u, v = getattr(a, k), getattr(b, k)
        if not isinstance(u, torch.Tensor): u, v = torch.tensor(u), torch.tensor(v)
        if exact: torch.testing.assert_close(u, v, rtol=0, atol=0, equal_nan=True)
        else: torch.testing.assert_close(u.double(), v.double(), rtol=rtol, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("n, shape, T, levels", [
    (3, (1, 4, 4), 10, 256), (3, (3, 4, 4), 10, 256), (3, (3, 2, 5), 10, 256), (3, (1, 5, 2), 10, 17),
    (1, (1, 4, 4), 10, 256), (1, (3, 3, 3), 1000, 256),
    (3, (1, 3, 3), 1, 256), (3, (1, 3, 3), 2, 256), (2, (1, 3, 3), 1, 2), (2, (3, 3, 2), 2, 2), (2, (1, 1, 1), 5, 256), (4, (1, 4, 4), 10, 2),
    (3, (1, 4, 4), 10, 65536), (2, (3, 2, 3), 1, 65536), (3, (2,), 10, 256)])
@pytest.mark.parametrize("mean, variance", [("eps", "beta"), ("mu", "learned")])
def test_shapes_lengths_and_levels(n, shape, T, levels, mean, variance):
    ddpm, x = make(shape, T, mean, variance, levels, sched=linear_schedule(T, 1e-3, .3 if T < 100 else .02)), gray(n, shape, levels)
    x0 = scaled(x, levels)
    terms, prior, mse, total, _ = reference(ddpm, x0, 0)
    r = evaluate_bits_per_dim(ddpm, x0, seeded())
    np.testing.assert_allclose(r.terms[1:], terms.mean(0), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(r.mse[1:], mse.mean(0), rtol=1e-7)
    np.testing.assert_allclose([r.total, r.L_T, r.L_0], [total.mean(), prior.mean(), terms[:, 0].mean()], rtol=1e-7)
    assert r.L_mid == pytest.approx(terms[:, 1:].sum(1).mean()) and (T > 1 or r.L_mid == 0)
    assert r.total == pytest.approx(r.L_T + r.L_mid + r.L_0, rel=1e-12) and r.terms[1:].sum().item() == pytest.approx(r.L_mid + r.L_0, rel=1e-12)
    assert len(r.terms) == len(r.errors) == len(r.mse) == len(r.counts) == T+1 and r.counts[1:].eq(n).all()
    ints, floats = (evaluate_bits_per_dim(ddpm, v, seeded()) for v in (x, to_model_range(x, levels)))
    same(ints, floats, exact=True)
    assert ints.total == pytest.approx(r.total, rel=1e-4)                    # float32 all along
    b = ddpm.bits_per_dim(x0, seeded())
    np.testing.assert_allclose([v.mean() for v in b], [r.total, r.L_T, r.L_mid, r.L_0], rtol=1e-12)
    assert json.loads(json.dumps(r.to_dict(), allow_nan=False))["counts"] == r.counts.tolist()


def test_finer_gray_levels_cost_their_bits():
    "A pixel among 65536 levels instead of 256: eight more bits in L_0 once the bins are much finer than sigma, nothing elsewhere."
    shape, sched = (1, 3, 3), linear_schedule(5, .2, .3)
    x = 50 + gray(3, shape, 150).int()
    fine, coarse = (evaluate_bits_per_dim(make(shape, levels=k, sched=sched), scaled(x*((k-1)//255), k), seeded()) for k in (65536, 256))
    assert fine.L_mid == pytest.approx(coarse.L_mid, rel=1e-9) and fine.L_0 - coarse.L_0 == pytest.approx(math.log2(65535/255), abs=1e-3)


# ---- what must not change the result

@pytest.fixture(scope="module")
def case():
    return make((1, 4, 4), 30), scaled(gray(23, (1, 4, 4), 256), 256)


@pytest.mark.parametrize("steps", [None, 1, 6])
@pytest.mark.parametrize("batch_size", [1, 7, 30, 64, 10_000])
def test_batch_size(case, batch_size, steps):
    ddpm, x0 = case
    same(evaluate_bits_per_dim(ddpm, x0, seeded(), steps, batch_size), evaluate_bits_per_dim(ddpm, x0, seeded(), steps))


@pytest.mark.parametrize("steps", [None, 4])
def test_order_and_parts(case, steps):
    ddpm, x0 = case
    whole, index = evaluate_bits_per_dim(ddpm, x0, seeded(), steps), torch.arange(len(x0))
    order = torch.randperm(len(x0), generator=seeded(9))
    same(evaluate_bits_per_dim(ddpm, x0[order], seeded(), steps, 50, order), whole)
    parts = [(p, evaluate_bits_per_dim(ddpm, x0[p], seeded(), steps, index=index[p])) for p in (slice(0, 11), slice(11, 23))]
    for k in ("total", "L_T", "L_mid", "L_0"): assert sum(r.n*getattr(r, k) for _, r in parts)/len(x0) == pytest.approx(getattr(whole, k), rel=1e-10)
    for k in ("terms", "mse"):
        torch.testing.assert_close(sum(r.counts*getattr(r, k).nan_to_num() for _, r in parts)/whole.counts, getattr(whole, k), equal_nan=True)
    assert torch.equal(sum(r.counts for _, r in parts), whole.counts)
    unmoved = evaluate_bits_per_dim(ddpm, x0[11:], seeded(), steps)                                    # without its index the half has other noise
    assert abs(unmoved.total - parts[1][1].total) > 1e-3


def test_a_subset_shares_its_noise_with_the_exact_sum():
    "steps=k evaluates some of the very pairs that steps=None evaluates."
    ddpm, x0 = make(T=30), scaled(gray(1, (1, 4, 4), 256), 256)
    every, some = (evaluate_bits_per_dim(ddpm, x0, seeded(), k) for k in (None, 5))
    drawn = some.counts > 0
    assert 2 <= drawn.sum() <= 6
    torch.testing.assert_close(some.terms[drawn], every.terms[drawn])


def test_the_generator_decides(case):
    ddpm, x0 = case
    g = seeded(5)
    first, second = evaluate_bits_per_dim(ddpm, x0, g), evaluate_bits_per_dim(ddpm, x0, g)
    same(first, evaluate_bits_per_dim(ddpm, x0, seeded(5)), exact=True)
    assert first.total != second.total
    g, h = seeded(5), seeded(5)
    evaluate_bits_per_dim(ddpm, x0, g, batch_size=3)
    torch.randint(2**62, (1,), generator=h)
    assert torch.equal(g.get_state(), h.get_state())                         # one number, however much is evaluated
    state = torch.get_rng_state()
    evaluate_bits_per_dim(ddpm, x0, seeded(5))
    assert torch.equal(torch.get_rng_state(), state)                         # nothing global
    torch.manual_seed(5)
    same(first, evaluate_bits_per_dim(ddpm, x0), exact=True)                 # unless asked for


def test_nothing_is_left_behind():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop, self.modes = nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(.5), []
        def forward(self, xt, t):
            self.modes.append(self.training)
            return self.drop(self.conv(xt))
    ddpm, x = DDPM(Dropping(), linear_schedule(5), (1, 4, 4)), gray(2, (1, 4, 4), 256)
    model, before = ddpm.model, x.clone()
    for train in (True, False):
        for kw in ({}, dict(autocast=torch.bfloat16), dict(steps=1)):
            model.train(train)
            first, second = (evaluate_bits_per_dim(ddpm, x, seeded(), **kw) for _ in range(2))
            same(first, second, exact=True)                                  # dropout is off
            assert not any(model.modes) and model.drop.training == model.training == train, f"left in another mode: train={train}, {kw}"
    assert ddpm.model is model and torch.equal(x, before)
    assert not first.terms.requires_grad and all(p.grad is None for p in model.parameters())


def test_a_model_without_parameters():
    ddpm, x = DDPM(lambda xt, t: .9*xt, linear_schedule(10), (1, 4, 4)), gray(3, (1, 4, 4), 256)
    for cast in (None, torch.bfloat16): assert math.isfinite(evaluate_bits_per_dim(ddpm, x, seeded(), autocast=cast).total)


def test_progress_bar_changes_nothing(case, capsys):
    ddpm, x0 = case
    same(evaluate_bits_per_dim(ddpm, x0, seeded(), 3, 50, progress=True), evaluate_bits_per_dim(ddpm, x0, seeded(), 3, 50), exact=True)


# ---- lower precision inside the network only

class Conv(nn.Module):
    "A small float32 network that notes what it computes in."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.seen = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1), set()

    def forward(self, xt, t):
        h = self.inner(xt + t.reshape(-1, 1, 1, 1)/100).tanh()
        self.seen.add(h.dtype)
        return self.outer(h)


def test_bfloat16_is_close_and_stays_inside():
    ddpm, x = DDPM(Conv(), linear_schedule(40, 1e-3, .2), (1, 6, 6)), gray(20, (1, 6, 6), 256)
    full = evaluate_bits_per_dim(ddpm, x, seeded())
    assert ddpm.model.seen == {torch.float32}
    ddpm.model.seen.clear()
    half = evaluate_bits_per_dim(ddpm, x, seeded(), autocast=torch.bfloat16)
    assert ddpm.model.seen == {torch.bfloat16}
    assert half.total != full.total and abs(half.total/full.total - 1) < 5e-3
    torch.testing.assert_close(half.terms[1:], full.terms[1:], rtol=.05, atol=1e-3)
    assert half.L_T == full.L_T                                              # no network in it
    cast = Autocast(ddpm.model, torch.bfloat16)
    assert cast(to_model_range(x), torch.ones(20, dtype=torch.long)).dtype == torch.float32
    for *_, w, nats, p in DDPM(cast, ddpm.sched, ddpm.shape).bound_terms(to_model_range(x), 0, torch.arange(20)):
        assert {v.dtype for v in (w, nats, *p)} == {torch.float32}


# ---- reports and refusals

def test_what_was_never_drawn_is_none_in_json():
    r = evaluate_bits_per_dim(make(T=200), gray(2, (1, 4, 4), 256), seeded(), steps=3)
    d = json.loads(json.dumps(r.to_dict(), allow_nan=False))
    assert set(d) == {"n", "levels", "total", "total_error", "L_T", "L_mid", "L_0", "terms", "errors", "mse", "counts"}
    for k in ("terms", "mse"): assert [v is None for v in d[k]] == [c == 0 for c in d["counts"]]
    assert d["total"] == r.total and d["terms"][1] == r.terms[1].item() and d["counts"][0] == 0


def test_what_is_refused():
    ddpm, x = make(), gray(3, (1, 4, 4), 256)
    with pytest.raises(ValueError, match="no image"): evaluate_bits_per_dim(ddpm, x[:0])
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"steps must be at least 1.*got {k}"): evaluate_bits_per_dim(ddpm, x, steps=k)
    with pytest.raises(ValueError, match="gray levels"): evaluate_bits_per_dim(ddpm, torch.rand(3, 1, 4, 4))           # between the levels
    with pytest.raises(ValueError, match="gray levels"): evaluate_bits_per_dim(make(levels=17), x)                     # 256 levels for a model of 17
    with pytest.raises(ValueError, match="gray levels"): evaluate_bits_per_dim(make(levels=17), to_model_range(x))
    with pytest.raises(ValueError, match="gray levels"): evaluate_bits_per_dim(ddpm, x.float())                        # 0..255 as floats
    with pytest.raises(ValueError, match="gray levels"): evaluate_bits_per_dim(ddpm, x.double().div(255).mul(2).sub(1).mul(1.01))
    last = torch.cat([to_model_range(gray(300, (1, 4, 4), 256)), torch.full((1, 1, 4, 4), .1234)])                     # in the last chunk
    with pytest.raises(ValueError, match="gray levels"): evaluate_bits_per_dim(ddpm, last, batch_size=64)


def test_what_would_be_measured_wrongly_is_refused():
    ddpm, x = make(), gray(3, (1, 4, 4), 256)
    for b in (0, -3):
        with pytest.raises(ValueError, match=f"batch_size.*{b}"): evaluate_bits_per_dim(ddpm, x, batch_size=b)   # else it would be L_T alone
        with pytest.raises(ValueError, match=f"batch_size.*{b}"): ddpm.bits_per_dim(to_model_range(x), batch_size=b)
    for n in (2, 4):
        with pytest.raises(ValueError, match="index"): evaluate_bits_per_dim(ddpm, x, index=torch.arange(n))
    hole = to_model_range(x)
    hole[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="gray levels"): evaluate_bits_per_dim(ddpm, hole)


def test_one_image_has_no_error_estimate():
    "A standard error of 0 would say that the number is exact."
    r = evaluate_bits_per_dim(make(), gray(1, (1, 4, 4), 256), seeded())
    assert math.isfinite(r.total) and math.isnan(r.total_error) and r.errors.isnan().all()
    assert json.loads(json.dumps(r.to_dict(), allow_nan=False))["total_error"] is None


@pytest.mark.parametrize("first", [1, 3, 4])
@pytest.mark.parametrize("mean, bad", [("eps", math.nan), ("x0", math.nan), ("mu", math.nan), ("mu", math.inf), ("mu", -math.inf)])
def test_a_broken_model_is_an_error(mean, bad, first):
    "No number, and no hole in the report: one line that says at which t it begins. (The clamp makes a number of an infinite x_0-hat.)"
    def net(xt, t): return torch.where((t >= first).view(-1, 1, 1, 1), bad, .5*xt)
    ddpm, x = DDPM(net, linear_schedule(4), (1, 4, 4), mean=mean), gray(3, (1, 4, 4), 256)
    for kw in ({}, dict(batch_size=1), dict(batch_size=5), dict(steps=3), dict(autocast=torch.bfloat16)):
        with pytest.raises(ValueError, match=f"^the network gave a value that is not finite.* first at t = {first}$"):
            evaluate_bits_per_dim(ddpm, x, seeded(), **kw)


def test_one_broken_pixel_of_many_images_is_an_error():
    x = gray(40, (1, 4, 4), 256)
    def net(xt, t):
        out = .5*xt
        out[-1, 0, 0, 0] = torch.where(t[-1] == 2, math.nan, out[-1, 0, 0, 0])
        return out
    with pytest.raises(ValueError, match="first at t = 2"): evaluate_bits_per_dim(DDPM(net, linear_schedule(2), (1, 4, 4)), x, seeded(), batch_size=80)


def test_a_report_has_no_place_for_infinity():
    "None stands for what was not measured, never for a number that went wrong."
    r = evaluate_bits_per_dim(make(), gray(3, (1, 4, 4), 256), seeded())
    with pytest.raises(ValueError): json.dumps(replace(r, total=math.inf).to_dict(), allow_nan=False)


def test_a_small_error_beside_a_large_total_keeps_its_digits():
    "The same image again and again costs hundreds of bits, give or take a little: the difference of squares must be taken in float64."
    far, n = lambda xt, t: .5 + .001*xt, 50
    ddpm, x0 = DDPM(far, linear_schedule(4, 1e-4, 1e-3), (1, 2, 2), mean="x0"), torch.full((n, 1, 2, 2), -1.).double()
    totals = ddpm.bits_per_dim(x0, seeded()).total.numpy()
    r = evaluate_bits_per_dim(ddpm, x0, seeded())
    assert r.total > 300 and totals.std() < .01*r.total
    np.testing.assert_allclose(r.total_error, totals.std(ddof=1)/n**.5, rtol=1e-5)


# ---- Fig. 5, Table 4, and what a variance costs

def test_rate_and_distortion_are_table_4(case):
    "Row k of Table 4 as the official arrays give it: i = T-k, rate = prior + sum of terms[i+1:], RMSE = 127.5 sqrt(mse[i])."
    ddpm, x0 = case
    r, T = evaluate_bits_per_dim(ddpm, x0, seeded()), ddpm.sched.T
    terms, mse, prior = r.terms[1:].tolist(), r.mse[1:].tolist(), r.L_T      # code t = the paper's t - 1
    curve = rate_distortion(r)
    assert set(curve) == {"step", "rate", "distortion"} and curve["step"].tolist() == list(range(1, T+1))
    for k in range(1, T+1):
        i = T-k
        rate = prior
        for term in terms[i+1:]: rate += term
        assert curve["rate"][k-1].item() == pytest.approx(rate, rel=1e-12)
        assert curve["distortion"][k-1].item() == pytest.approx(127.5*math.sqrt(mse[i]), rel=1e-12)
    assert curve["rate"][0] == pytest.approx(r.L_T) and curve["rate"][-1].item() + r.L_0 == pytest.approx(r.total, rel=1e-12)
    assert (curve["rate"].diff() >= 0).all()                                 # a KL is never negative


def test_rate_and_distortion_need_every_step(case):
    ddpm, x0 = case
    with pytest.raises(ValueError, match="every step"): rate_distortion(evaluate_bits_per_dim(ddpm, x0[:1], seeded(), steps=2))
    one = rate_distortion(evaluate_bits_per_dim(make(T=1), gray(2, (1, 4, 4), 256), seeded()))
    assert [len(v) for v in one.values()] == [1, 1, 1]


@pytest.mark.parametrize("T", [2, 10, 1000])
def test_a_perfect_mean_pays_for_its_variance_only(T):
    "A model that knows the one image: L_mid is what sigma^2 = beta costs, and nothing at sigma^2 = beta-tilde."
    sched, x = linear_schedule(T, 1e-4, .02 if T > 100 else .3), gray(1, (1, 3, 3), 256)
    know = lambda xt, t: scaled(x, 256).to(xt.dtype).expand_as(xt)
    models = [DDPM(know, sched, (1, 3, 3), mean="x0", variance=v) for v in ("beta", "beta_tilde")]
    large, small = (evaluate_bits_per_dim(m, scaled(x, 256), seeded()) for m in models)
    assert abs(small.L_mid) < 1e-9 and (small.mse[1:] < 1e-20).all()
    beta, abar = sched.beta.numpy(), sched.alpha_bar.numpy()
    want = sum(.5*(r - 1 - math.log(r)) for r in [(1-abar[t-1])/(1-abar[t]) for t in range(2, T+1)])/BIT
    assert perfect_mean_cost(sched) == pytest.approx(want, rel=1e-9) == pytest.approx(large.L_mid, rel=1e-6)
    if T == 1000: assert want == pytest.approx(.486, abs=5e-4)               # the paper's schedule
    assert beta[0] == 0 and perfect_mean_cost(linear_schedule(1)) == 0


@pytest.mark.parametrize("mean", ["eps", "x0"])                             # of mu the clamp does not reach the mean
def test_the_optimal_variance_is_the_least_of_them_all(mean):
    "Measured and evaluated on the same images and noise: no other variance, for any t, makes a term smaller."
    ddpm, x = make(T=12, mean=mean, size=2.), gray(40, (1, 4, 4), 256)
    def bound(**kw): return evaluate_bits_per_dim(replace(ddpm, **kw), scaled(x, 256), seeded())
    fixed = bound()
    coef, tilde = posterior_coefs(ddpm.sched, torch.arange(1, 13))[0], posterior_variance(ddpm.sched)[1:]
    best = bound(variance="optimal", mse=fixed.mse)
    torch.testing.assert_close(best.mse, fixed.mse, equal_nan=True, rtol=0, atol=0)     # it depends on the mean only
    want = .5*(1 + coef**2*fixed.mse[1:]/tilde).log()/BIT                               # the KL at its minimum
    np.testing.assert_allclose(best.terms[2:], want[1:], rtol=1e-8)
    for other in (fixed, bound(variance="beta_tilde")): assert (best.terms[2:] < other.terms[2:]).all()
    for factor in (.8, .95, 1.05, 1.3): assert (bound(variance="optimal", mse=factor*fixed.mse).terms[2:] > best.terms[2:]).all()


def test_a_stronger_decoder_by_a_subclass():
    class Sure(DDPM):
        def decoder(self, x0, mean, log_variance): return torch.full_like(mean, -.5)
    plain = make(T=6)
    sure, x0 = Sure(plain.model, plain.sched, plain.shape), scaled(gray(4, (1, 4, 4), 256), 256)
    ours, theirs = (d.bits_per_dim(x0, seeded()) for d in (sure, plain))
    np.testing.assert_allclose(ours.L_0, .5/BIT, rtol=1e-6)
    assert torch.equal(ours.L_mid, theirs.L_mid) and not torch.allclose(ours.L_0, theirs.L_0)


# ---- streaming: memory does not depend on how many images and steps there are

class Widest(TorchDispatchMode):
    "The largest tensor that any operation returned."
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = func.is_view is False if hasattr(func, "is_view") else True
        for v in out if isinstance(out, (tuple, list)) else (out,):
            if fresh and isinstance(v, torch.Tensor): self.numel = max(self.numel, v.numel())
        return out


@pytest.mark.parametrize("T, steps, batch_size", [(20, None, 64), (20, None, 8), (1000, 1, 64), (1000, 7, 64)])
def test_nothing_grows_with_the_data(T, steps, batch_size):
    seen = []
    class Watch(nn.Module):
        def forward(self, xt, t):
            seen.append(len(xt))
            return torch.zeros_like(xt)
    ddpm, widest = DDPM(Watch(), linear_schedule(T), (1, 2, 2)), {}
    for n in (sizes := (16, 64)):
        seen.clear()
        x, index = gray(n, (1, 2, 2), 256), torch.arange(n)
        with Widest() as w: evaluate_bits_per_dim(ddpm, x, seeded(), steps, batch_size, index)
        widest[n] = w.numel
        assert max(seen) <= batch_size and sum(seen) == n*(T if steps is None else steps+1)
        assert len(seen) <= 2 + 2*sum(seen)/batch_size                       # many (image, t) to a call, not one
    assert widest[sizes[1]] == widest[sizes[0]] <= max(4*batch_size, 4*(T+1))   # the pixels of one batch, or the table of sums over t


STREAM = """
import resource, sys, torch
from ddpm_nbdev.ddpm import DDPM
from ddpm_nbdev.likelihood import evaluate_bits_per_dim
from ddpm_nbdev.schedule import linear_schedule
torch.set_num_threads(1)
ddpm = DDPM(lambda xt, t: .99*xt, linear_schedule(1000), (1, 2, 2))
x = torch.randint(0, 256, (50_000, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 2**10)
def go(n): return evaluate_bits_per_dim(ddpm, x[:n], torch.Generator().manual_seed(0), steps=1, batch_size=4096)
go(5000)
before = peak()
r = go(50_000)
print(peak()-before, r.counts.sum().item())
"""


def test_fifty_thousand_images_in_the_memory_of_five_thousand():
    "An (n, T) table would be 200 MB."
    pytest.importorskip("resource")
    out = subprocess.run([sys.executable, "-c", STREAM], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[1]) == 100_000 and float(out[0]) < 20, f"grew by {out[0]} MB"
