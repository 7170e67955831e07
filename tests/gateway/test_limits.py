"""What a tenant may ask for, by a clock that the test turns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from backpack_serving.errors import Exhausted, Quota
from backpack_serving.gateway.limits import Limit, TenantLimits

from tests.conftest import Clock


def _ask(limits: TenantLimits, tenant: str = "t", tokens: int = 0) -> None:
    with limits.request(tenant) as take:
        take(tokens)


def _refused(limits: TenantLimits, **how: Any) -> Exhausted:
    with pytest.raises(Exhausted) as refused:
        _ask(limits, **how)
    return refused.value


def test_without_limits_everything_goes(clock: Clock) -> None:
    limits = TenantLimits(Limit(), clock=clock)
    for _ in range(1000):
        _ask(limits, tokens=1000)


def test_a_minute_holds_so_many_requests_and_the_next_is_told_when(clock: Clock) -> None:
    limits = TenantLimits(Limit(requests_per_minute=6), clock=clock)
    for _ in range(6):
        _ask(limits)
    refused = _refused(limits)
    assert (refused.code, refused.reason, refused.retry_after) == ("RESOURCE_EXHAUSTED", "REQUESTS_LIMIT", 10.0)
    assert refused.quotas == (Quota("tenants/t", "6 requests a minute"),)
    _ask(limits, "another")
    clock.now = 9.9
    assert _refused(limits).retry_after == pytest.approx(0.1)
    clock.now = 10.0
    _ask(limits)
    _refused(limits)
    clock.now = 1e6
    for _ in range(6):  # a long silence saves up no more than a minute
        _ask(limits)
    _refused(limits)


def test_tokens_may_be_overdrawn_once_and_are_paid_back(clock: Clock) -> None:
    limits = TenantLimits(Limit(tokens_per_minute=60), clock=clock)
    _ask(limits, tokens=100)  # more than a minute holds: no request is too large for ever
    refused = _refused(limits, tokens=1)
    assert (refused.reason, refused.retry_after) == ("TOKENS_LIMIT", 41.0)
    clock.now = 41.0
    _ask(limits, tokens=1)


def test_what_wasnt_used_is_given_back(clock: Clock) -> None:
    limits = TenantLimits(Limit(tokens_per_minute=60), clock=clock)
    with limits.request("t") as take:
        take(60)
        assert _refused(limits, tokens=1).reason == "TOKENS_LIMIT"
        take(-50)
    _ask(limits, tokens=50)
    _refused(limits, tokens=1)


def test_so_many_at_once(clock: Clock) -> None:
    limits = TenantLimits(Limit(concurrent=2), clock=clock)
    with limits.request("t"), limits.request("t"):
        refused = _refused(limits)
        assert (refused.reason, refused.retry_after) == ("CONCURRENCY_LIMIT", 1.0)
        _ask(limits, "another")
    _ask(limits)


def test_a_tenant_of_the_file_has_limits_of_its_own_and_new_ones_hold_soon(clock: Clock, tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("[vip]\nrequests_per_minute = 2\n")
    limits = TenantLimits(Limit(requests_per_minute=1, concurrent=1), file, clock=clock)
    _ask(limits, "vip")
    _ask(limits, "vip")
    assert _refused(limits, tenant="vip").reason == "REQUESTS_LIMIT"
    with limits.request("other"):
        assert _refused(limits, tenant="other").reason == "CONCURRENCY_LIMIT", "the default"
    file.write_text("[vip]\nrequests_per_minute = 100\n")
    _refused(limits, tenant="vip")
    clock.now = 2.0
    for _ in range(100):
        _ask(limits, "vip")
    file.write_text("[vip]\nrequests_per_hour = 1\n")
    clock.now = 70.0
    _ask(limits, "vip")  # a file that can't be read changes nothing


def test_a_request_that_was_charged_under_limits_of_before_gives_nothing_back_to_those_of_now(
    clock: Clock, tmp_path: Path
) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("[t]\ntokens_per_minute = 100\n")
    limits = TenantLimits(Limit(), file, clock=clock)
    with limits.request("t") as first, limits.request("t") as second, limits.request("t") as third:
        first(50)
        file.write_text("[t]\ntokens_per_minute = 90\n")
        clock.now = 2.0
        _ask(limits, tokens=1000)  # the bucket of 90 was full, and is in debt now
        for amount in (-50, 0):
            first(amount)
            assert _refused(limits, tokens=1).retry_after == pytest.approx(911 / 1.5)
        with pytest.raises(Exhausted, match="90 tokens a minute"):
            second(1)  # that it began before helps it no more
        file.write_text("")
        clock.now = 4.0
        third(1000)
        third(-1000)
        _ask(limits, tokens=1000)


def test_requests_that_end_in_an_error_run_no_more(clock: Clock) -> None:
    limits = TenantLimits(Limit(concurrent=1), clock=clock)
    for _ in range(3):
        with pytest.raises(KeyError), limits.request("t"):
            raise KeyError
    _ask(limits)


def test_limits_that_come_back_do_not_get_what_was_charged_to_others(clock: Clock, tmp_path: Path) -> None:
    """Each change of a limit makes a full bucket; an older request pays its refund to the bucket it was charged to."""
    file = tmp_path / "limits.toml"
    file.write_text("[t]\ntokens_per_minute = 100\n")
    limits = TenantLimits(Limit(), file, clock=clock)
    with limits.request("t") as old:
        old(100)
        for seconds, capacity in ((2.0, 90), (4.0, 100)):
            file.write_text(f"[t]\ntokens_per_minute = {capacity}\n")
            os.utime(file, (seconds, seconds))
            clock.now = seconds
            _ask(limits, tokens=1000)
        old(-100)
        assert _refused(limits, tokens=1).retry_after == pytest.approx(901 * 60 / 100)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vip = 3", r"'vip' is no table; write \[vip\]"),
        ("[vip]\nrequests = 3", r"\[vip\] has 'requests'; there are concurrent, requests_per_minute"),
        ("[vip]\nconcurrent = -1", "concurrent = -1; a number, 0 for none"),
        ('[vip]\nconcurrent = "many"', "concurrent = 'many'"),
        ("[vip", "BACKPACK_LIMITS_FILE=.*: no TOML: Expected"),
    ],
)
def test_a_file_that_cant_be_understood_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        TenantLimits(Limit(), file)


def test_a_file_that_isnt_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BACKPACK_LIMITS_FILE=.*none.toml: No such file"):
        TenantLimits(Limit(), tmp_path / "none.toml")
