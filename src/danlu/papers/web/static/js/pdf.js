// A PDF below its paper: the reader's own browser loads it from the source, and where that does not allow it a link remains.
import { pane } from "./panes.js";

// Pages that are kept drawn: a phone has little memory for canvases.
const KEPT = 8;
let loading;

function load() {
  const base = document.body.dataset.static;
  loading ??= import(`${base}vendor/pdfjs/pdf.min.mjs`).then((library) => {
    library.GlobalWorkerOptions.workerSrc = `${base}vendor/pdfjs/pdf.worker.min.mjs`;
    return library;
  });
  return loading;
}

export function open(paper, address) {
  const { box, head, body } = pane(paper, "pdf", "PDF");
  const link = Object.assign(document.createElement("a"), { href: address, target: "_blank", rel: "noopener noreferrer", textContent: "Open at the source" });
  head.children[0].after(link);
  body.textContent = "Loading…";
  show(box, head, body, address).catch((error) => {
    box.dataset.state = "failed";
    body.textContent = `The PDF cannot be shown here (${error.name === "Error" ? error.message : error.name}). `;
    body.append(Object.assign(link.cloneNode(true), { textContent: "Open it at its source" }));
  });
  return box;
}

async function show(box, head, body, address) {
  const library = await load();
  const task = library.getDocument({ url: address, useSystemFonts: true, isEvalSupported: false, enableXfa: false, useWasm: false, useWorkerFetch: false, disableAutoFetch: true, withCredentials: false });
  box.addEventListener("fold", () => task.destroy());
  task.onProgress = ({ loaded, total }) => {
    if (!box.dataset.state) body.textContent = total ? `Loading ${Math.min(100, Math.round((100 * loaded) / total))} %` : "Loading…";
  };
  const file = await task.promise;
  box.dataset.state = "open";
  head.children[0].textContent = `PDF, ${file.numPages} page${file.numPages === 1 ? "" : "s"}`;
  body.textContent = "";
  const first = await file.getPage(1);
  const shape = first.getViewport({ scale: 1 });
  const width = Math.min(body.clientWidth - 16, 900);
  const drawn = [];
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(file, entry.target, width, drawn);
  }, { root: body, rootMargin: "600px 0px" });
  for (let number = 1; number <= file.numPages; number += 1) {
    const page = document.createElement("div");
    page.className = "pdf-page";
    page.dataset.page = String(number);
    page.style.width = `${width}px`;
    page.style.aspectRatio = `${shape.width} / ${shape.height}`;
    body.append(page);
    watcher.observe(page);
  }
}

async function draw(file, place, width, drawn) {
  if (place.firstChild) return;
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Page ${place.dataset.page}`);
  place.append(canvas);
  drawn.push(place);
  while (drawn.length > KEPT) drawn.shift().replaceChildren();
  const page = await file.getPage(Number(place.dataset.page));
  const plain = page.getViewport({ scale: 1 });
  place.style.aspectRatio = `${plain.width} / ${plain.height}`;
  const viewport = page.getViewport({ scale: (width / plain.width) * Math.min(window.devicePixelRatio || 1, 2) });
  canvas.width = Math.floor(viewport.width);
  canvas.height = Math.floor(viewport.height);
  try {
    await page.render({ canvas, viewport }).promise;
    place.dataset.drawn = "1";
  } catch { /* folded while it was drawn */ }
}
