"""Facts about a public dictionary that its own files may not state."""

from typing import Annotated

from pydantic import Field

from saelens_lite.config import FrozenConfig, Origin
from saelens_lite.model.nicknames import hub_id

Positive = Annotated[float, Field(gt=0)]


class Known(FrozenConfig):
    """Facts about a public dictionary that its files may not state, such as its model."""

    release: str | None = Field(None, description="Name of the release and the dictionary in it, release/id.")
    model: str | None = Field(None, description="Hub id of the model, in place of the name in the files.")
    models: dict[str, str | None] = Field(
        {}, description="Names and Hub ids of several models, such as {base: …, chat: …}, in the order of the ports."
    )
    hook: str | tuple[str, ...] | None = Field(
        None, description="Hook that is read, or one for each port. A hook of several models, such as base:…, may name one."
    )
    target: str | None = Field(None, description="Hook that a transcoder writes.")
    processing: tuple[str, ...] = Field((), description="Changes made to the model's weights when it was loaded; see Origin.")
    prepend_bos: bool | None = Field(None, description="True if each row began with the BOS token.")
    n_ctx: int | None = Field(None, description="Tokens in a row.")
    k: int | None = Field(None, description="Codes of a token, for a top-k rule whose files do not state k.")
    token_norm: str | None = Field(None, description="layer_norm or constant_norm of each activation.")
    scale: Positive | tuple[Positive, ...] | None = Field(
        None, description="Factor of the activations, or one for each port, for files that need one and do not state it."
    )
    neuronpedia: str | None = Field(None, description="Neuronpedia's id of the dictionary, model/source.")
    license: str | None = Field(None, description="Licence of the weights.")

    def origin(self, stated: Origin) -> Origin:
        """Return the origin that the files state, completed with these facts. A revision counts for the model it is of."""
        is_other = None not in (self.model, stated.model, stated.revision) and hub_id(self.model) != hub_id(stated.model)
        unstated = {"prepend_bos": self.prepend_bos, "n_ctx": self.n_ctx}
        return stated.replace(
            **({"model": self.model} if self.model else {}),
            **({"revision": None} if is_other else {}),
            **({"processing": tuple(dict.fromkeys((*stated.processing, *self.processing)))} if self.processing else {}),
            **{name: value for name, value in unstated.items() if value is not None and getattr(stated, name) is None},
        )

    @property
    def kept(self) -> dict[str, str]:
        """The facts that a dictionary keeps beside its settings."""
        return self.model_dump(include={"release", "neuronpedia", "license"}, exclude_none=True)
