"""Who may open which names, with which operations, for how long: a TOML file of rules, and the decision on one request.

Every rule that is missing is a refusal: nothing is allowed that no rule names.  The first rule that matches the user, the
domain and the name decides, and no later one is asked, also when the first one refuses.

    P1  a request is granted only by a rule that matches it and whose limits, the limits included, it keeps
    P2  a decision depends on the policy, the request and the number of contracts held, and on nothing else: in particular
        not on whether the name exists
    P3  what a client is told of a name that no rule allows him is the same whether a rule denies it or none matches
    P4  parse() returns a Policy or raises PolicyError, whatever the text is

Pure: no I/O, no clock, no state; safe in every thread, after fork, and in signal handlers.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

from ..contract import (
    HIGHEST_NUMBER,
    OPERATIONS,
    SHORTEST_LEASE,
    check_number,
    check_request,
    check_seconds,
    kind_of,
    listed,
    short,
)

__all__ = [
    "DEFAULT_TEXT",
    "OPERATIONS",
    "Decision",
    "Policy",
    "PolicyError",
    "Request",
    "Rule",
    "check_request",
    "default",
    "parse",
]

EVERYBODY: Final = "*"
"""Among ``users``: every user.  Among patterns: every name, and also what has none."""

SELF: Final = "@self"
"""Among ``users``: the user that the supervisor runs as."""

USUAL_BYTES: Final = 1 << 26
HIGHEST_BYTES: Final = 1 << 50

HIGHEST_ID: Final = 2**32 - 2  # of users and groups; the next one is the kernel's "no user"

NAME_HIDDEN: Final = "the policy hides this name"
ANONYMOUS_HIDDEN: Final = "the policy allows this user nothing without a name"

DEFAULT_TEXT: Final = """\
# Policy of the shlock supervisor: who may open which names, with which operations, and for how long.
#
# The first rule that matches the user, the domain and the name decides; no later rule is asked.  What no rule matches is
# refused, and the refusal does not tell whether the name exists.
#
#   users           who: names, numeric ids, "*" for everybody, "@self" for the user that the supervisor runs as
#   groups          and the members of these groups, by name or numeric id; users, groups or both
#   domains, names  patterns, in which * ? [abc] [!abc] match as in file names and case counts; domains may be left out
#                   and is then ["*"]; only the pattern "*" matches what has no name
#   operations      any of "acquire", "read", "write", "send", "receive", "preempt"
#   longest_lease   seconds for which a contract may let its holder keep the lock
#   longest_grace   seconds between the terminate call at the end of the lease and SIGKILL; left out: 0.0
#   highest_rank    precedence among waiters of one class; left out: 0
#   class           "user" or "kernel", which precedes every user, and to which the privileged ends of channels of the
#                   machine belong; left out: "user"
#   most_contracts  that one user may hold at a time; left out: 1000
#   most_bytes      of memory for names of the machine that one user has made, all together; left out: 67108864
#   deny            true: this rule refuses, and has none of the limits above

# The user that the supervisor runs as may do everything, with leases up to an hour.
[[rule]]
users = ["@self"]
names = ["*"]
operations = ["acquire", "read", "write", "send", "receive", "preempt"]
longest_lease = 3600.0
longest_grace = 60.0
highest_rank = 100
class = "user"
most_contracts = 1000000
most_bytes = 1099511627776

# Nobody may open what belongs to the accounts, except by the rules above.
#
# [[rule]]
# users = ["*"]
# names = ["accounts-*"]
# deny = true

# The group "workers", and the user with the id 1001, may lock and use the orders.
#
# [[rule]]
# users = [1001]
# groups = ["workers"]
# domains = ["shop"]
# names = ["orders-*", "order-queue"]
# operations = ["acquire", "read", "write", "send", "receive"]
# longest_lease = 60.0
# longest_grace = 10.0
# highest_rank = 10
# most_contracts = 100
# most_bytes = 16777216

# Everybody in the group "auditors" may look on.
#
# [[rule]]
# groups = ["auditors"]
# names = ["*"]
# operations = ["read"]
# longest_lease = 5.0

# Everybody else may do nothing.
"""
"""The policy of a supervisor that was given none, and an example to start from."""


class PolicyError(ValueError):
    """A policy file cannot be used.  No part of it is in force.

    Attributes: ``source`` (what was parsed), ``line`` (from 1; None if unknown), ``key`` (None if no key is concerned),
    ``fact`` (what is wrong, and what is right instead).  Where an array of inline tables stands for ``[[rule]]``, ``line``
    is where the array begins.
    """

    def __init__(self, source: str, line: int | None, key: str | None, fact: str) -> None:
        super().__init__(source, line, key, fact)
        self.source = source
        self.line = line
        self.key = key
        self.fact = fact

    def __str__(self) -> str:
        line = "" if self.line is None else f", line {self.line}"
        key = "" if self.key is None else f", key {self.key!r}"
        return f"{self.source}{line}{key}: {self.fact}"


# -- requests and decisions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one user asks for.  Who he is, the caller has found out; nothing here is the client's word except the wishes.

    user_id, user_names     of the process that asks; a user may have several names
    group_ids, group_names  of all groups of that user
    is_self                 he is the user that the supervisor runs as
    domain, name            None for anonymous
    operations, lease, grace, rank   what he wants; lease and grace in seconds

    Who and what have no defaults: a rule that denies by a group would not match if the groups were forgotten.  Raises
    TypeError for a set that is no frozenset; a str instead of a set of names would match by its parts.  The wishes are
    checked later, by :func:`check_request`.
    """

    user_id: int
    user_names: frozenset[str]
    group_ids: frozenset[int]
    group_names: frozenset[str]
    is_self: bool
    domain: str | None
    name: str | None
    operations: frozenset[str]
    lease: float
    grace: float = 0.0
    rank: int = 0

    def __post_init__(self) -> None:
        for what in ("user_names", "group_ids", "group_names", "operations"):
            if not isinstance(value := getattr(self, what), frozenset):
                raise TypeError(f"{what} must be a frozenset, not {type(value).__name__}")
        for what in ("domain", "name"):
            if not isinstance(value := getattr(self, what), str | None):
                raise TypeError(f"{what} must be a str or None, not {type(value).__name__}")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a request is granted, by which rule, why, and the limits of that rule.

    allowed   the contract may be granted
    hidden    the user may not know of this name: no rule matches, or one denies.  No limits then: all are zero or empty
    rule      ``"rule 2 (line 14)"``; ``"no rule allows it"`` if hidden.  Fit for the client
    reason    part of a sentence that names the fact and the limit; fit for the client
    decider   ``"rule 2 (line 14)"`` or ``"no rule"``, also if hidden.  For the supervisor's log only: a client who is told
              it learns what P3 keeps from him

    ``precedence`` is the class of the rule.
    """

    allowed: bool
    hidden: bool = False
    rule: str
    reason: str
    decider: str
    operations: frozenset[str] = frozenset()
    longest_lease: float = 0.0
    longest_grace: float = 0.0
    highest_rank: int = 0
    precedence: str = "user"
    most_contracts: int = 0
    most_bytes: int = 0


# -- the rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One ``[[rule]]``; the fields are its keys, ``precedence`` is its ``class``.  A rule that denies has no limits.

    Values are as :func:`parse` has checked them; a rule made otherwise is not checked.  ``line`` is that of its header,
    None if it has none, and not compared.
    """

    users: tuple[str | int, ...] = ()
    groups: tuple[str | int, ...] = ()
    domains: tuple[str, ...] = (EVERYBODY,)
    names: tuple[str, ...]
    operations: frozenset[str] = frozenset()
    longest_lease: float = 0.0
    longest_grace: float = 0.0
    highest_rank: int = 0
    precedence: str = "user"
    most_contracts: int = 1000
    most_bytes: int = USUAL_BYTES
    deny: bool = False
    line: int | None = field(default=None, compare=False)

    def matches(self, request: Request) -> bool:
        """Whether this rule decides on the request: the user by name, id or group, and the domain, and the name."""
        return (
            (any(_is_user(user, request) for user in self.users) or any(_is_member(group, request) for group in self.groups))
            and _fits(self.domains, request.domain)
            and _fits(self.names, request.name)
        )

    def refusal(self, request: Request, contracts_held: int) -> str | None:
        """The first limit of this rule that the request exceeds, as part of a sentence, or None."""
        if refused := request.operations - self.operations:
            return f"of its operations {listed(refused)} is not allowed, only {listed(self.operations)}"
        if request.lease > self.longest_lease:
            return f"its lease of {_seconds(request.lease)} is above the longest, {_seconds(self.longest_lease)}"
        if request.grace > self.longest_grace:
            return f"its grace of {_seconds(request.grace)} is above the longest, {_seconds(self.longest_grace)}"
        if request.rank > self.highest_rank:
            return f"its rank {request.rank} is above the highest, {self.highest_rank}"
        if contracts_held >= self.most_contracts:
            return f"the user holds {contracts_held} contracts, and {self.most_contracts} is the most"
        return None


@dataclass(frozen=True)
class Policy:
    """Rules in the order in which they are asked.  No rules: everything is refused."""

    rules: tuple[Rule, ...] = ()

    def decide(self, request: Request, *, contracts_held: int) -> Decision:
        """Grant or refuse the request of a user who holds that many contracts, the one asked for not counted.

        Raises TypeError or ValueError, as :func:`check_request` does, before any rule is asked.
        """
        check_request(operations=request.operations, lease=request.lease, grace=request.grace, rank=request.rank)
        assert contracts_held >= 0, contracts_held
        for number, rule in enumerate(self.rules, start=1):
            if rule.matches(request):
                label = f"rule {number}" + ("" if rule.line is None else f" (line {rule.line})")
                return _hidden(label, request) if rule.deny else _limited(label, rule, request, contracts_held)
        return _hidden("no rule", request)


def _hidden(label: str, request: Request) -> Decision:
    reason = ANONYMOUS_HIDDEN if request.name is None else NAME_HIDDEN
    return Decision(allowed=False, hidden=True, rule="no rule allows it", reason=reason, decider=label)


def _limited(label: str, rule: Rule, request: Request, contracts_held: int) -> Decision:
    refusal = rule.refusal(request, contracts_held)
    return Decision(
        allowed=refusal is None,
        rule=label,
        reason=refusal or "it keeps within the limits of the policy",
        decider=label,
        operations=rule.operations,
        longest_lease=rule.longest_lease,
        longest_grace=rule.longest_grace,
        highest_rank=rule.highest_rank,
        precedence=rule.precedence,
        most_contracts=rule.most_contracts,
        most_bytes=rule.most_bytes,
    )


def _is_user(user: str | int, request: Request) -> bool:
    # The special users first: nobody becomes them by being called so.
    if user == EVERYBODY:
        return True
    if user == SELF:
        return request.is_self
    return user == request.user_id if isinstance(user, int) else user in request.user_names


def _is_member(group: str | int, request: Request) -> bool:
    return group in request.group_ids if isinstance(group, int) else group in request.group_names


def _fits(patterns: tuple[str, ...], text: str | None) -> bool:
    if text is None:
        return EVERYBODY in patterns
    return any(fnmatchcase(text, pattern) for pattern in patterns)


# -- checks of single values ----------------------------------------------------------------------------------------------
# They raise TypeError or ValueError.  Those of a request are in contract.py, for clients too.


def _array(value: Any, of: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"must be an array of {of}, not {kind_of(value)}")
    if not value:
        raise ValueError(f"must have at least one of {of}, and is empty")
    return value


def _texts(value: Any, of: str) -> tuple[str, ...]:
    for text in _array(value, of):
        if not isinstance(text, str):
            raise TypeError(f"must be an array of {of}, and {short(text)} is {kind_of(text)}")
        if not text:
            raise ValueError(f"must be an array of {of}, and one is empty")
    return tuple(value)


def _read_patterns(value: Any) -> tuple[str, ...]:
    return _texts(value, "patterns")


def _read_operations(value: Any) -> frozenset[str]:
    for operation in _texts(value, "operations"):
        if operation not in OPERATIONS:
            raise ValueError(f"{short(operation)} is not an operation; there are {listed(OPERATIONS)}")
    return frozenset(value)


def _read_users(value: Any) -> tuple[str | int, ...]:
    return tuple(user if user in (EVERYBODY, SELF) else _account(user) for user in _array(value, "users"))


def _read_groups(value: Any) -> tuple[str | int, ...]:
    return tuple(_account(group) for group in _array(value, "groups"))


def _account(value: Any) -> str | int:
    """A name, or a number, also if it was written as a text: no account is called by a number only."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"must be names or numeric ids, and {short(value)} is {kind_of(value)}")
    if isinstance(value, int):
        check_number("a numeric id ", value, 0, HIGHEST_ID)
        return int(value)
    if re.fullmatch(r"[0-9]+", value):
        if len(value) > len(str(HIGHEST_ID)):
            raise ValueError(f"a numeric id must be from 0 to {HIGHEST_ID}, not {short(value)}")
        return _account(int(value))
    if not value:
        raise ValueError("must be names or numeric ids, and one is empty")
    if value.startswith("@") or not {"*", "?", "["}.isdisjoint(value):
        # A typing error in "@self", or a pattern where none is read: it would silently match nobody.
        raise ValueError(f'{short(value)} is no name; users may also be "*", everybody, and "@self", but not patterns')
    return str(value)


def _read_lease(value: Any) -> float:
    check_seconds("", value, SHORTEST_LEASE)
    return float(value)


def _read_grace(value: Any) -> float:
    check_seconds("", value, 0.0)
    return float(value)


def _read_rank(value: Any) -> int:
    check_number("", value, 0, HIGHEST_NUMBER)
    return int(value)


def _read_most(value: Any) -> int:
    check_number("", value, 1, HIGHEST_NUMBER)
    return int(value)


def _read_bytes(value: Any) -> int:
    check_number("", value, 1, HIGHEST_BYTES)
    return int(value)


def _read_class(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f'must be "user" or "kernel", not {kind_of(value)}')
    if value not in ("user", "kernel"):
        raise ValueError(f'must be "user" or "kernel", not {short(value)}')
    return value


def _read_deny(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"must be true or false, not {kind_of(value)}")
    return value


_WHO_AND_WHAT: Final[dict[str, Callable[[Any], Any]]] = {
    "users": _read_users,
    "groups": _read_groups,
    "domains": _read_patterns,
    "names": _read_patterns,
    "deny": _read_deny,
}
_LIMITS: Final[dict[str, Callable[[Any], Any]]] = {
    "operations": _read_operations,
    "longest_lease": _read_lease,
    "longest_grace": _read_grace,
    "highest_rank": _read_rank,
    "class": _read_class,
    "most_contracts": _read_most,
    "most_bytes": _read_bytes,
}
_KEYS: Final = _WHO_AND_WHAT | _LIMITS
"""The keys of a rule, and what checks and converts their values."""

_REQUIRED_LIMITS: Final = ("operations", "longest_lease")


# -- parsing --------------------------------------------------------------------------------------------------------------


def parse(text: str, source: str) -> Policy:
    """The policy that a text in TOML describes; ``source`` names it in errors.  Raises PolicyError, for the first fault."""
    text = text.replace("\r\n", "\n")  # as TOML does
    places = _Places(text)
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and nesting without end
        raise _syntax_error(error, places, source) from None
    for key in content:
        if key != "rule":
            raise PolicyError(source, places.line(None, key), key, "is not known; a policy has only [[rule]] tables")
    tables = content.get("rule", [])
    if not isinstance(tables, list):
        fact = "must be written [[rule]], with double brackets" if isinstance(tables, dict) else f"is {kind_of(tables)}"
        raise PolicyError(source, places.line(None, "rule"), "rule", f"{fact}; a policy has only [[rule]] tables")
    return Policy(tuple(_rule(table, index, places, source) for index, table in enumerate(tables)))


def default() -> Policy:
    """The policy that :data:`DEFAULT_TEXT` describes: the same user may do everything, everybody else nothing."""
    return parse(DEFAULT_TEXT, "the default policy")


def _rule(table: Any, index: int, places: _Places, source: str) -> Rule:
    def wrong(key: str | None, fact: str) -> PolicyError:
        return PolicyError(source, places.line(index, key), key, fact)

    if not isinstance(table, dict):
        raise wrong("rule", f"must be an array of tables, and one is {kind_of(table)}")
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in _KEYS:
            raise wrong(key, f"is not known; a rule has {listed(_KEYS)}")
        try:
            values[key] = _KEYS[key](value)
        except (TypeError, ValueError) as error:
            raise wrong(key, str(error)) from None
    if "users" not in values and "groups" not in values:
        raise wrong("users", "is missing: a rule names users, groups or both")
    if EVERYBODY in values.get("users", ()) and "groups" in values:
        # Whoever writes both means the members only; the rule would be for everybody.
        raise wrong("groups", 'has no effect beside users = ["*"], which is everybody; leave one of them out')
    if "names" not in values:
        raise wrong("names", 'is missing; ["*"] is every name')
    if values.get("deny"):
        for key in values:
            if key in _LIMITS:
                raise wrong(key, "is a limit, and a rule with deny = true has none")
    else:
        for key in _REQUIRED_LIMITS:
            if key not in values:
                raise wrong(key, "is missing; a rule has it, or deny = true")
    if "class" in values:
        values["precedence"] = values.pop("class")
    return Rule(**values, line=places.line(index, None))


def _syntax_error(error: ValueError | RecursionError, places: _Places, source: str) -> PolicyError:
    """What tomllib found, and where.  At the end of the text, what is wrong began with the last statement."""
    fact = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    fact = f"is not TOML: {fact[:1].lower()}{fact[1:]}"
    statement: _Statement | None
    if found := re.search(r" \(at line (\d+), column (\d+)\)$", fact):
        line: int | None = int(found[1])
        fact = f"{fact[: found.start()]} at column {found[2]}"
        statement = places.around(int(found[1]))
    else:
        if fact.endswith(" (at end of document)"):
            statement = places.statements[-1] if places.statements else None
        else:
            # tomllib did not say where: it is the first statement that fails likewise alone.
            statement = next((s for s in places.statements if _fails(s.text, type(error))), None)
        line = statement.line if statement else None
    return PolicyError(source, line, statement.key if statement else None, fact)


def _fails(text: str, error: type[Exception]) -> bool:
    try:
        tomllib.loads(text)
    except (ValueError, RecursionError) as found:
        return type(found) is error
    return False


# -- lines ----------------------------------------------------------------------------------------------------------------
# tomllib does not say where a value stood. So the text is cut into statements, well enough for every text that tomllib
# accepts, and without failing for any other.

_TOKEN: Final = re.compile(
    r"""
      (?P<space>   [\x20\t]+ )
    | (?P<comment> \#[^\n]* )
    | (?P<text>    \"{3} (?: \\. | [^\\] )*? (?: \"{3,5} | \\?\Z )     # a multi-line text may end in two quotes of its own
                 | '{3} .*? (?: '{3,5} | \Z )
                 | \" (?: \\[^\n] | [^"\\\n] )* "?
                 | ' [^'\n]* '? )
    | (?P<open>    [\[{] )
    | (?P<close>   [\]}] )
    | (?P<equals>  = )
    | (?P<newline> \n )
    | (?P<other>   [^\x20\t\#"'\[\]{}=\n]+ )
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class _Statement:
    """A header or a key with its value, on the lines from ``line`` to ``last``.  ``path`` is empty if it cannot be read."""

    line: int
    last: int
    text: str
    header: bool
    path: tuple[str, ...]

    @property
    def key(self) -> str | None:
        """The key that an error names; None for a header."""
        return ".".join(self.path) if self.path and not self.header else None


def _statements(text: str) -> Iterator[_Statement]:
    line = 1
    pieces: list[str] = []  # of the statement, its comments left out
    start, depth, header = 1, 0, False
    key: str | None = None  # of the statement: what stands before its first equals sign
    for token in _TOKEN.finditer(text):
        kind, piece = token.lastgroup, token[0]
        if kind == "newline" and depth <= 0:
            if pieces:
                yield _statement(pieces, start, line, header, key)
            pieces, depth, header, key = [], 0, False, None
        elif kind != "comment" and (pieces or kind not in ("space", "newline")):
            if not pieces:
                start, header = line, piece == "["
            if kind == "equals" and key is None:
                key = "".join(pieces)
            depth += (kind == "open") - (kind == "close")
            pieces.append(piece)
        line += piece.count("\n")
    if pieces:
        yield _statement(pieces, start, line, header, key)


def _statement(pieces: list[str], start: int, last: int, header: bool, key: str | None) -> _Statement:
    text = "".join(pieces).strip(" \t\n")
    if header:
        double = text.startswith("[[")
        key = text[2:-2] if double else text[1:-1]
    return _Statement(start, last, text, header, () if key is None else _path(key))


def _path(key: str) -> tuple[str, ...]:
    """The parts of a key as it is written, which may be quoted and dotted."""
    if re.fullmatch(r"[\w-]+", key := key.strip(" \t"), re.ASCII):
        return (key,)
    try:
        table: Any = tomllib.loads(f"{key} = 0")
    except (ValueError, RecursionError):
        return ()
    path = []
    while isinstance(table, dict) and table:
        part, table = next(iter(table.items()))
        path.append(part)
    return tuple(path)


class _Places:
    """Where the rules and keys of a text are."""

    def __init__(self, text: str) -> None:
        self.statements = list(_statements(text))
        self._rules: list[int] = []
        self._keys: dict[tuple[int | None, str], int] = {}
        table: tuple[str, ...] = ()
        for statement in self.statements:
            path = statement.path if statement.header else table + statement.path
            if statement.header:
                table = statement.path
                if table == ("rule",) and statement.text.startswith("[["):
                    self._rules.append(statement.line)
            if path:
                self._keys.setdefault((None, path[0]), statement.line)
            if len(path) > 1 and path[0] == "rule" and self._rules:
                self._keys.setdefault((len(self._rules) - 1, path[1]), statement.line)

    def line(self, rule: int | None, key: str | None) -> int:
        """That of a key of a rule, or of the whole text if ``rule`` is None; else of the rule; else of all rules."""
        if key is not None and (line := self._keys.get((rule, key))) is not None:
            return line
        if rule is not None and rule < len(self._rules):
            return self._rules[rule]
        return self._keys.get((None, "rule"), 1)

    def around(self, line: int) -> _Statement | None:
        """The statement that this line is part of."""
        return next((s for s in self.statements if s.line <= line <= s.last), None)


# -- words in texts -------------------------------------------------------------------------------------------------------


def _seconds(value: float) -> str:
    return f"{int(value) if value == math.floor(value) else value} s"
