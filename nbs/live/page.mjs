// What stands in <div class="live" data-part="..."> comes to life here.
import {el} from "./kit.mjs";
import {bits, digit, mix} from "./digit.mjs";
import {pixel} from "./pixel.mjs";
import {plane} from "./plane.mjs";

const PARTS = {digit, bits, mix, plane, pixel};

/** The stored picture, which readers without scripts see, makes room for the part that is alive. */
function awaken(place) {
  const still = place.closest(".cell, section > *, main > *")?.previousElementSibling;
  const make = PARTS[place.dataset.part];
  const failed = e => {
    place.replaceChildren(el("p", {class: "live-error", role: "alert"}, `This part does not run here: ${e.message}. The picture above shows what it does.`));
    still?.classList.remove("live-still");
  };
  try {
    place.replaceChildren();
    Promise.resolve(make(place, failed)).catch(failed);
    if (place.dataset.instead !== undefined) still?.classList.add("live-still");
  } catch (e) { failed(e); }
}

if (!globalThis.DDPM_INSIDE) document.head.append(el("link", {rel: "stylesheet", href: new URL("live.css", import.meta.url)}));
document.querySelectorAll(".live").forEach(awaken);
