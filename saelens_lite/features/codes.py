"""All activations of a text in a Parquet file sorted by latent, which DuckDB queries.

The table codes has a row for each activation: latent, row, position, token, value. The table tokens has the text of each token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from saelens_lite.errors import ConfigError, CorruptFileError, UserError
from saelens_lite.features.reduce import Block
from saelens_lite.files import disk_full_is_typed, file_hash, file_size

if TYPE_CHECKING:
    import duckdb
    import pyarrow

CODES_FILE = "codes.parquet"
GROUP = 1 << 20  # activations in a row group, which a query reads or skips as a whole
WHAT_TO_INSTALL = "pip install 'saelens-lite[sql]'"


def check_extra() -> None:
    """Raise ConfigError unless DuckDB and pyarrow are installed."""
    try:
        import duckdb  # noqa: F401
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"a table of codes needs {error.name}: {WHAT_TO_INSTALL}") from None


@contextmanager
def codes_file(path: Path | None, tokens: Int[Tensor, "n_seq n_ctx"]) -> Iterator[Callable[[Block], None]]:
    """Yield a function that appends the activations of a block of latents to the file; without a path it does nothing."""
    if path is None:
        yield lambda block: None
        return
    import pyarrow as pa

    n_ctx = tokens.shape[1]
    with _writer(path) as writer:

        def add(block: Block) -> None:
            row, position = block.place // n_ctx, block.place % n_ctx
            columns = (block.first + block.latent, row, position, tokens[row, position], block.value)
            for start in range(0, len(block.value), GROUP):
                part = (x[start : start + GROUP].numpy() for x in columns)
                arrays = [pa.array(x).cast(field.type) for x, field in zip(part, writer.schema, strict=True)]
                writer.write_table(pa.Table.from_arrays(arrays, schema=writer.schema), row_group_size=GROUP)

        yield add


@contextmanager
def _writer(path: Path) -> "Iterator[pyarrow.parquet.ParquetWriter]":
    """Yield a writer of the table of codes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([*((name, pa.int32()) for name in ("latent", "row", "position", "token")), ("value", pa.float32())])
    encodings = {"row": "DELTA_BINARY_PACKED", "position": "PLAIN", "value": "BYTE_STREAM_SPLIT"}
    settings = {"compression": "zstd", "use_dictionary": ["latent", "token"], "column_encoding": encodings}
    with disk_full_is_typed(path), pq.ParquetWriter(path, schema, **settings) as writer:
        yield writer


def join_codes(path: Path, parts: Sequence[Path]) -> None:
    """Write the tables of consecutive blocks of latents to one file: the bytes that `codes_file` writes for all of them."""
    import pyarrow.parquet as pq

    with _writer(path) as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group).combine_chunks(), row_group_size=GROUP)


class CodesTable:
    """A finished file of codes, which can be queried."""

    def __init__(self, path: Path, n_bytes: int, sha256: str):
        self.path, self.n_bytes, self.sha256 = path, n_bytes, sha256
        self._is_whole = False

    @classmethod
    def of(cls, path: Path) -> "CodesTable":
        """Return the table in a file that was just written."""
        return cls(path, path.stat().st_size, file_hash(path))

    def check_size(self) -> None:
        """Raise CorruptFileError unless the file has its recorded length."""
        n_bytes = file_size(self.path) if self.path.exists() else 0
        if n_bytes != self.n_bytes:
            raise CorruptFileError(
                f"{self.path} is missing or damaged: {n_bytes:,} bytes, expected {self.n_bytes:,}; build the store again"
            )

    def check(self) -> None:
        """Raise CorruptFileError unless the file has its recorded length and hash. The hash is computed only once."""
        self.check_size()
        if not self._is_whole and file_hash(self.path) != self.sha256:
            raise CorruptFileError(f"{self.path} does not match its checksum; build the store again")
        self._is_whole = True

    def query(self, sql: str, vocabulary: Sequence[str]) -> "pyarrow.Table":
        """Return the result of a SELECT over the tables codes and tokens.

        Raises:
            UserError: the query is not exactly one SELECT statement, or DuckDB rejects it, such as when it reads another file.
            CorruptFileError: the file is damaged.
            ConfigError: DuckDB is not installed.
        """
        check_extra()
        self.check()
        import duckdb
        import pyarrow as pa

        with duckdb.connect() as db:
            try:
                _open(db, self.path, pa.table({"token": range(len(vocabulary)), "text": list(vocabulary)}))
            except duckdb.Error as error:
                raise CorruptFileError(f"DuckDB cannot read {self.path}: {error}") from None
            try:
                statements = db.extract_statements(sql)
                if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                    raise UserError("the codes are read-only; give exactly one SELECT statement")
                return db.sql(statements[0]).to_arrow_table()
            except duckdb.Error as error:
                raise UserError(f"DuckDB: {error}") from None


def _open(db: "duckdb.DuckDBPyConnection", path: Path, tokens: "pyarrow.Table") -> None:
    """Create the two tables, then forbid access to other files, temporary files and changes of these settings."""
    where = str(path.resolve())
    db.register("tokens", tokens)
    db.read_parquet(where).create_view("codes")
    quoted = where.replace("'", "''")
    db.execute(f"set allowed_paths = ['{quoted}']")
    db.execute("set temp_directory = ''")
    for setting in ("python_enable_replacements", "enable_external_access"):
        db.execute(f"set {setting} = false")
    db.execute("set lock_configuration = true")
