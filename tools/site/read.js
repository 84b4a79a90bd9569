// Three ways to read a page, remembered: what is folded away differs, nothing is lost. Without scripts pictures' and checks' code stays folded.
document.addEventListener("DOMContentLoaded", () => {
  const folds = [...document.querySelectorAll("main details.code-fold")], bar = document.querySelector(".reading");
  if (!folds.length || !bar) return bar?.remove();
  const words = e => e.querySelector("summary").textContent, kinds = new Map(folds.map(e => [e, e.classList.contains("idea") ? "idea"
    : /^(Check|Solution|Imports|The twin)/.test(words(e)) ? "check" : words(e) === "Exported source" ? "source" : e.open ? "code" : "picture"]));
  const open = {story: ["idea"], code: ["idea", "source", "code"], everything: ["idea", "source", "code", "check", "picture"]};
  const keep = value => { try { if (value) localStorage.setItem("read", value); return localStorage.getItem("read"); } catch { return value; } };
  const read = mode => {
    folds.forEach(e => { e.open = open[mode].includes(kinds.get(e)); });
    bar.querySelectorAll("button").forEach(b => b.setAttribute("aria-pressed", b.dataset.read === mode));
    document.documentElement.dataset.read = mode;
    visit();
  };
  // What an address leads to is open: the fold that the place is in, or the one that defines the name.
  const visit = () => {
    let name = location.hash.slice(1);
    try { name = decodeURIComponent(name); } catch { return; }
    const there = name && document.getElementById(name);
    for (let e = there?.closest?.("details"); e; e = e.parentElement.closest("details")) e.open = true;
    if (/^\w+$/.test(name)) folds.filter(e => new RegExp(`^(def|class) ${name}\\b`, "m").test(e.querySelector("code")?.textContent)).forEach(e => { e.open = true; });
  };
  folds.forEach(e => { if (kinds.get(e) === "check" && /^(Check|Solution: )/.test(words(e))) e.classList.add("passed"); });
  bar.addEventListener("click", e => { if (e.target.dataset.read) read(keep(e.target.dataset.read) ?? e.target.dataset.read); });
  addEventListener("hashchange", visit);
  bar.hidden = false;
  read(Object.hasOwn(open, keep()) ? keep() : "story");
});
