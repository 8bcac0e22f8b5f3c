"""The supervisor's policy: what its rules decide, and that a text is a policy or an error that says where it is wrong."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
import pickle
import re
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from shlock.supervisor import policy
from shlock.supervisor.policy import OPERATIONS, Decision, Policy, PolicyError, Request, Rule, check_request, parse

LIMITS: dict[str, Any] = {
    "operations": frozenset({"acquire", "read"}),
    "longest_lease": 60.0,
    "longest_grace": 10.0,
    "highest_rank": 5,
    "most_contracts": 3,
    "most_bytes": 1 << 20,
}
"""Of a rule."""


def rule(**fields: Any) -> Rule:
    """Allows everybody something, unless the fields say otherwise."""
    return Rule(**({"users": ("*",), "names": ("*",)} | LIMITS | fields))


def denial(**fields: Any) -> Rule:
    return Rule(**({"users": ("*",), "names": ("*",), "deny": True} | fields))


def request(**fields: Any) -> Request:
    """Of alice, for something that `rule()` allows."""
    usual = {
        "user_id": 1000,
        "user_names": frozenset({"alice"}),
        "group_ids": frozenset({1000, 27}),
        "group_names": frozenset({"alice", "workers"}),
        "is_self": False,
        "domain": "shop",
        "name": "orders-1",
        "operations": frozenset({"acquire"}),
        "lease": 1.0,
    }
    return Request(**(usual | fields))


def decide(*rules: Rule, held: int = 0, **fields: Any) -> Decision:
    return Policy(rules).decide(request(**fields), contracts_held=held)


def told(decision: Decision) -> Decision:
    """What a client may be told of it."""
    return dataclasses.replace(decision, decider="")


unhurried = settings(deadline=None)
"""For property tests: the machine may be busy with other things."""


# -- whom and what a rule matches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("users", "groups", "matches"),
    [
        (["*"], [], True),
        (["alice"], [], True),
        (["bob", "alice"], [], True),
        (["Alice"], [], False),
        (["ali"], [], False),
        ([1000], [], True),
        ([1001], [], False),
        ([], ["workers"], True),
        ([], [27], True),
        ([], [28, "auditors"], False),
        ([1001], ["workers"], True),
        (["workers"], [], False),
        ([27], [], False),
        ([], ["*"], False),
        (["@self"], [], False),
    ],
)
def test_a_rule_is_for_its_users_and_for_the_members_of_its_groups(users: list[Any], groups: list[Any], matches: bool) -> None:
    assert decide(rule(users=tuple(users), groups=tuple(groups))).allowed is matches


def test_self_is_the_user_of_the_supervisor_whatever_his_name() -> None:
    assert decide(rule(users=("@self",)), is_self=True, user_names=frozenset()).allowed
    assert not decide(rule(users=("@self",)), user_names=frozenset({"@self"})).allowed


@pytest.mark.parametrize(
    ("patterns", "text", "matches"),
    [
        (["orders-*"], "orders-1", True),
        (["orders-*"], "orders-", True),
        (["orders-*"], "Orders-1", False),
        (["orders-*"], "my-orders-1", False),
        (["orders-?"], "orders-12", False),
        (["orders-[0-9]"], "orders-7", True),
        (["orders-[!0-9]"], "orders-7", False),
        (["orders"], "orders\n", False),
        (["a", "b"], "b", True),
        (["*"], "a/b\nc", True),
        (["*"], None, True),
        (["?*", "**", "None"], None, False),
    ],
)
def test_names_and_domains_match_as_a_whole_and_case_counts(patterns: list[str], text: str | None, matches: bool) -> None:
    assert decide(rule(names=tuple(patterns)), name=text).allowed is matches
    assert decide(rule(domains=tuple(patterns)), domain=text).allowed is matches


# -- which rule decides ---------------------------------------------------------------------------------------------------

NAMES = ["orders-1", "orders-2", "accounts", None]
USERS = ["alice", "bob", 1000, "*", "@self"]

some_rules = st.lists(
    st.builds(
        Rule,
        users=st.lists(st.sampled_from(USERS), min_size=1, max_size=2).map(tuple),
        groups=st.sampled_from([(), ("workers",), (27,)]),
        domains=st.sampled_from([("*",), ("shop",), ("test-*",)]),
        names=st.lists(st.sampled_from(["*", "orders-*", "*-1", "accounts"]), min_size=1, max_size=2).map(tuple),
        operations=st.frozensets(st.sampled_from(sorted(OPERATIONS)), min_size=1),
        longest_lease=st.sampled_from([1.0, 60.0]),
        longest_grace=st.sampled_from([0.0, 10.0]),
        highest_rank=st.integers(0, 3),
        precedence=st.sampled_from(["user", "kernel"]),
        most_contracts=st.integers(1, 3),
        most_bytes=st.sampled_from([1, 1 << 20]),
        deny=st.booleans(),
    ),
    max_size=5,
)
some_requests = st.builds(
    Request,
    user_id=st.sampled_from([1000, 1001]),
    user_names=st.frozensets(st.sampled_from(["alice", "bob", "carol"])),
    group_ids=st.frozensets(st.sampled_from([27, 28])),
    group_names=st.frozensets(st.sampled_from(["workers", "auditors"])),
    is_self=st.booleans(),
    domain=st.sampled_from(["shop", "test-1", None]),
    name=st.sampled_from(NAMES),
    operations=st.frozensets(st.sampled_from(sorted(OPERATIONS)), min_size=1),
    lease=st.sampled_from([0.5, 1.0, 1.5, 60.0, 61.0]),
    grace=st.sampled_from([0.0, 10.0, 10.5]),
    rank=st.integers(0, 4),
)


def fits(patterns: tuple[str, ...], text: str | None) -> bool:
    return "*" in patterns if text is None else any(re.match(fnmatch.translate(p), text) for p in patterns)


def permits(first: Rule, wish: Request, held: int) -> bool:
    return (
        not first.deny
        and wish.operations <= first.operations
        and wish.lease <= first.longest_lease
        and wish.grace <= first.longest_grace
        and wish.rank <= first.highest_rank
        and held + 1 <= first.most_contracts
    )


def is_for(candidate: Rule, wish: Request) -> bool:
    who = {"*", wish.user_id} | wish.user_names | ({"@self"} if wish.is_self else set())
    return (
        (not who.isdisjoint(candidate.users) or not (wish.group_ids | wish.group_names).isdisjoint(candidate.groups))
        and fits(candidate.domains, wish.domain)
        and fits(candidate.names, wish.name)
    )


@unhurried
@given(some_rules, some_requests, st.integers(0, 4))
def test_the_first_rule_that_matches_decides_and_grants_only_within_its_limits(
    rules: list[Rule], wish: Request, held: int
) -> None:
    """P1, against a second implementation."""
    decision = Policy(tuple(rules)).decide(wish, contracts_held=held)
    number, first = next(((n, r) for n, r in enumerate(rules, start=1) if is_for(r, wish)), (None, None))
    assert decision.decider == ("no rule" if number is None else f"rule {number}")
    if first is None or first.deny:
        assert (decision.allowed, decision.hidden) == (False, True)
    else:
        assert decision.allowed == permits(first, wish, held)
        assert not decision.hidden
        assert decision.rule == decision.decider
        assert (decision.operations, decision.longest_lease, decision.longest_grace) == (
            first.operations,
            first.longest_lease,
            first.longest_grace,
        )
        assert (decision.highest_rank, decision.precedence, decision.most_contracts, decision.most_bytes) == (
            first.highest_rank,
            first.precedence,
            first.most_contracts,
            first.most_bytes,
        )


@unhurried
@given(some_rules, some_rules, some_requests)
def test_rules_after_the_one_that_decides_change_nothing(rules: list[Rule], later: list[Rule], wish: Request) -> None:
    decision = Policy(tuple(rules)).decide(wish, contracts_held=0)
    assume(decision.decider != "no rule")
    assert Policy(tuple(rules + later)).decide(wish, contracts_held=0) == decision


def test_order_matters() -> None:
    narrow, wide = denial(names=("orders-*",)), rule()
    assert not decide(narrow, wide).allowed
    assert decide(wide, narrow).allowed


def test_a_rule_that_refuses_is_not_made_good_by_a_later_one() -> None:
    assert not decide(rule(longest_lease=0.5), rule()).allowed


# -- hidden names ---------------------------------------------------------------------------------------------------------


@unhurried
@given(some_rules, some_requests, st.integers(0, 4))
def test_a_denied_name_looks_to_the_client_as_one_that_no_rule_mentions(rules: list[Rule], wish: Request, held: int) -> None:
    """P3."""
    decision = Policy(tuple(rules)).decide(wish, contracts_held=held)
    if decision.hidden:
        assert told(decision) == told(Policy().decide(wish, contracts_held=0))


def test_a_denial_hides_the_name_and_the_log_knows_by_which_rule() -> None:
    decision = parse('[[rule]]\nusers = ["bob"]\nnames = ["*"]\ndeny = true\n\n' + DENIAL, "f").decide(
        request(), contracts_held=0
    )
    assert decision == Decision(
        allowed=False,
        hidden=True,
        rule="no rule allows it",
        reason="the policy hides this name",
        decider="rule 2 (line 6)",
    )


def test_what_is_hidden_without_a_name_is_not_called_one() -> None:
    assert decide(name=None).reason == "the policy allows this user nothing without a name"


def test_a_policy_without_rules_hides_everything() -> None:
    for text in ("", "# nobody\n", "rule = []"):
        assert parse(text, "f") == Policy()
    assert decide().decider == "no rule"


# -- limits ---------------------------------------------------------------------------------------------------------------


def test_limits_are_inclusive() -> None:
    exactly = {"operations": LIMITS["operations"], "lease": 60.0, "grace": 10.0, "rank": 5}
    assert decide(rule(), held=2, **exactly).allowed


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"operations": frozenset({"acquire", "write"})}, "of its operations write is not allowed, only acquire, read"),
        ({"lease": math.nextafter(60.0, 61.0)}, "its lease of 60.00000000000001 s is above the longest, 60 s"),
        ({"lease": 61}, "its lease of 61 s is above the longest, 60 s"),
        ({"grace": 10.5}, "its grace of 10.5 s is above the longest, 10 s"),
        ({"rank": 6}, "its rank 6 is above the highest, 5"),
        ({"held": 3}, "the user holds 3 contracts, and 3 is the most"),
        ({"held": 4}, "the user holds 4 contracts, and 3 is the most"),
    ],
)
def test_what_exceeds_a_limit_is_refused_with_the_fact_and_the_limit(fields: dict[str, Any], reason: str) -> None:
    decision = decide(denial(users=("bob",)), rule(line=14), **fields)
    assert (decision.allowed, decision.hidden, decision.rule, decision.reason) == (False, False, "rule 2 (line 14)", reason)


@unhurried
@given(
    st.floats(1e-3, 1e9),
    st.floats(1e-3, 1e9),
    st.floats(0, 1e9),
    st.floats(0, 1e9),
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**31 - 1),
)
def test_a_request_within_every_limit_is_granted_and_beyond_any_one_refused(
    lease: float, longest: float, grace: float, longest_grace: float, rank: int, highest: int
) -> None:
    limits = rule(longest_lease=longest, longest_grace=longest_grace, highest_rank=highest)
    within = lease <= longest and grace <= longest_grace and rank <= highest
    assert decide(limits, lease=lease, grace=grace, rank=rank).allowed is within


# -- what no policy can grant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"lease": 0}, ValueError, "lease must be from 0.001 to 1e+09 seconds, not 0"),
        ({"lease": -1.0}, ValueError, "lease must be from"),
        ({"lease": math.nan}, ValueError, "lease must be from 0.001 to 1e+09 seconds, not nan"),
        ({"lease": math.inf}, ValueError, "lease must be from"),
        ({"lease": 5e-324}, ValueError, "lease must be from"),
        ({"lease": 10**400}, ValueError, "lease must be from"),
        ({"lease": 10**5000}, ValueError, "not a number of thousands of digits"),
        ({"lease": True}, TypeError, "lease must be a number of seconds, not a boolean"),
        ({"lease": "1"}, TypeError, "lease must be a number of seconds, not a string"),
        ({"lease": None}, TypeError, "lease must be a number of seconds, not a NoneType"),
        ({"grace": -1e-9}, ValueError, "grace must be from 0 to"),
        ({"grace": math.nan}, ValueError, "grace must be from 0 to"),
        ({"grace": math.inf}, ValueError, "grace must be from 0 to"),
        ({"grace": []}, TypeError, "grace must be a number of seconds, not an array"),
        ({"rank": -1}, ValueError, "rank must be from 0 to 2147483647, not -1"),
        ({"rank": 10**5000}, ValueError, "rank must be from 0 to"),
        ({"rank": 1.0}, TypeError, "rank must be a whole number, not a float"),
        ({"rank": True}, TypeError, "rank must be a whole number, not a boolean"),
        ({"operations": frozenset()}, ValueError, "operations must not be empty"),
        ({"operations": frozenset({"acquire", "fly"})}, ValueError, "operation 'fly' is not known; there are acquire, preempt"),
        ({"operations": frozenset({"acquire", 1})}, TypeError, "operations must be names, not int"),
    ],
)
def test_a_request_that_makes_no_sense_raises_before_any_rule_is_asked(
    fields: dict[str, Any], error: type[Exception], text: str
) -> None:
    usual: dict[str, Any] = {"operations": frozenset({"acquire"}), "lease": 1.0}
    with pytest.raises(error, match=re.escape(text)):
        check_request(**(usual | fields))
    for rules in ((), (rule(),), (denial(),)):
        with pytest.raises(error, match=re.escape(text)):
            decide(*rules, **fields)


@pytest.mark.parametrize("operations", ["acquire", b"acquire", None, 1])
def test_operations_are_a_set_of_names(operations: Any) -> None:
    with pytest.raises(TypeError, match="operations must be a set of names, not"):
        check_request(operations=operations, lease=1.0)
    check_request(operations=["acquire", "read"], lease=1.0)


@pytest.mark.parametrize("field", ["user_names", "group_ids", "group_names", "operations"])
def test_a_request_takes_sets_only_for_a_text_would_match_by_its_parts(field: str) -> None:
    with pytest.raises(TypeError, match=f"{field} must be a frozenset, not str"):
        request(**{field: "alice"})


@pytest.mark.parametrize("field", ["domain", "name"])
def test_a_request_takes_texts_only_as_names(field: str) -> None:
    with pytest.raises(TypeError, match=f"{field} must be a str or None, not bytes"):
        request(**{field: b"orders"})


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()), st.integers(10**300)
)


@unhurried
@given(st.lists(st.one_of(st.sampled_from(sorted(OPERATIONS)), st.text(), st.integers())), anything, anything, anything)
def test_any_request_either_makes_sense_or_raises_value_or_type_error(
    operations: list[Any], lease: Any, grace: Any, rank: Any
) -> None:
    try:
        check_request(operations=operations, lease=lease, grace=grace, rank=rank)
    except (ValueError, TypeError):
        return
    assert operations
    assert set(operations) <= OPERATIONS
    assert 0 < lease < math.inf
    assert 0 <= grace < math.inf
    assert rank >= 0


# -- the text -------------------------------------------------------------------------------------------------------------

DENIAL = '[[rule]]\nusers = ["*"]\nnames = ["*"]\ndeny = true\n'
WHOLE = """\
[[rule]]
users = ["alice", 1000, "1001", "@self"]
groups = ["workers", 27]
domains = ["shop", "test-*"]
names = ["orders-*"]
operations = ["acquire", "read", "write", "send", "receive", "preempt"]
longest_lease = 60
longest_grace = 2.5
highest_rank = 100
class = "kernel"
most_contracts = 7
most_bytes = 8_000_000_000
deny = false

  [[ "rule" ]] # the least that a rule has
users = ["*"]
names = ["*"]
operations = ["read"]
longest_lease = 1e0
"""


def test_every_key_is_read() -> None:
    assert parse(WHOLE, "f").rules == (
        Rule(
            users=("alice", 1000, 1001, "@self"),
            groups=("workers", 27),
            domains=("shop", "test-*"),
            names=("orders-*",),
            operations=OPERATIONS,
            longest_lease=60.0,
            longest_grace=2.5,
            highest_rank=100,
            precedence="kernel",
            most_contracts=7,
            most_bytes=8_000_000_000,
        ),
        Rule(
            users=("*",),
            domains=("*",),
            names=("*",),
            operations=frozenset({"read"}),
            longest_lease=1.0,
            longest_grace=0.0,
            highest_rank=0,
            precedence="user",
            most_contracts=1000,
            most_bytes=64 << 20,
        ),
    )
    assert [r.line for r in parse(WHOLE, "f").rules] == [1, 15]


def test_line_ends_of_windows_are_understood() -> None:
    assert parse(WHOLE.replace("\n", "\r\n"), "f") == parse(WHOLE, "f")
    assert [r.line for r in parse(WHOLE.replace("\n", "\r\n"), "f").rules] == [1, 15]


USUAL = {
    "users": '["*"]',
    "names": '["*"]',
    "operations": '["acquire"]',
    "longest_lease": "60.0",
}
"""Keys and values of a rule."""


def text_of(**values: str | None) -> str:
    """A rule after another one, the usual except for these keys, each on its line; the header is on line 6."""
    lines = [f"{key} = {value}" for key, value in (USUAL | values).items() if value is not None]
    return DENIAL.replace('"*"', '"bob"', 1) + "\n[[rule]]\n" + "\n".join(lines) + "\n"


def error_of(text: str) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        parse(text, "policy.toml")
    return caught.value


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [
        ("users", '"*"', "must be an array of users, not a string"),
        ("users", "[]", "must have at least one of users, and is empty"),
        ("users", '[""]', "must be names or numeric ids, and one is empty"),
        ("users", "[true]", "must be names or numeric ids, and True is a boolean"),
        ("users", "[1.0]", "must be names or numeric ids, and 1.0 is a float"),
        ("users", '[["*"]]', "must be names or numeric ids, and ['*'] is an array"),
        ("users", "[-1]", "a numeric id must be from 0 to 4294967294, not -1"),
        ("users", '["4294967295"]', "a numeric id must be from 0 to 4294967294, not 4294967295"),
        ("users", f'["{"9" * 5000}"]', "a numeric id must be from 0 to 4294967294, not '9999"),
        ("users", '["@sefl"]', "'@sefl' is no name"),
        ("users", '["ali*"]', "'ali*' is no name"),
        ("groups", '["work"]', "has no effect beside users"),
        ("groups", '["*"]', "'*' is no name"),
        ("groups", '["@self"]', "'@self' is no name"),
        ("groups", "27", "must be an array of groups, not an integer"),
        ("domains", "[]", "must have at least one of patterns, and is empty"),
        ("names", '"*"', "must be an array of patterns, not a string"),
        ("names", "[]", "must have at least one of patterns, and is empty"),
        ("names", '["a", ""]', "must be an array of patterns, and one is empty"),
        ("names", "[1]", "must be an array of patterns, and 1 is an integer"),
        ("operations", "[]", "must have at least one of operations, and is empty"),
        ("operations", '["acquire", "fly"]', "'fly' is not an operation; there are acquire, preempt, read"),
        ("operations", "[[]]", "must be an array of operations, and [] is an array"),
        ("longest_lease", "0", "must be from 0.001 to 1e+09 seconds, not 0"),
        ("longest_lease", "-1.0", "must be from 0.001 to 1e+09 seconds, not -1.0"),
        ("longest_lease", "nan", "must be from 0.001 to 1e+09 seconds, not nan"),
        ("longest_lease", "inf", "must be from 0.001 to 1e+09 seconds, not inf"),
        ("longest_lease", "1e400", "must be from 0.001 to 1e+09 seconds, not inf"),
        ("longest_lease", "true", "must be a number of seconds, not a boolean"),
        ("longest_lease", '"60"', "must be a number of seconds, not a string"),
        ("longest_lease", "2020-01-01", "must be a number of seconds, not a date"),
        ("longest_lease", "0x" + "f" * 5000, "not a number of thousands of digits"),
        ("longest_lease", "9" * 5000, "is not TOML: exceeds the limit"),
        ("longest_grace", "-0.1", "must be from 0 to 1e+09 seconds, not -0.1"),
        ("longest_grace", "nan", "must be from 0 to 1e+09 seconds, not nan"),
        ("highest_rank", "-1", "must be from 0 to 2147483647, not -1"),
        ("highest_rank", "1.0", "must be a whole number, not a float"),
        ("highest_rank", "false", "must be a whole number, not a boolean"),
        ("most_contracts", "0", "must be from 1 to 2147483647, not 0"),
        ("most_bytes", "0", "must be from 1 to 1125899906842624, not 0"),
        ("most_bytes", "1e6", "must be a whole number, not a float"),
        ("class", '"root"', 'must be "user" or "kernel", not \'root\''),
        ("class", "0", 'must be "user" or "kernel", not an integer'),
        ("deny", "1", "must be true or false, not an integer"),
        ("lease", "1.0", "is not known; a rule has class, deny, domains, groups, highest_rank, longest_grace"),
        ("ra nk", "1", " at column "),
        ("longest_grace", "", " at column "),
        ("longest_grace", "[" * 3000, "is not TOML: nested too deeply"),
    ],
)
def test_a_wrong_value_is_told_with_its_line_and_key(key: str, value: str, fact: str) -> None:
    text = text_of(**{key: None} | {key: value})
    error = error_of(text)
    line = next(n for n, t in enumerate(text.split("\n"), start=1) if n > 6 and t.startswith(f"{key} ="))
    assert (error.source, error.line, error.key) == ("policy.toml", line, None if " " in key else key)
    assert fact in error.fact
    assert str(error) == f"policy.toml, line {line}" + (f", key {key!r}" if error.key else "") + f": {error.fact}"


@pytest.mark.parametrize("key", USUAL)
def test_a_missing_key_is_told_with_the_line_of_its_rule(key: str) -> None:
    error = error_of(text_of(**{key: None}))
    assert (error.line, error.key) == (6, key)
    assert "is missing" in error.fact


@pytest.mark.parametrize(
    "key", ["operations", "longest_lease", "longest_grace", "highest_rank", "class", "most_contracts", "most_bytes"]
)
def test_a_rule_that_denies_has_no_limits(key: str) -> None:
    wrong = {"operations": '["read"]', "longest_lease": "1.0", "class": '"user"'}.get(key, "1")
    error = error_of(f"\n{DENIAL}{key} = {wrong}\n")
    assert (error.line, error.key, error.fact) == (6, key, "is a limit, and a rule with deny = true has none")


@pytest.mark.parametrize(
    ("text", "line", "key", "fact"),
    [
        ("\nrules = 1\n", 2, "rules", "is not known; a policy has only [[rule]] tables"),
        (DENIAL + "[other]\n", 5, "other", "is not known"),
        ("other.x = 1\n" + DENIAL, 1, "other", "is not known"),
        ("\n[rule]\nusers = []\n", 2, "rule", "must be written [[rule]], with double brackets; a policy has"),
        ("rule.users = []", 1, "rule", "must be written [[rule]]"),
        ("rule = 1", 1, "rule", "is an integer; a policy has only"),
        ("\nrule = [\n1]", 2, "rule", "must be an array of tables, and one is an integer"),
        ("\nrule = [{users = ['*'], names = ['*'], lease = 1}]", 2, "lease", "is not known"),
        ("\nrule = [{users = ['*']}]", 2, "names", "is missing"),
        (DENIAL + "[rule.limits]\nrank = 1\n", 5, "limits", "is not known; a rule has"),
        (DENIAL + "[[rule.names]]\n", 5, None, "is not TOML: "),
        (DENIAL + "names.x = 1\n", 5, "names.x", "is not TOML: "),
        (DENIAL + "names = []\n", 5, "names", "is not TOML: "),
        (DENIAL + '"\\u0072ank" = 1\n', 5, "rank", "is not known"),
        (DENIAL + "rank.x = 1\n", 5, "rank", "is not known"),
        (DENIAL + "x", 5, None, "is not TOML: "),
        (DENIAL + "users =", 5, "users", "is not TOML: "),
        ("[[rule]]\nusers = ['a',\n# ]\n\n", 2, "users", "is not TOML: "),
        ("[[rule]]\nusers = ['a'\nnames = ['*']\n", 3, "users", "is not TOML: "),
        ("[[rule]\nusers = ['a']\n", 1, None, "is not TOML: "),
        ("\ufeff[[rule]]\n", 1, None, "is not TOML: "),
        ("# \x00", 1, None, "is not TOML: "),
        ('a = """\n\n\\', 1, "a", "is not TOML: "),
    ],
)
def test_what_is_wrong_outside_of_values_is_told_with_its_line(text: str, line: int, key: str | None, fact: str) -> None:
    error = error_of(text)
    assert (error.line, error.fact[: len(fact)]) == (line, fact)
    assert error.key == key


def test_what_looks_like_rules_and_keys_in_strings_and_comments_is_none() -> None:
    text = '''\
# [[rule]]
[[rule]]  # [[rule]] = "
users = [  # ]
    "alice", # "]
    'bob]"',
]
names = ["""
[[rule]]
longest_lease = 1
\\""" #"""", \'\'\'
rank = "
[[rule]]\'\'\', "# [[", '# \\', "\\"["]
operations = ["read"]
[[rule]]
longest_lease = nan
'''
    assert (error_of(text).line, error_of(text).key) == (2, "longest_lease")  # is missing
    second = text.replace('operations = ["read"]', "deny = true")
    assert (error_of(second).line, error_of(second).key) == (15, "longest_lease")
    only = second[: second.rindex("[[rule]]")]
    assert parse(only, "f").rules[0].users == ("alice", 'bob]"')
    assert parse(only, "f").rules[0].line == 2


def test_a_policy_error_pickles() -> None:
    error = error_of(text_of(longest_lease="nan"))
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (PolicyError, str(error))
    assert (copy.source, copy.line, copy.key, copy.fact) == ("policy.toml", 10, "longest_lease", error.fact)
    assert str(error) == ("policy.toml, line 10, key 'longest_lease': must be from 0.001 to 1e+09 seconds, not nan")


# -- lines, in texts of any layout ----------------------------------------------------------------------------------------

NOISE = ["", "# [[rule]]", "\t# users = [", '# """', "  ", "# '''"]
STRINGS = [
    '"a"',
    "'a'",
    '"""a\n[[rule]]\nnames = 1 # """',
    "'''\n\"\n[[rule]]'''",
    '"\\"#["',
    "'\\'",
    '"""a\\""""""',
    "''''a''''",
]
GOOD = {
    "users": '["*"]',
    "longest_lease": "1.5",
    "operations": '[ # [\n"read",\n# ]\n]',
    "longest_grace": "1_000",
    "highest_rank": "0x10",
    "most_contracts": "1",
    "most_bytes": "1",
    "class": "'user'",
}
SPELLINGS = ["{}", " {} ", '"{}"', "'{}'", "\t{}\t"]
HEADERS = ["[[rule]]", " [[rule]] # [[rule]]", "[[ rule ]]", '[["rule"]]', "[['rule']]\t"]


@unhurried
@given(st.data())
def test_the_line_of_a_wrong_value_is_right_in_any_layout(data: st.DataObject) -> None:
    def draw(choices: list[str]) -> str:
        return data.draw(st.sampled_from(choices))

    lines: list[str] = []
    headers: list[int] = []

    def add(text: str) -> int:
        lines.extend(NOISE[: data.draw(st.integers(0, len(NOISE)))])
        place = len(lines) + 1
        lines.extend(text.split("\n"))
        return place

    rules = data.draw(st.integers(1, 3))
    wrong_rule, wrong_key = data.draw(st.integers(0, rules - 1)), draw(list(GOOD))
    expected = 0
    for number in range(rules):
        headers.append(add(draw(HEADERS)))
        values = GOOD | {"names": f"[{draw(STRINGS)},\n{draw(STRINGS)}]"}
        for key in data.draw(st.permutations(list(values))):
            wrong = (number, key) == (wrong_rule, wrong_key)
            place = add(f"{draw(SPELLINGS).format(key)} = {'{ x = [1]}' if wrong else values[key]} {draw(NOISE)}")
            if wrong:
                expected = place
    end = draw(["\n", "\r\n"])
    error = error_of(end.join(lines))
    assert (error.line, error.key) == (expected, wrong_key)
    lines[expected - 1] = f"{wrong_key} = {GOOD[wrong_key]}"
    assert [r.line for r in parse(end.join(lines), "f").rules] == [
        h + (GOOD[wrong_key].count("\n") if h > expected else 0) for h in headers
    ]


# -- any text -------------------------------------------------------------------------------------------------------------


def check_any(text: str) -> None:
    """P4."""
    try:
        result = parse(text, "f")
    except PolicyError as error:
        assert error.fact
        assert error.line is None or 1 <= error.line <= text.count("\n") + 1
        assert pickle.loads(pickle.dumps(error)).args == error.args
        str(error)
        return
    lines = text.split("\n")
    for r in result.rules:
        assert r.line is not None
        assert "rule" in lines[r.line - 1] or "\\" in lines[r.line - 1]
        assert r.names
        assert r.users or r.groups
        assert r.deny == (not r.operations)
        assert r.deny or 0 < r.longest_lease < math.inf
        assert 0 <= r.longest_grace < math.inf
    result.decide(request(), contracts_held=0)


PIECES = [
    '"', "'", '"""', "'''", "[", "]", "[[", "]]", "{", "}", "=", "\n", "#", ",", ".", "\\", "\x00", "\r", "\r\n", " ", "-",
    "[[rule]]", "[rule]", "rule", "users", "names = ['*']", "deny = true", "'*'", '"@self"', "[]", "[z-a]", "[!]", "{x=1}",
    "a.b=1", "1", "0x", "_", "+", "9" * 20, "1e999", "nan", "inf", "true", "2020-01-01", "é", "\ud800", "\\u0000", "\ufeff",
]  # fmt: skip

FREED = re.sub(r"^# ?(\[\[rule|[a-z_]+ = )", r"\1", policy.DEFAULT_TEXT, flags=re.MULTILINE)
"""The default policy with its examples."""


@st.composite
def mutations(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from([FREED, policy.DEFAULT_TEXT, WHOLE, DENIAL]))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 2, 10, 100])))
        piece = draw(st.one_of(st.sampled_from(["", *PIECES]), st.text(max_size=3)))
        text = text[:start] + piece + text[end:]
    return text


@unhurried
@given(mutations())
def test_a_policy_with_errors_in_it_parses_or_raises_policy_error(text: str) -> None:
    check_any(text)


@unhurried
@given(st.text())
@example("")
@example("[" * 10_000)
@example("rule = " + "[" * 10_000)
@example("a = " + "9" * 10_000)
@example("a = " + "{a=" * 10_000)
@example(".".join("a" * 500) + " = 1")
@example("[[rule]]\n" * 2_000)
@example('"' * 3_000)
@example("'" * 3_001)
@example('"""\\' * 300)
def test_any_text_parses_or_raises_policy_error(text: str) -> None:
    check_any(text)


@unhurried
@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_crumbs_of_a_policy_parse_or_raise_policy_error(text: str) -> None:
    check_any(text)


@unhurried
@given(st.text(), st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="'"), min_size=1))
def test_any_pattern_decides_without_raising(name: str, pattern: str) -> None:
    text = f"[[rule]]\nusers=['*']\nnames=['{pattern}']\noperations=['read']\nlongest_lease=1"
    assert isinstance(parse(text, "f").decide(request(name=name), contracts_held=0), Decision)


# -- the default ----------------------------------------------------------------------------------------------------------


def test_by_default_the_same_user_may_do_everything_for_an_hour() -> None:
    whole = {"operations": OPERATIONS, "lease": 3600.0, "grace": 60.0, "rank": 100, "is_self": True}
    for name, domain in itertools.product(("orders", None), repeat=2):
        wish = request(**whole, name=name, domain=domain)
        assert policy.default().decide(wish, contracts_held=999).allowed
    assert not policy.default().decide(request(**whole | {"lease": 3600.1}), contracts_held=0).allowed


def test_by_default_everybody_else_may_do_nothing() -> None:
    for user_id in (0, 1000):
        decision = policy.default().decide(request(user_id=user_id), contracts_held=0)
        assert (decision.allowed, decision.hidden) == (False, True)


def test_the_examples_in_the_default_policy_are_policies() -> None:
    rules = parse(FREED, "f").rules
    assert [bool(r.groups) for r in rules] == [False, False, True, True]
    assert [FREED.split("\n")[r.line - 1] for r in rules if r.line] == ["[[rule]]"] * 4
    assert rules[0] == policy.default().rules[0]


def test_the_default_policy_explains_every_key_and_operation() -> None:
    explained = "\n".join(line for line in policy.DEFAULT_TEXT.split("\n") if line.startswith("#   "))
    for word in [*GOOD, "groups", "domains", "names", "deny", *(f'"{o}"' for o in OPERATIONS), '"@self"', '"kernel"']:
        assert word in explained
    assert all(len(line) < 128 and line.isascii() for line in policy.DEFAULT_TEXT.split("\n"))
