import { chosen, target } from "./ids.js";

const SITE = "http://127.0.0.1:8000";

chrome.runtime.onInstalled.addListener(() => {
  chrome.contextMenus.create({
    id: "skim",
    title: "Skim this paper",
    contexts: ["selection", "link", "page", "frame", "image", "editable"],
  });
});

chrome.contextMenus.onClicked.addListener(async (info, tab) => {
  const { site } = await chrome.storage.sync.get({ site: SITE });
  const { ids, words } = chosen({ ...info, pageUrl: info.pageUrl ?? tab?.url });
  const address = target(site, ids, words);
  if (address) {
    await chrome.tabs.create({ url: address, index: tab ? tab.index + 1 : undefined });
  } else if (tab?.id !== undefined) {
    await chrome.scripting.executeScript({
      target: { tabId: tab.id },
      func: () => alert("Select an identifier or some words of a paper, or click a link to one."),
    });
  }
});
