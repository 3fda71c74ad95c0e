"""The object stores of these tests: one server a scheme, and an empty place in it for each test."""

from collections.abc import Iterator

import pytest

from support.object_stores import ObjectStore, missing, running


def _server(scheme: str) -> Iterator[ObjectStore]:
    if absent := missing(scheme):
        pytest.skip(f"no server for {scheme}://: {', '.join(absent)} not installed")
    with running(scheme) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="session")
def s3() -> Iterator[ObjectStore]:
    yield from _server("s3")


@pytest.fixture(scope="session")
def gs() -> Iterator[ObjectStore]:
    yield from _server("gs")


@pytest.fixture(params=["s3", "gs"])
def server(request) -> ObjectStore:
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Puts local copies on the disk of a machine; call it with a name for another machine."""

    def move_to(name: str) -> None:
        monkeypatch.setenv("MOI_JAX_STAGING", str(tmp_path / "machines" / name))

    move_to("first")
    return move_to
