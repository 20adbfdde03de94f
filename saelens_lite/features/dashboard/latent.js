// The page of one latent.
function neighbour(i, step) {
  const at = view.order.indexOf(i), next = at < 0 ? i + step : view.order[at + step];
  return next >= 0 && next < layout.n_latents ? next : undefined;
}

function navigation(i) {
  const [before, after] = [neighbour(i, -1), neighbour(i, 1)];
  const bar = make("nav", {}, make("a", {href: "#"}, "All latents"), make("span", {class: "gap"}),
    make("span", {class: "keys soft"}, "← → to move, Esc for the list"));
  const link = (j, rel, text) => make("a", {href: `#f=${j}`, rel, "aria-label": `${rel === "prev" ? "previous" : "next"}: latent ${j}`}, text);
  if (before !== undefined) bar.append(link(before, "prev", `← ${before}`));
  if (after !== undefined) bar.append(link(after, "next", `${after} →`));
  return bar;
}

function firingFacts(count, n_tokens, max, mean) {
  if (!count) return [["fires on", isRows ? "no row" : "no token of this text"]];
  return [["fires on", `${percent(count / n_tokens)} of ${unit}s (${whole(count)})`], ["max", number(max)], ["mean where it fires", number(mean)]];
}
function summary(i) {
  const count = index.get("count", i);
  const pairs = firingFacts(count, layout.n_tokens, index.get("max", i), index.get("mean", i));
  if (index.has("stability")) pairs.push(["stability", fixed(stabilityOf(i))]);
  if (index.has("cosine")) pairs.push(["encoder–decoder cosine", fixed(cosineOf(i))]);
  pairs.push(...comparison(i));
  const title = make("h1", {tabindex: -1}, `Latent ${i}`);
  if (label(i)) title.append(make("span", {class: "label"}, label(i)));
  if (label(i) && origin(i)) title.append(make("span", {class: "origin"}, `label by ${origin(i)}`));
  if (label(i) && !isScored(i)) title.append(make("span", {class: "origin"}, "not scored"));
  return make("div", {class: "title"}, title, facts(pairs));
}

const PER_UNIT = "change of the logit for an activation of 1";
function effects(title, ids, values, kind) {
  const most = Math.max(...values.map(Math.abs)) || 1;
  const section = measured(title, "logits per unit", PER_UNIT, ...Array.from(ids, (id, j) => {
    const bar = make("i", {});
    bar.style.width = `${100 * Math.abs(values[j]) / most}%`;
    return make("div", {class: "effect"}, make("span", {}, dotted(id)), bar, make("span", {}, number(values[j])));
  }));
  section.classList.add(kind);
  return section;
}

// Return another latent's label, or else its top tokens or rows.
function about(j) {
  if (label(j)) return [label(j)];
  if (index.get("count", j) && isRows) return strongestNames(j, 4);
  return index.get("count", j) ? topTokens(j, 4).map(chip) : [make("span", {class: "soft"}, "never fires")];
}
function others(title, unit, meaning, ids, figures) {
  if (!ids.length) return undefined;
  return measured(title, unit, meaning, ...Array.from(ids, (j, place) => make("div", {class: "other"},
    make("a", {href: `#f=${j}`}, String(j)),
    make("span", {class: "named"}, ...about(j)),
    make("span", {class: "figure"}, figures(place)))));
}
function neighbours(found, side) {
  const name = `${side}_neighbours`;
  return found.has(name)
    && others(`Nearest by ${side}`, "cosine", `cosine of the ${side} directions`, found.row(name), j => fixed(found.row(`${side}_cosine`)[j]));
}
// Latents that fire on the same tokens or rows, with the number of these and the pointwise mutual information.
function partners(i, found, kind, title) {
  const name = `${kind}_count`;
  if (!found.has(name)) return undefined;
  const counts = found.row(name).filter(count => count > 0), ids = found.row(kind).subarray(0, counts.length);
  const together = j => counts[j] * layout.n_tokens / layout.partner_tokens;
  const pmi = j => Math.log(together(j) * layout.n_tokens / (index.get("count", i) * index.get("count", ids[j])));
  return others(title, `${unit}s · PMI`, `${unit}s on which both fire · pointwise mutual information in nats`, ids, j => `${whole(counts[j])} · ${fixed(pmi(j))}`);
}

function groups(i, found, max) {
  const parts = several ? found.row("group_part") : undefined;
  const places = found.row("group"), nearby = found.row("group_nearby"), counts = found.row("group_count");
  const size = places.length / counts.length, width = nearby.length / counts.length;
  const section = card(isRows ? "Rows by activation" : "Contexts by activation", make("div", {class: "groups"}, ...Array.from(counts, (count, j) => {
    const shown = contexts(places.subarray(j * size, (j + 1) * size), nearby.subarray(j * width, (j + 1) * width), parts?.subarray(j * size * models.length, (j + 1) * size * models.length));
    const [low, high] = ["group_low", "group_high"].map(name => number(found.row(name)[j]));
    const title = make("h3", {}, `${low} to ${high}`, make("span", {class: "soft"}, `${percent(count / index.get("count", i))} of its activations`));
    return shown.length ? make("section", {}, title, ...lines(shown, max)) : "";
  })));
  section.classList.add("wide");
  return section;
}

// The strongest contexts, and a button that wraps all contexts on the page instead of cutting them at the card's edge.
function strongest(i, found, max) {
  const section = card("Strongest contexts", ...lines(contexts(index.row("top", i), found.row("top_nearby"), several ? found.row("top_part") : undefined), max));
  const page = $("latent").classList, button = make("button", {class: "unit", "aria-pressed": page.contains("whole")}, "whole contexts");
  button.onclick = () => button.setAttribute("aria-pressed", page.toggle("whole"));
  section.firstChild.append(button);
  return section;
}

function control(found) {
  const count = found.get("control_count");
  const pairs = firingFacts(count, layout.control_tokens, found.get("control_max"), found.get("control_mean"));
  const section = card("Control: the model with shuffled weights", facts(pairs));
  if (count) {
    section.append(make("p", {class: "soft"}, "The latent's strongest contexts in a model that has learned nothing. If they are as consistent as those above, the text explains the pattern, not the model's training."),
      ...lines(contexts(found.row("control"), found.row("control_nearby")), found.get("control_max")));
  }
  return section;
}

const grid = (kind, ...cards) => make("div", {class: `grid ${kind}`}, ...cards.filter(Boolean));

function latentPage(i, found) {
  const count = index.get("count", i), max = index.get("max", i), parts = [navigation(i), summary(i)];
  const acts = found.has("suppressed"), together = acts && !found.has("model_promoted");
  const spread = Object.entries(distributions).filter(([name]) => name === "density" || index.has(name)).map(([name, {title}]) => card(title, amongAll(name, i)));
  if (isScored(i)) parts.push(scoreCards(i));
  parts.push(grid("thirds",
    count && card("Activations where it fires", valueChart(found.row("histogram"), found.get("bin_width"))),
    ...(several || (isRows && !(count && found.has("rate_group"))) ? spread.splice(0) : isRows ? [groupTable(found)] : []),
    together && effects("Promoted tokens", index.row("promoted", i), found.row("promoted_effect"), "up"),
    together && effects("Suppressed tokens", found.row("suppressed"), found.row("suppressed_effect"), "down")));
  if (several) parts.push(modelCards(found, count ? max : 0));
  if (count) {
    parts.push(grid("halves",
      isRows ? strongestRows(i, found, max) : strongest(i, found, max),
      card(isRows ? "Random rows on which it fires" : "Random contexts in which it fires", ...lines(contexts(found.row("random"), found.row("random_nearby"), several ? found.row("random_part") : undefined).sort((a, b) => b.value - a.value), max)),
      groups(i, found, max)));
  }
  parts.push(grid("quarters", neighbours(found, "decoder"), neighbours(found, "encoder"),
    partners(i, found, "frequent", "Most often together"), partners(i, found, "specific", "Together beyond chance")));
  parts.push(grid("fifths",
    acts && measured(several ? `Effects on all logits of ${layout.last}` : "Effects on all logits", "per unit", PER_UNIT, logitChart(found), make("p", {class: "soft"},
      `counts on a log scale; skew ${fixed(found.get("logit_skew"))}, excess kurtosis ${fixed(found.get("logit_kurtosis"))}`)),
    count && !isRows && card("Firing rate by position", profileChart(found.row("band_rate"), found.row("band_mean")), make("p", {class: "soft"}, "positions on a log scale")),
    ...spread));
  if (found.has("control_count")) parts.push(control(found));
  $("latent").replaceChildren(...parts);
}

function noLatent(i) {
  $("latent").replaceChildren(make("h1", {tabindex: -1}, `There is no latent ${i}`),
    make("p", {}, `Latents are numbered 0 to ${layout.n_latents - 1}. `, make("a", {href: "#"}, "All latents")));
}
