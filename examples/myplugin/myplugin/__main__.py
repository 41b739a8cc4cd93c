from myplugin.driver import BridgeDriver
from netplugin_sdk import run
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.linux import links


def addresses() -> PoolIpamDriver:
    """Its own addresses, for ``docker network create --ipam-driver myplugin``."""
    return PoolIpamDriver(occupied=links.occupied)


def main() -> None:
    """Serve the driver until SIGTERM."""
    run(BridgeDriver, addresses, name="myplugin", description="Docker network driver like the built-in bridge.")


if __name__ == "__main__":
    main()
