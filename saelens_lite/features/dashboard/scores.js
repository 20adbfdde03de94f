// Scores of labels, beside their controls. Latents without a score have no entry in `scores`.
const SERIES = {
  score: ["this label", "a judge reads the label and says in which contexts the latent fires"],
  hard: ["this label, hard", "contexts in which the nearest latent fires take the place of the silent ones"],
  by_tokens: ["token baseline", "control: in place of the label, the tokens at the peaks of the contexts from which labels are made"],
  of_random_latent: ["another's label", "control: the judge reads the label of another latent, drawn at random"],
  shuffled: ["words reordered", "the judge reads the words of the label in another order; a good label in keywords scores as high, so this is no bar to pass"],
};
const KINDS_OF_SCORE = {detection: "contexts in which the latent fires, among others", fuzzing: "contexts with the right tokens marked, among those with wrong ones"};
const MEANING = "AUROC: 0.5 is chance, 1 is perfect";
const FLOORS = {by_tokens: "the token baseline", of_random_latent: "another latent's label"};
const floors = one => Object.keys(FLOORS).filter(name => one[name]).map(name => FLOORS[name]).join(" or ");  // those that were measured
const notAbove = one => `not better than ${floors(one)}: the 95 % interval of the difference reaches zero`;
const scoreOf = (i, kind) => scores[i]?.[kind];
const isScored = i => scores[i] !== undefined;
const kindsOfScore = () => Object.keys(KINDS_OF_SCORE).filter(kind => Object.values(scores).some(one => one[kind]));
const auroc = result => result[0];
const interval = (result, at) => result[at + 1] === null ? "" : `[${fixed(result[at + 1])}, ${fixed(result[at + 2])}]`;

// The columns of the list. A label without a score says so; an asterisk marks a score that is not better than a control.
const SCORE_COLUMNS = Object.entries(KINDS_OF_SCORE).map(([kind, meaning]) => ({
  key: kind, tip: `${kind} of ${meaning}; ${MEANING}; * not better than one of the controls measured`, width: "5.9rem", numeric: true,
  there: () => kindsOfScore().includes(kind), value: i => scoreOf(i, kind)?.score[0] ?? NaN, cell: i => scoreCell(i, kind),
}));
function scoreCell(i, kind) {
  const one = scoreOf(i, kind);
  if (!one) return label(i) ? [make("span", {class: "soft"}, "not scored")] : [];
  const told = `${fixed(auroc(one.score))} ${interval(one.score, 0)}${one.above === false ? `; ${notAbove(one)}` : ""}`;
  return [make("span", {class: one.above === false ? "doubt" : "", "data-tip": told}, `${fixed(auroc(one.score))}${one.above === false ? "*" : ""}`)];
}

// Buttons that leave the latents in the list whose label is better than its controls, not better, or not scored.
const VERDICTS = [["better than the controls measured", above => above.includes(true) && !above.includes(false)], ["not better than controls", above => above.includes(false)],
  ["without controls", () => true]];
function verdict(i) {
  if (!isScored(i)) return label(i) ? VERDICTS.length : -1;
  const above = Object.values(scores[i]).map(one => one.above);
  return VERDICTS.findIndex(([, holds]) => holds(above));
}
function verdictButtons(choose) {
  if (!kindsOfScore().length) return undefined;
  const counts = new Uint32Array(VERDICTS.length + 1);
  for (let i = 0; i < layout.n_latents; i++) if (verdict(i) >= 0) counts[verdict(i)]++;
  const choices = [...VERDICTS.map(([name], number) => [name, number]), ["label not scored", VERDICTS.length]];
  return choiceButtons("verdicts", "Latents by the score of their label", choices, counts, choose);
}

// The start of the page: the distribution of the scores of all labels, above those of the controls.
const N_BINS = 25;
function scoreOverview() {
  const kinds = kindsOfScore();
  if (!kinds.length) return undefined;
  const section = card(`Scores of labels: AUROC of ${whole(Object.keys(scores).length)} of ${whole(Object.keys(labels).length)} labels, beside controls`);
  section.id = "scores";
  section.append(grid(kinds.length > 1 ? "halves" : "", ...kinds.map(kind => {
    const of = name => Object.values(scores).map(one => one[kind]?.[name]).filter(Boolean).map(auroc);
    const series = Object.entries(SERIES).filter(([name]) => spreads[kind][name]).map(([name, told]) => [told, of(name), spreads[kind][name]]);
    return make("div", {class: "series"}, make("h3", {}, kind, make("span", {class: "soft"}, `judge: ${judgesOf(kind).map(named).join(", ")}`)),
      ...series.map(([told, values, quartiles]) => seriesRow(told, values, quartiles)));
  })));
  return section;
}
const judgesOf = kind => [...new Set(Object.values(scores).filter(one => one[kind]).map(one => judges[one[kind].judge]))];
function seriesRow([name, meaning], values, [lower, middle, upper]) {
  const counts = new Uint32Array(N_BINS);
  for (const value of values) counts[Math.min(N_BINS - 1, Math.floor(value * N_BINS))]++;
  const bars = Array.from(counts, (count, j) => ({height: count, tip: `${name}, ${fixed(j / N_BINS)} to ${fixed((j + 1) / N_BINS)}:  ${whole(count)} labels`}));
  const plot = chart(`AUROC, ${name}`, bars, ["0", "0.5", "1"]);
  return make("div", {class: name.startsWith("this") ? "spread" : "spread control"}, make("span", {class: "named", "data-tip": meaning}, name.replace("this label", "labels")), plot,
    make("span", {class: "figure", "data-tip": `median of ${whole(values.length)}; the middle half is from ${fixed(lower)} to ${fixed(upper)}`}, fixed(middle)));
}

// The card of a latent's label.
function scoreCards(i) {
  const of = Object.entries(scores[i]);
  return grid(of.length > 1 ? "halves" : "", ...of.map(([kind, one]) => {
    const rows = Object.entries(SERIES).filter(([name]) => one[name]).map(([name, told]) => resultRow(told, one[name], name));
    const section = measured(`Label's score: ${kind}`, "AUROC · balanced accuracy", `${MEANING} · the mean of the accuracies on firing and silent contexts`, ...rows);
    if (one.above === false) section.append(make("p", {class: "doubt"}, `Nothing shows that this label says more about the latent than ${floors(one)}.`));
    const unusable = one.score[6] ? `; ${whole(one.score[6])} contexts without a usable answer, counted as wrong` : "";
    if (one.elsewhere) section.append(make("p", {class: "soft"}, "The label may have been made from these very contexts."));
    section.append(make("p", {class: "soft"}, `${one.above === null ? "Not compared with a control. " : ""}Judge ${named(judges[one.judge])}; ${KINDS_OF_SCORE[kind]}: ${whole(one.n[0])} with firing, ${whole(one.n[1])} without${unusable}. Intervals are 95 %.`));
    return section;
  }));
}
function resultRow([name, meaning], result, key) {
  const track = make("span", {class: "track", "data-tip": `${name}: AUROC ${fixed(result[0])} ${interval(result, 0)}`}), [value, low, high] = result;
  const part = (kind, from, to) => {
    const element = make("i", {class: kind});
    [element.style.left, element.style.width] = [`${100 * from}%`, `${100 * Math.max(0, to - from)}%`];
    return element;
  };
  if (low !== null) track.append(part("range", low, high));
  track.append(part("point", value, value));
  return make("div", {class: key === "score" || key === "hard" ? "result" : "result control"}, make("span", {class: "named", "data-tip": meaning}, name), track,
    make("span", {class: "figure"}, `${fixed(value)} ${interval(result, 0)}`), make("span", {class: "figure"}, `${fixed(result[3])} ${interval(result, 3)}`));
}
