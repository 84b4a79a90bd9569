// How fast the page's network is: `node benchmarks/live.mjs` prints milliseconds a call, and seconds for chains.
import fs from "fs";
import {fileURLToPath} from "url";
import * as D from "../nbs/live/ddpm.mjs";

const folder = fileURLToPath(new URL("../ddpm_nbdev/weights/digits/", import.meta.url));
const file = fs.readFileSync(folder + "model.safetensors"), config = JSON.parse(fs.readFileSync(folder + "config.json", "utf8"));
const net = D.unet(config.model.args, D.readSafetensors(file.buffer.slice(file.byteOffset, file.byteOffset + file.length)));
const x = D.indexedNoise(0, 0, 0, 64), median = list => list.sort((a, b) => a-b)[list.length >> 1];
for (let i = 0; i < 300; i++) net(x, 1 + i);                // the engine compiles what is called often
const times = Array.from({length: 1000}, (_, i) => { const start = performance.now(); net(x, 1 + i); return performance.now() - start; });
console.log(`node ${process.version}, one image: ${median(times).toFixed(2)} ms a call (the median of 1,000)`);
for (const steps of [1000, 100, 20]) {
  const s = D.linearSchedule(config.schedule.args, steps), start = performance.now();
  let xt = D.indexedNoise(0, 1, steps+1, 64);
  for (let t = steps; t > 0; t--) xt = D.pSample(D.pMeanVariance(s, xt, t, net(xt, s.net[t])), t, D.indexedNoise(0, 1, t, 64));
  const took = (performance.now() - start)/1000;
  console.log(`a chain of ${steps} steps: ${took.toFixed(2)} s, ${(steps/took).toFixed(0)} steps a second`);
}
