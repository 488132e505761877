"""Adapters through the real gateway: what tenants see of each other, and what runs are given."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from realm.messages import AdapterState
from tests.fake_host import async_test, eventually, fake_host
from tests.gateway_adapters import CONFIG, add, begin, blob, files, names, send, weights

# --- tenants -------------------------------------------------------------------------------------


@async_test
async def test_a_tenant_reaches_no_other_tenants_adapters(tmp_path: Path) -> None:
    secret = weights(7)
    async with (
        fake_host(tmp_path) as host,
        host.client() as alice,
        host.client("bob") as bob,
        host.client("admin") as admin,
    ):
        mine = await add(alice, "legal", secret)
        await add(bob, "own", weights(8))
        host.engine.asked.clear()
        for other, own in ((bob, ["own"]), (admin, [])):
            assert await names(other) == own
            for function, params in (
                ("adapters.show", {}),
                ("adapters.pin", {"pinned": True}),
                ("adapters.remove", {}),
            ):
                there, nowhere = [await other.error(function, name=name, **params) for name in ("legal", "legax")]
                assert there["code"] == "adapter_not_found" and there["details"] == {"available": own}
                # Nothing tells one that is another's from one that is nobody's.
                assert there["message"].replace("legal", "legax") == nowhere["message"]
                assert there["details"] == nowhere["details"]
            error = await other.error("generate", prompt="x", adapter="legal")
            assert error["code"] == "adapter_not_found" and error["details"] == {"available": own}
        # Not even the admin key shares what is not the admin's; a tenant's key shares nothing.
        assert (await admin.error("adapters.share", name="legal", shared=True))["code"] == "adapter_not_found"
        assert (await alice.error("adapters.share", name="legal", shared=True))["code"] == "forbidden"
        assert "alice" not in host.engine.asked
        # `exists` is about the own content only.
        begun = await begin(bob, "copy", secret)
        assert begun["exists"] is False and begun["received"] == 0
        await bob.data("adapters.abort", upload=begun["upload"])
        # The same name and the same content are another's adapter all the same.
        await add(bob, "legal", weights(9))
        copied = await add(bob, "copy", secret)
        assert copied["version"] == 1
        assert await alice.data("adapters.show", name="legal") == mine
        await bob.data("adapters.remove", name="legal")
        await bob.data("adapters.remove", name="copy")
        assert await alice.data("adapters.show", name="legal") == mine and blob(host, secret).exists()
        assert not host.worker.starts
        # An upload is its connection's: another one cannot commit it, not even with the same key.
        upload = await send(alice, "x", weights(10))
        assert (await bob.error("adapters.commit", upload=upload))["code"] == "upload_not_found"
        # And a tenant's name in the parameters or the call is no way round the key.
        await bob.send({"id": "t", "function": "adapters.list", "tenant_id": "alice"})
        assert (await bob.receive())["error"]["code"] == "tenant_mismatch"
        assert [a["name"] for a in (await bob.data("adapters.list", tenant="alice"))["adapters"]] == ["own"]


@async_test
async def test_the_operator_shares_an_adapter(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as alice, host.client("admin") as admin:
        await add(admin, "house", weights(1))
        await add(alice, "own", weights(2))
        assert await names(alice) == ["own"]
        shared = await admin.data("adapters.share", name="house", shared=True)
        assert shared["shared"] is True and shared["own"] is True and shared["sequences"] == 0
        assert await names(alice) == ["house", "own"]
        host.engine.states[""] = [AdapterState("house", "resident", 5, 3)]
        seen = await alice.data("adapters.show", name="house")
        assert seen["own"] is False and seen["shared"] is True and seen["state"] == "resident"
        # What the others do with it is not a tenant's to know.
        assert "sequences" not in seen and "loads" not in seen
        assert (await admin.data("adapters.show", name="house"))["sequences"] == 5
        await alice.data("generate", prompt="x", adapter="house")
        for function, params in (("adapters.pin", {"pinned": True}), ("adapters.remove", {})):
            error = await alice.error(function, name="house", **params)
            assert error["code"] == "forbidden"
        # One of its own hides it, and only for that tenant.
        await add(alice, "house", weights(3))
        seen = await alice.data("adapters.show", name="house")
        assert seen["own"] is True and seen["shared"] is False and seen["state"] == "registered"
        assert await names(alice) == ["house", "own"]
        async with host.client("bob") as bob:
            assert (await bob.data("adapters.show", name="house"))["own"] is False
        await alice.data("adapters.remove", name="house")
        assert (await alice.data("adapters.show", name="house"))["own"] is False
        await admin.data("adapters.share", name="house", shared=False)
        assert await names(alice) == ["own"]
        assert (await alice.error("generate", prompt="x", adapter="house"))["details"] == {"available": ["own"]}
        # Removed while it is shared.
        await admin.data("adapters.share", name="house", shared=True)
        await admin.data("adapters.remove", name="house")
        assert await names(alice) == ["own"] and await names(admin) == []
        assert (await admin.error("adapters.share", name="house", shared=True))["code"] == "adapter_not_found"


@async_test
async def test_content_stays_while_a_module_or_a_tenant_has_it(tmp_path: Path) -> None:
    content = weights()
    async with fake_host(tmp_path) as host, host.client() as alice, host.client("bob") as bob:
        await add(alice, "legal", content)
        await add(bob, "legal", content)
        # The fake compiler refuses what is no module, so this one is put in by hand.
        sha256 = hashlib.sha256(content).hexdigest()
        file = host.registry.blobs.incoming()
        file.write_bytes(content)
        await host.gateway.commit_module("bob", "m", file, sha256, len(content), [])
        await alice.data("adapters.remove", name="legal")
        await bob.data("adapters.remove", name="legal")
        assert files(host) == [content]
        await bob.data("modules.remove", name="m")
        await eventually(lambda: files(host) == [])


# --- generate ------------------------------------------------------------------------------------


@async_test
async def test_generate_passes_the_adapter_on(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await add(client, "legal", weights())
        await client.data("generate", prompt="x", adapter="legal")
        await client.data("generate", prompt="x", adapter=None)
        given = [json.loads(start.input) for start in host.worker.starts]
        assert given[0]["adapter"] == "legal" and "adapter" not in given[1]
        error = await client.error("generate", prompt="x", adapter="terse")
        assert error["code"] == "adapter_not_found" and error["details"] == {"available": ["legal"]}
        assert "'terse'" in error["message"] and len(host.worker.starts) == 2


@async_test
async def test_adapters_of_another_model_are_kept_and_not_used(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client, host.client("admin") as admin:
        error = await client.error("adapters.begin", name="x", size=1, sha256="0" * 64, config=CONFIG, model="llama")
        assert error["code"] == "model_not_found" and error["details"] == {"available": ["tiny"]}
        await add(client, "legal", weights())
        await add(client, "both", weights(1))
        await add(admin, "both", weights(2))
        await admin.data("adapters.share", name="both", shared=True)
        keys = host.keys
    async with fake_host(tmp_path, model="other", keys=keys) as host, host.client() as client:
        assert host.engine.adapters == []
        listed = (await client.data("adapters.list"))["adapters"]
        assert [(adapter["name"], adapter["model"], adapter["own"]) for adapter in listed] == [
            ("both", "tiny", True),
            ("legal", "tiny", True),
        ]
        assert "state" not in listed[0]
        error = await client.error("generate", prompt="x", adapter="legal")
        assert error["code"] == "adapter_not_found" and "'tiny'" in error["message"]
        assert error["details"] == {"available": []}
        async with host.client("admin") as admin:
            # The operator's is for this model now: it is what the name stands for.
            await add(admin, "both", weights(3))
            both = [a for a in (await client.data("adapters.list"))["adapters"] if a["name"] == "both"]
            assert sorted((a["own"], a["model"]) for a in both) == [(False, "other"), (True, "tiny")]
            assert (await client.data("adapters.show", name="both"))["model"] == "other"
            await client.data("generate", prompt="x", adapter="both")
        # What is one's own can be removed and replaced all the same.
        await client.data("adapters.remove", name="both")
        assert (await add(client, "legal", weights(4)))["version"] == 2
        assert [file.name for file in host.engine.adapters] == ["both", "legal"]
