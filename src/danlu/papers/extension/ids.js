// Identifiers of papers in text and addresses. The rules are those of the site; the tests hold the two together.

const OLD_ARCHIVES = new Set(
  ("acc-phys adap-org alg-geom ao-sci astro-ph atom-ph bayes-an chao-dyn chem-ph cmp-lg comp-gas cond-mat cs dg-ga " +
    "funct-an gr-qc hep-ex hep-lat hep-ph hep-th math math-ph mtrl-th nlin nucl-ex nucl-th patt-sol physics plasm-ph " +
    "q-alg q-bio quant-ph solv-int supr-con").split(" ")
);

// A boundary on both sides, and not the tail of a DOI: those of other publishers hold numbers that look alike.
const ARXIV =
  /(?<![0-9A-Za-z./-])(?:arxiv:\s?|(?:https?:\/\/)?(?:www\.|export\.)?arxiv\.org\/(?:abs|pdf|html)\/|(?:https?:\/\/doi\.org\/)?10\.48550\/arxiv\.)?((?:[a-z]+(?:-[a-z]+)?(?:\.[A-Z]{2})?\/[0-9]{7}|[0-9]{4}\.[0-9]{4,5})(?:v[1-9][0-9]*)?)(?![0-9A-Za-z])(?!\.[0-9])/gi;
const OPENREVIEW = /openreview\.net\/(?:forum|pdf)\?(?:[^\s#]*&)?id=([A-Za-z0-9_-]+)/g;
// A paper has a collection, a volume and a number; /volumes/ and /events/ are lists and have other forms.
const ACL = /aclanthology\.org\/((?:[0-9]{4}\.[a-z0-9]+-[a-z0-9]+\.[0-9]+)|(?:[A-Z][0-9]{2}-[0-9]{4}))(?![0-9A-Za-z.-])/g;

/** The canonical form of an arXiv identifier, or null. */
export function canonical(text) {
  const fresh = /^([0-9]{2})([0-9]{2})\.([0-9]{4,5})(v[1-9][0-9]*)?$/.exec(text);
  if (fresh) {
    const [, year, month, number, version] = fresh;
    const width = year + month <= "1412" ? 4 : 5;
    const digits = number.replace(/^0+/, "");
    if (+month < 1 || +month > 12 || year + month < "0704" || !digits || digits.length > width) return null;
    return `${year}${month}.${digits.padStart(width, "0")}${version || ""}`;
  }
  const old = /^([a-z]+(?:-[a-z]+)?)(?:\.[a-z-]{2,10})?\/([0-9]{2})([0-9]{2})([0-9]{3})(v[1-9][0-9]*)?$/i.exec(text);
  if (!old) return null;
  const [, archive, year, month, number, version] = old;
  const stamp = (+year >= 91 ? 1900 : 2000) * 100 + +year * 100 + +month;
  const known = OLD_ARCHIVES.has(archive.toLowerCase());
  if (!known || +month < 1 || +month > 12 || stamp < 199107 || stamp > 200703 || number === "000") return null;
  return `${archive.toLowerCase()}/${year}${month}${number}${version || ""}`;
}

/** Identifiers in a text or an address, in order, each once: those of arXiv bare, others with their source. */
export function findIds(text) {
  if (typeof text !== "string") return [];
  const found = [];
  for (const match of text.matchAll(ARXIV)) {
    const id = canonical(match[1]);
    if (id) found.push([match.index, id]);
  }
  for (const match of text.matchAll(OPENREVIEW)) found.push([match.index, `${match[1]}@OpenReview`]);
  for (const match of text.matchAll(ACL)) found.push([match.index, `${match[1]}@ACL`]);
  found.sort((a, b) => a[0] - b[0]);
  return [...new Set(found.map(([, id]) => id))];
}

/** The address on the site that shows these papers, or searches for the words where there are none; null for nothing. */
export function target(site, ids, words = "") {
  const base = site.replace(/\/+$/, "");
  if (ids.length) {
    const branch = ids.some((id) => id.includes("@")) ? "venue" : "arxiv";
    return `${base}/${branch}/${ids.slice(0, 200).map(encodeURIComponent).join(",").replaceAll("%2F", "/").replaceAll("%40", "@")}`;
  }
  const query = words.trim().slice(0, 300);
  return query ? `${base}/arxiv/search?query=${encodeURIComponent(query)}` : null;
}

/** What a click of the menu means: identifiers of the selection, the link, the page, in that order; else the words. */
export function chosen({ selectionText, linkUrl, pageUrl, srcUrl }) {
  for (const text of [selectionText, linkUrl, srcUrl, pageUrl]) {
    const ids = findIds(text ?? "");
    if (ids.length) return { ids, words: "" };
  }
  return { ids: [], words: selectionText ?? "" };
}
