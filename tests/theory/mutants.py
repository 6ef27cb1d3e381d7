"""Wrong recurrences: the reference engine with one mistake each.

A mutant is a replacement in the reference's source. A replacement that no longer fits the source is
an error, so that no mutant can silently become the truth.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from dataclasses import dataclass
from unittest import mock

import glazoo
from glazoo import engines
from glazoo.engines import reference


@dataclass(frozen=True)
class Mutant:
    """One mistake, the variants that it can show in, and statements that must catch it."""

    name: str
    edits: tuple[tuple[str, str], ...]
    specs: tuple[str, ...]
    caught_by: tuple[str, ...]

    def op(self):
        """Return the mistaken implementation of `glazoo.api.attention`."""
        source = inspect.getsource(reference)
        for old, new in self.edits:
            if old not in source:
                raise AssertionError(f"{self.name}: the reference has no {old!r} any more")
            source = source.replace(old, new)
        module = types.ModuleType(f"mutant_{self.name}")
        sys.modules[module.__name__] = module  # dataclasses look their module up
        exec(compile(source, module.__name__, "exec"), module.__dict__)

        @functools.wraps(glazoo.api.attention)
        def op(*args, **kwargs):
            with mock.patch.dict(engines._ENGINES, {"mutant": module.run}):
                return glazoo.api.attention(*args, impl="mutant", **kwargs)

        return op


_EVIDENCE = "square, axes = w.k.square(),"
_HEBBIAN_WRITE = "self.memory = w.decay * self.memory + w.k * (w.beta * w.v)"

MUTANTS = (
    Mutant(
        "decay_after_write",
        (
            (
                "                self._observe_and_correct(write)\n",
                "                self._observe_and_correct(replace(write, decay=self.one))\n"
                "                self.memory = self.memory * write.decay\n"
                "                if self.importance is not None:\n"
                "                    self.importance = self.importance * write.decay\n",
            ),
        ),
        ("gla", "palimpsa"),
        (
            "decay-is-a-gauge",
            "head-gate-is-a-query-gate",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "missing_prior_pull",
        (("w.decay * (old + self.prior) / (drift + self.prior)", "w.decay"),),
        ("gated_deltanet",),
        (
            "metaplastic-delta-is-generalised-delta",
            "delta-rule-solves-a-triangular-system",
            "one-hot-keys-are-exact-inference",
        ),
    ),
    Mutant(
        "key_instead_of_its_square",
        ((_EVIDENCE, _EVIDENCE.replace("w.k.square()", "w.k")),),
        ("palimpsa",),
        (
            "importance-has-a-window",
            "uncertainty-never-grows-without-forgetting",
            "uncertainty-is-below-the-prior's",
            "diagonal-precision-underestimates-marginals",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "beta_twice",
        ((_HEBBIAN_WRITE, _HEBBIAN_WRITE.replace("w.beta", "w.beta * w.beta")),),
        ("mamba2", "palimpsa"),
        (
            "mamba2-is-simple-gla",
            "hebbian-write-gate-is-a-value",
            "palimpsa-is-metaplastic-simple-gla",
            "precision-has-units",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "wrong_group_mapping",
        (
            (
                'ops["q"].repeat_interleave(call.groups, 2)',
                'ops["q"].repeat(1, 1, call.groups, 1)',
            ),
        ),
        ("gated_deltanet",),
        (
            "full-step-recalls",
            "uncertainty-is-below-the-prior's",
            "heads-permute",
            "value-head-reads-its-group",
            "delta-rule-solves-a-triangular-system",
        ),
    ),
    Mutant(
        "wrong_group_mapping_everywhere",
        (
            (
                'ops["q"].repeat_interleave(call.groups, 2)',
                'ops["q"].repeat(1, 1, call.groups, 1)',
            ),
            (
                "ops[name][:, i].repeat_interleave(groups, 1)[..., None]",
                "ops[name][:, i].repeat(1, groups, 1)[..., None]",
            ),
        ),
        ("simple_gla",),
        (
            "uncertainty-is-below-the-prior's",
            "heads-permute",
            "value-head-reads-its-group",
            "value-channels-are-heads",
            "head-gate-is-a-query-gate",
        ),
    ),
    Mutant(
        "first_decay_of_a_chunk_lost",
        (
            (
                "decay, noise = self._decay(t),",
                "decay, noise = self.one if t and t % 4 == 0 else self._decay(t),",
            ),
        ),
        ("gla",),
        (
            "decay-is-a-gauge",
            "importance-returns-to-the-prior",
            "strong-forgetting-is-a-reset",
            "idle-tokens-change-nothing",
            "head-gate-is-a-query-gate",
        ),
    ),
    Mutant(
        "decay_of_the_next_token",
        (
            (
                "decay, noise = self._decay(t),",
                "decay, noise = self._decay(min(t + 1, self.tokens - 1)),",
            ),
        ),
        ("kda",),
        (
            "kda-is-generalised-delta",
            "metaplastic-delta-is-generalised-delta",
            "prefix-of-outputs",
            "importance-returns-to-the-prior",
            "delta-rule-solves-a-triangular-system",
        ),
    ),
    Mutant(
        "importance_shared_over_keys",
        ((_EVIDENCE, _EVIDENCE.replace("square()", "square().mean(2, keepdim=True)")),),
        ("palimpsa",),
        (
            "diagonal-precision-underestimates-marginals",
            "hebbian-is-a-weighted-sum",
            "natural-form-is-predict-correct",
        ),
    ),
    Mutant(
        "importance_shared_over_heads",
        ((_EVIDENCE, _EVIDENCE.replace("square()", "square().mean(1, keepdim=True)")),),
        ("simple_gla",),
        (
            "head-gate-is-a-query-gate",
            "hebbian-is-a-weighted-sum",
            "natural-form-is-predict-correct",
        ),
    ),
    Mutant(
        "importance_shared_over_the_batch",
        ((_EVIDENCE, _EVIDENCE.replace("square()", "square().mean(0, keepdim=True)")),),
        ("simple_gla",),
        (
            "sequences-are-independent",
            "head-gate-is-a-query-gate",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "read_before_write",
        (
            ('self.spec.read.when == "pre"', "True"),
            ('self.spec.read.when == "post"', "False"),
        ),
        ("gla", "deltanet"),
        (
            "decay-is-a-gauge",
            "full-step-recalls",
            "zero-decay-resets",
            "head-gate-is-a-query-gate",
        ),
    ),
    Mutant(
        "sign_of_the_erase",
        (("strength * (w.v - predicted)", "strength * (w.v + predicted)"),),
        ("deltanet",),
        (
            "sigmoid-delta-is-a-one-step-posterior",
            "delta-rule-is-a-gradient-step",
            "full-step-recalls",
            "delta-rule-solves-a-triangular-system",
            "delta-rule-keeps-the-noise-of-repeats",
        ),
    ),
    Mutant(
        "missing_scale",
        ((" * call.scale\n", "\n"),),
        ("gla",),
        (
            "uncertainty-is-below-the-prior's",
            "scale-multiplies-the-query",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "prior_added_twice",
        (
            (
                "self.memory / (self.importance + self.prior) * q",
                "self.memory / (self.importance + 2 * self.prior) * q",
            ),
        ),
        ("palimpsa",),
        (
            "metaplastic-at-zero-is-its-source",
            "zero-gate-divides-the-query",
            "large-prior-is-the-source",
            "plasticity-is-linear",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "importance_never_forgets",
        (("drift = a * old\n", "drift = old\n"),),
        ("palimpsa",),
        (
            "importance-returns-to-the-prior",
            "importance-has-a-window",
            "zero-decay-resets",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "exact_gain_at_the_new_importance",
        (("            rate = before(w.k)\n", "            rate = after(w.k)\n"),),
        ("implicit_delta",),
        (
            "delta-rule-solves-a-triangular-system",
            "one-hot-keys-are-exact-inference",
        ),
    ),
    Mutant(
        "first_order_gain_at_the_old_importance",
        (("strength, rate = w.beta, after(w.k)", "strength, rate = w.beta, before(w.k)"),),
        ("gated_deltanet",),
        (
            "metaplastic-delta-is-generalised-delta",
            "delta-rule-solves-a-triangular-system",
            "one-hot-keys-are-exact-inference",
        ),
    ),
    Mutant(
        "exact_gain_not_normalised",
        (("w.beta / (1 + found)", "w.beta / (1 + 0 * found)"),),
        ("implicit_delta", "longhorn"),
        (
            "implicit-delta-is-normalised-delta",
            "exact-gain-is-a-one-step-posterior",
            "longhorn-drops-off-diagonals",
            "exact-gain-contracts",
            "delta-rule-solves-a-triangular-system",
        ),
    ),
    Mutant(
        "rate_taken_for_a_precision",
        (('if self.spec.posterior.beta == "precision":', "if True:"),),
        ("kda",),
        (
            "metaplastic-at-zero-is-its-source",
            "rate-at-zero-is-its-source-bit-for-bit",
            "rate-gain-is-the-posterior's",
            "rate-beyond-one-keeps-its-factor",
            "full-step-recalls",
        ),
    ),
    Mutant(
        "rate_without_a_bound",
        (("most = s.clamp(min=1)", "most = torch.ones_like(s)"),),
        ("gated_deltanet",),
        ("rate-beyond-one-keeps-its-factor",),
    ),
    Mutant(
        "lag_off_by_one",
        (("before_k, before_v = self._previous(t)", "before_k, before_v = now.k, now.v"),),
        ("mamba3",),
        (
            "trapezoid-is-one-write",
            "head-gate-is-a-query-gate",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "taps_swapped",
        (("beta=now.beta * (1 - trap)", "beta=now.beta * trap"),),
        ("mamba3",),
        (
            "lagged-steps-at-one-are-plain",
            "trapezoid-is-one-write",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "normaliser_without_beta",
        (("w.decay * self.normalizer + w.beta * w.k", "w.decay * self.normalizer + w.k"),),
        ("mlstm",),
        (
            "normaliser-is-a-column-of-ones",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "packed_sequences_leak",
        (
            (
                "_Sequence(call, part, own).run()",
                "_Sequence(call, part, results[-1].state if results else own).run()",
            ),
        ),
        ("gated_deltanet",),
        ("packed-is-separate",),
    ),
    Mutant(
        "state_not_carried",
        (
            (
                "self.q.new_zeros(batch, heads, keys, values) if state is None",
                "self.q.new_zeros(batch, heads, keys, values) if True",
            ),
        ),
        ("kda",),
        (
            "sigmoid-delta-is-a-one-step-posterior",
            "delta-rule-is-a-gradient-step",
            "segmented-is-whole",
            "empty-keeps-the-state",
            "delta-rule-solves-a-triangular-system",
        ),
    ),
    Mutant(
        "importance_not_carried",
        (("if state is not None and state.importance is not None:", "if False:"),),
        ("palimpsa",),
        (
            "importance-returns-to-the-prior",
            "segmented-is-whole",
            "empty-keeps-the-state",
            "decoding-is-prefill",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "bonus_forgotten",
        (('self.ops["u"][:, :, None] * last.k', "0 * last.k"),),
        ("rwkv6",),
        (
            "pre-read-is-post-read",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "predicts_from_the_undecayed_state",
        (('seen = self._mean() if erase.base == "prev" else None', "seen = self._mean()"),),
        ("gated_deltanet",),
        (
            "metaplastic-delta-is-generalised-delta",
            "sigmoid-delta-is-a-one-step-posterior",
            "delta-rule-is-a-gradient-step",
            "full-step-recalls",
            "delta-rule-solves-a-triangular-system",
        ),
    ),
    Mutant(
        "predicts_from_the_decayed_state",
        (("base = mean if seen is None else seen", "base = mean"),),
        ("comba",),
        (
            "comba-at-decayed-key-is-gated-deltanet",
            "delta-rule-solves-a-triangular-system",
        ),
    ),
    Mutant(
        "decay_on_every_step",
        (("decay if j == 0 else self.one", "decay"),),
        ("gated_deltaproduct",),
        (
            "deltaproduct-with-one-step-is-gated-deltanet",
            "steps-are-tokens",
            "importance-returns-to-the-prior",
            "delta-rule-solves-a-triangular-system",
        ),
    ),
    Mutant(
        "decay_on_the_last_step",
        (("decay if j == 0 else self.one", "decay if j == n - 1 else self.one"),),
        ("gated_deltaproduct",),
        (
            "deltaproduct-with-one-step-is-gated-deltanet",
            "steps-are-tokens",
            "delta-rule-solves-a-triangular-system",
        ),
    ),
    Mutant(
        "importance_matrix_without_beta",
        (("w.b * w.k * w.k.mT", "w.k * w.k.mT"),),
        ("mesanet",),
        (
            "full-precision-is-a-normal-equation",
            "full-precision-is-exact-inference",
            "full-precision-is-ridge-regression",
            "importance-returns-to-the-prior",
        ),
    ),
    Mutant(
        "decay_in_base_two",
        (("g[:, t].exp()", "g[:, t].exp2()"),),
        ("gla", "palimpsa"),
        (
            "decay-is-a-gauge",
            "importance-returns-to-the-prior",
            "strong-forgetting-is-a-reset",
            "head-gate-is-a-query-gate",
        ),
    ),
    Mutant(
        "evidence_is_a_maximum",
        (("torch.logaddexp(old, w.k)", "torch.maximum(old, w.k)"),),
        ("lightnet",),
        ("log-evidence-is-a-softmax-over-time",),
    ),
    Mutant(
        "value_gate_reversed",
        (("x[:, i, :, None, :] if x.ndim == 4", "x[:, i, :, None, :].flip(-1) if x.ndim == 4"),),
        ("palimpsa", "gdn2"),
        (
            "value-channels-permute",
            "value-channels-are-heads",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "tied_key_is_the_decay",
        (("k = 1 - decay if", "k = decay if"),),
        ("hgrn2",),
        (
            "hgrn2-is-tied-gla",
            "head-gate-is-a-query-gate",
            "hebbian-is-a-weighted-sum",
        ),
    ),
    Mutant(
        "diagonal_correction_without_key",
        (("mean * (1 - w.k * gain)", "mean * (1 - gain)"),),
        ("longhorn",),
        (
            "longhorn-drops-off-diagonals",
            "dropped-off-diagonals-never-overshoot",
            "small-keys-make-a-delta-rule-hebbian",
            "key-channels-flip",
            "delta-rule-solves-a-triangular-system",
        ),
    ),
    Mutant(
        "erase_gate_on_the_wrong_side",
        (('erase.side == "removal" else', 'erase.side != "removal" else'),),
        ("gdn2", "rwkv7"),
        ("delta-rule-solves-a-triangular-system",),
    ),
    Mutant(
        "preconditioner_center_flipped",
        (
            (
                '(self.importance + p.eps).log() - self.ops["center"]',
                '(self.importance + p.eps).log() + self.ops["center"]',
            ),
        ),
        ("precond_kda",),
        ("delta-rule-solves-a-triangular-system",),
    ),
    Mutant(
        "uncertainty_without_prior",
        (
            (
                "q.square() / (self.importance + self.prior)",
                "q.square() / (self.importance + 1)",
            ),
        ),
        ("palimpsa",),
        (
            "uncertainty-is-below-the-prior's",
            "diagonal-precision-underestimates-marginals",
            "precision-has-units",
            "one-hot-keys-are-exact-inference",
        ),
    ),
    Mutant(
        "prior_ignored_in_the_prediction",
        (
            ("before, after = drift + self.prior,", "before, after = drift + 1,"),
            ("(old + self.prior) / (drift + self.prior)", "(old + self.prior) / (drift + 1)"),
        ),
        ("gated_deltanet", "implicit_delta"),
        (
            "metaplastic-delta-is-generalised-delta",
            "precision-has-units",
            "first-order-gain-is-a-small-step",
            "idle-tokens-change-nothing",
            "delta-rule-solves-a-triangular-system",
        ),
    ),
    Mutant(
        "precision_matrix_never_forgets",
        (("self.importance = drift = w.decay * old", "self.importance = drift = old"),),
        ("metaplastic_gated_deltanet_full", "metaplastic_mamba2_full"),
        (
            "full-precision-is-a-normal-equation",
            "full-precision-solves-for-its-means",
            "full-precision-is-exact-inference",
            "importance-returns-to-the-prior",
        ),
    ),
    Mutant(
        "variance_decays_once",
        (("drift = w.decay * old * w.decay.mT", "drift = w.decay * old"),),
        ("metaplastic_gated_deltanet_full_diffuse",),
        (
            "growing-variance-is-a-gaussian-process",
            "variance-returns-to-the-prior",
            "growing-variance-is-a-kalman-filter",
        ),
    ),
    Mutant(
        "variance_decays_as_a_mean",
        (("keep = a.square()", "keep = a"),),
        ("metaplastic_mamba2_diffuse",),
        ("variance-returns-to-the-prior", "growing-variance-in-information-form"),
    ),
    Mutant(
        "one_number_is_a_sum",
        (("square = square.mean(2, keepdim=True)", "square = square.sum(2, keepdim=True)"),),
        ("metaplastic_gated_deltanet_isotropic", "metaplastic_mamba2_isotropic"),
        (
            "uncertainty-is-the-variance-of-the-read",
            "one-number-is-full-on-a-line",
            "repeats-are-averaged",
        ),
    ),
    Mutant(
        "discount_keeps_the_prior",
        (("a * old - (1 - a) * self.prior, self.one", "a * old, self.one"),),
        ("mamba2",),
        ("hebbian-is-a-weighted-sum", "discount-forgets-the-prior"),
    ),
    Mutant(
        "noise_twice",
        (("+ w.noise) - self.prior", "+ 2 * w.noise) - self.prior"),),
        ("gated_deltanet",),
        (
            "noise-at-the-prior's-level-is-none",
            "reset-covariance-is-the-source",
            "random-walk-has-a-stationary-gain",
        ),
    ),
    Mutant(
        "axes_transposed",
        (("turn @ ((turn.mT @ x) / importance)", "turn.mT @ ((turn @ x) / importance)"),),
        ("metaplastic_gated_deltanet_rotated_diffuse",),
        (
            "delta-rule-solves-a-triangular-system",
            "other-axes-turn-the-keys",
            "keys-rotate",
        ),
    ),
    Mutant(
        "query_in_another_basis",
        (('"hkj,bthk->bthj", turn, self.q', '"hjk,bthk->bthj", turn, self.q'),),
        ("metaplastic_mamba2_rotated",),
        (
            "metaplastic-at-zero-is-its-source",
            "head-gate-is-a-query-gate",
            "other-axes-turn-the-keys",
            "no-importance-has-no-axes",
        ),
    ),
    Mutant(
        "matrix_of_one_sided_keys",
        (("drift + w.b * w.k * w.k.mT", "drift + w.b * w.k * w.k.mT.relu()"),),
        ("metaplastic_gated_deltanet_full",),
        ("full-precision-solves-for-its-means", "full-is-diagonal-on-one-hot-keys"),
    ),
    Mutant(
        "whole_prediction_at_the_new_importance",
        (
            (
                "rate = found / (1 + w.b * (w.k * found).sum(2, keepdim=True))",
                "rate = after(w.k)",
            ),
        ),
        ("metaplastic_mamba2_isotropic_diffuse",),
        ("delta-rule-solves-a-triangular-system", "one-number-never-enlarges-the-mean"),
    ),
    Mutant(
        "mean_of_a_matrix_not_tempered",
        (("cholesky_solve(w.decay * self.memory,", "cholesky_solve(self.memory,"),),
        ("metaplastic_gated_deltanet_full",),
        ("full-precision-solves-for-its-means", "what-nothing-renews-fades"),
    ),
    Mutant(
        "gain_at_the_new_importance",
        (("            rate = before(w.k)\n", "            rate = after(w.k)\n"),),
        ("metaplastic_gated_deltanet", "metaplastic_gated_deltanet_full"),
        ("repeats-are-averaged", "importance-shields-from-collisions"),
    ),
    Mutant(
        "flow_is_implicit",
        (("-torch.expm1(-w.beta * found) / found.", "w.beta / (1 + w.beta * found) + 0 * found."),),
        ("efla",),
        ("flow-is-many-small-steps", "flow-forgets-exponentially"),
    ),
    Mutant(
        "relative_prior_is_a_number",
        (("prior * torch.linalg.matrix_norm(H)[..., None]", "prior"),),
        ("gka",),
        ("full-precision-is-a-normal-equation", "a-relative-prior-has-no-units"),
    ),
)

ANOTHER_ORDER = Mutant(
    "rate_summed_in_another_order",
    (("found = w.beta * (w.k * rate).sum(", "found = (w.beta * w.k * rate).sum("),),
    ("gated_deltanet",),
    ("rate-at-zero-is-its-source-bit-for-bit",),
)
"""No mistake but another rounding, which only a comparison of one implementation with itself
sees."""
