"""A Docker network driver that does nothing: its containers have a loopback interface, and that is all."""

from netplugin_sdk import Endpoint, Join, Network, NetworkDriver, Sandbox, serve


class Null(NetworkDriver):
    """Everything is allowed, and nothing is made."""

    def create_network(self, network: Network) -> None:
        """Nothing to make."""

    def delete_network(self, network: Network) -> None:
        """Nothing to remove."""

    def delete_endpoint(self, network: Network, endpoint: Endpoint) -> None:
        """Nothing to remove."""

    def join(self, network: Network, endpoint: Endpoint, sandbox: Sandbox) -> Join:
        """No interface, no gateway, no routes."""
        return Join()


if __name__ == "__main__":
    serve(Null(), name="nullnet")
