"""Our own quantisation: which matrix gets how many bits, and its rounding (cpp/kernels/pack/quantise.cc) as it is read.

Every matrix is one of a few *units* that share a form: q, k, v and o each, gate with up, down, embedding, head. With a number
of bits a unit has that many; with `auto`, bits are dealt out so that the sum of the units' errors is least for the bits
that may be spent. An error is the unit's share of what it multiplies that rounding destroys, estimated on a sample of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UsageError
from .codes import Codes, Form, RowsRead
from .rows import RowSource, floats_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .writer import TensorData

    Importance = Mapping[str, NDArray[np.float32]]

BITS = (4, 5, 6, 8, 16)
GROUPS = (32, 64, 128)
STORED_GROUP = 32  # larger groups are stored as several of 32 with one scale
OUTER_BITS = 6  # least bits of embedding and head, on which every token depends
# attn_v is small where key heads are shared, and worth more than any other matrix of its size (_KIND_WEIGHTS).
_VALUE_BITS = {4: 6, 5: 6, 6: 8, 8: 8}
_SAMPLE_ROWS = 64  # of a matrix, from which its errors are estimated
_MIN_GAIN = 0.5  # minima take half a bit a weight; half a bit of rounding is worth a factor 2 of the squared error

# What `auto` may choose from, by bits a weight.
_CHOICES = (
    Form("q4"),
    Form("q4", has_min=True),
    Form("q5"),
    Form("q5", has_min=True),
    Form("q6"),
    Form("q8"),
)


@dataclass(frozen=True)
class Quantisation:
    """How to round a model. `bits` of the layers' matrices, 0 for `auto` (then `target_bpw` bits a weight of all matrices);
    weights of `group` columns share a scale. 16 keeps bfloat16 and makes the rest float16."""

    bits: int
    group: int = 32
    target_bpw: float = 4.5

    def __post_init__(self) -> None:
        if self.bits not in (0, *BITS):
            raise UsageError(f"{self.bits} bits are not supported; choose auto or one of {', '.join(map(str, BITS))}")
        if self.group not in GROUPS:
            raise UsageError(f"groups of {self.group} are not supported; choose one of {', '.join(map(str, GROUPS))}")
        if self.bits == 0 and not 4.5 <= self.target_bpw <= 8.5:
            raise UsageError(f"{self.target_bpw:g} bits a weight cannot be reached; choose from 4.5 to 8.5")

    @property
    def text(self) -> str:
        """For records and messages."""
        if self.bits == 16:
            return "16 bits"
        bits = f"{self.bits} bits" if self.bits else f"{self.target_bpw:g} bits a weight"
        return f"{bits} in groups of {self.group}"


def stored_bits(form: Form) -> float:
    """Bits of a weight with its share of scale and minimum."""
    return form.bits + form.scale_bits


@dataclass
class _Unit:
    """Matrices that share a form: their roles, weights, and by form the share of their work that rounding destroys."""

    name: str
    roles: list[str]
    weight: float  # how much the unit's error counts
    params: int = 0
    errors: dict[Form, float] = field(default_factory=dict)

    @property
    def outer(self) -> bool:
        return not self.name.startswith("layers.")


def unit_of(role: str) -> str:
    """The unit of a matrix: gate and up share one, since they are stored as one matrix."""
    return role.replace("ffn_gate", "ffn_gate_up") if role.endswith("ffn_gate") else role


def plan_forms(
    roles: Mapping[str, TensorData],
    quantisation: Quantisation,
    importance: Importance | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, Form]:
    """The form of every matrix by role. `importance`: mean square of each column's input, by role; `weights`: how much a
    unit's error counts (default: by its kind)."""
    matrices = matrices_of(roles)
    gated = {role for role in matrices if role.endswith("ffn_gate")}
    layers = len({role.split(".")[1] for role in matrices if role.startswith("layers.")})
    units: dict[str, _Unit] = {}
    for role, source in matrices.items():
        name = unit_of(role)
        if role.endswith("ffn_up") and role[: -len("up")] + "gate" in gated:
            name = role[: -len("ffn_up")] + "ffn_gate_up"
        weight = (weights or {}).get(name, _kind_weight(name, layers, "output" not in matrices))
        unit = units.setdefault(name, _Unit(name, [], weight))
        unit.roles.append(role)
        unit.params += source.rows * source.cols
    if quantisation.bits == 16:
        kinds = {unit.name: {matrices[role].form.kind for role in unit.roles} for unit in units.values()}
        return {
            role: Form("bf16" if kinds[unit.name] == {"bf16"} else "f16")
            for unit in units.values()
            for role in unit.roles
        }
    if quantisation.bits:
        chosen = {unit.name: _fixed_form(unit, matrices, quantisation, importance or {}) for unit in units.values()}
    else:
        for unit in units.values():
            for form in _CHOICES:
                unit.errors[form] = sample_error(unit, matrices, form, quantisation.group, importance or {})
        chosen = deal(list(units.values()), quantisation.target_bpw)
    return {role: chosen[unit.name] for unit in units.values() for role in unit.roles}


def _fixed_form(
    unit: _Unit, matrices: Mapping[str, RowSource], quantisation: Quantisation, importance: Importance
) -> Form:
    bits = quantisation.bits
    if unit.outer:
        bits = max(bits, OUTER_BITS)
    elif unit.name.endswith("attn_v"):
        bits = _VALUE_BITS[bits]
    plain, minima = Form(f"q{bits}"), Form(f"q{bits}", has_min=True)
    errors = [sample_error(unit, matrices, form, quantisation.group, importance) for form in (plain, minima)]
    return minima if errors[1] < _MIN_GAIN * errors[0] else plain


def sample_error(
    unit: _Unit, matrices: Mapping[str, RowSource], form: Form, group: int, importance: Importance
) -> float:
    """Squared error of a sample of the unit's rows in a form, as a share of their energy; both weighted by importance."""
    import numpy as np

    from .. import _core

    error = energy = 0.0
    for role in unit.roles:
        source = matrices[role]
        # Four runs of rows spread over the matrix: reading is cheap in runs.
        count = max(1, min(_SAMPLE_ROWS // 4, source.rows // 4))
        for part in range(4):
            at = (source.rows - count) * part // 3
            values = np.ascontiguousarray(floats_of(source.read(at, at + count)), np.float32)
            found = _core.quantise_rows(values, form.kind, group, form.has_min, importance.get(role))
            error, energy = error + found[3], energy + found[4]
    return error / energy if energy > 0 else 0.0


# How much an error counts: KL divergence (nats a token) from 4 bits in all matrices of a kind, per share of energy destroyed.
# Measured on SmolLM2-135M turned by a random isometry (tests/bench/quantiser_quality.py), 765 tokens of WikiText-2.
_KIND_WEIGHTS = {
    "attn_q": 1.7, "attn_k": 1.6, "attn_v": 20.0, "attn_o": 1.5, "ffn_gate_up": 14.0, "ffn_up": 14.0, "ffn_down": 10.5,
    "token_embd": 1.0, "output": 6.4,
}  # fmt: skip


def _kind_weight(name: str, layers: int, tied: bool) -> float:
    kind = name.rpartition(".")[2]
    if name.startswith("layers."):
        return _KIND_WEIGHTS[kind] / layers
    return _KIND_WEIGHTS[kind] + (_KIND_WEIGHTS["output"] if tied else 0)


def deal(units: list[_Unit], target_bpw: float) -> dict[str, Form]:
    """The forms by unit that make the weighted sum of errors least within `target_bpw` bits a weight: of all steps to a
    larger form the one that saves most per bit is taken, again and again. Steps that another one beats are left out first
    (the lower convex hull of each unit), which makes the greedy choice the best one up to a last step."""
    hulls = {unit.name: _hull(unit) for unit in units}
    budget = target_bpw * sum(unit.params for unit in units)
    at = {unit.name: 0 for unit in units}
    spent = sum(stored_bits(hulls[unit.name][0]) * unit.params for unit in units)
    steps = sorted(
        (
            (-_gain(unit, a, b), unit.name, unit.params * (stored_bits(b) - stored_bits(a)))
            for unit in units
            for a, b in zip(hulls[unit.name], hulls[unit.name][1:])
        ),
    )
    stuck: set[str] = set()
    for _, name, cost in steps:
        if name in stuck:
            continue
        if spent + cost > budget:
            stuck.add(name)
            continue
        spent += cost
        at[name] += 1
    return {name: hulls[name][i] for name, i in at.items()}


def _gain(unit: _Unit, a: Form, b: Form) -> float:
    """Error saved per bit spent by the step from form a to form b."""
    saved = unit.weight * (unit.errors[a] - unit.errors[b])
    return saved / (unit.params * (stored_bits(b) - stored_bits(a)))


def _hull(unit: _Unit) -> list[Form]:
    forms = sorted(unit.errors, key=lambda f: (stored_bits(f), unit.errors[f]))
    hull = [forms[0]]
    for form in forms[1:]:
        if unit.errors[form] >= unit.errors[hull[-1]]:
            continue
        while len(hull) > 1 and _gain(unit, hull[-1], form) >= _gain(unit, hull[-2], hull[-1]):
            hull.pop()
        hull.append(form)
    return hull


@dataclass
class Rounding:
    """A quantisation and what was measured of the source; `apply` rounds its matrices."""

    quantisation: Quantisation
    importance: Importance = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    natural_sparsity: Mapping[str, Any] | None = None

    def apply(self, roles: Mapping[str, TensorData]) -> dict[str, TensorData]:
        """The roles with their matrices rounded as they are read."""
        forms = plan_forms(roles, self.quantisation, self.importance, self.weights)
        group, importance = self.quantisation.group, self.importance
        rounded: dict[str, TensorData] = {
            role: QuantisedRows(source, forms[role], group, importance.get(role), role)
            for role, source in matrices_of(roles).items()
        }
        return {**roles, **rounded}

    def record(self) -> dict[str, Any]:
        """Entries of source.json."""
        entries: dict[str, Any] = {
            "quantised": {"bits": self.quantisation.text, "calibrated": bool(self.importance)}
        }
        if self.natural_sparsity is not None:
            entries["natural_sparsity"] = self.natural_sparsity
        return entries


def matrices_of(roles: Mapping[str, TensorData]) -> dict[str, RowSource]:
    """The roles that are matrices."""
    import numpy as np

    return {role: data for role, data in roles.items() if not isinstance(data, np.ndarray)}


class QuantisedRows:
    """A source rounded to another form. Raises ModelError where a weight is too large for it."""

    def __init__(
        self,
        source: RowSource,
        form: Form,
        group: int,
        importance: NDArray[np.float32] | None = None,
        name: str = "a matrix",
    ) -> None:
        self.source, self.form, self.group, self.importance, self.name = source, form, group, importance, name
        self.rows, self.cols = source.rows, source.cols

    def read(self, begin: int, end: int) -> RowsRead:
        import numpy as np

        from .. import _core

        values = np.ascontiguousarray(floats_of(self.source.read(begin, end)), np.float32)
        if not self.form.quantised:
            if self.form.kind == "f16" and values.size and float(np.abs(values).max()) >= 65520.0:
                raise self._too_large()
            return values
        if begin == end:
            return _no_rows(self.form, self.cols)
        codes, scales, mins, _, _ = _core.quantise_rows(
            values, self.form.kind, self.group, self.form.has_min, self.importance
        )
        if not (np.isfinite(scales).all() and (mins is None or np.isfinite(mins).all())):
            raise self._too_large()
        repeat, groups = self.group // self.form.group, -(-self.cols // self.form.group)

        def stored(part: NDArray[np.float16]) -> NDArray[np.float16]:
            return np.ascontiguousarray(np.repeat(part, repeat, axis=1)[:, :groups])

        return Codes(self.form, codes, stored(scales), None if mins is None else stored(mins))

    def _too_large(self) -> ModelError:
        return ModelError(
            f"{self.name} holds weights too large for {self.form.kind} (above 65504); convert without --bits, which keeps "
            "every weight"
        )


def _no_rows(form: Form, cols: int) -> Codes:
    import numpy as np

    scales = np.zeros((0, -(-cols // form.group)), np.float16)
    return Codes(form, np.zeros((0, cols), np.uint8), scales, scales if form.has_min else None)
