// Sorting by preference: the words are the browser's, and go with the request alone.
import { preferenceWords } from "./memory.js";

export function start() {
  for (const link of document.querySelectorAll("[data-preference]")) {
    link.addEventListener("click", () => {
      const address = new URL(link.href);
      const words = preferenceWords().slice(0, 1000);
      if (words) address.searchParams.set("words", words);
      link.href = address.href;
    });
  }
}
