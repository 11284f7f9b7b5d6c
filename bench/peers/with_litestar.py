"""The same routes in Litestar, which decodes and checks with msgspec too: uvicorn bench.peers.with_litestar:app"""

from typing import Annotated, Any

import msgspec

# Not a dependency of this project.
from litestar import Litestar, Response, get, post
from litestar.exceptions import ClientException
from litestar.params import Parameter

from bench.peers import work
from bench.peers.shared import tune_gc


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Litestar converts values that are decoded already, so the inputs cannot be raw."""

    agent_name: str
    inputs: dict[str, Any] = {}
    async_run: bool = False
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


AGENTS = {"add": (work.AddInputs, work.add)}


@get("/agents")  # type: ignore[untyped-decorator, unused-ignore]
async def list_agents() -> work.AgentList:
    return work.agent_list()


@post("/run/flock", status_code=200)  # type: ignore[untyped-decorator, unused-ignore]
async def run_flock(
    data: Request, request_id: Annotated[str | None, Parameter(header="X-Request-ID")] = None
) -> Response[work.Run]:
    try:
        type_, function = AGENTS[data.agent_name]
        inputs = msgspec.convert(data.inputs, type_)
    except (KeyError, ValueError) as exc:
        raise ClientException(str(exc)) from exc
    run = work.new_run(data.agent_name, request_id or work.new_request_id())
    await work.execute(run, function, inputs)
    headers = {"X-Request-ID": run.request_id, "Flock-Run-Status": run.status}
    return Response(run, headers=headers)


handlers: list[Any] = [list_agents, run_flock]
app = Litestar(handlers, openapi_config=None)
tune_gc()
