// What every living part uses: elements, controls, small pictures, and the network in its own thread.

/** An element: el("button", {type: "button"}, "go"). Keys with "on" listen, others are attributes. */
export function el(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) {
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (v !== null && v !== false) e.setAttribute(k, v === true ? "" : v);
  }
  e.append(...children.filter(c => c !== null && c !== undefined));
  return e;
}

let names = 0;
/** A labeled control: a slider, a checkbox or a list, with the words before it. */
export function control(words, input, after = null) {
  input.id ||= `live-${++names}`;
  const label = el("label", {for: input.id}, words);
  const parts = input.type === "checkbox" ? [input, label] : [label, input];
  return el("span", {class: "live-control"}, ...parts, after);
}

/** A slider as wide as there is room, with its words before and its number after it. */
export function wide(words, slider, number) {
  const box = control(words, slider, number);
  box.classList.add("live-wide");
  return box;
}

/** A symbol with an index, as text for all: x_t is x<sub>t</sub>. `kind` colors it: x0, xt, eps or theta. */
export function symbol(text, kind) {
  const [base, index] = text.split("_");
  return el("span", {class: `live-symbol live-${kind}`}, base, index === undefined ? null : el("sub", {}, index));
}

/** A small picture: draw(values, h, w) paints numbers from -1 (black) to 1 (white), or from -3 to 3 for noise. */
export function picture(title, about, {side = 8, most = 1} = {}) {
  const canvas = el("canvas", {width: side, height: side, role: "img", "aria-label": about});
  const note = el("span", {class: "live-note"}), box = el("figure", {class: "live-picture"}, canvas, el("figcaption", {}, title, note));
  const context = canvas.getContext("2d"), pixels = context.createImageData(side, side);
  return {box, canvas, note, draw(values) {
    canvas.classList.toggle("live-empty", !values);
    if (!values) return context.clearRect(0, 0, side, side);
    for (let i = 0; i < side*side; i++) {
      const v = Math.max(0, Math.min(255, (values[i]/most+1)*127.5));
      pixels.data.set([v, v, v, 255], 4*i);
    }
    context.putImageData(pixels, 0, 0);
  }};
}

/** Run f at most once a frame, however often it is asked for. */
export function eachFrame(f) {
  let asked = false;
  return () => { if (!asked) requestAnimationFrame(() => { asked = false; f(); }); asked = true; };
}

/** Colors of the page as it is now: they change with the theme. */
export const color = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim() || "#888";

// --- the worker that has the network ------------------------------------------------------------

let asking = null;
/** Ask the network's thread; `tell` hears the parts of a long answer. The first call starts it and reads the weights. */
export async function ask(does, rest = {}, tell = () => {}) {
  asking ??= start();
  return (await asking)(does, rest, tell);
}

const fetched = async (name, kind) => {
  const answer = await fetch(new URL(`digits/${name}`, import.meta.url));
  if (!answer.ok) throw Error(`${name} could not be read (${answer.status}): reload the page`);
  return answer[kind]();
};

async function start() {
  const inside = globalThis.DDPM_INSIDE;                    // the page in one file has it all in itself
  const worker = inside ? inside.worker() : new Worker(new URL("worker.mjs", import.meta.url), {type: "module"});
  const open = new Map();
  let count = 0;
  const send = (does, rest, tell) => new Promise((done, failed) => {
    open.set(++count, {done, failed, tell});
    worker.postMessage({id: count, does, ...rest});
  });
  worker.onmessage = ({data: {id, value, part, error}}) => {
    const {done, failed, tell} = open.get(id);
    if (part !== undefined) return tell(part);
    open.delete(id);
    if (error === undefined) done(value); else failed(Error(error));
  };
  worker.onerror = e => {
    e.preventDefault?.();
    for (const {failed} of open.values()) failed(Error(e.message || "this browser runs no module workers"));
    open.clear();
  };
  const [weights, text] = inside ? [inside.weights(), inside.config] : await Promise.all([
    fetched("model.safetensors", "arrayBuffer"), fetched("config.json", "text")]);
  await send("load", {weights, text}, () => {});
  return send;
}
