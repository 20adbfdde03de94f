"""A dictionary as an estimator of scikit-learn, for pipelines and grid searches.

```python
from sklearn.model_selection import GridSearchCV

coder = sl.SparseCoder(d_sae=4096, k=8)
codes = coder.fit_transform(x)  # [n d_sae] in float32; a CSR array with sparse_output=True
x_hat = coder.inverse_transform(codes)
search = GridSearchCV(coder, {"k": [4, 8, 16]}).fit(x)  # the score is the explained variance
d = search.best_estimator_.dictionary_
```

It needs scikit-learn: `pip install 'saelens-lite[analysis]'`.
"""

import numbers
from collections.abc import Iterator
from typing import Any, no_type_check

import numpy as np
import torch

from saelens_lite.arrays import ArrayLike
from saelens_lite.codes import SparseCodes
from saelens_lite.errors import ConfigError
from saelens_lite.training.fit import fit

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ConfigError(f"SparseCoder needs scikit-learn 1.6 or later: pip install 'saelens-lite[analysis]' ({error})") from None

BATCH = 2048  # rows that are encoded at once


class SparseCoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A sparse dictionary that `fit` trains and whose codes `transform` returns, as scikit-learn wants it.

    After `fit`, `dictionary_` is the dictionary and `history_` has the lines of the log.

    Args:
        sparsity: the name of the sparsity rule.
        d_sae, n_tokens, batch_size, lr, validation_tokens, device: as in `saelens_lite.fit`, and its defaults.
        k, target_l0: options of rules that have them; by default those of the rule.
        settings: other settings that `saelens_lite.fit` takes, such as {"coefficient": 2.0, "warmup": 0.1}.
        sparse_output: return codes as a CSR array of scipy.
        random_state: the seed. The same seed gives the same dictionary.
    """

    @no_type_check  # scikit-learn's convention: values are checked by `fit`
    def __init__(
        self,
        sparsity: str = "topk",
        *,
        d_sae: int | None = None,
        k: int | None = None,
        target_l0: float | None = None,
        n_tokens: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        validation_tokens: int = 0,
        settings: dict[str, Any] | None = None,
        device: Any = None,
        sparse_output: bool = False,
        random_state: Any = 0,
    ):
        self.sparsity = sparsity
        self.d_sae = d_sae
        self.k = k
        self.target_l0 = target_l0
        self.n_tokens = n_tokens
        self.batch_size = batch_size
        self.lr = lr
        self.validation_tokens = validation_tokens
        self.settings = settings
        self.device = device
        self.sparse_output = sparse_output
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: Any = None) -> "SparseCoder":
        """Train a dictionary on X [n d_in], and return the estimator. y is ignored.

        Raises:
            ValueError: X is not an array of finite numbers with at least two rows.
            ConfigError, PluginError: a setting or the rule does not exist, or a value is bad.
            NonFiniteError: the rows are all the same, or training diverged.
        """
        X = validate_data(self, X, dtype=[np.float32, np.float64], ensure_min_samples=2)
        self.dictionary_ = fit(X, self.sparsity, **self._settings())
        self.history_ = self.dictionary_.history
        return self

    def _settings(self) -> dict[str, Any]:
        """Return the arguments of `saelens_lite.fit`. Raise ConfigError if `settings` repeat a parameter."""
        names = ("d_sae", "k", "target_l0", "n_tokens", "batch_size", "lr", "device", "validation_tokens")
        chosen = {name: value for name in names if (value := getattr(self, name)) is not None}
        state = self.random_state
        seed = state if isinstance(state, numbers.Integral) else check_random_state(state).randint(2**31 - 1)
        given = {**(self.settings or {})}
        if twice := sorted(given.keys() & {*names, "seed", "sparsity"}):
            raise ConfigError(
                f"settings hold {', '.join(twice)}, which SparseCoder has as a parameter; the seed is random_state"
            )
        return {**chosen, **given, "seed": int(seed)}

    def transform(self, X: ArrayLike) -> Any:
        """Return the codes of X [n d_in]: a float32 array [n d_sae], or a CSR array with `sparse_output`."""
        codes = [piece.to("cpu") for piece in self._encoded(self._checked(X))]
        if not self.sparse_output:
            return np.concatenate([piece.to_dense().numpy() for piece in codes])
        from scipy.sparse import csr_array, vstack

        pieces = [csr_array((c.value.numpy(), c.latent.numpy(), c.crow.numpy()), shape=(c.n_rows, c.d_sae)) for c in codes]
        stacked = vstack(pieces, format="csr")
        stacked.sort_indices()
        return stacked

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Return the reconstructions [n d_in] of codes [n d_sae], which may be sparse."""
        check_is_fitted(self)
        X = check_array(X, accept_sparse="csr", dtype=np.float32)
        pieces = (X[start : start + BATCH] for start in range(0, X.shape[0], BATCH))
        dense = (piece.toarray() if hasattr(piece, "toarray") else piece for piece in pieces)
        with torch.no_grad():
            return np.concatenate([self.dictionary_.decode(piece).cpu().numpy() for piece in dense])

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Return the explained variance 1 − Σ‖x − x̂‖² / Σ‖x − mean‖² of X. y is ignored."""
        X = self._checked(X)
        with torch.no_grad():
            x_hat = [self.dictionary_.decode(codes).cpu().numpy() for codes in self._encoded(X)]
        X = X.astype(np.float64)
        return float(1 - np.square(X - np.concatenate(x_hat)).sum() / np.square(X - X.mean(0)).sum())

    def _checked(self, X: ArrayLike) -> np.ndarray:
        """Return X as an array of the width that the dictionary was trained on."""
        check_is_fitted(self)
        return validate_data(self, X, dtype=[np.float32, np.float64], reset=False)

    def _encoded(self, X: np.ndarray) -> Iterator[SparseCodes]:
        """Yield the codes of the rows, batch by batch."""
        with torch.no_grad():
            for start in range(0, len(X), BATCH):
                yield self.dictionary_.encode(X[start : start + BATCH])

    @property
    def _n_features_out(self) -> int:
        return self.dictionary_.d_sae

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
