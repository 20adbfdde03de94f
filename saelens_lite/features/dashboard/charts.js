// Small bar charts. A bar is {height, tip, marked?}; `ends` are written below the first and the last.
const svg = tag => document.createElementNS("http://www.w3.org/2000/svg", tag);
function chart(name, bars, ends) {
  const plot = svg("svg"), most = Math.max(...bars.map(bar => Math.abs(bar.height)));
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", name);
  plot.append(...bars.map(({height, tip, marked}, j) => {
    const bar = svg("rect"), tall = height && Math.max(1.5, 100 * Math.abs(height) / most);
    const place = {x: 100 * (j + .06) / bars.length, y: 100 - tall, width: 88 / bars.length, height: tall};
    for (const side in place) bar.setAttribute(side, `${place[side]}%`);
    if (marked) bar.classList.add("marked");
    bar.dataset.tip = tip;
    return bar;
  }));
  return make("div", {class: "plot"}, plot, make("div", {class: "axis"}, ...ends.map(end => make("span", {}, end))));
}

function valueChart(counts, width) {
  const last = counts.findLastIndex(count => count > 0) + 1;
  const bars = Array.from(counts.subarray(0, last), (count, j) =>
    ({height: count, tip: `${number(width * j)} to ${number(width * (j + 1))}:  ${whole(count)} tokens`}));
  return chart("Histogram of activations", bars, ["0", number(width * last)]);
}

function logitChart(found) {
  const [low, width] = ["logit_low", "logit_width"].map(found.get), counts = found.row("logit_histogram");
  const bars = Array.from(counts, (count, j) => ({height: Math.log1p(count),
    tip: `${number(low + width * j)} to ${number(low + width * (j + 1))}:  ${whole(count)} tokens of the vocabulary`}));
  return chart("Histogram of effects on the logits", bars, [number(low), number(low + width * counts.length)]);
}

function profileChart(rates, means) {
  const bands = layout.bands;
  const bars = Array.from(rates, (rate, j) => {
    const [first, last] = bands[j], where = first === last ? `position ${first}` : `positions ${first} to ${last}`;
    return {height: rate, tip: `${where}:  fires on ${percent(rate)}${rate ? `, mean ${number(means[j])}` : ""}`};
  });
  return chart("Firing rate by position", bars, [String(bands[0][0]), String(bands.at(-1)[1])]);
}

// How a number is distributed over all latents; the bar of latent i is marked.
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
  const width = (high - low) / N_BARS || 1, counts = new Uint32Array(N_BARS);
  const bin = value => Math.min(N_BARS - 1, Math.floor((value - low) / width));
  for (const value of values) counts[bin(value)]++;
  return {low, high, width, counts, bin};
}
function amongAll(name, i) {
  const known = Object.assign(distributions[name], distribution(distributions[name]));
  const {title, of, shown, low, high, width, counts, bin} = known;
  if (!(high >= low)) return make("p", {class: "soft"}, "no latent fires");
  const own = i === undefined ? NaN : of(i);
  const bars = Array.from(counts, (count, j) => ({height: count, marked: bin(own) === j,
    tip: `${shown(low + width * j)} to ${shown(low + width * (j + 1))}:  ${whole(count)} latents`}));
  return chart(title, bars, [shown(low), shown(high)]);
}
