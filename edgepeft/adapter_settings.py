"""Numbers and patterns of an adapter's configuration, checked: what techniques with a rank have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import AdapterError
from .patterns import ModulePatterns


def check_number(origin: str, key: str, value: object, *, integer: bool) -> None:
    """
    Raises:
        AdapterError: the value is no number, or, where `integer`, no whole number from 1 on.
    """
    kinds = int if integer else (int, float)
    if (
        not isinstance(value, kinds)
        or isinstance(value, bool)
        or not abs(value) <= 2**31
        or (integer and value < 1)
    ):
        expected = "a whole number of at least 1" if integer else "a number"
        raise AdapterError(f"{origin}: adapter_config.json: {key} is {value!r}, expected {expected}")


def check_bias(config: Mapping[str, Any], of_targets: str, origin: str) -> None:
    """Check the option `bias` of a method that calls training its target modules' biases `of_targets`.

    Raises:
        AdapterError: it is none of PEFT's values.
    """
    if (bias := config.get("bias", "none")) not in ("none", "all", of_targets):
        raise AdapterError(
            f"{origin}: bias={bias!r} is not supported, expected 'none', 'all' or {of_targets!r}"
        )


def check_share(config: Mapping[str, Any], key: str, origin: str) -> None:
    """
    Raises:
        AdapterError: the option is there and no number from 0 to below 1.
    """
    value = config.get(key)
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise AdapterError(
            f"{origin}: adapter_config.json: {key} is {value!r}, expected a number from 0 to below 1"
        )


def check_pattern(origin: str, name: str, patterns: object) -> None:
    """
    Raises:
        AdapterError: it is no object, or one of its values is no rank or alpha.
    """
    if patterns is None:
        return
    if not isinstance(patterns, dict):
        raise AdapterError(f"{origin}: adapter_config.json: {name} is {patterns!r}, expected an object")
    for key, value in patterns.items():
        check_number(origin, f"{name}[{key!r}]", value, integer=name == "rank_pattern")


def read_patterns(
    config: Mapping[str, Any], name: str, modules: Sequence[str], origin: str
) -> ModulePatterns:
    """The configuration's `rank_pattern` or `alpha_pattern`.

    Raises:
        AdapterError: a key is no regular expression, or too costly to match with these modules.
    """
    try:
        patterns = ModulePatterns(config.get(name))
        patterns.check_cost(modules)
    except ValueError as error:
        raise AdapterError(f"{origin}: adapter_config.json: {name} {error}") from error
    return patterns


def check_rank(config: Mapping[str, Any], alpha: str, origin: str) -> None:
    """Check a configuration's rank `r`, what it calls `alpha`, and their patterns.

    Raises:
        AdapterError: names the field.
    """
    check_number(origin, "r", config.get("r"), integer=True)
    check_number(origin, alpha, config.get(alpha, 8), integer=False)
    check_pattern(origin, "rank_pattern", config.get("rank_pattern"))
    check_pattern(origin, "alpha_pattern", config.get("alpha_pattern"))


def ranks_and_alphas(
    config: Mapping[str, Any], alpha: str, modules: Sequence[str], origin: str
) -> dict[str, tuple[int, float]]:
    """The rank and the alpha that a checked configuration gives each module, after its patterns.

    Raises:
        AdapterError: see `read_patterns`.
    """
    ranks, alphas = (
        read_patterns(config, name, modules, origin) for name in ("rank_pattern", "alpha_pattern")
    )
    return {
        module: (ranks.value(module, config["r"]), float(alphas.value(module, config.get(alpha, 8))))
        for module in modules
    }
