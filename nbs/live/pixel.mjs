// One pixel and three steps, every number by hand: Eq. 2, 4, 7, 11, 12, 14 and 13 in one strip.
import {el} from "./kit.mjs";
import * as D from "./ddpm.mjs";

const show = v => Math.abs(v) < 1e-3 && v !== 0 ? v.toExponential(2) : v.toFixed(4);

export function pixel(place) {
  const state = {x0: -.25, beta: [.1, .3, .6], eps: .8, guess: .5, t: 2}, table = el("div", {style: "overflow-x:auto"});
  const field = (words, get, set, {min = -3, max = 3, step = .05} = {}) => {
    const input = el("input", {type: "number", min, max, step, value: get(), "aria-label": words, oninput: () => {
      const v = input.valueAsNumber;
      if (!(v >= min && v <= max)) return input.setCustomValidity(`from ${min} to ${max}`), input.reportValidity();
      input.setCustomValidity("");
      set(v);
      draw();
    }});
    return el("label", {class: "live-control"}, words, input);
  };
  function draw() {
    const {x0, beta, eps, guess, t} = state, alphaBar = [1];
    beta.forEach((b, i) => alphaBar.push(alphaBar[i]*(1-b)));
    const s = {T: 3, beta: [0, ...beta], alphaBar}, one = v => Float64Array.of(v);
    const xt = D.qSample(s, one(x0), t, one(eps)), p = D.pMeanVariance(s, xt, t, one(guess), "beta_tilde", {clamp: false}), q = D.posterior(s, t);
    const mean = q.x0*x0 + q.xt*xt[0], sigma2 = p.sigma**2, a = alphaBar[t];
    const weight = beta[t-1]**2/(2*sigma2*(1-beta[t-1])*(1-a));
    const rows = [
      ["Eq. 2: xₜ from xₜ₋₁ has mean √(1-βₜ) xₜ₋₁ and variance βₜ", `√(1-βₜ) = ${show(Math.sqrt(1-beta[t-1]))}`],
      ["Eq. 4: ᾱₜ, and xₜ = √ᾱₜ x₀ + √(1-ᾱₜ) ε", `ᾱₜ = ${show(a)}, xₜ = ${show(xt[0])}`],
      ["Eq. 7: the ideal step back, its mean and variance", t > 1 ? `μ̃ = ${show(mean)}, β̃ₜ = ${show(q.variance)}` : `μ̃ = x₀ = ${show(mean)}, β̃₁ = 0`],
      ["Eq. 15: the x₀ that the guess implies", `x̂₀ = ${show(p.x0[0])}`],
      ["Eq. 11: the step back with that guess", `μ = ${show(p.mean[0])}`],
      ["σ² of the step (β̃; at t = 1 that of t = 2)", `σ² = ${show(sigma2)}`],
      ["Eq. 12: the weight of the squared error of ε", `${show(weight)} × ${show((eps-guess)**2)} = ${show(weight*(eps-guess)**2)} nats`],
      ["the same from the means: (μ̃-μ)²/2σ²", `${show((mean-p.mean[0])**2/(2*sigma2))} nats`],
      ["Eq. 14: the simple loss", show((eps-guess)**2)],
    ];
    if (t === 1) rows.push(["Eq. 13: -log₂ of the probability of x₀'s gray level (17 levels)", `${show(D.decoderCost(one(x0), p.mean, p.sigma, 17)[0]/Math.LN2)} bits`]);
    table.replaceChildren(el("table", {class: "live-strip"}, el("tbody", {}, ...rows.map(([a, b]) => el("tr", {}, el("th", {scope: "row"}, a), el("td", {}, b))))));
    place.dataset.xt = xt[0];
    place.dataset.loss = weight*(eps-guess)**2;
  }
  const steps = el("select", {"aria-label": "which step", onchange: () => { state.t = Number(steps.value); draw(); }},
    ...[1, 2, 3].map(t => el("option", {value: t, selected: t === 2}, `t = ${t}`)));
  place.append(el("div", {class: "live-row"}, field("x₀", () => state.x0, v => { state.x0 = v; }, {min: -1, max: 1, step: .125}),
      ...[0, 1, 2].map(i => field("β" + "₁₂₃"[i], () => state.beta[i], v => { state.beta[i] = v; }, {min: .01, max: .99, step: .01})),
      field("ε", () => state.eps, v => { state.eps = v; }), field("the guess ε_θ", () => state.guess, v => { state.guess = v; }), steps), table);
  draw();
}
