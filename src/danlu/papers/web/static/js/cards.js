// The look of papers that depends on what the browser remembers: stars, followed subjects, typeset formulas.
import { parseExpression } from "./expression.js";
import { typeset } from "./formulas.js";
import { get, onChange } from "./memory.js";

export function dress(root) {
  const papers = root.matches?.(".paper") ? [root] : root.querySelectorAll(".paper");
  for (const paper of papers) mark(paper);
  count();
  typeset(root);
}

function mark(paper) {
  const on = paper.dataset.id in get("stars");
  const button = paper.querySelector(".star");
  button.setAttribute("aria-pressed", String(on));
  button.textContent = on ? "★" : "☆";
  const { include, exclude } = parseExpression(get("follow"));
  for (const edit of paper.querySelectorAll(".edit")) {
    const held = edit.dataset.do === "include" ? include : exclude;
    edit.setAttribute("aria-pressed", String(held.includes(edit.dataset.subject)));
  }
}

function count() {
  const stars = get("stars");
  const here = [...document.querySelectorAll(".paper")].filter((paper) => paper.dataset.id in stars).length;
  for (const place of document.querySelectorAll("[data-starred-here]")) place.textContent = String(here);
  const all = Object.keys(stars).length;
  for (const place of document.querySelectorAll("[data-stars]")) place.textContent = all ? String(all) : "";
}

onChange((name) => {
  if (name !== "stars" && name !== "follow") return;
  for (const paper of document.querySelectorAll(".paper")) mark(paper);
  count();
});
