"""Both tables of errors, the server's and the client's, say the same; a status becomes the right exception."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import code_pb2, status_pb2
from grpc import aio

from fermata import errors
from fermata.v1 import errors_pb2
from services.common import errors as server_errors
from services.common import rpc

REASONS = [name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()[1:]]


def rpc_error(code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, bytes], ...] = ()) -> aio.AioRpcError:
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata(*metadata), details=details)


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_of_the_contract_has_a_class(reason: str) -> None:
    assert errors.BY_REASON[reason].own_reason == reason


@pytest.mark.parametrize("kind", server_errors.BY_REASON.values(), ids=lambda kind: kind.reason)
def test_server_errors_come_back(kind: type[server_errors.FermataError]) -> None:
    raised = kind(
        "what to do",
        metadata={"choice": "1"},
        violations=[server_errors.FieldViolation("n", "1 to 8")],
        retry_delay=0.25,
    )
    status = rpc.to_status(raised)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    details = ((errors.STATUS_DETAILS_KEY, status.SerializeToString()),)
    error = errors.from_rpc_error(rpc_error(code, raised.message, details))
    assert type(error) is errors.BY_REASON[kind.reason]
    assert error.code is code is type(error).status
    assert (error.reason, error.message, str(error)) == (kind.reason, "what to do", "what to do")
    assert error.metadata == {"choice": "1"}
    assert error.violations == (("n", "1 to 8"),)
    assert error.retry_delay == 0.25


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_bare_status_gives_its_family_without_a_reason(code: grpc.StatusCode) -> None:
    error = errors.from_rpc_error(rpc_error(code, ""))
    assert error.code is code
    assert (error.reason, error.message) == ("", code.name)
    assert type(error) is errors.BY_CODE.get(code, errors.FermataError)


def test_unknown_reason_keeps_its_name_and_gets_the_family() -> None:
    status = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="later")
    info = rpc.to_status(server_errors.Overloaded("x")).details[0]
    info.value = info.value.replace(b"OVERLOADED", b"QUOTA_GONE")
    status.details.append(info)
    error = errors.from_status(status)
    assert type(error) is errors.ResourceExhausted
    assert error.reason == "QUOTA_GONE"


def test_foreign_domain_is_no_reason() -> None:
    status = rpc.to_status(server_errors.NeedFrom("x"))
    status.details[0].value = status.details[0].value.replace(b"fermata", b"foreign")
    assert errors.from_status(status).reason == ""


def test_the_drawn_tree_is_the_tree() -> None:
    drawn: dict[str, tuple[str, str]] = {}
    path: list[str] = ["FermataError"]
    for line in (errors.__doc__ or "").splitlines():
        if "── " not in line:
            continue
        depth = line.index("── ") // 4
        name, *rest = line.partition("── ")[2].split()
        path[depth:] = [name]
        drawn[name] = (path[depth - 1], next((word.strip(";") for word in rest if word.strip(";") in REASONS), ""))
    classes = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FermataError)
    ]
    tree = {kind.__name__: (kind.__base__.__name__ if kind.__base__ else "", kind.own_reason) for kind in classes}
    del tree["FermataError"]
    assert drawn == tree
