// Requests to the site: forms carry the page's token, and what went wrong is a sentence to show.
const token = () => document.querySelector('meta[name="csrf-token"]').content;

export async function post(address, fields = {}, headers = {}) {
  return checked(await fetch(address, {
    method: "POST",
    headers: { "X-CSRF-Token": token(), "HX-Request": "true", ...headers },
    body: new URLSearchParams(fields),
  }));
}

export async function fragment(address) {
  return checked(await fetch(address, { headers: { "HX-Request": "true" } }));
}

async function checked(response) {
  if (response.ok) return response;
  const wait = response.headers.get("Retry-After");
  const why = { 403: "This page is too old: load it again.", 429: `Too many requests${wait ? `: again in ${wait} seconds` : ""}.` };
  throw new Error(why[response.status] ?? `The site answered ${response.status}.`);
}

// The server's own HTML, parsed without running anything.
export function parse(html) {
  return new DOMParser().parseFromString(html, "text/html").body;
}

let timer;
export function say(text) {
  const place = document.getElementById("said");
  place.textContent = text;
  clearTimeout(timer);
  timer = setTimeout(() => { place.textContent = ""; }, 4000);
}
