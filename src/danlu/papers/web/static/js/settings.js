// The settings page: every field is a value that the browser keeps.
import { cloudWords, erase, everything, get, load, onChange, preferenceWords, set } from "./memory.js";
import { say } from "./server.js";

const FIELDS = ["follow", "words", "theme", "lang", "token"];

export function start() {
  const form = document.getElementById("settings");
  if (!form) return;
  fill(form);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => {
    const { name, value } = event.target;
    if (!FIELDS.includes(name)) return;
    // Words that were cleared are the cloud's again.
    set(name, name === "words" && !value.trim() ? null : name === "follow" ? value.replace(/\s+/g, "") : value);
    say("Kept in this browser.");
  });
  onChange((name) => {
    if (name === "theme") theme();
    fill(form);
  });
  form.querySelector("#import-all").addEventListener("change", async (event) => {
    try {
      load(JSON.parse(await event.target.files[0].text()));
      say("Loaded.");
    } catch (error) {
      say(`Nothing was loaded: ${error instanceof SyntaxError ? "this is no JSON file" : error.message}.`);
    }
    event.target.value = "";
  });
  form.addEventListener("click", (event) => {
    const name = event.target.dataset?.do;
    if (name === "export-all") save();
    if (name === "forget-cloud") set("cloud", {});
    if (name === "erase-all" && window.confirm("Erase stars, subjects, words and settings from this browser?")) erase();
    if (event.target.dataset?.word) choose(event.target.dataset.word);
  });
}

function fill(form) {
  for (const name of FIELDS) {
    const field = form.elements[name];
    if (document.activeElement !== field) field.value = name === "words" ? preferenceWords() : get(name) || field.options?.[0].value || "";
  }
  const heaviest = cloudWords(80);
  const most = heaviest[0]?.[1] ?? 1;
  const chosen = preferenceWords().split(/\s+/);
  const buttons = [...heaviest].sort((a, b) => (a[0] < b[0] ? -1 : 1)).map(([term, weight]) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: term });
    button.className = `s${1 + Math.min(4, Math.floor((5 * weight) / most))}`;
    button.dataset.word = term;
    button.setAttribute("aria-pressed", String(chosen.includes(term)));
    return button;
  });
  const cloud = document.getElementById("cloud");
  if (buttons.length) cloud.replaceChildren(...buttons);
  else cloud.textContent = "It grows as you open papers.";
}

function choose(word) {
  const held = preferenceWords().split(/\s+/).filter(Boolean);
  set("words", (held.includes(word) ? held.filter((each) => each !== word) : [...held, word]).join(" "));
}

function theme() {
  const value = get("theme");
  if (value) document.documentElement.dataset.theme = value;
  else delete document.documentElement.dataset.theme;
}

function save() {
  const file = new Blob([JSON.stringify(everything(), null, 1)], { type: "application/json" });
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(file), download: `danlu-papers-${new Date().toISOString().slice(0, 10)}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
