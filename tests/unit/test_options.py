from __future__ import annotations

import enum
from collections.abc import Mapping
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import Annotated, Any, Generic

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta, field

from netplugin_sdk import DriverOptions, InvalidOption, MacAddress, NetworkDriver
from netplugin_sdk.network import OptionsT
from netplugin_sdk.values import IPAddress

from .lab import Options, Recorder


class Mode(enum.Enum):
    BRIDGE = "bridge"
    ROUTED = "routed"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Known(DriverOptions):
    mtu: Annotated[int, Meta(ge=68, le=65535)] = field(name="com.docker.network.driver.mtu", default=1500)
    isolated: bool = False
    rate: float = 1.0
    mode: Mode = Mode.BRIDGE
    level: Level = Level.LOW
    name: Annotated[str, Meta(pattern="^[a-z]+$")] | None = None
    address: IPv4Address | None = None
    address6: IPv6Address | None = None
    interface: IPv4Interface | None = None
    interface6: IPv6Interface | None = None
    subnet: IPv4Network | None = None
    subnet6: IPv6Network | None = None
    mac: MacAddress | None = None
    vlan: Annotated[int, Meta(ge=1, le=4094)] | None = None


ALL = (
    "known options: address, address6, com.docker.network.driver.mtu, interface, interface6, isolated, level, mac, "
    "mode, name, rate, subnet, subnet6, vlan"
)


def refusal(kind: type[DriverOptions], given: Mapping[str, str]) -> str:
    with pytest.raises(InvalidOption) as caught:
        kind.parse(given)
    assert caught.value.status == 400
    return str(caught.value)


def test_without_options_there_are_the_defaults() -> None:
    options = Known.parse({})
    assert (options.mtu, options.isolated, options.rate, options.mode, options.level) == (
        1500,
        False,
        1.0,
        Mode.BRIDGE,
        Level.LOW,
    )
    assert (options.name, options.address, options.mac, options.vlan) == (None, None, None, None)


@pytest.mark.parametrize(
    ("option", "text", "attribute", "value"),
    [
        ("com.docker.network.driver.mtu", "1400", "mtu", 1400),
        ("com.docker.network.driver.mtu", "68", "mtu", 68),
        ("isolated", "true", "isolated", True),
        ("isolated", "True", "isolated", True),
        ("isolated", "1", "isolated", True),
        ("isolated", "false", "isolated", False),
        ("isolated", "0", "isolated", False),
        ("rate", "0.5", "rate", 0.5),
        ("rate", "2", "rate", 2.0),
        ("mode", "routed", "mode", Mode.ROUTED),
        ("level", "2", "level", Level.HIGH),
        ("name", "eth", "name", "eth"),
        ("name", "null", "name", "null"),
        ("address", "192.0.2.1", "address", ip_address("192.0.2.1")),
        ("address6", "fd00::1", "address6", ip_address("fd00::1")),
        ("interface", "192.0.2.1/24", "interface", ip_interface("192.0.2.1/24")),
        ("interface6", "fd00::1/64", "interface6", ip_interface("fd00::1/64")),
        ("subnet", "192.0.2.0/24", "subnet", ip_network("192.0.2.0/24")),
        ("subnet6", "fd00::/64", "subnet6", ip_network("fd00::/64")),
        ("mac", "02-42-0A-7B-00-4D", "mac", MacAddress("02:42:0a:7b:00:4d")),
        ("vlan", "4094", "vlan", 4094),
    ],
)
def test_a_text_becomes_the_fields_type(option: str, text: str, attribute: str, value: Any) -> None:
    read = getattr(Known.parse({option: text}), attribute)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("option", "text", "reason"),
    [
        ("com.docker.network.driver.mtu", "67", "expected int >= 68"),
        ("com.docker.network.driver.mtu", "65536", "expected int <= 65535"),
        ("com.docker.network.driver.mtu", "big", "expected int"),
        ("com.docker.network.driver.mtu", "", "expected int"),
        ("isolated", "yes", "expected true or false"),
        ("isolated", "", "expected true or false"),
        ("rate", "fast", "expected float"),
        ("mode", "nat", "expected bridge or routed"),
        ("level", "3", "expected 1 or 2"),
        ("name", "eth0", "expected str matching regex '^[a-z]+$'"),
        ("address", "fd00::1", "expected an IPv4 address: Expected 4 octets in 'fd00::1'"),
        ("subnet", "192.0.2.1/24", "expected an IPv4 network: 192.0.2.1/24 has host bits set"),
        ("subnet6", "fd00::/129", "expected an IPv6 network: '129' is not a valid netmask"),
        ("mac", "02:42", "'02:42' is not a MAC address"),
        ("vlan", "4095", "expected int <= 4094"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_option(option: str, text: str, reason: str) -> None:
    assert refusal(Known, {"rate": "1", option: text}) == f"option {option}={text!r}: {reason}"


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    assert refusal(Known, {"isolated": "1", "isolate": "1"}) == f"unknown option 'isolate'; {ALL}"


def test_an_option_goes_by_its_name_on_the_wire_only() -> None:
    assert refusal(Known, {"mtu": "1400"}).startswith("unknown option 'mtu'; ")


@pytest.mark.parametrize("name", ["two\nlines", "", "a - at `$.b`", "`quoted`"])
def test_an_unknown_option_with_a_strange_name(name: str) -> None:
    text = refusal(Known, {name: "1"})
    assert text.startswith("unknown option ")
    assert "\n" not in text
    assert text.endswith(ALL)


def test_a_driver_without_options_refuses_any() -> None:
    assert refusal(DriverOptions, {"mtu": "1400"}) == "unknown option 'mtu'; this driver has no options"
    assert DriverOptions.parse({}) == DriverOptions()


class Required(DriverOptions):
    parent: str = field(name="my.parent")
    vlan: int = 0


def test_an_option_without_default_must_be_given() -> None:
    known = "known options: my.parent, vlan"
    assert refusal(Required, {"vlan": "3"}) == f"option 'my.parent' must be given; {known}"
    assert Required.parse({"my.parent": "eth0"}).parent == "eth0"


class Lenient(DriverOptions, forbid_unknown_fields=False):
    vlan: int = 0


def test_a_driver_can_accept_what_it_does_not_know() -> None:
    assert Lenient.parse({"vlan": "3", "whatever": "1"}) == Lenient(vlan=3)
    assert refusal(Lenient, {"vlan": "x"}) == "option vlan='x': expected int"


class EitherVersion(DriverOptions):
    gateway: IPAddress | None = None


def test_an_address_of_either_version() -> None:
    assert EitherVersion.parse({"gateway": "192.0.2.1"}).gateway == ip_address("192.0.2.1")
    assert EitherVersion.parse({"gateway": "fd00::1"}).gateway == ip_address("fd00::1")


@settings(max_examples=100)
@given(
    st.dictionaries(st.sampled_from(sorted(Known.__struct_encode_fields__)) | st.text(max_size=8), st.text(max_size=8))
)
def test_any_options_are_parsed_or_refused(given: dict[str, str]) -> None:
    try:
        assert isinstance(Known.parse(given), Known)
    except InvalidOption as error:
        assert str(error).startswith("option ") or str(error).endswith(ALL)  # noqa: PT017


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Listing(DriverOptions):
    dns: list[IPAddress] = field(default_factory=list)
    vlans: Annotated[tuple[int, ...], Meta(max_length=3)] = ()
    modes: frozenset[Colour] | None = None


def test_lists_are_separated_by_commas() -> None:
    found = Listing.parse({"dns": "192.0.2.1, fd00::1", "vlans": "3,4", "modes": "red,blue,red"})
    assert found.dns == [ip_address("192.0.2.1"), ip_address("fd00::1")]
    assert found.vlans == (3, 4)
    assert found.modes == frozenset({Colour.RED, Colour.BLUE})
    assert Listing.parse({"dns": ""}).dns == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"vlans": "3,x"}, "option vlans='3,x': expected int"),
        ({"vlans": "1,2,3,4"}, "option vlans='1,2,3,4': expected array of length <= 3"),
        ({"modes": "red,green"}, "option modes='red,green': expected red or blue"),
        ({"dns": "192.0.2.1,there"}, "option dns='192.0.2.1,there': 'there' does not appear to be"),
    ],
)
def test_a_wrong_item_of_a_list_is_one_line(given: dict[str, str], said: str) -> None:
    assert refusal(Listing, given).startswith(said)


# Where a driver says which


def test_options_of_a_driver_follow_from_its_base() -> None:
    assert Recorder.options_type is Options


def test_a_driver_that_names_no_options_has_none() -> None:
    class Plain(NetworkDriver):
        pass

    assert Plain.options_type is DriverOptions


def test_options_of_a_driver_that_is_subclassed_again() -> None:
    class Further(Recorder):
        pass

    assert Further.options_type is Options


def test_options_named_through_a_generic_base_of_the_author() -> None:
    class Base(NetworkDriver[OptionsT], Generic[OptionsT]):
        pass

    class Mine(Base[Known]):
        pass

    assert Mine.options_type is Known


def test_options_set_by_hand_in_a_subclass_are_kept() -> None:
    class Further(Recorder):
        options_type = Known

    assert Further.options_type is Known
