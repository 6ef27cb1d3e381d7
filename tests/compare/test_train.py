import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compare.doing import SMALL, run_of

import glazoo
from glazoo.compare.errors import CompareError
from glazoo.compare.model import Model, ModelConfig, align, count_parameters, shape_for
from glazoo.compare.plan import Plan, Rates, Tuning, best
from glazoo.compare.tasks import IGNORED, TASKS, Batch, Task, data_hash, draw, generator
from glazoo.compare.train import (
    Run,
    Training,
    _loss,
    _step_batch,
    evaluate_batch,
    evaluation_points,
    fit,
    train,
)
from glazoo.layers import GatedLinearAttention
from glazoo.layers.gates import GateModule
from glazoo.layers.parts import activate
from glazoo.spec import metaplasticize
from glazoo.zoo import load, names

ALL = [*glazoo.names(), *(f"metaplastic_{n}" for n in glazoo.names() if not load(n).metaplastic)]


def test_a_changed_copy_of_a_run_has_a_key_of_its_own() -> None:
    run = run_of("a")
    assert run.key != run.model_copy(update={"seed": 1}).key == run_of("b", seed=1).key


@pytest.mark.parametrize("name", ALL)
def test_every_spec_has_a_model_within_the_budget(name: str) -> None:
    spec = load(name)
    config = ModelConfig(width=16, heads=2, state_bytes=1024, mlp=8)
    shape = shape_for(spec, config)
    assert shape.state_bytes <= 1024
    model = Model(spec, config, 32)
    tokens = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    assert logits.shape == (2, 6, 32)
    assert torch.isfinite(logits).all()
    state = model.attention[0](torch.randn(2, 6, 16), output_state=True).state
    parts = {p.name for p in glazoo.lower(spec).state}
    held = sum(x[0].numel() * 4 for n, x in state.items() if n in parts)
    assert held == shape.state_bytes
    assert count_parameters(spec, config, 32) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_and_isevaluate_batchd(name: str) -> None:
    task = Task(name=name, vocab=32, length=48, load=2)  # type: ignore[arg-type]
    result = train(run_of("x", task=task))
    assert not result["diverged"]
    assert len(result["points"]) == len(evaluation_points(task))
    assert all(p["accuracy"] <= 1 for p in result["points"])
    grouped = [p for p in result["points"] if "groups" in p]
    assert len(grouped) == (len(result["points"]) if name == "overwriting" else 0)
    assert result["curve"][-1]["step"] == 3


def test_a_run_is_determined_by_its_description() -> None:
    torch.manual_seed(5)
    one = train(run_of("x"))
    torch.manual_seed(6)
    two = train(run_of("y"))
    for key in ("accuracy", "loss", "points", "curve", "data_hash", "key"):
        assert one[key] == two[key]
    assert train(run_of("x", 1))["loss"] != one["loss"]


def test_a_small_memory_learns_to_recall() -> None:
    run = run_of(
        "x",
        task=Task(name="mqar", vocab=32, length=8, load=2),
        model=ModelConfig(width=32, heads=2, state_bytes=2048, mlp=16),
        training=Training(steps=120, batch=32, eval_examples=64, curriculum=0.0),
        rate=3e-2,
    )
    result = train(run)
    # Guessing one of the two values that were shown is right half of the time.
    assert result["accuracy"] > 0.75
    assert result["curve"][0]["accuracy"] < result["curve"][-1]["accuracy"]


def test_a_curriculum_rises_to_the_whole_load_and_keeps_the_answers() -> None:
    task = Task(name="mqar", vocab=64, length=96, load=16)
    run = run_of("x", task=task, training=Training(steps=10, batch=4))
    asked = [int((_step_batch(run, i).labels != IGNORED).sum()) // 4 for i in range(10)]
    assert asked == sorted(asked)
    assert asked[0] == 4
    assert asked[5:] == [16] * 5


def test_a_fixed_training_set_repeats_every_epoch() -> None:
    run = run_of("x", training=Training(steps=10, batch=4, examples=12))
    hashes = [data_hash(_step_batch(run, i)) for i in range(6)]
    assert hashes[:3] == hashes[3:]
    assert len(set(hashes)) == 3


def test_divergence_ends_a_run_and_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glazoo.compare.train._loss", lambda *_: torch.tensor(torch.nan))
    result = train(run_of("x"))
    assert result["diverged"]
    assert result["tokens"] == 0
    assert result["points"]


def test_the_best_rates_are_those_of_the_most_accurate_runs_that_did_not_diverge() -> None:
    runs = [run_of("x", rate=r, plasticity_rate=p) for r, p in ((0.1, 1.0), (0.1, 9.0), (0.2, 1.0))]

    def results(*found: tuple[bool, float, float]) -> dict[str, dict[str, object]]:
        names = ("diverged", "accuracy", "loss")
        return {r.key: dict(zip(names, f, strict=True)) for r, f in zip(runs, found, strict=False)}

    diverged = results((False, 0.5, 1.0), (True, 0.9, 0.1), (False, 0.6, 2.0))
    assert best(runs, diverged) == (0.2, 1.0)
    tied = results((False, 0.5, 1.0), (False, 0.5, 0.9), (False, 0.4, 0.0))
    assert best(runs, tied) == (0.1, 9.0)
    assert best(runs, results((False, 0.5, 1.0), (False, 0.5, 0.9))) is None
    # Over seeds it is the mean that counts.
    again = [r.model_copy(update={"seed": 1}) for r in runs]
    runs = [*runs, *again]
    both = results(
        *((False, x, 1.0) for x in (0.5, 0.5, 0.9)), *((False, x, 1.0) for x in (0.8, 0.5, 0.1))
    )
    assert best(runs, both) == (0.1, 1.0)


def test_an_aligned_query_is_the_key_of_the_same_token_one_place_later() -> None:
    layer = GatedLinearAttention(
        "deltanet", 16, num_heads=2, num_key_heads=2, head_k_dim=4, head_v_dim=8
    )
    token, following = torch.randn(8), torch.randn(8)
    asks, stored = torch.cat([token, torch.zeros(8)]), torch.cat([torch.zeros(8), token])
    apart = (layer.q_proj(asks) - layer.k_proj(stored)).detach()
    assert float(apart.abs().max()) > 0.01
    align(layer)
    assert torch.allclose(layer.q_proj(asks), layer.k_proj(stored), atol=1e-6)
    several = GatedLinearAttention(
        "gated_deltaproduct", 16, num_heads=2, num_key_heads=2, head_k_dim=4, head_v_dim=8
    )
    align(several)
    assert torch.allclose(several.q_proj(asks), several.k_proj(stored)[:8], atol=1e-6)
    x = torch.cat([following, token]).expand(1, 1, 16)
    # Identity convolutions: the activation alone is left of them.
    convolved = layer.k_conv(layer.k_proj(x))[0]
    assert torch.allclose(convolved, torch.nn.functional.silu(layer.k_proj(x)), atol=1e-6)


def test_an_aligned_window_asks_for_what_its_value_was_stored_under() -> None:
    layer = GatedLinearAttention(
        "deltanet", 16, num_heads=2, num_key_heads=2, head_k_dim=4, head_v_dim=8
    )
    align(layer, window=True)
    x = torch.randn(1, 6, 16)
    q, k = layer.q_conv(layer.q_proj(x))[0], layer.k_conv(layer.k_proj(x))[0]
    assert torch.equal(q, k)
    # Every token of the window takes part in the last one's key.
    for back in range(4):
        changed = x.clone()
        changed[:, 5 - back] += 1
        assert not torch.allclose(layer.k_conv(layer.k_proj(changed))[0][:, 5], k[:, 5])
    v = layer.v_proj(x)
    assert torch.allclose(layer.v_conv(v)[0], torch.nn.functional.silu(v), atol=1e-6)


def test_a_model_of_vectors_reads_and_gives_channels() -> None:
    task = Task(name="regression", length=24, load=8, channels=3)
    model = Model(load("deltanet"), SMALL, task.interface)
    batch = draw(task, 5, generator("vectors"))
    out = model(batch.inputs)
    assert out.shape == (5, 24, 3)
    # The channel that all tokens share is one at the start, whatever else a token holds.
    assert torch.equal(model.embedding(batch.inputs)[..., 0], torch.ones(5, 24))
    given, wanted = out[:, 16:], batch.labels[:, 16:]
    half = float((given - wanted).detach().square().mean()) / 2
    assert float(_loss(model, batch, "cpu").detach()) == pytest.approx(half, rel=1e-5)
    found = evaluate_batch(model, batch, "cpu", size=2)
    assert found["loss"] == pytest.approx(half, rel=1e-5)
    explained = 1 - 2 * half / float(wanted.square().mean())
    assert found["accuracy"] == pytest.approx(explained, rel=1e-5)


def test_an_aligned_layer_gives_back_the_values_it_reads() -> None:
    layer = GatedLinearAttention(
        "linear_attention", 16, num_heads=2, num_key_heads=2, head_k_dim=4, head_v_dim=8
    )
    torch.nn.init.orthogonal_(layer.v_proj.weight)
    align(layer)
    x = torch.randn(3, 16)
    assert torch.allclose(layer.o_proj(layer.v_proj(x)), x, atol=1e-5)


@pytest.mark.parametrize("name", names())
def test_every_variant_starts_as_a_memory_that_lasts(name: str) -> None:
    torch.manual_seed(0)
    spec = load(name)
    heads = 1 if spec.layer.heads.sharing == "one" else 2
    layer = GatedLinearAttention(
        spec,
        16,
        num_heads=heads,
        num_key_heads=heads,
        head_k_dim=4,
        head_v_dim=16 // heads,
    )
    align(layer)
    # A token that is nothing but the channel which all tokens share.
    x = torch.zeros(1, 1, 16)
    x[..., 0] = 1.0
    gates = {n: m for n, m in layer.named_modules() if isinstance(m, GateModule)}
    for gate_name, gate in gates.items():
        value = gate(x).value.detach()
        if gate_name.endswith("decay"):
            assert float(value.mean()) == pytest.approx(-0.01, rel=1e-3)
        elif gate_name in ("write", "erase"):
            assert float(value.mean()) == pytest.approx(0.1, rel=1e-3)
    out = spec.layer.output
    if out.gate != "none":
        opened = activate(out.gate, layer.g_proj(x)).detach()
        assert float(opened.min()) > 0.5


@pytest.mark.parametrize("name", ["longhorn", "mamba2", "palimpsa", "rwkv7"])
def test_layers_start_as_loud_as_what_they_get(name: str) -> None:
    torch.manual_seed(0)
    model = Model(load(name), SMALL.model_copy(update={"layers": 2}), 64)
    sizes = []
    for layer in model.attention:
        layer.register_forward_hook(
            lambda _module, _inputs, result: sizes.append(
                float(result.output.detach().square().mean().sqrt())
            )
        )
    # Other tokens than those that the start was measured on.
    model(torch.randint(64, (16, 48)))
    assert len(sizes) == 2
    assert all(0.5 < size < 2 for size in sizes), sizes


def test_the_plasticity_may_learn_more_slowly_than_the_rest() -> None:
    def plasticity(share: float) -> float:
        training = Training(steps=3, batch=4, eval_examples=4)
        spec = load("metaplastic_deltanet")
        run = run_of("x", spec=spec, training=training, plasticity_rate=share)
        torch.manual_seed(0)
        model = Model(run.spec, run.model, run.task.interface)
        scale = model.attention[0].metaplastic.b_scale
        with torch.no_grad():
            scale.fill_(0.5)
        fit(model, run)
        return float((scale.detach() - 0.5).abs().max())

    assert 0 < plasticity(1e-3) < 0.01 * plasticity(1.0)
    assert plasticity(0.0) == 0


def test_an_interrupted_run_ends_as_it_would_have_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(
        "x", spec=load("metaplastic_deltanet"), training=Training(steps=9, batch=4, eval_examples=4)
    )
    whole = train(run, folder=tmp_path / "whole")
    monkeypatch.setattr("glazoo.compare.train._SAVE_EVERY", 0.0)
    drawn, steps = _step_batch, []

    def interrupted(run: Run, step: int) -> Batch:
        steps.append(step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return drawn(run, step)

    monkeypatch.setattr("glazoo.compare.train._step_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run, folder=tmp_path / "parts")
    assert len(list((tmp_path / "parts" / "partial").iterdir())) == 1
    rest = train(run, folder=tmp_path / "parts")
    assert steps[6:][:4] == [5, 6, 7, 8]
    assert not list((tmp_path / "parts" / "partial").iterdir())
    for same in ("accuracy", "loss", "points", "curve", "plasticity", "tokens"):
        assert rest[same] == whole[same]


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])
def test_a_converted_model_goes_on_from_what_its_source_is(tmp_path: Path, name: str) -> None:
    source = load(name)
    shape = shape_for(source, SMALL)
    same = SMALL.model_copy(update={"key_size": shape.key_size})
    before = run_of("before", spec=source, kept=True)
    after = run_of("after", spec=metaplasticize(source), model=same, before=before)
    trained = train(before, folder=tmp_path)
    on = train(after, folder=tmp_path)
    assert on["accuracy_at_first"] == trained["accuracy"]
    assert any(on["plasticity"])
    # Other data than before, the same for the source that is trained on.
    rival = train(run_of("rival", spec=source, model=same, before=before), folder=tmp_path)
    assert rival["first_batch_hash"] == on["first_batch_hash"] != trained["first_batch_hash"]
    assert rival["accuracy_at_first"] == trained["accuracy"]
    # Weights that were lost are made again.
    shutil.rmtree(tmp_path / "weights")
    again = train(after, folder=tmp_path)
    assert (again["accuracy"], again["loss"]) == (on["accuracy"], on["loss"])
    alone = train(after)
    assert (alone["accuracy"], alone["loss"]) == (on["accuracy"], on["loss"])


def test_what_depends_on_a_choice_is_run_after_it() -> None:
    specs = {n: load(n) for n in ("deltanet", "metaplastic_deltanet", "longhorn")}
    task = Task(name="records", vocab=32, length=32, load=2)
    plan = Plan(
        specs,
        task,
        (SMALL,),
        Training(steps=2),
        (1e-3, 2e-3),
        seeds=2,
        plasticity_rates=(0.1, 1.0, 10.0),
        selection_seeds=2,
        tuning=Tuning(Training(steps=1), (1e-3,)),
    )
    plan.check()
    labels = ["deltanet, before", "deltanet, trained on", "metaplastic_deltanet, converted"]
    labels += ["longhorn, before", "longhorn, trained on"]
    assert [(a.task.name, a.label) for a in plan.arms] == [
        (t, label) for t in ("records", "static") for label in labels
    ]
    results: dict[str, dict[str, object]] = {}
    stages = []
    while todo := [r for r in plan.wanted(results) if r.key not in results]:
        now = [r for r in todo if r.before is None or r.before.key in results]
        assert now
        stages.append({(r.label, r.selection) for r in now})
        for r in now:
            good = r.rate == 2e-3 or r.plasticity_rate == 10.0
            results[r.key] = {"accuracy": 0.5 + good, "loss": 1.0, "diverged": False}
    selecting = {("deltanet, before", True), ("longhorn, before", True)}
    assert stages[0] == selecting
    assert stages[1] >= {("deltanet, before", False), ("metaplastic_deltanet, converted", True)}
    assert len(results) == sum(count for _, count in plan.counts())
    converted = next(a for a in plan.arms if a.spec.metaplastic)
    assert plan.chosen(converted, results) == Rates(1e-3, 10.0)
    assert all(r.before and r.before.rate == 2e-3 for r in plan.reported(converted, results))
    seeds = {r.seed for r in plan.reported(converted, results)}
    assert seeds.isdisjoint(r.seed for r in plan.selection(converted, results))


def test_the_default_plasticity_rate_is_that_of_what_is_trained() -> None:
    for name, gain in (("mamba2", None), ("deltanet", "exact"), ("deltanet", "first_order")):
        source = glazoo.load(name)
        specs = {"source": source, "form": metaplasticize(source, gain=gain)}
        config = ModelConfig(width=16, heads=2, state_bytes=600, mlp=0)
        plan = Plan(specs, Task(name="mqar", load=4), (config,), Training(steps=1), (1e-3,), 1)
        shares = {a.label: plan.choices(a) for a in plan.arms}
        assert shares == {"source": [Rates(1e-3, 1.0)], "form": [Rates(1e-3, 1.0)]}
        plan = replace(plan, tuning=Tuning(Training(steps=1), (2e-3,)))
        shares = {a.label: plan.choices(a) for a in plan.arms}
        assert shares["form, converted"] == [Rates(2e-3, 10.0)]
        assert shares["source, trained on"] == [Rates(2e-3, 1.0)]


def test_the_start_that_a_config_asks_for() -> None:
    config = ModelConfig(
        width=16,
        heads=4,
        key_size=3,
        value_size=8,
        mlp=0,
        start="drawn",
        decays=(0.01, 0.16),
        plasticity=0.66,
        trains_prior=False,
    )
    for name in ("gated_deltanet", "metaplastic_gated_deltanet", "palimpsa", "gla", "longhorn"):
        spec = load(name)
        shape = shape_for(spec, config)
        assert (shape.key_size, shape.heads * shape.value_size) == (3, 32)
        layer = Model(spec, config, 32).attention[0]
        assert isinstance(layer, GatedLinearAttention)
        rates = getattr(getattr(layer, "decay", None), "A_log", None)
        if rates is not None:
            assert torch.allclose(rates.exp(), torch.tensor([0.01, 0.06, 0.11, 0.16]))
        if layer.metaplastic is not None:
            assert layer.metaplastic.ip_log is not None
            assert not layer.metaplastic.ip_log.requires_grad
            beta = torch.ones(1, 1, 4)
            x = torch.zeros(1, 1, 16)
            opened = layer.metaplastic(x, beta)["b"].detach()
            # Both start near two thirds of the write gate: softplus(1) / 2 is 0.657.
            assert torch.allclose(opened, torch.tensor(0.66), atol=0.005)


def test_the_start_does_not_need_the_engine_that_is_asked_for() -> None:
    # One that would refuse to run, as the kernels do on a CPU.
    model = Model(load("gla"), SMALL, 64, impl="none such")
    with pytest.raises(ValueError, match="none such"):
        model(torch.zeros(1, 4, dtype=torch.long))


def test_equal_parameters_are_equal_to_within_a_channel() -> None:
    specs = {n: load(n) for n in ("deltanet", "palimpsa", "longhorn")}
    task = Task(name="mqar", vocab=32, length=16, load=4)
    plan = Plan(specs, task, (SMALL,), Training(steps=1), (1e-3,), 1)
    counts = [arm.parameters for arm in plan.arms]
    assert max(counts) - min(counts) <= 2 * SMALL.width + 1
    alone = Plan(specs, task, (SMALL,), Training(steps=1), (1e-3,), 1, equal_parameters=False)
    counts = [arm.parameters for arm in alone.arms]
    assert max(counts) - min(counts) > 2 * SMALL.width


def test_a_state_budget_that_no_head_holds_is_refused() -> None:
    with pytest.raises(CompareError, match="too few for 'gla'"):
        shape_for(load("gla"), ModelConfig(width=64, heads=4, state_bytes=128))
    with pytest.raises(CompareError, match="rotates pairs"):
        shape_for(load("retnet"), ModelConfig(width=64, heads=4, state_bytes=256))
