"use strict";
// The playground: asks the server that it came from. Whatever the model writes becomes text nodes, never HTML.

const LIKELIEST = 5;
const at = (id) => document.getElementById(id);
const output = at("output");
const state = { model: "", chat: false, controller: null, messages: [] };

async function connect() {
  try {
    const [models, info] = await Promise.all([fetch("v1/models", headers()), fetch("tokenizer_info", headers())]);
    if (models.status === 401) {
      at("model").textContent = "an API key is needed: see the options";
      return;
    }
    const card = (await models.json()).data[0];
    state.model = card.id;
    at("model").textContent = `${card.id}, context ${card.max_model_len} tokens`;
    at("max_tokens").max = card.max_model_len;
    state.chat = (await info.json()).chat_template !== null;
    const chat = document.querySelector("input[value=chat]");
    chat.disabled = !state.chat;
    chat.parentElement.title = state.chat ? "" : "This model has no chat template.";
  } catch {
    at("model").textContent = "the server does not answer";
  }
}

function headers() {
  const key = at("key").value.trim();
  return { headers: key ? { Authorization: `Bearer ${key}` } : {} };
}

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

function body(prompt) {
  const asked = { model: state.model, stream: true, stream_options: { include_usage: true } };
  for (const name of ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"]) {
    if (at(name).value !== "") asked[name] = Number(at(name).value);
  }
  if (at("stop_text").value) asked.stop = [at("stop_text").value.replaceAll("\\n", "\n")];
  if (at("regex").value) asked.regex = at("regex").value;
  if (mode() === "chat") {
    return { ...asked, messages: [...state.messages, { role: "user", content: prompt }], logprobs: true,
      top_logprobs: LIKELIEST };
  }
  return { ...asked, prompt, logprobs: LIKELIEST };
}

async function generate() {
  const prompt = at("prompt").value;
  const chat = mode() === "chat";
  if (state.controller || !prompt) return;
  if (!state.model) await connect();
  state.controller = new AbortController();
  running(true);
  fail("");
  if (chat) {
    role("you");
    piece(prompt, "asked");
    role(state.model);
  } else {
    output.replaceChildren();
    piece(prompt, "asked");
  }
  const begin = performance.now();
  const seen = { tokens: 0, text: "" };
  try {
    const path = chat ? "v1/chat/completions" : "v1/completions";
    const answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers().headers },
      body: JSON.stringify(body(prompt)),
      signal: state.controller.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const event of eventsOf(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      take(event, seen);
      speed(seen.tokens, begin);
    }
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  }
  if (chat && seen.text) {
    state.messages.push({ role: "user", content: prompt }, { role: "assistant", content: seen.text });
    at("prompt").value = "";
  }
  state.controller = null;
  running(false);
}

async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function take(event, seen) {
  if (event.usage) seen.tokens = event.usage.completion_tokens;
  for (const choice of event.choices) {
    const text = choice.text ?? choice.delta?.content ?? "";
    const tokens = tokensOf(choice.logprobs);
    seen.tokens += tokens.length;
    seen.text += text;
    show(text, tokens);
    if (choice.finish_reason === "abort") fail("The server ended the answer.");
  }
}

// Both forms of log-probabilities as one: [{token, logprob, likeliest: [[token, logprob], ...]}, ...]
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((one) => ({ token: one.token, logprob: one.logprob,
      likeliest: one.top_logprobs.map((other) => [other.token, other.logprob]) }));
  }
  return logprobs.tokens.map((token, place) => ({ token, logprob: logprobs.token_logprobs[place],
    likeliest: Object.entries(logprobs.top_logprobs[place] ?? {}) }));
}

// Tokens are shown where together they are the text; parts of a character share a span with what completes it.
function show(text, tokens) {
  let rest = text;
  let partial = [];
  for (const one of tokens) {
    if (one.token.startsWith("bytes:")) {
      partial.push(one);
    } else if (one.token && rest.startsWith(one.token) && !partial.length) {
      token(one.token, one);
      rest = rest.slice(one.token.length);
    } else if (one.token && partial.length && rest.includes(one.token)) {
      const end = rest.indexOf(one.token);
      token(rest.slice(0, end), partial[0]);
      token(one.token, one);
      rest = rest.slice(end + one.token.length);
      partial = [];
    }
  }
  if (rest) partial.length ? token(rest, partial[0]) : piece(rest, "");
}

function piece(text, kind) {
  const span = document.createElement("span");
  span.className = kind;
  span.textContent = text;
  output.append(span);
  return span;
}

function role(name) {
  if (output.childNodes.length) output.append("\n\n");
  piece(`${name}\n`, "role");
}

function token(text, one) {
  const probability = Math.exp(one.logprob);
  const level = Math.min(4, Math.floor(Math.sqrt(probability) * 5));
  const span = piece(text, `token p${level}`);
  span.tabIndex = -1;
  span.alternatives = one;
}

function percent(logprob) {
  return `${(100 * Math.exp(logprob)).toFixed(1)} %`;
}

function visible(text) {
  return text.replaceAll("\n", "\u23ce").replaceAll("\t", "\u21e5").replaceAll(" ", "\u2423");
}

function tell(span) {
  const box = at("alternatives");
  const one = span.alternatives;
  const rows = [...one.likeliest];
  if (!rows.some(([text]) => text === one.token)) rows.push([one.token, one.logprob]);
  const table = document.createElement("table");
  for (const [text, logprob] of rows) {
    const row = table.insertRow();
    if (text === one.token) row.className = "chosen";
    row.insertCell().textContent = visible(text);
    row.insertCell().textContent = percent(logprob);
  }
  box.replaceChildren(table);
  box.hidden = false;
  const place = span.getClientRects()[0];
  if (!place) return;
  const left = Math.min(place.left, document.documentElement.clientWidth - box.offsetWidth - 8);
  box.style.left = `${Math.max(left, 8) + scrollX}px`;
  box.style.top = `${place.bottom + scrollY + 4}px`;
}

function hush() {
  at("alternatives").hidden = true;
}

function speed(tokens, begin) {
  const seconds = (performance.now() - begin) / 1000;
  at("speed").textContent = `${tokens} tokens, ${(tokens / seconds).toFixed(0)} tokens/s`;
}

function running(now) {
  at("generate").disabled = now;
  at("stop").disabled = !now;
  output.setAttribute("aria-busy", String(now));
}

function fail(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

function clear() {
  state.messages = [];
  output.replaceChildren();
  at("speed").textContent = "";
  fail("");
  hush();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  hush();
  state.controller?.abort();
});
at("stop").addEventListener("click", () => state.controller?.abort());
at("clear").addEventListener("click", clear);
at("key").addEventListener("change", connect);
at("colours").addEventListener("change", () => output.classList.toggle("coloured", at("colours").checked));
for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", clear);
output.addEventListener("pointerover", (event) => {
  if (event.target.alternatives) tell(event.target);
});
output.addEventListener("pointerleave", hush);
output.addEventListener("click", (event) => {
  if (event.target.alternatives) event.target.focus();
});
output.addEventListener("focusin", (event) => {
  if (event.target.alternatives) tell(event.target);
});
output.addEventListener("focusout", hush);
output.addEventListener("keydown", (event) => {
  const tokens = [...output.querySelectorAll(".token")];
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step || !tokens.length) return;
  event.preventDefault();
  const place = tokens.indexOf(document.activeElement);
  const next = place < 0 ? (step > 0 ? 0 : tokens.length - 1) : place + step;
  tokens[Math.max(0, Math.min(tokens.length - 1, next))].focus();
});
output.classList.add("coloured");
// On a phone the answer comes before the options.
document.querySelector("details").open = !matchMedia("(max-width: 50rem)").matches;
connect();
