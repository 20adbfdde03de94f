"""SparseCoder in scikit-learn: its own checks, pipelines, grid searches, copies and files."""

import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

import saelens_lite as sl
from saelens_lite.errors import ConfigError, ShapeError

LEFT_OUT = {"check_array_api_input": "skips itself without SCIPY_ARRAY_API; it is about arrays of other libraries than numpy"}
QUICK = {"d_sae": 12, "k": 3, "n_tokens": 400, "batch_size": 40}


@pytest.fixture(scope="module")
def X():
    return np.random.default_rng(0).standard_normal((200, 6)).astype("float32") + 1


@pytest.fixture(scope="module")
def coder(X):
    return sl.SparseCoder(**QUICK).fit(X)


def checks():
    coder = sl.SparseCoder(d_sae=8, k=2, n_tokens=60, batch_size=20)
    named = [(getattr(check, "func", check).__name__, one, check) for one, check in estimator_checks_generator(coder)]
    assert {name for name, *_ in named} > LEFT_OUT.keys()
    return [pytest.param(one, check, id=name) for name, one, check in named if name not in LEFT_OUT]


@pytest.mark.parametrize(("estimator", "check"), checks())
def test_scikit_learn_finds_no_fault(estimator, check):
    check(estimator)


def test_the_codes_are_those_of_fit(coder, X):
    d = sl.fit(X, "topk", seed=0, **QUICK)
    codes = d.encode(X)
    assert torch.equal(coder.dictionary_.W_dec, d.W_dec)
    assert coder.history_ == d.history != []
    assert np.array_equal(coder.transform(X), codes.to_dense().numpy(force=True))
    assert coder.transform(X).dtype == np.float32
    x_hat = d(X).numpy(force=True)
    assert np.allclose(coder.inverse_transform(coder.transform(X)), x_hat, atol=1e-6)
    assert coder.score(X) == pytest.approx(r2_score(X.astype("float64"), x_hat, multioutput="variance_weighted"), abs=1e-6)
    assert coder.n_features_in_ == 6
    assert list(coder.get_feature_names_out()[[0, -1]]) == ["sparsecoder0", "sparsecoder11"]


def test_codes_as_a_sparse_array(coder, X, monkeypatch):
    monkeypatch.setattr("saelens_lite.estimator.BATCH", 70)
    sparse = clone(coder).set_params(sparse_output=True).fit(X)
    codes = sparse.transform(X)
    assert scipy.sparse.issparse(codes)
    assert codes.format == "csr"
    assert codes.has_sorted_indices
    assert codes.nnz == (coder.transform(X) != 0).sum()
    assert np.allclose(codes.toarray(), coder.transform(X), atol=1e-6)
    assert np.allclose(sparse.inverse_transform(codes), coder.inverse_transform(coder.transform(X)), atol=1e-6)
    assert sparse.score(X) == pytest.approx(coder.score(X))


def test_names_of_columns_and_pandas_output(X):
    frame = pd.DataFrame(X, columns=list("abcdef"))
    coder = sl.SparseCoder(**QUICK).set_output(transform="pandas").fit(frame)
    assert list(coder.feature_names_in_) == list("abcdef")
    codes = coder.transform(frame)
    assert list(codes.columns) == list(coder.get_feature_names_out())
    with pytest.raises(ValueError, match="feature names should match"):
        coder.transform(frame[list("fedcba")])


def test_copies_and_files_give_the_same_codes(coder, X):
    again = clone(coder)
    assert not hasattr(again, "dictionary_")
    assert again.get_params() == coder.get_params()
    assert np.array_equal(again.fit(X).transform(X), coder.transform(X))
    read = pickle.loads(pickle.dumps(coder))
    assert np.array_equal(read.transform(X), coder.transform(X))
    assert read.history_ == coder.history_


def test_the_seed_is_the_random_state(X):
    def W_dec(state):
        return sl.SparseCoder(**QUICK, random_state=state).fit(X).dictionary_.W_dec

    assert torch.equal(W_dec(7), sl.fit(X, seed=7, **QUICK).W_dec)
    assert torch.equal(W_dec(np.random.RandomState(1)), W_dec(np.random.RandomState(1)))
    assert not torch.equal(W_dec(7), W_dec(np.random.RandomState(1)))


def test_a_grid_search_chooses_more_latents_for_more_explained_variance():
    images = load_digits().data[:400]
    search = GridSearchCV(sl.SparseCoder(d_sae=32, n_tokens=3000, batch_size=50), {"k": [1, 8]}, cv=2).fit(images)
    assert search.best_params_ == {"k": 8}
    assert search.best_estimator_.dictionary_.rule.config.k == 8
    assert 0.3 < search.best_score_ < 1
    assert search.score(images) == search.best_estimator_.score(images)


def test_codes_in_a_pipeline_tell_digits_apart():
    images, digits = load_digits(return_X_y=True)
    coder = sl.SparseCoder(d_sae=64, k=8, n_tokens=8000, batch_size=50, sparse_output=True)
    pipeline = make_pipeline(StandardScaler(), coder, LogisticRegression(max_iter=1000)).fit(images[:600], digits[:600])
    assert pipeline.score(images[600:], digits[600:]) > 0.7  # chance: 0.1
    assert pipeline[:-1].get_feature_names_out()[3] == "sparsecoder3"


def test_other_settings_and_rules(X):
    coder = sl.SparseCoder("l1", d_sae=12, settings={"coefficient": 0.5, "warmup": 0.1, "n_tokens": 100, "batch_size": 20})
    with pytest.raises(ConfigError, match=r"settings hold batch_size, n_tokens, which SparseCoder has as a parameter"):
        coder.fit(X)
    coder.set_params(n_tokens=100, batch_size=20, settings={"coefficient": 0.5, "warmup": 0.1}).fit(X)
    assert coder.dictionary_.rule.config.coefficient == 0.5
    assert coder.dictionary_.training_record["config"]["warmup"] == 0.1
    with pytest.raises(ConfigError, match=r"unknown key 'k'; it is neither .* nor an option of l1"):
        coder.set_params(k=3).fit(X)


def test_bad_requests(coder, X):
    with pytest.raises(NotFittedError):
        sl.SparseCoder().transform(X)
    with pytest.raises(ValueError, match="NaN"):
        sl.SparseCoder(**QUICK).fit(np.where(X > 2, np.nan, X))
    with pytest.raises(ValueError, match=r"X has 5 features, but SparseCoder is expecting 6 features"):
        coder.transform(X[:, :5])
    with pytest.raises(ShapeError, match=r"codes have shape \(200, 6\); this dictionary takes \[..., 12\]"):
        coder.inverse_transform(X)


def test_without_scikit_learn():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import saelens_lite as sl\n"
        "try:\n    sl.SparseCoder\nexcept sl.SaelensLiteError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "SparseCoder needs scikit-learn 1.6 or later: pip install 'saelens-lite[analysis]'" in done.stdout
