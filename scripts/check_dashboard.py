"""Check and time a dashboard in headless Chromium, opened from file:// without a network.

    pip install playwright                                  # only the client; Chromium comes from your system
    python scripts/check_dashboard.py                       # a random dictionary of 2,048 latents
    python scripts/check_dashboard.py --latents 24576
    python scripts/check_dashboard.py --page features.html  # an existing page

The random dictionary belongs to the embedded model. Its page has stability scores, a control on the model with shuffled
weights, and some tokens and labels that would run as scripts if the page took them for markup. Times are in milliseconds from
the request until the result is painted. CPU times are those of the page's main thread. Any console message, request or dialog
is a failure; so is any expectation about a random page that does not hold.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

HOOK = "blocks.2.hook_resid_pre"
HOSTILE = [
    "</script><script>window.hacked = 1; alert(1)</script>",
    "<img src=x onerror='window.hacked = 1; alert(2)'>",
    "\"><svg onload='window.hacked = 1; alert(3)'>",
    "<iframe srcdoc='<script>top.hacked = 1</script>'>",
    "{{7*7}}",
    "line\u2028separator",
    "\u202eright to left\u200f",
    "\x00\x1b",
    "\u0301accent",
    "long" * 500,
]
SCREENS = {"light": ("light", 1440, 900), "dark": ("dark", 1440, 900), "phone": ("light", 390, 844)}

# Runs before the page does: notes when it first paints and when the first rows of the list have been painted.
WATCH = """
window.seen = {};
new PerformanceObserver(list => { for (const entry of list.getEntries()) seen[entry.name] = entry.startTime; })
  .observe({type: "paint", buffered: true});
new MutationObserver((_, observer) => {
  if (!document.querySelector("#rows [role=row]")) return;
  observer.disconnect();
  requestAnimationFrame(() => setTimeout(() => { seen.rows = performance.now(); }));
}).observe(document, {childList: true, subtree: true});
"""

# Does something and gives the milliseconds until its result, for which the last expression tells, has been painted.
TIMED = """
(async () => {
  const painted = () => new Promise(resolve => requestAnimationFrame(() => setTimeout(resolve)));
  await painted();
  const start = performance.now();
  %s;
  while (!(%s)) await new Promise(resolve => setTimeout(resolve));
  await painted();
  return performance.now() - start;
})()
"""
TOO_LONG = 60  # seconds


def random_page(n_latents: int, n_tokens: int, out: Path) -> Path:
    """Return a dashboard of a random dictionary, and of all that it can show."""
    import torch

    import saelens_lite as sl
    from saelens_lite.features import weights_hash
    from saelens_lite.features.compare import Stability
    from saelens_lite.features.label import Label
    from saelens_lite.tokens import named_text

    lm = sl.load_model("tiny", device="cpu")
    origin, reads = sl.Origin(n_ctx=128), sl.Port(hook=HOOK, width=lm.d_model)
    d = sl.Dictionary.create("topk", reads=reads, d_sae=n_latents, options={"k": 32}, origin=origin)
    scores = Stability(
        score=torch.rand(n_latents, generator=torch.Generator().manual_seed(0)),
        n_shared=torch.zeros(n_latents, dtype=torch.long),
        live=torch.arange(n_latents) % 10 != 3,
        sha256=weights_hash(d),
        other_sha256=("0" * 64,),
        threshold=0.7,
        method="mutual",
    )
    start = time.perf_counter()
    text = named_text("python-docs:held-out")
    store = sl.FeatureStore.build(d, lm, text, n_tokens=n_tokens, control=True, stability=scores)
    store.vocabulary[::50] = [HOSTILE[i % len(HOSTILE)] for i in range(len(store.vocabulary[::50]))]
    for i in range(0, n_latents, 8):
        label = HOSTILE[i // 8 % len(HOSTILE)] if i % 64 else f"a label of latent {i}"
        store.labels[i] = Label(label, "Neuronpedia", HOSTILE[i // 16 % len(HOSTILE)]) if i % 16 else label
    built = time.perf_counter()
    path = store.dashboard(out / "features.html", exists="overwrite")
    written = time.perf_counter()
    each = 1e3 / n_latents
    print(f"store {(built - start) * each:.2f} ms a latent, with its control; page {(written - built) * each:.2f} ms a latent")
    return path


class Checked:
    """A page in a browser, the times of what was done with it, and what should not have happened."""

    def __init__(self, browser: Any, path: Path, screen: str):
        scheme, width, height = SCREENS[screen]
        viewport = {"width": width, "height": height}
        self.context = browser.new_context(color_scheme=scheme, viewport=viewport, offline=True, has_touch=screen == "phone")
        self.page = self.context.new_page()
        self.url, self.failures = path.resolve().as_uri(), []
        self.times: dict[str, list[tuple[float, float]]] = {}
        self.page.on("console", lambda message: self.failures.append(f"console {message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.failures.append(f"error: {error}"))
        self.page.on("request", self._on_request)
        self.page.on("dialog", self._on_dialog)
        self.page.add_init_script(WATCH)
        self.devtools = self.context.new_cdp_session(self.page)
        self.devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def _on_request(self, request: Any) -> None:
        if request.url.split("#")[0] != self.url:
            self.failures.append(f"request: {request.url[:200]}")

    def _on_dialog(self, dialog: Any) -> None:
        self.failures.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def cpu(self) -> float:
        """Return the milliseconds that the page's main thread has worked."""
        metrics = self.devtools.send("Performance.getMetrics")["metrics"]
        return next(1e3 * metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def wait(self, expression: str) -> Any:
        """Return the value of an expression as soon as it is true."""
        for _ in range(20 * TOO_LONG):
            if value := self.page.evaluate(expression):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{expression} did not come true; {self.failures}")

    def load(self) -> None:
        """Open the page, from nothing."""
        self.page.goto("about:blank")
        before = self.cpu()
        self.page.goto(self.url)
        seen = self.wait("seen.rows && seen['first-contentful-paint'] && seen")
        self.note("first paint", seen["first-contentful-paint"], 0)
        self.note("list painted", seen["rows"], self.cpu() - before)

    def time(self, what: str, act: str, is_there: str) -> None:
        """Do something with the page, time it, and have a look at what became of hostile tokens."""
        before = self.cpu()
        self.note(what, self.page.evaluate(TIMED % (act, is_there)), self.cpu() - before)
        if self.page.evaluate(
            "window.hacked || document.querySelectorAll('img:not([src^=\"data:\"]), iframe, object, embed, [onload]').length"
        ):
            self.failures.append(f"{what}: a token or label became markup")

    def note(self, what: str, wall: float, cpu: float) -> None:
        self.times.setdefault(what, []).append((wall, cpu))

    def expect(self, what: str, expression: str) -> None:
        if not self.page.evaluate(expression):
            self.failures.append(f"not so: {what}")

    def look_for(self, query: str) -> None:
        self.page.evaluate(f"$('search').value = {query!r}; lookFor({query!r})")

    def open_latent(self, what: str, act: str, latent: int) -> None:
        self.time(what, act, f"document.title.startsWith('Latent {latent} ')")


def exercise(checked: Checked) -> None:
    """Do everything that a reader does, several times each."""
    for _ in range(3):
        checked.load()
    page, n = checked.page, checked.page.evaluate("layout.n_latents")
    for key in ("density", "max", "stability", "cosine", "label", "latent"):
        if page.evaluate(f"columns.some(column => column.key === '{key}')"):
            button = f"columns.find(column => column.key === '{key}').head.firstChild"
            checked.time("sort", f"{button}.click()", f"{button}.parentElement.hasAttribute('aria-sort')")
    for query in ("import", "the", "e", " re", "<script", "naïve", "17"):
        act = f"$('search').value = {query!r}; $('search').dispatchEvent(new Event('input'))"
        checked.time("search", act, f"view.query === {query!r}")
    checked.time("search", "$('search').value = ''; $('search').dispatchEvent(new Event('input'))", "!view.query")
    row = "document.elementFromPoint(innerWidth / 2, innerHeight / 2)?.closest('#rows [role=row]')"
    for share in (0.5, 0.99, 0.2, 0):
        checked.time("scroll", f"scrollTo(0, {share} * document.body.scrollHeight)", row)
    for i in sorted({int(share * (n - 1)) for share in (0, 0.15, 0.31, 0.5, 0.66, 0.83, 1)}):
        checked.open_latent("open a latent", f"location.hash = 'f={i}'", i)
        page.evaluate("location.hash = ''")
        checked.wait("!$('index').hidden")
    fires = "(_, i) => i >= layout.n_latents / 3 && index.get('count', i) > 0 && (label(i) || !Object.keys(labels).length)"
    first = page.evaluate(f"Array.from({{length: layout.n_latents}}).findIndex({fires})")
    checked.open_latent("open a latent", f"location.hash = 'f={first}'", first)
    for token in page.query_selector_all("#latent :is(.right .peak, figure img, .entry .name)")[:5]:
        token.hover()
    checked.wait("!$('tip').hidden")
    for j in range(5):
        link = f"document.querySelectorAll('.other a')[{j}]"
        checked.open_latent("follow a link", f"{link}.click()", page.evaluate(f"Number({link}.textContent)"))
    for what, key, rel in (("next", "ArrowRight", "next"), ("previous", "ArrowLeft", "prev")):
        for _ in range(5):
            latent = page.evaluate(f"Number(document.querySelector('a[rel={rel}]').hash.slice(3))")
            checked.open_latent(
                what, f"document.body.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}}))", latent
            )
    checked.time("back to the list", "location.hash = ''", "!$('index').hidden")


TRUTHS = {  # expressions of the page's own functions
    "what is nearly zero is short": "number(4.4e-16) === '4.40e−16' && edge(-2.64, 0.11, 24) === 0 && number(0) === '0.00'",
    "zero has no sign, the unknown is a dash": "fixed(-0.001) === '0.00' && fixed(-0.5) === '−0.50' && fixed(NaN) === '–'",
    "a mark gets a ring, wide spaces are named": "named('\\u0301s') === '◌\\u0301s' && named('\\u3000') === '\\\\u{3000}'",
}


def check_list(checked: Checked) -> None:
    """Check the parts of the list that pictures do not show, and record failures."""
    page, expect = checked.page, checked.expect
    for what, expression in TRUTHS.items():
        expect(what, expression)
    checked.look_for("\\u{2028}")
    expect("what is named in a token can be looked for", "view.order.length > 0")
    checked.look_for("·the")
    by_dot = page.evaluate("view.order.join()")
    checked.look_for(" the")
    expect("a dot is a space to the search", f"view.order.length > 0 && view.order.join() === {by_dot!r}")
    expect("rows are counted", "$('list').getAttribute('aria-rowcount') == view.order.length + 1")
    others = "[...drawn].filter(([i]) => index.row('top', i).findIndex(at => view.hits.tokens[at]) > 0)"
    expect("there are latents of which another context than the strongest is found", f"{others}.length")
    expect("no activation is told of these", f"{others}.every(([, line]) => !line.querySelector('.tokens [data-tip]'))")
    checked.look_for("(nothing like .* this")
    expect("nothing is found", "!view.order.length && rows.classList.contains('none') && !rows.children.length")
    checked.look_for("")
    ahead = "shown => shown.slice(0, shown.findIndex(token => token.matches('.peak'))).map(token => token.textContent).join('')"
    expect("the peaks are in sight", f"view.order.map(snippet).map({ahead}).every(text => text.length < 200)")
    for direction in ("down", "up"):
        page.evaluate("sortBy('stability')")
        expect(f"what is not known comes last, {direction}", "Number.isNaN(stabilityOf(view.order.at(-1)))")
    page.evaluate("sortBy('latent')")


def check_ways(checked: Checked) -> None:
    """Check the links between the list and the latents, and record failures."""
    page, expect, n = checked.page, checked.expect, checked.page.evaluate("layout.n_latents")
    page.evaluate("scrollTo(0, 0); rows.querySelector('a').focus()")
    for _ in range(n_tabs := min(40, n - 1)):
        page.keyboard.press("Tab")
        page.evaluate("new Promise(resolve => requestAnimationFrame(() => setTimeout(resolve)))")
    expect("Tab goes from row to row", f"document.activeElement.textContent === '{n_tabs}'")

    page.evaluate("scrollTo(0, 900)")
    there = page.evaluate("new Promise(resolve => setTimeout(() => resolve(scrollY), 100))")
    page.evaluate(f"location.hash = 'f={n_tabs}'")
    checked.wait("!$('latent').hidden")
    expect("a latent's title has the focus", "document.activeElement.tagName === 'H1' && scrollY === 0")
    for step in ("back", "forward", "back"):
        page.evaluate(f"history.{step}()")
        checked.wait("$('latent').hidden" if step == "back" else "!$('latent').hidden")
        page.evaluate("new Promise(resolve => setTimeout(resolve, 200))")
    expect("back leads to where the list was", f"Math.abs(scrollY - {there}) < 2")
    expect("to the row", f"document.activeElement.textContent === '{n_tabs}'")

    page.focus("#search")
    page.keyboard.type("17")
    page.keyboard.press("Enter")
    checked.wait("!$('latent').hidden")
    expect("Enter opens the first that is found", "location.hash === '#f=17'")
    page.evaluate(f"location.hash = 'f={n}'")
    checked.wait("document.title.startsWith('No latent')")
    expect("what does not exist is said not to", f"$('latent').textContent.includes('There is no latent {n}')")
    page.evaluate("location.hash = ''")
    checked.wait("!$('index').hidden")
    checked.look_for("")


def screenshots(checked: Checked, screen: str, out: Path) -> None:
    """Pictures of the list and of a latent."""
    if not checked.times:
        checked.load()
    checked.page.screenshot(path=out / f"list-{screen}.png")
    checked.page.evaluate("location.hash = 'f=64'")
    checked.wait("!$('latent').hidden")
    checked.page.screenshot(path=out / f"latent-{screen}.png", full_page=True)


def table(times: dict[str, list[tuple[float, float]]]) -> Table:
    grid = Table(box=SIMPLE_HEAD)
    for title in ("", "median ms", "most ms", "CPU, median ms", "times"):
        grid.add_column(title, justify="left" if not title else "right")
    for what, several in times.items():
        walls, cpus = zip(*several, strict=True)
        cpu = f"{median(cpus):.0f}" if any(cpus) else ""
        grid.add_row(what, f"{median(walls):.0f}", f"{max(walls):.0f}", cpu, str(len(several)))
    return grid


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--page", type=Path, help="a dashboard to check, instead of a random one")
    parser.add_argument("--out", type=Path, default=Path("dashboard-check"), help="folder for the page and pictures of it")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.page or random_page(options.latents, options.tokens, options.out)
    failures = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; Chromium {browser.version}")
        for screen in SCREENS:
            checked = Checked(browser, path, screen)
            if screen == "light":
                exercise(checked)
                if options.page is None:
                    check_list(checked)
                    check_ways(checked)
                n = checked.page.evaluate("layout.n_latents")
                print(f"{path.stat().st_size / n / 1e3:.2f} KB a latent")
                Console().print(table(checked.times))
            screenshots(checked, screen, options.out)
            failures += [f"{screen}: {failure}" for failure in checked.failures]
            checked.context.close()
        browser.close()
    print("\n".join(failures) or "no console message, no request, no dialog, no token or label taken for markup")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
