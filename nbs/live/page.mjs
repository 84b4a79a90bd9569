// What stands in <div class="live" data-part="..."> comes to life here.
import {el} from "./kit.mjs";
import {bits, digit, mix} from "./digit.mjs";
import {pixel} from "./pixel.mjs";
import {plane} from "./plane.mjs";

const PARTS = {digit, bits, mix, plane, pixel};

/** The stored picture, which readers without scripts see, makes room for the part that is alive. */
function awaken(place) {
  const still = "instead" in place.dataset ? place.previousElementSibling : null, words = [...place.childNodes];
  const failed = e => {
    place.replaceChildren(el("p", {class: "live-error", role: "alert"}, `This part does not run here: ${e.message}.`), ...words);
    still?.classList.remove("live-still");
  };
  const make = PARTS[place.dataset.part];
  place.replaceChildren();
  still?.classList.add("live-still");
  Promise.resolve().then(() => make(place, failed)).catch(failed);
}

// A part begins to work when it comes near the window: a reader who never scrolls there pays nothing for it.
const near = new IntersectionObserver(entries => entries.filter(e => e.isIntersecting).forEach(({target}) => {
  near.unobserve(target);
  awaken(target);
}), {rootMargin: "300px"});
document.querySelectorAll(".live").forEach(e => near.observe(e));
