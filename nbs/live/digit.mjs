// A digit, noised and denoised by the network: draw one, drag t, step back, watch its bits.
import {ask, color, control, eachFrame, el, picture, symbol, wide} from "./kit.mjs";

// The first test image of each digit, 17 gray levels a to q.
export const DIGITS = `aafnjbaaaanpkpfaadpcaliaaemaaiiaafiaajiaaelabmhaacofkmaaaagnkaaa
aaabljaaaaahqnaaaaeoqjaaakqlqiaaaaadqgaaaaadqiaaaaafqkaaaaacogaa
aaaipiaaaadqmqeaaackbqeaaaaaioaaaaajpdaaadqoeaaaaepohbaaaaajmoea
acjpojdaaenijqiaaaagopdaaaalocaaaaacplaaaaaacpeaabfgnqgaacmmnlaa
aaajjaaaaadqjaaaadokacaaakqfhpbaaclpqnbaaaahqdaaaaagpaaaaaaeqfaa
aamkaaaaaaoqqoaaaanqpkbaaalqqhaaaaaehqhaaaaaeqjaaafemqeaaajqqkaa
aabnodaaaaiqncaaacqqdaaaadqmbaaaafqofaaaadqqqqgaaboqqqmaaadmpoha
aadmqqgaaaklhqlaaaaacokaaflijqdaajqqqqjaabejqgaaaaaloaaaaaeqfaaa
aakhnjaaaajkmpcaaaelklaaaabqkbaaaamneaaaaambmaaaabkcoaaaaalofaaa
aacniaaaaagqqgaaaafpnlaaaaahqpaaaaaaaodaaaaaahlaaaadeeqcaacpnonc`.split("\n")
  .map(line => Float64Array.from(line, c => (c.charCodeAt(0)-97)/8 - 1));

/** Ten buttons with a digit each; chosen(i) hears which. */
function thumbs(words, chosen, first) {
  const buttons = DIGITS.map((x, i) => {
    const {canvas, draw} = picture("", `a handwritten ${i}`);
    draw(x);
    return el("button", {type: "button", class: "live-thumb", "aria-label": `the ${i}`, "aria-pressed": i === first ? "true" : "false",
      onclick: () => { mark(i); chosen(i); }}, canvas);
  });
  const mark = i => buttons.forEach((b, j) => b.setAttribute("aria-pressed", String(i === j)));
  return {box: el("div", {class: "live-thumbs", role: "group", "aria-label": words}, ...buttons), mark};
}

/** A digit that can be drawn with mouse, finger or keys; changed(x) hears each change. */
function drawing(title, changed) {
  const pad = picture(title, "your digit: draw with the mouse, a finger, or the arrow keys and the space bar");
  const x = new Float64Array(64).fill(-1);
  let cursor = 27, ink = 1, last = null;
  pad.canvas.tabIndex = 0;
  pad.canvas.setAttribute("role", "application");
  const paint = (i, level) => { x[i] = level; };
  const show = () => pad.draw(x);
  const soft = (r, c) => {                                   // a pen of about a pixel and a half, in 17 levels
    for (let i = 0; i < 8; i++) for (let j = 0; j < 8; j++) {
      const d = Math.hypot(i+.5-r, j+.5-c), level = Math.round(Math.max(0, Math.min(1, 1.35-d))*16)/8 - 1;
      const v = ink > 0 ? Math.max(x[8*i+j], level) : Math.min(x[8*i+j], -level);
      paint(8*i+j, v);
    }
  };
  const place = e => { const r = pad.canvas.getBoundingClientRect(); return [(e.clientY-r.top)/r.height*8, (e.clientX-r.left)/r.width*8]; };
  const stroke = e => {
    const [r, c] = place(e), [r0, c0] = last ?? [r, c], n = Math.ceil(Math.hypot(r-r0, c-c0)*4) || 1;
    for (let k = 1; k <= n; k++) soft(r0 + (r-r0)*k/n, c0 + (c-c0)*k/n);
    last = [r, c];
    show();
    changed(x);
  };
  pad.canvas.addEventListener("pointerdown", e => {
    pad.canvas.setPointerCapture(e.pointerId);
    const [r, c] = place(e), i = 8*Math.min(7, Math.max(0, r|0)) + Math.min(7, Math.max(0, c|0));
    ink = e.button === 2 || e.ctrlKey || x[i] > .6 ? -1 : 1;     // where there is ink, the pen is a rubber
    stroke(e);
  });
  pad.canvas.addEventListener("pointermove", e => { if (last) stroke(e); });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) pad.canvas.addEventListener(end, () => { last = null; });
  pad.canvas.addEventListener("contextmenu", e => e.preventDefault());
  pad.canvas.addEventListener("keydown", e => {
    const moves = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -8, ArrowDown: 8};
    if (e.key in moves) {
      const to = cursor + moves[e.key];
      if (to >= 0 && to < 64 && (Math.abs(moves[e.key]) === 8 || to>>3 === cursor>>3)) cursor = to;
    } else if (e.key === " ") { x[cursor] = x[cursor] > 0 ? -1 : 1; show(); changed(x); }
    else return;
    e.preventDefault();
    pad.note.textContent = `row ${(cursor>>3)+1}, column ${(cursor&7)+1}: ${x[cursor] > 0 ? "ink" : "no ink"}`;
  });
  return {...pad, x, set(values) { x.set(values); show(); }};
}

const VARIANCES = {beta: "β", beta_tilde: "β̃", optimal: "optimal"};
const HINTS = {
  beta: "σ² = β: the variance this network was trained with, right if nothing is known of x₀ but its scale.",
  beta_tilde: "σ² = β̃: the smaller end, right if x₀ were known. Over 1,000 steps the two draw alike; over 20 this one draws better digits.",
  optimal: "The optimal σ²: β̃ and what the measured error of x̂₀ adds. It costs the fewest bits; it need not look best.",
  z1: "z is on: fresh noise in each step, as in Algorithm 2.",
  z0: "z is off: every step goes to the mean. The chain forgets where it began: from pure noise it is nearly always a 9, and no sample.",
  clamp1: "x̂₀ is cut to [-1, 1] before it is used, as in the official code.",
  clamp0: "x̂₀ is not cut: look at it near t = T, where a small error of ε is multiplied by 1/√ᾱ, more than 150 there.",
};

function choices(changed, {steps = true, kind = "beta"} = {}) {
  const options = {steps: 1000, kind, z: true, clamp: true, index: 0}, says = el("p", {class: "live-says", "aria-live": "polite"});
  const hint = key => { says.textContent = HINTS[key]; };
  const list = el("select", {onchange: () => { options.kind = list.value; hint(list.value); changed("kind"); }},
    ...Object.entries(VARIANCES).map(([k, words]) => el("option", {value: k, selected: k === kind}, words)));
  const box = (key, words) => {
    const input = el("input", {type: "checkbox", checked: true, onchange: () => {
      options[key] = input.checked;
      hint(key + Number(input.checked));
      changed(key);
    }});
    return control(words, input);
  };
  const many = el("select", {onchange: () => { options.steps = Number(many.value); changed("steps"); }},
    ...[1000, 100, 20].map(k => el("option", {value: k}, `${k.toLocaleString("en")} steps`)));
  const row = el("div", {class: "live-row"}, steps ? control("chain of", many) : null, control("variance σ²", list),
                 box("z", "noise z"), box("clamp", "clamp x̂₀"));
  return {options, row, says};
}

const SAYS = {
  yours: "xₜ is made from your digit by Eq. 4. The network has not seen the digit: only xₜ and t.",
  noise: "x_T is pure noise: nothing of a digit is in it. Run the chain.",
  step: "One step of Algorithm 2: the mean of p(xₜ₋₁ | xₜ), and noise z of size σ.",
};

/** Draw a digit; drag t; step back through Algorithm 2. With data-show="forward" only what Eq. 4 says. */
export function digit(place, failed) {
  const forward = place.dataset.show === "forward";
  const pad = drawing(symbol("x_0", "x0"), () => begin("yours"));
  const xt = picture(symbol("x_t", "xt"), "x_t: the noised digit");
  const eps = picture(symbol("ε", "eps"), "the noise that was added", {most: 2.5});
  const guess = picture(symbol("ε_θ", "theta"), "the network's guess of the noise", {most: 2.5});
  const clean = picture(symbol("x̂_0", "x0"), "the image that this guess implies");
  const slider = el("input", {type: "range", min: 0, max: 1000, step: 1, value: 400, oninput: () => begin("yours")});
  const number = el("output", {class: "live-number"}), says = el("p", {class: "live-says", "aria-live": "polite"});
  const {options, row, says: hint} = choices(key => {
    if (key !== "steps") return again();
    slider.step = 1000/options.steps;                        // a shorter chain has only these t
    begin("yours");
  });
  let now = null, origin = "yours", running = false;         // what is shown, where it came from, is a chain under way?
  const t = () => origin === "noise" ? options.steps : Math.round(slider.value*options.steps/1000);
  const safely = f => async (...args) => { try { await f(...args); } catch (e) { failed(e); } };

  function show(p, words) {
    now = p;
    [[xt, p.xt], [eps, p.noise], [guess, p.eps], [clean, p.x0]].forEach(([picture, values]) => picture.draw(values ?? null));
    eps.note.textContent = p.noise ? "what was added" : "nobody knows it here";
    const error = () => Math.sqrt(p.eps.reduce((s, v, i) => s + (v-p.noise[i])**2, 0)/64).toFixed(2);
    guess.note.textContent = p.eps && p.noise ? `error ${error()}` : "";
    slider.value = p.t*1000/options.steps;
    slider.setAttribute("aria-valuetext", `t = ${p.at} of 1000`);
    number.textContent = `t = ${p.at}`;
    place.dataset.t = p.at;
    if (words) says.textContent = words;
  }
  function halt() {
    if (!running) return;
    running = false;
    go.textContent = "Run";
    ask("stop", {part: "digit"}).catch(failed);
  }
  let open = null;                                           // one question at a time; of those that come meanwhile, the last
  const question = safely(async (does, rest, words) => {
    if (open) { open.next = [does, rest, words]; return; }
    open = {next: null};
    const p = await ask(does, {...rest(), options}), {next} = open;
    open = null;
    if (next) return question(...next);
    if (!running) show(p, words);
  });
  function begin(from) {                                     // x_t from the digit, or x_T from nothing
    halt();
    origin = from;
    return question("noised", () => ({x0: from === "noise" ? null : pad.x, t: t()}), SAYS[from]);
  }
  function again() {                                         // the same x_t with other choices
    halt();
    const {xt, t, noise} = now;
    question("look", () => ({xt, t, noise}));
  }
  const step = () => {
    halt();
    const {xt, t} = now;
    if (t > 0) question("run", () => ({xt, t, until: t-1}), SAYS.step);
  };
  const run = safely(async () => {
    if (running) return halt();
    if (now.t === 0) await begin("noise");
    running = true;
    go.textContent = "Pause";
    const first = now.at, p = await ask("run", {xt: now.xt, t: now.t, options}, part => { if (running) show(part); });
    if (!running || p.stopped) return;
    running = false;
    go.textContent = "Run";
    show(p, `From t = ${first} down to an image: ${p.ms.toFixed(1)} ms a step on this machine. The same noise gives the same image; New noise gives another.`);
  });
  const button = (words, f) => el("button", {type: "button", onclick: f}, words);
  const go = el("button", {type: "button", class: "live-main", onclick: run}, "Run");
  const picks = thumbs("a digit to begin with", i => { pad.set(DIGITS[i]); begin("yours"); }, 3);
  const clear = button("Clear", () => { pad.set(new Float64Array(64).fill(-1)); begin("yours"); });
  const other = button("New noise", () => { options.index++; begin(origin); });
  place.append(
    el("div", {class: "live-row"}, el("span", {}, "Draw, or take one:"), picks.box, clear),
    el("div", {class: "live-pictures"}, pad.box, xt.box, eps.box, ...forward ? [] : [guess.box, clean.box]),
    el("div", {class: "live-row"}, wide("noise up to", slider, number), forward ? other : null));
  if (!forward) place.append(
    el("div", {class: "live-row"}, go, button("One step back", step), button("Start from pure noise", () => begin("noise")), other,
      button("Same noise again", () => begin(origin))),
    row, says, hint);
  pad.set(DIGITS[3]);
  return begin("yours");
}

/** The bound of a digit, term by term. */
export function bits(place, failed) {
  const pad = drawing(symbol("x_0", "x0"), eachFrame(() => { ask("stop", {part: "bits"}).catch(failed); clear(); }));
  const {options, row} = choices(() => go(), {steps: true});
  const plot = el("canvas", {class: "live-plot", role: "img", "aria-label": "the terms of the bound, from t = T on the left to t = 1 on the right"});
  const says = el("p", {class: "live-says", "aria-live": "polite"});
  let terms = [];
  row.querySelectorAll("input").forEach(e => e.closest(".live-control").remove());   // the bound has no choice of z or clamp
  const picks = thumbs("a digit", i => { pad.set(DIGITS[i]); go(); }, 3);
  function clear() { terms = []; draw(); says.textContent = "Press Count: one call of the network for each t."; }
  function draw() {
    const w = plot.clientWidth || 600, h = 190, ratio = devicePixelRatio || 1, T = options.steps;
    plot.width = w*ratio; plot.height = h*ratio; plot.style.height = `${h}px`;
    const c = plot.getContext("2d"), left = 46, bottom = 26, right = 8, top = 8;
    c.scale(ratio, ratio);
    c.font = "12px system-ui, sans-serif";
    const ink = getComputedStyle(place).color, x = t => left + (w-left-right)*(T-t)/(T-1 || 1);
    const sums = [];
    let sum = 0;
    for (const [t, v] of terms) sums.push([Math.max(1, Math.min(t, T)), sum += v]);
    const most = Math.max(2, Math.ceil(sum)), y = v => h-bottom - (h-bottom-top)*v/most;
    c.strokeStyle = color("live-line"); c.fillStyle = ink; c.lineWidth = 1;
    for (let v = 0; v <= most; v++) {
      c.beginPath(); c.moveTo(left, y(v)); c.lineTo(w-right, y(v)); c.stroke();
      c.textAlign = "right"; c.fillText(v, left-6, y(v)+4);
    }
    c.textAlign = "center";
    for (const f of w < 380 ? [1, .5, 0] : [1, .75, .5, .25, 0]) { const t = Math.max(1, Math.round(T*f)); c.fillText(`t = ${t}`, Math.min(w-right-18, Math.max(left+16, x(t))), h-8); }
    if (!sums.length) return;
    c.beginPath(); c.moveTo(left, y(0));
    sums.forEach(([t, v]) => c.lineTo(x(t), y(v)));
    c.lineTo(x(sums.at(-1)[0]), y(0)); c.closePath();
    c.globalAlpha = .25; c.fillStyle = color("xt"); c.fill(); c.globalAlpha = 1;
    c.beginPath(); sums.forEach(([t, v], i) => i ? c.lineTo(x(t), y(v)) : c.moveTo(x(t), y(v)));
    c.strokeStyle = color("xt"); c.lineWidth = 2; c.stroke();
  }
  async function go() {
    terms = [];
    try {
      const end = await ask("bits", {x0: pad.x, options}, part => { terms.push(...part); draw(); });
      if (end.stopped) return;
      const total = terms.reduce((s, [, v]) => s+v, 0), L0 = terms.at(-1)[1], LT = terms[0][1];
      place.dataset.total = total;
      says.textContent = `${total.toFixed(2)} bits a pixel = L_T ${LT.toExponential(1)} + L_mid ${(total-L0-LT).toFixed(2)} + L_0 ${L0 > .005 ? L0.toFixed(2) : L0.toExponential(1)}: `
        + `as a file, ${Math.ceil(total*8)} bytes for these 64 pixels. Counted plainly, 64 pixels of 17 levels are ${Math.ceil(64*Math.log2(17)/8)} bytes. `
        + "A digit like those of the training costs fewer; scribble, and see what a surprise costs.";
    } catch (e) { failed(e); }
  }
  place.append(el("div", {class: "live-row"}, picks.box, el("button", {type: "button", class: "live-main", onclick: go}, "Count")),
    el("div", {class: "live-row"}, el("div", {style: "width:120px"}, pad.box), el("div", {style: "flex:1;min-width:14rem"}, plot, el("div", {style: "font-size:.85rem;text-align:center"}, "bits a pixel received so far, coarse first"))), row, says);
  pad.set(DIGITS[3]);
  addEventListener("resize", eachFrame(draw));
  clear();
  return go();
}

/** Two digits, and what lies between them (section 4.4). */
export function mix(place, failed) {
  const lambdas = Array.from({length: 9}, (_, i) => i/8), {options} = choices(() => {});
  Object.assign(options, {steps: 100, kind: "beta_tilde"});
  let a = 4, b = 9, count = 0;
  const pictures = lambdas.map(l => picture(el("span", {}, `λ = ${l.toFixed(3).replace(/\.?0+$/, "")}`), `between the two digits, lambda ${l}`));
  const slider = el("input", {type: "range", min: 0, max: 100, value: 25, oninput: () => go()});
  const number = el("output", {class: "live-number"}), says = el("p", {class: "live-says", "aria-live": "polite"});
  const go = eachFrame(async () => {
    const t = Number(slider.value), mine = ++count;
    number.textContent = `t = ${t*10}`;
    slider.setAttribute("aria-valuetext", `t = ${t*10} of 1000`);
    try {
      const end = await ask("mix", {a: DIGITS[a], b: DIGITS[b], t, lambdas, options}, ({i, x0}) => { if (mine === count) pictures[i].draw(x0); });
      if (!end.stopped && mine === count) says.textContent = t === 0
        ? "t = 0: nothing is noised, and what lies between two images is one over the other."
        : "Both are noised up to t, mixed, and decoded by the same chain (100 steps). A larger t forgets more of both, and what comes out is more of a digit of its own.";
    } catch (e) { failed(e); }
  });
  place.append(
    el("div", {class: "live-row"}, el("span", {}, "from"), thumbs("the first digit", i => { a = i; go(); }, a).box),
    el("div", {class: "live-row"}, el("span", {}, "to"), thumbs("the second digit", i => { b = i; go(); }, b).box),
    el("div", {class: "live-row"}, wide("noised up to", slider, number),
      el("button", {type: "button", onclick: () => { options.index += 2; go(); }}, "New noise")),
    el("div", {class: "live-pictures live-nine"}, ...pictures.map(p => p.box)), says);
  go();
}
