"""The report's page: its style, its script and its frame. Nothing in it comes from a run."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --bg: #ffffff; --panel: #f5f6f8; --ink: #1a1b1e; --muted: #5a5f66; --accent: #0b57d0;
  --line: #d6d9de; --good: #146c2e; --bad: #b3261e; --mark: #e8f0fe; }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) { --bg: #14161a; --panel: #1e2126; --ink: #e8eaed;
  --muted: #a9b0bb; --accent: #8ab4f8; --line: #3a3f47; --good: #7bd389; --bad: #ff9a90; --mark: #24324a; } }
:root[data-theme=dark] { color-scheme: dark; --bg: #14161a; --panel: #1e2126; --ink: #e8eaed; --muted: #a9b0bb;
  --accent: #8ab4f8; --line: #3a3f47; --good: #7bd389; --bad: #ff9a90; --mark: #24324a; }
:root[data-theme=light] { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main, header, footer { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
header { display: flex; gap: 1rem; align-items: start; justify-content: space-between; padding-top: 1.5rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
p, li { max-width: 70ch; overflow-wrap: anywhere; }
.quiet { color: var(--muted); }
a { color: var(--accent); }
button, select { font: inherit; color: var(--ink); background: var(--panel); border: 1px solid var(--muted); border-radius: 6px;
  padding: .35rem .7rem; min-height: 2.4rem; max-width: 100%; }
button { cursor: pointer; }
button:disabled { color: var(--muted); cursor: default; border-color: var(--line); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: -100vw; }
.skip:focus { left: 1rem; top: .5rem; background: var(--bg); padding: .5rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: .5rem; }
figure svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--bg); max-width: 16rem;
  overflow: hidden; text-overflow: ellipsis; }
tbody tr:last-child td { border-bottom: 0; }
th button { border: 0; background: none; padding: 0; min-height: 2rem; font-weight: 600; white-space: nowrap; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
.filters { display: flex; flex-wrap: wrap; gap: .75rem; margin: .5rem 0; }
.filters label { display: grid; gap: .15rem; font-size: .88rem; color: var(--muted); min-width: 0; max-width: 100%; }
.steps { display: flex; gap: .75rem; align-items: center; margin: .75rem 0; position: sticky; top: 0; background: var(--bg);
  padding: .4rem 0; z-index: 1; }
.steps output { min-width: 6.5rem; text-align: center; }
.flip { border: 1px solid var(--line); border-radius: 8px; padding: .25rem 1rem 1rem; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.sides > * { min-width: 0; }
@media (max-width: 45rem) { .sides { grid-template-columns: 1fr; } header { display: block; } }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; background: var(--panel); border-radius: 6px;
  padding: .6rem .75rem; margin: .25rem 0; max-height: 22rem; overflow-y: auto; font-size: .93rem; }
.right { color: var(--good); font-weight: 600; }
.wrong { color: var(--bad); font-weight: 600; }
.prompt, .response { max-height: 11rem; }
.chosen { box-shadow: inset 3px 0 0 var(--good); }
summary { cursor: pointer; padding: .25rem 0; }
kbd { border: 1px solid var(--muted); border-radius: 4px; padding: 0 .3rem; font: .85em ui-monospace, monospace; }
footer { padding: 2rem 1rem; font-size: .88rem; color: var(--muted); }
@media print { .steps, .filters, #theme { display: none; } }
"""

SCRIPT = """
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
"""

FLIP_BROWSER = """
<div class="filters">
<label>Run <select id="run"></select></label>
<label>Direction <select id="direction"><option value="">all</option><option value="lost">right to wrong</option>
<option value="gained">wrong to right</option><option value="other">neither of the two</option></select></label>
<label>Subset <select id="subset"></select></label>
</div>
<div class="steps"><button id="previous" type="button">&#8592; Previous</button>
<output id="position" aria-live="polite"></output>
<button id="next" type="button">Next &#8594;</button></div>
<p class="quiet">Keys: <kbd>j</kbd> or <kbd>&#8594;</kbd> next, <kbd>k</kbd> or <kbd>&#8592;</kbd> previous.</p>
<p id="kept" class="quiet"></p>
<noscript><p>The flip browser needs JavaScript; the tables above do not.</p></noscript>
<article id="flip" class="flip" aria-label="A verdict that changed"></article>
"""
