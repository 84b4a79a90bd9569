// One color for each symbol of the chain, in formulas as in code and pictures: x_0, x_t, epsilon, theta.
const SYMBOLS = {x0: "x\u2080: the image", xt: "x\u209c: the image after t steps of noise", eps: "\u03b5: the noise", theta: "\u03b8: what the network says"};
function paintSymbols(formulas) {
  const letter = e => e ? [...e.querySelectorAll("[data-c]")].map(g => g.dataset.c).join(" ") : "";
  const paint = (e, kind) => {
    if (e.closest("[data-symbol]")) return;
    e.dataset.symbol = kind;
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = SYMBOLS[kind];
    e.prepend(title);
  };
  for (const e of formulas.flatMap(f => [...f.querySelectorAll("[data-mml-node=msub], [data-mml-node=msubsup]")])) {
    const [base, index] = e.children, b = letter(base), i = letter(index);
    if (/1D703/.test(i) && !/1D703/.test(b)) { if (/^(1D716|1D707|1D465 5E|1D43A)/.test(b)) paint(e, "theta"); else paint(index, "theta"); }
    else if (/^1D465( |$)/.test(b) && i === "30") paint(e, "x0");
    else if (/^1D465$/.test(b) && /^(1D461|1D447)/.test(i)) paint(e, "xt");
  }
  for (const e of formulas.flatMap(f => [...f.querySelectorAll("[data-mml-node=mi]")])) {
    const c = letter(e);
    if (c === "1D716") paint(e, "eps"); else if (c === "1D703") paint(e, "theta");
  }
}
