// A live prompt. Python holds the state; here it is shown, and what the reader does is sent back. Texts are set by textContent.

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function shade(share) {
  const colour = share < 0 ? "40, 120, 255" : "240, 130, 0";
  return `rgba(${colour}, ${(0.65 * Math.min(Math.abs(share), 1)).toFixed(2)})`;
}

function render({ model, el }) {
  const prompt = element("textarea", { rows: 2, value: model.get("prompt"), ariaLabel: "prompt" });
  const order = element("select", { ariaLabel: "order of the latents" });
  order.append(...model.get("orders").map((by) => element("option", { value: by, textContent: `by ${by}` })));
  const go = element("button", { textContent: "Continue the text", type: "button" });
  const status = element("span", { className: "sl-dim", role: "status" });
  const problem = element("div", { className: "sl-error" });
  problem.setAttribute("role", "alert");
  const tokens = element("div", { className: "sl-tokens" });
  const list = element("div", { className: "sl-latents" });
  const sliders = element("div", { className: "sl-sliders" });
  const texts = element("div", { className: "sl-texts" });
  el.classList.add("sl-live");
  el.append(prompt, element("div", { className: "sl-bar" }, order, go, status), problem, tokens, list, sliders, texts);

  let chosen = null; // position of the token whose latents are listed; null: all tokens
  const steered = new Map(model.get("edits").map(([latent, amount]) => [latent, { amount, reach: Math.abs(amount) || 1, about: "" }]));

  function send(changes) {
    Object.entries(changes).forEach(([name, value]) => model.set(name, value));
    model.save_changes();
  }

  function strongest(rows) {
    const best = new Map();
    for (const row of rows) {
      const known = best.get(row.latent);
      if (!known || Math.abs(row.score) > Math.abs(known.score)) best.set(row.latent, row);
    }
    return [...best.values()].sort((a, b) => Math.abs(b.score) - Math.abs(a.score));
  }

  function showTokens() {
    const { tokens: shown = [], shades = [], title = "" } = model.get("view");
    tokens.title = title;
    tokens.replaceChildren(
      ...shown.map((token, position) => {
        const button = element("button", { textContent: token, type: "button", ariaPressed: String(position === chosen) });
        button.style.background = shade(shades[position]);
        button.onclick = () => {
          chosen = position === chosen ? null : position;
          showTokens();
          showLatents();
        };
        return button;
      }),
    );
  }

  function showLatents() {
    const rows = (model.get("view").rows ?? []).filter((row) => chosen === null || row.position === chosen);
    list.replaceChildren(
      ...strongest(rows).slice(0, 12).map((row) => {
        const add = element("button", { textContent: "steer", type: "button", ariaLabel: `steer latent ${row.latent}` });
        add.disabled = steered.has(row.latent);
        add.onclick = () => {
          steered.set(row.latent, { amount: 0, reach: row.reach, about: row.about });
          showSliders();
          showLatents();
        };
        const number = element("b", { textContent: row.latent });
        const about = element("span", { textContent: row.about, className: "sl-dim" });
        return element("div", {}, add, number, ` ${row.score.toPrecision(3)} `, about);
      }),
    );
  }

  function sendEdits() {
    send({ edits: [...steered].filter(([, slider]) => slider.amount !== 0).map(([latent, slider]) => [latent, slider.amount]) });
  }

  function showSliders() {
    sliders.replaceChildren(
      ...[...steered].map(([latent, slider]) => {
        const number = element("output", { textContent: slider.amount.toPrecision(3) });
        const range = element("input", { type: "range", min: -slider.reach, max: slider.reach, step: slider.reach / 60 });
        range.value = slider.amount;
        range.ariaLabel = `added to latent ${latent}`;
        range.oninput = () => {
          slider.amount = Math.abs(range.valueAsNumber) < slider.reach / 100 ? 0 : range.valueAsNumber;
          number.textContent = slider.amount.toPrecision(3);
        };
        range.onchange = sendEdits;
        const remove = element("button", { textContent: "×", type: "button", ariaLabel: `leave latent ${latent} as it is` });
        remove.onclick = () => {
          steered.delete(latent);
          showSliders();
          showLatents();
          if (slider.amount !== 0) sendEdits();
        };
        const about = element("span", { textContent: slider.about, className: "sl-dim" });
        return element("div", {}, remove, element("b", { textContent: latent }), range, number, about);
      }),
    );
  }

  function showTexts() {
    const { plain, edited, kl } = model.get("continuation");
    texts.replaceChildren();
    if (plain === undefined) return;
    texts.append(element("div", {}, element("b", { textContent: "plain" }), element("p", { textContent: plain })));
    if (model.get("edits").length) {
      const cost = element("span", { textContent: ` ${kl.toFixed(3)} nats per token from plain`, className: "sl-dim" });
      texts.append(element("div", {}, element("b", { textContent: "steered" }), cost, element("p", { textContent: edited })));
    }
  }

  function showState() {
    status.textContent = model.get("busy") ? "…" : "";
    problem.textContent = model.get("error");
  }

  function showPrompt() {
    prompt.value = model.get("prompt");
  }

  function showView() {
    chosen = null;
    order.value = model.get("by");
    showTokens();
    showLatents();
  }

  prompt.onchange = () => send({ prompt: prompt.value });
  prompt.onkeydown = (event) => {
    event.stopPropagation(); // the notebook has shortcuts of its own
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send({ prompt: prompt.value });
    }
  };
  order.onchange = () => send({ by: order.value });
  go.onclick = () => send({ prompt: prompt.value, asked: model.get("asked") + 1 });

  const watched = {
    "change:prompt": showPrompt,
    "change:view": showView,
    "change:continuation": showTexts,
    "change:error": showState,
    "change:busy": showState,
  };
  Object.entries(watched).forEach(([event, show]) => model.on(event, show));
  showView();
  showSliders();
  showTexts();
  showState();
  return () => Object.entries(watched).forEach(([event, show]) => model.off(event, show));
}

export default { render };
