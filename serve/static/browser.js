// The page without a service: `ask` answers as the service does, with the model in this browser. pipeline/deploy/page.py puts the
// page, this, worker.js and model.js into a static Space; what to fetch, and from where, stands in the page's `data-space`.

const space = JSON.parse(document.documentElement.dataset.space);
let worker, started, model, loaded, failure;

function start() {
  worker?.terminate();
  model = failure = undefined;
  loaded = 0;
  started = load().catch(({ headline = "The model does not run in this browser.", message }) => { failure = { headline, message }; });
}

async function load() {
  if (typeof WebAssembly !== "object") {
    const message = "It has no WebAssembly, or a setting turns it off. Allow it, or take a current Firefox, Chrome, Edge or Safari.";
    throw { headline: "This browser cannot run the model.", message };
  }
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data }) => { loaded = data; };
  model = await tell({ space });
}

// What the worker makes of `message`; throws {headline, message}, with a `code` where it is the text that is refused.
function tell(message) {
  return new Promise((resolve, reject) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = ({ data }) => (data.failed ? reject(data.failed) : resolve(data));
    worker.onerror = ({ message = "its script cannot be loaded" }) => {
      failure = { headline: "The model does not run in this browser.", message: `The worker has stopped: ${message}.` };
      reject(failure);
    };
    worker.postMessage(message, [port2]);
  });
}

const answer = (content, status = 200) => new Response(JSON.stringify(content), { status });

/* Answers `path` as the service does, with more: /ready the `progress` of the loading and its `failure`, {headline, message}; /info the
   model's `page`; /predict the `milliseconds` it took without waiting for the model. */
export async function ask(path, { body } = {}) {
  const { model: name, revision, commit, host, bytes } = space;
  if (path === "ready") return answer({ ready: Boolean(model && !failure), reason: "loading the model", progress: { loaded, bytes }, failure });
  if (path === "info") {
    const page = `${host}/${name}/tree/${commit}`, engine = "onnxruntime in this browser";
    return answer({ model: name, revision, commit, page, ...model, engine, device: "cpu", precision: "fp32" });
  }
  if (failure) start();
  await started;
  try {
    if (failure) throw failure;
    const asked = performance.now();
    const said = await tell({ text: JSON.parse(body).text });
    return answer({ ...said, model: name, revision: commit, milliseconds: performance.now() - asked });
  } catch (error) {
    if (!error.code) failure = error;
    return answer(error, error.code ? 422 : 503);
  }
}

addEventListener("online", () => { if (failure) start(); });
start();
