"""The declarative description of one gated linear attention variant.

A `Spec` is data: the three axes of its posterior approximation, its gates, how it reads and writes,
and the layer around the recurrence. Nothing in a spec is code, and no code asks for a spec's name:
whatever a variant does follows from the values here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Literal, Self, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = [
    "COUNTERPARTS",
    "FORMS",
    "Counterpart",
    "Decay",
    "Erase",
    "Gate",
    "Importance",
    "Init",
    "Layer",
    "Posterior",
    "Prior",
    "Read",
    "Spec",
    "SpecError",
    "Steps",
    "Stream",
    "freeze",
    "metaplasticize",
    "no_exact_gain",
]


class Counterpart(TypedDict, total=False):
    """Which metaplastic form of a source is meant: the options of `metaplasticize`."""

    gate: Literal["head", "value"] | None
    """Shape of the importance gate."""
    gain: Literal["first_order", "exact"] | None
    """Learning rate of a source that subtracts its prediction."""
    precision: Literal["diagonal", "isotropic", "full"] | None
    """What importance is."""
    basis: Literal["own", "rotated"] | None
    """Along which axes a vector of importances counts."""
    forgetting: Literal["temper", "diffuse"] | None
    """How a decay acts on importance."""


COUNTERPARTS: dict[str, tuple[str, ...]] = {
    "gate": ("head", "value"),
    "gain": ("first_order", "exact"),
    "precision": ("diagonal", "isotropic", "full"),
    "basis": ("own", "rotated"),
    "forgetting": ("temper", "diffuse"),
}
"""Accepted values of these options, the default first but for the gain."""
FORMS = {
    "isotropic": "precision",
    "full": "precision",
    "rotated": "basis",
    "diffuse": "forgetting",
}
"""What a metaplastic spec is named by, after its source, with the option that it is of."""


class SpecError(ValueError):
    """A spec that contradicts itself, or an operation that does not apply to it."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Shape = Literal["none", "head", "key", "value"]

Parameterization = Literal[
    "schedule",
    "log_sigmoid",
    "softcap_log_sigmoid",
    "softplus_exp",
    "softplus_product",
    "bounded_sigmoid",
    "lower_bounded_sigmoid",
    "negative_exp",
    "negative_sigmoid",
    "softplus_temperature",
    "sigmoid",
    "sigmoid_squared",
    "softplus",
    "reciprocal_softplus",
    "softplus_power",
    "softcap_exp",
    "identity",
]


class Init(_Data):
    """How a parameter starts."""

    distribution: Literal[
        "default",
        "zeros",
        "ones",
        "constant",
        "uniform",
        "log_uniform",
        "log_of_uniform",
        "log_of_arange",
        "linspace",
        "inverse_softplus_log_uniform",
    ] = "default"
    """`default` is the framework's own; `log_of_*` is the logarithm of what is drawn;
    `inverse_softplus_log_uniform` is the inverse softplus of a log-uniform draw (the dt_bias of
    Mamba)."""
    low: float | None = None
    """Lower end of the draw (`constant`: the value itself)."""
    high: float | None = None
    """Upper end of the draw."""
    floor: float | None = None
    """Smallest value that a draw may take."""


class Gate(_Data):
    """One data-dependent or static gate: its shape, formula and initialisation.

    `x` below is the gate's projection of the hidden state. Constants that a formula does not use
    stay unset.
    """

    shape: Shape = "none"
    """One number per head, per key channel, per value channel, or no gate at all."""
    source: Literal["fixed", "static", "data", "derived"] = "data"
    """fixed: a constant schedule; static: a learned constant; data: a function of the token;
    derived: follows from other operands."""
    parameterization: Parameterization = "identity"
    """The formula. Decays give the natural logarithm: log_sigmoid = logsigmoid(x) / divisor;
    softcap_log_sigmoid = logsigmoid(cap tanh(x / cap)); softplus_exp = -exp(A_log) softplus(x +
    dt_bias); softplus_product = -softplus(x_A) softplus(x_dt + dt_bias); bounded_sigmoid = bound
    sigmoid(exp(A_log) (x + dt_bias)); lower_bounded_sigmoid = log(l + (1 - l) sigmoid(x)) with a
    learned, layer-cumulative l; negative_exp = -exp(x); negative_sigmoid = -divisor sigmoid(x);
    softplus_temperature = -softplus(x) sigmoid(x_tau). Other gates give the value: sigmoid = factor
    sigmoid(x); sigmoid_squared = factor (floor + sigmoid(x))^2; softplus; reciprocal_softplus = 1 /
    (floor + softplus(x)); softplus_power = softplus(x) ** sigmoid(x_tau); softcap_exp = exp(cap
    tanh(x / cap))."""
    tie: Literal["none", "step", "write", "precision", "decay", "one_minus_decay"] = "none"
    """step: the discretisation step softplus(x + dt_bias) of the decay; write: the formula's value
    times the write gate; precision: the formula's value times the precision beta / (1 - beta k.k)
    of the observation whose rate the write gate is; decay: the formula reads the decay's own
    projections; one_minus_decay: 1 - exp(decay)."""
    schedule: Literal["one_minus_power_of_two", "alibi_depth"] | None = None
    """Fixed decays only. one_minus_power_of_two = log(1 - 2^(-5 - h)); alibi_depth = -2^(-8 (h + 1)
    / H) (1 - layer / (layers - 1 + 1e-5) + 1e-5)."""
    rank: int | Literal["head"] | None = None
    """Rank of a low-rank projection (head: the head's value size); unset for a full one."""
    low_rank_activation: Literal["none", "tanh"] = "none"
    """Non-linearity between the two factors of a low-rank projection."""
    bias: bool = False
    """Whether the (last) projection has a bias."""
    input: Literal["hidden", "shift", "branch", "conv"] = "hidden"
    """What is projected: the layer's input; its interpolation with the previous token; the layer's
    inner branch; or that branch after its convolution."""
    factor: float = 1.0
    """Multiplier of a sigmoid; 2 admits negative eigenvalues of the delta rule's transition."""
    divisor: float | None = None
    """Constant of log_sigmoid and negative_sigmoid."""
    cap: float | None = None
    """Soft cap of the softcap formulas."""
    bound: float | None = None
    """Lower bound of bounded_sigmoid (negative)."""
    floor: float = 0.0
    """Smallest softplus(x_A) of softplus_product, or what reciprocal_softplus and
    sigmoid_squared add."""
    a_init: Init | None = None
    """Start of A_log."""
    bias_init: Init | None = None
    """Start of the projection's bias, or of dt_bias."""
    weight_init: Init | None = None
    """Start of the projection's weight."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.source == "fixed") != (self.schedule is not None):
            raise ValueError("a fixed gate names a `schedule`, and only a fixed gate does")
        needs = {
            "log_sigmoid": "divisor",
            "negative_sigmoid": "divisor",
            "bounded_sigmoid": "bound",
            "softcap_log_sigmoid": "cap",
            "softcap_exp": "cap",
        }.get(self.parameterization)
        if needs and getattr(self, needs) is None:
            raise ValueError(f"parameterization = {self.parameterization!r} needs `{needs}`")
        return self


class Decay(Gate):
    """The forgetting gate; its value is a natural logarithm, <= 0."""

    shape: Literal["none", "head", "key"] = "none"
    """One decay per head, per key channel, or none."""
    minimum: float | None = None
    """Smallest value, negative; unset for no limit."""

    @model_validator(mode="after")
    def _limited(self) -> Self:
        learned = self.shape != "none" and self.source in ("static", "data")
        if self.minimum is not None and not (learned and self.minimum < 0):
            raise ValueError("decay.minimum is a negative limit of a static or data decay")
        return self

    @property
    def has_step(self) -> bool:
        """Whether it has a discretisation step softplus(x + dt_bias), that other gates can tie
        to."""
        return self.parameterization in ("softplus_exp", "softplus_product")


class Posterior(_Data):
    """The posterior approximation: three orthogonal axes."""

    precision: Literal["frozen", "isotropic", "diagonal", "full"]
    """Whether importance is a constant, one number per head, one per synapse, or a matrix over
    keys."""
    correction: Literal["none", "diagonal", "full"]
    """How much of the prediction is subtracted before writing: nothing (Hebbian), the synapse's own
    part, all of it (delta rule)."""
    gain: Literal["first_order", "exact", "flow"] = "first_order"
    """Learning rate beta k / I_t; the exact rank-one gain (k / I') r / (1 + r sum k^2 / I') of an
    observation with precision r; or, flow, the delta rule in continuous time over a step beta,
    (k / I') (1 - exp(-beta c)) / c with c = sum k^2 / I'."""
    beta: Literal["precision", "rate"] = "precision"
    """What the write gate is to the exact gain. precision: r = beta. rate: beta k is the step at
    importance 1, as in a delta rule, so that r = beta / (1 - beta k.k) and the gain is
    beta (k / I') / (1 - s + beta sum k^2 / I') with s = beta k.k, where s > 1 counts as infinitely
    precise: the denominator is then divided by s, with 1 - s as 0."""

    @model_validator(mode="after")
    def _known_combination(self) -> Self:
        here = (self.precision, self.correction, self.gain)
        if self.beta == "rate" and (self.precision == "frozen" or here[1:] != ("full", "exact")):
            raise ValueError(
                "posterior.beta = rate belongs to correction, gain = full, exact with an "
                "importance: with constant importance it is the first-order gain"
            )
        allowed = {
            ("frozen", "none", "first_order"),
            ("frozen", "full", "first_order"),
            ("frozen", "full", "exact"),
            ("frozen", "full", "flow"),
            ("frozen", "diagonal", "exact"),
            ("isotropic", "none", "first_order"),
            ("isotropic", "full", "first_order"),
            ("isotropic", "full", "exact"),
            ("isotropic", "full", "flow"),
            ("diagonal", "diagonal", "first_order"),
            ("diagonal", "diagonal", "exact"),
            ("diagonal", "full", "first_order"),
            ("diagonal", "full", "exact"),
            ("diagonal", "full", "flow"),
            ("full", "none", "first_order"),
            ("full", "full", "first_order"),
            ("full", "full", "exact"),
            ("full", "full", "flow"),
        }
        if here not in allowed:
            choices = "; ".join(", ".join(a) for a in sorted(allowed))
            raise ValueError(
                f"precision, correction, gain = {', '.join(here)} contradict each other; "
                f"accepted are: {choices}"
            )
        return self


class Prior(_Data):
    """The prior importance I_p."""

    shape: Literal["none", "head", "key", "relative"] = "head"
    """none: no prior (importance starts at zero); head: a number per head; key: a number per head
    and key channel; relative: this share of the precision matrix's norm, so that scaling all keys
    changes nothing."""
    init: float = 1.0
    """Value at the start, or the share."""
    parameterization: Literal["exp", "softplus_floor"] = "exp"
    """exp(parameter), or softplus(parameter) + floor."""
    floor: float = 0.0
    """Smallest prior of softplus_floor, or what a relative one adds to its share."""
    trainable: bool = True
    """Whether it is learned."""


class PlasticityScale(_Data):
    """The learned factor per head in front of an importance gate (the plasticity)."""

    parameterization: Literal["clamp", "softplus", "none"] = "clamp"
    """clamp: max(x, 0), whose gradient at zero still passes upward, so that exactly zero is a
    start; softplus(x); none: 1."""
    init: float = 0.0
    """Start of x."""


class Preconditioner(_Data):
    """A map from importance to a bounded factor on the write key instead of the reciprocal."""

    base: float = 1.5
    """x of x^(-softsign(log(I + eps) - center)); the factor stays in [1/x, x]."""
    eps: float = 1e-6
    """Added to the importance inside the logarithm."""
    center_init: float = -0.2
    """Start of the learned center per head."""


class Importance(_Data):
    """The importance state: what it counts, how it forgets, where it starts."""

    gate: Gate
    """The importance gate b; its shape is the shape of importance: head gives one vector over keys
    that all value channels share, value gives one number per synapse."""
    scale: PlasticityScale = PlasticityScale()
    """Learned factor of the gate."""
    evidence: Literal["key_squared", "exp_key", "outer_product"] = "key_squared"
    """What a token adds: b k^2, e^k, or b k k^T (without an importance gate b is beta). An
    isotropic precision counts the mean of b k^2 over keys."""
    forgetting: Literal["temper", "discount", "diffuse"] = "temper"
    """How a decay a acts on the importance I and the mean. temper: I' = a I + (1 - a) I_p, the
    mean's natural parameter I mu by a, so that old evidence fades; discount: I' = a I and the mean
    stays, recursive least squares; diffuse: the variance grows as in a Kalman filter,
    1 / I' = a^2 / I + noise, and the mean decays by a."""
    noise: Gate = Gate()
    """diffuse: the variance that a token adds, an operand > 0 per head or key. Without a gate it is
    (1 - a^2) / I_p, which keeps the prior where it is."""
    basis: Literal["own", "rotated"] = "own"
    """Over which axes importance is diagonal: those of the keys, or those of an orthogonal matrix
    per key head, an operand; keys and queries are turned into them."""
    decay: Literal["shared", "own"] = "shared"
    """Whether importance forgets as the mean does, or by a decay of its own."""
    own_decay: Decay | None = None
    """The decay of `decay = "own"`."""
    prior: Prior = Prior()
    """What importance returns to."""
    preconditioner: Preconditioner | None = None
    """If set, importance only rescales the write key, and the mean forgets as if importance were
    constant."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.gate.shape not in ("none", "head", "value"):
            raise ValueError(
                f"importance.gate.shape must be none, head or value, not {self.gate.shape!r}"
            )
        if (self.decay == "own") != (self.own_decay is not None):
            raise ValueError('importance.decay = "own" needs `own_decay`, and only then')
        if (self.decay == "own") != (self.preconditioner is not None):
            raise ValueError(
                "an own importance decay and a preconditioner go together: without the prior pull "
                "of a shared decay, the reciprocal of importance is not a posterior variance"
            )
        gated = {"key_squared": True, "exp_key": False}.get(self.evidence)
        if gated is not None and gated != (self.gate.shape != "none"):
            raise ValueError(
                "evidence = key_squared needs an importance gate, and evidence = exp_key takes none"
            )
        if self.evidence == "outer_product" and self.gate.shape == "value":
            raise ValueError(
                "evidence = outer_product takes an importance gate per head or none, not "
                "gate.shape = value: a matrix over keys for every value channel is out of reach"
            )
        if self.noise.shape not in ("none", "head", "key"):
            raise ValueError(f"importance.noise.shape is none, head or key: {self.noise.shape!r}")
        if self.noise.shape != "none" and self.forgetting != "diffuse":
            raise ValueError("importance.noise belongs to forgetting = diffuse")
        plain = self.evidence != "exp_key" and self.decay == "shared"
        if (self.forgetting, self.basis) != ("temper", "own") and not plain:
            raise ValueError(
                "importance.forgetting and importance.basis belong to an importance that decays "
                "as the mean does (decay = shared) and counts k^2 or k k^T"
            )
        return self


class Erase(_Data):
    """Delta rule only: what is predicted and removed before writing."""

    key: Literal["write", "free"] = "write"
    """The key of the prediction: the write key, or an operand of its own (`p`)."""
    strength: Literal["write", "own"] = "write"
    """Scaled by the write gate, or by a gate of its own (`erase` on the prediction key, `removal`
    on the removal)."""
    gate: Gate = Gate()
    """The own gate, key-shaped."""
    side: Literal["prediction", "removal"] = "prediction"
    """Where the own gate acts: on the key that predicts, or on the key along which is removed."""
    base: Literal["decayed", "prev"] = "decayed"
    """Whether the prediction reads the state after or before this token's decay."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.strength == "own") != (self.gate.shape == "key"):
            raise ValueError('erase.strength = "own" needs a key-shaped `gate`, and only then')
        return self


class Steps(_Data):
    """Several writes per token."""

    count: int = Field(default=1, ge=1)
    """Writes per token; the decay acts once, the read follows the last."""
    source: Literal["projected", "erase_then_write", "lagged"] = "projected"
    """projected: k, v and the write gate carry `count` sub-steps per token; erase_then_write: as
    projected, and the first value is zero; lagged: the first write repeats the previous token's key
    and value (two-tap quadrature with weight `trap`)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source != "projected" and self.count != 2:
            raise ValueError(f"steps.source = {self.source} is two writes: steps.count must be 2")
        return self


class Read(_Data):
    """How the state becomes an output."""

    when: Literal["post", "pre"] = "post"
    """After this token's write, or before its decay and write."""
    bonus: bool = False
    """pre only: adds the same-token term ((u k) . q) w with a learned u per head and key
    channel."""
    normalizer: Literal["none", "sum", "max_abs_one"] = "none"
    """Divides by n . q + eps, or by max(|n . q|, 1), with n the decayed sum of written keys."""
    eps: float = 0.0
    """Constant of the `sum` normaliser."""
    scale: Literal["rsqrt_key"] | float = "rsqrt_key"
    """Factor on q: key size^-1/2 or a number."""
    mix: Gate = Gate()
    """precision = full only: a gate between the query (0) and the query over the precision matrix
    (1), an operand."""


class Stream(_Data):
    """What happens to q, k or v between projection and recurrence, in this order: local mixing,
    activation, feature map, norm, bias, rotation."""

    local: bool = False
    """Whether the layer's local mixing (convolution) acts on it."""
    activation: Literal["none", "silu", "relu", "elu"] = "none"
    """Pointwise map. A convolution's own activation is named in `local`."""
    feature_map: Literal["none", "hadamard", "taylor", "quadratic"] = "none"
    """hadamard: product of two learned projections; taylor: 1, x, x (x) x / sqrt(2) of x / d^1/4 so
    that q . k gives 1 + s + s^2 / 2; quadratic: x (x) x of the layer-normalised x,
    divided by d^1/4."""
    norm: Literal["none", "l2", "sum", "rms", "softmax"] = "none"
    """Normalisation over the head's channels; l2 is x / sqrt(sum x^2 + layer.l2_eps)."""
    bias: bool = False
    """Learned bias per head and channel after the norm, starting at one."""
    rotation: Literal["none", "static", "cumulative"] = "none"
    """Rotary embedding with fixed frequencies, or with angles that the tokens accumulate (pi
    tanh(x) times the discretisation step)."""
    rotated: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the head's channels that the rotation turns."""
    gate: Gate = Gate()
    """Multiplies the stream (key-shaped on k)."""


class Local(_Data):
    """Mixing of neighbouring tokens before the recurrence."""

    kind: Literal["none", "convolution", "token_shift"] = "none"
    """Causal depthwise convolution, or interpolation with the previous token."""
    at: Literal["streams", "branch"] = "streams"
    """streams: on each stream after its projection; branch: on one inner projection as wide as all
    values, from whose result q and k are projected and which is itself v."""
    size: int = 4
    """Taps of the convolution."""
    activation: Literal["none", "silu"] = "silu"
    """After the convolution."""
    bias: bool = False
    """Whether the convolution has a bias."""
    shift: Literal["none", "static", "data"] = "none"
    """token_shift: learned or data-dependent interpolation weights."""
    shift_rank: int = Field(default=32, ge=1)
    """Rank of the projection of data-dependent interpolation weights."""


class OutputPath(_Data):
    """From the recurrence's output to the layer's."""

    norm: Literal["none", "rms_head", "rms_group", "rms_full", "group", "layer"] = "rms_head"
    """RMS over a head, a group of heads or all channels; group norm over heads; layer norm over a
    head."""
    gate: Literal["none", "identity", "silu", "sigmoid"] = "none"
    """Activation of the output gate."""
    gate_input: Literal["hidden", "shift"] = "hidden"
    """What the gate projects: the layer's input, or its interpolation with the previous token."""
    gate_activation: Literal["none", "tanh", "sigmoid"] = "none"
    """Non-linearity between the two factors of a low-rank gate projection."""
    gate_rank: int | Literal["head"] | None = None
    """Rank of a low-rank gate projection (head: the head's value size); unset for a full one."""
    gate_bias: bool = False
    """Whether the gate projection has a bias."""
    order: Literal["norm_gate", "gate_norm"] = "norm_gate"
    """Which comes first."""
    eps: float = 1e-5
    """Inside the norm."""
    bias: bool = False
    """Whether the layer's last projection has a bias."""


class Heads(_Data):
    """Default sizes and how heads share keys."""

    sharing: Literal["all", "grouped_query", "grouped_value", "state_groups", "one"] = "all"
    """all: as many key as value heads; grouped_query: fewer key/value than query heads;
    grouped_value: fewer query/key than value heads; state_groups: q and k shared by groups of
    heads; one: a single head."""
    key_size: int = Field(default=64, ge=1)
    """Default key channels per head."""
    value_size: int = Field(default=64, ge=1)
    """Default value channels per head."""
    expand: float = Field(default=1.0, gt=0.0)
    """Default value channels of all heads together, as a multiple of the hidden size: it gives the
    default number of heads, or the value size of a single head."""


class Layer(_Data):
    """The layer around the recurrence."""

    heads: Heads = Heads()
    """Head sizes and sharing."""
    q: Stream = Stream()
    """Query stream."""
    k: Stream = Stream()
    """Key stream."""
    v: Stream = Stream()
    """Value stream."""
    local: Local = Local()
    """Local mixing."""
    l2_eps: float = Field(default=1e-6, gt=0.0)
    """Added to sums of squares before l2 norms take their root; 1e-24 divides by the length alone,
    as far as floating point numbers can tell."""
    erase_key: Literal[
        "none", "scaled_key", "scaled_unit_key", "query_added", "orthogonal_query_added"
    ] = "none"
    """Free erase keys: p = sigmoid(d_h) k (then normalised as k is); the unit vector along k times
    a learned factor per channel; k + erase_mix q; or k + erase_mix (q - k (k . q)), of k and q as
    the recurrence takes them."""
    erase_mix: Gate = Gate()
    """How much of the query an erase key with `query_added` holds, per key head."""
    query_correction: bool = False
    """Subtracts D_h p from the query before it is normalised."""
    key_rate: bool = False
    """The written key is k (1 + (r - 1) c) with the removal gate r and a learned c per channel."""
    value_residual: bool = False
    """Values interpolate with those of the first layer."""
    value_residual_rank: int = Field(default=32, ge=1)
    """Rank of the projection of those interpolation weights."""
    skip: Literal["none", "head", "branch", "same_token"] = "none"
    """head: + D_h v; branch: + weight * convolution branch; same_token: + (sum_k q k r) v, after
    the output norm. The first two come before the norm."""
    output: OutputPath = OutputPath()
    """Norm and gate at the end."""


class Reference(_Data):
    """Where the variant was published."""

    paper: str
    """Authors, title, year."""
    arxiv: str | None = None
    """arXiv identifier."""
    equation: str | None = None
    """Equation, section or function that gives the recurrence."""


class Spec(_Data):
    """One gated linear attention variant as data.

    Per head, with `k`, `q` of key size K, `v` of value size V, and importance I = J + I_p:

        predict   J' = a J                   mu' = (a I_prev / (J' + I_p)) mu_prev
        observe   J  = J' + b k^2
        correct   mu = mu' + write - erase
        read      y  = mu (scale q)

    Reference: Bonnet et al., Learning to Remember, Learn, and Forget in Attention-Based Models,
    arXiv:2602.09075.
    """

    schema_version: Literal[1] = 1
    """Version of this format."""
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Identifier: lower case letters, digits and underscores."""
    title: str
    """Name as its paper writes it."""
    summary: str
    """One sentence for tables."""
    reference: Reference
    """Where it was published."""
    aliases: tuple[str, ...] = ()
    """Names under which models use this variant; `glazoo.load` knows them, too."""
    counterpart: str | None = None
    """Metaplastic specs made from another: the name of that source."""
    posterior: Posterior
    """The posterior approximation."""
    decay: Decay = Decay()
    """The forgetting gate a = exp(g)."""
    write: Gate = Gate()
    """The input gate beta."""
    key: Literal["operand", "one_minus_decay"] = "operand"
    """Where the written key comes from: k itself, or 1 - exp(g)."""
    erase: Erase = Erase()
    """What the delta rule removes."""
    importance: Importance | None = None
    """The importance state; unset means that importance is the constant one."""
    steps: Steps = Steps()
    """Writes per token."""
    read: Read = Read()
    """How the state is read."""
    layer: Layer = Layer()
    """Projections, maps, norms and gates before and after it."""

    def __hash__(self) -> int:
        # Programs are looked up at every call; what a name does not tell apart, equality does.
        return hash(self.name)

    @property
    def metaplastic(self) -> bool:
        """Whether the spec carries an importance state."""
        return self.posterior.precision != "frozen"

    @property
    def hebbian(self) -> bool:
        """Whether no prediction is subtracted: the mean is a sum of decayed writes, over importance
        if there is one."""
        p = self.posterior
        return p.correction == "none" or (p.correction, p.gain) == ("diagonal", "first_order")

    @property
    def substeps(self) -> int:
        """Keys, values and gates that a token brings along; one where its writes repeat them."""
        return 1 if self.steps.source == "lagged" else self.steps.count

    @property
    def sums_writes(self) -> bool:
        """Whether importance times mean is a plain sum of decayed writes: nothing is predicted, or
        what the exact gain subtracts is what the precision matrix forgets."""
        p, imp = self.posterior, self.importance
        own = imp is not None and imp.gate.shape == "none" and p.precision == "full"
        return self.forgetting != "diffuse" and (self.hebbian or own)

    @property
    def forgetting(self) -> str:
        """How the decay acts on importance and mean."""
        return "temper" if self.importance is None else self.importance.forgetting

    @property
    def turned(self) -> bool:
        """Whether the memory is kept in the basis of the importance, and not in that of the
        keys."""
        imp = self.importance
        return imp is not None and imp.basis == "rotated" and imp.forgetting != "diffuse"

    @property
    def log_evidence(self) -> bool:
        """Whether keys are logarithms of evidence, and importance is kept as a logarithm."""
        return self.importance is not None and self.importance.evidence == "exp_key"

    @property
    def importance_per_synapse(self) -> bool:
        """Whether importance has one entry per key and value channel."""
        return self.importance is not None and self.importance.gate.shape == "value"

    @property
    def memory_is_mean(self) -> bool:
        """Whether the memory is the posterior mean itself rather than importance times mean."""
        if self.forgetting == "diffuse" or self.log_evidence:
            return True
        return self.posterior.precision != "full" and not self.hebbian

    @property
    def has_variance(self) -> bool:
        """Whether the reciprocal of importance is a posterior variance."""
        return self.importance is None or self.importance.preconditioner is None

    def scale(self, key_size: int) -> float:
        """Return the factor on queries of `key_size` channels."""
        scale = self.read.scale
        return key_size**-0.5 if scale == "rsqrt_key" else float(scale)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        p, imp = self.posterior, self.importance
        if (p.precision == "frozen") != (imp is None):
            raise ValueError(
                f"posterior.precision = {p.precision!r} and importance = "
                f"{'unset' if imp is None else 'set'} contradict "
                "each other: frozen has no [importance], diagonal and full need one"
            )
        if imp is not None and (p.precision == "full") != (imp.evidence == "outer_product"):
            raise ValueError(
                "importance.evidence = outer_product goes with posterior.precision = full, "
                "and only with it"
            )
        if imp is not None and imp.evidence == "exp_key" and imp.prior.shape != "none":
            raise ValueError(
                "importance.evidence = exp_key accumulates in log space and takes no prior"
            )
        if (
            imp is not None
            and imp.preconditioner is not None
            and (p.correction, p.gain) != ("full", "first_order")
        ):
            raise ValueError(
                "importance.preconditioner needs correction = full and gain = first_order"
            )
        if (
            imp is not None
            and imp.preconditioner is None
            and imp.evidence == "key_squared"
            and imp.prior.shape == "none"
        ):
            raise ValueError("importance.prior.shape = none divides by zero before the first write")
        if p.correction != "full" and self.erase != Erase():
            raise ValueError("[erase] belongs to posterior.correction = full")
        if p.gain != "first_order" and self.erase != Erase():
            raise ValueError(
                f"gain = {p.gain} predicts with the written key: [erase] must stay at its defaults"
            )
        if p.beta == "rate" and (reason := _no_rate(self.write)):
            raise ValueError(f"posterior.beta = rate: {reason}")
        ties = {gate.tie for gate in (self.decay, self.write, self.erase.gate)}
        measured = imp is not None and imp.gate.tie == "precision"
        if "precision" in ties or (measured and p.beta != "rate"):
            raise ValueError(
                "tie = precision belongs to importance.gate, where posterior.beta = rate"
            )
        if self.write.shape == "key":
            raise ValueError(
                "write.shape = key: a key-shaped input gate belongs to the key stream, "
                "[layer.k.gate]"
            )
        if imp is not None:
            self._known_forgetting(imp)
        if self.key == "one_minus_decay" and self.decay.shape != "key":
            raise ValueError("key = one_minus_decay needs decay.shape = key")
        solves = p.precision == "full" and self.forgetting != "diffuse"
        if self.read.mix.shape not in (("none", "head") if solves else ("none",)):
            raise ValueError(
                "read.mix is a gate per head of precision = full with forgetting = temper"
            )
        if self.read.bonus and self.read.when != "pre":
            raise ValueError("read.bonus needs read.when = pre")
        if self.read.when == "pre" and p.correction == "full":
            raise ValueError("read.when = pre is defined for Hebbian specs only")
        if self.steps.source == "lagged" and p.correction == "full":
            raise ValueError("steps.source = lagged is defined for Hebbian specs only")
        if self.steps.source == "erase_then_write" and p.correction != "full":
            raise ValueError("steps.source = erase_then_write is defined for delta rules only")
        if self.steps.count > 1 and (self.read.when == "pre" or self.read.normalizer != "none"):
            raise ValueError("several steps per token go with a plain read after the write")
        if self.steps.source == "lagged" and self.key != "operand":
            raise ValueError("steps.source = lagged repeats a key of its own: key = operand")
        if self.read.normalizer != "none" and self.write.shape == "value":
            raise ValueError(
                "read.normalizer counts written keys: it takes a write gate per head, "
                "not write.shape = value"
            )
        if self.steps.count > 1 and self.erase.side == "removal":
            raise ValueError(
                "several steps per token and a removal-side erase gate exclude each other"
            )
        if self.write.tie == "step" and not self.decay.has_step:
            raise ValueError(
                "write.tie = step needs a decay with a discretisation step "
                "(softplus_exp, softplus_product)"
            )
        return self

    def _known_forgetting(self, imp: Importance) -> None:
        p, precision = self.posterior, self.posterior.precision
        rates = self.write.shape == "value" and self.erase.strength == "write"
        if precision in ("full", "isotropic") and p.correction == "full" and rates:
            raise ValueError(
                f"precision = {precision} takes a write gate per head, not write.shape = value: a "
                "learning rate per value channel would need an importance for each"
            )
        if p.gain == "flow" and imp.gate.shape == "value":
            raise ValueError("gain = flow takes one importance per key, not one per synapse")
        if precision == "isotropic" and (imp.gate.shape != "head" or imp.prior.shape != "head"):
            raise ValueError(
                "precision = isotropic is one number per head: importance.gate.shape and "
                "importance.prior.shape must be head"
            )
        if precision == "isotropic" and imp.basis == "rotated":
            raise ValueError("precision = isotropic looks the same in every basis: basis = own")
        if precision == "full" and imp.basis == "rotated":
            raise ValueError("precision = full needs no basis: it is exact in every one")
        if imp.prior.shape == "relative" and not (precision == "full" and self.sums_writes):
            raise ValueError(
                "importance.prior.shape = relative is a share of the norm of a precision matrix "
                "that tempers: precision = full, with plain sums of writes"
            )
        if imp.basis == "rotated" and imp.gate.shape != "head":
            raise ValueError(
                "importance.basis = rotated takes one importance per key (gate = head)"
            )
        if imp.basis == "rotated" and (p.correction, p.gain) == ("diagonal", "exact"):
            raise ValueError(
                "importance.basis = rotated changes a gain whose synapses correct their own part "
                "alone: which part that is depends on the basis"
            )
        if imp.forgetting == "discount" and precision == "full":
            raise ValueError(
                "forgetting = discount with precision = full forgets the prior itself, and the "
                "matrix becomes singular; accepted are temper and diffuse"
            )
        if imp.forgetting != "temper" and imp.gate.shape == "value":
            raise ValueError(
                f"forgetting = {imp.forgetting} takes one importance per key, not one per synapse"
            )
        if imp.forgetting == "temper" and self.decay.shape == "key":
            if precision == "full":
                raise ValueError(
                    "precision = full with a decay per key and forgetting = temper is unsound: the "
                    "map of the mean from token to token may enlarge it 20 times; accepted is "
                    "forgetting = diffuse"
                )
            if precision == "isotropic" or imp.basis == "rotated":
                what = "isotropic" if precision == "isotropic" else "rotated"
                raise ValueError(
                    f"an {what} importance has no decay per key under forgetting = temper: the "
                    "mean would have to be forgotten along other axes than it is stored; accepted "
                    "is forgetting = diffuse"
                )
        if imp.forgetting == "discount" and self.decay.shape == "key" and precision == "isotropic":
            raise ValueError(
                "forgetting = discount with precision = isotropic has a decay per head"
            )
        if (precision != "diagonal" or imp.basis == "rotated") and self.read.when == "pre":
            raise ValueError(
                "read.when = pre is defined for a diagonal precision in the basis of the keys"
            )
        if (imp.forgetting != "temper" or precision == "full") and self.erase.side == "removal":
            raise ValueError(
                "erase.side = removal is defined for a diagonal precision with forgetting = temper"
            )

    def _repr_html_(self) -> str | None:
        """Return what `glazoo show` prints, for notebooks; None, where rich is not installed."""
        # By name: what a spec computes is nothing that specs need to know otherwise.
        shown: str | None = import_module("glazoo.program").lower(self)._repr_html_()
        return shown


def _no_rate(write: Gate) -> str | None:
    """Says why a write gate is not the rate of an observation's precision, or gives None."""
    bounded = (write.tie, write.parameterization) == ("none", "sigmoid") and write.factor <= 1
    if write.shape == "none":
        return "without a write gate every observation is infinitely precise"
    if not bounded and write.tie != "one_minus_decay":
        return (
            f"the write gate (parameterization {write.parameterization!r}, factor "
            f"{write.factor:g}, tie {write.tie!r}) may exceed 1, and a rate above 1 has no "
            "precision"
        )
    return None


def no_exact_gain(spec: Spec) -> str | None:
    """Says why the metaplastic form of a source has no exact gain, or gives None if it has one.

    Args:
        spec: a spec with `posterior.precision = "frozen"`.

    Returns:
        The reason, for a message, or None.
    """
    if spec.posterior.gain == "exact":
        return None
    if spec.posterior.gain == "flow":
        return f"{spec.name!r} has the gain of a flow"
    if spec.posterior.correction != "full":
        return f"{spec.name!r} subtracts no prediction"
    if spec.erase != Erase():
        return f"{spec.name!r} predicts otherwise than it writes ([erase] is not at its defaults)"
    return _no_rate(spec.write)


def metaplasticize(
    spec: Spec,
    *,
    gate: Literal["head", "value"] | None = None,
    gain: Literal["first_order", "exact"] | None = None,
    precision: Literal["diagonal", "isotropic", "full"] | None = None,
    basis: Literal["own", "rotated"] | None = None,
    forgetting: Literal["temper", "diffuse"] | None = None,
    rank: int = 16,
) -> Spec:
    """Return the metaplastic counterpart of a spec: it gains an importance gate and a prior, and
    nothing else changes. What `glazoo.metaplasticize`, which says more, does with specs.

        precision frozen -> diagonal;  correction none -> diagonal;  J_t = a_t J_{t-1} + b_t k_t^2,
        I_t = J_t + I_p

    Args:
        spec: a spec with `posterior.precision = "frozen"`.
        gate: shape of the importance gate b. Default: "head".
        gain: learning rate of a source that subtracts its prediction. Default: "exact" where
            `no_exact_gain` knows no reason against it.
        precision: what importance is: a vector over keys, one number per head, or a matrix over
            keys. Default: "diagonal".
        basis: whether a vector over keys counts along the keys' own axes or along those of an
            operand. Default: "own".
        forgetting: how a decay acts on importance. Default: "temper" where that is sound,
            otherwise "diffuse".
        rank: rank of the projection that makes the gate depend on the token.

    Returns:
        The metaplastic spec, named `metaplastic_<name>`, and after that by its precision, basis and
        forgetting where these are no defaults (`metaplastic_mamba2_full`). With b = 0 and I_p = 1
        it computes what `spec` computes.

    Raises:
        SpecError: `spec` is metaplastic already, an option is not one of the above, or `spec` has
            no such form.

    Reference: arXiv:2602.09075, section 3 and appendix (Mamba2 as a limit of Palimpsa).
    """
    if spec.metaplastic:
        raise SpecError(
            f"{spec.name!r} is metaplastic already "
            f"(posterior.precision = {spec.posterior.precision!r}); "
            "only a spec with frozen precision has a metaplastic counterpart"
        )
    options = {
        "gate": gate, "gain": gain, "precision": precision, "basis": basis, "forgetting": forgetting
    }  # fmt: skip
    for option, value in options.items():
        if value is not None and value not in COUNTERPARTS[option]:
            raise SpecError(
                f"{option}: got {value!r}, accepted are "
                + " and ".join(map(repr, COUNTERPARTS[option]))
            )
    source, precision = spec.posterior, precision or "diagonal"
    reason = no_exact_gain(spec)
    if gain is None and source.gain != "first_order":
        gain = source.gain  # type: ignore[assignment]  # of a flow, which no option asks for
    elif gain is None:
        gain = "exact" if reason is None else "first_order"
    elif source.gain == "exact":
        reason = None
    if gain == "exact" and reason is not None:
        raise SpecError(f"gain: 'exact' is not possible here: {reason}")
    if source.gain != "first_order" and gain != source.gain:
        raise SpecError(f"gain: got {gain!r}, but that of {spec.name!r} is {source.gain!r}")
    if source.correction == "diagonal" and precision != "diagonal":
        raise SpecError(
            f"precision: got {precision!r}, but every synapse of {spec.name!r} corrects its own "
            "part alone; accepted is 'diagonal'"
        )
    rate = gain != source.gain
    straight = (precision, basis or "own") == ("diagonal", "own")
    sound: Literal["temper", "diffuse"] = "temper"
    if not straight and spec.decay.shape == "key":
        sound = "diffuse"
    forgetting = sound if forgetting is None else forgetting
    importance = {
        "gate": Gate(
            shape=gate or "head",
            parameterization="sigmoid",
            factor=2.0,
            tie="precision" if rate else "write",
            rank=rank,
            weight_init=Init(distribution="zeros"),
        ),
        "evidence": "outer_product" if precision == "full" else "key_squared",
        "forgetting": forgetting,
        "basis": basis or "own",
    }
    chosen = (precision, basis, None if forgetting == sound else forgetting)
    special = [x for x in chosen if x in FORMS]
    correction = source.correction
    if correction == "none" and precision == "diagonal":
        correction = "diagonal"
    posterior = {
        "precision": precision,
        "correction": correction,
        "gain": gain,
        "beta": "rate" if rate else source.beta,
    }
    data = spec.model_dump() | {
        "name": "_".join(("metaplastic", spec.name, *special)),
        "counterpart": spec.name,
        "posterior": source.model_dump() | posterior,
        "importance": importance,
    }
    try:
        return Spec.model_validate(data)
    except ValidationError as e:
        reasons = "; ".join(
            str(x["ctx"]["error"]) for x in e.errors() if "error" in x.get("ctx", {})
        )
        raise SpecError(
            f"{spec.name!r} has no metaplastic form with precision = {precision}, "
            f"forgetting = {forgetting}, basis = {basis or 'own'}: {reasons or e}"
        ) from None


def freeze(spec: Spec) -> Spec:
    """Return the spec without its importance state: the inverse of `metaplasticize`.

        precision diagonal -> frozen;  correction diagonal with the first-order gain -> none;
        exact gain of a rate -> first-order gain

    Args:
        spec: a spec with `posterior.precision = "diagonal"`.

    Returns:
        The frozen spec; `freeze(metaplasticize(s)) == s`. A metaplastic spec that was not made from
        another is named `frozen_<name>`.

    Raises:
        SpecError: the spec is frozen already, keeps a full precision matrix, or counts evidence
            that no frozen spec has.
    """
    p, imp = spec.posterior, spec.importance
    if imp is None:
        raise SpecError(f"{spec.name!r} is frozen already: it has no importance state to remove")
    if imp.gate.shape == "none":
        raise SpecError(
            f"{spec.name!r} has no frozen counterpart: its write is defined by its importance "
            f"(precision = {p.precision!r}, evidence = {imp.evidence!r})"
        )
    rate = {"gain": "first_order", "beta": "precision"} if p.beta == "rate" else {}
    return Spec.model_validate(
        spec.model_copy(
            update={
                "name": spec.counterpart or f"frozen_{spec.name}",
                "counterpart": None,
                "posterior": p.model_copy(
                    update={
                        "precision": "frozen",
                        "correction": "none" if spec.hebbian else p.correction,
                        **rate,
                    }
                ),
                "importance": None,
            }
        ).model_dump()
    )
