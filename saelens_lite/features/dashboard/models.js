// Several models: columns of the list that compare two, classes to choose by, and a card about each on a latent's page.
const models = layout.models ?? [], [BASE, TUNED] = layout.compared ?? [];
const several = models.length > 1, classes = layout.classes ?? [];
const classOf = i => classes[index.get("class", i)];

// A column of one number; unknown numbers are a dash and come last.
const compared = (key, title, meaning) => ({key, title, tip: `${title}: ${meaning}`, width: "4.2rem", numeric: true, pair: true,
  there: () => several && index.has(key), value: i => index.get(key, i), cell: i => [fixed(index.get(key, i))]});
const RATIO = `how much of the latent's direction in ${TUNED} is in the activations of ${BASE}, relative to ${TUNED}`;
const ENDS = `near 0: only ${TUNED} has it; near 1: both do`;
const MIRROR = `how much of the latent's direction in ${BASE} is in the activations of ${TUNED}, relative to ${BASE}; near 0: only ${BASE} has it`;
const RATIOS = {
  nu_error: ["ν err", `${RATIO}, judged by what the dictionary fails to reconstruct; ${ENDS}`],
  nu_reconstruction: ["ν rec", `${RATIO}, judged by the reconstruction; ${ENDS}`],
  nu_activation: ["ν", `${RATIO}; ${ENDS}`],
  mirror_error: ["mirror ν err", MIRROR],
  mirror_reconstruction: ["mirror ν rec", MIRROR],
  mirror_activation: ["mirror ν", MIRROR],
};
const DELTA = `½ ((norm in ${BASE} − norm in ${TUNED}) / the larger + 1); 0: only ${TUNED} has the direction; 0.5: equal norms; 1: only ${BASE}`;
const ALIKE = `cosine of the latent's directions in ${BASE} and ${TUNED}; 1: the same direction`;
const CLASS = layout.by_diff ? "by the diff of the two models (latent scaling, ν)"
  : "by the norms of the two directions alone: Δ norm below 0.1, above 0.9, or 0.4 to 0.6 (shared); a diff (sl.diff) tells more";
const OF_MODELS = [
  {key: "class", tip: `class: ${CLASS}`, width: "6.4rem", pair: true, there: () => several && index.has("class"), value: i => index.get("class", i), cell: i => [classOf(i)]},
  compared("delta_norm", "Δ norm", DELTA),
  compared("model_cosine", "cos", ALIKE),
  ...["nu_error", "nu_reconstruction", "nu_activation"].map(key => compared(key, ...RATIOS[key])),
];

// Buttons that leave some latents in the list: all of them, or those of one of the numbered choices that has any.
function choiceButtons(id, label, choices, counts, choose) {
  const bar = make("div", {id, role: "group", "aria-label": label});
  for (const [name, number] of [["all", -1], ...choices]) {
    if (number >= 0 && !counts[number]) continue;
    const button = make("button", {class: "kind", "aria-pressed": number < 0}, name,
      make("span", {class: "soft"}, whole(number < 0 ? layout.n_latents : counts[number])));
    button.onclick = () => {
      for (const other of bar.children) other.setAttribute("aria-pressed", other === button);
      choose(number);
    };
    bar.append(button);
  }
  return bar;
}

// Buttons that leave the latents of one class in the list.
function kindButtons(choose) {
  if (!several || !index.has("class")) return undefined;
  const counts = new Uint32Array(classes.length);
  for (const number of index.all("class")) counts[number]++;
  const bar = choiceButtons("kinds", "Latents of a class", classes.map((name, number) => [name, number]), counts, choose);
  bar.append(make("span", {class: "soft"}, layout.by_diff ? "by latent scaling" : "by the norms of the directions alone"));
  return bar;
}

// The facts of a latent that compare the two models; the last entry of each explains it.
function comparison(i) {
  if (!several) return [];
  const pairs = index.has("class") ? [["class", classOf(i), CLASS]] : [];
  if (index.has("delta_norm")) pairs.push(["Δ norm", fixed(index.get("delta_norm", i)), DELTA]);
  if (index.has("model_cosine")) pairs.push(["cosine of the two directions", fixed(index.get("model_cosine", i)), ALIKE]);
  for (const key in RATIOS) {
    if (index.has(key)) pairs.push([RATIOS[key][0], fixed(index.get(key, i)), RATIOS[key][1]]);
  }
  return pairs;
}

// The parts of the models at a context: their sum and the bias are the latent's pre-activation.
const partsTold = parts => models.map((name, m) => `${name} ${number(parts[m])}`).join(" · ");
const partsCell = parts => make("span", {class: "parts", "data-tip": partsTold(parts)},
  ...Array.from(parts, (part, m) => make("span", {"data-name": models[m]}, number(part))));
const PARTS = several ? `activation · what ${models.join(" and ")} add to it` : "";

// A card about one model: its direction, what that promotes, and where the model drives the latent most.
function modelCard(m, found, max) {
  const of = name => found.row(name), name = models[m], size = column => of(column).length / models.length;
  const slice = (column, n = size(column)) => of(column).subarray(m * n, (m + 1) * n);
  const norm = of("norm")[m], pairs = [];
  if (norm) pairs.push(["norm of its direction", number(norm)]);
  if (max > 0) pairs.push(["adds on average where it fires", number(of("mean_part")[m])]);
  const section = card(name, facts(pairs));
  if (found.has("model_promoted")) {
    section.append(make("div", {class: "sides"},
      effects("Promoted tokens", slice("model_promoted"), slice("model_promoted_effect"), "up"),
      effects("Suppressed tokens", slice("model_suppressed"), slice("model_suppressed_effect"), "down")));
  }
  const best = max > 0 ? contexts(slice("best"), slice("best_nearby"), slice("best_part")) : [];
  if (best.length) section.append(make("h2", {class: "inner"}, `Contexts in which ${name} adds most`,
    make("span", {class: "unit", "data-tip": PARTS_TIP}, PARTS)), ...lines(best, max));
  section.classList.add("of-model");
  return section;
}
const PARTS_TIP = "a model adds the product of its activations with the encoder's weights for it";

function modelCards(found, max) {
  if (!several) return undefined;
  const section = grid("halves", ...models.map((_, m) => modelCard(m, found, max)));
  if (max > 0) section.append(make("p", {class: "soft wide"},
    `Before the sparsity rule, the latent's value is the sum of what each model adds, plus ${number(found.get("part_bias"))}.`));
  return section;
}
