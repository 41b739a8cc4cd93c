"""Docker's side of the contract, without Docker: the Container Network Model.

    with NetworkController() as controller:
        lan = controller.create_network("lan", "myplugin", subnets=[Subnet.parse("10.1.0.0/24")])
        one, two = controller.create_sandbox("one"), controller.create_sandbox("two")
        one.connect(lan)
        two.connect(lan)
        print(one.run("ping", "-c1", "two"))

A plugin gets request for request what an engine would send. It needs root; it makes its interfaces in the network
namespace of the calling thread, and its end removes it.
"""

from netplugin_sdk.cnm.controller import NetworkController
from netplugin_sdk.cnm.endpoint import Endpoint
from netplugin_sdk.cnm.network import Network
from netplugin_sdk.cnm.records import ENGINES, Subnet
from netplugin_sdk.cnm.remote import MethodNotSupported, RemoteError, RemotePlugin
from netplugin_sdk.cnm.sandbox import Sandbox

__all__ = [
    "ENGINES",
    "Endpoint",
    "MethodNotSupported",
    "Network",
    "NetworkController",
    "RemoteError",
    "RemotePlugin",
    "Sandbox",
    "Subnet",
]
