// The subjects on the home page: a box goes from empty to included to excluded, and the line above says the same.
import { format, parseExpression } from "./expression.js";
import { get, set } from "./memory.js";
import { say } from "./server.js";

export function start() {
  const form = document.getElementById("chooser");
  if (!form) return;
  const line = form.elements.subjects;
  const boxes = [...form.querySelectorAll(".choice input")];
  if (get("follow")) line.value = get("follow");
  show();

  for (const box of boxes) {
    // The line above is what is sent.
    box.removeAttribute("name");
    box.addEventListener("click", () => {
      const held = parseExpression(line.value.replace(/\s+/g, ""));
      const was = held.include.includes(box.value) ? 1 : held.exclude.includes(box.value) ? 2 : 0;
      held.include = held.include.filter((name) => name !== box.value);
      held.exclude = held.exclude.filter((name) => name !== box.value);
      if (was === 0) held.include.push(box.value);
      if (was === 1) held.exclude.push(box.value);
      line.value = format(held);
      set("follow", line.value);
      show();
    });
  }
  line.addEventListener("change", () => { set("follow", line.value.replace(/\s+/g, "")); show(); });
  form.addEventListener("submit", (event) => {
    set("follow", line.value.replace(/\s+/g, ""));
    if (parseExpression(get("follow")).include.length) return;
    event.preventDefault();
    say("Choose at least one subject to include.");
  });

  function show() {
    const { include, exclude } = parseExpression(line.value.replace(/\s+/g, ""));
    for (const box of boxes) {
      box.checked = include.includes(box.value);
      box.indeterminate = exclude.includes(box.value);
      // "Mixed" would be read out for an excluded subject.
      box.setAttribute("aria-label", `${box.parentNode.textContent.trim()}${box.indeterminate ? ", excluded" : ""}`);
    }
  }
}
