"""Budgets that tasks share, as users make them."""

from __future__ import annotations

import pytest

from aioworker import Budget, task
from aioworker.errors import RateLimitError, TaskError, UsageError
from aioworker.limits import RateLimit
from aioworker.settings import Settings
from aioworker.tasks import registry
from aioworker.tasks.names import NAME_LENGTH
from aioworker.worker.process import refuse_shared_budgets


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test register tasks of its own."""
    monkeypatch.setattr(registry, "_registry", {})


def test_a_task_has_what_it_shares() -> None:
    writes = Budget("writes", rate_limit="6/m")

    @task(budget=writes, rate_limit="2/m")
    def refresh() -> None: ...

    assert refresh.options.budget is writes
    assert (writes.rate_limit, refresh.rate_limit) == (RateLimit(6, "m"), RateLimit(2, "m"))
    assert repr(writes) == "Budget('writes', rate_limit='6/m')"


@pytest.mark.parametrize(
    ("name", "rate", "error", "words"),
    [
        ("", "6/m", TaskError, "expected a budget's name of 1 to 100 letters"),
        ("a:b", "6/m", TaskError, "got: 'a:b'"),
        ("a" * (NAME_LENGTH + 1), "6/m", TaskError, "expected a budget's name"),
        (7, "6/m", TaskError, "got: 7"),
        ("writes", 6, TaskError, "budget 'writes': expected rate_limit such as '6/m', or 'none'"),
        ("writes", "6/min", RateLimitError, "budget 'writes': expected rate limit as COUNT/UNIT"),
    ],
)
def test_a_wrong_budget_is_refused(
    name: str, rate: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as refused:
        Budget(name, rate_limit=rate)

    assert words in str(refused.value)


def test_no_limit_is_said_on_purpose() -> None:
    assert Budget("writes", rate_limit="none").rate_limit is None
    assert str(Budget("writes", rate_limit="none")) == "none"


def test_only_a_budget_is_one() -> None:
    with pytest.raises(TaskError, match="task 'refresh': expected budget as a Budget, got: 'writ"):
        task(name="refresh", budget="writes")(print)  # type: ignore[call-overload]


def test_a_budget_of_two_rates_is_refused() -> None:
    """Of the same rate it may be made twice."""
    task(name="one", budget=Budget("writes", rate_limit="6/m"))(print)
    task(name="two", budget=Budget("writes", rate_limit="6/m"))(print)

    with pytest.raises(TaskError) as refused:
        task(name="three", budget=Budget("writes", rate_limit="7/m"))(print)

    assert str(refused.value) == (
        "budget 'writes' has two rate limits: 6/m for task 'one' and 7/m for 'three'; make it"
        " once, and import it"
    )


def test_a_workers_own_budget_cannot_be_shared() -> None:
    shared = task(name="one", budget=Budget("writes", rate_limit="6/m"))(print)
    refuse_shared_budgets(Settings.load(), [shared])

    with pytest.raises(UsageError) as refused:
        refuse_shared_budgets(Settings.load(budget="worker"), [shared])

    assert str(refused.value) == (
        "task 'one' shares budget 'writes' with others, and AIOWORKER_BUDGET=worker keeps each"
        " worker's own: unset it"
    )
