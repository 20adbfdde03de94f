// Navigation between the list and a latent's page, and the keys.
const TITLE = document.title;

const asked = () => /^#f=(\d+)$/.exec(location.hash);

async function route() {
  const match = asked();
  tip.hidden = true;
  if (!match) return showList();
  if (!$("index").hidden) view.scroll = scrollY;
  const i = Number(match[1]), there = i < layout.n_latents, found = there && await details(i);
  if (location.hash !== match[0]) return undefined;  // the user has moved on
  if (there) latentPage(i, found); else noLatent(match[1]);
  view.last = i;
  [$("index").hidden, $("latent").hidden, document.title] = [true, false, `${there ? `Latent ${i}` : `No latent ${match[1]}`} · ${TITLE}`];
  scrollTo(0, 0);
  $("latent").querySelector("h1").focus({preventScroll: true});  // so that screen readers announce the page
  return undefined;
}
function showList() {
  const returning = $("index").hidden;
  [$("index").hidden, $("latent").hidden, document.title] = [false, true, TITLE];
  if (returning) scrollTo(0, view.scroll);
  draw();
  if (returning) drawn.get(view.last)?.querySelector("a").focus({preventScroll: true});
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const onLatent = !$("latent").hidden, typing = event.target === $("search");
  const link = {ArrowLeft: "prev", ArrowRight: "next"}[event.key];
  if (event.key === "Escape" && onLatent) location.hash = "";
  else if (event.key === "/" && !typing && !onLatent) { event.preventDefault(); $("search").focus(); }
  else if (event.key === "Enter" && typing) openFirst();
  else if (link && onLatent) $("latent").querySelector(`a[rel=${link}]`)?.click();
}
function openFirst() {
  lookFor($("search").value);
  if (view.order.length) location.hash = `f=${view.order[0]}`;
}

function fail(error) {
  $("problem").hidden = false;
  $("problem").textContent = globalThis.DecompressionStream
    ? `This page cannot read its data: ${error.message}. Is the file complete?`
    : "This page needs a newer browser: Chrome or Edge 111, Firefox 113, Safari 16.4, or later.";
}

async function start() {
  await openList();
  head();
  history.scrollRestoration = "manual";  // otherwise Forward scrolls the list before `route` saves its position
  $("index").hidden = asked() !== null;
  $("overview").append(make("h2", {}, `Density of latents: the share of ${unit}s they fire on, log scale`), amongAll("density"));
  for (const part of [scoreOverview(), kindButtons(kind => only({kind})), verdictButtons(verdict => only({verdict}))]) if (part) $("bar").before(part);
  arrange();
  let pause, frame;
  $("search").oninput = event => { clearTimeout(pause); pause = setTimeout(() => lookFor(event.target.value), 120); };
  const redraw = () => { frame ??= requestAnimationFrame(() => { frame = undefined; draw(); }); };
  addEventListener("scroll", () => { tip.hidden = true; redraw(); }, {passive: true});
  addEventListener("resize", redraw);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => route().catch(fail));
  document.addEventListener("mouseover", showTip);
  document.addEventListener("focusin", showTip);
  await route();
}
start().catch(fail);
