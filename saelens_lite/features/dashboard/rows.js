// Rows of activations without a text: names, thumbnails and groups in place of contexts.
const N_PICTURES = 8;  // in a line of the list
const hasPictures = Object.keys(layout.images).length > 0;
const nameOf = id => named(vocabulary[id]) || "(no name)";
const pathEnd = id => /\.(png|jpe?g|gif|webp)$/i.test(vocabulary[id]) ? nameOf(id).split(/[\\/]/).pop() : nameOf(id);
const groupAt = at => groupOf === undefined ? undefined : groupOf[at];

// The thumbnail of a row, or its name if there is none.
function picture(id, ...told) {
  const tip = [nameOf(id), ...told].join("   "), uri = layout.images[id];
  return uri ? make("img", {src: uri, alt: nameOf(id), "data-tip": tip})
    : make("span", {class: "unpictured", "data-tip": tip}, pathEnd(id));
}
function rowLine({ids: [id], value, at}, max) {
  const group = groupAt(at), told = group === undefined ? [] : [nameOf(group)];
  const amount = make("span", {class: "amount"}, number(value));
  if (hasPictures) return make("figure", {}, picture(id, number(value), ...told),
    make("figcaption", {}, amount, make("span", {class: "caption"}, ...(told.length ? told : [pathEnd(id)]))));
  const bar = make("i", {});
  bar.style.width = `${100 * Math.min(1, value / max)}%`;
  return make("div", {class: "entry"}, amount, make("span", {class: "name", "data-tip": nameOf(id)}, nameOf(id)),
    make("span", {class: "group soft"}, ...told), bar);
}
const rowLines = (found, max) => [make("div", {class: hasPictures ? "pictures" : "entries"}, ...found.map(one => rowLine(one, max)))];

// The strongest rows, and a button that shows only the best of each group.
function strongestRows(i, found, max) {
  const all = contexts(index.row("top", i), found.row("top_nearby")), body = make("div", {}, ...rowLines(all, max));
  const section = card("Strongest rows", body);
  if (!found.has("distinct")) return section;
  const each = contexts(found.row("distinct"), found.row("distinct_nearby"));
  const button = make("button", {class: "unit each", "aria-pressed": false}, "one of each group");
  button.onclick = () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", on);
    body.replaceChildren(...rowLines(on ? each : all, max));
  };
  section.firstChild.append(button);
  return section;
}

// The groups in which a latent fires, those that it prefers most first.
function groupTable(found) {
  const [ids, counts, sizes, means] = ["rate_group", "rate_count", "rate_rows", "rate_mean"].map(found.row);
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...["group", "fires on", "", "rows", "mean"].map(title => make("th", {scope: "col"}, title)))));
  const body = make("tbody", {});
  ids.forEach((id, j) => {
    if (!counts[j]) return;
    const bar = make("i", {}), share = counts[j] / sizes[j];
    bar.style.width = `${100 * share}%`;
    body.append(make("tr", {}, make("th", {scope: "row", "data-tip": nameOf(id)}, nameOf(id)), make("td", {}, percent(share)), make("td", {class: "bar"}, bar),
      make("td", {}, `${whole(counts[j])} of ${whole(sizes[j])}`), make("td", {}, number(means[j]))));
  });
  table.append(body);
  const section = measured("Groups", "most preferred first", "by the evidence that the latent fires more often in the group than elsewhere", table);
  section.classList.add("of-groups");
  return section;
}

// The strongest rows in a line; rows that match the search come first.
function strongestNames(i, most = N_PICTURES) {
  const places = Array.from(index.row("top", i).subarray(0, index.get("n_top", i))), found = at => view.hits?.tokens[at] ? 1 : 0;
  const shown = places.sort((a, b) => found(b) - found(a)).slice(0, most);
  return shown.map(at => {
    const element = hasPictures ? picture(tokens[at]) : make("span", {class: "chip"}, nameOf(tokens[at]));
    element.classList.toggle("found", found(at) === 1);
    return element;
  });
}
function mainGroup(i) {
  if (!index.get("count", i)) return [];
  return [make("span", {class: "name"}, nameOf(index.get("group", i))),
    make("span", {class: "soft", "data-tip": "share of the group's rows on which the latent fires"}, percent(index.get("group_rate", i)))];
}
