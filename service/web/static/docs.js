// Draws the API from openapi.json: routes, what they take, and what they answer.

import { pageAddress } from "./address.js";

const METHODS = ["get", "post", "put", "patch", "delete"];

/** An element with attributes and children; texts become text, never markup. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

/** Paragraphs of a description: `code`, and lines indented by four spaces as a block. */
function paragraphs(text) {
  return (text ?? "").trimEnd().split(/\n\s*\n/).filter((part) => part.trim()).map((part) =>
    part.split("\n").every((line) => line.startsWith("    "))
      ? make("pre", { class: "scroll", tabindex: "0" }, make("code", {}, part.replaceAll(/^ {4}/gm, "")))
      : make("p", {}, inline(part)),
  );
}

function inline(text) {
  return text.split(/(`[^`]+`)/).map((part) => (/^`.+`$/.test(part) ? make("code", {}, part.slice(1, -1)) : part));
}

/** The schema that a reference leads to, or the schema itself. */
function resolve(schema, api) {
  if (!schema?.$ref) return schema ?? {};
  const target = schema.$ref.split("/").slice(1).reduce((node, key) => node?.[key], api);
  return { ...(target ?? {}), ...(schema.description && { description: schema.description }) };
}

/** A type in words, such as `integer, at least 1` or `list of number`. */
function typeOf(given, api) {
  const schema = resolve(given, api);
  if (schema.properties) return schema.title ?? `{${Object.keys(schema.properties).join(", ")}}`;
  const either = schema.anyOf ?? schema.oneOf;
  if (either) {
    const kinds = either.filter(({ type }) => type !== "null").map((option) => typeOf(option, api));
    return [...new Set(kinds)].join(" or ");
  }
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.prefixItems) return `[${schema.prefixItems.map((item) => typeOf(item, api)).join(", ")}]`;
  if (schema.type === "array") return `list of ${typeOf(schema.items, api)}`;
  const kind = schema.format === "binary" ? "bytes" : (schema.type ?? "any");
  const bounds = [
    "minimum" in schema && `at least ${schema.minimum}`,
    "exclusiveMinimum" in schema && `more than ${schema.exclusiveMinimum}`,
    "maximum" in schema && `at most ${schema.maximum}`,
  ].filter(Boolean);
  return [kind, ...bounds].join(", ");
}

function withDefault(kind, schema, isRequired) {
  if (isRequired) return `${kind}; required`;
  const fallback = schema?.default;
  return fallback === undefined || fallback === null ? kind : `${kind}; default ${JSON.stringify(fallback)}`;
}

/** A table of names, kinds and descriptions; null when there are none. */
function table(rows) {
  if (!rows.length) return null;
  const body = rows.map(({ name, kind, description }) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, make("code", {}, name), kind ? make("span", { class: "kind" }, kind) : null),
      make("td", {}, paragraphs(description)),
    ),
  );
  return make("table", { class: "items" }, make("tbody", {}, body));
}

function propertyRows(given, api) {
  const schema = resolve(given, api);
  return Object.entries(schema.properties ?? {}).map(([name, property]) => ({
    name,
    kind: withDefault(typeOf(property, api), property, false),
    description: resolve(property, api).description,
  }));
}

function parameterRows(parameters, api) {
  return parameters.map(({ name, in: place, schema, required, description }) => ({
    name,
    kind: withDefault(typeOf(schema, api), schema, required) + (place === "query" ? "" : `; in the ${place}`),
    description,
  }));
}

function bodyRows(body, api) {
  return Object.entries(body?.content ?? {}).map(([name, { schema }]) => {
    const { properties = {} } = resolve(schema, api);
    const parts = Object.entries(properties).map(([key, property]) => `\`${key}\`: ${typeOf(property, api)}`);
    const whole = resolve(schema, api).description ?? (parts.length ? "" : typeOf(schema, api));
    return { name, description: [whole, ...parts].filter(Boolean).join("\n\n") };
  });
}

function answerRows(responses) {
  return Object.entries(responses).map(([name, { description, content = {} }]) => {
    // Errors are always JSON; for the rest the types are what a caller chooses from.
    const types = name.startsWith("2") ? Object.keys(content) : [];
    return { name, description: [description, types.map((type) => `\`${type}\``).join(", ")].join("\n\n") };
  });
}

/** Tables of the objects that an answer is made of, one below the other. */
function objects(given, api, seen = new Set()) {
  const schema = resolve(given, api);
  const nested = [schema.items, ...(schema.anyOf ?? []), ...Object.values(schema.properties ?? {})].filter(Boolean);
  const own = [];
  if (schema.properties && !seen.has(schema.title)) {
    seen.add(schema.title);
    own.push(
      make(
        "details",
        {},
        make("summary", {}, make("code", {}, schema.title ?? "object")),
        paragraphs(schema.description),
        table(propertyRows(schema, api)),
      ),
    );
  }
  return [...own, ...nested.flatMap((item) => objects(item, api, seen))];
}

function section(title, content) {
  const parts = [content].flat().filter(Boolean);
  return parts.length ? [make("h3", {}, title), ...parts] : [];
}

function idOf(method, path) {
  return `${method}${path.replaceAll(/[^\w]+/g, "-")}`;
}

function route(path, method, operation, shared, api) {
  const parameters = [...shared, ...(operation.parameters ?? [])].map((parameter) => resolve(parameter, api));
  const success = Object.entries(operation.responses).filter(([status]) => status.startsWith("2"));
  const schemas = success.map(([, { content }]) => content?.["application/json"]?.schema).filter(Boolean);
  return make(
    "section",
    { class: "route", id: idOf(method, path) },
    make("h2", {}, make("span", { class: "method" }, method.toUpperCase()), make("code", {}, path)),
    make("div", { class: "text" }, paragraphs(operation.description ?? operation.summary)),
    section("Options", table(parameterRows(parameters, api))),
    section("Body", table(bodyRows(operation.requestBody, api))),
    section("Answers", table(answerRows(operation.responses))),
    section("Fields", schemas.flatMap((schema) => objects(schema, api))),
  );
}

function draw(api) {
  const groups = new Map();
  for (const [path, item] of Object.entries(api.paths)) {
    for (const method of METHODS.filter((name) => item[name])) {
      const tag = item[method].tags?.[0] ?? "features";
      groups.set(tag, [...(groups.get(tag) ?? []), { path, method, item }]);
    }
  }
  for (const [tag, routes] of groups) {
    document.getElementById("contents").append(make("h2", {}, tag));
    for (const { path, method, item } of routes) {
      document.getElementById("contents").append(
        make("a", { href: `#${idOf(method, path)}` }, make("span", { class: "method" }, method.toUpperCase()), make("code", {}, path)),
      );
      document.getElementById("routes").append(route(path, method, item[method], item.parameters ?? [], api));
    }
  }
  document.getElementById("version").textContent = `API ${api.info.version}`;
  document.getElementById("introduction").append(...paragraphs(api.info.description));
}

async function start() {
  const status = document.getElementById("status");
  try {
    const response = await fetch(new URL("openapi.json", pageAddress()));
    if (!response.ok) throw new Error(`the answer was ${response.status} ${response.statusText}`);
    draw(await response.json());
    status.remove();
    document.getElementById(location.hash.slice(1))?.scrollIntoView();
  } catch (error) {
    status.classList.add("error");
    status.textContent = `The description of the API could not be shown: ${error.message}.`;
  }
}

start();
