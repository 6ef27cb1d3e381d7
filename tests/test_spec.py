"""The spec algebra, the validation of specs, loading them, and what is frozen for users."""

from __future__ import annotations

import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from oracles import gate_shapes

import glazoo
from glazoo.spec import Posterior, Spec, SpecError, freeze, metaplasticize

GOLDEN = Path(__file__).parent / "golden"
FROZEN = [n for n in glazoo.names() if not glazoo.load(n).metaplastic]
METAPLASTIC = [n for n in glazoo.names() if glazoo.load(n).metaplastic]
REQUIRED = [
    "linear_attention",
    "retnet",
    "lightning",
    "simple_gla",
    "mamba2",
    "gla",
    "hgrn2",
    "lightnet",
    "rodimus",
    "rwkv6",
    "rwkv7",
    "mlstm",
    "based",
    "rebased",
    "mamba3",
    "deltanet",
    "gated_deltanet",
    "kda",
    "gdn2",
    "comba",
    "gated_deltaproduct",
    "qdelta",
    "qed",
    "eda",
    "implicit_delta",
    "longhorn",
    "precond_gated_deltanet",
    "precond_kda",
    "mesanet",
    "palimpsa",
    "meta_mamba2",
]

MINIMAL = """
name = "mine"
title = "Mine"
summary = "A test"
reference = { paper = "None" }
[posterior]
precision = "frozen"
correction = "none"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_the_shipped_variants() -> None:
    assert set(REQUIRED) <= set(glazoo.names())
    assert all(glazoo.load(n).name == n for n in glazoo.names())


@pytest.mark.parametrize(
    ("name", "gate"), [(name, gate) for name in FROZEN for gate in (None, *gate_shapes(name))]
)
def test_freeze_inverts_metaplasticize(name: str, gate: str | None) -> None:
    source = glazoo.load(name)
    metaplastic = metaplasticize(source, gate=gate)
    assert metaplastic.metaplastic
    assert metaplastic != source
    assert metaplastic.importance is not None
    assert freeze(metaplastic) == source
    before, after = source.model_dump(), metaplastic.model_dump()
    changed = {k for k in before if before[k] != after[k]}
    assert changed == {"name", "counterpart", "posterior", "importance"}


@pytest.mark.parametrize("name", FROZEN)
def test_importance_is_one_vector_over_keys_by_default(name: str) -> None:
    metaplastic = metaplasticize(glazoo.load(name))
    assert metaplastic.importance is not None
    assert metaplastic.importance.gate.shape == "head"


EXACT = ("deltanet", "eda", "gated_deltanet", "gated_deltanet_sigmoid", "kda", "kda_bounded")
"""The shipped sources whose write gate is the rate of a precision."""


@pytest.mark.parametrize("name", FROZEN)
def test_a_delta_rule_gets_the_exact_gain_where_it_has_one(name: str) -> None:
    source = glazoo.load(name)
    default = metaplasticize(source)
    assert default.importance is not None
    if name in EXACT:
        assert (default.posterior.gain, default.posterior.beta) == ("exact", "rate")
        assert default.importance.gate.tie == "precision"
        first = metaplasticize(source, gain="first_order")
        assert (first.posterior.gain, first.posterior.beta) == ("first_order", "precision")
        assert first.importance is not None
        assert first.importance.gate.tie == "write"
        assert freeze(first) == freeze(default) == source
        assert default == metaplasticize(source, gain="exact")
    else:
        assert (default.posterior.gain, default.posterior.beta) == (
            source.posterior.gain,
            "precision",
        )
        assert default.importance.gate.tie == "write"


@pytest.mark.parametrize(
    ("name", "gain", "message"),
    [
        ("gla", "exact", "gain: 'exact' is not possible here: 'gla' subtracts no prediction"),
        ("comba", "exact", "'comba' predicts otherwise than it writes"),
        ("rwkv7", "exact", "'rwkv7' predicts otherwise than it writes"),
        ("gated_deltaproduct", "exact", r"factor 2, tie 'none'\) may exceed 1"),
        ("implicit_delta", "first_order", "but that of 'implicit_delta' is 'exact'"),
        ("kda", "half", "gain: got 'half', accepted are 'first_order' and 'exact'"),
    ],
)
def test_a_gain_that_a_source_does_not_have(name: str, gain: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        metaplasticize(glazoo.load(name), gain=gain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"posterior": {"precision": "frozen"}, "importance": None}, "posterior.beta = rate"),
        ({"posterior": {"gain": "first_order"}}, "it is the first-order gain"),
        ({"posterior": {"correction": "diagonal"}}, "posterior.beta = rate belongs to"),
        ({"posterior": {"beta": "precision"}}, "tie = precision belongs to importance.gate"),
        ({"write": {"tie": "precision"}}, "may exceed 1"),
        ({"decay": {"tie": "precision"}}, "tie = precision belongs to importance.gate"),
        ({"write": {"factor": 2.0}}, "factor 2, tie 'none'.* a rate above 1 has no precision"),
        ({"write": {"parameterization": "softplus"}}, "'softplus'.* may exceed 1"),
        ({"write": {"shape": "none"}}, "every observation is infinitely precise"),
        ({"erase": {"base": "prev"}}, "gain = exact predicts with the written key"),
    ],
)
def test_a_rate_where_it_has_no_meaning(change: dict[str, Any], message: str) -> None:
    data = metaplasticize(glazoo.load("gated_deltanet")).model_dump()
    for part, values in change.items():
        data[part] = None if values is None else data[part] | values
    with pytest.raises(ValueError, match=message):
        Spec.model_validate(data)


@pytest.mark.parametrize("name", METAPLASTIC)
def test_a_metaplastic_spec_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match=f"'{name}' is metaplastic already"):
        metaplasticize(glazoo.load(name))


@pytest.mark.parametrize("name", METAPLASTIC)
def test_freezing_what_was_published_as_metaplastic(name: str) -> None:
    spec = glazoo.load(name)
    if spec.importance is not None and spec.importance.evidence == "key_squared":
        frozen = freeze(spec)
        assert frozen.name == f"frozen_{name}"
        assert not frozen.metaplastic
    else:
        with pytest.raises(SpecError, match="has no frozen counterpart"):
            freeze(spec)


def test_a_frozen_spec_is_not_frozen_again() -> None:
    with pytest.raises(SpecError, match="'gla' is frozen already"):
        freeze(glazoo.load("gla"))


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(SpecError, match=r"gate: got 'key', accepted are 'head' and 'value'"):
        metaplasticize(glazoo.load("gla"), gate="key")  # type: ignore[arg-type]


def test_meta_mamba2_is_the_metaplastic_form_of_mamba2_up_to_its_layer() -> None:
    published = glazoo.load("meta_mamba2")
    ours = metaplasticize(glazoo.load("mamba2"), gate="value")
    assert published.posterior == ours.posterior
    assert glazoo.lower(published).kernel == glazoo.lower(ours).kernel
    assert glazoo.lower(published).recurrence == glazoo.lower(ours).recurrence


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mamba22", "mamba2"),
        ("gated_delta_net", "gated_deltanet"),
        ("metaplastic_kad", "metaplastic_kda"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(SpecError, match=f"there is no variant '{name}'; did you mean '{hint}'"):
        glazoo.load(name)


def test_a_name_like_nothing_lists_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"known are based, bayesian_layer, comba"):
        glazoo.load("zzzzzzzz")


def test_load_gives_back_a_spec_and_reads_a_path(tmp_path: Path) -> None:
    spec = glazoo.load(write(tmp_path, MINIMAL))
    assert glazoo.load(str(tmp_path / "mine.toml")) == spec
    assert glazoo.load(spec) is spec
    assert spec.name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MINIMAL + "\n[decya]\nshape = 'head'",
            r"mine\.toml: unknown key decya; did you mean 'decay'",
        ),
        (MINIMAL + "\n[decay]\nshpe = 'head'", r"unknown key decay\.shpe; did you mean 'shape'"),
        (MINIMAL + "\n[decay]\nshape = 'heads'", r"decay\.shape: Input should be .*got 'heads'"),
        (
            MINIMAL.replace('"none"', '"diagonal"'),
            r"precision, correction, gain = frozen, diagonal, first_order contradict",
        ),
        (
            MINIMAL.replace('"frozen"', '"diagonal"').replace('"none"', '"diagonal"'),
            r"posterior\.precision = 'diagonal' and importance = unset contradict",
        ),
        (MINIMAL.replace('title = "Mine"', ""), r"title is missing"),
        (MINIMAL + "\n[read]\nbonus = true", r"read\.bonus needs read\.when = pre"),
        (MINIMAL + "\n[decay]\nsource = 'fixed'", r"a fixed gate names a `schedule`"),
        (
            MINIMAL + "\n[erase]\nbase = 'prev'",
            r"\[erase\] belongs to posterior\.correction = full",
        ),
        (
            MINIMAL + "\n[write]\nshape = 'key'",
            r"a key-shaped input gate belongs to the key stream",
        ),
        (MINIMAL + "key = 'one_minus_decay'", r"unknown key posterior\.key"),
        (
            MINIMAL + "\n[write]\nshape = 'value'\n[read]\nnormalizer = 'sum'",
            r"read\.normalizer counts written keys: it takes a write gate per head",
        ),
        (
            "key = 'one_minus_decay'\n"
            + MINIMAL
            + "\n[decay]\nshape = 'key'\n[steps]\nsource = 'lagged'\ncount = 2",
            r"steps\.source = lagged repeats a key of its own: key = operand",
        ),
        ("name = ", r"not a TOML file"),
        (MINIMAL.replace('"mine"', '"Mine!"'), r"name: .*got 'Mine!'"),
        (MINIMAL + "\n[steps]\ncount = 0", r"steps\.count: .*got 0"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        glazoo.load(write(tmp_path, text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read the spec file .*absent\.toml: No such file"):
        glazoo.load(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"it is not UTF-8 text"):
        glazoo.load(tmp_path / "binary.toml")


def test_specs_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        glazoo.load("gla").name = "other"  # type: ignore[misc]


def test_every_combination_of_axes_is_decided() -> None:
    """Each of the 36 combinations is either a posterior or refused with the accepted ones."""
    accepted = 0
    for precision in ("frozen", "isotropic", "diagonal", "full"):
        for correction in ("none", "diagonal", "full"):
            for gain in ("first_order", "exact", "flow"):
                values = {"precision": precision, "correction": correction, "gain": gain}
                if _is_posterior(values):
                    accepted += 1
                else:
                    with pytest.raises(ValueError, match="contradict each other; accepted are"):
                        Posterior.model_validate(values)
    assert accepted == 18


def _is_posterior(values: dict[str, str]) -> bool:
    try:
        Posterior.model_validate(values)
    except ValueError:
        return False
    return True


def test_files_hold_only_what_is_not_default() -> None:
    """A shipped file that states a default hides which values make the variant."""
    for name in glazoo.names():
        text = (resources.files("glazoo.specs") / f"{name}.toml").read_text("utf-8")
        assert Spec.model_validate(tomllib.loads(text)) == glazoo.load(name)


def test_every_field_is_described() -> None:
    schema = glazoo.schema()
    models = {"Spec": schema} | schema["$defs"]  # type: ignore[operator]
    bare = [
        f"{model}.{field}"
        for model, definition in models.items()
        for field, value in definition["properties"].items()
        if "description" not in value
    ]
    assert bare == []


def test_the_schema_is_frozen() -> None:
    """A change is a decision: regenerate with `glazoo schema > tests/golden/schema.json`."""
    assert glazoo.schema() == json.loads((GOLDEN / "schema.json").read_text())


def test_the_public_names_are_frozen() -> None:
    golden = json.loads((GOLDEN / "names.json").read_text())
    assert sorted(glazoo.__all__) == golden["glazoo"]
    assert set(dir(glazoo)) == {*golden["glazoo"], "__version__"}
    assert list(glazoo.names()) == golden["variants"]
    operands = {n: [o.name for o in glazoo.lower(glazoo.load(n)).operands] for n in glazoo.names()}
    assert operands == golden["operands"]
    assert list(glazoo.State._fields) == golden["state"]
