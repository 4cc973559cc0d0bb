// The page's worker: fetches transformers.js, WebAssembly and the release, then answers texts; the page stays responsive meanwhile.
import { fetched, load } from "./model.js";

let model;
onmessage = async ({ data: { space, text }, ports: [port] }) => {
  try {
    model ??= await start(space);
    port.postMessage(text === undefined ? { labels: model.labels, max_length: model.maxLength } : await model.classify(text));
  } catch ({ headline = "The model does not run in this browser.", message, code }) {
    port.postMessage({ failed: { headline, message, code } });
  }
};

async function start({ files, ...release }) {
  const here = {};
  const progress = (name, bytes) => {
    here[name] = bytes;
    postMessage(Object.values(here).reduce((a, b) => a + b));
  };
  const content = {};
  await Promise.all(Object.entries(files).map(async ([name, { url, integrity }]) => {
    const response = await fetched(new URL(url, location.href), { integrity }, url);
    content[name] = await response.arrayBuffer();
    progress(name, content[name].byteLength);
  }));
  // As blobs: `import` has no way to name the hash that was checked above.
  const script = (name) => URL.createObjectURL(new Blob([content[name]], { type: "text/javascript" }));
  const library = await import(script("library"));
  Object.assign(library.env.backends.onnx.wasm, { wasmBinary: content.wasm, wasmPaths: { mjs: script("glue") } });
  const loaded = await load(library, release, progress);
  await forgetOthers(library.env.cacheKey, `${release.host}/${release.model}/resolve/`, release.commit);
  return loaded;
}

// The browser keeps what it has fetched; of this model, one commit is enough.
async function forgetOthers(name, files, commit) {
  try {
    const cache = await caches.open(name);
    const others = (await cache.keys()).filter(({ url }) => url.startsWith(files) && !url.startsWith(files + commit));
    await Promise.all(others.map((one) => cache.delete(one)));
  } catch { /* a private window may have no cache */ }
}
