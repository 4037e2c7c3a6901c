const field = document.getElementById("site");
const { site } = await chrome.storage.sync.get({ site: "http://127.0.0.1:8000" });
field.value = site;

document.querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  await chrome.storage.sync.set({ site: field.value.replace(/\/+$/, "") });
  document.getElementById("said").textContent = "saved";
});
