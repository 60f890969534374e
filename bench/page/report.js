"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);

function make(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (name) element.className = name;
  return element;
}

by("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

function sortKey(cell) {
  const known = cell.dataset.value;
  return known === undefined || known === "" ? null : isNaN(known) ? known : Number(known);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((one, other) => {
      const a = sortKey(one.cells[column]), b = sortKey(other.cells[column]);
      if (a === null || b === null) return (a === null) - (b === null);
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}

let found = [], at = 0;

function option(select, value, text) {
  const element = make("option", text);
  element.value = value;
  select.append(element);
}

function fillSubsets() {
  const chosen = by("subset").value, run = data.runs[by("run").value];
  const names = [...new Set(run.flips.map(flip => data.pairs[flip.id].subset))].sort();
  by("subset").replaceChildren();
  option(by("subset"), "", "all");
  names.forEach(name => option(by("subset"), name, name));
  by("subset").value = names.includes(chosen) ? chosen : "";
}

function filter() {
  const run = data.runs[by("run").value], direction = by("direction").value, subset = by("subset").value;
  by("kept").textContent = run.all > run.flips.length
    ? "The " + run.flips.length + " largest changes of " + run.all + " are listed, so that the page stays small." : "";
  found = run.flips.filter(flip => (!direction || flip.direction === direction)
    && (!subset || data.pairs[flip.id].subset === subset));
  at = 0;
  show();
}

function judgement(title, said, label, ordered) {
  const side = make("section");
  side.append(make("h3", title));
  const line = make("p");
  const state = label === "A" || label === "B" ? (said.verdict === label ? "right" : "wrong") : "";
  line.append(make("span", "says " + (said.verdict || "nothing") + (state ? ", " + state : ""), state));
  if (said.p_a !== null) line.append(" · p(A) " + said.p_a.toFixed(3) + (said.consistent === false ? " · orders disagree" : ""));
  side.append(line);
  for (const order of said.orders) {
    const block = make("details");
    block.open = order.order === ordered;
    const shown = order.order === "ab" ? "A shown first" : "B shown first (and called A in this text)";
    const figures = order.p_a === null ? "" : ", p(A) " + order.p_a.toFixed(3);
    block.append(make("summary", shown + ": " + (order.verdict || "nothing") + figures + (order.forced ? ", cut off" : "")));
    const text = make("div", order.rationale || "(no rationale)", "text");
    text.dir = "auto";
    text.tabIndex = 0;
    block.append(text);
    side.append(block);
  }
  if (!said.orders.length) side.append(make("p", said.reason || "No order was judged.", "quiet"));
  return side;
}

function response(name, text, label, open) {
  const block = make("details");
  block.open = open;
  block.append(make("summary", "Response " + name + (label === name ? " (the label)" : "")));
  const body = make("div", text, "text response" + (label === name ? " chosen" : ""));
  body.dir = "auto";
  body.tabIndex = 0;
  block.append(body);
  return block;
}

function show() {
  const flip = found[at], box = by("flip");
  by("position").textContent = found.length ? (at + 1) + " of " + found.length : "none";
  by("previous").disabled = at <= 0;
  by("next").disabled = at >= found.length - 1;
  box.replaceChildren();
  if (!flip) {
    box.append(make("p", "No verdict changed here."));
    return;
  }
  const run = data.runs[by("run").value], pair = data.pairs[flip.id];
  const words = { lost: "right to wrong", gained: "wrong to right", other: "changed, neither from right nor to right" };
  box.append(make("h3", flip.id));
  box.append(make("p", words[flip.direction] + " · label " + (pair.label || "unknown") + " · " + pair.subset, "quiet"));
  if (pair.prompt !== undefined) {
    const prompt = make("div", pair.prompt, "text prompt");
    prompt.dir = "auto";
    prompt.tabIndex = 0;
    box.append(prompt);
    const texts = make("div", null, "sides");
    texts.append(response("A", pair.a, pair.label, true), response("B", pair.b, pair.label, true));
    box.append(texts);
  }
  const sides = make("div", null, "sides");
  sides.append(judgement(data.base, data.judged[flip.id], pair.label, "ab"), judgement(run.name, flip.run, pair.label, "ab"));
  box.append(sides);
}

function step(by_how_much) {
  const next = at + by_how_much;
  if (next < 0 || next >= found.length) return;
  at = next;
  show();
}

if (data.runs.length) {
  data.runs.forEach((run, index) => option(by("run"), index, run.name + " (" + run.flips.length + ")"));
  by("run").addEventListener("change", () => { fillSubsets(); filter(); });
  by("direction").addEventListener("change", filter);
  by("subset").addEventListener("change", filter);
  by("previous").addEventListener("click", () => step(-1));
  by("next").addEventListener("click", () => step(1));
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(select|input|textarea)$/i.test(event.target.tagName)) return;
    const move = { j: 1, n: 1, ArrowRight: 1, k: -1, p: -1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    step(move);
  });
  fillSubsets();
  filter();
}
