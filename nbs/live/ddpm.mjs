// Denoising diffusion in plain JavaScript: the package's own weights, the same numbers.
// No dependencies and no page in here: it runs in a browser, in a worker, and in Node.
// Images are Float64Arrays of h*w*c numbers in [-1, 1], the channels of a pixel side by side.

// --- files -------------------------------------------------------------------------------

const half = bits => {                                   // float16 -> number
  const e = bits >> 10 & 31, m = bits & 1023;
  const size = e === 0 ? m*2**-24 : e === 31 ? (m ? NaN : Infinity) : (1 + m/1024)*2**(e-15);
  return bits >> 15 ? -size : size;
};

/** The tensors of a .safetensors file (an ArrayBuffer): {name: {shape, data}}. */
export function readSafetensors(buffer) {
  const view = new DataView(buffer), n = Number(view.getBigUint64(0, true));
  if (n > buffer.byteLength - 8) throw Error("the weights are cut short: reload the page");
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, n)));
  const tensors = Object.create(null), sizes = {F32: 4, F16: 2};
  let total = 0;
  for (const [name, {dtype, shape, data_offsets}] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (!(dtype in sizes)) throw Error(`${name} is ${dtype}, which this page does not read`);
    const whole = [...shape, ...data_offsets].every(v => Number.isSafeInteger(v) && v >= 0), [from, to] = data_offsets;
    if (!whole || to - from !== sizes[dtype]*shape.reduce((a, b) => a*b, 1)) throw Error(`${name}: its shape does not fit its place in the file`);
    if (8 + n + to > buffer.byteLength || (total += to - from) > buffer.byteLength) throw Error("the weights are cut short: reload the page");
    const bytes = buffer.slice(8 + n + from, 8 + n + to);
    tensors[name] = {shape, data: dtype === "F32" ? new Float32Array(bytes) : Float32Array.from(new Uint16Array(bytes), half)};
  }
  return tensors;
}

// --- the network of Appendix B -------------------------------------------------------------
// Feature maps lie inside a border of zeros, so that a 3x3 window is three runs of 3*c numbers
// and nothing is copied. Weights are packed by four outputs, two pixels are done at a time.

const map = (h, w, c) => ({h, w, c, data: new Float64Array((h+2)*(w+2)*c)});
const at = (x, i, j) => ((i+1)*(x.w+2) + j+1)*x.c;       // where pixel (i, j) begins

function pack({shape: [out, c, k], data}, bias) {        // (out, c, k, k) -> by fours
  const groups = Math.ceil(out/4), packed = new Float64Array(groups*k*k*c*4);
  for (let o = 0; o < out; o++) for (let i = 0; i < c; i++) for (let s = 0; s < k*k; s++)
    packed[(((o>>2)*k*k + s)*c + i)*4 + (o&3)] = data[(o*c + i)*k*k + s];
  const b = new Float64Array(4*groups);
  b.set(bias.data);
  return {out, c, k, weight: packed, bias: b};
}

function convolve(x, {out, c, k, weight, bias}, y, stride = 1) {
  const rowIn = (x.w+2)*c, run = k*c, first = k === 3 && stride === 1 ? -1 : 0;  // stride 2 pads below and right
  for (let i = 0; i < y.h; i++) for (let j = 0; j < y.w; j += 2) {
    const p = at(x, i*stride + first, j*stride + first), q = j+1 < y.w ? p + stride*c : p, to = at(y, i, j);
    for (let o = 0, n = 0; o < out; o += 4) {
      let a0 = bias[o], a1 = bias[o+1], a2 = bias[o+2], a3 = bias[o+3], b0 = a0, b1 = a1, b2 = a2, b3 = a3;
      for (let r = 0; r < k; r++) {
        const pr = p + r*rowIn, qr = q + r*rowIn;
        for (let s = 0; s < run; s++, n += 4) {
          const u = x.data[pr+s], v = x.data[qr+s];
          const w0 = weight[n], w1 = weight[n+1], w2 = weight[n+2], w3 = weight[n+3];
          a0 += w0*u; a1 += w1*u; a2 += w2*u; a3 += w3*u;
          b0 += w0*v; b1 += w1*v; b2 += w2*v; b3 += w3*v;
        }
      }
      const sums = [a0, a1, a2, a3, b0, b1, b2, b3], m = Math.min(4, out-o);
      for (let e = 0; e < m; e++) y.data[to+o+e] = sums[e];
      if (j+1 < y.w) for (let e = 0; e < m; e++) y.data[to+out+o+e] = sums[4+e];
    }
  }
  return y;
}

function linear({weight: {shape: [out, c], data}, bias}, x) {
  return Float64Array.from({length: out}, (_, o) => {
    let sum = bias.data[o];
    for (let i = 0; i < c; i++) sum += data[o*c+i]*x[i];
    return sum;
  });
}

const silu = v => v/(1 + Math.exp(-v));

function norm(x, {weight, bias}, groups, y, swish = true) {   // group norm, eps 1e-6
  const per = x.c/groups, n = x.h*x.w*per;
  for (let g = 0; g < groups; g++) {
    let sum = 0, squares = 0;
    const each = f => { for (let i = 0; i < x.h; i++) for (let j = 0; j < x.w; j++)
      for (let p = at(x, i, j) + g*per, k = 0; k < per; k++) f(p+k, g*per+k); };
    each(p => { sum += x.data[p]; });
    const mean = sum/n;
    each(p => { squares += (x.data[p]-mean)**2; });
    const scale = 1/Math.sqrt(squares/n + 1e-6);
    each((p, k) => {
      const v = (x.data[p]-mean)*scale*weight.data[k] + bias.data[k];
      y.data[p] = swish ? silu(v) : v;
    });
  }
  return y;
}

/** sin and cos of t at frequencies from 1 to 1/10000. */
export function timestepEmbedding(t, dim) {
  const n = dim/2, f = i => t*Math.exp(-Math.log(10000)/(n-1)*i);
  return Float64Array.from({length: dim}, (_, i) => i < n ? Math.sin(f(i)) : Math.cos(f(i-n)));
}

/** The U-Net of config.json and model.safetensors as a function (x_t, t) -> prediction. */
export function unet(config, tensors) {
  const {ch, ch_mult, num_res_blocks, attn_resolutions, resolution, groups, in_channels} = config;
  const get = name => ({weight: tensors[name + ".weight"], bias: tensors[name + ".bias"]});
  const packed = {}, pool = [];
  let used = 0;
  for (const name of Object.keys(tensors).filter(k => tensors[k].shape.length === 4)) {
    const layer = name.replace(/\.weight$/, "");
    packed[layer] = pack(tensors[name], tensors[layer + ".bias"]);
  }
  const take = (h, w, c) => {                 // the same maps in every call: their borders stay zero
    const x = pool[used] ??= map(h, w, c);
    used++;
    return x;
  };
  const conv = (x, name, stride = 1) => {
    const layer = packed[name];
    return convolve(x, layer, take(x.h/stride, x.w/stride, layer.out), stride);
  };
  const inside = (x, f) => {                  // f(place in x) for every number of x
    for (let i = 0; i < x.h; i++) for (let p = at(x, i, 0), end = p + x.w*x.c; p < end; p++) f(p);
    return x;
  };
  const normed = (x, name, swish) => norm(x, get(name), groups, take(x.h, x.w, x.c), swish);
  const plus = (x, y) => inside(x, p => { x.data[p] += y.data[p]; });

  function block(x, name, temb) {
    const h = conv(normed(x, name + ".norm1"), name + ".conv1");
    const shift = linear(get(name + ".temb_proj"), temb);
    inside(h, p => { h.data[p] += shift[p%h.c]; });          // a pixel begins at a multiple of c
    const y = conv(normed(h, name + ".norm2"), name + ".conv2");
    return plus(y, packed[name + ".shortcut"] ? conv(x, name + ".shortcut") : x);
  }
  function attention(x, name) {
    const n = normed(x, name + ".norm", false), [q, k, v] = ["q", "k", "v"].map(s => conv(n, `${name}.${s}`));
    const mix = take(x.h, x.w, x.c), places = [];
    for (let i = 0; i < x.h; i++) for (let j = 0; j < x.w; j++) places.push(at(x, i, j));
    for (const p of places) {
      const score = places.map(r => { let s = 0; for (let c = 0; c < x.c; c++) s += q.data[p+c]*k.data[r+c]; return s/Math.sqrt(x.c); });
      const most = Math.max(...score), w = score.map(s => Math.exp(s-most)), sum = w.reduce((a, b) => a+b);
      for (let c = 0; c < x.c; c++) { let s = 0; places.forEach((r, i) => { s += w[i]*v.data[r+c]; }); mix.data[p+c] = s/sum; }
    }
    return plus(conv(mix, name + ".proj_out"), x);
  }
  function beside(x, y) {                     // concatenated channels
    const z = take(x.h, x.w, x.c + y.c);
    for (let i = 0; i < x.h; i++) for (let j = 0; j < x.w; j++) {
      z.data.set(x.data.subarray(at(x, i, j), at(x, i, j) + x.c), at(z, i, j));
      z.data.set(y.data.subarray(at(y, i, j), at(y, i, j) + y.c), at(z, i, j) + x.c);
    }
    return z;
  }
  function doubled(x) {                       // every pixel four times
    const y = take(2*x.h, 2*x.w, x.c);
    for (let i = 0; i < y.h; i++) for (let j = 0; j < y.w; j++)
      y.data.set(x.data.subarray(at(x, i>>1, j>>1), at(x, i>>1, j>>1) + x.c), at(y, i, j));
    return y;
  }
  return (xt, t, h = resolution, w = resolution) => {
    if (xt.length !== h*w*in_channels) throw Error(`expected ${h*w*in_channels} numbers, got ${xt.length}`);
    used = 0;
    const temb = linear(get("temb.2"), linear(get("temb.0"), timestepEmbedding(t, ch)).map(silu)).map(silu);
    const input = take(h, w, in_channels), levels = ch_mult.map((_, i) => resolution >> i), row = w*in_channels;
    for (let i = 0; i < h; i++) input.data.set(xt.subarray(i*row, (i+1)*row), at(input, i, 0));
    let x = conv(input, "conv_in");
    const stack = [x];
    levels.forEach((r, i) => {
      for (let b = 0; b < num_res_blocks; b++) {
        x = block(x, `down.${i}.block.${b}`, temb);
        if (attn_resolutions.includes(r)) x = attention(x, `down.${i}.attn.${b}`);
        stack.push(x);
      }
      if (i < levels.length-1) stack.push(x = conv(x, `down.${i}.resample.conv`, 2));
    });
    x = block(attention(block(x, "mid.block.0", temb), "mid.attn.0"), "mid.block.1", temb);
    levels.toReversed().forEach((r, i) => {
      for (let b = 0; b <= num_res_blocks; b++) {
        x = block(beside(x, stack.pop()), `up.${i}.block.${b}`, temb);
        if (attn_resolutions.includes(r)) x = attention(x, `up.${i}.attn.${b}`);
      }
      if (i < levels.length-1) x = conv(doubled(x), `up.${i}.resample.conv`);
    });
    const out = conv(normed(x, "norm_out"), "conv_out"), flat = new Float64Array(h*w*out.c);
    for (let i = 0; i < h; i++) flat.set(out.data.subarray(at(out, i, 0), at(out, i, 0) + w*out.c), i*w*out.c);
    return flat;
  };
}

// --- the process -----------------------------------------------------------------------------

const evenRound = v => { const r = Math.round(v); return Math.abs(v%1) === .5 && r%2 ? r-1 : r; };

/** beta, alpha-bar for t = 0..T; `steps` of them at even distances (null: all); `net[t]` is the t of the network. */
export function linearSchedule({T, beta_1, beta_T}, steps = null) {
  const all = [1];
  for (let t = 1; t <= T; t++) all.push(all[t-1]*(1 - (T > 1 ? beta_1 + (beta_T-beta_1)*(t-1)/(T-1) : beta_1)));
  const k = steps ?? T, net = [0, ...Array.from({length: k}, (_, i) => evenRound(T*(i+1)/k))];
  const alphaBar = net.map(t => all[t]), beta = alphaBar.map((a, t) => t ? 1 - a/alphaBar[t-1] : 0);
  return {T: k, net, alphaBar, beta};
}

/** Eq. 7: coefficients of x_0 and x_t in the posterior's mean, and its variance beta-tilde. */
export function posterior({alphaBar: a, beta}, t) {
  const rest = 1 - a[t];
  return {x0: Math.sqrt(a[t-1])*beta[t]/rest, xt: Math.sqrt(1-beta[t])*(1-a[t-1])/rest, variance: beta[t]*(1-a[t-1])/rest};
}

/** sigma_t^2: 'beta', 'beta_tilde', or 'optimal' with the measured errors `mse` of x_0-hat (by the network's t). */
export function variance(sched, t, kind, mse) {
  const small = sched.T > 1 ? posterior(sched, Math.max(t, 2)).variance : sched.beta[1];
  if (kind === "optimal") { const p = posterior(sched, t); return p.variance + p.x0**2*mse[sched.net[t]]; }
  return kind === "beta" && t > 1 ? sched.beta[t] : small;
}

/** Eq. 4. */
export const qSample = ({alphaBar}, x0, t, eps) => {
  const a = Math.sqrt(alphaBar[t]), s = Math.sqrt(1 - alphaBar[t]);
  return x0.map((x, i) => a*x + s*eps[i]);
};

/** Eq. 15: x_0-hat; clamped to [-1, 1] if asked. */
export const predictX0 = ({alphaBar}, xt, t, eps, clamp = true) => {
  const a = Math.sqrt(alphaBar[t]), s = Math.sqrt(1 - alphaBar[t]);
  return xt.map((x, i) => { const v = (x - s*eps[i])/a; return clamp ? Math.max(-1, Math.min(1, v)) : v; });
};

/** Eq. 1 with Eq. 11: {mean, x0, sigma}; `kind` of variance as above. */
export function pMeanVariance(sched, xt, t, eps, kind = "beta", {clamp = true, mse = null} = {}) {
  const x0 = predictX0(sched, xt, t, eps, clamp), p = posterior(sched, t);
  return {x0, mean: xt.map((x, i) => p.x0*x0[i] + p.xt*x), sigma: Math.sqrt(variance(sched, t, kind, mse))};
}

/** Line 4 of Algorithm 2: x_{t-1}; no noise at t = 1. */
export const pSample = ({mean, sigma}, t, z) => t > 1 ? mean.map((m, i) => m + sigma*z[i]) : mean;

// --- the bound ---------------------------------------------------------------------------------

/** log of the probability that N(0, 1) lies above v, also far out. */
function logAbove(v) {
  if (v < 0) return Math.log1p(-Math.exp(logAbove(-v)));
  if (v < 3) {                                            // 1/2 minus a series for the part between 0 and v
    let term = v, sum = v;
    for (let k = 1; Math.abs(term) > 1e-17*sum && k < 200; k++) { term *= v*v/(2*k+1); sum += term; }
    return Math.log(.5 - sum*Math.exp(-v*v/2)/Math.sqrt(2*Math.PI));
  }
  let f = v;                                              // a continued fraction, from its far end
  for (let k = 80; k > 0; k--) f = v + k/f;
  return -v*v/2 - Math.log(Math.sqrt(2*Math.PI)*f);
}

function logBetween(lo, hi) {
  if (lo > -hi) [lo, hi] = [-hi, -lo];                    // into the lower tail: no cancellation
  const a = logAbove(-hi), b = logAbove(-lo);
  return a + Math.log1p(-Math.exp(b - a));
}

/** Eq. 13: -log p(x_0 | x_1), nats a pixel, for gray levels 0..levels-1 scaled to [-1, 1]. */
export function decoderCost(x0, mean, sigma, levels) {
  return x0.map((x, i) => {
    const k = Math.round((x+1)/2*(levels-1)), edge = j => ((2*j-1)/(levels-1) - 1 - mean[i])/sigma;
    return -(k === 0 ? logAbove(-edge(1)) : k === levels-1 ? logAbove(edge(k)) : logBetween(edge(k), edge(k+1)));
  });
}

/** The term of Eq. 5 that belongs to t, in bits a pixel: a KL for t > 1, the decoder for t = 1. */
export function boundTerm(sched, x0, xt, t, eps, kind, levels, mse = null) {
  const {mean, sigma} = pMeanVariance(sched, xt, t, eps, kind, {mse});
  if (t === 1) return decoderCost(x0, mean, sigma, levels).reduce((a, b) => a+b)/x0.length/Math.LN2;
  const p = posterior(sched, t), log = Math.log(p.variance), own = 2*Math.log(sigma);
  let nats = 0;
  x0.forEach((x, i) => { nats += .5*(own - log - 1 + Math.exp(log-own) + (p.x0*x + p.xt*xt[i] - mean[i])**2/sigma**2); });
  return nats/x0.length/Math.LN2;
}

/** L_T: how far q(x_T | x_0) is from N(0, 1), bits a pixel. */
export function priorTerm({T, alphaBar}, x0) {
  const v = 1 - alphaBar[T];
  return x0.reduce((sum, x) => sum + .5*(v - Math.log(v) - 1 + alphaBar[T]*x*x), 0)/x0.length/Math.LN2;
}

// --- noise that has an address ---------------------------------------------------------------

const wrap = v => BigInt.asUintN(64, v), GOLDEN = 0x9E3779B97F4A7C15n;
const mix64 = x => {
  x = wrap((x ^ x >> 30n)*0xBF58476D1CE4E5B9n);
  x = wrap((x ^ x >> 27n)*0x94D049BB133111EBn);
  return x ^ x >> 31n;
};

/** The package's noise of (key, image, t): n standard normal numbers, in float32 as there. */
export function indexedNoise(key, index, t, n) {
  const seed = mix64(wrap(mix64(wrap(mix64(BigInt(key)) + BigInt(index)*GOLDEN)) + BigInt(t)*GOLDEN));
  return Float64Array.from({length: n}, (_, i) => {
    const bits = mix64(wrap(seed + BigInt(i+1)*GOLDEN)), u = Number(bits >> 32n), v = Number(bits & 0xFFFFFFFFn);
    return Math.fround(Math.sqrt(-2*Math.log((u + .5)/2**32))*Math.cos(2*Math.PI*v/2**32));
  });
}

// --- data with a known answer ------------------------------------------------------------------

/** E[eps | x_t] if the data are narrow Gaussians around `centers`, [[x, y], ...], for points [x, y, x, y, ...]. */
export function exactEps({alphaBar}, centers, std, points, t) {
  const a = alphaBar[t], root = Math.sqrt(a), v = a*std*std + 1 - a, s = Math.sqrt(1-a), eps = new Float64Array(points.length);
  const near = new Float64Array(centers.length);
  for (let p = 0; p < points.length; p += 2) {
    let least = Infinity, sum = 0, ex = 0, ey = 0;
    centers.forEach(([x, y], i) => {
      near[i] = ((points[p]-root*x)**2 + (points[p+1]-root*y)**2)/(2*v);
      least = Math.min(least, near[i]);
    });
    centers.forEach(([x, y], i) => {                      // without `least` all weights are 0 at small t
      const w = Math.exp(least - near[i]);
      sum += w; ex += w*(points[p]-root*x); ey += w*(points[p+1]-root*y);
    });
    eps[p] = s*ex/sum/v; eps[p+1] = s*ey/sum/v;
  }
  return eps;
}
