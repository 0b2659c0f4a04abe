// What openapi.json says, as a page.

import { get } from "./server.js";

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  made.textContent = text;
  made.append(...children);
  return made;
}

function kind(schema) {
  const choices = schema.anyOf ?? [schema];
  const names = choices.map(({ type, items, $ref }) => $ref?.split("/").at(-1) ?? (type === "array" ? `list of ${kind(items)}` : type));
  const limits = choices.flatMap(({ minimum, maximum }) => (maximum === undefined ? [] : [`${minimum} to ${maximum}`]));
  return [names.join(" or "), ...limits].join(", ");
}

function parameterRow({ name, required, schema, description }) {
  const row = element("tr", "", element("td", ""), element("td", kind(schema)), element("td", description ?? ""));
  row.firstChild.append(element("code", name));
  row.append(element("td", required ? "required" : schema.default === undefined ? "" : `default ${schema.default}`));
  return row;
}

function endpoint(path, method, { summary, description, parameters = [], requestBody }) {
  const section = element("section", "", element("h2", `${method.toUpperCase()} ${path}`), element("p", description ?? summary));
  if (parameters.length) {
    const head = element("tr", "", ...["parameter", "kind", "meaning", ""].map((name) => element("th", name)));
    section.append(element("table", "", element("thead", "", head), element("tbody", "", ...parameters.map(parameterRow))));
  }
  if (requestBody) section.append(element("p", `Body: ${Object.keys(requestBody.content).join(", ")}, field “pictures”, once a picture.`));
  return section;
}

try {
  const { paths } = await get("openapi.json");
  for (const [path, methods] of Object.entries(paths)) {
    for (const [method, what] of Object.entries(methods)) document.getElementById("endpoints").append(endpoint(path, method, what));
  }
} catch (error) {
  document.getElementById("problem").hidden = false;
  document.getElementById("problem").textContent = error.message;
}
