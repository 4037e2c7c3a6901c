// Subject expressions in the browser: names contain hyphens themselves, so that a list of names is needed to split them.
export function parseExpression(text) {
  const include = [], exclude = [];
  // A hyphen is an operator where a name with a dot or one of the known archives without one ends.
  const known = /(?:[a-z]+(?:-[a-z]+)?\.[A-Za-z]+(?:-[a-z]+)?|physics-group|math-ph|astro-ph|cond-mat|gr-qc|hep-(?:ex|lat|ph|th)|nucl-(?:ex|th)|quant-ph|q-bio|q-fin|[a-z]+)(?=[,+-]|$)/y;
  // While a reader chooses, there may be exclusions alone.
  let place = text.startsWith("-") ? 1 : 0, target = place ? exclude : include;
  while (place < text.length) {
    known.lastIndex = place;
    const match = known.exec(text);
    if (!match) return { include, exclude, rest: text.slice(place) };
    if (!target.includes(match[0])) target.push(match[0]);
    place += match[0].length;
    target = text[place] === "-" ? exclude : include;
    place += 1;
  }
  return { include, exclude, rest: "" };
}

export function format({ include, exclude }) {
  return [...include].sort().join("+") + [...exclude].sort().map((name) => `-${name}`).join("");
}

export function withSubject(text, subject, target) {
  const parts = parseExpression(text);
  const on = parts[target].includes(subject);
  parts.include = parts.include.filter((name) => name !== subject);
  parts.exclude = parts.exclude.filter((name) => name !== subject);
  if (!on) parts[target].push(subject);
  return format(parts);
}
