// Everything that the site keeps about a reader, in the reader's browser. Other tabs hear of a change.
const PREFIX = "danlu.";
const EMPTY = { stars: {}, follow: "", words: null, cloud: {}, theme: "", lang: "", token: "" };
const listeners = new Set();
let fallback = {}; // a browser may refuse storage: then things last as long as the page

export function get(name) {
  try {
    const text = localStorage.getItem(PREFIX + name);
    if (text !== null) {
      const value = JSON.parse(text);
      if (fits(name, value)) return value;
    }
  } catch { /* refused, or written by something else */ }
  return name in fallback ? fallback[name] : structuredClone(EMPTY[name]);
}

export function set(name, value) {
  fallback[name] = value;
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch { /* refused or full */ }
  for (const listener of listeners) listener(name);
}

export function onChange(listener) {
  listeners.add(listener);
}

window.addEventListener("storage", (event) => {
  const name = event.key?.startsWith(PREFIX) ? event.key.slice(PREFIX.length) : null;
  if (name in EMPTY) for (const listener of listeners) listener(name);
});

function fits(name, value) {
  const model = EMPTY[name];
  if (name === "words") return value === null || typeof value === "string";
  if (typeof model !== "object") return typeof value === typeof model;
  if (typeof value !== "object" || value === null || Array.isArray(value)) return false;
  return Object.values(value).every((each) => typeof each === "number" && Number.isFinite(each));
}

// The operator's token is a secret of this browser: it does not travel in the file.
const TRAVELS = Object.keys(EMPTY).filter((name) => name !== "token");

export function everything() {
  return { format: "danlu-papers-1", ...Object.fromEntries(TRAVELS.map((name) => [name, get(name)])) };
}

export function load(data) {
  if (data?.format !== "danlu-papers-1") throw new Error("this file was not written by this site");
  const wrong = TRAVELS.find((name) => name in data && !fits(name, data[name]));
  if (wrong) throw new Error(`${wrong} in this file cannot be read`);
  for (const name of TRAVELS) {
    if (name in data) set(name, name === "stars" ? { ...get("stars"), ...data.stars } : data[name]);
  }
}

export function erase() {
  for (const name of Object.keys(EMPTY)) set(name, structuredClone(EMPTY[name]));
}

export const isStarred = (id) => id in get("stars");

export function star(id, on) {
  const stars = get("stars");
  if (on) stars[id] ??= Date.now();
  else delete stars[id];
  set("stars", stars);
}

// The cloud is the sum of the keywords of all papers that were opened; it keeps the heaviest so that it cannot grow for ever.
export function addKeywords(keywords) {
  const cloud = get("cloud");
  for (const [term, weight] of keywords) cloud[term] = (cloud[term] ?? 0) + weight;
  set("cloud", Object.fromEntries(heaviest(cloud, 400)));
}

function heaviest(cloud, count) {
  return Object.entries(cloud).sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1)).slice(0, count);
}

export const cloudWords = (count) => heaviest(get("cloud"), count);

export function preferenceWords() {
  return get("words") ?? cloudWords(20).map(([term]) => term).join(" ");
}
