// Search by whole words, headings first. The renderer's own looks for anything alike (Fuse): "ema" found "remain". It asks the
// class Fuse for hits, so this one takes its place, and the old one is asked only if no word is found: then it is misspelled.
document.addEventListener("DOMContentLoaded", () => {
  const Alike = window.Fuse, SKIP = 6;                          // the longest end that may be missing: "sampl", "sampling"
  const HEADING = [0, 50, 180, 300], TEXT = [0, 15, 40, 60];    // by how well a word is found
  const GREEK = {α: "alpha", β: "beta", ε: "epsilon", ϵ: "epsilon", θ: "theta", λ: "lambda", μ: "mu", σ: "sigma", Σ: "Sigma"};
  const plain = s => s.replace(/[αβεϵθλμσΣ]/g, c => ` ${GREEK[c]} `).toLowerCase().replace(/[^\p{L}\p{N}_]+/gu, " ").trim();
  // How well a word is found in a text: 3 by itself, 2 as part of a name_with_parts, 1 as the beginning of a word, 0 not.
  const found = (word, text) => {
    let best = 0;
    for (let i = text.indexOf(word); i >= 0; i = text.indexOf(word, i + 1)) {
      const before = text[i-1] ?? " ", after = text[i+word.length] ?? " ";
      if (before !== " " && before !== "_") continue;
      const rest = text.slice(i + word.length).search(/[ _]|$/);
      best = Math.max(best, before + after === "  " ? 3 : rest === 0 ? 2 : rest <= SKIP ? 1 : 0);
      if (best === 3) break;
    }
    return best;
  };
  const times = (word, text) => text.split(` ${word}`).length - 1;
  window.Fuse = class {
    constructor(index, options) {
      this.alike = Alike && new Alike(index, options);
      // A TeX name is a word: \sigma_t is sigma.
      this.entries = index.map((item, place) => ({item, place, title: plain(item.title), section: plain(item.section ?? ""),
        file: plain(item.href.replace(/\.html.*/, "")), text: ` ${plain(item.text.replace(/\\([A-Za-z]+)/g, " $1 "))} `}));
    }
    search(query, {limit} = {}) {
      const all = plain(query), words = [...new Set(all.split(" ").filter(Boolean))].slice(0, 12);   // nobody types more
      if (!words.length) return [];
      const hits = this.entries.map(e => {
        let score = 0;
        for (const w of words) {
          const [section, title, text] = [e.section, e.title, e.text].map(t => found(w, t));
          if (!section && !title && !text && !found(w, e.file)) return null;
          // the heading of a section, of a page or its file for its beginning; the glossary; the text, where the word is often
          score += Math.max(HEADING[section], e.section ? 0 : 1.1*HEADING[title], e.section ? 0 : HEADING[Math.min(2, found(w, e.file))],
              TEXT[text] + (text > 1 && e.title === "notation" ? 80 : 0)) + 8*title + Math.min(15, times(w, e.text)*1500/(1000 + e.text.length));
        }
        if (e.section === all || !e.section && e.title.replace(/^(the|a|an) /, "") === all) score += 1000;
        return {item: e.item, score, place: e.place};
      }).filter(Boolean).sort((a, b) => b.score - a.score || a.place - b.place);
      if (!hits.length) return this.alike && query.length <= 32 ? this.alike.search(query, {limit}) : [];   // it takes seconds for a long one
      return hits.slice(0, limit);
    }
  };
});
