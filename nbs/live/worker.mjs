// The network at work in a thread of its own, so that the page stays smooth.
// A message {id, does, ...} is answered by {id, value}, {id, error}, or many {id, part} before {id, value}.
import * as D from "./ddpm.mjs";

let net, config;
const current = {};                                        // of each part of the page, its newest long task; older ones stop
const KEY = 3141116543;                                    // of `ddpm_sample --seed 0`: its samples, number by number

const soon = (() => {                                      // let messages in; setTimeout would wait 4 ms
  const {port1, port2} = new MessageChannel(), waiting = [];
  port1.onmessage = () => waiting.shift()();
  return () => new Promise(done => { waiting.push(done); port2.postMessage(0); });
})();

const begin = part => { const mine = current[part] = (current[part] ?? 0) + 1; return () => mine !== current[part]; };
const chains = {};
const chain = steps => chains[steps] ??= D.linearSchedule(config.schedule.args, steps);
const noise = (index, t, n) => D.indexedNoise(KEY, index, t, n);

function look(sched, xt, t, {kind, clamp}) {               // everything that x_t says at chain step t
  if (t === 0) return {xt, t, at: 0, eps: null, x0: xt};
  const eps = net(xt, sched.net[t]);
  return {xt, t, at: sched.net[t], eps, ...D.pMeanVariance(sched, xt, t, eps, kind, {clamp, mse: config.mse.values})};
}

function back(sched, p, {z, index}) {                      // line 4 of Algorithm 2
  return D.pSample(p, p.t, z ? noise(index, p.t, p.xt.length) : new Float64Array(p.xt.length));
}

const tasks = {
  load({weights, text}) {
    config = JSON.parse(text);
    net = D.unet(config.model.args, D.readSafetensors(weights));
    return {T: config.schedule.args.T, levels: config.levels};
  },
  /** x_t of a digit by Eq. 4 (or pure noise, without one), and what the network sees in it. */
  noised({x0, t, options}) {
    const sched = chain(options.steps), n = 64, eps = noise(options.index, 0, n);
    const xt = x0 ? D.qSample(sched, x0, t, eps) : noise(options.index, sched.T+1, n);
    return {...look(sched, xt, t, options), noise: x0 ? eps : null};
  },
  look: ({xt, t, noise = null, options}) => ({...look(chain(options.steps), xt, t, options), noise}),
  /** Algorithm 2 from x_t down to `until`. */
  async run({xt, t, until = 0, options}, tell) {
    const sched = chain(options.steps), over = begin("digit"), begun = performance.now();
    let p = look(sched, xt, t, options), told = 0, calls = 1;
    while (p.t > until) {
      p = look(sched, back(sched, p, options), p.t-1, options);
      calls++;
      if (performance.now()-told < 14) continue;
      tell(p);
      told = performance.now();
      await soon();
      if (over()) return {...p, stopped: true};
    }
    return {...p, ms: (performance.now()-begun)/calls};
  },
  stop({part}) { begin(part); },
  /** The bound of Eq. 5 for one digit, from L_T down to L_0. */
  async bits({x0, options}, tell) {
    const sched = chain(options.steps), over = begin("bits"), {levels, mse: {values}} = config;
    let terms = [[sched.T+1, D.priorTerm(sched, x0)]], told = performance.now();
    for (let t = sched.T; t > 0; t--) {
      const eps = noise(options.index, t, 64), xt = D.qSample(sched, x0, t, eps);
      terms.push([t, D.boundTerm(sched, x0, xt, t, net(xt, sched.net[t]), options.kind, levels, values)]);
      if (performance.now()-told < 30 && t > 1) continue;
      tell(terms);
      terms = [];
      told = performance.now();
      await soon();
      if (over()) return {stopped: true};
    }
    return {};
  },
  /** Section 4.4: two digits at step t, mixed, and decoded; one part for each lambda. */
  async mix({a, b, t, lambdas, options}, tell) {
    const sched = chain(options.steps), over = begin("mix");
    const [xa, xb] = [a, b].map((x, i) => D.qSample(sched, x, t, noise(options.index+i, 0, 64)));
    for (const [i, lambda] of lambdas.entries()) {
      let p = look(sched, xa.map((v, j) => (1-lambda)*v + lambda*xb[j]), t, options);
      const mixed = p.xt;
      while (p.t > 0) p = look(sched, back(sched, p, options), p.t-1, options);
      tell({i, mixed, x0: p.xt});
      await soon();
      if (over()) return {stopped: true};
    }
    return {};
  },
};

addEventListener("message", async ({data: {id, does, ...rest}}) => {
  try { postMessage({id, value: await tasks[does](rest, part => postMessage({id, part}))}); }
  catch (e) { postMessage({id, error: e.message}); }
});
