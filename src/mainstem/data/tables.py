"""Tables: rows of numeric features and one target."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigurationError, unknown
from ..registry import register
from .core import Data, build, choice, fewer, normalised, split_rows, statistics

if TYPE_CHECKING:
    import pandas as pd

MOST_CLASSES = 20  # integer targets with more distinct values are numbers to predict


@register("data", "diabetes")
def diabetes(*, seed: int | None = None, count: int | None = None) -> Data:
    """Progression of diabetes in a year from ten measurements of 442 patients (scikit-learn): `[N, 10]` -> `[N, 1]`.

    264 training, 89 validation and 89 test patients, the same without a seed. Features and target are standardised by
    the training split: an mse of 1 is that of predicting the mean, and `meta["target"]` holds the target's own mean and
    deviation. Linear regression reaches about 0.57.

    Args:
        count: this many of the training patients.
    """
    from sklearn.datasets import load_diabetes

    raw = load_diabetes(scaled=False)
    y = raw.target.astype(np.float64)
    return _table("diabetes", raw.data, raw.feature_names, "progression", y, None, seed, count, {})


@register("data", "breast-cancer")
def breast_cancer(*, seed: int | None = None, count: int | None = None) -> Data:
    """Malignant or benign, from 30 measurements of 569 tumours (scikit-learn): `[N, 30]`, two classes.

    The stratified split is 341 training, 114 validation and 114 test tumours, the same without a seed. Features are
    standardised by the training split. Logistic regression reaches about 97 %.

    Args:
        count: this many of the training tumours, stratified.
    """
    from sklearn.datasets import load_breast_cancer

    raw = load_breast_cancer()
    labels = [str(label) for label in raw.target_names]
    columns = [str(column) for column in raw.feature_names]
    return _table("breast-cancer", raw.data, columns, "diagnosis", raw.target, labels, seed, count, {})


@register("data", "csv:PATH")
def csv(
    path: str | Path,
    *,
    target: str | None = None,
    seed: int | None = None,
    count: int | None = None,
    task: str | None = None,
    ignore: str | Sequence[str] = (),
    separator: str = ",",
) -> Data:
    """Rows of a CSV file (UTF-8, a line of column names first): every column but the target is a numeric feature.

    The rows are shuffled and split 60/20/20, stratified for classes, the same without a seed. Features, and a numeric
    target, are standardised by the training split; `meta["target"]` holds the target's mean and deviation.

    Args:
        target: the column to predict.
        count: this many of the training rows.
        task: "classification" or "regression"; None decides by the target: text, or whole numbers of at most 20
            distinct values, are classes; other numbers are predicted.
        ignore: columns to leave out, as a list or separated by commas.
        separator: what stands between fields.

    Raises ConfigurationError, naming file, row (counted after the names) and column: a missing target, a feature that
    is text, an empty field, NaN or Inf, too few rows of a class to split, a file that is no CSV or not UTF-8.
    """
    frame = read_csv(path, separator)
    left_out = [name.strip() for name in ignore.split(",")] if isinstance(ignore, str) else list(ignore)
    for column in left_out:
        if column not in frame.columns:
            raise unknown(f"ignore: {path}", column, frame.columns)
    if target is None:
        raise ConfigurationError(f"target: {path}: say which column to predict: {', '.join(frame.columns)}")
    if target not in frame.columns:
        raise unknown(f"target: {path}", target, frame.columns)
    columns = [column for column in frame.columns if column != target and column not in left_out]
    if not columns:
        raise ConfigurationError(f"{path}: there is no column beside the target {target!r} to predict it from")
    y, labels = _target(frame[target], str(path), task)
    x = numbers(frame, columns, str(path))
    name = f"csv:{path}"
    return _table(name, x, columns, target, y, labels, seed, count, {"separator": separator}, where=str(path))


def read_csv(path: str | Path, separator: str = ",") -> pd.DataFrame:
    """The rows of a CSV file. Only an empty field counts as missing: "NA" and "nan" stay text."""
    import pandas as pd

    if not isinstance(separator, str) or len(separator) != 1:
        raise ConfigurationError(f"separator: {separator!r} is not a single character")
    options: dict[str, Any] = {"sep": separator, "encoding": "utf-8-sig", "skipinitialspace": True}
    options |= {"keep_default_na": False, "index_col": False}
    try:
        header = pd.read_csv(path, header=None, nrows=1, dtype=str, **options)
        with warnings.catch_warnings():  # pandas would drop fields that no column name stands for
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, na_values=[""], low_memory=False, **options)
    except pd.errors.ParserWarning:
        raise ConfigurationError(f"{path}: its rows have more fields than the {header.shape[1]} column names") from None
    except FileNotFoundError:
        raise ConfigurationError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise ConfigurationError(f"{path} is a folder, not a CSV file") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise ConfigurationError(f"{path} cannot be read as CSV: {str(error).strip()}") from None
    names = [str(name).strip() for name in header.iloc[0]]
    if all(_is_number(name) for name in names):
        raise ConfigurationError(f"{path}: the first line holds numbers; a line of column names must come first")
    for name in names:
        if names.count(name) > 1 or not name:
            raise ConfigurationError(f"{path}: column name {name!r} is empty or stands there twice")
    if len(names) == 1:
        found = re.search(r"[;\t|,]", names[0])
        if found:
            raise ConfigurationError(f"{path}: one column, {names[0]!r}; pass separator={found[0]!r}")
    if frame.empty:
        raise ConfigurationError(f"{path} has no rows below its column names")
    frame.columns = pd.Index(names)
    return frame


def numbers(frame: pd.DataFrame, columns: Sequence[str], where: str) -> np.ndarray:
    """The `columns` of a table as float64 `[N, F]`; a field that is no finite number raises, with its place."""
    import pandas as pd

    for column in columns:
        if column not in frame.columns:
            raise unknown(f"{where}: missing column", column, frame.columns)
    arrays = []
    for column in columns:
        held = frame[column]
        values = pd.to_numeric(held, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            row, given = int(bad[0]), held.iloc[bad[0]]
            if isinstance(given, str) and not _is_number(given):
                said = f"text, {given!r}; features must be numbers: turn it into numbers, or leave the column out"
                if len(bad) < len(values) / 2:
                    said = f"{given!r} among numbers; correct it or remove the row"
            else:
                said = f"{'no value' if pd.isna(given) else str(given)}; fill it in or remove the row"
            raise ConfigurationError(f"{where}: row {row + 1}, column {column!r} holds {said}")
        arrays.append(values)
    return np.stack(arrays, axis=1)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _target(held: pd.Series, path: str, task: str | None) -> tuple[np.ndarray, list[str] | None]:
    """Targets `[N]` and, for classes, their labels."""
    import pandas as pd

    if task is not None:
        choice("task", task, ("classification", "regression"))
    missing = np.flatnonzero(held.isna())
    if len(missing):
        raise ConfigurationError(
            f"{path}: row {missing[0] + 1}, column {str(held.name)!r} (the target) holds no value; "
            "fill it in or remove the row"
        )
    integer = pd.api.types.is_integer_dtype(held)
    if task is None:
        numeric = pd.api.types.is_numeric_dtype(held) and not pd.api.types.is_bool_dtype(held)
        if not numeric:
            _misspelt(held, path)
        task = "regression" if numeric and not (integer and held.nunique() <= MOST_CLASSES) else "classification"
    if task == "regression":
        return numbers(held.to_frame(), [str(held.name)], path)[:, 0], None
    values, y = np.unique(held.to_numpy(), return_inverse=True)
    if len(values) < 2:
        raise ConfigurationError(f"{path}: the target {str(held.name)!r} has one value, {values[0]!r}, in every row")
    return y, [str(value) for value in values]


def _misspelt(held: pd.Series, path: str) -> None:
    """A target that is text in a few rows and numbers in the others was meant to be numbers."""
    text = held.astype(str)
    bad = np.flatnonzero(~text.map(_is_number).to_numpy(dtype=bool))
    if 0 < len(bad) < 0.1 * len(text) and text.nunique() > MOST_CLASSES:
        raise ConfigurationError(
            f"{path}: row {bad[0] + 1}, column {str(held.name)!r} (the target) holds {text.iloc[bad[0]]!r} among "
            "numbers; correct it or remove the row"
        )


def _table(
    name: str,
    x: np.ndarray,
    columns: Sequence[str],
    target: str,
    y: np.ndarray,
    labels: list[str] | None,
    seed: int | None,
    count: int | None,
    meta: dict[str, Any],
    where: str | None = None,
) -> Data:
    classes = y.astype(np.int64) if labels else None
    rows = split_rows(len(y), seed, classes=classes, labels=labels, where=where or name)
    train = rows["train"]
    rows["train"] = fewer(train, count, seed, name=name, classes=None if classes is None else classes[train])
    mean, std = statistics(x[rows["train"]], 0)
    meta = {"columns": list(columns), "mean": mean, "std": std, **meta, "target": {"name": target}}
    targets: np.ndarray
    if classes is None:
        y_mean, y_std = statistics(y[rows["train"], None], 0)
        meta["target"] |= {"mean": y_mean, "std": y_std}
        targets = normalised(y[:, None], y_mean, y_std)
    else:
        targets = classes
    x = normalised(x, mean, std)
    splits = {role: (x[picked], targets[picked]) for role, picked in rows.items()}
    task = "classification" if labels else "regression"
    return build(name, task, "vector", splits, outputs=len(labels) if labels else 1, labels=labels, meta=meta)
