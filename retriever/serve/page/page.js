// The page's state stands in its address, so that it can be reloaded, shared and gone back to:
// ?q=words&beams=50&share=0.3&k=20&two_tower=true, or ?like=id for the pictures like one of them. A picture that is
// searched by and not in the index cannot stand there: it is kept here until something else is searched for.

import { showPictures } from "./cards.js";
import { listenForPictures } from "./insert.js";
import { get, like, remove } from "./server.js";

const at = (id) => document.getElementById(id);
const [form, query, beams, guided, rerank, share, count, least, fold, twoTower] =
  ["search", "query", "beams", "guided", "rerank", "share", "count", "least", "fold", "two-tower"].map(at);
const answers = at("answers");
const LONGEST_QUERY = 1000; // characters, as the server has it
let running = null;
let hasFeatures = true;
let picture = null; // a File that is searched by
let largest = Infinity; // bytes of it

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
  at("least-value").textContent = Number(least.value) ? Number(least.value).toFixed(2) : "any";
  rerank.disabled = twoTower.disabled = least.disabled = !hasFeatures;
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
    ...selection(),
  };
}

// Which of the pictures found are shown; null is left out of addresses.
function selection() {
  return { min_similarity: Number(least.value) ? least.value : null, fold: fold.checked || null };
}

function takeSettings(values) {
  query.value = values.get("q") ?? "";
  if (values.has("beams")) beams.value = values.get("beams");
  if (values.has("guided")) guided.checked = values.get("guided") === "true";
  if (values.has("rerank")) rerank.checked = values.get("rerank") === "true" && hasFeatures;
  if (values.has("share")) share.value = values.get("share");
  if ([...count.options].some(({ value }) => value === values.get("k"))) count.value = values.get("k");
  least.value = values.get("min_similarity") ?? 0;
  fold.checked = values.get("fold") === "true";
  if (values.has("two_tower")) twoTower.checked = values.get("two_tower") === "true" && hasFeatures;
  showValues();
}

function address(values) {
  return `?${new URLSearchParams(Object.entries(values).filter(([, value]) => value !== null))}`;
}

function go(values) {
  picture = null;
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
    if (picture !== null) await showLikePicture(picture, signal);
    else if (values.has("like")) await showAlike(values.get("like"), values.get("by") ?? "vokens", signal);
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
  tellUnread(found.unread);
  tellNone(found.pictures, `“${asked.q}”`);
  if (beside) {
    at("beside-note").textContent = `brute force over all features in ${milliseconds(timings.two_tower)}`;
    showPictures(at("beside-pictures"), found.two_tower, { ...options, score: (value) => value.toFixed(3) });
  }
  at("beside").hidden = !beside;
  answers.classList.toggle("two", beside);
  tell(`${found.pictures.length} pictures found.`, { quietly: true });
}

function tellUnread(notes) {
  at("unread").hidden = !notes.length;
  at("unread").textContent = notes.map((note) => `${note.charAt(0).toUpperCase()}${note.slice(1)}.`).join(" ");
}

function tellNone(pictures, query) {
  at("none").hidden = pictures.length > 0 || !Number(least.value);
  at("none").textContent = `No picture is close to ${query}: none that was found has a similarity of ` +
    `${Number(least.value).toFixed(2)} or more.`;
}

function parts(timings) {
  return ["waited", "encode", "beams", "rerank"].filter((name) => timings[name] !== null).map((name) => [name, timings[name]]);
}

async function showAlike(id, by, signal) {
  const found = await get(`api/similar/${encodeURIComponent(id)}`, { k: count.value, by, ...selection() }, signal);
  document.title = `Like ${id} – picture search`;
  at("answer-title").textContent = `Pictures like ${id}`;
  at("answer-note").textContent = by === "features" ? "by the cosine of their features" :
    `by the vokens that they begin with${hasFeatures ? ", then by their features" : ""}`;
  at("likeness").hidden = !hasFeatures;
  at("by").value = by;
  showAlone([found.picture, ...found.pictures], by);
  tellNone(found.pictures, id);
  tell(`${found.pictures.length} pictures like ${id}.`, { quietly: true });
}

// Pictures that no words found.
function showAlone(pictures, by) {
  showPictures(at("pictures"), pictures, {
    score: (value) => (by === "features" ? value.toFixed(3) : `${value} ${value === 1 ? "voken" : "vokens"}`), alike, remove: removePicture,
  });
  tellUnread([]);
  at("answer").hidden = false;
  at("beside").hidden = true;
  answers.classList.remove("two");
}

async function showLikePicture(file, signal) {
  const found = await like(file, { k: count.value, ...selection() }, signal);
  document.title = `Like ${found.name} – picture search`;
  at("answer-title").textContent = `Pictures like your ${found.name}`;
  at("answer-note").textContent = (found.by === "features" ? "by the cosine of their features" :
    "by the vokens that they begin with") + "; the picture was not inserted";
  at("likeness").hidden = true;
  showAlone(found.pictures, found.by);
  tellNone(found.pictures, found.name);
  tell(`${found.pictures.length} pictures like ${found.name}.`, { quietly: true });
}

// Search by the first of some files.
async function searchBy(files) {
  const [file, ...others] = files;
  if (file === undefined) return;
  if (file.size > largest) return report(new Error(`${file.name}: larger than ${Math.floor(largest / 2 ** 20)} MB.`));
  query.value = "";
  history.pushState(null, "", location.pathname);
  picture = file;
  await show();
  if (others.length) tell(`Searched by ${file.name} alone: a search takes one picture.`);
}

async function alike(picture) {
  await go({ like: picture.id, by: at("by").value });
  answers.focus({ preventScroll: true });
  scrollTo({ top: 0 });
}

// The same search with what the controls say now.
function again() {
  const values = new URLSearchParams(location.search);
  if (picture !== null || values.has("like")) return show();
  if (values.has("q") && query.value.trim()) return go(settings());
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
  addEventListener("popstate", () => ((picture = null), begin(), show()));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const length = query.value.trim().length;
    if (!length) report(new Error("Write some words to search for."));
    else if (length > LONGEST_QUERY) report(new Error(`The query has ${length.toLocaleString()} characters, ${LONGEST_QUERY.toLocaleString()} are allowed: shorten it.`));
    else go(settings());
  });
  for (const control of [beams, guided, rerank, share, count, least, fold, twoTower]) {
    control.addEventListener("input", showValues);
    control.addEventListener("change", again);
  }
  at("picture").addEventListener("change", async (event) => {
    await searchBy(event.target.files);
    event.target.value = "";
  });
  at("by").addEventListener("change", () => {
    const like = new URLSearchParams(location.search).get("like");
    if (like !== null) go({ like, by: at("by").value });
  });
  largest = status.limits.bytes;
  listenForPictures(status.limits, {
    report,
    tell,
    search: searchBy,
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
