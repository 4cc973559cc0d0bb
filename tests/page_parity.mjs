// What the page's model.js answers in Node: node page_parity.mjs CACHE MODEL_JS LIBRARY_JS < {"release": {model, commit, host}, "texts": [...]}
// prints {"seconds": until the first answer, "answers": [{label, confidence, ...}]}.
import { text } from "node:stream/consumers";
import { pathToFileURL } from "node:url";

const started = performance.now();
const [cache, ...modules] = process.argv.slice(2);
const [{ load }, library] = await Promise.all(modules.map((path) => import(pathToFileURL(path))));
const { release, texts } = JSON.parse(await text(process.stdin));
library.env.cacheDir = cache;
const model = await load(library, release);
const answers = [];
let seconds = 0;
for (const one of texts) {
  answers.push(await model.classify(one));
  seconds ||= (performance.now() - started) / 1000;
}
console.log(JSON.stringify({ seconds, answers }));
