// What all pages do: a list of cards that open, to search, to narrow and to sort. Texts of records
// only ever become text nodes. No framework, no network.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const list = document.getElementById("list");
const $ = (id) => document.getElementById(id);

function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const count = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
const clean = (text) => text.replace(/↵/g, "").replace(/\s+/g, " ").toLowerCase();

// A card: a number, the beginning of a text and some facts; `fill` puts in the rest when it opens.
function cardOf(group, text, facts, fill) {
  const snippet = text.replace(/\s+/g, " ").slice(0, 160);
  const inside = el("div", { class: "inside" });
  const node = el(
    "details", { class: "group", id: `g${group.index}` },
    el("summary", {}, el("b", {}, String(group.index)), el("span", { class: "snippet", dir: "auto" }, snippet),
      el("span", { class: "costs" }, ...facts)),
    inside,
  );
  node.addEventListener("toggle", () => {
    if (node.open && !inside.hasChildNodes()) { fill(node, group); mark(); }
  });
  return node;
}

function hideKinds(root) {
  const shown = new Set([...document.querySelectorAll("input[name=kind]:checked")].map((i) => i.value));
  for (const node of root.querySelectorAll(".candidate")) node.hidden = !shown.has(node.dataset.kind);
}

// Marks what was searched for, where the browser can do so without touching the text.
function mark() {
  if (!window.Highlight || !CSS.highlights) return;
  CSS.highlights.delete("found");
  const query = $("query").value.trim().toLowerCase();
  if (query.length < 2 || query.startsWith("#")) return;
  const ranges = [];
  for (const text of list.querySelectorAll("[open] .text")) {
    const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
    const nodes = [];
    let all = "";
    while (walker.nextNode()) { nodes.push([all.length, walker.currentNode]); all += walker.currentNode.data; }
    const lower = all.toLowerCase();
    if (lower.length !== all.length) continue; // a few letters change length; then places do not match
    const place = (i) => { const [at, node] = nodes.findLast(([start]) => start <= i); return [node, i - at]; };
    for (let i = lower.indexOf(query); i >= 0; i = lower.indexOf(query, i + query.length)) {
      const range = new Range();
      range.setStart(...place(i));
      const [node, offset] = place(i + query.length - 1);
      range.setEnd(node, offset + 1);
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

function step(by) {
  const heads = [...list.querySelectorAll("summary")];
  const here = heads.indexOf(document.activeElement.closest?.(".group")?.querySelector("summary"));
  const next = heads[Math.min(Math.max(here + by, 0), heads.length - 1)];
  if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
}

// Shows groups that have an `index`, a `card` and what is `searched` of them, and listens.
//   what: their name; which, sort: functions of a group, by the values of both menus;
//   fill(card, group): puts in a card's inside; again: ids of the controls that change it.
function present(groups, { what, which, sort, fill, again }) {
  function update() {
    const query = clean($("query").value.trim());
    const number = /^#(\d+)$/.exec(query);
    const matches = (g) => (number ? g.index === Number(number[1]) : g.searched.includes(query));
    const shown = groups.filter((g) => which[$("which").value](g) && matches(g));
    const by = sort[$("sort").value];
    if (by) shown.sort((a, b) => by(a) - by(b));
    list.replaceChildren(...shown.map((g) => g.card));
    $("count").textContent = `${shown.length} of ${count(groups.length, what)}`;
    if (shown.length && !list.querySelector("[open]")) shown[0].card.open = true;
    mark();
  }

  function refill() {
    for (const group of groups) {
      if (group.card.open) fill(group.card, group);
      else group.card.querySelector(".inside").replaceChildren();
    }
    mark();
  }

  // A link to a candidate, or to a group, opens the group that holds it.
  function follow() {
    const found = /^#g(\d+)(c\d+)?$/.exec(location.hash);
    const group = found && groups.find((g) => g.index === Number(found[1]));
    if (!group) return;
    if (!group.card.open) { group.card.open = true; fill(group.card, group); }
    document.getElementById(location.hash.slice(1))?.scrollIntoView();
  }

  $("tools").addEventListener("submit", (event) => event.preventDefault());
  $("query").addEventListener("input", update);
  for (const id of ["which", "sort"]) $(id).addEventListener("change", update);
  for (const id of again) $(id).addEventListener("change", refill);
  for (const box of document.querySelectorAll("input[name=kind]")) box.addEventListener("change", () => hideKinds(list));
  window.addEventListener("hashchange", follow);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input[type=search], select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "/") { event.preventDefault(); $("query").focus(); }
    else if (event.key === "j") step(1);
    else if (event.key === "k") step(-1);
  });

  update();
  follow();
}
