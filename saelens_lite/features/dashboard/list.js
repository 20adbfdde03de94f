// The list: latents in an order. Only the visible rows are in the document.
const MARGIN = 12;  // rows kept above and below the window
const view = {key: "latent", down: false, query: "", kind: -1, verdict: -1, order: [], hits: null, scroll: 0, last: -1};  // last: the latent viewed last
const rows = $("rows"), drawn = new Map();

const cosineOf = i => index.get("cosine", i), stabilityOf = i => index.get("stability", i);
const firing = (i, value) => index.get("count", i) ? value : NaN;  // silent latents cannot be compared
const COLUMNS = [
  {key: "latent", width: "4.5rem", value: i => i, cell: i => [make("a", {href: `#f=${i}`}, String(i))]},
  {key: "label", width: "minmax(6rem, 1.1fr)", there: () => Object.keys(labels).length, cell: i => [label(i)]},
  ...SCORE_COLUMNS,
  {key: "density", tip: `density: share of ${unit}s on which the latent fires`, width: "6.2rem", numeric: true, value: i => firing(i, density(i)), cell: i => [index.get("count", i) ? percent(density(i)) : "never fires"]},
  {key: "max", tip: "max: largest activation", width: "4.2rem", numeric: true, value: i => firing(i, index.get("max", i)), cell: i => [index.get("count", i) ? number(index.get("max", i)) : ""]},
  {key: "stability", tip: "stability: largest decoder cosine in another dictionary, mean over the others", width: "5.6rem", numeric: true, there: () => index.has("stability"), value: stabilityOf, cell: i => [fixed(stabilityOf(i))]},
  {key: "cosine", title: "enc·dec", tip: "enc·dec: cosine between encoder and decoder direction", width: "5.2rem", numeric: true, there: () => index.has("cosine"), value: cosineOf, cell: i => [fixed(cosineOf(i))]},
  ...OF_MODELS,
  {title: "promotes", tip: several ? `promotes: tokens that the latent's direction in ${layout.last} makes likelier` : undefined, width: "minmax(0, 1.3fr)", there: () => index.has("promoted"), cell: promotes},
  {key: "group", tip: "group: the one that the latent prefers most, and the share of its rows on which it fires", width: "minmax(7rem, .7fr)", there: () => index.has("group"), value: i => firing(i, index.get("group_rate", i)), cell: mainGroup},
  isRows ? {title: "strongest rows", name: "strongest", width: "minmax(0, 2fr)", cell: strongestNames}
    : {title: "strongest context", name: "tokens", width: "minmax(0, 2fr)", cell: snippet},
];
let columns;

function head() {
  columns = COLUMNS.filter(column => column.there?.() ?? true);
  $("list").style.setProperty("--columns", columns.map(column => column.width).join(" "));
  const pair = columns.find(column => column.pair);
  $("head").append(...columns.map(column => {
    const {key, title = key, numeric, tip} = column, told = tip ? {"data-tip": tip, "aria-label": tip} : {};
    const cell = make("div", {role: "columnheader", class: numeric ? "number" : ""}, make(key ? "button" : "span", told, title));
    if (column === pair && BASE && TUNED) cell.dataset.group = `${BASE} and ${TUNED}`;
    if (key) cell.firstChild.onclick = () => sortBy(key);
    column.head = cell;
    return cell;
  }));
}

function row(i) {
  const line = make("div", {role: "row"}, ...columns.map(({key, title, name, numeric, cell}) =>
    make("div", {role: "cell", class: `${numeric ? "number " : ""}${name ?? key ?? title}`, "data-name": title ?? key}, ...cell(i))));
  if (!index.get("count", i)) line.className = "silent";
  line.onclick = event => { if (!event.target.closest("a") && getSelection().isCollapsed) location.hash = `f=${i}`; };
  return line;
}

// The most promoted tokens. Those that match the search come first, to show why a latent is listed.
function promotes(i) {
  const found = id => view.hits?.words[id] ? 1 : 0, ids = Array.from(index.row("promoted", i));
  const shown = ids.sort((a, b) => found(b) - found(a)).slice(0, 4).map(id => [id, chip(id)]);
  for (const [id, element] of shown) element.classList.toggle("found", found(id) === 1);
  return shown.map(([, element]) => element);
}

// The strongest context, or the first whose peak matches the search; only the strongest has known activations here.
function snippet(i) {
  const places = index.row("top", i).subarray(0, index.get("n_top", i));
  if (!places.length) return [];
  const found = view.hits ? places.findIndex(at => view.hits.tokens[at]) : 0, j = Math.max(0, found);
  const nearby = index.row("first_nearby", i), one = context(places[j], j ? new Float32Array(nearby.length) : nearby);
  let from = one.peak;  // few enough tokens before the peak to keep it visible
  for (let length = 0; from > 0 && one.peak - from < 5; from--) if ((length += vocabulary[one.ids[from - 1]].length) > 24) break;
  return strip(one, from, Math.min(one.ids.length, one.peak + 8), index.get("max", i));
}

// The search covers the displayed text, ignores case, and treats a dot as a space.
const folded = text => spelled(text).toLowerCase().replaceAll("·", " ");

// Return the words that contain the query, and the shown tokens that it covers, with the parts of its first character.
let lower, shownText, ends;
function prepareSearch() {
  lower = vocabulary.map(folded);
  const begins = new Set(spans.all("at")), parts = new Array(tokens.length);
  ends = new Uint32Array(tokens.length);
  let length = 0;
  for (let j = 0; j < tokens.length; j++) {
    parts[j] = begins.has(j) ? "\u0000" + lower[tokens[j]] : lower[tokens[j]];
    ends[j] = length += parts[j].length;
  }
  shownText = parts.join("");
}
function search(query) {
  if (!lower) prepareSearch();
  const hits = {words: Uint8Array.from(lower, word => word.includes(query)), tokens: new Uint8Array(tokens.length)};
  let j = 0;
  for (let at = shownText.indexOf(query); at >= 0; at = shownText.indexOf(query, at + 1)) {
    while (ends[j] <= at) j++;
    for (let k = j; k > 0 && ends[k] - ends[k - 1] === lower[tokens[k]].length && !lower[tokens[k - 1]]; k--) hits.tokens[k - 1] = 1;
    for (let k = j; k < tokens.length; k++) {
      hits.tokens[k] = 1;
      if (ends[k] >= at + query.length) break;
    }
  }
  return hits;
}
function isHit(i) {
  const {words, tokens: found} = view.hits, places = index.row("top", i), n = index.get("n_top", i);
  for (let j = 0; j < n; j++) if (found[places[j]]) return true;
  if (index.has("group") && n && words[index.get("group", i)]) return true;
  if (index.has("promoted")) for (const id of index.row("promoted", i)) if (words[id]) return true;
  return labels[i] !== undefined && folded(labels[i]).includes(view.query);
}

function arrange() {
  const asked = /^\s*#?(\d+)\s*$/.exec(view.query)?.[1], exact = asked === undefined ? -1 : Number(asked);
  view.hits = view.query ? search(view.query) : null;
  const chosen = [];
  const isKind = i => (view.kind < 0 || index.get("class", i) === view.kind) && (view.verdict < 0 || verdict(i) === view.verdict);
  for (let i = 0; i < layout.n_latents; i++) if (isKind(i) && (!view.hits || i === exact || isHit(i))) chosen.push(i);
  const {value} = COLUMNS.find(column => column.key === view.key), sign = view.down ? -1 : 1;
  if (value) {
    const keys = Float64Array.from(chosen, value).map(key => Number.isNaN(key) ? Infinity : sign * key);
    const places = Array.from(chosen.keys()).sort((a, b) => keys[a] === keys[b] ? a - b : keys[a] - keys[b]);
    view.order = places.map(place => chosen[place]);
  } else {  // by label; latents without one come last
    const compare = new Intl.Collator().compare;
    view.order = chosen.sort((a, b) => (labels[a] === undefined) - (labels[b] === undefined) || sign * compare(labels[a] ?? "", labels[b] ?? "") || a - b);
  }
  const first = view.order.indexOf(exact);
  if (first > 0) view.order.unshift(...view.order.splice(first, 1));
  for (const {key, head} of columns) {
    if (key === view.key) head.setAttribute("aria-sort", view.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
  $("found").textContent = view.query || view.kind >= 0 || view.verdict >= 0 ? `${whole(view.order.length)} of ${whole(layout.n_latents)}` : "";
  $("list").setAttribute("aria-rowcount", view.order.length + 1);
  rows.classList.toggle("none", !view.order.length);
  drawn.clear();
  draw();
}

function draw() {
  if ($("index").hidden) return;
  const height = parseFloat(getComputedStyle(rows).gridAutoRows), above = -rows.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor(above / height) - MARGIN);
  const last = Math.min(view.order.length, Math.ceil((above + innerHeight) / height) + MARGIN);
  const shown = view.order.slice(Math.min(first, last), last);
  for (const i of drawn.keys()) if (!shown.includes(i)) drawn.delete(i);
  shown.forEach((i, j) => {
    if (!drawn.has(i)) drawn.set(i, row(i));
    drawn.get(i).setAttribute("aria-rowindex", first + j + 2);
  });
  rows.style.height = `${height * view.order.length}px`;
  rows.style.paddingTop = `${height * Math.min(first, last)}px`;
  place(shown.map(i => drawn.get(i)));
}
// Put these rows into the document. Existing rows stay in place, because one of them may have the focus.
function place(lines) {
  const wanted = new Set(lines);
  for (const line of [...rows.children]) if (!wanted.has(line)) line.remove();
  lines.forEach((line, j) => { if (rows.children[j] !== line) rows.insertBefore(line, rows.children[j] ?? null); });
}

function sortBy(key) {
  view.down = key === view.key ? !view.down : key !== "latent" && key !== "label";
  view.key = key;
  toTop();
  arrange();
}
function only(choice) {
  Object.assign(view, choice);
  toTop();
  arrange();
}
function lookFor(text) {
  const query = folded(text);
  if (query === view.query) return;
  view.query = query;
  toTop();
  arrange();
}
// Scroll to the beginning of a new order.
function toTop() {
  const top = $("bar").getBoundingClientRect().top + scrollY;
  if (scrollY > top) scrollTo(0, top);
}
