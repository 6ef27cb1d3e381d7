"""Token ids of what a converted model is tuned or measured on: text files, or the folder of a
Hugging Face data set."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glazoo.errors import ConversionError, extra, one_line

__all__ = ["read_splits", "read_tokens"]

_ROWS_AT_ONCE = 64


def read_tokens(
    texts: Sequence[str | Path],
    tokenizer: str,
    *,
    vocabulary: int | None = None,
    column: str = "text",
    split: str | None = None,
    limit: int | None = None,
) -> NDArray[Any]:
    """Return the token ids of texts, one axis; texts are separated by the end of text, where the
    tokenizer has one.

    Args:
        texts: UTF-8 text files, or one folder with a data set: written by `save_to_disk`, or one of
            parquet, JSON, CSV or text files as they lie on the hub. A row is a text; so is a whole
            text file.
        tokenizer: a folder with a tokenizer, or "bytes": these, and an end of text where the
            vocabulary has room for it.
        vocabulary: size of the model's vocabulary, which must hold every id.
        column: the data set's column with the text.
        split: the data set's split; default `train`, or the only one.
        limit: how many tokens are given at most; of text files not many more are made.

    Raises:
        ConversionError: something cannot be read, or the tokenizer does not fit.
    """
    folder = _folder(texts)
    made = _tokenizer(tokenizer, vocabulary)
    if folder is None:
        ids = _file_tokens(texts, tokenizer, made, split, limit)[:limit]
    else:
        splits = _splits(folder)
        name = _chosen(splits, split)
        ids = _row_tokens(_rows(folder, splits[name], column), made, limit)
    return _checked(ids, vocabulary)


def read_splits(
    texts: Sequence[str | Path],
    tokenizer: str,
    *,
    vocabulary: int | None = None,
    column: str = "text",
    split: str | None = None,
    validation_split: str | None = None,
    limit: int | None = None,
    validation_limit: int | None = None,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Return the token ids for training and for evaluation, the latter None where there is no split
    for it.

    Args:
        texts: as in `read_tokens`.
        tokenizer: as in `read_tokens`.
        vocabulary: as in `read_tokens`.
        column: as in `read_tokens`.
        split: as in `read_tokens`.
        validation_split: the data set's split for evaluation; default `validation`, if there.
        limit: how many tokens are enough for training.
        validation_limit: how many tokens are enough for evaluation.

    Raises:
        ConversionError: as in `read_tokens`.
    """
    folder = _folder(texts)
    made = _tokenizer(tokenizer, vocabulary)
    if folder is None:
        ids = _file_tokens(texts, tokenizer, made, split or validation_split)
        return _checked(ids, vocabulary), None
    splits = _splits(folder)
    name = _chosen(splits, split)
    ids = _checked(_row_tokens(_rows(folder, splits[name], column), made, limit), vocabulary)
    held = validation_split
    if held is None and "validation" in splits and name != "validation":
        held = "validation"
    if held is None:
        return ids, None
    if held == name:
        raise ConversionError(f"validation_split: {held!r} is what is trained on")
    rows = _rows(folder, splits[_chosen(splits, held)], column)
    return ids, _checked(_row_tokens(rows, made, validation_limit), vocabulary)


def _folder(texts: Sequence[str | Path]) -> Path | None:
    """Return the data set's folder, if it is one."""
    if not texts:
        raise ConversionError("texts: got no file, expected at least one")
    folders = [Path(t) for t in texts if Path(t).is_dir()]
    if folders and len(texts) > 1:
        raise ConversionError(f"texts: {folders[0]} is a data set's folder, which stands alone")
    return folders[0] if folders else None


def _tokenizer(name: str, vocabulary: int | None) -> Any:
    from transformers import AutoTokenizer

    from glazoo.training import byte_tokenizer, symbol_tokenizer

    try:
        if name == "bytes":
            # A model of 256 tokens has none for the end of a text.
            alone = vocabulary is not None and vocabulary <= 256
            return symbol_tokenizer() if alone else byte_tokenizer()
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception as e:
        raise ConversionError(
            f"cannot load a tokenizer from {name}: {' '.join(str(e).split())}"
        ) from e


def _checked(ids: NDArray[Any], vocabulary: int | None) -> NDArray[Any]:
    if vocabulary is not None and len(ids) and int(ids.max()) >= vocabulary:
        raise ConversionError(
            f"tokenizer: it gives id {int(ids.max())}, the model has {vocabulary} tokens"
        )
    return ids


def _file_tokens(
    texts: Sequence[str | Path],
    tokenizer: str,
    made: Any,
    split: str | None,
    limit: int | None = None,
) -> NDArray[Any]:
    from glazoo.training import Data, tokens_of

    if split is not None:
        raise ConversionError(f"split: text files have none, got {split!r}")
    try:
        data = Data(files=tuple(Path(t) for t in texts), tokenizer=tokenizer)
        return tokens_of(data, made, limit)
    except OSError as e:
        raise ConversionError(f"cannot read {one_line(e)}") from e
    except ValueError as e:
        raise ConversionError(f"texts: {e}") from e


def _refusal(folder: Path, error: Exception) -> ConversionError:
    return ConversionError(f"cannot read the data set {folder}: {' '.join(str(error).split())}")


def _splits(folder: Path) -> Mapping[str, Any]:
    """Opens a data set; gives its splits."""
    with extra("train", instead=f"give text files in place of the folder {folder}"):
        import datasets
    try:
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(folder))
        else:
            # Text files count whole here, as they do when they are named one by one.
            whole = datasets.load_dataset_builder(str(folder)).name == "text"
            options = {"sample_by": "document"} if whole else {}
            # As a stream, nothing is copied into a cache and only what is needed is read.
            found = datasets.load_dataset(str(folder), streaming=True, **options)
    except Exception as e:
        raise _refusal(folder, e) from e
    if isinstance(found, dict):
        return found
    return {str(found.split or "train"): found}


def _chosen(splits: Mapping[str, Any], asked: str | None) -> str:
    name = asked
    if name is None and "train" in splits:
        name = "train"
    elif name is None and len(splits) == 1:
        (name,) = splits
    if name is None or name not in splits:
        wanted = "several splits and none named 'train'" if name is None else f"no split {name!r}"
        raise ConversionError(
            f"split: the data set has {wanted}; it has {', '.join(map(repr, splits))}"
        )
    return name


def _rows(folder: Path, data: Any, column: str) -> Iterator[str]:
    """Return the texts of one split; checks the column before it gives the first."""
    try:
        rows = iter(data)
        first = next(rows, None)
    except Exception as e:
        raise _refusal(folder, e) from e
    if first is None:
        return iter(())
    if column not in first:
        raise ConversionError(
            f"column: the data set {folder} has no {column!r}; it has {', '.join(map(repr, first))}"
        )
    return _texts(folder, itertools.chain([first], rows), column)


def _texts(folder: Path, rows: Iterable[Mapping[str, Any]], column: str) -> Iterator[str]:
    rows = iter(rows)
    while True:
        try:
            row = next(rows, None)
        except Exception as e:
            raise _refusal(folder, e) from e
        if row is None:
            return
        text = row[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise ConversionError(
                f"column: {column!r} of {folder} holds {type(text).__name__}, expected texts"
            )
        yield text


def _row_tokens(texts: Iterator[str], tokenizer: Any, limit: int | None) -> NDArray[Any]:
    # Four bytes a token, where a list would take eight and an object each.
    ids = array("i")
    end = tokenizer.eos_token_id
    while limit is None or len(ids) < limit:
        batch = list(itertools.islice(texts, _ROWS_AT_ONCE))
        if not batch:
            break
        for found in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            ids.extend(found)
            if end is not None:
                ids.append(end)
    return np.frombuffer(ids, dtype=np.int32)[:limit] if ids else np.zeros(0, np.int32)
