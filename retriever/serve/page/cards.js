// Pictures as cards in a grid. Texts that come from outside are set as text, never as markup.

import { get } from "./server.js";

const template = document.getElementById("card");

// query: what a picture's vokens are explained for; none for pictures that no query found.
export function showPictures(list, pictures, { query = null, score = (value) => value.toFixed(2), alike, remove }) {
  let rank = 0;
  list.replaceChildren(...pictures.map((picture) => {
    const card = template.content.firstElementChild.cloneNode(true);
    card.querySelector(".picture").replaceWith(thumbnail(picture, alike));
    const place = card.querySelector(".place");
    place.hidden = picture.score === null;
    if (picture.score !== null) {
      place.querySelector(".rank").textContent = `${++rank}.`;
      place.querySelector(".score").textContent = score(picture.score).replace("-", "\u2212");
      place.querySelector(".score").title = "Score";
      const similarity = place.querySelector(".similarity");
      similarity.hidden = picture.similarity === null || picture.similarity === picture.score;
      if (!similarity.hidden) similarity.textContent = `cos ${picture.similarity.toFixed(2).replace("-", "\u2212")}`;
      similarity.title = "Similarity: the cosine of its features with the query's";
    }
    card.querySelector(".name").textContent = picture.id;
    card.classList.toggle("new", picture.inserted);
    const removal = card.querySelector(".remove");
    removal.hidden = !picture.inserted;
    removal.setAttribute("aria-label", `Remove ${picture.id}`);
    removal.addEventListener("click", () => remove(picture, removal));
    showFolded(card.querySelector(".folded"), picture, alike);
    explain(card.querySelector(".vokens"), picture, query);
    return card;
  }));
}

// A button that shows a picture, or says that its file is gone, and leads to those like it.
function thumbnail(picture, alike) {
  const button = template.content.querySelector(".picture").cloneNode(true);
  const image = button.querySelector("img");
  image.alt = picture.id;
  if (picture.gone) tellMissing(button, picture, "file is gone");
  else {
    image.addEventListener("error", () => tellMissing(button, picture, "file cannot be read"));
    image.src = picture.url;
  }
  button.title = "Show pictures like this one";
  button.addEventListener("click", () => alike(picture));
  return button;
}

function tellMissing(button, picture, words) {
  const told = document.createElement("span");
  told.className = "missing";
  told.textContent = words;
  button.setAttribute("aria-label", `${picture.id}: ${words}`);
  button.replaceChildren(told);
}

// The near-duplicates that a picture stands for.
function showFolded(details, picture, alike) {
  const count = picture.folded.length;
  details.hidden = count === 0;
  details.querySelector("summary").textContent = `+${count} near-duplicate${count === 1 ? "" : "s"}`;
  details.addEventListener("toggle", () => {
    const list = details.querySelector("ol");
    if (!details.open || list.childElementCount) return;
    list.append(...picture.folded.map((other) => {
      const line = document.createElement("li");
      line.title = other.id;
      line.append(thumbnail(other, alike));
      return line;
    }));
  });
}

// The vokens of a picture; unfolded, how probable the model finds each for the query.
function explain(details, picture, query) {
  const codes = picture.codes.join(" ");
  if (query === null) {
    const line = document.createElement("p");
    line.className = "codes";
    line.textContent = codes;
    details.replaceWith(line);
    return;
  }
  details.querySelector("summary").textContent = codes;
  details.querySelector("summary").title = "How probable the model finds these vokens";
  const steps = details.querySelector(".steps");
  details.addEventListener("toggle", async () => {
    if (!details.open || steps.childElementCount) return;
    try {
      const answer = await get("api/vokens", { q: query, id: picture.id, top: 3 });
      steps.replaceChildren(...answer.levels.map(level));
    } catch (error) {
      steps.textContent = error.message;
    }
  });
}

function level({ written, alternatives }, number) {
  const list = document.createElement("ol");
  list.className = "step";
  list.setAttribute("aria-label", `Voken ${number + 1}`);
  const others = alternatives.filter(({ code }) => code !== written.code);
  list.append(...[written, ...others].map((voken) => bar(voken, voken === written)));
  return list;
}

function bar({ token, probability }, isWritten) {
  const line = document.createElement("li");
  const [fill, name, value] = ["span", "span", "span"].map((tag) => document.createElement(tag));
  fill.className = "bar";
  fill.style.width = `${100 * probability}%`;
  name.textContent = token;
  value.textContent = probability < 0.001 ? "<0.1%" : `${(100 * probability).toFixed(1)}%`;
  line.classList.toggle("written", isWritten);
  line.append(fill, name, value);
  return line;
}
