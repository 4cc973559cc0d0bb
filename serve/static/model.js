// A release in JavaScript: its ONNX model and its tokenizer through transformers.js, in a browser's worker or in Node.
//
//   const model = await load(await import("@huggingface/transformers"), { model: "user/repo", commit, host: "https://huggingface.co" });
//   await model.classify("Oil prices rise")   // {label, confidence, probabilities, tokens, truncated}, as the service's POST /predict

// What a person can do something about, in the page's words.
export class Trouble extends Error {
  constructor(headline, message) {
    super(message);
    this.headline = headline;
  }
}

// A text that is refused; code and message as the service has them.
export class Refusal extends Error {
  constructor(message, code = "text_unreadable") {
    super(message);
    this.code = code;
  }
}

const LARGEST = 1 << 20;  // bytes of a text; more takes seconds

/* Fetches what `release` = {model, commit, host} needs and makes it ready; `progress(name, bytes)` is told how much of each file is here.
   Throws Trouble where network, Hub or release do not give it. */
export async function load(library, { model, commit, host }, progress = () => {}) {
  const { AutoModelForSequenceClassification, AutoTokenizer, Tensor, env } = library;
  const what = `${model} at ${commit.slice(0, 8)}`;
  // Here too, and not in the option `revision` alone: without it the library would ask main for one of the files.
  Object.assign(env, { remoteHost: host, remotePathTemplate: `{model}/resolve/${commit}/`, allowLocalModels: false });
  env.fetch = (url, options) => fetched(url, options, what);
  const options = {
    revision: commit,
    dtype: "fp32",  // onnx/model.onnx; the default in a browser is another file
    progress_callback: ({ status, file, loaded }) => { if (status === "progress") progress(file, loaded); },
  };
  const [tokenizer, classifier] = await Promise.all([
    AutoTokenizer.from_pretrained(model, options),
    AutoModelForSequenceClassification.from_pretrained(model, options),
  ]);
  const { id2label, max_position_embeddings: positions = 512 } = classifier.config;
  const labels = Object.keys(id2label).sort((a, b) => a - b).map((id) => id2label[id]);
  const maxLength = tokenizer.model_max_length < 1e6 ? tokenizer.model_max_length : positions;  // 1e30 stands for no limit

  async function classify(text) {
    check(text);
    const { ids, truncated, empty } = encode(tokenizer, text, maxLength);
    if (empty) throw new Refusal("The text holds no character that the model can read.");
    const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, ids.length]);
    const { logits } = await classifier({ input_ids: row(ids), attention_mask: row(ids.map(() => 1)) });
    const probabilities = softmax([...logits.data]).map((p) => Number(p.toFixed(6)));
    const confidence = Math.max(...probabilities);
    const label = labels[probabilities.indexOf(confidence)];
    return { label, confidence, probabilities: Object.fromEntries(labels.map((name, i) => [name, probabilities[i]])), tokens: ids.length, truncated };
  }

  return { labels, maxLength, classify };
}

// The same texts are refused as by the service.
function check(text) {
  if (!text.trim()) throw new Refusal("`text` is blank; allowed is any text with at least one character to read.");
  if (text.includes("\0")) throw new Refusal("`text` holds a NUL character (\\u0000); allowed is any text without.");
  if (new Blob([text]).size > LARGEST) throw new Refusal(`The text is larger than ${LARGEST} bytes, the most that is allowed.`, "too_large");
  if (text.isWellFormed?.() === false) throw new Refusal("`text` holds half a character, a lone surrogate; allowed is any text without.");
}

/* Token ids of at most `maxLength`. Cut here, because transformers.js cuts after it has put the special tokens around the
   text, and so loses the last one, without which the answer is another. */
function encode(tokenizer, text, maxLength) {
  const around = tokenizer.encode("").length, whole = tokenizer.encode(text);
  if (whole.length <= maxLength) return { ids: whole, truncated: false, empty: whole.length <= around };
  const words = tokenizer.encode(text, { add_special_tokens: false });
  let before = 0;  // special tokens in front
  while (before < around && words.some((id, i) => whole[before + i] !== id)) before++;
  const room = maxLength - around;
  const kept = tokenizer.config.truncation_side === "left" ? words.slice(words.length - room) : words.slice(0, room);
  return { ids: [...whole.slice(0, before), ...kept, ...whole.slice(before + words.length)], truncated: true, empty: false };
}

function softmax(logits) {
  const most = Math.max(...logits);
  const shifted = logits.map((logit) => Math.exp(logit - most));
  const sum = shifted.reduce((a, b) => a + b);
  return shifted.map((value) => value / sum);
}

// `fetch`, with what goes wrong in words, also in the middle of a file; `what` is being fetched.
export async function fetched(url, options, what) {
  const { host } = new URL(url);
  const changed = options?.integrity ? ", or gives another file than this page was made with" : "";
  const within = (step) => step.catch(() => {
    throw new Trouble("The model cannot be fetched.", `${host} cannot be reached${changed}. Check the network, then try again.`);
  });
  const response = await within(fetch(url, options));
  if (response.ok) {
    const reader = response.body.getReader();
    const body = new ReadableStream({
      async pull(controller) {
        const { done, value } = await within(reader.read());
        if (done) controller.close();
        else controller.enqueue(value);
      },
      cancel: () => reader.cancel(),
    });
    return new Response(body, response);
  }
  const gone = [401, 403, 404].includes(response.status);
  throw new Trouble(
    gone ? "The model is not there." : "The model cannot be fetched.",
    gone ? `${host} has no ${what} that everybody may read (status ${response.status}): it was deleted, renamed or made private.`
         : `${host} answered with status ${response.status}. Try again later.`,
  );
}
