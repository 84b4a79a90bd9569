// Points in the plane: their exact denoiser, no training (page 4's formula), and the chain that ends on them.
import {color, control, eachFrame, el, wide} from "./kit.mjs";
import * as D from "./ddpm.mjs";

const STD = .02, CLOUD = 400, NET = {T: 1000, beta_1: 1e-4, beta_T: .02};
const FIRST = Array.from({length: 60}, (_, i) => { const a = i/60*3*Math.PI, r = .15 + .7*i/60; return [r*Math.cos(a), r*Math.sin(a)]; });

export function plane(place) {
  let centers = [...FIRST], t, cloud, timer = null, pen = false, index = 0;
  const sched = D.linearSchedule(NET), canvas = el("canvas", {class: "live-plane", tabindex: 0, role: "application",
    "aria-label": "a plane: draw points with mouse or finger; a cloud of noise moves to them"});
  const slider = el("input", {type: "range", min: 0, max: 1000, value: 1000, oninput: () => { stop(); forward(Number(slider.value)); }});
  const number = el("output", {class: "live-number"}), says = el("p", {class: "live-says", "aria-live": "polite"});
  const arrows = el("input", {type: "checkbox", checked: true, onchange: () => draw()});
  const z = el("input", {type: "checkbox", checked: true, onchange: () => { says.textContent = z.checked ? "z on: Algorithm 2." : "z off: each point goes to the mean. The whole cloud shrinks to one place and ends on one of your points; with noise it ends on all of them."; }});
  const kind = el("select", {}, el("option", {value: "beta"}, "β"), el("option", {value: "beta_tilde"}, "β̃"));
  const go = el("button", {type: "button", class: "live-main", onclick: () => timer ? stop() : run()}, "Run");
  const flat = () => Float64Array.from({length: 2*CLOUD}, (_, i) => centers.length ? centers[(i>>1)%centers.length][i&1] : 0);
  const noise = at => D.indexedNoise(7, index, at, 2*CLOUD);

  function forward(to) {                                     // Eq. 4 of the points themselves
    t = to;
    const eps = noise(0), x0 = flat();
    cloud = t === 0 ? x0 : t === sched.T ? noise(sched.T+1) : D.qSample(sched, x0, t, eps);
    draw();
  }
  const draw = eachFrame(() => {
    const side = Math.min(place.clientWidth - 30, 440), ratio = devicePixelRatio || 1, c = canvas.getContext("2d");
    canvas.width = canvas.height = side*ratio; canvas.style.width = canvas.style.height = `${side}px`;
    const x = v => (v+2.2)/4.4*side, y = v => (2.2-v)/4.4*side;
    c.scale(ratio, ratio);
    if (arrows.checked && t > 0 && centers.length) {
      const grid = [];
      for (let i = -2; i <= 2; i += .4) for (let j = -2; j <= 2; j += .4) grid.push(i, j);
      const eps = D.exactEps(sched, centers, STD, Float64Array.from(grid), t);
      c.strokeStyle = color("eps"); c.lineWidth = 1.3;
      for (let p = 0; p < grid.length; p += 2) {              // the score is -eps over the size of the noise: its direction
        const n = Math.hypot(eps[p], eps[p+1]) || 1, len = .26*Math.min(1, n/1.2), dx = -eps[p]/n*len, dy = -eps[p+1]/n*len;
        const a = [x(grid[p]), y(grid[p+1])], b = [x(grid[p]+dx), y(grid[p+1]+dy)], turn = Math.atan2(b[1]-a[1], b[0]-a[0]);
        c.beginPath(); c.moveTo(...a); c.lineTo(...b);
        for (const s of [.5, -.5]) { c.moveTo(...b); c.lineTo(b[0]-5*Math.cos(turn+s), b[1]-5*Math.sin(turn+s)); }
        c.stroke();
      }
    }
    c.fillStyle = color("x0");
    for (const [a, b] of centers) { c.beginPath(); c.arc(x(a), y(b), 3.4, 0, 7); c.fill(); }
    c.fillStyle = color("xt"); c.globalAlpha = .6;
    for (let p = 0; p < cloud.length; p += 2) c.fillRect(x(cloud[p])-1.4, y(cloud[p+1])-1.4, 2.8, 2.8);
    number.textContent = `t = ${t}`; slider.value = t; place.dataset.t = t;
  });
  const farthest = () => {
    let most = 0;
    for (let p = 0; p < cloud.length; p += 2) most = Math.max(most, Math.min(...centers.map(([x, y]) => Math.hypot(cloud[p]-x, cloud[p+1]-y))));
    return most;
  };
  function stop() { cancelAnimationFrame(timer); timer = null; go.textContent = "Run"; }
  function run() {
    if (!centers.length) { says.textContent = "There are no points to go back to: draw some."; return; }
    if (t === 0) forward(sched.T);
    go.textContent = "Pause";
    const frame = () => {
      for (let k = 0; k < 6 && t > 0; k++, t--) {
        const eps = D.exactEps(sched, centers, STD, cloud, t), p = D.pMeanVariance(sched, cloud, t, eps, kind.value, {clamp: false});
        cloud = D.pSample(p, t, z.checked ? noise(t) : new Float64Array(cloud.length));
      }
      draw();
      if (t > 0) timer = requestAnimationFrame(frame);
      else { stop(); says.textContent = `Every point of the cloud lies on one of yours; the farthest is ${farthest().toFixed(2)} away. A perfect denoiser of finite data only copies it; a network is useful because it is not perfect.`; }
    };
    timer = requestAnimationFrame(frame);
  }
  const put = e => {
    const r = canvas.getBoundingClientRect(), p = [(e.clientX-r.left)/r.width*4.4 - 2.2, 2.2 - (e.clientY-r.top)/r.height*4.4];
    const near = centers.at(-1);
    if (!near || Math.hypot(p[0]-near[0], p[1]-near[1]) > .07) centers.push(p);
    if (centers.length > 200) centers.shift();
    stop(); forward(t);
  };
  canvas.addEventListener("pointerdown", e => { canvas.setPointerCapture(e.pointerId); pen = true; put(e); });
  canvas.addEventListener("pointermove", e => { if (pen) put(e); });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { pen = false; });
  const button = (words, f) => el("button", {type: "button", onclick: f}, words);
  place.append(
    el("div", {class: "live-row"}, go, button("Noise again", () => { stop(); index++; forward(sched.T); }),
      button("Clear the points", () => { stop(); centers = []; forward(t); says.textContent = "Draw points of your own."; }),
      button("The spiral", () => { stop(); centers = [...FIRST]; forward(t); })),
    canvas,
    el("div", {class: "live-row"}, wide("noise up to", slider, number)),
    el("div", {class: "live-row"}, control("arrows: the score", arrows), control("noise z", z), control("variance σ²", kind)), says);
  says.textContent = "Your points are the data (green). Draw more, or clear them. Run: the blue cloud of noise goes back to them.";
  addEventListener("resize", draw);
  forward(sched.T);
}
