// Adds a small link behind every link to a paper. Nothing of the page is rewritten: elements are only added.
(async () => {
  const { findIds, target } = await import(chrome.runtime.getURL("ids.js"));
  const { site } = await chrome.storage.sync.get({ site: "http://127.0.0.1:8000" });
  const seen = new Set();

  function add(behind, id) {
    const link = document.createElement("a");
    link.href = target(site, [id]);
    link.target = "_blank";
    link.rel = "noopener noreferrer";
    link.textContent = "skim";
    link.title = `${id} on your papers site`;
    link.style.cssText = "margin-left:.4em;font-size:85%";
    behind.after(link);
  }

  function look() {
    for (const link of document.querySelectorAll("a[href]")) {
      const [id] = findIds(link.href);
      if (!id || seen.has(id) || !/\/abs\/|forum\?|aclanthology\.org\//.test(link.href)) continue;
      seen.add(id);
      add(link, id);
    }
    const [own] = findIds(location.href);
    const heading = document.querySelector("h1.title, h2.citation_title, h2#title");
    if (own && heading && !seen.has(own)) {
      seen.add(own);
      add(heading, own);
    }
  }

  look();
  // Lists that load as one scrolls.
  new MutationObserver(look).observe(document.body, { childList: true, subtree: true });
})();
