"""One label: a text about a latent, which knows where it comes from."""


class Label(str):
    """A label that somebody else wrote: a text with its source and its author, such as the model that wrote it.

    `store` names the contexts that it was made from (`StoreInfo.contexts`), if they are known. Your own label is a plain
    string.
    """

    def __new__(cls, text: str, source: str, author: str = "", store: str = "") -> "Label":
        label = super().__new__(cls, text)
        label.source, label.author, label.store = source, author, store
        return label

    source: str
    author: str
    store: str

    def __getnewargs__(self) -> tuple[str, str, str, str]:
        return str(self), self.source, self.author, self.store

    @property
    def origin(self) -> str:
        """The author and the source in one line."""
        return ", ".join(part for part in (self.author, self.source) if part)


def origin_of(label: str | None) -> str:
    """Return the author and the source of a label; empty for your own label."""
    return label.origin if isinstance(label, Label) else ""
