// Finding on a page: words to include (any or all), words to exclude, marks, and a view of the matches alone.
// The browser paints the marks over the text, so that formulas and translations stay as they are.
import { say } from "./server.js";

const FORM = `<form><label class="text">Include <input name="include" autocomplete="off"></label>
<div class="row"><label><input type="radio" name="mode" value="or" checked> any word</label><label><input type="radio" name="mode" value="and"> all words</label></div>
<label class="text">Exclude <input name="exclude" autocomplete="off"></label>
<div class="row"><label><input type="checkbox" name="only"> only matches</label><span class="hits faint"></span></div>
<div class="row"><button type="submit">Next</button><button type="button" class="back">Previous</button><button type="button" class="close">Close</button></div></form>`;

const fold = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
const words = (text) => fold(text).split(/\s+/).filter(Boolean);
let box, form, matches = [], place = -1;

export function start() {
  box = document.getElementById("find");
  document.querySelector('[data-do="find"]')?.addEventListener("click", show);
  document.addEventListener("papers", () => { if (form && !box.hidden) apply(); });
}

export const isOpen = () => Boolean(box) && !box.hidden;

export function show() {
  if (!document.querySelector(".paper")) return say("There are no papers on this page.");
  if (!form) {
    box.innerHTML = FORM;
    form = box.firstChild;
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => { event.preventDefault(); step(1); });
    form.querySelector(".back").addEventListener("click", () => step(-1));
    form.querySelector(".close").addEventListener("click", hide);
  }
  box.hidden = false;
  form.elements.include.focus();
  form.elements.include.select();
  apply();
}

export function hide() {
  if (!isOpen()) return;
  box.hidden = true;
  CSS.highlights?.delete("found");
  for (const paper of document.querySelectorAll(".paper")) paper.hidden = false;
}

function apply() {
  const include = words(form.elements.include.value), exclude = words(form.elements.exclude.value);
  const every = form.elements.mode.value === "and", only = form.elements.only.checked;
  const ranges = [];
  matches = [];
  for (const paper of document.querySelectorAll(".paper")) {
    const parts = [".title", ".authors", ".abstract"].map((selector) => paper.querySelector(selector));
    const text = parts.map((part) => fold(part.textContent)).join("\n");
    const has = (word) => text.includes(word);
    const fits = (!include.length || (every ? include.every(has) : include.some(has))) && !exclude.some(has);
    const asked = include.length + exclude.length > 0;
    if (fits && asked) {
      matches.push(paper);
      for (const part of parts) ranges.push(...rangesOf(part, include));
    }
    paper.hidden = only && asked && !fits;
  }
  if (CSS.highlights) CSS.highlights.set("found", new Highlight(...ranges));
  place = -1;
  form.querySelector(".hits").textContent = include.length + exclude.length ? `${matches.length} of ${document.querySelectorAll(".paper").length} loaded papers` : "";
}

function rangesOf(root, include) {
  const found = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    // Case folding may change the length of a text; such a text is matched and not marked.
    const text = fold(node.data);
    if (text.length !== node.data.length || node.parentNode.closest(".tex")) continue;
    for (const word of include) {
      for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
        const range = new Range();
        range.setStart(node, at);
        range.setEnd(node, at + word.length);
        found.push(range);
      }
    }
  }
  return found;
}

function step(by) {
  if (!matches.length) return;
  place = (place + by + matches.length) % matches.length;
  document.dispatchEvent(new CustomEvent("goto", { detail: matches[place] }));
  form.querySelector(".hits").textContent = `${place + 1} of ${matches.length} matches`;
}
