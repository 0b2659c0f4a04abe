// Pictures that are dropped on the page or chosen go to the server, a few at a time.

import { insert } from "./server.js";

const at = (id) => document.getElementById(id);

// search: what becomes of files that are dropped on the search form.
export function listenForPictures(limits, { report, tell, done, search }) {
  let last = Promise.resolve();

  function take(files) {
    const chosen = [...files]; // the list itself is emptied below
    if (chosen.length) last = last.then(() => send(chosen, limits, { report, tell, done }));
  }

  let depth = 0; // a drag enters and leaves every element below it
  const shown = (change) => document.body.classList.toggle("dragging", (depth += change) > 0);
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => carriesFiles(event) && shown(1));
  addEventListener("dragleave", (event) => carriesFiles(event) && shown(-1));
  addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    shown(-depth);
    if (at("search").contains(event.target)) search(event.dataTransfer.files);
    else take(event.dataTransfer.files);
  });
  at("files").addEventListener("change", (event) => {
    take(event.target.files);
    event.target.value = "";
  });
}

async function send(files, limits, { report, tell, done }) {
  const bar = at("progress");
  report(null);
  at("refused").replaceChildren();
  const small = files.filter((file) => file.size <= limits.bytes);
  for (const file of files.filter((each) => each.size > limits.bytes)) {
    refuse(`${file.name}: larger than ${Math.floor(limits.bytes / 2 ** 20)} MB`);
  }
  const groups = together(small, limits);
  let inserted = 0;
  bar.hidden = !groups.length;
  for (const [number, group] of groups.entries()) {
    tell(`Inserting ${group.length === 1 ? group[0].name : `${group.length} pictures`} …`);
    try {
      const answer = await insert(group, (part) => (bar.value = (number + 0.9 * part) / groups.length));
      for (const { reason } of answer.refused) refuse(reason);
      inserted += answer.inserted.length;
      await done(answer);
    } catch (error) {
      if (error.isRefusal) refuse(error.message);
      else {
        report(error);
        break;
      }
    }
  }
  bar.hidden = true;
  tell(inserted === 1 ? "1 picture was inserted." : `${inserted} pictures were inserted.`);
}

// Groups of files that one request takes.
function together(files, limits) {
  const groups = [];
  let bytes = Infinity;
  for (const file of files) {
    if (bytes + file.size > limits.request_bytes || groups.at(-1).length >= limits.pictures) {
      groups.push([]);
      bytes = 0;
    }
    groups.at(-1).push(file);
    bytes += file.size;
  }
  return groups;
}

function refuse(reason) {
  const line = document.createElement("li");
  line.textContent = reason;
  at("refused").append(line);
}
