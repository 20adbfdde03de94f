// Pieces of the page. All text becomes text nodes and attributes; nothing is parsed as HTML.
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  element.append(...children);
  return element;
}
const three = new Intl.NumberFormat("en", {minimumSignificantDigits: 3, maximumSignificantDigits: 3});
const integer = new Intl.NumberFormat("en");
const SMALL = 1e-4;  // smaller numbers are shown with an exponent
const number = value => (value && Math.abs(value) < SMALL ? value.toExponential(2) : three.format(value)).replaceAll("-", "−");
const whole = value => integer.format(value);
// Two decimals, or a dash for unknown numbers; zero has no sign.
const fixed = value => Number.isNaN(value) ? "–" : (Math.round(100 * value) / 100 || 0).toFixed(2).replace("-", "−");
const percent = share => `${number(100 * share)} %`;
const density = i => index.get("count", i) / layout.n_tokens;

// Invisible characters are named, a combining mark at the beginning gets a dotted circle, and spaces are dots where they would
// not be visible. A token without text is part of a character that a later token completes.
const UNSEEN = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "␣"};
const spelled = text => text.replace(/(?! )[\p{C}\p{Z}]/gu, c => UNSEEN[c] ?? `\\u{${c.codePointAt(0).toString(16)}}`);
const named = text => spelled(text).replace(/^\p{M}/u, "◌$&");
const PART = "‥";
const dotted = id => id === layout.bos ? "start of text" : named(vocabulary[id]).replaceAll(" ", "·") || PART;

// A token. If the latent fires on it, it is shaded, and its activation is shown beside the pointer.
function token(id, value, isPeak, max) {
  const word = vocabulary[id], blank = !word.trim();
  const element = make("span", {}, id === layout.bos ? "⟨start⟩" : blank ? dotted(id) : named(word));
  if (blank || id === layout.bos) element.className = "blank";
  if (isPeak) element.classList.add("peak");
  if (value > 0) {
    element.dataset.tip = `${dotted(id)}   ${number(value)}`;
    element.style.backgroundColor = `color-mix(in srgb, var(--accent) ${Math.round(6 + 44 * Math.min(1, value / max))}%, transparent)`;
  }
  return element;
}
// Tokens [from, to) of a context.
function strip({ids, values, peak}, from, to, max) {
  const shown = [];
  for (let j = from; j < to; j++) shown.push(token(ids[j], values[j], j === peak, max));
  return shown;
}
const chip = id => make("span", {class: "chip"}, dotted(id));
const label = i => labels[i] === undefined ? "" : named(labels[i]);
// Return the author and the source of a label; empty for your own label.
const origin = i => index.has("origin") ? named(origins[index.get("origin", i)]) : "";

// The distinct tokens on which a latent fires most.
function topTokens(i, most) {
  const places = index.row("top", i).subarray(0, index.get("n_top", i));
  return [...new Set(Array.from(places, at => tokens[at]))].slice(0, most);
}

const card = (title, ...content) => make("section", {class: "card"}, make("h2", {}, title), ...content);
// A card of numbers with their unit, which is explained beside the pointer.
function measured(title, unit, meaning, ...content) {
  const section = card(title, ...content);
  section.firstChild.append(make("span", {class: "unit", "data-tip": meaning}, unit));
  return section;
}
const facts = pairs => make("dl", {class: "facts"}, ...pairs.map(([name, value, meaning]) =>
  make("div", meaning ? {"data-tip": meaning} : {}, make("dt", meaning ? {"data-tip": meaning} : {}, name), make("dd", {}, value))));

function line(one, max) {
  const {ids, peak, value, row, position, parts} = one, told = parts ? `   ${partsTold(parts)}` : "";
  return make("div", {class: parts ? "context parted" : "context"},
    make("span", {"data-tip": `row ${whole(row)}, position ${whole(position)}${told}`}, number(value)),
    ...(parts ? [partsCell(parts)] : []),
    make("div", {class: "tokens left"}, make("span", {}, ...strip(one, 0, peak, max))),
    make("div", {class: "tokens right"}, ...strip(one, peak, ids.length, max)));
}
const lines = (found, max) => isRows ? rowLines(found, max) : found.map(one => line(one, max));

const tip = $("tip");
function showTip({target}) {
  const said = target.dataset?.tip;
  tip.hidden = !said;
  if (!said) return;
  const box = target.getBoundingClientRect();
  tip.textContent = said;
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${box.top > tip.offsetHeight + 10 ? box.top - tip.offsetHeight - 4 : box.bottom + 6}px`;
}
