"""Keeping a converted folder's token ids those of its source.

transformers chooses a tokenizer's class by `model_type` too, and for some families over the class
that the files name, because published files are known to be wrong. A converted folder has a
`model_type` of its own: what the source's was resolved to has to be in its files, so that programs
that do not know glazoo give the same ids.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from glazoo.errors import ConversionError
from glazoo.strictjson import dumps, loads

__all__ = ["TEXTS", "TOKENIZER_CONFIG", "difference", "settled", "source_tokenizer"]

TOKENIZER_CONFIG = "tokenizer_config.json"
_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_STARTS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken", "tiktoken")

TEXTS = (
    "year 2023",
    " 3.14159 and 1,000,000 or 0x7F, at 12:34:56",
    "Hello, world! It's the reader's 1st test; don't SHOUT.",
    "def f(x):\n\treturn  x**2   # two  spaces\n\n\n",
    "na\u00efve caf\u00e9, cafe\u0301 and \u00dcbergr\u00f6\u00dfe",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f642\U0001f1eb\U0001f1f7 \u200bzero\u200dwidth\u00a0no-break",
    "<s>[INST] markup </s> <|im_start|>user<|im_end|>",
    "  leading and trailing  ",
)
"""Digits, punctuation, case, white space, accents composed and not, scripts, and markup: what
splitters treat in different ways."""


def _has_tokenizer(folder: Path) -> bool:
    return any(
        p.name.startswith(_STARTS) or p.suffix in (".model", ".tiktoken")
        for p in folder.iterdir()
        if p.is_file()
    )


def settled(
    folder: Path, model_type: str, converted_type: str
) -> tuple[dict[str, Any] | None, list[str]]:
    """Finds what the files of a source have to say so that its tokenizer, and its processor, stay
    what they are under another `model_type`.

    Args:
        folder: the source folder.
        model_type: its `model_type`.
        converted_type: that of the converted folder.

    Returns:
        The content of the converted folder's tokenizer_config.json, None where the source's does;
        and warnings.
    """
    try:
        own = source_tokenizer(folder)
    except ConversionError as e:
        return None, [str(e)]
    if own is None:
        return None, []
    path = folder / TOKENIZER_CONFIG
    found = loads(path.read_bytes()) if path.is_file() else {}
    content = {**found, **_processor(folder, model_type, found)}
    if _kind(folder, converted_type) is not type(own):
        content["tokenizer_class"] = type(own).__name__
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            if file.is_file() and file.name != TOKENIZER_CONFIG:
                (Path(scratch) / file.name).symlink_to(file.resolve())
        (Path(scratch) / TOKENIZER_CONFIG).write_text(dumps(content, indent=2), "utf-8")
        problem = _problem(Path(scratch), _ids(own), converted_type)
    warnings = [] if problem is None else [f"token ids change without glazoo: {problem}"]
    return (None if content == found else content), warnings


def _kind(folder: Path, model_type: str) -> type[Any] | None:
    try:
        return type(_load(folder, model_type))
    except Exception:
        # Loaders raise anything. A tokenizer that does not load by its type is named by its class.
        return None


def _processor(folder: Path, model_type: str, found: dict[str, Any]) -> dict[str, Any]:
    """Names the processor that transformers looks up by `model_type`, where no file names one."""
    from transformers.models.auto import processing_auto

    name = processing_auto.PROCESSOR_MAPPING_NAMES.get(model_type)  # type: ignore[attr-defined]
    files = [p for p in map(folder.joinpath, _PROCESSOR_FILES) if p.is_file()]
    if name is None or not files or "processor_class" in found:
        return {}
    files.append(folder / "config.json")
    named = any("processor_class" in loads(p.read_bytes()) for p in files)
    return {} if named else {"processor_class": name}


def source_tokenizer(folder: Path) -> Any | None:
    """Return the tokenizer of a source folder, None if it has none.

    Raises:
        ConversionError: it does not load.
    """
    try:
        if not _has_tokenizer(folder):
            return None
        found = _load(folder)
        _ids(found)
    except Exception as e:
        reason = " ".join(str(e).split())
        raise ConversionError(
            f"the source's tokenizer does not load here: token ids were not compared ({reason})"
        ) from e
    return found


def difference(own: Any, destination: Path, converted_type: str) -> str | None:
    """Return how the token ids of a converted folder differ from those of its source's tokenizer,
    with glazoo or without it; None if they do not."""
    expected = _ids(own)
    for model_type in (None, converted_type):
        if (problem := _problem(destination, expected, model_type)) is not None:
            return problem if model_type is None else f"without glazoo, {problem}"
    return None


def _problem(folder: Path, expected: list[list[int]], model_type: str | None) -> str | None:
    try:
        got = _ids(_load(folder, model_type))
    except Exception as e:
        return f"the tokenizer does not load: {' '.join(str(e).split())}"
    for text, one, other in zip((*TEXTS, *TEXTS), expected, got, strict=False):
        if one != other:
            return f"{text!r} has the ids {other}, on the source {one}"
    return None if got == expected else "special tokens or the number of tokens differ"


def _ids(tokenizer: Any) -> list[list[int]]:
    """Return the ids of every text, with special tokens and without, and those of special
    tokens."""
    return [
        *(tokenizer(text)["input_ids"] for text in TEXTS),
        *(tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS),
        sorted(tokenizer.all_special_ids),
        [len(tokenizer)],
    ]


def _load(folder: Path, model_type: str | None = None) -> Any:
    """Loads a folder's tokenizer; with a `model_type`, as a program does that knows no such
    type."""
    from transformers import AutoTokenizer, PreTrainedConfig

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if model_type is not None:
        raw = loads((folder / "config.json").read_bytes())
        named = {k: v for k, v in raw.items() if k == "tokenizer_class"}
        options["config"] = PreTrainedConfig.from_dict({**named, "model_type": model_type})
    return AutoTokenizer.from_pretrained(folder, **options)
