// The server's endpoints. Every failure comes back as an Error whose message can be shown.

export async function get(path, values = {}, signal = undefined) {
  const query = new URLSearchParams(Object.entries(values).filter(([, value]) => value !== null));
  return ask(`${path}?${query}`, { signal });
}

// Pictures like one that is handed in.
export async function like(file, values, signal) {
  const form = new FormData();
  form.append("picture", file);
  const query = new URLSearchParams(Object.entries(values).filter(([, value]) => value !== null));
  return ask(`api/similar?${query}`, { method: "POST", body: form, signal });
}

export async function remove(id) {
  return ask(`api/pictures/${encodeURIComponent(id)}`, { method: "DELETE" });
}

async function ask(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is it still running?");
  }
  return read(response.status, await response.text());
}

// Progress is told while a form is sent, which fetch cannot do.
export function insert(files, tell) {
  const form = new FormData();
  for (const file of files) form.append("pictures", file);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "api/pictures");
    request.upload.addEventListener("progress", (event) => tell(event.loaded / event.total));
    request.addEventListener("error", () => reject(new Error("The server did not take the pictures: is it still running?")));
    request.addEventListener("load", () => {
      try {
        resolve(read(request.status, request.responseText));
      } catch (error) {
        reject(error);
      }
    });
    request.send(form);
  });
}

function read(status, text) {
  let answer;
  try {
    answer = JSON.parse(text);
  } catch {
    throw new Error(`The server's answer cannot be read (status ${status}).`);
  }
  if (status < 400) return answer;
  const error = new Error(sentence(String(answer.detail ?? `status ${status}`)));
  error.isRefusal = status === 422;
  throw error;
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
