"""The client of an Anvil against a strict double of one: sessions, tasks, objectives, and what goes wrong."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from nexus.anvil import MOST_BYTES, Anvil, Share, Task
from nexus.errors import ConfigError, InvalidRequest, NexusError, NotFound, Unavailable, UpstreamInvalid
from nexus.upstream import World
from tests import anvil as doubles
from tests.anvil import PASSWORD, USER, Double
from tests.test_image_hosts import Authority

EXPRESSION = 'IF (SIZE>1000 AND FNMATCH("*/archive/*",PATH)) THEN {SLO("place-on-object-volumes")}'


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)

    def world(self) -> World:
        return World(clock=lambda: self.now, sleep=self.sleep)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Path]:
    folder = tmp_path_factory.mktemp("anvil")
    return Authority(folder, "localhost"), folder / "server.pem"


@pytest.fixture
def double(authority: tuple[Authority, Path]) -> Iterator[Double]:
    with doubles.running(authority[0].server) as running:
        yield running


def connect(double: Double, ca_file: Path | None, time: Time | None = None, password: str = PASSWORD) -> Anvil:
    world = (time or Time()).world()
    secret = SecretStr(password)
    return Anvil("localhost", double.port, USER, secret, ca_file=ca_file, task_seconds=60, world=world)


@pytest.fixture
def anvil(double: Double, authority: tuple[Authority, Path]) -> Iterator[Anvil]:
    client = connect(double, authority[1])
    yield client
    client.close()


def test_one_login_serves_many_calls_and_shares_are_read(double: Double, anvil: Anvil) -> None:
    double.add_share("projects")
    double.add_share("scratch", "/mnt/scratch")
    anvil.check()
    assert anvil.shares() == [
        Share("projects", "/projects", "PUBLISHED", ()), Share("scratch", "/mnt/scratch", "PUBLISHED", ()),
    ]  # fmt: skip
    assert anvil.share("scratch") == Share("scratch", "/mnt/scratch", "PUBLISHED", ())
    assert anvil.share("none") is None
    assert (double.logins, double.asked[0]) == (1, "POST /login")
    assert not double.violations


def test_a_session_that_ended_is_renewed_once_for_all_threads(double: Double, anvil: Anvil) -> None:
    double.add_share("projects")
    anvil.shares()
    double.forget_sessions()
    threads = [threading.Thread(target=anvil.shares) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert double.logins == 2
    assert not double.violations


def test_a_credential_that_is_refused_is_not_tried_again_and_again(
    double: Double, authority: tuple[Authority, Path]
) -> None:
    client = connect(double, authority[1], password="wrong-password-of-mine")
    with pytest.raises(UpstreamInvalid, match=r"hammerspace\.username") as raised:
        client.shares()
    client.close()
    assert double.logins == 1
    assert "wrong-password-of-mine" not in raised.value.message and USER not in raised.value.message.replace(
        "nexus.", ""
    )


def test_one_who_may_do_nothing_is_told_so_after_one_more_login(double: Double, anvil: Anvil) -> None:
    double.broken += [(403, b"no"), (403, b"no")]
    with pytest.raises(UpstreamInvalid, match="403"):
        anvil.shares()
    assert double.logins == 2


def test_an_anvil_that_nobody_vouches_for_is_not_told_the_password(double: Double) -> None:
    client = connect(double, None)
    with pytest.raises(UpstreamInvalid, match="ca_file"):
        client.shares()
    client.close()
    assert not double.asked


def test_a_certificate_for_another_host_is_refused(double: Double, authority: tuple[Authority, Path]) -> None:
    client = Anvil("127.0.0.1", double.port, USER, SecretStr(PASSWORD), ca_file=authority[1])
    with pytest.raises(UpstreamInvalid, match="certificate"):
        client.shares()
    client.close()
    assert not double.asked


def test_a_ca_file_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="ca_file"):
        Anvil("localhost", 1, USER, SecretStr(PASSWORD), ca_file=tmp_path / "ca.pem")


def test_an_anvil_that_is_away_is_unavailable(double: Double, authority: tuple[Authority, Path]) -> None:
    client = Anvil("localhost", 9, USER, SecretStr(PASSWORD), ca_file=authority[1])
    with pytest.raises(Unavailable, match="cannot be reached"):
        client.shares()
    client.close()


def test_a_share_is_made_by_a_task_that_is_waited_for(double: Double, authority: tuple[Authority, Path]) -> None:
    time = Time()
    client = connect(double, authority[1], time)
    double.as_tasks.append([("VALIDATING", ""), ("EXECUTING", ""), ("EXECUTING", ""), ("COMPLETED", "")])
    task = client.create_share("robots", "/robots", "made by Nexus")
    assert task.went_well and time.pauses == [2, 2, 2, 2]
    found = client.share("robots")
    assert found is not None and found.path == "/robots"
    client.close()
    assert not double.violations


@pytest.mark.parametrize("status", ["FAILED", "HALTED", "CANCELLED", "VALIDATION_FAILED", "RESUMED"])
def test_a_task_that_ended_otherwise_did_not_go_well(double: Double, anvil: Anvil, status: str) -> None:
    double.as_tasks.append([("EXECUTING", ""), (status, f"no room for {USER}:{PASSWORD}")])
    task = anvil.create_share("robots", "/robots", "")
    assert (task.status, task.went_well, task.is_under_way) == (status, False, False)
    assert PASSWORD not in task.message and "no room" in task.message
    assert anvil.share("robots") is None


def test_waiting_for_a_task_ends_at_its_deadline(double: Double, authority: tuple[Authority, Path]) -> None:
    time = Time()
    client = connect(double, authority[1], time)
    double.as_tasks.append([("EXECUTING", "")])
    task = client.create_share("robots", "/robots", "")
    assert task.is_under_way and not task.went_well
    assert time.now <= 60 and time.pauses == [2] * 15 + [4] * 7
    client.close()


def test_a_look_at_a_task_that_fails_is_no_end_of_it(double: Double, anvil: Anvil) -> None:
    begun = Task("a59ad344", "NONE")
    double.tasks["a59ad344"] = [("COMPLETED", "")]
    double.broken += [(503, b""), (500, b"")]
    assert anvil.finish(begun) == Task("a59ad344", "COMPLETED")


def test_an_objective_is_validated_defined_applied_and_taken_off(double: Double, anvil: Anvil) -> None:
    double.add_share("big share & more")
    anvil.validate(EXPRESSION)
    assert anvil.create_objective("nexus cold", "of a test", EXPRESSION).went_well
    assert [(one.name, one.expression) for one in anvil.objectives()] == [("nexus cold", EXPRESSION)]
    for _ in range(2):
        assert anvil.set_objective("big share & more", "/", "nexus cold").went_well
    assert double.applied == [("big share & more", "/", "nexus cold")]
    found = anvil.share("big share & more")
    assert found is not None and found.objectives == ("nexus cold",)
    assert anvil.unset_objective("big share & more", "/", "nexus cold").went_well
    assert not double.applied and not double.violations


def test_what_is_in_a_name_or_a_path_stays_in_it(double: Double, anvil: Anvil) -> None:
    double.add_share("a/b?c#d%2F ü&path=/")
    anvil.validate(EXPRESSION)
    anvil.create_objective("x&path=/", "", EXPRESSION)
    anvil.set_objective("a/b?c#d%2F ü&path=/", "/dir with/&objective-identifier=y?#%2e%2e", "x&path=/")
    assert double.applied == [("a/b?c#d%2F ü&path=/", "/dir with/&objective-identifier=y?#%2e%2e", "x&path=/")]
    assert not double.violations


def test_an_expression_that_is_none_is_refused_with_the_anvils_words(double: Double, anvil: Anvil) -> None:
    with pytest.raises(InvalidRequest, match="LAUNCH"):
        anvil.validate('IF LAUNCH THEN {SLO("keep-online")}')
    with pytest.raises(InvalidRequest, match="validated first"):
        anvil.create_objective("unchecked", "", EXPRESSION)
    assert double.violations == ["an expression is validated first"]


def test_an_objective_for_a_share_that_is_not_there_is_not_found(double: Double, anvil: Anvil) -> None:
    with pytest.raises(NotFound):
        anvil.set_objective("none", "/", "nexus cold")


def test_an_order_that_becomes_a_task_is_not_waited_for(double: Double, anvil: Anvil) -> None:
    double.add_share("projects")
    anvil.validate(EXPRESSION)
    anvil.create_objective("nexus cold", "", EXPRESSION)
    double.as_tasks.append([("EXECUTING", ""), ("COMPLETED", "")])
    task = anvil.set_objective("projects", "/", "nexus cold")
    assert task.is_under_way
    assert [anvil.task(task.uuid).status, anvil.task(task.uuid).status] == ["EXECUTING", "COMPLETED"]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (500, b"java.lang.NullPointerException at /opt/anvil/lib", Unavailable),
        (503, b"", Unavailable),
        (429, b"", Unavailable),
        (200, b"<html>sign in</html>", UpstreamInvalid),
        (200, b'{"shares": []}', UpstreamInvalid),
        (200, b'[{"name": 1}]', UpstreamInvalid),
        (200, b"[1]", UpstreamInvalid),
        (200, b"[" + b" " * MOST_BYTES + b"]", UpstreamInvalid),
        (302, b"", UpstreamInvalid),
        (418, b"", UpstreamInvalid),
        (400, b"the user " + PASSWORD.encode() + b" at 10.0.0.7 reads /etc/anvil/secret.conf", InvalidRequest),
    ],
    ids=lambda value: value[:12].decode() if isinstance(value, bytes) else str(value),
)
def test_nonsense_has_a_name_and_tells_no_secret(
    double: Double, anvil: Anvil, status: int, body: bytes, error: type[NexusError]
) -> None:
    double.broken.append((status, body))
    with pytest.raises(error) as raised:
        anvil.shares()
    told = raised.value.message
    assert not any(secret in told for secret in (PASSWORD, "10.0.0.7", "/etc/anvil", "/opt/anvil", "localhost"))


@pytest.mark.skipif("NEXUS_TEST_ANVIL_URL" not in os.environ, reason="NEXUS_TEST_ANVIL_URL names no Anvil")
def test_a_real_anvil_speaks_as_the_double_does() -> None:
    """Reads only: `https://user:password@host:8443`, NEXUS_TEST_ANVIL_CA if the system knows no authority."""
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(os.environ["NEXUS_TEST_ANVIL_URL"])
    ca_file = Path(os.environ["NEXUS_TEST_ANVIL_CA"]) if "NEXUS_TEST_ANVIL_CA" in os.environ else None
    secret = SecretStr(unquote(parts.password or ""))
    client = Anvil(parts.hostname or "", parts.port or 8443, unquote(parts.username or ""), secret, ca_file=ca_file)
    client.check()
    shares = client.shares()
    assert shares and client.share(shares[0].name) is not None
    assert client.share("there is no share of this name") is None
    assert client.objectives()
    client.validate(EXPRESSION)
    with pytest.raises(InvalidRequest):
        client.validate('IF THERE IS NO SUCH WORD THEN {SLO("keep-online")}')
    client.close()
