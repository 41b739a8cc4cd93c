import argparse

from myplugin.driver import BridgeDriver
from netplugin_sdk import DriverError, serve
from netplugin_sdk.ipam import PoolIpamDriver
from netplugin_sdk.linux import links


def main() -> None:
    """Serve the driver until SIGTERM."""
    parser = argparse.ArgumentParser(prog="myplugin", description="Docker network driver like the built-in bridge.")
    parser.add_argument("--name", default="myplugin", help="name of the driver for docker (default: %(default)s)")
    parser.add_argument("--log-format", choices=["text", "json"], default="text", help="form of the log on stderr")
    arguments = parser.parse_args()
    try:
        addresses = PoolIpamDriver(occupied=links.occupied)
        serve(BridgeDriver(), addresses, name=arguments.name, log_format=arguments.log_format)
    except (DriverError, ValueError) as error:
        parser.exit(1, f"myplugin: {error}\n")


if __name__ == "__main__":
    main()
