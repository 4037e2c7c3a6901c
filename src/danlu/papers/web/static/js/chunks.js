// The next part of a list comes when its link is near; without scripts the link is a page of its own.
import { dress } from "./cards.js";
import { fragment, parse, say } from "./server.js";

export function start(root = document) {
  const link = root.querySelector(".more .next");
  if (!link) return;
  const watcher = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) {
      watcher.disconnect();
      follow(link);
    }
  }, { rootMargin: "1200px 0px" });
  watcher.observe(link);
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    watcher.disconnect();
    follow(link);
  });
}

async function follow(link) {
  if (link.dataset.busy) return;
  link.dataset.busy = "1";
  link.textContent = "Loading…";
  try {
    insert(link.closest(".more"), await (await fragment(link.href)).text());
  } catch (error) {
    delete link.dataset.busy;
    link.textContent = "Next papers";
    say(error.message);
  }
}

export function insert(place, html) {
  const part = parse(html);
  const known = new Set([...document.querySelectorAll(".paper")].map((paper) => paper.dataset.id));
  // A search may move a paper between two requests; one paper stands once on a page.
  for (const paper of part.querySelectorAll(".paper")) if (known.has(paper.dataset.id)) paper.remove();
  const added = [...part.children];
  place.replaceWith(...added);
  for (const element of added) dress(element.matches(".paper") ? element : element.parentNode ?? document);
  document.dispatchEvent(new CustomEvent("papers"));
  start();
}
