// Small bar charts. A bar is {height, tip, marked?}; `ends` are written below the first and the last bar. The whole column of a
// bar shows its tip, however low the bar is.
const svg = tag => document.createElementNS("http://www.w3.org/2000/svg", tag);
function chart(name, bars, ends) {
  const plot = svg("svg"), most = Math.max(...bars.map(bar => Math.abs(bar.height)));
  const block = (x, width, tall) => {
    const rect = svg("rect"), place = {x, y: 100 - tall, width, height: tall};
    for (const side in place) rect.setAttribute(side, `${place[side]}%`);
    return rect;
  };
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `${name}, from ${ends[0]} to ${ends[1]}`);
  bars.forEach(({height, tip, marked}, j) => {
    const width = 100 / bars.length, tall = height && Math.max(1.5, 100 * Math.abs(height) / most);
    const bar = block(width * (j + .06), .88 * width, tall), column = block(width * j, width, 100);
    column.classList.add("column");
    column.dataset.tip = tip;
    if (marked) for (const part of [bar, column]) part.classList.add("marked");
    plot.append(bar, column);
  });
  return make("div", {class: "plot"}, plot, make("div", {class: "axis"}, ...ends.map(end => make("span", {}, end))));
}

// Return the lower edge of bin j; an edge that differs from zero only by rounding is zero.
function edge(low, width, j) {
  const at = low + width * j;
  return Math.abs(at) < width / 1000 ? 0 : at;
}

function valueChart(counts, width) {
  const bars = Array.from(counts, (count, j) =>
    ({height: count, tip: `${number(width * j)} to ${number(width * (j + 1))}:  ${whole(count)} ${unit}s`}));
  return chart("Histogram of activations", bars, ["0", number(width * counts.length)]);
}

function logitChart(found) {
  const [low, width] = ["logit_low", "logit_width"].map(found.get), counts = found.row("logit_histogram");
  const at = j => number(edge(low, width, j));
  const bars = Array.from(counts, (count, j) =>
    ({height: Math.log1p(count), tip: `${at(j)} to ${at(j + 1)}:  ${whole(count)} tokens of the vocabulary`}));
  return chart("Histogram of effects on the logits", bars, [at(0), at(counts.length)]);
}

function profileChart(rates, means) {
  const bands = layout.bands;
  const bars = Array.from(rates, (rate, j) => {
    const [first, last] = bands[j], where = first === last ? `position ${first}` : `positions ${first} to ${last}`;
    return {height: rate, tip: `${where}:  fires on ${percent(rate)}${rate ? `, mean ${number(means[j])}` : ""}`};
  });
  return chart("Firing rate by position", bars, [`position ${bands[0][0]}`, String(bands.at(-1)[1])]);
}

// Distributions of a number over all latents; the bar of latent i is marked.
const N_BARS = 36;
const distributions = {
  density: {title: "Density of latents, log scale", of: i => index.get("count", i) ? Math.log10(density(i)) : NaN, shown: x => percent(10 ** x)},
  cosine: {title: "Encoder–decoder cosine", of: i => index.get("cosine", i), shown: fixed},
  stability: {title: "Stability across seeds", of: i => index.get("stability", i), shown: fixed},
};
function distribution({of, shown, ...known}) {
  if (known.counts) return known;
  const values = Float64Array.from({length: layout.n_latents}, (_, i) => of(i)).filter(Number.isFinite);
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  const n = high > low ? N_BARS : 1, width = (high - low) / n, counts = new Uint32Array(n);
  const bin = value => width ? Math.min(n - 1, Math.floor((value - low) / width)) : value - low;
  for (const value of values) counts[bin(value)]++;
  return {low, high, width, counts, bin};
}
function amongAll(name, i) {
  const known = Object.assign(distributions[name], distribution(distributions[name]));
  const {title, of, shown, low, high, width, counts, bin} = known;
  if (!(high >= low)) return make("p", {class: "soft"}, "not known for any latent");
  const own = i === undefined ? NaN : of(i), at = j => shown(edge(low, width, j));
  const bars = Array.from(counts, (count, j) =>
    ({height: count, marked: bin(own) === j, tip: `${at(j)} to ${at(j + 1)}:  ${whole(count)} latents`}));
  const plot = chart(title, bars, [at(0), at(counts.length)]);
  if (i !== undefined) plot.classList.add("among");
  return plot;
}
