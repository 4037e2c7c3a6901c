// Keys: everything that a mouse can do on a list.
import * as find from "./find.js";
import { act } from "./papers.js";

let current = null;
const shown = () => [...document.querySelectorAll(".paper:not([hidden])")];

export function start() {
  document.addEventListener("keydown", press);
  document.addEventListener("goto", (event) => go(event.detail, false));
  document.addEventListener("focusin", (event) => {
    const paper = event.target.closest(".paper");
    if (paper && paper !== current) choose(paper);
  });
}

function choose(paper) {
  current?.classList.remove("current");
  current = paper;
  current.classList.add("current");
}

function go(paper, focus = true) {
  if (!paper) return;
  choose(paper);
  if (focus) paper.focus({ preventScroll: true });
  paper.scrollIntoView({ block: "start" });
}

function move(by) {
  const papers = shown();
  if (!papers.length) return;
  const at = current?.isConnected ? papers.indexOf(current) : -1;
  if (at >= 0) return go(papers[Math.min(papers.length - 1, Math.max(0, at + by))]);
  // Nothing is chosen yet: begin with what the reader sees.
  go(papers.find((paper) => paper.getBoundingClientRect().bottom > 80) ?? papers[0]);
}

const on = (name) => () => {
  const paper = current ?? shown()[0];
  const button = paper?.querySelector(`[data-do="${name}"]`);
  if (!button) return;
  choose(paper);
  if (act(paper, button, name) === false) location.assign(button.href);
};

const KEYS = {
  j: () => move(1),
  k: () => move(-1),
  o: on("pdf"),
  a: on("ask"),
  c: on("copy"),
  r: on("rel"),
  s: () => { const paper = current ?? shown()[0]; if (paper) { choose(paper); paper.querySelector(".star").click(); } },
  g: () => window.scrollTo(0, 0),
  G: () => window.scrollTo(0, document.documentElement.scrollHeight),
  h: () => location.assign("/"),
  "?": () => location.assign("/help"),
  "/": () => { const box = document.getElementById("query"); box.focus(); box.select(); },
};

function press(event) {
  const writing = event.target.matches("input, textarea, select, [contenteditable]");
  if ((event.ctrlKey || event.metaKey) && !event.altKey && event.key.toLowerCase() === "f") {
    // Pressed again, the browser's own.
    if (find.isOpen() || !document.querySelector(".paper")) return;
    event.preventDefault();
    return find.show();
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.key === "Escape") {
    if (find.isOpen()) return find.hide();
    if (writing) return event.target.blur();
    const fold = current?.querySelector(".pane:last-child [data-fold]");
    if (fold) fold.click();
    return;
  }
  if (writing) return;
  if (event.key === "Enter" && event.target.matches(".paper")) return location.assign(event.target.querySelector(".title").href);
  const action = KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}
