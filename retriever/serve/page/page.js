// The page's state stands in its address, so that it can be reloaded, shared and gone back to:
// ?q=words&beams=50&share=0.3&k=20&two_tower=true, or ?like=id for the pictures like one of them.

import { showPictures } from "./cards.js";
import { listenForPictures } from "./insert.js";
import { get, remove } from "./server.js";

const at = (id) => document.getElementById(id);
const [form, query, beams, guided, rerank, share, count, twoTower] =
  ["search", "query", "beams", "guided", "rerank", "share", "count", "two-tower"].map(at);
const answers = at("answers");
let running = null;
let hasFeatures = true;

function report(error) {
  if (error?.name === "AbortError") return;
  at("problem").hidden = error === null;
  at("problem").textContent = error === null ? "" : error.message;
}

// What has happened; quietly, for screen readers alone, where the page shows it anyway.
function tell(text, { quietly = false } = {}) {
  at("news").classList.toggle("unseen", quietly);
  at("news").textContent = text;
}

function showValues() {
  at("beams-value").textContent = beams.value;
  at("share-value").textContent = Number(share.value).toFixed(2);
  rerank.disabled = twoTower.disabled = !hasFeatures;
  share.disabled = !rerank.checked || !hasFeatures;
}

// What the controls say, as the search endpoint takes it.
function settings() {
  return {
    q: query.value.trim(),
    k: count.value,
    beams: beams.value,
    guided: guided.checked,
    rerank: rerank.checked,
    share: rerank.checked ? share.value : null,
    two_tower: twoTower.checked,
  };
}

function takeSettings(values) {
  query.value = values.get("q") ?? "";
  if (values.has("beams")) beams.value = values.get("beams");
  if (values.has("guided")) guided.checked = values.get("guided") === "true";
  if (values.has("rerank")) rerank.checked = values.get("rerank") === "true" && hasFeatures;
  if (values.has("share")) share.value = values.get("share");
  if ([...count.options].some(({ value }) => value === values.get("k"))) count.value = values.get("k");
  if (values.has("two_tower")) twoTower.checked = values.get("two_tower") === "true" && hasFeatures;
  showValues();
}

function address(values) {
  return `?${new URLSearchParams(Object.entries(values).filter(([, value]) => value !== null))}`;
}

function go(values) {
  if (address(values) !== location.search) history.pushState(null, "", address(values));
  return show();
}

// Draw what the address asks for.
async function show() {
  const values = new URLSearchParams(location.search);
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  report(null);
  answers.setAttribute("aria-busy", "true");
  try {
    if (values.has("like")) await showAlike(values.get("like"), values.get("by") ?? "vokens", signal);
    else if (values.get("q")?.trim()) await showSearch(signal);
    else hideAnswers();
  } catch (error) {
    if (error.name !== "AbortError") hideAnswers();
    report(error);
  } finally {
    if (running.signal === signal) answers.removeAttribute("aria-busy");
  }
}

function hideAnswers() {
  at("answer").hidden = at("beside").hidden = true;
  document.title = "Picture search";
}

async function showSearch(signal) {
  const asked = settings();
  const found = await get("api/search", asked, signal);
  const { timings } = found;
  const milliseconds = (seconds) => `${Math.round(1000 * seconds)} ms`;
  const beside = found.two_tower !== null;
  document.title = `${asked.q} – picture search`;
  at("likeness").hidden = true;
  at("answer-title").textContent = beside ? "Retriever" : `“${asked.q}”`;
  at("answer-note").textContent =
    `${found.pictures.length} of ${found.pool.toLocaleString()} pictures in ${milliseconds(timings.total)}` +
    ` (${parts(timings).map(([name, seconds]) => `${name} ${milliseconds(seconds)}`).join(", ")})` +
    (found.guided ? "; guided" : "") +
    (found.share ? `; re-ranked by features, share ${found.share.toFixed(2)}` : "; not re-ranked");
  const options = { query: asked.q, alike, remove: removePicture };
  showPictures(at("pictures"), found.pictures, options);
  at("answer").hidden = false;
  if (beside) {
    at("beside-note").textContent = `brute force over all features in ${milliseconds(timings.two_tower)}`;
    showPictures(at("beside-pictures"), found.two_tower, { ...options, score: (value) => value.toFixed(3) });
  }
  at("beside").hidden = !beside;
  answers.classList.toggle("two", beside);
  tell(`${found.pictures.length} pictures found.`, { quietly: true });
}

function parts(timings) {
  return ["waited", "encode", "beams", "rerank"].filter((name) => timings[name] !== null).map((name) => [name, timings[name]]);
}

async function showAlike(id, by, signal) {
  const found = await get(`api/similar/${encodeURIComponent(id)}`, { k: count.value, by }, signal);
  document.title = `Like ${id} – picture search`;
  at("answer-title").textContent = `Pictures like ${id}`;
  at("answer-note").textContent = by === "features" ? "by the cosine of their features" :
    `by the vokens that they begin with${hasFeatures ? ", then by their features" : ""}`;
  at("likeness").hidden = !hasFeatures;
  at("by").value = by;
  showPictures(at("pictures"), [found.picture, ...found.pictures], {
    score: (value) => (by === "features" ? value.toFixed(3) : `${value} ${value === 1 ? "voken" : "vokens"}`), alike, remove: removePicture,
  });
  at("answer").hidden = false;
  at("beside").hidden = true;
  answers.classList.remove("two");
  tell(`${found.pictures.length} pictures like ${id}.`, { quietly: true });
}

async function alike(picture) {
  await go({ like: picture.id, by: at("by").value });
  answers.focus({ preventScroll: true });
  scrollTo({ top: 0 });
}

async function removePicture(picture, button) {
  button.disabled = true;
  try {
    const { pool } = await remove(picture.id);
    showPool(pool);
    const inserted = [...at("inserted").children].find((card) => card.querySelector(".name").textContent === picture.id);
    inserted?.remove();
    if (new URLSearchParams(location.search).get("like") === picture.id) await go({});
    else await show();
    tell(`${picture.id} was removed.`);
    query.focus();
  } catch (error) {
    button.disabled = false;
    report(error);
  }
}

function showPool(pool) {
  at("pool").textContent = `${pool.toLocaleString()} pictures can be found`;
}

async function start() {
  const status = await get("api/status");
  hasFeatures = status.features;
  guided.closest("label").hidden = !status.guide;
  rerank.checked = hasFeatures;
  share.value = status.share;
  beams.value = hasFeatures ? status.beams.rerank : status.beams.plain;
  showPool(status.pool);
  const begin = () => takeSettings(new URLSearchParams(location.search));
  begin();
  addEventListener("popstate", () => (begin(), show()));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    query.value.trim() ? go(settings()) : report(new Error("Write some words to search for."));
  });
  for (const control of [beams, guided, rerank, share, count, twoTower]) {
    control.addEventListener("input", showValues);
    control.addEventListener("change", () => new URLSearchParams(location.search).has("q") && query.value.trim() && go(settings()));
  }
  at("by").addEventListener("change", () => {
    const like = new URLSearchParams(location.search).get("like");
    if (like !== null) go({ like, by: at("by").value });
  });
  listenForPictures(status.limits, {
    report,
    tell,
    done({ pool, inserted }) {
      showPool(pool);
      const cards = document.createElement("ol");
      showPictures(cards, inserted, { alike, remove: removePicture });
      at("inserted").prepend(...cards.children);
      return show();
    },
  });
  await show();
}

showValues();
start().catch(report);
