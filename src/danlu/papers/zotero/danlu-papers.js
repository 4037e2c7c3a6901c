{
	"translatorID": "6d2f7c1e-2f3b-4f0c-9a57-5b7c0f0a9d31",
	"label": "danlu papers",
	"creator": "danlu",
	"target": "^https?://[^/]+/(arxiv|venue|starred|export)(/|\\?|$)",
	"minVersion": "5.0",
	"maxVersion": "",
	"priority": 250,
	"inRepository": false,
	"translatorType": 4,
	"browserSupport": "gcsibv",
	"lastUpdated": "2026-11-24 00:00:00"
}

// A page with several papers offers those that the reader has starred on it; a page with one offers that one.

function isSite(doc) {
	return doc.querySelector('meta[name="generator"][content^="danlu papers"]') !== null;
}

function starred(doc) {
	const found = {};
	for (const card of doc.querySelectorAll("article[data-id]")) {
		if (!card.querySelector('[data-star][aria-pressed="true"]')) continue;
		const title = card.querySelector("h2, h3");
		found[card.dataset.id] = title ? title.textContent.trim() : card.dataset.id;
	}
	return found;
}

function detectWeb(doc) {
	if (!isSite(doc)) return false;
	if (doc.querySelector('meta[name="citation_title"]')) return "preprint";
	return Object.keys(starred(doc)).length ? "multiple" : false;
}

async function doWeb(doc, url) {
	if (detectWeb(doc) === "preprint") {
		const id = doc.querySelector("article[data-id]").dataset.id;
		await take([id], url);
		return;
	}
	const items = await Zotero.selectItems(starred(doc));
	if (items) await take(Object.keys(items), url);
}

async function take(ids, url) {
	const site = new URL(url).origin;
	const text = await requestText(`${site}/export?format=bibtex&ids=${encodeURIComponent(ids.join(","))}`);
	const reader = Zotero.loadTranslator("import");
	reader.setTranslator("9cb70025-a888-4a29-a210-93ec52da40d4"); // BibTeX
	reader.setString(text);
	reader.setHandler("itemDone", (_, item) => item.complete());
	await reader.translate();
}
