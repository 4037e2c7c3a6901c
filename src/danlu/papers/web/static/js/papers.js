// What the buttons of a paper do. One listener serves every paper, those that come later included.
import * as answers from "./answers.js";
import { withSubject } from "./expression.js";
import { addKeywords, get, isStarred, set, star } from "./memory.js";
import * as pdf from "./pdf.js";
import { post, say } from "./server.js";

const toolbar = {
  top: () => window.scrollTo(0, 0),
  bottom: () => window.scrollTo(0, document.documentElement.scrollHeight),
  export: () => {
    const ids = [...document.querySelectorAll(".paper")].map((paper) => paper.dataset.id).filter(isStarred);
    if (!ids.length) return say("No paper on this page is starred.");
    if (ids.length > 200) return say("An address holds 200 papers; unstar some, or export from the starred page.");
    const branch = ids.every((id) => !id.includes("@")) ? "arxiv" : "venue";
    window.open(`/${branch}/${ids.join(",")}`, "_blank", "noopener");
  },
};

const actions = {
  pdf: (paper, button) => toggle(paper, button, "pdf", () => pdf.open(paper, button.href)),
  ask: (paper, button) => toggle(paper, button, "ask", () => answers.open(paper)),
  reask: (paper, button) => answers.again(paper ?? button.closest(".inline-card"), button.form),
  copy,
  rel: (paper) => { count(paper, "rel"); return false; },
  translate,
  include: (paper, button) => edit(button, "include"),
  exclude: (paper, button) => edit(button, "exclude"),
};

export function start() {
  // The press of a button must not take the reader's selection away.
  document.addEventListener("mousedown", (event) => {
    if (event.target.closest('[data-do="copy"]')) event.preventDefault();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do], .star");
    if (!button || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const paper = button.closest(".paper");
    if (paper && button.matches(".star")) return star(paper.dataset.id, !isStarred(paper.dataset.id));
    const name = button.dataset.do;
    if (!paper && name in toolbar) toolbar[name]();
    else if (name in actions && act(paper, button, name) !== false) event.preventDefault();
  });
  answers.resume(document.querySelector(".inline-card"));
}

export function act(paper, button, name) {
  return actions[name](paper, button);
}

function toggle(paper, button, kind, open) {
  const held = paper.querySelector(`.pane.${kind}`);
  if (held) return fold(paper, button, held);
  paper.classList.add("opened");
  button.setAttribute("aria-expanded", "true");
  star(paper.dataset.id, true);
  count(paper, kind);
  const pane = open();
  for (const folder of pane.querySelectorAll("[data-fold]")) {
    folder.addEventListener("click", () => fold(paper, button, pane));
  }
}

function fold(paper, button, pane) {
  pane.dispatchEvent(new Event("fold"));
  pane.remove();
  button.setAttribute("aria-expanded", "false");
  if (!paper.querySelector(".pane")) paper.classList.remove("opened");
  paper.scrollIntoView({ block: "nearest" });
  button.focus({ preventScroll: true });
}

async function count(paper, kind) {
  try {
    const answer = await (await post(`/count/${paper.dataset.id}`, { kind })).json();
    const place = paper.querySelector(`[data-do="${kind}"] .n`);
    if (place) place.textContent = String(answer.count);
    if (kind !== "rel") addKeywords(answer.keywords);
  } catch { /* a count is no reason to bother a reader */ }
}

async function copy(paper) {
  const text = (selector) => plain(paper.querySelector(selector));
  const links = [...new Set([location.origin + paper.querySelector(".title").getAttribute("href"),
    paper.querySelector("a.number")?.href, paper.querySelector('[data-do="pdf"]')?.href].filter(Boolean))];
  const whole = [text(".title"), text(".authors"), "", text(".abstract"), "", ...links].join("\n");
  try {
    await (navigator.clipboard ? navigator.clipboard.writeText(whole) : copyByHand(whole));
    say("Copied.");
    count(paper, "copy");
  } catch {
    say("The browser did not allow copying.");
  }
}

// What a reader would have typed: formulas by their source, hidden authors included.
function plain(element) {
  const twin = element.cloneNode(true);
  for (const formula of twin.querySelectorAll(".tex")) {
    const tex = formula.querySelector('annotation[encoding="application/x-tex"]')?.textContent;
    if (tex !== undefined) formula.replaceChildren(`$${tex}$`);
  }
  for (const summary of twin.querySelectorAll("summary")) summary.remove();
  return twin.textContent.replace(/\s+/g, " ").trim();
}

// Without a secure origin there is no clipboard interface; the old way steals the selection, so it is put back.
function copyByHand(text) {
  const selection = document.getSelection();
  const ranges = Array.from({ length: selection.rangeCount }, (_, i) => selection.getRangeAt(i));
  const area = Object.assign(document.createElement("textarea"), { value: text, readOnly: true });
  area.className = "skip";
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  selection.removeAllRanges();
  for (const range of ranges) selection.addRange(range);
  if (!done) throw new Error("not copied");
}

function translate(paper) {
  const text = `${plain(paper.querySelector(".title"))}\n\n${plain(paper.querySelector(".abstract"))}`;
  const address = document.body.dataset.translate.replace("{text}", encodeURIComponent(text));
  if (/^https?:\/\//.test(address)) window.open(address, "_blank", "noopener,noreferrer");
}

function edit(button, target) {
  const follow = withSubject(get("follow"), button.dataset.subject, target);
  set("follow", follow);
  say(follow ? `You follow ${follow}` : "You follow no subject now.");
}
