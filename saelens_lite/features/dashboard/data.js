// The data: two blocks of compressed parts. The block of the list is unpacked at the start. The block of the latents' own pages
// comes after this script, may still be loading, and is unpacked part by part.
const $ = id => document.getElementById(id);
const layout = JSON.parse($("layout").textContent);
const KINDS = {uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array, float64: Float64Array};
const unit = layout.unit, isRows = unit === "row";  // a latent fires on tokens of a text, or on rows without a text
const MOST_CHUNKS = 32;  // kept unpacked

function takeBlock(id) {
  const element = $(id), block = element.textContent;
  element.remove();
  return block;
}
const whenRead = new Promise(resolve => document.addEventListener("DOMContentLoaded", resolve));
const detailsBlock = whenRead.then(() => takeBlock("details-block"));

// Return one part of a block as a response, which can be read as JSON or as bytes.
function open(block, starts, part) {
  const packed = atob(block.slice(starts[part], starts[part + 1])), bytes = new Uint8Array(packed.length);
  for (let j = 0; j < bytes.length; j++) bytes[j] = packed.charCodeAt(j);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
}

// Columns of numbers by name; a column has `width` numbers a row.
class Columns {
  constructor(buffer, described) {
    const size = ([, kind, width]) => KINDS[kind].BYTES_PER_ELEMENT * width;
    this.length = Math.round(buffer.byteLength / described.reduce((sum, column) => sum + size(column), 0)) || 0;
    this.columns = new Map();
    let offset = 0;
    for (const column of described) {
      const [name, kind, width] = column, end = offset + size(column) * this.length;
      this.columns.set(name, {width, numbers: new KINDS[kind](buffer.slice(offset, end))});
      offset = end;
    }
  }
  has(name) { return this.columns.get(name)?.width > 0; }
  all(name) { return this.columns.get(name).numbers; }
  row(name, i) {
    const {width, numbers} = this.columns.get(name);
    return numbers.subarray(i * width, (i + 1) * width);
  }
  get(name, i) { return this.columns.get(name).numbers[i]; }
}

let vocabulary, labels, origins, scores, judges, spreads, tokens, groupOf, spans, index;
async function openList() {
  const block = takeBlock("list-block"), part = number => open(block, layout.list_starts, number);
  const columns = async (number, name) => new Columns(await part(number).arrayBuffer(), layout.columns[name]);
  let shown;
  [{vocabulary, labels, origins, scores, judges, spreads}, shown, spans, index] = await Promise.all([
    part(0).json(), columns(1, "tokens"), columns(2, "spans"), columns(3, "index")]);
  tokens = shown.all("token");
  if (shown.has("group")) groupOf = shown.all("group");
}

// Return the details of a latent: its row in the columns of its chunk.
const chunks = new Map();
async function openChunk(number) {
  return new Columns(await open(await detailsBlock, layout.details_starts, number).arrayBuffer(), layout.columns.details);
}
async function details(i) {
  const number = Math.floor(i / layout.chunk), found = chunks.get(number) ?? openChunk(number);
  chunks.delete(number);  // the most recently used chunk comes last
  chunks.set(number, found);
  if (chunks.size > MOST_CHUNKS) chunks.delete(chunks.keys().next().value);
  const columns = await found, row = i % layout.chunk;
  return {has: name => columns.has(name), row: name => columns.row(name, row), get: name => columns.get(name, row)};
}

// Return a context: the tokens around the peak, which is the shown token `at`, within the span of the peak.
function context(at, nearby) {
  const starts = spans.all("at");
  let low = 0, high = starts.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (starts[middle] <= at) low = middle; else high = middle;
  }
  const begin = Math.max(starts[low], at - layout.before), end = Math.min(starts[low + 1] ?? tokens.length, at + layout.after + 1);
  const first = layout.before - (at - begin);
  return {
    ids: tokens.subarray(begin, end),
    values: nearby.subarray(first, first + end - begin),
    peak: at - begin,
    value: nearby[layout.before],
    row: spans.get("row", low),
    position: spans.get("position", low) + at - starts[low],
    at,
  };
}
// parts: what several models add to the latent at the peak of each.
function contexts(places, nearby, parts) {
  const width = layout.before + 1 + layout.after, found = [];
  places.forEach((at, j) => {
    const values = nearby.subarray(j * width, (j + 1) * width);
    if (values[layout.before] > 0) found.push({...context(at, values), parts: parts?.subarray(j * models.length, (j + 1) * models.length)});
  });
  return found;
}
