"""The feature dashboard: a whole feature store as one HTML page that works from a file, without a network.

The page's data is one JSON object. Token strings are stored once, in `vocabulary`, and referred to by number; numbers
are rounded to three significant digits.
"""

from typing import Any

from saelens_lite.features import Example, FeatureStore

TEMPLATE = "dashboard.html.j2"


def render(store: FeatureStore) -> str:
    """The page."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("saelens_lite", "features"), autoescape=True, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    counts = store.tensors.count
    return environment.get_template(TEMPLATE).render(
        info=store.info,
        l0=rounded(int(counts.sum()) / store.info.n_tokens),
        n_silent=int(store.never_fires.sum()),
        data=page_data(store),  # the template's tojson filter writes <, >, & and ' as \u003c, …: no token can end the script
    )


def page_data(store: FeatureStore) -> dict[str, Any]:
    """What the page's script reads: the number of tokens, the vocabulary in use, and one object a latent.

    A context is [tokens, activations, index of the peak, row, position].
    """
    numbers: dict[str, int] = {}

    def number(token: str) -> int:
        return numbers.setdefault(token, len(numbers))

    def effects(pairs: list[tuple[str, float]]) -> list[list[float | int]]:
        return [[number(token), rounded(effect)] for token, effect in pairs]

    def context(example: Example) -> list[Any]:
        tokens, values = [number(token) for token in example.tokens], [rounded(value) for value in example.values]
        return [tokens, values, example.peak, example.row, example.position]

    bos_id = store.info.bos_id
    bos = None if bos_id is None else number(store.vocabulary[bos_id])
    latents = []
    for i in range(store.info.d_sae):
        latent = store.latent(i)
        fires = latent.count > 0
        latents.append(
            {
                "count": latent.count,
                "max": rounded(latent.max),
                "mean": rounded(latent.mean),
                "bin": latent.bin_width,
                "histogram": latent.histogram if fires else [],
                "promoted": effects(latent.promoted),
                "suppressed": effects(latent.suppressed),
                "contexts": [context(example) for example in latent.examples],
            }
        )
    return {"n_tokens": store.info.n_tokens, "bos": bos, "vocabulary": list(numbers), "latents": latents}


def rounded(value: float) -> float | int:
    """The value to three significant digits, as an integer where it is one."""
    short = float(f"{value:.3g}")
    return int(short) if short == int(short) else short
