"""Sizes of tensors: polynomials in the symbols of a weight map, and the solution of the symbols."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Size:
    """A sum of products of symbols with integer factors, such as 4*c0, c3+c2 or heads*head.

    A term is a product ("heads*head", symbols in alphabetical order) and its factor; the product "" stands
    for the number 1.
    """

    terms: tuple[tuple[str, int], ...]

    @classmethod
    @cache
    def parse(cls, text: str) -> Size:
        """Parse a size such as "4*c0" or "c3+c2". Raises ValueError for anything else."""
        terms: Counter[str] = Counter()
        for term in text.split("+"):
            factors = term.split("*")
            symbols = [factor for factor in factors if not factor.isdigit()]
            if not all(symbol.isidentifier() for symbol in symbols):
                raise ValueError(f"not a size: {text!r}")
            terms[_product(symbols)] += math.prod(int(factor) for factor in factors if factor.isdigit())
        return cls(tuple(sorted(terms.items())))

    def __add__(self, other: Size) -> Size:
        terms = Counter(dict(self.terms))
        for product, count in other.terms:
            terms[product] += count
        return Size(tuple(sorted(terms.items())))

    def __mul__(self, other: Size) -> Size:
        terms: Counter[str] = Counter()
        for one, count in self.terms:
            for two, factor in other.terms:
                terms[_product([*_symbols(one), *_symbols(two)])] += count * factor
        return Size(tuple(sorted(terms.items())))

    def substitute(self, values: Mapping[str, Size]) -> Size:
        """The size with symbols replaced by sizes."""
        if len(self.terms) == 1 and self.terms[0][1] == 1 and "*" not in self.terms[0][0]:
            return values.get(self.terms[0][0], self)  # most sizes are one symbol
        total = Size(())
        for product, count in self.terms:
            term = Size((("", count),))
            for symbol in _symbols(product):
                term *= values.get(symbol, Size(((symbol, 1),)))
            total += term
        return total

    def value(self, dims: Mapping[str, int]) -> int | None:
        """The value for the symbols in `dims`, or None if one of its symbols is not among them.

        `dims` may also have the value of a product.
        """
        total = 0
        for product, count in self.terms:
            known = dims.get(product) if product else 1
            if known is None and "*" in product:
                values = [dims.get(symbol) for symbol in _symbols(product)]
                known = None if None in values else math.prod(value for value in values if value is not None)
            if known is None:
                return None
            total += count * known
        return total

    def solve(self, value: int) -> tuple[str, int] | None:
        """The symbol or product and its value, given the value of the size.

        None unless the size is one term with a factor that divides `value`.
        """
        if len(self.terms) == 1:
            product, count = self.terms[0]
            if product and value % count == 0:
                return product, value // count
        return None

    def __str__(self) -> str:
        return "+".join(
            (f"{count}*{product}" if count > 1 else product) if product else str(count)
            for product, count in self.terms
        )


def _symbols(product: str) -> list[str]:
    return product.split("*") if product else []


def _product(symbols: Iterable[str]) -> str:
    return "*".join(sorted(symbols))


def solved(dims: Mapping[str, int], equal: Mapping[str, str]) -> dict[str, int]:
    """The sizes with products resolved: a product with one unknown symbol gives that symbol.

    `dims` has the values of symbols and products. `equal` maps symbols to the products that they equal. A
    product that has no integer solution stays.
    """
    found = dict(dims)
    for symbol, product in equal.items():
        if symbol in found:
            found.setdefault(_product(_symbols(product)), found[symbol])
    for product in [name for name in found if "*" in name]:
        symbols = _symbols(product)
        unknown = {symbol for symbol in symbols if symbol not in found}
        if len(unknown) > 1:
            continue
        rest = math.prod(found[symbol] for symbol in symbols if symbol in found)
        if unknown and rest and found[product] % rest == 0:
            symbol, value = unknown.pop(), found[product] // rest
            root = round(value ** (1 / symbols.count(symbol)))
            if root ** symbols.count(symbol) != value:
                continue
            found[symbol] = root
        elif unknown:
            continue
        del found[product]
    return found
