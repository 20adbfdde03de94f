// Which of the two is shown, and what keys do.
const TITLE = document.title;

const asked = () => /^#f=(\d+)$/.exec(location.hash);

async function route() {
  const match = asked(), i = match ? Number(match[1]) : -1;
  tip.hidden = true;
  if (!match) {
    const returning = $("index").hidden;
    [$("index").hidden, $("latent").hidden, document.title] = [false, true, TITLE];
    if (returning) scrollTo(0, view.scroll);
    return draw();
  }
  if (!$("index").hidden) view.scroll = scrollY;
  if (i < layout.n_latents) {
    const found = await details(i), hash = location.hash;
    if (hash !== match[0]) return undefined;  // another was asked for meanwhile
    latentPage(i, found);
  } else {
    $("latent").replaceChildren(make("p", {}, `There is no latent ${i}; they are numbered 0 to ${layout.n_latents - 1}. `, make("a", {href: "#"}, "All latents")));
  }
  [$("index").hidden, $("latent").hidden, document.title] = [true, false, `Latent ${i} · ${TITLE}`];
  scrollTo(0, 0);
  return undefined;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const onLatent = !$("latent").hidden, typing = event.target === $("search");
  const link = {ArrowLeft: "prev", ArrowRight: "next"}[event.key];
  if (event.key === "Escape" && onLatent) location.hash = "";
  else if (event.key === "/" && !typing && !onLatent) { event.preventDefault(); $("search").focus(); }
  else if (event.key === "Enter" && typing && view.order.length) location.hash = `f=${view.order[0]}`;
  else if (link && onLatent) $("latent").querySelector(`a[rel=${link}]`)?.click();
}

function fail(error) {
  $("problem").hidden = false;
  $("problem").textContent = globalThis.DecompressionStream
    ? `This page cannot read its data: ${error.message}. Is the file whole?`
    : "This page needs a newer browser: Chrome or Edge 111, Firefox 113, Safari 16.4, or later.";
}

async function start() {
  await openList();
  head();
  $("index").hidden = asked() !== null;
  $("overview").append(make("h2", {}, distributions.density.title), amongAll("density"));
  arrange();
  let pause, frame;
  $("search").oninput = event => { clearTimeout(pause); pause = setTimeout(() => lookFor(event.target.value), 120); };
  const redraw = () => { frame ??= requestAnimationFrame(() => { frame = undefined; draw(); }); };
  addEventListener("scroll", redraw, {passive: true});
  addEventListener("resize", redraw);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => route().catch(fail));
  document.addEventListener("mouseover", showTip);
  await route();
}
start().catch(fail);
