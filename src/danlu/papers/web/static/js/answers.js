// The card of answers: asked for with a POST, followed as events, and shown as the server renders it.
import { typeset } from "./formulas.js";
import { get } from "./memory.js";
import { pane } from "./panes.js";
import { fragment, parse, post } from "./server.js";

const STAGES = { fetching: "Loading the paper", extracting: "Reading the paper", answering: "Answering" };

const lang = () => {
  const known = document.body.dataset.languages.split(",");
  return known.includes(get("lang")) ? get("lang") : known[0];
};
const asked = (fields) => post(`/answers/${fields.id}`, { lang: fields.lang, v: fields.v ?? "" }, get("token") ? { "X-Admin-Token": get("token") } : {});

export function open(paper) {
  const { box, body } = pane(paper, "ask", "Questions and answers");
  body.textContent = "…";
  request(box, body, { id: paper.dataset.id, lang: lang() });
  return box;
}

export function again(place, form) {
  const box = place.querySelector?.(".pane.ask") ?? place;
  const body = box.querySelector(".pane-body") ?? box;
  const id = form.getAttribute("action").slice("/answers/".length);
  request(box, body, { id, lang: form.elements.lang.value, v: form.elements.v.value }, true);
}

export function resume(place) {
  const card = place?.querySelector(".card[data-job]");
  if (card) follow(place, place, card);
  if (place) typeset(place);
}

async function request(box, body, fields, anew = false) {
  try {
    // Reading costs nothing; only where there is nothing does the work begin.
    const held = anew ? null : await fragment(`/answers/${fields.id}?lang=${fields.lang}`);
    const answer = held && held.status !== 204 ? held : await asked(fields);
    const card = put(body, await answer.text());
    if (!anew && card && !card.dataset.job && card.querySelector("li.open") && !card.querySelector(".failed, .note form")) {
      return await request(box, body, fields, true); // it was broken off without a reason: go on
    }
    if (card?.dataset.job) follow(box, body, card);
  } catch (error) {
    body.textContent = `${error.message} `;
    const retry = Object.assign(document.createElement("button"), { type: "button", textContent: "Try again" });
    retry.addEventListener("click", () => request(box, body, fields, anew));
    body.append(retry);
  }
}

function put(body, html) {
  body.replaceChildren(...parse(html).childNodes);
  typeset(body);
  return body.querySelector(".card");
}

function follow(box, body, first) {
  let card = first;
  let current = 0;
  const { paper, job } = card.dataset;
  const source = new EventSource(`/answers/${paper}/stream?job=${job}`);
  box.addEventListener("fold", () => source.close());
  const on = (kind, handle) => source.addEventListener(kind, (event) => handle(JSON.parse(event.data)));
  // Whole again from the server: finished answers come rendered, and their quotes with them.
  const refresh = async () => {
    const v = card.dataset.version ? `&v=${card.dataset.version}` : "";
    const answer = await fragment(`/answers/${paper}?lang=${card.dataset.lang}${v}`);
    if (answer.status === 204 || !body.isConnected) return;
    const kept = card.querySelector(".answer.raw:not(:empty)");
    const number = kept?.closest("li").dataset.q;
    const fresh = put(body, await answer.text());
    const slot = number && fresh.querySelector(`li[data-q="${number}"] .answer.raw`);
    if (slot) slot.textContent = kept.textContent;
    card = fresh;
  };
  // One thing after another: text that comes while the card is read again must not get lost.
  let chain = Promise.resolve();
  const then = (step) => { chain = chain.then(step).catch(() => {}); };

  on("queue", ({ ahead }) => then(() => state(card, 0, `Waiting: ${ahead} before this one`)));
  on("stage", ({ stage, progress }) => then(() => state(card, progress, `${STAGES[stage] ?? "Working"}: ${Math.round(100 * progress)} %`)));
  on("text", ({ q, text }) => then(async () => {
    if (q !== current) {
      current = q;
      await refresh();
    }
    const slot = card.querySelector(`li[data-q="${q}"] .answer.raw`);
    if (slot) slot.append(text);
  }));
  on("restart", ({ q }) => then(() => card.querySelector(`li[data-q="${q}"] .answer.raw`)?.replaceChildren()));
  const end = () => { source.close(); then(refresh); };
  on("done", end);
  on("failed", end);
}

function state(card, share, text) {
  const place = card.querySelector(".state");
  if (!place) return;
  place.querySelector("progress").value = share;
  place.querySelector(".text").textContent = text;
}
