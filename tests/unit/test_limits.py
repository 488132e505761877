"""Limits as data, buckets, and what tenants have in use."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm.buckets import Bucket
from realm.errors import RealmError
from realm.gateway.quotas import Quotas
from realm.limits import LIMITS, TenantLimits, effective, over_limit


def test_every_limit_has_a_unit_and_words() -> None:
    assert list(LIMITS) == [field.name for field in msgspec.structs.fields(TenantLimits)]
    assert all(limit.unit and limit.doc and limit.default >= 0 for limit in LIMITS.values())


def test_later_layers_win() -> None:
    limits = effective({"uploads": 1, "connections": 7}, {"uploads": 2})
    assert (limits.uploads, limits.connections) == (2, 7)
    assert limits.running_guests == TenantLimits().running_guests


@pytest.mark.parametrize("bad", [{"upload": 1}, {"uploads": -1}, {"uploads": True}, {"fuel_per_run": 0}, {"": 1}])
def test_bad_limits_are_refused_by_name(bad: dict[str, int]) -> None:
    with pytest.raises(RealmError) as caught:
        effective(bad)
    assert caught.value.code == "invalid_params"


def test_the_error_names_limit_value_and_use() -> None:
    error = over_limit("uploads", 4, 5, "no")
    assert error.code == "limit_exceeded"
    assert error.details == {"name": "uploads", "limit": 4, "used": 5, "unit": "uploads"}
    assert "uploads is 4 uploads, used 5" in error.message
    assert over_limit("uploads", 4, 5, "no", retry_after=1.0).code == "rate_limited"


@given(
    rate=st.floats(0.1, 1e6),
    burst=st.floats(1, 1e6),
    steps=st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1e6)), max_size=30),
)
def test_a_bucket_never_gives_more_than_burst_and_rate(
    rate: float, burst: float, steps: list[tuple[float, float]]
) -> None:
    bucket, now, given_out = Bucket(rate, burst, 0.0), 0.0, 0.0
    for wait, units in steps:
        now += wait
        if bucket.take(units, now):
            given_out += units
        elif units <= burst:
            assert bucket.wait(units, now) > 0
        assert given_out <= burst + rate * now + 1e-6 * (given_out + burst)
        assert bucket.level(now) <= burst


def test_debt_is_paid_before_more_is_given() -> None:
    bucket = Bucket(10, 10, 0.0)
    bucket.spend(30, 0.0)
    assert bucket.wait(0, 0.0) == 2.0
    assert not bucket.take(1, 2.0)
    assert bucket.take(1, 2.2)
    assert bucket.wait(11, 3.0) == math.inf


def test_places_are_taken_and_given_back() -> None:
    quotas = Quotas({"connections": 1}, {"b": {"connections": 2}})
    a, b = quotas.of("a"), quotas.of("b")
    a.connect()
    b.connect()
    b.connect()
    for use, limit in ((a, 1), (b, 2)):
        with pytest.raises(RealmError) as caught:
            use.connect()
        assert caught.value.details["name"] == "connections"
        assert caught.value.details["limit"] == limit
        assert caught.value.retry_after is not None
    assert quotas.in_use == [a, b]
    a.disconnect()
    a.connect()
    a.disconnect()
    assert quotas.in_use == [b]


def test_requests_come_back_with_time() -> None:
    now = 0.0
    quotas = Quotas({"requests_per_minute": 60}, clock=lambda: now)
    use = quotas.of("a")
    for _ in range(60):
        use.request()
    with pytest.raises(RealmError) as caught:
        use.request()
    assert caught.value.code == "rate_limited"
    assert caught.value.retry_after == 1.0
    assert caught.value.details["used"] == 60
    now = 1.0
    use.request()
    quotas.set_tenant("a", {"requests_per_minute": 120})
    now = 1.5
    use.request()
    use.request()


def test_zero_requests_means_none() -> None:
    use = Quotas({"requests_per_minute": 0}).of("a")
    with pytest.raises(RealmError) as caught:
        use.request()
    assert caught.value.retry_after == 60.0
