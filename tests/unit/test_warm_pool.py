"""Which sleeping engines a replica may own, and which it may end: see `deployments.replica.warm_pool`."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.capacity.fit import Model, fit
from cluster.capacity.kv_cache import Slot
from cluster.config import Config, Fleet, FleetSpec
from deployments.replica.warm_pool import EngineName, fitting, name_for, outdated

PARTS = st.sampled_from(["a", "b", "c"])
NOTHING_CHOSEN = fit(Model({"model_type": "llama"}, {}), Slot("gpu"))
NAMES = st.builds(EngineName, node=PARTS, fleet=PARTS, kind=PARTS, devices=PARTS, serial=PARTS).map(str)


def spec(name: str = "chat", store: str = "file:///s", **fleet: object) -> FleetSpec:
    return Config(store=store).spec_of(name, Fleet.model_validate(fleet))


def test_engines_of_another_fleet_are_neither_owned_nor_ended() -> None:
    """Replicas used to end every sleeping engine on their machine that was started otherwise, so two fleets ended each other's."""
    chat, embed = name_for(spec("chat"), "node", {}), name_for(spec("embed", max_num_seqs=4), "node", {})
    names = [str(chat.next()), str(embed.next())]
    assert fitting(chat, names) == names[:1] and fitting(embed, names) == names[1:]
    assert outdated(chat, names) == outdated(embed, names) == []


def test_other_arguments_make_the_fleets_own_engines_outdated() -> None:
    old, new = name_for(spec(), "node", {}), name_for(spec(max_num_seqs=4), "node", {})
    name = str(old.next())
    assert fitting(new, [name]) == [] and outdated(new, [name]) == [name]
    assert fitting(old, [name]) == [name] and outdated(old, [name]) == []
    parsing = name_for(spec(engine={"tool_call_parser": "hermes"}), "node", {})
    assert outdated(parsing, [name]) == [name]


def test_settings_that_the_engine_is_not_started_with_change_nothing() -> None:
    assert name_for(spec(), "node", {}) == name_for(spec(warm_pool_s=1.0, swap="keep", max_replicas=7), "node", {})
    assert name_for(spec(), "node", {}).kind != name_for(spec(store="file:///t"), "node", {}).kind


def test_engines_on_other_accelerators_are_left_alone() -> None:
    here = name_for(spec(), "node", {"CUDA_VISIBLE_DEVICES": "0"})
    there = str(name_for(spec(), "node", {"CUDA_VISIBLE_DEVICES": "1"}).next())
    assert fitting(here, [there]) == outdated(here, [there]) == []


@given(NAMES.map(EngineName.parse), st.lists(NAMES))
def test_no_engine_is_both_and_none_of_another_fleet_or_machine_is_either(mine: EngineName, names: list[str]) -> None:
    mine = mine._replace(serial="")
    may_own, ends = fitting(mine, names), outdated(mine, names)
    assert not set(may_own) & set(ends)
    assert all(name.startswith(f"{mine.node} {mine.fleet} ") for name in [*may_own, *ends])


@given(NAMES)
def test_a_name_is_read_back(name: str) -> None:
    assert str(EngineName.parse(name)) == name
    assert EngineName.parse(f"{name} more") is None and EngineName.parse("") is None


def test_what_the_fleet_leaves_open_does_not_part_engines() -> None:
    """It is chosen when an engine starts, from shapes and settings. Weights that an engine takes over in place have the same, and so would have
    been given the same; for others another engine starts in its place (`deployments.replica.swap.Swap.fits`)."""
    assert name_for(spec(), "node", {}) == name_for(spec().fitted(NOTHING_CHOSEN), "node", {})
    assert name_for(spec(), "node", {}).kind != name_for(spec(kv_cache_bytes=1 << 20), "node", {}).kind
