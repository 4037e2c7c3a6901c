// The page of stars: the browser knows them, the server knows the papers. The latest star comes first.
import { insert } from "./chunks.js";
import { get } from "./memory.js";
import { fragment, say } from "./server.js";

const CHUNK = 25, MOST = 200;

const branch = (ids) => (ids.every((id) => !id.includes("@")) ? "arxiv" : "venue");

export async function start() {
  const place = document.getElementById("starred");
  if (!place) return;
  const ids = Object.entries(get("stars")).sort((a, b) => b[1] - a[1]).map(([id]) => id);
  const sum = document.getElementById("starred-sum");
  if (!ids.length) {
    sum.textContent = "No stars yet: opening a PDF or answers stars a paper, and so does the star beside its title.";
    return;
  }
  sum.textContent = `${ids.length} papers. As a page to keep or share, or for a reference manager: `;
  for (let first = 0; first < ids.length; first += MOST) {
    const part = ids.slice(first, first + MOST);
    const suffix = ids.length > MOST ? ` ${first + 1}–${first + part.length}` : "";
    sum.append(link(`/${branch(part)}/${part.join(",")}`, `link${suffix}`));
    for (const [format, name] of [["bibtex", "BibTeX"], ["ris", "RIS"], ["json", "JSON"]]) {
      sum.append(" · ", link(`/export?format=${format}&ids=${encodeURIComponent(part.join(","))}`, name + suffix));
    }
    sum.append(" ");
  }
  for (let first = 0; first < ids.length; first += CHUNK) {
    const part = ids.slice(first, first + CHUNK);
    const slot = document.createElement("p");
    place.append(slot);
    try {
      insert(slot, await (await fragment(`/${branch(part)}/${part.join(",")}`)).text());
      place.querySelector(".end")?.remove();
    } catch (error) {
      say(error.message);
      slot.remove();
    }
  }
  // Numbers are places in this list.
  [...place.querySelectorAll(".paper .number")].forEach((number, at) => { number.textContent = `#${at + 1}`; });
}

function link(address, text) {
  return Object.assign(document.createElement("a"), { href: address, textContent: text });
}
