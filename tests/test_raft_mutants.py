"""Each bug that is planted in the coordinator is noticed by the test that is there for it, or by the simulator."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from subprocess import CompletedProcess

import pytest

from tests.raft_mutants import MUTANTS, Mutant, NotPlanted, planted, run_tests, worlds_until_seen

AT_ONCE = 2
SEEN = tuple(mutant for mutant in MUTANTS if mutant.worlds)


def named(mutant: Mutant) -> str:
    return mutant.name.split()[0]


def asked_for(request: pytest.FixtureRequest, test: str) -> list[Mutant]:
    """All that this run has for a test, so that the next is under way while one is waited for."""
    return [item.callspec.params["mutant"] for item in request.session.items if item.name.startswith(f"{test}[")]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def tested(request: pytest.FixtureRequest, pool: ThreadPoolExecutor) -> dict[str, Future[CompletedProcess[str]]]:
    mutants = asked_for(request, "test_its_test_fails")
    return {mutant.name: pool.submit(run_tests, mutant, mutant.test) for mutant in mutants}


@pytest.fixture(scope="module")
def simulated(request: pytest.FixtureRequest, pool: ThreadPoolExecutor) -> dict[str, Future[tuple[int, str]]]:
    mutants = asked_for(request, "test_the_simulator_sees_it")
    return {mutant.name: pool.submit(worlds_until_seen, mutant, mutant.worlds) for mutant in mutants}


@pytest.mark.parametrize("mutant", MUTANTS, ids=named)
def test_its_test_fails(mutant: Mutant, tested: dict[str, Future[CompletedProcess[str]]]) -> None:
    ran = tested[mutant.name].result()
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, f"{mutant.name} lives:\n{ran.stdout}\n{ran.stderr}"
    assert "NameError" not in ran.stdout, f"{mutant.name} does not run:\n{ran.stdout}"


@pytest.mark.parametrize("mutant", SEEN, ids=named)
def test_the_simulator_sees_it(mutant: Mutant, simulated: dict[str, Future[tuple[int, str]]]) -> None:
    assert simulated[mutant.name].result()[0], f"{mutant.name}: {mutant.worlds} worlds hold"


def test_without_a_bug_the_same_tests_pass() -> None:
    """What fails above fails for what was planted, and not for how it is run."""
    ran = run_tests(None, *sorted({mutant.test for mutant in MUTANTS}))
    assert ran.returncode == pytest.ExitCode.OK, ran.stdout + ran.stderr


def test_a_bug_that_no_longer_fits_the_code_is_not_taken_for_planted() -> None:
    mutant = Mutant("M0", MUTANTS[0].file, "these words are not there", "", "")
    with pytest.raises(NotPlanted, match="M0"), planted(mutant):
        pass


def test_all_of_the_25_have_a_mutant() -> None:
    assert {f"M{number}" for number in range(1, 26)} <= {named(mutant) for mutant in MUTANTS}
    assert len({named(mutant) for mutant in MUTANTS}) == len(MUTANTS)
