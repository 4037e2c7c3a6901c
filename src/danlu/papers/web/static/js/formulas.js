// Typesetting: KaTeX is loaded when the first formula appears. It builds elements, so that no style attribute is parsed.
const OPTIONS = { throwOnError: true, trust: false, strict: "ignore", maxExpand: 200, maxSize: 20, output: "htmlAndMathml" };
let loading;

function load() {
  loading ??= new Promise((resolve, reject) => {
    const base = document.body.dataset.static;
    const sheet = Object.assign(document.createElement("link"), { rel: "stylesheet", href: `${base}vendor/katex/katex.min.css` });
    const script = Object.assign(document.createElement("script"), { src: `${base}vendor/katex/katex.min.js` });
    script.addEventListener("load", () => resolve(window.katex));
    script.addEventListener("error", () => reject(new Error("KaTeX did not load")));
    document.head.append(sheet, script);
  });
  return loading;
}

const source = (text) => (/^(\$\$|\\)/.test(text) ? text.slice(2, -2) : text.slice(1, -1));

export async function typeset(root) {
  const formulas = [...root.querySelectorAll(".tex:not([data-done])")];
  if (formulas.length) {
    let katex;
    try {
      katex = await load();
    } catch {
      return; // the source stays, which can be read too
    }
    for (const formula of formulas) {
      if (formula.dataset.done) continue;
      formula.dataset.done = "1";
      // Built aside and swapped: nobody sees half a formula.
      const built = document.createElement("span");
      const display = formula.classList.contains("display");
      try {
        katex.render(source(formula.textContent), built, { ...OPTIONS, displayMode: display });
      } catch {
        continue;
      }
      formula.replaceChildren(...built.childNodes);
      if (display) shrink(formula);
    }
  }
  // Formulas keep their own mark; only now may a browser translate the words around them.
  for (const block of root.querySelectorAll("[data-typeset].notranslate")) block.classList.remove("notranslate");
}

// A wide formula takes the width that there is, down to a size that can still be read; then it scrolls.
function shrink(formula) {
  const inner = formula.querySelector(".katex-html");
  if (!inner || !formula.clientWidth) return;
  const ratio = formula.clientWidth / formula.scrollWidth;
  if (ratio < 1) formula.style.fontSize = `${Math.max(0.55, ratio) * 100}%`;
}
