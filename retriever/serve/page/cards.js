// Pictures as cards in a grid. Texts that come from outside are set as text, never as markup.

import { get } from "./server.js";

const template = document.getElementById("card");

// query: what a picture's vokens are explained for; none for pictures that no query found.
export function showPictures(list, pictures, { query = null, score = (value) => value.toFixed(2), alike, remove }) {
  let rank = 0;
  list.replaceChildren(...pictures.map((picture) => {
    const card = template.content.firstElementChild.cloneNode(true);
    const image = card.querySelector("img");
    image.src = picture.url;
    image.alt = picture.id;
    const button = card.querySelector(".picture");
    button.title = "Show pictures like this one";
    button.addEventListener("click", () => alike(picture));
    const place = card.querySelector(".place");
    place.hidden = picture.score === null;
    if (picture.score !== null) {
      place.querySelector(".rank").textContent = `${++rank}.`;
      place.querySelector(".score").textContent = score(picture.score).replace("-", "\u2212");
      place.querySelector(".score").title = "Score";
    }
    card.querySelector(".name").textContent = picture.id;
    card.classList.toggle("new", picture.inserted);
    const removal = card.querySelector(".remove");
    removal.hidden = !picture.inserted;
    removal.setAttribute("aria-label", `Remove ${picture.id}`);
    removal.addEventListener("click", () => remove(picture, removal));
    explain(card.querySelector(".vokens"), picture, query);
    return card;
  }));
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
