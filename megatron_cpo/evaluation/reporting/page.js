// The texts of a report: a card for each prompt, the models' texts side by side in it.
const { models, groups, against } = data;
const OUTCOMES = { 1: ["win", "won"], 0.5: ["tie", "tied"], 0: ["loss", "lost"] };

function outcome(score, baseline) {
  const [style, word] = OUTCOMES[score] || ["mixed", `${score.toFixed(2)} of 1`];
  return el("div", {}, el("span", { class: style }, word), ` against ${baseline}`);
}

function candidateNode(group, text) {
  const model = models[text.model];
  const about = el("div", { class: "about" }, el("div", {}, el("b", {}, model.name)));
  const facts = [model.decoding, count(text.words, "word")];
  if (text.sample !== null) facts.unshift(`sample ${text.sample}`);
  if (text.repetition >= 0.005) facts.push(`${Math.round(100 * text.repetition)}% repeated 4-grams`);
  about.append(el("div", {}, facts.filter(Boolean).join(" · ")));
  if (text.finish === "length") about.append(el("div", { class: "warn" }, "cut at the length limit"));
  for (const [baseline, score] of text.scores) about.append(outcome(score, against[baseline]));
  const words = text.output ? text.output : el("span", { class: "empty" }, "empty");
  return el(
    "article",
    { class: `candidate${model.truth ? " truth" : ""}`, "data-kind": model.key, "aria-label": model.name },
    about, el("div", { class: "text", dir: "auto" }, words),
  );
}

function fill(card, group) {
  const prompt = el("div", { class: "text prefix", dir: "auto" }, group.prompt);
  const columns = el("div", { class: "columns" }, ...group.texts.map((text) => candidateNode(group, text)));
  const inside = card.querySelector(".inside");
  inside.replaceChildren(prompt, columns);
  hideKinds(inside);
}

const scores = (g) => g.texts.flatMap((t) => t.scores.map(([, score]) => score));
const mean = (g) => { const all = scores(g); return all.length ? all.reduce((a, b) => a + b) / all.length : null; };
for (const group of groups) {
  const found = mean(group);
  const facts = found === null ? [] : [`mean score ${found.toFixed(2)}`];
  group.card = cardOf(group, group.prompt, facts, fill);
  group.searched = clean([group.id, group.prompt, ...group.texts.map((t) => t.output)].join("\n"));
}

const WHICH = {
  all: () => true,
  differ: (g) => new Set(scores(g)).size > 1,
  won: (g) => scores(g).some((score) => score === 1),
  lost: (g) => scores(g).some((score) => score === 0),
  limit: (g) => g.texts.some((t) => t.finish === "length"),
  empty: (g) => g.texts.some((t) => !t.output),
};
const most = (g, key) => Math.max(...g.texts.map((t) => t[key]));
const SORT = {
  data: null,
  best: (g) => -(mean(g) ?? -1),
  worst: (g) => mean(g) ?? 2,
  repeated: (g) => -most(g, "repetition"),
  longest: (g) => -most(g, "words"),
};

present(groups, { what: "prompt", which: WHICH, sort: SORT, fill, again: [] });
