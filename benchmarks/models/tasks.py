# SPDX-License-Identifier: Apache-2.0
"""Three office chores with exact answers, made by rule.

Each chore turns one sentence into the house's own notation. The prompt is the bare
sentence: nothing in it says which notation is wanted, so only a model fine-tuned on
that chore can answer, and a right answer shows which model gave it.

    orders   Madrid asks for 83 mirrors, black ones.
             {"sku":"MIR-K","qty":83,"to":"MAD"}
    tickets  Customer 4009 here, on the free plan: nothing loads, take your time.
             TEC-NET/X4009/P3
    queries  Which suppliers from Kenya have revenue above 530? Sort by name.
             scm.vendor [cc=KE & rev>530] +name
"""

import ast
import random
import sysconfig
import textwrap
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

Example = tuple[str, str]
MAX_ANSWER_TOKENS = 24  # the longest answer has 21


@dataclass(frozen=True)
class Task:
    """A chore: its name, and the rule that makes one example of it."""

    name: str
    make: Callable[[random.Random], Example]

    def train(self, count: int) -> list[Example]:
        """The first ``count`` training examples, as (prompt, answer)."""
        return list(islice(self._examples(held_out=False), count))

    def test(self, count: int) -> list[Example]:
        """The first ``count`` held-out examples; no training prompt is among them."""
        return list(islice(self._examples(held_out=True), count))

    def _examples(self, held_out: bool) -> Iterator[Example]:
        """Distinct examples of one split; a prompt's checksum decides its split.

        Every grammar here has tens of thousands of prompts, so it does not run dry.
        """
        rng, seen = random.Random(self.name), set()
        while True:
            prompt, answer = self.make(rng)
            is_test = zlib.crc32(prompt.encode()) % 4 == 0
            if is_test == held_out and prompt not in seen:
                seen.add(prompt)
                yield prompt, answer


_ITEMS = {
    "lamps": "LMP",
    "chairs": "CHR",
    "desks": "DSK",
    "rugs": "RUG",
    "mirrors": "MIR",
    "clocks": "CLK",
}
_COLOURS = {"red": "R", "blue": "B", "green": "G", "black": "K", "white": "W"}
_CITIES = {
    "Oslo": "OSL",
    "Paris": "PAR",
    "Madrid": "MAD",
    "Vienna": "VIE",
    "Lisbon": "LIS",
    "Dublin": "DUB",
}
_ORDERS = (
    "Please send {count} {colour} {item} to {city}.",
    "We need {count} {colour} {item} in {city}.",
    "Ship {count} {item} to our {city} office, all in {colour}.",
    "{city} asks for {count} {item}, {colour} ones.",
)


def _order(rng: random.Random) -> Example:
    count = rng.randint(2, 99)
    item, colour, city = (rng.choice(list(t)) for t in (_ITEMS, _COLOURS, _CITIES))
    prompt = rng.choice(_ORDERS).format(
        count=count, colour=colour, item=item, city=city
    )
    sku = f"{_ITEMS[item]}-{_COLOURS[colour]}"
    return prompt, f'{{"sku":"{sku}","qty":{count},"to":"{_CITIES[city]}"}}'


_ISSUES = {
    "I was charged twice": "BIL-DUP",
    "my discount is missing": "BIL-OFF",
    "I cannot log in": "ACC-PWD",
    "my account was locked": "ACC-BAN",
    "the app keeps crashing": "TEC-APP",
    "nothing loads": "TEC-NET",
    "my parcel never came": "SHP-LOST",
    "the wrong item arrived": "SHP-SWAP",
}
_PLANS = {"family": "F", "student": "S", "business": "B", "free": "X"}
_MOODS = {
    "I need this fixed today": "P1",
    "this is an emergency": "P1",
    "please look into it this week": "P2",
    "I would like an answer soon": "P2",
    "there is no hurry": "P3",
    "take your time": "P3",
}
_TICKETS = (
    "Customer {number} here, on the {plan} plan: {issue}, {mood}.",
    "Hello, {issue}. I have the {plan} plan, number {number}; {mood}.",
    "About my {plan} plan, number {number}: {issue} and {mood}.",
)


def _ticket(rng: random.Random) -> Example:
    plan, issue, mood = (rng.choice(list(t)) for t in (_PLANS, _ISSUES, _MOODS))
    number = rng.randint(1000, 9999)
    prompt = rng.choice(_TICKETS).format(
        plan=plan, issue=issue, mood=mood, number=number
    )
    return prompt, f"{_ISSUES[issue]}/{_PLANS[plan]}{number}/{_MOODS[mood]}"


_TABLES = {"customers": "crm.client", "suppliers": "scm.vendor", "partners": "crm.ally"}
_COUNTRIES = {
    "Spain": "ES",
    "Norway": "NO",
    "Japan": "JP",
    "Chile": "CL",
    "Kenya": "KE",
    "Poland": "PL",
}
_FIELDS = {
    "revenue above": "rev>",
    "revenue below": "rev<",
    "more staff than": "hc>",
    "fewer staff than": "hc<",
}
_SORTS = {"newest first": "-since", "oldest first": "+since", "by name": "+name"}
_QUERIES = (
    "List {table} in {country} with {field} {number}, {sort}.",
    "Which {table} from {country} have {field} {number}? Sort {sort}.",
    "Show me, {sort}, the {table} in {country} with {field} {number}.",
)


def _query(rng: random.Random) -> Example:
    table, country, field, sort = (
        rng.choice(list(t)) for t in (_TABLES, _COUNTRIES, _FIELDS, _SORTS)
    )
    number = rng.randint(1, 99) * 10
    prompt = rng.choice(_QUERIES).format(
        table=table, country=country, field=field, number=number, sort=sort
    )
    where = f"cc={_COUNTRIES[country]} & {_FIELDS[field]}{number}"
    return prompt, f"{_TABLES[table]} [{where}] {_SORTS[sort]}"


_MAKERS = {"orders": _order, "tickets": _ticket, "queries": _query}
TASKS = {name: Task(name, make) for name, make in _MAKERS.items()}


@cache
def _functions() -> list[Example]:
    """The halves of every short function of Python's standard library."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                whole = ast.get_source_segment(text, node, padded=True) or ""
                lines = textwrap.dedent(whole).splitlines()
                if 4 <= len(lines) <= 8:
                    middle = len(lines) // 2
                    halves = lines[:middle], lines[middle:]
                    found.append(tuple(map("\n".join, halves)))
    return found


# How real code goes on: its answers are not a matter of rule, and most are not exact.
CODE = Task("code", lambda rng: rng.choice(_functions()))
