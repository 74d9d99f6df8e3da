// The groups of a store.
const { separator, groups } = data;
const FOLD = 60; // cells of a shared run, or of a prefix times 3, that are shown before it folds

const plain = (cells) => cells.filter((c) => typeof c === "string").join(separator);

// Cells as nodes: one text each, or one span a token where borders are shown.
function cellNodes(cells) {
  const nodes = [];
  cells.forEach((cell, i) => {
    if (typeof cell === "number") {
      nodes.push(el("span", { class: "left" }, ` … ${count(cell, "token")} not in this page … `));
    } else if ($("borders").checked) {
      nodes.push(el("span", { class: "token" }, cell), separator);
    } else {
      nodes.push(i ? separator + cell : cell);
    }
  });
  return nodes;
}

// A long run whose middle waits behind a button.
function folded(cells, head, tail) {
  if (cells.length <= head + tail + 10) return cellNodes(cells);
  const middle = cells.slice(head, -tail);
  const hidden = middle.reduce((n, cell) => n + (typeof cell === "number" ? cell : 1), 0);
  const button = el("button", { type: "button" }, `… ${count(hidden, "token")} …`);
  button.addEventListener("click", () => {
    const nodes = cellNodes(middle);
    button.replaceWith(...nodes);
    mark();
  });
  return [...cellNodes(cells.slice(0, head)), button, ...cellNodes(cells.slice(-tail))];
}

function spanNode(group, span) {
  const was = span.was ? plain(span.was) : "";
  const deletion = () => el("del", {}, ...cellNodes(span.was));
  switch (span.mark) {
    case "cut": {
      const first = `g${group.index}c${span.by[0]}`;
      const title = `cut here: candidate ${span.by.join(", ")}`;
      return el("a", { class: "cut", href: `#${first}`, title }, `✂${span.by.join(",")}`);
    }
    case "eod":
      return el("b", { class: "eod", title: "end of document" }, "∎");
    case "gap":
      return $("was").checked ? deletion() : el("del", { title: `y_1 has: ${was}` }, "‸");
    case "changed": {
      const changed = el("ins", { title: `y_1 has: ${was}` }, ...cellNodes(span.cells));
      if (span.shared) changed.classList.add("shared");
      return $("was").checked ? el("span", {}, deletion(), changed) : changed;
    }
    default: {
      if (!span.cells) return "";
      if (!span.shared) return el("span", {}, ...cellNodes(span.cells));
      return el("span", { class: "shared" }, ...folded(span.cells, 12, 20));
    }
  }
}

function candidateNode(group, candidate) {
  const about = el("div", { class: "about" });
  const line = (...parts) => about.append(el("div", {}, ...parts));
  line(
    el("span", { class: `badge ${candidate.style}` }, candidate.kind), " ",
    el("b", {}, `#${candidate.index}`), ` rank ${candidate.rank}`,
  );
  line(`similarity ${candidate.similarity === null ? "–" : candidate.similarity.toFixed(3)}`);
  const meter = el("i");
  meter.style.width = `${100 * Math.max(0, candidate.similarity || 0)}%`;
  about.append(el("div", { class: "meter", "aria-hidden": "true" }, meter));
  if (candidate.logp !== null) {
    const perToken = candidate.perToken === null ? "" : ` (${candidate.perToken.toFixed(2)} a token)`;
    line(`log-prob ${candidate.logp.toFixed(1)}${perToken}`);
  }
  const shared = candidate.branch ? `, ${candidate.branch.toLocaleString("en")} shared` : "";
  line(`${count(candidate.tokens, "token")}${shared}`);
  if (candidate.cut !== null) line(`y_1 cut after ${candidate.cut.toLocaleString("en")}`);
  if (candidate.repeats !== null) line(el("span", { class: "warn" }, `repeats #${candidate.repeats}`));
  const text = el("div", { class: "text", dir: "auto" });
  candidate.spans.forEach((span, i) => {
    if (i && separator) text.append(separator);
    text.append(spanNode(group, span));
  });
  if (!candidate.tokens) text.append(el("span", { class: "empty" }, "empty"));
  return el(
    "article",
    { class: `candidate ${candidate.style}`, id: `g${group.index}c${candidate.index}`,
      "data-kind": candidate.kind, "aria-label": `candidate ${candidate.index}, ${candidate.kind}` },
    about, text,
  );
}

// The tree: depth to the right, a row for each candidate in the order of the layout. A run of a
// candidate's own tokens is a line that leaves the line it branches from, ticks on it are changed
// tokens, and a disc is the end of document.
function treeMap(group, width) {
  const rowHeight = 18, left = 52, prefixEnd = left + Math.min(120, width / 6);
  const slots = [...group.candidates].sort((a, b) => a.slot - b.slot);
  const longest = Math.max(1, ...slots.map((c) => c.tokens));
  const x = (depth) => prefixEnd + ((width - prefixEnd - 12) * depth) / longest;
  const y = (slot) => 22 + slot * rowHeight;
  const map = svg("svg", {
    class: "map", width, height: y(slots.length) - 4, role: "img",
    "aria-label": `token tree: ${group.tree} tokens, ${slots.length} candidates`,
  });
  map.append(
    svg("text", { x: left, y: 11 }, `prefix, ${count(group.prefixTokens, "token")}`),
    svg("text", { x: width - 12, y: 11, "text-anchor": "end" }, `depth ${longest.toLocaleString("en")}`),
    svg("path", { class: "run", d: `M${left} ${y(0)}H${prefixEnd}` }),
  );
  for (const candidate of slots) {
    const { slot, style } = candidate;
    const last = candidate.spans[candidate.spans.length - 1];
    const ended = last !== undefined && last.mark === "eod";
    const end = candidate.tokens - (ended ? 1 : 0); // the end of document has no row in the tree
    const branch = Math.min(candidate.branch, end);
    // The candidate whose own run holds the token that this one branches from.
    let parent = slot - 1;
    while (parent > 0 && slots[parent].branch >= branch) parent -= 1;
    const row = svg("g", { class: style });
    if (slot) row.append(svg("path", { class: "joint", d: `M${x(branch)} ${y(Math.max(parent, 0))}V${y(slot)}` }));
    if (end > branch) row.append(svg("path", { class: "run", d: `M${x(branch)} ${y(slot)}H${x(end)}` }));
    let at = 0;
    for (const span of candidate.spans) {
      const n = span.n || 0;
      if (span.mark === "changed" && !span.shared) {
        for (let i = at; i < at + n; i += 1) {
          row.append(svg("path", { class: "edit", d: `M${x(i + 0.5)} ${y(slot) - 5}v10` }));
        }
      }
      at += n;
    }
    if (ended) row.append(svg("circle", { class: "end", cx: x(end), cy: y(slot), r: 5 }));
    const link = svg("a", { href: `#g${group.index}c${candidate.index}`, tabindex: "-1" });
    link.append(svg("text", { x: left - 8, y: y(slot) + 4, "text-anchor": "end" }, `${candidate.kind} ${candidate.index}`));
    row.append(link);
    map.append(row);
  }
  return map;
}

function fill(card, group) {
  const inside = card.querySelector(".inside");
  const prefix = el("div", { class: "text prefix", dir: "auto" }, ...folded(group.prefix, FOLD, 2 * FOLD));
  const key = $("order").value;
  const value = (c) => (key === "logp" ? -(c.logp ?? -Infinity) : c[key]);
  const candidates = [...group.candidates].sort((a, b) => value(a) - value(b));
  inside.replaceChildren(
    treeMap(group, Math.max(300, Math.min(inside.clientWidth - 32, 1180))), prefix,
    ...candidates.map((candidate) => candidateNode(group, candidate)),
  );
  hideKinds(inside);
  inside.classList.toggle("borders", $("borders").checked);
}

function card(group) {
  const place = group.place === null ? [] : [`y_1 is no. ${group.place + 1} by log-prob · `];
  const repeated = group.candidates.filter((c) => c.repeats !== null).length;
  const warning = repeated ? [el("span", { class: "warn" }, `${repeated} repeated`), " · "] : [];
  const costs = `${group.tree.toLocaleString("en")} tokens, ${(group.padded / group.tree).toFixed(1)} × less than padded`;
  return cardOf(group, plain(group.prefix), [...place, ...warning, costs], fill);
}

for (const group of groups) {
  group.card = card(group);
  const texts = [group.prefix, ...group.candidates.map((c) => c.spans.flatMap((s) => s.cells || []))];
  group.searched = clean(texts.map(plain).join("\n"));
  group.similar = Math.max(-1, ...group.candidates.slice(1).map((c) => c.similarity ?? -1));
}

const WHICH = {
  all: () => true,
  place: (g) => g.place > 0,
  token: (g) => g.placePerToken > 0,
  repeats: (g) => g.candidates.some((c) => c.repeats !== null),
};
const SORT = {
  store: null, // as they came: asked for first, then in the store's order
  place: (g) => -(g.place ?? -1),
  similar: (g) => -g.similar,
  tree: (g) => -g.tree,
  gain: (g) => -g.padded / g.tree,
};

present(groups, { what: "group", which: WHICH, sort: SORT, fill, again: ["order", "was", "borders"] });
