// A box below a paper with a head, a body, and a button at each end to fold it.
export function pane(paper, kind, title) {
  const box = document.createElement("section");
  box.className = `pane ${kind}`;
  box.setAttribute("aria-label", title);
  const head = document.createElement("div");
  head.className = "pane-head";
  const name = document.createElement("span");
  name.textContent = title;
  head.append(name, button());
  const body = document.createElement("div");
  body.className = "pane-body";
  body.tabIndex = 0;
  const foot = document.createElement("div");
  foot.className = "pane-foot";
  foot.append(button());
  box.append(head, body, foot);
  paper.querySelector(".panes").append(box);
  return { box, head, body };
}

function button() {
  const made = document.createElement("button");
  made.type = "button";
  made.dataset.fold = "";
  made.textContent = "Fold";
  return made;
}
