addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  const all = what => [...document.querySelectorAll(what)];
  paintSymbols(all("main .math"));
  const goesOn = e => e.classList.toggle("more", e.tabIndex === 0 && e.scrollLeft + e.clientWidth < e.scrollWidth - 2);
  document.addEventListener("scroll", e => { if (e.target.matches?.("main pre, main .math, main .sd-table")) goesOn(e.target); }, {capture: true, passive: true});
  const fit = () => {
    const math = all("main .math.display, main .math.inline");
    math.forEach(e => { e.style.fontSize = ""; e.classList.remove("alone"); });
    // A formula in running text that is wider than the text gets a line of its own,
    const wide = e => e.querySelector("svg")?.getBoundingClientRect().width > e.closest("p, li, dd, td, div").clientWidth;
    math.filter(e => e.matches(".inline") && wide(e)).forEach(e => e.classList.add("alone"));
    // one that is wider than its line is set smaller, as far as it can still be read,
    math.filter(e => e.clientWidth).map(e => [e, e.clientWidth/e.scrollWidth]).forEach(([e, r]) => { if (r < 1) e.style.fontSize = Math.max(.72, .99*r) + "em"; });
    // and so is a table;
    const tables = all("main .sd-table");
    tables.forEach(e => { e.style.removeProperty("--fit"); });
    for (const least of [.8, .76])                              // twice: words break otherwise when they are smaller
      tables.filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).forEach(e => {
        e.style.setProperty("--fit", Math.max(least, .98*(+e.style.getPropertyValue("--fit") || 1)*e.clientWidth/e.scrollWidth));
      });
    // and what even then is wider than its box gets a tab stop, so that it can be scrolled without a mouse, and shows that it goes on.
    const boxes = all("main pre, main .math, main .sd-table");
    boxes.map(e => [e, e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0]).forEach(([e, more]) => {
      if (more) e.tabIndex = 0; else e.removeAttribute("tabindex");
      goesOn(e);
    });
  };
  fit();
  addEventListener("resize", fit);
  document.addEventListener("toggle", fit, true);
  // The sidebar is longer than a screen: show where in it the reader is.
  const bar = document.getElementById("quarto-sidebar"), here = bar?.querySelector(".active");
  if (here) bar.scrollTop += here.getBoundingClientRect().top - bar.getBoundingClientRect().top - bar.clientHeight/2;
  // Typesetting has moved the place that the address names.
  const visit = performance.getEntriesByType("navigation")[0]?.type;
  if (location.hash && visit === "navigate") document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
});
