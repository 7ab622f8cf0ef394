"""Several gateways, one admission: real gRPC, the real admission, and a server that goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc import aio

from cluster.config import AdmissionConfig, InternalTlsConfig
from cluster.errors import QuotaExceeded
from cluster.tls.grpc_credentials import ExpertChannels
from deployments.admission.client import AdmissionClient
from deployments.admission.local import LocalAdmission
from deployments.admission.messages import METHOD, SERVICE, TOKEN_KEY, Restore, encode_event
from deployments.admission.server import AdmissionServer
from deployments.admission.waiting_room import WaitingRoom
from routing.requests.quota import Quotas
from routing.requests.request import Ask, Priority, ReplicaLoad, Tenant, Usage
from tests.certificates import Authority
from tests.unit.routing.requests.quotas import streams_of

TOKEN = "t" * 64
CONFIG = AdmissionConfig()
SLOTS = 4
LOADS = [ReplicaLoad("r0", max_num_seqs=SLOTS, kv_cache_tokens=100_000)]
FREE = Tenant("free")


def ask(ticket: str, tenant: Tenant = FREE, prompt: int = 10, new: int = 10) -> Ask:
    return Ask(ticket, tenant, Priority.BATCH, prompt, new, 1, (), None)


async def settled(there: Callable[[], bool]) -> None:
    while not there():
        await asyncio.sleep(0.01)


class GatewayEnd:
    """One gateway's waiting room and its stream."""

    def __init__(self, fraction: float = 0.5, tls: InternalTlsConfig | None = None) -> None:
        self.room = WaitingRoom(time.monotonic)
        self.room._loads = LOADS
        self.quotas = Quotas()
        self.client = AdmissionClient(
            self.room, lambda: self._alone(fraction), self.quotas, time.monotonic, tls, reconnect_s=0.05
        )

    def _alone(self, fraction: float) -> LocalAdmission:
        return LocalAdmission(CONFIG, time.monotonic, self.room.decided, self.quotas, fraction)

    async def connected(self, wanted: bool = True) -> None:
        async with asyncio.timeout(20):
            while self.client.connected != wanted:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def server(
    tls: InternalTlsConfig | None = None, token: str = TOKEN
) -> AsyncIterator[tuple[AdmissionServer, str]]:
    made = AdmissionServer(CONFIG, time.monotonic, token, tls)
    address = await made.start("127.0.0.1")
    made.set_loads(LOADS)
    try:
        yield made, address
    finally:
        await made.stop()


@asynccontextmanager
async def gateways(
    address: str, count: int = 2, tls: InternalTlsConfig | None = None
) -> AsyncIterator[list[GatewayEnd]]:
    ends = [GatewayEnd(tls=tls) for _ in range(count)]
    try:
        for end in ends:
            end.client.set_server(address, TOKEN)
        for end in ends:
            await end.connected()
        yield ends
    finally:
        for end in ends:
            await end.client.close()


async def waits(task: asyncio.Task[object]) -> bool:
    done, _ = await asyncio.wait([task], timeout=0.3)
    return not done


def test_slots_are_shared_by_all_gateways_and_handed_on() -> None:
    async def run() -> None:
        async with server() as (_, address), gateways(address) as (one, two):
            for number in range(SLOTS):
                await asyncio.wait_for((one, two)[number % 2].room.admit(ask(f"a{number}")), 10)
            late = asyncio.create_task(two.room.admit(ask("late")))
            assert await waits(late)
            one.room.finish("a0", Usage(10, 10))
            assert (await asyncio.wait_for(late, 10)).replica_id == "r0"

    asyncio.run(run())


def test_a_quota_holds_over_all_gateways() -> None:
    async def run() -> None:
        tenant = Tenant("small", requests_per_minute=2)
        async with server() as (_, address), gateways(address) as (one, two):
            await one.room.admit(ask("a", tenant))
            await two.room.admit(ask("b", tenant))
            with pytest.raises(QuotaExceeded) as caught:
                await one.room.admit(ask("c", tenant))
            assert caught.value.limits is not None
            assert caught.value.limits.limit_requests == 2
            assert caught.value.retry_after_s > 0

    asyncio.run(run())


def test_a_lost_gateway_leaves_nothing_behind() -> None:
    async def run() -> None:
        async with server() as (_, address), gateways(address) as (one, two):
            for number in range(SLOTS):
                await one.room.admit(ask(f"a{number}"))
            waiting = asyncio.create_task(one.room.admit(ask("waits")))
            late = asyncio.create_task(two.room.admit(ask("late")))
            assert await waits(late)
            await one.client.close()
            await asyncio.wait_for(late, 10)
            waiting.cancel()

    asyncio.run(run())


def test_without_the_server_each_takes_its_part_and_comes_back() -> None:
    async def run() -> None:
        async with server() as (first, address), gateways(address) as (one, two):
            await one.room.admit(ask("before"))
            waiting = asyncio.create_task(one.room.admit(ask("during")))
            await first.stop()
            for end in (one, two):
                await end.connected(False)
            await asyncio.wait_for(waiting, 10)
            third = asyncio.create_task(one.room.admit(ask("third")))  # 2 of 4 slots are this gateway's part
            assert await waits(third)
            async with server() as (_, again):
                for end in (one, two):
                    end.client.set_server(again, TOKEN)
                    await end.connected()
                await asyncio.wait_for(third, 10)
                await asyncio.wait_for(two.room.admit(ask("fourth")), 10)
                fifth = asyncio.create_task(two.room.admit(ask("fifth")))  # what ran before was restored
                assert await waits(fifth)
                fifth.cancel()

    asyncio.run(run())


def test_what_was_spent_is_known_to_each_gateway_alone_and_to_the_next_common_admission() -> None:
    async def run() -> None:
        tenant = Tenant("small", tokens_per_minute=1_000)
        async with server() as (first, address), gateways(address) as (one, two):
            await one.room.admit(ask("a", tenant, prompt=300))
            one.room.finish("a", Usage(300, 100))
            await two.room.admit(ask("b", tenant, prompt=250))
            two.room.progress("b", 50)
            await first.stop()
            for end in (one, two):
                await end.connected(False)
            with pytest.raises(QuotaExceeded) as caught:  # 400 of its 500 are spent
                await one.room.admit(ask("c", tenant, prompt=200))
            assert 0 < caught.value.retry_after_s < 60
            await one.room.admit(ask("d", tenant, prompt=50))
            one.room.finish("d", Usage(50, 10))
            async with server(token="2" * 64) as (_, again):  # each one that starts makes its own
                for end in (one, two):
                    end.client.set_server(again, "2" * 64)
                    await end.connected()
                with pytest.raises(QuotaExceeded):  # 400 + 60 by one, 260 reserved by two
                    await two.room.admit(ask("e", tenant, prompt=450))
                await two.room.admit(ask("f", tenant, prompt=200))
                two.room.finish("b", Usage(250, 700))  # more than it had reserved
                with pytest.raises(QuotaExceeded) as caught:
                    await one.room.admit(ask("g", tenant, prompt=1))
                assert caught.value.retry_after_s > 30

    asyncio.run(run())


def test_a_common_admission_that_was_only_cut_off_is_told_nothing_twice() -> None:
    async def run() -> None:
        tenant = Tenant("small", tokens_per_minute=2_000)
        async with server() as (made, address), gateways(address, 1) as (one,):
            await one.room.admit(ask("a", tenant, prompt=300, new=100))
            one.room.progress("a", 20)
            await one.room.admit(ask("b", tenant, prompt=100))
            one.room.finish("b", Usage(100, 0))
            one.client._moved.set()  # as if the stream broke; the next decision ends it
            await one.room.admit(ask("c", tenant, prompt=40))
            one.room.finish("c", Usage(40, 0))
            await one.connected(False)
            await one.room.admit(ask("d", tenant, prompt=50))  # alone
            one.room.finish("d", Usage(50, 0))
            await one.connected()
            await one.room.admit(ask("e", tenant, prompt=10))
            one.room.finish("e", Usage(10, 0))
            await asyncio.wait_for(settled(lambda: streams_of(made._quotas, tenant) == 1), 10)
            (spending,) = made._quotas.spending(time.monotonic(), since_told=False)
            # a: reserved, b, c, d and e; less what a few seconds refill
            assert spending.tokens == pytest.approx(400 + 100 + 40 + 50 + 10, abs=120)
            one.room.finish("a", Usage(300, 30))
            await asyncio.wait_for(settled(lambda: streams_of(made._quotas, tenant) == 0), 10)
            (spending,) = made._quotas.spending(time.monotonic(), since_told=False)
            assert spending.tokens == pytest.approx(330 + 100 + 40 + 50 + 10, abs=120)

    asyncio.run(run())


def test_a_gateway_that_comes_back_before_its_loss_was_noticed_keeps_its_tickets() -> None:
    async def run() -> None:
        async with server() as (made, address), gateways(address, 1) as (one,):
            await one.room.admit(ask("a"))
            (old,) = {id(each): each for each in made._owners.values()}.values()
            async with aio.insecure_channel(address) as channel:
                call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(metadata=((TOKEN_KEY, TOKEN),))
                await call.write(encode_event(Restore(ask("a"), "r0", 3)))
                await asyncio.wait_for(settled(lambda: made._owners.get("a") not in (None, old)), 10)
                await one.client.close()
                await asyncio.sleep(0.1)
                assert set(made._owners) == {"a"}
                assert len(made._admission._admission._tickets) == 1
            await asyncio.wait_for(settled(lambda: not made._owners), 10)
            assert not made._admission._admission._tickets

    asyncio.run(run())


def test_a_stranger_is_refused() -> None:
    async def run() -> None:
        async with server() as (_, address), aio.insecure_channel(address) as channel:
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(metadata=((TOKEN_KEY, "wrong"),))
            with pytest.raises(aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(run())


def test_a_broken_message_cuts_off_only_its_sender() -> None:
    async def run() -> None:
        async with server() as (_, address), gateways(address, 1) as (good,):
            async with aio.insecure_channel(address) as channel:
                call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(metadata=((TOKEN_KEY, TOKEN),))
                await call.write(b"\xc1 not msgpack")
                assert await call.read() is aio.EOF
            await asyncio.wait_for(good.room.admit(ask("a")), 10)

    asyncio.run(run())


def test_a_message_from_another_version_is_a_loss_and_not_the_end() -> None:
    asked: list[None] = []

    async def babble(messages: AsyncIterator[bytes], context: aio.ServicerContext) -> AsyncIterator[bytes]:
        asked.append(None)
        yield b"\xc1 not msgpack"

    async def run() -> None:
        babbler = aio.server()
        handler = grpc.stream_stream_rpc_method_handler(babble)
        babbler.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        port = babbler.add_insecure_port("127.0.0.1:0")
        await babbler.start()
        one = GatewayEnd()
        one.client.set_server(f"127.0.0.1:{port}", TOKEN)
        async with asyncio.timeout(20):
            while len(asked) < 2:
                await asyncio.sleep(0.01)
        async with server() as (_, address):
            one.client.set_server(address, TOKEN)
            await one.connected()
            await asyncio.wait_for(one.room.admit(ask("a")), 10)
            await one.client.close()
        await babbler.stop(0)

    asyncio.run(run())


def test_an_unexpected_failure_of_one_attempt_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([ZeroDivisionError("ours"), OSError("theirs")])
    insecure_channel = aio.insecure_channel

    def failing_channel(*args: object, **options: object) -> aio.Channel:
        for error in failures:
            raise error
        return insecure_channel(*args, **options)

    async def run() -> None:
        async with server() as (_, address):
            one = GatewayEnd()
            monkeypatch.setattr(aio, "insecure_channel", failing_channel)
            one.client.set_server(address, TOKEN)
            await one.connected()
            one.client.check()
            await asyncio.wait_for(one.room.admit(ask("a")), 10)
            await one.client.close()

    asyncio.run(run())


def test_a_server_whose_tick_failed_says_so() -> None:
    async def run() -> None:
        async with server() as (made, _):
            made.check()
            made._admission.tick = lambda: 1 / 0  # type: ignore[method-assign,assignment]
            (task,) = made._background._running.values()
            await asyncio.wait([task], timeout=10)
            with pytest.raises(RuntimeError, match="the tick of the common admission failed"):
                made.check()

    asyncio.run(run())


def test_half_written_certificates_do_not_keep_a_gateway_away(tmp_path: Path) -> None:
    async def run() -> None:
        tls = Authority("ours").issue(tmp_path)
        async with server(tls) as (first, address), gateways(address, 1, tls) as (one,):
            tls.key_file.write_text("half")
            await first.stop()
            await one.connected(False)
            await asyncio.sleep(0.2)  # tries again with what is there
            tls = Authority("ours").issue(tmp_path)
            async with server(tls) as (_, again):
                one.client.set_server(again, TOKEN)
                await one.connected()
                await asyncio.wait_for(one.room.admit(ask("a")), 10)

    asyncio.run(run())


def test_a_certificate_of_ours_for_another_name_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        ours = Authority("ours")
        tls, other = ours.issue(tmp_path / "a"), ours.issue(tmp_path / "b", "someone-else")
        other = other.model_copy(update={"server_name": "someone-else"})
        async with server(tls) as (_, address):
            options = [("grpc.ssl_target_name_override", tls.server_name)]
            async with aio.secure_channel(address, ExpertChannels(other).credentials(), options=options) as channel:
                call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(metadata=((TOKEN_KEY, TOKEN),))
                with pytest.raises(aio.AioRpcError, match="not for deepsplit") as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(run())
