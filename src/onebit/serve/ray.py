"""Many machines: replicas of one model under Ray Serve, which starts, watches and chooses them.

serve run onebit.serve.ray:app model=model.onebit replicas=2
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ByteSize, ConfigDict, Field
from ray import serve

from onebit.llm import SHIPPED_MODEL, load
from onebit.serve.app import create_app
from onebit.serve.service import Options

# Sends all requests of a session to one replica, whose cache knows the conversation.
_SESSION_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Arguments(BaseModel):
    """What follows `serve run onebit.serve.ray:app`, as name=value; like the options of `onebit serve`.

    Args:
        model: what `onebit.load` takes, seen from each machine; None: the shipped model.
        name: that requests call it by; None: its file's.
        replicas: how many, or the least of them.
        max_replicas: the most of them; None: no autoscaling.
        target_requests: requests in flight for each replica that autoscaling aims at.
        sessions: requests with the same X-Session-Id go to the same replica.
        threads: of each replica, and the CPUs that Ray sets aside for it.
        kv_cache: bf16, int8 or fp8.
        memory: for keys and values of each replica, as 2GiB.
        normalize: prompts lose soft hyphens, zero-width characters and runs of white space.
        context: most tokens of a text; None: the model's.
        max_num_seqs: texts that a replica computes at once.
        max_queue: texts that may wait in a replica.
        api_key_file: keys, one a line; None: open to all.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    name: str | None = None
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    target_requests: int = Field(16, ge=1)
    sessions: bool = False
    threads: int = Field(1, ge=1)
    kv_cache: str = "bf16"
    memory: ByteSize = ByteSize(2**30)
    normalize: bool = False
    context: int | None = Field(None, ge=1)
    max_num_seqs: int = Field(64, ge=1)
    max_queue: int = Field(256, ge=0)
    api_key_file: Path | None = None


class Replica:
    """A server in a process of Ray's."""

    app: FastAPI

    def check_health(self) -> None:
        """Have Ray replace this replica once its model has stopped.

        Raises:
            RuntimeError: it has.
        """
        service = self.app.state.service
        if service.state == "ready" and not all(served.runner.is_alive for served in service.served):
            raise RuntimeError("the model has stopped")


def app(args: Arguments) -> Any:
    """The application that Ray Serve runs.

    Args:
        args: see `Arguments`.

    Returns:
        A deployment, bound.

    Raises:
        ValueError: a file of keys that holds none.
        OSError: that file cannot be read.
    """
    keys = args.api_key_file.read_text("utf-8").split() if args.api_key_file else []
    if args.api_key_file and not keys:
        raise ValueError(f"{args.api_key_file} holds no key; expected one a line")
    options = Options(
        max_num_seqs=args.max_num_seqs,
        cache_bytes=int(args.memory),
        context=args.context,
        max_queue=args.max_queue,
        api_keys=keys,
    )

    def build() -> FastAPI:
        path = Path(args.model or SHIPPED_MODEL)
        name = args.name or path.name.removesuffix(".onebit").removesuffix(".gguf")
        llm = load(args.model, args.threads, args.kv_cache, normalize=args.normalize)
        return create_app({name: llm}, options)

    size: dict[str, Any] = {"num_replicas": args.replicas}
    if args.max_replicas is not None:
        scale = {"min_replicas": args.replicas, "max_replicas": args.max_replicas}
        size = {"autoscaling_config": scale | {"target_ongoing_requests": args.target_requests}}
    if args.sessions:
        size["request_router_config"] = {"request_router_class": _SESSION_ROUTER}
    deployment = serve.deployment(
        serve.ingress(build)(Replica),
        name="onebit",
        # The replica itself refuses what is too much, with 429.
        max_ongoing_requests=2 * (args.max_num_seqs + args.max_queue),
        ray_actor_options={"num_cpus": args.threads},
        **size,
    )
    return deployment.bind()
