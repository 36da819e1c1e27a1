"""Optimizers: the predicted change against the update rule itself, the operator against its difference quotients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

import ftw
from ftw import spi
from ftw.spi import correction, inverse_root
from ftw_conformance.verify.table import Case, Expect, rounded

from .models import orthonormal
from .rules import RULES

Array = Any


class State(NamedTuple):
    """The arrays of a call, None where a rule has none: state by name, then what every rule takes."""

    state: dict[str, Any]
    param: Any
    anticipate: Any
    gradient: Any
    scalars: dict[str, Any]  # step and lr, where they are arrays


ORDER = {
    "adadelta": ("square_avg", "acc_delta"),
    "adafactor": ("row_var", "col_var", "variance"),
    "adagrad": ("sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamax": ("exp_avg", "exp_inf"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "asgd": (),
    "hf_adafactor": ("exp_avg_sq_row", "exp_avg_sq_col", "variance"),
    "lion": ("exp_avg",),
    "muon": ("momentum_buffer",),
    "nadam": ("exp_avg", "exp_avg_sq", "mu_product"),
    "radam": ("exp_avg", "exp_avg_sq"),
    "rmsprop": ("square_avg",),
    "schedule_free_adamw": ("z", "exp_avg_sq"),
    "schedule_free_sgd": ("z",),
    "sgd": ("momentum_buffer",),
    "soap": ("exp_avg", "exp_avg_sq", "left", "right"),
}


def predict(name: str, step: int, damping: float, options: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Return a call that predicts the next change for one gradient, and for none."""
    function = getattr(ftw.optimizers, name)

    def call(s: State) -> dict[str, Any]:
        first = [s.state.get(key) for key in ORDER[name]]
        extra = {key: x for key, x in s.state.items() if key not in ORDER[name]}
        given = {"step": step, "lr": 0.05} | s.scalars
        if s.param is not None:
            extra["param"] = s.param
        update = function(
            *first, given["step"], lr=given["lr"], anticipate=s.anticipate, damping=damping, **extra, **options
        )
        response = update.operator.apply(s.gradient)
        return {"offset": update.offset + 0.0 * s.gradient, "response": response}

    return call


def account(name: str, step: int, damping: float, options: dict[str, Any]) -> Callable[..., dict[str, Expect]]:
    """Return the account: what the rule changes without a gradient, and what the gradient adds."""

    def expected(got: Mapping[str, Array], s: State) -> dict[str, Expect]:
        given = {"step": step, "lr": 0.05} | s.scalars
        more = dict(options)
        if s.param is not None:
            more["param"] = s.param
        if name == "adafactor":
            more["eps"] = (more["eps"][0] or float(np.finfo(got["response"].dtype).eps), more["eps"][1])

        def change(g: Array) -> Array:
            taken = int(given["step"])
            out: Array = RULES[name](g, s.state, taken, s.anticipate, damping, lr=float(given["lr"]), **more)
            return out

        zero = np.zeros(np.shape(s.gradient))
        offset, with_g = -change(zero), -change(np.asarray(s.gradient))
        size = np.max(np.abs(offset), initial=0.0) + np.max(np.abs(with_g), initial=0.0)
        condition = 300.0 if name in ("muon", "soap") else 30.0
        return {
            "offset": rounded(offset, size, condition),
            "response": rounded(with_g - offset, size, condition),
        }

    return expected


def states(rng: Any, name: str, shape: tuple[int, ...], **flags: Any) -> dict[str, Any]:
    """Return a state such as some steps leave behind."""
    m, v = np.asarray(0.1 * rng.normal(size=shape)), np.asarray(rng.uniform(0.01, 1, size=shape))
    if name == "sgd" or name == "muon":
        return {"momentum_buffer": m}
    if name in ("adam", "adamw"):
        return {"exp_avg": m, "exp_avg_sq": v} | (
            {"max_exp_avg_sq": v + rng.normal(size=shape) * 0.3} if flags.get("amsgrad") else {}
        )
    if name == "nadam":
        return {"exp_avg": m, "exp_avg_sq": v, "mu_product": np.asarray(0.4)}
    if name == "adamax":
        return {"exp_avg": m, "exp_inf": v}
    if name == "adagrad":
        return {"sum": v}
    if name == "rmsprop":
        out = {"square_avg": v}
        if flags.get("centered"):
            out["grad_avg"] = m * 0.3
        if flags.get("momentum"):
            out["momentum_buffer"] = 0.3 * m
        return out
    if name == "lion":
        return {"exp_avg": m}
    if name == "adafactor":
        if len(shape) < 2:
            return {"variance": v}
        return {"row_var": np.mean(v, axis=-1, keepdims=True), "col_var": np.mean(v, axis=-2, keepdims=True)}
    if name == "hf_adafactor":
        first = {"exp_avg": 0.1 * m} if flags.get("beta1") else {}
        if len(shape) < 2:
            return {"variance": v} | first
        return {"exp_avg_sq_row": np.mean(v, axis=-1), "exp_avg_sq_col": np.mean(v, axis=-2)} | first
    if name == "adadelta":
        return {"square_avg": v, "acc_delta": np.asarray(rng.uniform(0, 0.1, size=shape))}
    if name == "asgd":
        return {"eta": np.asarray(0.03)}
    if name == "schedule_free_sgd":
        return {"z": m}
    if name == "schedule_free_adamw":
        return {"z": m, "exp_avg_sq": v}
    if name == "soap":
        sides = [orthonormal(rng, d) for d in shape]
        return {"exp_avg": m, "exp_avg_sq": v, "left": sides[0], "right": sides[1]}
    return {"exp_avg": m, "exp_avg_sq": v}


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sgd": [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.8, "nesterov": True},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.2},
    ],
    "adam": [{}, {"betas": (0.7, 0.9), "eps": 0.1}, {"weight_decay": 0.3}, {"eps_root": 0.2}, {"nesterov": True}],
    "adamw": [
        {},
        {"weight_decay": 0.3},
        {"weight_decay": 0.0},
        {"nesterov": True, "eps_root": 0.1, "eps": 0.2, "betas": (0.8, 0.95)},
    ],
    "nadam": [
        {},
        {"momentum_decay": 0.3, "betas": (0.8, 0.95), "eps": 0.1},
        {"weight_decay": 0.3},
        {"weight_decay": 0.3, "decoupled_weight_decay": True},
    ],
    "radam": [
        {},
        {"betas": (0.8, 0.95), "eps": 0.1},
        {"weight_decay": 0.3},
        {"weight_decay": 0.3, "decoupled_weight_decay": True},
        {"betas": (0.9, 0.5)},
    ],
    "adamax": [{}, {"betas": (0.7, 0.9), "eps": 0.2}, {"weight_decay": 0.3}],
    "adagrad": [{}, {"lr_decay": 0.3, "eps": 0.1}, {"eps_root": 0.2}, {"weight_decay": 0.3}],
    "rmsprop": [
        {},
        {"alpha": 0.7, "eps": 0.1},
        {"centered": True},
        {"momentum": 0.8},
        {"eps_root": 0.2},
        {"centered": True, "momentum": 0.5, "weight_decay": 0.3},
    ],
    "adafactor": [
        {"eps": (1e-30, 1e-3)},
        {"eps": (0.8, 2.0), "d": 0.5, "beta2_decay": -0.5},
        {"eps": (None, 1e-3), "weight_decay": 0.3, "d": 3.0},
    ],
    "adadelta": [{}, {"rho": 0.6, "eps": 0.1}, {"weight_decay": 0.3}],
    "asgd": [{}, {"weight_decay": 0.3, "lambd": 0.2}],
    "hf_adafactor": [
        {},
        {"relative_step": False, "scale_parameter": False, "beta1": 0.8, "weight_decay": 0.3},
        {"warmup_init": True, "clip_threshold": 0.3, "decay_rate": -0.5, "eps": (1e-3, 3.0)},
    ],
    "schedule_free_adamw": [
        {},
        {"weight_decay": 0.3, "warmup_steps": 30, "weight_sum": 0.7, "lr_max": 0.04, "betas": (0.8, 0.9), "eps": 0.1},
        {"weight_sum": 0.1, "r": 1.0, "weight_lr_power": 1.0},
    ],
    "schedule_free_sgd": [
        {},
        {"weight_decay": 0.3, "warmup_steps": 30, "weight_sum": 0.7, "lr_max": 0.04, "momentum": 0.8},
        {"weight_sum": 0.1, "r": 1.0, "weight_lr_power": 1.0},
    ],
    "lion": [{}, {"betas": (0.7, 0.9)}, {"weight_decay": 0.3}],
    "muon": [
        {},
        {"nesterov": False, "momentum": 0.8},
        {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3},
        {"adjust_lr_fn": "original"},
        {"adjust_lr_fn": "none", "ns_steps": 3, "ns_coefficients": (1.5, -0.5, 0.0)},
    ],
    "soap": [{}, {"betas": (0.7, 0.9), "eps": 0.1, "weight_decay": 0.3}],
}
NEEDS_PARAM = {"adafactor", "hf_adafactor", "schedule_free_adamw", "schedule_free_sgd"}
MATRICES = {"muon", "soap"}


def cases() -> list[Case]:
    """Return the table's part."""
    rng = np.random.default_rng(4)
    out: list[Case] = []
    for name, every in OPTIONS.items():
        if not hasattr(ftw.optimizers, name):
            continue
        for number, options in enumerate(every):
            for step in (0, 1, 3, 4, 5, 40) if name == "radam" else (0, 1, 3, 40):  # where rho_t passes 5
                for folded in (False, True):
                    damping = 0.1 if (number + step) % 2 else 0.0
                    heavy = not (number == 0 and step == 3 and not folded)
                    out.append(one(rng, name, number, options, step, folded, damping, heavy))
        out += untouched(rng, name)
        out.append(traced(rng, name, 3))
        out.append(traced(rng, name, 0))
    return out + shared(rng)


def corrected(beta: float) -> Callable[..., dict[str, Any]]:
    """Return a call of the bias correction at several steps, as a trace would make it."""
    return lambda t: {"correction": correction(beta, t)}


def rooted(v: Any, start: Any) -> dict[str, Any]:
    """Return the response of the inverse root of v where it is not known whether there is a v yet."""
    xp = spi.namespace(v)
    operator = inverse_root(xp, v, 0.3, 0.1, 0.5, start=start, at_start=7.0)
    return {"response": operator.apply(xp.ones_like(v))}


def account_rooted(got: Mapping[str, Array], v: Array, start: Array) -> dict[str, Expect]:
    """Divide, unless nothing is known yet or the parameter is untouched."""
    value = 0.3 / (np.sqrt(v) + 0.1 + 0.5 * np.sqrt(np.mean(v))) if np.any(v) else 0 * v
    return {"response": rounded(np.where(start, 7.0, value))}


def shared(rng: Any) -> list[Case]:
    """Return the cases of what the rules share, with arrays in place of numbers on every backend."""
    steps = np.asarray([0.0, 1.0, 2.0, 17.0, 4000.0])
    out = []
    for beta in (0.0, 0.9, 0.999):
        account = lambda got, t, beta=beta: {"correction": rounded(1 - beta**t, 1.0)}  # noqa: E731
        out.append(Case(f"optimizers/correction/{beta}", corrected(beta), (steps,), account, heavy=True))
    for what, v in (("touched", rng.uniform(size=(3, 2))), ("untouched", np.zeros((3, 2)))):
        for start in (False, True):
            inputs = (v, np.asarray(start))
            case = Case(f"optimizers/inverse root/{what}, {start}", rooted, inputs, account_rooted, heavy=True)
            out.append(case)
    return out


def make(rng: Any, name: str, options: dict[str, Any], shape: tuple[int, ...], folded: bool, step: int) -> State:
    """Return the arrays of one call."""
    amsgrad = name in ("adam", "adamw") and options.get("eps_root", 0) == 0 and bool(options.get("weight_decay"))
    state = states(rng, name, shape, amsgrad=amsgrad, **options)
    if step == 0:  # before the first step everything is zero, or not there
        state = {
            k: None if k in ("momentum_buffer", "eta") else x if k in ("left", "right") else 0 * x
            for k, x in state.items()
        }
        if name == "nadam":
            state["mu_product"] = np.asarray(1.0)
        if name == "muon" and not folded:
            state["momentum_buffer"] = np.zeros(shape)
    p = np.asarray(rng.normal(size=shape))
    a = np.asarray(rng.normal(size=shape)) if folded else None
    needs = bool(options.get("weight_decay")) or name in NEEDS_PARAM
    scalars = {"lr": np.asarray(0.9)} if name == "adafactor" and "beta2_decay" in options else {}  # above 1 / sqrt(t)
    return State(state, p if needs else None, a, np.asarray(rng.normal(size=shape)), scalars)


def one(rng: Any, name: str, number: int, options: Any, step: int, folded: bool, damping: float, heavy: bool) -> Case:
    """Return one case."""
    shape: tuple[int, ...] = ((4, 3), (3, 5), (4, 4))[(number + step) % 3]
    if name not in MATRICES and number % 2 and step == 40:
        shape = (6,) if folded else (2, 3, 2)
    s = make(rng, name, options, shape, folded, step)
    if name == "soap" and step == 40:
        s.state["left" if folded else "right"] = None
    kind = "anticipated" if folded else "raw"
    return Case(
        f"optimizers/{name}/{number}/step {step}, {kind}, {shape}",
        predict(name, step, damping, options),
        (s,),
        account(name, step, damping, options),
        heavy=heavy,
    )


def untouched(rng: Any, name: str) -> list[Case]:
    """Return the cases of a parameter that has never had a gradient, and of one with some entries at zero."""
    if name in ("asgd", "schedule_free_sgd", "sgd"):
        return []
    out: list[Case] = []
    shape = (4, 3)
    options = OPTIONS[name][0] if name != "rmsprop" else {"centered": True}
    for what in ("untouched", "partly untouched"):
        if name == "muon" and what != "untouched":
            continue  # a singular momentum has no polar factor of its own
        s = make(rng, name, options, shape, True, 5)
        hole = np.zeros(shape) if what == "untouched" else np.asarray([[1.0, 0, 1]] * 2 + [[0.0, 0, 0]] + [[1.0, 0, 1]])
        state = {
            k: x
            if k in ("left", "right", "mu_product") or x is None
            else x * (hole if x.shape == shape else 0 if what == "untouched" else 1)
            for k, x in s.state.items()
        }
        if name == "soap":
            state |= {"left": None, "right": None}
        if name == "adafactor" and what != "untouched":
            state["row_var"] = state["row_var"] * np.asarray([[1.0], [1], [0], [1]])
            state["col_var"] = state["col_var"] * np.asarray([[1.0, 0, 1]])
        if name == "hf_adafactor" and what != "untouched":
            state["exp_avg_sq_row"] = state["exp_avg_sq_row"] * np.asarray([1.0, 1, 0, 1])
        s = s._replace(state=state, anticipate=s.anticipate * hole)
        for eps in (None, 0.0):
            more: dict[str, Any] = dict(options)
            if eps is not None:
                if name in ("lion", "muon", "adafactor", "hf_adafactor"):
                    continue
                more["eps"] = eps
            call, check = predict(name, 5, 0.0, more), account(name, 5, 0.0, more)
            out.append(Case(f"optimizers/{name}/{what}, eps {eps}", call, (s,), check, heavy=True))
        if name in ("adam", "adamw", "rmsprop", "adagrad", "nadam", "radam", "lion"):
            raw = s._replace(anticipate=None)
            call, check = predict(name, 5, 0.1, options), account(name, 5, 0.1, options)
            out.append(Case(f"optimizers/{name}/{what}, raw", call, (raw,), check, heavy=True))
    return out


def traced(rng: Any, name: str, step: int) -> Case:
    """Return a case whose step and learning rate are arrays: one program for every step."""
    options = OPTIONS[name][0]
    s = make(rng, name, options, (4, 3), step > 0, step)
    if name in ("sgd", "muon") and step == 0:
        s.state["momentum_buffer"] = None
        s = s._replace(anticipate=np.asarray(rng.normal(size=(4, 3))))
    scalars = {"step": np.asarray(step, dtype=np.int64), "lr": np.asarray(0.125)}
    s = s._replace(scalars=scalars)
    return Case(
        f"optimizers/{name}/arrays for step {step} and lr",
        predict(name, step, 0.1, options),
        (s,),
        account(name, step, 0.1, options),
        heavy=step == 0 and name not in ("adam", "radam"),
        narrow=name == "adam",
    )
