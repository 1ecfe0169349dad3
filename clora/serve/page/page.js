// The page of `clora serve`. No library, nothing from elsewhere; what is kept stays in this browser.

const $ = (id) => document.getElementById(id);
const state = { source: null, sourceUrl: "", chosen: [], catalogue: [], results: [], shown: 0, job: null, busy: false, before: "" };

// ---- talking to the server

class Refused extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
    this.nearest = error.nearest ?? [];
  }
}

async function ask(path, options = {}) {
  for (;;) {
    const headers = new Headers(options.headers);
    const key = sessionStorage.getItem("key");
    if (key) headers.set("Authorization", `Bearer ${key}`);
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(0, { message: "The server cannot be reached.", code: "unreachable" });
    }
    if (answer.ok) return answer;
    if (answer.status === 401) {
      await askForKey(Boolean(key));
      continue;
    }
    let error = { message: `The server answered ${answer.status}.`, code: "unknown" };
    try {
      error = (await answer.json()).error ?? error;
    } catch { /* no JSON: a proxy's page */ }
    throw new Refused(answer.status, error);
  }
}

let asking = null;
function askForKey(wasWrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-wrong").hidden = !wasWrong;
    $("key").value = "";
    dialog.addEventListener("close", () => {
      const key = $("key").value.trim();
      if (/^[\x21-\x7e]+$/.test(key)) sessionStorage.setItem("key", key);
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

// Server-sent events by fetch, because EventSource sends no key.
async function watch(place, onJob) {
  const answer = await ask(`${place}/events`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data) onJob(JSON.parse(data));
    }
  }
}

// ---- small things

function say(text, isBad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", isBad);
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function toBlob(base64, kind) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: kind });
}

function refresh() {
  $("run").disabled = state.busy || !state.source || !(state.chosen.length || $("prompt").value.trim());
  $("cancel").hidden = !state.busy;
  $("progress").hidden = !state.busy;
}

// ---- the source

function setSource(blob) {
  if (!blob) return;
  if (!/^image\/(png|jpeg|webp)$/.test(blob.type)) return say("That is no PNG, JPEG or WebP picture.", true);
  if (state.limits && blob.size > state.limits.image_bytes) {
    return say(`That picture has ${(blob.size / 1e6).toFixed(1)} MB; ${(state.limits.image_bytes / 1e6).toFixed(1)} are taken.`, true);
  }
  URL.revokeObjectURL(state.sourceUrl);
  state.source = blob;
  state.sourceUrl = URL.createObjectURL(blob);
  state.results = [];
  $("drop").hidden = true;
  $("compare").hidden = false;
  $("stage").classList.add("full");
  show(-1);
  say(state.chosen.length ? "" : "Now choose an effect.");
}

function clearSource() {
  state.source = null;
  state.results = [];
  $("drop").hidden = false;
  $("compare").hidden = true;
  $("after-row").hidden = true;
  $("stage").classList.remove("full");
  $("results").replaceChildren();
  $("file").value = $("camera").value = "";
  say("");
  refresh();
}

function show(number) {
  const result = state.results[number];
  state.shown = number;
  $("before").src = state.sourceUrl;
  $("after").src = result ? result.url : state.sourceUrl;
  $("compare").classList.toggle("same", !result);
  $("after-row").hidden = false;
  $("save").hidden = $("again").hidden = !result;
  if (result) {
    $("save").href = result.url;
    $("save").download = `${result.name}-seed${result.seed}.png`;
  }
  const many = state.results.length > 1 ? state.results : [];
  $("results").replaceChildren(...many.map((one, place) => {
    const button = element("button", { type: "button", onclick: () => show(place) },
      element("img", { src: one.url, alt: `Result of seed ${one.seed}` }), element("small", { textContent: `seed ${one.seed}` }));
    button.setAttribute("aria-pressed", String(place === number));
    return button;
  }));
  refresh();
}

// ---- the effects

function choose(name) {
  const place = state.chosen.indexOf(name);
  if (place >= 0) state.chosen.splice(place, 1);
  else state.chosen = [...state.chosen, name].slice(-2);
  markChosen();
}

function markChosen() {
  for (const card of $("effects").children) {
    const place = state.chosen.indexOf(card.dataset.name);
    card.setAttribute("aria-pressed", String(place >= 0));
    const order = card.querySelector(".order");
    order.hidden = place < 0 || state.chosen.length < 2;
    order.textContent = String(place + 1);
  }
  const [first, second] = state.chosen.map((name) => name.replaceAll("_", " "));
  $("chosen").textContent = second ? `First ${first}, then ${second}.` : first ? `${first}. Choose another to follow it.`
    : "Choose one, or two to apply one after the other.";
  refresh();
}

function cards() {
  $("effects").replaceChildren(...state.catalogue.map(({ id, after }) => {
    const pair = element("span", { className: "pair" });
    if (after) pair.append(element("img", { src: after, alt: "", loading: "lazy" }));
    if (after && state.before) pair.append(element("img", { src: state.before, alt: "", className: "source" }));
    const card = element("button", { type: "button", className: "effect", title: id, onclick: () => choose(id) },
      pair, element("span", { className: "name", textContent: id.replaceAll("_", " ") }), element("span", { className: "order", hidden: true }));
    card.dataset.name = id;
    return card;
  }));
  markChosen();
  filter();
}

function filter() {
  const words = $("find").value.toLowerCase().replaceAll("_", " ").split(/\s+/).filter(Boolean);
  for (const card of $("effects").children) {
    const name = card.dataset.name.toLowerCase().replaceAll("_", " ");
    card.hidden = !words.every((word) => name.includes(word));
  }
}

// Arrow keys move among the cards, as in any grid.
function move(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 0, ArrowUp: 0 }[event.key];
  if (step === undefined || !event.target.classList.contains("effect")) return;
  const seen = [...$("effects").children].filter((card) => !card.hidden);
  const columns = seen.filter((card) => card.offsetTop === seen[0].offsetTop).length;
  const by = step || (event.key === "ArrowDown" ? columns : -columns);
  seen[seen.indexOf(event.target) + by]?.focus();
  event.preventDefault();
}

async function loadCatalogue() {
  const found = await (await ask("v1/effects")).json();
  const isNew = found.data.map((one) => one.id + Boolean(one.after)).join() !== state.catalogue.map((one) => one.id + Boolean(one.after)).join();
  state.catalogue = found.data;
  state.before = found.before;
  state.limits = found.limits;
  if (!$("count").length) {
    $("count").replaceChildren(...Array.from({ length: found.limits.samples }, (_, i) => element("option", { textContent: String(i + 1) })));
  }
  $("sample").hidden = !found.before;
  const models = new Set(found.data.map((one) => one.model)).size;
  $("about").textContent = `${found.data.length} effects, ${models === 1 ? "one model" : `${models} models`}.`;
  if (isNew) {
    const focused = document.activeElement?.dataset?.name;
    cards();
    if (focused) [...$("effects").children].find((card) => card.dataset.name === focused)?.focus();
  }
  // The server makes the pictures of the catalogue while it has nothing else to do.
  if (found.before && found.data.some((one) => !one.after)) setTimeout(() => loadCatalogue().catch(() => {}), 4000);
}

// ---- an edit

async function edit(event) {
  event.preventDefault();
  if ($("run").disabled) return;
  const form = new FormData();
  form.append("image", state.source, "picture");
  for (const name of state.chosen) form.append("effect", name);
  if (!state.chosen.length) {
    form.append("prompt", $("prompt").value);
    form.append("model", state.catalogue[0].model); // of several, any
  }
  form.append("n", $("count").value || "1");
  if ($("seed").value.trim()) form.append("seed", $("seed").value.trim());
  const name = state.chosen.join("+") || "edit";
  state.busy = true;
  state.job = null;
  $("progress").removeAttribute("value");
  say("Sending the picture.");
  refresh();
  try {
    const made = await ask("v1/images/edits", { method: "POST", body: form, headers: { Prefer: "respond-async" } });
    state.job = made.headers.get("Location").slice(1);
    await watch(state.job, onJob).catch(() => {}); // where the stream breaks, the result says how it went
    const answer = await finished(state.job);
    state.results = answer.data.map((one) => {
      const blob = toBlob(one.b64_json, "image/png");
      return { blob, url: URL.createObjectURL(blob), seed: one.seed, name };
    });
    show(0);
    say(`Done: ${name.replaceAll("_", " ")}, seed ${answer.data.map((one) => one.seed).join(", ")}.`);
    await remember(name);
  } catch (error) {
    say(error.code === "cancelled" ? "Cancelled." : error.message, error.code !== "cancelled");
  } finally {
    state.busy = false;
    refresh();
  }
}

async function finished(place) {
  for (;;) {
    try {
      return await (await ask(`${place}/result`)).json();
    } catch (error) {
      if (error.code !== "not_done") throw error;
      await new Promise((resolve) => setTimeout(resolve, 700));
    }
  }
}

function onJob(job) {
  if (job.status === "queued") say(job.position > 1 ? `Waiting, number ${job.position}.` : "Getting ready.");
  if (job.status === "running") say(`Step ${job.steps} of ${job.steps_in_all}.`);
  if (job.progress > 0) $("progress").value = job.progress;
}

function cancel() {
  if (state.job) ask(state.job, { method: "DELETE" }).catch(() => {});
}

// ---- history, in this browser

const MOST_PAST = 30;
const database = new Promise((resolve) => {
  const opening = indexedDB.open("clora", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("edits", { keyPath: "id", autoIncrement: true });
  opening.onsuccess = () => resolve(opening.result);
  opening.onerror = () => resolve(null); // a private window may have none
});

async function store(mode, work) {
  const opened = await database;
  if (!opened) return undefined;
  return new Promise((resolve) => {
    const asked = work(opened.transaction("edits", mode).objectStore("edits"));
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => resolve(undefined);
  });
}

async function remember(name) {
  const results = state.results.map(({ blob, seed }) => ({ blob, seed }));
  await store("readwrite", (edits) => edits.add({ time: Date.now(), name, source: state.source, results }));
  const keys = (await store("readonly", (edits) => edits.getAllKeys())) ?? [];
  for (const key of keys.slice(0, -MOST_PAST)) await store("readwrite", (edits) => edits.delete(key));
  await showPast();
}

let pastUrls = [];
async function showPast() {
  const past = ((await store("readonly", (edits) => edits.getAll())) ?? []).reverse();
  pastUrls.forEach((url) => URL.revokeObjectURL(url));
  pastUrls = [];
  const picture = (blob, alt) => {
    pastUrls.push(URL.createObjectURL(blob));
    return element("img", { src: pastUrls.at(-1), alt, loading: "lazy" });
  };
  $("past").hidden = !past.length;
  $("history").replaceChildren(...past.map((one) => element("button", { type: "button", onclick: () => recall(one) },
    element("span", { className: "two" }, picture(one.source, "Source"), picture(one.results[0].blob, "Result")),
    element("small", { textContent: `${one.name.replaceAll("_", " ")} (${one.results.length})` }))));
}

function recall(one) {
  setSource(one.source);
  state.results = one.results.map(({ blob, seed }) => ({ blob, seed, name: one.name, url: URL.createObjectURL(blob) }));
  show(0);
  say(one.name.replaceAll("_", " "));
  window.scrollTo({ top: 0 });
}

// ---- wiring

for (const id of ["file", "camera"]) $(id).addEventListener("change", () => setSource($(id).files[0]));
for (const kind of ["dragover", "dragenter"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); $("stage").classList.add("over"); });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("stage").classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("over");
  setSource(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) setSource(file);
});
$("slider").addEventListener("input", () => $("compare").style.setProperty("--at", `${$("slider").value}%`));
$("sample").addEventListener("click", async () => setSource(await samplePicture()));
$("find").addEventListener("input", filter);
$("effects").addEventListener("keydown", move);
$("prompt").addEventListener("input", refresh);
$("form").addEventListener("submit", edit);
$("cancel").addEventListener("click", cancel);
$("again").addEventListener("click", () => setSource(state.results[state.shown].blob));
$("other").addEventListener("click", clearSource);
$("forget").addEventListener("click", async () => { await store("readwrite", (edits) => edits.clear()); await showPast(); });

// Decoded here, because the page may open no address but the server's own.
async function samplePicture() {
  const image = new Image();
  image.src = state.before;
  await image.decode();
  const canvas = element("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  canvas.getContext("2d").drawImage(image, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

refresh();
showPast();
loadCatalogue().catch((error) => say(error.message, true));
